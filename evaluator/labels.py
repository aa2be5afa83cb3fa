"""What the right answers are: which class of the model each image has, by whichever labels.

Folders rarely stand in the order of a model's outputs, so classes are matched by what they are
called; other labels than the data's own come from a file; and a subset of the classes can be the
only one that answers are chosen among.
"""

import csv
import json
import logging
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from timm.data.imagenet_info import ImageNetInfo

from ..labeler.classes import FOLDERS, ClassList, read_kept
from ..labeler.sources import CLASSES_FILE, ImageSource
from .data import EvalData
from .models import EvalModel

REAL = "real"
"""Name of the reassessed labels that timm brings along."""
SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
"""Names of class lists that timm brings along → their files."""

_VAL_IMAGE = re.compile(r"(?:^|/)ILSVRC2012_val_(\d{8})$")
_NUM_SHOWN = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Truth:
    """The images to look at, and what is right for each of them, in the model's classes."""

    data: EvalData
    """Without the images that the labels say nothing of."""
    classes: Int64[np.ndarray, " n"]
    """See Predictions, as for `valid`."""
    valid: list[tuple[int, ...]] | None
    considered: Int64[np.ndarray, " s"] | None
    """Classes that answers are chosen among; None means all."""
    class_names: list[str]
    num_left_out: int = 0
    """Images that the labels say nothing of."""

    @property
    def is_known(self) -> bool:
        """Whether anything is known of any image."""
        return bool((self.classes >= 0).any())


def find_truth(
    data: EvalData, model: EvalModel, *, labels: str | None = None, subset: str | None = None
) -> Truth:
    """Find out what is right for each image.

    Args:
        data: The images; they may have no classes.
        model: Whose classes.
        labels: Other labels than the data's own. "real", or a .json of such: a list over ImageNet's
            validation images, of each a list of ImageNet's class indices. Or a class map, .json or
            .csv: the name of a folder and one or several of the model's classes, by index, id or
            name; images of other folders are left out.
        subset: Choose answers only among these of the model's classes: a name of SUBSETS,
            "folders" for the classes that the data has, or a file, see classes.read_kept.

    Raises:
        ValueError: The classes do not fit the model, or a file is something else.
        OSError: A file cannot be read.
    """
    if labels is None:
        truth = _own_truth(data, model)
    else:
        found = _read_labels(labels, model.classes)
        truth = (
            _class_map_truth(data, model, found, labels)
            if isinstance(found, Mapping)
            else _real_truth(data, model, found, labels)
        )
    if subset is None:
        return truth
    considered = _read_subset(subset, model.classes, truth)
    _check_subset(truth, considered, subset, model.classes)
    return replace(truth, considered=considered)


# -------------------------------------------------------------------------------- own classes


def _own_truth(data: EvalData, model: EvalModel) -> Truth:
    source = data.source
    names = _names(model.classes)
    if not source.num_classes:
        classes = np.full(len(source.samples), -1, np.int64)
    else:
        place = match_classes(source, model)
        for i, id_, name in zip(place.tolist(), source.class_ids, source.class_names):
            if name != id_ or source.num_classes == model.num_classes:
                names[i] = name
        classes = np.array([_class_of(sample, place) for sample in source.samples], np.int64)
    return Truth(data=data, classes=classes, valid=None, considered=None, class_names=names)


def match_classes(source: ImageSource, model: EvalModel) -> Int64[np.ndarray, " c"]:
    """Tell which of the model's classes each of the images' classes is.

    Raises:
        ValueError: They do not fit; says what to do.
    """
    ids, own, known = source.class_ids, model.class_ids, model.classes.ids
    in_order = np.arange(len(ids))
    if ids == own:
        return in_order
    if known is not None and len(ids) < model.num_classes and set(ids) <= set(known):
        index_of = {id_: i for i, id_ in enumerate(known)}
        _logger.info(
            "%s has %d of the model's %d classes", source.root, len(ids), model.num_classes
        )
        return np.array([index_of[id_] for id_ in ids], np.int64)
    # Folders 0, 1, 10, 100, … of ImageNet-V2, and shards: numbers are those of the outputs.
    if all(map(_is_number, ids)) and not (own is not None and set(ids) <= set(own)):
        numbers = np.array([int(id_) for id_ in ids], np.int64)
        if numbers.max() < model.num_classes:
            return numbers
    advice = (
        f"write {CLASSES_FILE} into the folder, or give --classes FILE: one class folder's "
        "name a line, in the order of the model's outputs; it may name classes without a folder"
    )
    if len(ids) != model.num_classes:
        raise ValueError(
            f"{source.root} has {len(ids)} classes, the model {model.num_classes}; {advice}; or "
            "--labels FILE: which classes of the model each folder may be"
        )
    for i, (ours, theirs) in enumerate(zip(own or (), ids)):
        if ours != theirs:
            raise ValueError(
                f"class {i} is {theirs!r} in {source.root}, but {ours!r} in the checkpoint; "
                f"{advice}"
            )
    return in_order


def _is_number(text: str) -> bool:
    return text.isdecimal() and str(int(text)) == text


def _class_of(sample: Any, place: Int64[np.ndarray, " c"]) -> int:
    return -1 if sample.class_index is None else int(place[sample.class_index])


def _names(classes: ClassList) -> list[str]:
    return list(classes.names or classes.ids or map(str, range(classes.num)))


# ------------------------------------------------------------------------------ other labels


def _read_labels(
    labels: str, classes: ClassList
) -> list[tuple[int, ...]] | dict[str, tuple[int, ...]]:
    """Read a label file: reassessed labels as a list, a class map as a dict."""
    if labels == REAL:
        return _reassessed(json.loads(_timms_file("imagenet_real_labels.json")), labels)
    path = Path(labels)
    if path.suffix not in (".json", ".csv"):
        raise ValueError(
            f"--labels {labels} is no label file; give {REAL}, a .json of reassessed labels, or a "
            "class map, .json or .csv"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return _class_map(_csv_entries(text), labels, classes)
        content = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise ValueError(f"--labels {labels} is damaged: {error}") from error
    if isinstance(content, list):
        return _reassessed(content, labels)
    if isinstance(content, dict):
        return _class_map(list(content.items()), labels, classes)
    raise ValueError(
        f"--labels {labels} holds a {type(content).__name__}; expected a list over ImageNet's "
        "validation images, each a list of class indices, or an object FOLDER: CLASS or CLASSES"
    )


def _timms_file(name: str) -> str:
    data = pkgutil.get_data("timm.data", f"_info/{name}")
    assert data is not None
    return data.decode()


def _reassessed(content: list[Any], labels: str) -> list[tuple[int, ...]]:
    num_classes = ImageNetInfo().num_classes()
    for i, one in enumerate(content):
        if not isinstance(one, list) or not all(_is_index(c, num_classes) for c in one):
            raise ValueError(
                f"--labels {labels}: entry {i} is {str(one)[:60]}, expected a list of class "
                f"indices from 0 to {num_classes - 1}, empty for an image that does not count"
            )
    return [tuple(dict.fromkeys(one)) for one in content]


def _is_index(value: Any, num_classes: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_classes


def _csv_entries(text: str) -> list[tuple[str, list[str]]]:
    """Return folder and classes of each line; a folder may have several lines."""
    found: dict[str, list[str]] = {}
    for row in csv.reader(text.splitlines()):
        cells = [cell.strip() for cell in row]
        if any(cells):
            found.setdefault(cells[0], []).extend(cell for cell in cells[1:] if cell)
    return list(found.items())


def _class_map(
    entries: Sequence[tuple[str, Any]], labels: str, classes: ClassList
) -> dict[str, tuple[int, ...]]:
    found = {}
    for folder, value in entries:
        several = value if isinstance(value, list) else [value]
        if not several or not all(isinstance(one, str | int) for one in several):
            raise ValueError(
                f"--labels {labels}: folder {folder!r} has the value {str(value)[:60]}, expected "
                "one class or a list of classes, by index, id or name"
            )
        try:
            indices = [classes.find(str(one)) for one in several]
        except ValueError as error:
            raise ValueError(f"--labels {labels}: folder {folder!r}: {error}") from error
        found[folder] = tuple(dict.fromkeys(indices))
    return found


def _real_truth(
    data: EvalData, model: EvalModel, real: list[tuple[int, ...]], labels: str
) -> Truth:
    to_model = _from_imagenet(model, labels)
    valid = []
    for sample in data.source.samples:
        match = _VAL_IMAGE.search(sample.key)
        if match is None or not 0 < int(match[1]) <= len(real):
            raise ValueError(
                f"--labels {labels} is for the {len(real):,} images ILSVRC2012_val_00000001 and so "
                f"on; {data.source.root} has an image {sample.key}"
            )
        valid.append(tuple(to_model[c] for c in real[int(match[1]) - 1]))
    own = _own_truth(data, model)
    return replace(own, classes=_first_right(own.classes.tolist(), valid), valid=valid)


def _from_imagenet(model: EvalModel, labels: str) -> list[int]:
    """Return the model's index of each of ImageNet's classes."""
    wnids, known = ImageNetInfo().label_names(), model.classes.ids
    if known is None and model.num_classes == len(wnids):
        return list(range(len(wnids)))
    index_of = {id_: i for i, id_ in enumerate(known or ())}
    missing = [wnid for wnid in wnids if wnid not in index_of]
    if missing:
        raise ValueError(
            f"--labels {labels} speaks of ImageNet's {len(wnids):,} classes; {model.name} has "
            f"{model.num_classes:,}, and {len(missing):,} of ImageNet's, e.g. {missing[0]}, are "
            "not known to be among them"
        )
    return [index_of[wnid] for wnid in wnids]


def _first_right(own: list[int], valid: Sequence[tuple[int, ...]]) -> Int64[np.ndarray, " n"]:
    """Keep an image's own class where it is right, else take the first one that is; -1: none."""
    chosen = [
        mine if mine in right else right[0] if right else -1 for mine, right in zip(own, valid)
    ]
    return np.array(chosen, np.int64)


def _class_map_truth(
    data: EvalData, model: EvalModel, classes_of: Mapping[str, tuple[int, ...]], labels: str
) -> Truth:
    source = data.source
    if not source.num_classes:
        raise ValueError(
            f"--labels {labels} says which classes folders are, but {source.root} has no class "
            "folders"
        )
    if not set(classes_of) & set(source.class_ids):
        raise ValueError(
            f"--labels {labels} names none of the {source.num_classes} folders of {source.root}, "
            f"e.g. {source.class_ids[0]!r}, but {_some(classes_of)}"
        )
    kept, valid = [], []
    for sample in source.samples:
        folder = None if sample.class_index is None else source.class_ids[sample.class_index]
        if folder is not None and folder in classes_of:
            kept.append(sample)
            valid.append(classes_of[folder])
    num_left_out = len(source.samples) - len(kept)
    if num_left_out:
        _logger.info(
            "%s: %d images are left out, their folders are not in it", labels, num_left_out
        )
    return Truth(
        data=replace(data, source=replace(source, samples=kept)),
        classes=_first_right([-1] * len(kept), valid),
        valid=valid,
        considered=None,
        class_names=_names(model.classes),
        num_left_out=num_left_out,
    )


def _some(words: Any) -> str:
    shown = ", ".join(map(repr, list(words)[:_NUM_SHOWN]))
    return f"{shown}, …" if len(words) > _NUM_SHOWN else shown


# ------------------------------------------------------------------------------------ subset


def _read_subset(subset: str, classes: ClassList, truth: Truth) -> Int64[np.ndarray, " s"]:
    if subset == FOLDERS:
        found = {int(c) for c in truth.classes if c >= 0}
        found |= {c for right in truth.valid or () for c in right}
        if not found:
            raise ValueError(
                f"--subset {FOLDERS}: {truth.data.source.root} says of no image which class it has"
            )
    elif subset in SUBSETS:
        if not classes.ids:
            raise ValueError(
                f"--subset {subset} names ImageNet's classes; those of {classes.owner} are not "
                "known by name"
            )
        found = {classes.find(wnid) for wnid in _timms_file(SUBSETS[subset]).split()}
    elif Path(subset).exists():
        found = {i for [i] in read_kept(Path(subset), classes).members}
    else:
        raise FileNotFoundError(
            f"--subset {subset} is neither a file nor one of {', '.join(SUBSETS)}, {FOLDERS}"
        )
    return np.array(sorted(found), np.int64)


def _check_subset(
    truth: Truth, considered: Int64[np.ndarray, " s"], subset: str, classes: ClassList
) -> None:
    """Refuse images whose right answer cannot be given."""
    allowed = set(considered.tolist())
    if truth.valid is None:
        outside = [int(c) for c in truth.classes if c >= 0 and int(c) not in allowed]
    else:
        outside = [right[0] for right in truth.valid if right and not allowed & set(right)]
    if outside:
        raise ValueError(
            f"--subset {subset} does not hold the class of {len(outside)} images of "
            f"{truth.data.source.root}, e.g. {classes.called(outside[0])}"
        )
