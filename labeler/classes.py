"""Which classes label maps speak of, when the teacher knows others than the images have.

A teacher may be kept to some of its classes, in any order; or several of its classes may be added
up to one of the images' own. Both are a `LabelSpace`, which a `Reduction` applies to logits:

    kept      the logits of the kept classes; what the others had is spread in proportion
    mapped    logsumexp over the teacher classes of each class: their probabilities added up

A softmax over reduced logits is the teacher's distribution, given that one of these classes is
there. Nothing that a teacher says outside of them survives: a cell of sky, kept to breeds of dogs,
becomes some dog. `*` in a class map gives all of that a class of its own.
"""

import csv
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from .sources import ImageSource

ALL, FOLDERS = "all", "folders"
"""What --keep-classes takes besides a file."""
REST = "*"
"""In a class map: all teacher classes that no other line names."""

_NEVER = 20.0
"""A class without a teacher class gets a logit this far below the lowest other one: a probability
of nothing, but a finite number, which maps can hold and distances between distributions take."""
_NUM_SHOWN = 5
_NUMBERED = re.compile(r"(?:(?:class|label|category)?[ _-]?)?\d+", re.IGNORECASE)

_logger = logging.getLogger(__name__)

Kind = Literal["all", "kept", "mapped"]


@dataclass(frozen=True, eq=False)
class ClassList:
    """The classes of a teacher, or of images, in the order of their indices."""

    owner: str
    """Whose they are, for messages."""
    num: int
    ids: Sequence[str] | None = field(default=None, repr=False)
    """What files call them: wnids or folder names; each once."""
    names: Sequence[str] | None = field(default=None, repr=False)
    """What people read; "bull mastiff", or several such, apart by commas."""

    @property
    def is_known(self) -> bool:
        """Whether the classes have names, and not only numbers."""
        called = self.names or self.ids
        return called is not None and not all(map(_NUMBERED.fullmatch, called))

    def called(self, index: int) -> str:
        """Return what to call a class in a message: its first name, and its id if it has both."""
        name = self.names[index].split(",")[0] if self.names else None
        id_ = self.ids[index] if self.ids else None
        if name is None or id_ is None or name == id_:
            return name or id_ or f"class {index}"
        return f"{name} ({id_})"

    def labels(self, index: int) -> set[str]:
        """Return all that a class is called, in lower case with blanks for _ and -."""
        found = {self.ids[index]} if self.ids else set()
        if self.names:
            found |= {self.names[index], *self.names[index].split(",")}
        return {_plain(label) for label in found}

    def find(self, text: str) -> int:
        """Return the index of the class that is meant by an id, an index or a name.

        Upper and lower case are alike in names; of several names apart by commas, one will do.

        Raises:
            ValueError: If there is no such class, with the closest names, or there are several.
        """
        if text in self._index_of_id:
            return self._index_of_id[text]
        if text.isdecimal() and int(text) < self.num:
            return int(text)
        for table in (self._with_name, self._with_synonym):
            found = table.get(_plain(text), [])
            if len(found) == 1:
                return found[0]
            if found:
                choices = ", ".join(f"{i} ({self.called(i)})" for i in found[:_NUM_SHOWN])
                raise ValueError(f"{text!r} is the name of {len(found)} classes: {choices}")
        raise ValueError(f"{self.owner} has no class {text!r}{self._hint(text)}")

    def find_all(self, text: str) -> range:
        """Return the indices that are meant by a class, or by FIRST..LAST.

        Raises:
            ValueError: As find, or if LAST comes before FIRST.
        """
        first, dots, last = text.partition("..")
        if not dots or text in self._index_of_id or _plain(text) in self._with_name:
            start = stop = self.find(text)
        else:
            start, stop = self.find(first.strip()), self.find(last.strip())
        if stop < start:
            raise ValueError(f"{text!r} is no range: class {stop} comes before class {start}")
        return range(start, stop + 1)

    def _hint(self, text: str) -> str:
        if text.isdecimal() or not (self.ids or self.names):
            return f"; its classes are 0 to {self.num - 1}"
        known = {**self._with_synonym, **self._with_name}
        known |= {id_.casefold(): [i] for id_, i in self._index_of_id.items()}
        close = difflib.get_close_matches(_plain(text), known, n=3)
        indices = dict.fromkeys(i for label in close for i in known[label])
        if not indices:
            return f"; its classes are 0 to {self.num - 1}, e.g. {self.called(0)}"
        return f"; did you mean {' or '.join(map(self.called, indices))}?"

    @cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {id_: i for i, id_ in enumerate(self.ids or ())}

    @cached_property
    def _with_name(self) -> dict[str, list[int]]:
        return _inverted([name] for name in self.names or ())

    @cached_property
    def _with_synonym(self) -> dict[str, list[int]]:
        return _inverted(name.split(",") for name in self.names or ())


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().casefold()


def _inverted(labels: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    """Return which classes have each label."""
    found: dict[str, list[int]] = {}
    for i, own in enumerate(labels):
        for label in {_plain(label) for label in own}:
            found.setdefault(label, []).append(i)
    return found


def classes_of(source: ImageSource) -> ClassList:
    """Return the classes of images."""
    return ClassList(str(source.root), source.num_classes, source.class_ids, source.class_names)


# --------------------------------------------------------------------------------- label spaces


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelSpace:
    """Classes made of a teacher's classes."""

    kind: Kind
    """all: the teacher's own, kept although the images have others."""
    members: Sequence[Sequence[int]] = field(repr=False)
    """Of each class: the teacher classes that it is made of, perhaps none. Each occurs once."""
    num_teacher_classes: int
    ids: Sequence[str] | None = field(default=None, repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes, those without a teacher class included."""
        return len(self.members)

    @property
    def is_unchanged(self) -> bool:
        """Whether it is all of the teacher's classes in their order."""
        return len(self.members) == self.num_teacher_classes and all(
            list(own) == [i] for i, own in enumerate(self.members)
        )

    def to_settings(self) -> dict[str, Any]:
        """Return what decides the maps, for a label set's teacher; nothing if nothing is changed.

        One entry in words, which messages about other settings show, and one to read again.
        """
        if self.kind == "all":
            return {}
        members: list[Any] = [list(own) for own in self.members]
        num_used = sum(map(len, members))
        if self.kind == "kept":
            members = [index for (index,) in members]
        digest = hashlib.sha256(json.dumps(members).encode()).hexdigest()
        made = f"{self.num_classes} made of" if self.kind == "mapped" else "kept"
        return {
            "classes": f"{made} {num_used} of {self.num_teacher_classes}, {digest[:12]}",
            "class_members": members,
        }


class Reduction:
    """Turns a teacher's logits into those of a label space, without waiting for the device."""

    def __init__(self, space: LabelSpace, device: torch.device) -> None:
        """Put what is needed on the device where logits will be."""
        full = [i for i, own in enumerate(space.members) if own]
        sizes = [len(space.members[i]) for i in full]
        members = [index for i in full for index in space.members[i]]
        place_of = {i: place for place, i in enumerate(full)}
        places = [place_of.get(i, len(full)) for i in range(space.num_classes)]
        self._num_full = len(full)
        self._are_single = len(members) == space.num_classes == len(full)
        self._members = torch.tensor(members, device=device)
        groups = torch.arange(len(full))
        groups = groups.repeat_interleave(torch.tensor(sizes), output_size=len(members))
        self._group = groups.to(device)
        self._places = torch.tensor(places, device=device)

    def __call__(self, logits: Float32[Tensor, "n teacher"]) -> Float32[Tensor, "n c"]:
        """Return the logit of each class: logsumexp over its teacher classes."""
        if self._are_single:
            return logits[:, self._members]
        own = logits.T[self._members]
        group = self._group[:, None].expand_as(own)
        shape = (self._num_full, len(logits))
        largest = own.new_full(shape, -torch.inf).scatter_reduce_(0, group, own, "amax")
        # In float64 the order in which a GPU adds cannot be told from the sum in float32.
        shares = (own - largest[self._group]).exp().double()
        sums = shares.new_zeros(shape).index_add_(0, self._group, shares)
        full = largest + sums.log().float()
        never = full.amin(0, keepdim=True) - _NEVER
        return torch.cat([full, never])[self._places].T


def space_of_set(index: Mapping[str, Any], teacher: ClassList) -> LabelSpace | None:
    """Return the label space in which a label set was made; None for all of the teacher's classes.

    Args:
        index: The set's index.json.
        teacher: The teacher's classes.

    Raises:
        ValueError: If the set was made with a teacher of other classes.
    """
    members = index["teacher"].get("class_members")
    if members is None:
        return None
    is_kept = isinstance(members[0], int)
    members = [[own] for own in members] if is_kept else members
    largest = max(i for own in members for i in own)
    if largest >= teacher.num:
        raise ValueError(
            f"the label set was made with class {largest} of its teacher, but {teacher.owner} has "
            f"{teacher.num} classes"
        )
    return LabelSpace(
        kind="kept" if is_kept else "mapped",
        members=members,
        num_teacher_classes=teacher.num,
        names=index["class_names"],
    )


def choose_classes(
    teacher: ClassList,
    source: ImageSource,
    *,
    keep_classes: str | None = None,
    class_map: Path | None = None,
) -> LabelSpace | None:
    """Decide which classes label maps speak of.

    Args:
        teacher: The teacher's classes.
        source: The images.
        keep_classes: A file for read_kept; "all" for all of the teacher's classes, whatever those
            of the images are; "folders" for those that the images' classes are called after.
        class_map: A file for read_class_map.

    Returns:
        None if nothing was chosen.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is wrong, with the line; or if both are given.
    """
    if keep_classes is not None and class_map is not None:
        raise ValueError("give either --keep-classes or --class-map; a map drops what it lacks")
    if class_map is not None:
        return read_class_map(class_map, teacher, classes_of(source))
    if keep_classes == ALL:
        return LabelSpace(
            kind="all",
            members=[[i] for i in range(teacher.num)],
            num_teacher_classes=teacher.num,
            ids=teacher.ids,
            names=teacher.names,
        )
    if keep_classes == FOLDERS:
        return _keep_folders(teacher, source)
    return None if keep_classes is None else read_kept(Path(keep_classes), teacher)


def read_kept(path: Path, teacher: ClassList) -> LabelSpace:
    """Read which of a teacher's classes to keep, in the order of the file.

    A line is a class by index, id (wnid) or name; FIRST..LAST; or CLASS<TAB>display name. What
    follows a # is a comment.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line names no class, or one that another line names already.
    """
    return _kept(_rows(path, "\t"), teacher, str(path))


def _keep_folders(teacher: ClassList, source: ImageSource) -> LabelSpace:
    where = f"--keep-classes {FOLDERS}, class {{}} of {source.root}"
    return _kept(
        [
            (where.format(i), id_, name if name != id_ else "")
            for i, (id_, name) in enumerate(zip(source.class_ids, source.class_names, strict=True))
        ],
        teacher,
        str(source.root),
    )


def _kept(entries: Iterable[tuple[str, str, str]], teacher: ClassList, where: str) -> LabelSpace:
    """Keep the classes of entries: where each stands, which it is, its display name or nothing."""
    taken: dict[int, str] = {}
    names = []
    for place, text, name in entries:
        for index in _take(place, text, teacher, taken):
            names.append(name or _name(teacher, index))
    _check_several(len(taken), where)
    _logger.info("%s: keeping %d of the teacher's %d classes", where, len(taken), teacher.num)
    return LabelSpace(
        kind="kept",
        members=[[index] for index in taken],
        num_teacher_classes=teacher.num,
        ids=[teacher.ids[index] for index in taken] if teacher.ids else None,
        names=names,
    )


def read_class_map(path: Path, teacher: ClassList, dataset: ClassList) -> LabelSpace:
    """Read which teacher classes make up each of the images' classes.

    A line is TEACHER CLASS,CLASS, or both apart by a tab. The teacher class is given as in
    read_kept, or is * for all that no other line names; the class is a folder's name, a display
    name or an index. Of images without classes, the file's own come in order of appearance.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line has not two columns, names no class, or a teacher class that another
            line names already; or if fewer than two classes have a teacher class.
    """
    rows = _rows(path)
    if not dataset.num:
        names = list(dict.fromkeys(target for *_, target in rows))
        dataset = ClassList(str(path), len(names), names, names)
    members: list[list[int]] = [[] for _ in range(dataset.num)]
    taken: dict[int, str] = {}
    # The line of all others comes last, wherever it stands.
    for place, text, target in sorted(rows, key=lambda row: row[1] == REST):
        if not target:
            raise ValueError(
                f"{place}: {text!r} has no second column; expected TEACHER CLASS,CLASS or both "
                "apart by a tab"
            )
        own = members[_find(place, target, dataset)]
        if text == REST:
            own += _take_rest(place, teacher, taken)
        else:
            own += _take(place, text, teacher, taken)
    _check_several(sum(map(bool, members)), str(path))
    _log_map(path, members, len(taken), teacher, dataset)
    return LabelSpace(
        kind="mapped",
        members=[sorted(own) for own in members],
        num_teacher_classes=teacher.num,
        ids=dataset.ids,
        names=dataset.names,
    )


def _log_map(
    path: Path,
    members: Sequence[Sequence[int]],
    num_taken: int,
    teacher: ClassList,
    dataset: ClassList,
) -> None:
    missing = [dataset.called(i) for i, own in enumerate(members) if not own]
    _logger.info(
        "%s: %d of the teacher's %d classes make up %d classes, %d are dropped",
        path,
        num_taken,
        teacher.num,
        dataset.num - len(missing),
        teacher.num - num_taken,
    )
    if missing:
        _logger.warning(
            "%s: %d of %d classes have no teacher class and can never be a label: %s",
            path,
            len(missing),
            dataset.num,
            _some(missing),
        )


def _take(place: str, text: str, teacher: ClassList, taken: dict[int, str]) -> range:
    """Find teacher classes and note that they are taken."""
    try:
        indices = teacher.find_all(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    for index in indices:
        if index in taken:
            raise ValueError(
                f"{place}: class {teacher.called(index)} of the teacher is named already in "
                f"{taken[index]}"
            )
        taken[index] = place
    return indices


def _take_rest(place: str, teacher: ClassList, taken: dict[int, str]) -> list[int]:
    rest = [index for index in range(teacher.num) if index not in taken]
    if not rest:
        raise ValueError(f"{place}: no class of the teacher is left for {REST}")
    taken |= dict.fromkeys(rest, place)
    return rest


def _find(place: str, text: str, classes: ClassList) -> int:
    try:
        return classes.find(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_several(num_classes: int, where: str) -> None:
    if num_classes < 2:
        raise ValueError(f"{where} leaves {num_classes} classes to choose from; name two or more")


def _name(classes: ClassList, index: int) -> str:
    if classes.names:
        return classes.names[index]
    return classes.ids[index] if classes.ids else f"class {index}"


def _rows(path: Path, delimiter: str | None = None) -> list[tuple[str, str, str]]:
    """Read where each line stands that says something, and its two columns, perhaps empty.

    Args:
        path: A text file. What follows a # is a comment.
        delimiter: Between the columns; None means tabs if there is one in the file, else commas.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines()]
    if delimiter is None:
        delimiter = "\t" if any("\t" in line for line in lines) else ","
    return [
        (place, *_columns(line, delimiter, place))
        for place, line in ((f"{path}, line {i}", line) for i, line in enumerate(lines, start=1))
        if line
    ]


def _columns(line: str, delimiter: str, place: str) -> tuple[str, str]:
    columns = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    if len(columns) > 2:
        raise ValueError(
            f"{place}: {len(columns)} columns instead of 2; put a name that has commas in it "
            'between double quotes, "like, this", or a tab between the columns'
        )
    first, second = (*columns, "")[:2]
    return first.strip(), second.strip()


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:_NUM_SHOWN]) + (", …" if len(words) > _NUM_SHOWN else "")


# --------------------------------------------------------------------- do they fit the images?


def check_classes(source: ImageSource, teacher: ClassList, space: LabelSpace | None) -> None:
    """Check that label maps will speak of the classes that images have.

    Names that differ, and numbers that differ by choice, are a warning. Images without classes
    fit any teacher.

    Args:
        source: The images.
        teacher: The classes that the maps will speak of.
        space: How they were chosen, if they were.

    Raises:
        ValueError: If nothing was chosen and the numbers differ, with what there is to choose; or
            if both have the same classes in another order.
    """
    own = classes_of(source)
    if not own.num or (space is not None and space.kind == "mapped"):
        return
    if own.num != teacher.num and space is None:
        raise ValueError(_choices(own, teacher))
    if own.num != teacher.num:
        _logger.warning(
            "the maps speak of %d classes, %s has %d: training on both needs a --classes file for "
            "tl-shard pack that names the %d in the order of the maps",
            teacher.num,
            own.owner,
            own.num,
            teacher.num,
        )
        return
    _check_order(own, teacher)
    if not (own.is_known and teacher.is_known):
        return
    others = [i for i in range(own.num) if own.labels(i).isdisjoint(teacher.labels(i))]
    if len(others) > own.num / 2:
        _logger.warning(
            "%s and %s have %d classes each, but %d of them have other names, e.g. class %d is %s "
            "there and %s here; if they are other things, choose with --class-map or "
            "--keep-classes",
            own.owner,
            teacher.owner,
            own.num,
            len(others),
            others[0],
            own.called(others[0]),
            teacher.called(others[0]),
        )


def _check_order(own: ClassList, teacher: ClassList) -> None:
    for ours, theirs in ((own.ids, teacher.ids), (own.names, teacher.names)):
        if ours and theirs and sorted(ours) == sorted(theirs) and list(ours) != list(theirs):
            i = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            raise ValueError(
                f"{own.owner} and {teacher.owner} have the same classes in another order: class "
                f"{i} is {ours[i]!r} there and {theirs[i]!r} here; name them in the order of the "
                "teacher in a --classes file"
            )


def _choices(own: ClassList, teacher: ClassList) -> str:
    return (
        f"{own.owner} has {own.num} classes, {teacher.owner} has {teacher.num}. Choose what the "
        "maps shall speak of: your classes, as sums of the teacher's (--class-map FILE); some of "
        f"the teacher's classes (--keep-classes FILE, or {FOLDERS} if your folders are called "
        f"like them); all of them (--keep-classes {ALL}); or your classes, by a teacher that you "
        "have taught them: tl-train run --recipe class_labels --set model.name=convnext_tiny --set "
        "model.pretrained=true --data SHARDS --out run, then tl-label generate --teacher "
        "convnext_tiny --checkpoint run/checkpoints/best.pt. docs/own-data.md shows all four"
    )
