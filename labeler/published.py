"""Label sets in the form that others published: one torch file per image.

    CLASS/STEM.pt    a tensor (2, k, rows, cols): logits, then class ids

`token-labeling` (https://arxiv.org/abs/2104.10858) keeps both as float16 on 18×18 cells, `relabel`
(https://arxiv.org/abs/2101.05022) as float32 on 15×15. Neither says which axis comes first, nor
which part of the image the grid covers, nor what the classes outside the top k had. The first two
can be found out by looking at some of the images with a classifier (orientation.py); the third is
lost. docs/published-sets.md tells the whole story.
"""

import io
import os
import pickle
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt32
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from tqdm import tqdm

from . import archives
from .fit import place
from .folder import Location
from .geometry import SAMPLES_PER_SIDE, Fill
from .images import BadImage
from .label_map import LabelMap, LabelMapError, decode, encode
from .label_set import (
    LabelSet,
    Slice,
    check_output,
    is_whole,
    read_slices,
    totals,
    write_index,
    write_slice,
)
from .sources import ImageSource, Sample, escape, unescape
from .storage import is_url
from .teacher import Teacher

AXES = ("rows-cols", "cols-rows")
"""What a file's last two axes are."""
FITS = ("native", "stretch", "center")
"""What a grid may cover: the whole image (native or stretch), or the square in its middle."""
DEFAULT_NUM_CLASSES = 1000
"""Both published sets speak of ImageNet-1k."""
UNKNOWN_TEACHER = "unknown"
"""What the index of an imported set says where nobody told its teacher."""

_EXACT_IN_FLOAT16 = 2048
"""From here on float16 skips whole numbers: 2049 is stored as 2048."""
_NUM_TRIED = 100
"""Files that are opened to find a usable one."""
_SYSTEMIC = 32
"""So many files in a row of which none is usable point at the cause, not at them."""
_SMALLEST_GRID = 6
"""The published trainers write the class into column 5 of the map."""
_ORIENTATION_TAG = 0x0112
_SMALLEST_RESIDUAL = 1e-4  # as geometry.sample_targets has it
_TINY = torch.finfo(torch.float32).tiny

# How a stored photo becomes the upright one, by EXIF orientation, as operations on (…, rows, cols).
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[..., ::-1],
    3: lambda a: a[..., ::-1, ::-1],
    4: lambda a: a[..., ::-1, :],
    5: lambda a: a.swapaxes(-1, -2),
    6: lambda a: np.rot90(a, -1, (-2, -1)),
    7: lambda a: a.swapaxes(-1, -2)[..., ::-1, ::-1],
    8: lambda a: np.rot90(a, 1, (-2, -1)),
}
_INVERSE = {6: 8, 8: 6}  # the others undo themselves


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A published form."""

    dtype: torch.dtype
    grid: tuple[int, int]
    image_size: int
    """Of the teacher, px."""


KINDS = {
    "token-labeling": Kind(dtype=torch.float16, grid=(18, 18), image_size=576),
    "relabel": Kind(dtype=torch.float32, grid=(15, 15), image_size=475),
}


class BadLabelFile(ValueError):
    """A file is not a label map of this kind; the message is one line that says why."""


# ------------------------------------------------------------------------------------ files


class PublishedFiles:
    """The .pt files of a set, in a folder, or in a tar or zip that need not be unpacked.

    Raises:
        OSError: If there is no such set, or it cannot be read.
        ValueError: If it holds no label files, or the archive is damaged.
    """

    def __init__(self, location: Path | str) -> None:
        self.location = str(location)
        self.paths: dict[str, str] = {}
        """CLASS/STEM (without .pt) → path within the set."""
        self.odd: dict[str, str] = {}
        """Path of each file that cannot be used → why."""
        self._places: dict[str, tuple[int, int]] = {}
        if is_url(self.location) or Path(location).is_file():
            members = archives.list_archive(self.location).members
            self._places = {member.name: (member.offset, member.num_bytes) for member in members}
            self._list(self._places)
        elif Path(location).is_dir():
            self._list(_walk(Path(location)))
        else:
            raise FileNotFoundError(f"{location} does not exist")

    def _list(self, paths: Iterable[str]) -> None:
        paths_of: dict[str, list[str]] = {}
        for path in sorted(paths):
            name = "/".join(path.split("/")[-2:])
            if name.rpartition("/")[2].startswith(".") or not name.endswith(".pt"):
                continue
            if "/" in name:
                paths_of.setdefault(name.removesuffix(".pt"), []).append(path)
            else:
                self.odd[path] = "it lies outside any class folder"
        for name, same in paths_of.items():
            if len(same) == 1:
                self.paths[name] = same[0]
            else:
                self.odd |= {path: f"{len(same)} files are named {name}.pt" for path in same}
        if not self.paths:
            found = "".join(f"; {path}: {why}" for path, why in list(self.odd.items())[:1])
            raise ValueError(f"{self.location} holds no label files CLASS/STEM.pt{found}")

    def read(self, name: str) -> bytes:
        """Return the bytes of CLASS/STEM.

        Raises:
            BadLabelFile: If they cannot be read.
        """
        path = self.paths[name]
        try:
            if path in self._places:
                return archives.read_member(self.location, *self._places[path])
            return Path(self.location, path).read_bytes()
        except BadImage as error:  # of the archive's member
            raise BadLabelFile(str(error)) from error
        except (FileNotFoundError, PermissionError) as error:
            raise BadLabelFile(f"cannot be read: {error.strerror}") from error


def _walk(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root)
        yield from ((inside / name).as_posix() for name in files)


class Planes(NamedTuple):
    """The content of one file, axes as they are in it."""

    scores: Float[np.ndarray, "k a b"]
    classes: UInt32[np.ndarray, "k a b"]
    dtype: torch.dtype


def read_planes(data: bytes) -> Planes:
    """Load one published file; code in it is never run.

    Raises:
        BadLabelFile: Whatever is wrong with it.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are then refused
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadLabelFile(
            "damaged, or it holds more than a tensor, which could run code and is not loaded"
        ) from error
    except Exception as error:  # torch raises anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadLabelFile(f"damaged: {reason:.100}") from error
    if not isinstance(tensor, torch.Tensor):
        raise BadLabelFile(f"holds a {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in (torch.float16, torch.float32) or tensor.layout != torch.strided:
        raise BadLabelFile(f"holds numbers of type {tensor.dtype}, not float16 or float32")
    if tensor.ndim != 4 or len(tensor) != 2 or 0 in tensor.shape or tensor.shape[1] > 255:
        raise BadLabelFile(f"has shape {tuple(tensor.shape)}, expected (2, k, rows, cols)")
    scores, ids = tensor.detach().numpy()
    if not np.isfinite(tensor.numpy()).all():
        raise BadLabelFile("holds numbers that are not finite")
    if (ids < 0).any() or (ids != np.round(ids)).any():
        raise BadLabelFile(f"its second plane holds {ids.min():g} to {ids.max():g}, not class ids")
    classes = ids.astype(np.uint32)
    order = np.argsort(-scores, axis=0, kind="stable")
    return Planes(
        scores=np.take_along_axis(scores, order, 0),
        classes=np.take_along_axis(classes, order, 0),
        dtype=tensor.dtype,
    )


def mend(planes: np.ndarray, axes: str) -> np.ndarray:
    """Bring (…, a, b), whose last axes are as `axes` says, to (…, rows, cols)."""
    return planes if axes == "rows-cols" else planes.swapaxes(-1, -2)


def published_name(path: str) -> str:
    """Return the CLASS/STEM under which the published programs look for an image's label.

    They take the last two parts of the path and cut them at the first dot, wherever it is:
    a/b.jpg → a/b, a/b.c.jpg → a/b, 001.cat/x.jpg → 001.
    """
    return "/".join(path.split("/")[-2:]).split(".")[0]


def match_names(files: PublishedFiles, source: ImageSource) -> dict[str, str]:
    """Find the file of each image.

    Returns:
        Key of the source → name in files.paths. Images without one are left out, and so are
        those that would share a file because the published programs cut names at the first dot.
    """
    names: dict[str, str] = {}
    for sample in source.samples:
        stem = "/".join(unescape(sample.key).split("/")[-2:])
        name = stem if stem in files.paths else published_name(stem)
        if name in files.paths:
            names[sample.key] = name
    times = Counter(names.values())
    return {key: name for key, name in names.items() if times[name] == 1}


# ----------------------------------------------------------------------------------- import


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import did."""

    num_labelled: int
    quarantined: dict[str, str]
    """Key of each image without a map, or path of each file that cannot be used → why."""
    num_unused: int
    """Files of which there is no image."""
    map_bytes: int
    """Of all label maps, tar headers not counted."""


def import_set(
    files: PublishedFiles,
    out: Location,
    *,
    kind: str,
    axes: str,
    fit: str,
    evidence: dict[str, Any] | None = None,
    source: ImageSource | None = None,
    num_classes: int = DEFAULT_NUM_CLASSES,
    class_names: Sequence[str],
    teacher_name: str = UNKNOWN_TEACHER,
    shard_size: int = 10_000,
    show_progress: bool = True,
) -> ImportSummary:
    """Turn a published set into label shards; go on where an earlier import was broken off.

    Args:
        files: The published set.
        out: Folder of the label set.
        kind: One of KINDS.
        axes: One of AXES.
        fit: One of FITS.
        evidence: How axes and fit were found out, for the index.
        source: The images. Without them the files' own names become keys.
        num_classes: Of the set's teacher.
        class_names: What people read, one per class.
        teacher_name: What the index calls the set's teacher.
        shard_size: Images per slice, at most.
        show_progress: Whether to draw a progress bar (on a terminal only).

    Raises:
        ValueError: If arguments do not fit the files, class ids may have been rounded, no file is
            usable, or another set is in the way.
        OSError: If the output cannot be written.
    """
    check_choice("kind", kind, tuple(KINDS))
    check_choice("orientation", axes, AXES)
    check_choice("fit", fit, FITS)
    if source is None and fit == "center":
        raise ValueError(
            "fit center needs --images: which part of an image its middle square is depends on the "
            "image's shape"
        )
    if len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for {num_classes} classes")
    check_output(out)
    entries, left_out = _entries(files, source)
    k = _first_k(files, entries, kind)
    settings = {
        "teacher": {"name": teacher_name, "image_size": KINDS[kind].image_size},
        "fit": fit,
        "k": k,
        "num_classes": num_classes,
        "shard_size": shard_size,
        "source": {"num_listed": len(entries) + len(left_out)},
        "imported": {"kind": kind, "from": files.location, "axes": axes},
    }
    finished = _finished(out, settings)
    convert = partial(_convert, files, source, axes, fit, num_classes, k)
    records: list[Slice] = []
    with tqdm(
        desc="import", total=len(entries), unit="img", disable=None if show_progress else True
    ) as progress:
        for number, start in enumerate(range(0, len(entries), shard_size)):
            part = entries[start : start + shard_size]
            if number in finished:
                records.append(finished[number])
                progress.update(len(part))
                continue
            maps: list[tuple[str, bytes]] = []
            quarantined = dict(left_out) if number == 0 else {}
            for entry in part:
                try:
                    maps.append((entry.key, encode(convert(entry))))
                except (BadLabelFile, BadImage, LabelMapError) as error:
                    quarantined[entry.key] = str(error)
                except (FileNotFoundError, PermissionError) as error:
                    quarantined[entry.key] = f"the image cannot be read: {error.strerror}"
                progress.update()
            if not maps and len(part) >= _SYSTEMIC:
                raise ValueError(
                    f"none of the {len(part)} files from {part[0].name} on is usable, the first "
                    f"because: {quarantined[part[0].key]}"
                )
            record = write_slice(
                out,
                number,
                maps,
                settings=settings,
                quarantined=quarantined,
                num_correct=None,
            )
            records.append(record)
    if not any(record.samples for record in records):
        key, why = next(iter(records[0].quarantined.items()))
        raise ValueError(f"none of the {len(entries)} files is usable, {key} because: {why}")
    # The evidence's last digits may differ from run to run; resuming does not compare them.
    index = settings | {"evidence": evidence}
    write_index(out, records, settings=index, class_names=class_names)
    total = totals(records)
    return ImportSummary(
        num_labelled=total["num_labelled"],
        quarantined={key: why for record in records for key, why in record.quarantined.items()},
        num_unused=len(files.paths) - len(entries),
        map_bytes=total["map_bytes"],
    )


def class_names_of(
    num_classes: int, source: ImageSource | None, teacher: Teacher | None
) -> list[str]:
    """Return what people read for each class: as images or teacher say, or as in ImageNet-1k."""
    if source is not None and source.num_classes == num_classes:
        return source.class_names
    if teacher is not None and teacher.num_classes == num_classes and teacher.class_names:
        return teacher.class_names
    if num_classes == DEFAULT_NUM_CLASSES:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(num_classes)]
    return [f"class {i}" for i in range(num_classes)]


class _Entry(NamedTuple):
    key: str
    name: str
    sample: Sample | None


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Check that a setting has one of its values.

    Raises:
        ValueError: If not.
    """
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")


def _entries(
    files: PublishedFiles, source: ImageSource | None
) -> tuple[list[_Entry], dict[str, str]]:
    """Return what to convert, sorted by key, and what cannot be, with the reason."""
    left_out = dict(files.odd)
    if source is None:
        named = sorted((escape(name), name) for name in files.paths)
        return [_Entry(key, name, None) for key, name in named], left_out
    names = match_names(files, source)
    for sample in source.samples:
        if sample.key not in names:
            left_out[sample.key] = f"no file of its own in {files.location}"
    if not names:
        raise ValueError(
            f"none of the {len(files.paths)} files of {files.location} (first: "
            f"{next(iter(files.paths))}.pt) has the class and name of an image of {source.root} "
            f"(first: {source.samples[0].key}); give the --images that the set was made of"
        )
    entries = [_Entry(s.key, names[s.key], s) for s in source.samples if s.key in names]
    return entries, left_out


def _first_k(files: PublishedFiles, entries: Sequence[_Entry], kind: str) -> int:
    """Return how many classes a cell has; the first usable file decides for all."""
    problem = ""
    for entry in entries[:_NUM_TRIED]:
        try:
            planes = read_planes(files.read(entry.name))
        except BadLabelFile as error:
            problem = problem or f"{files.paths[entry.name]}: {error}"
            continue
        fitting = [name for name, k in KINDS.items() if k.dtype == planes.dtype]
        if kind not in fitting:
            raise ValueError(
                f"{files.paths[entry.name]} holds {planes.dtype}; kind {kind} is "
                f"{KINDS[kind].dtype}: this looks like --kind {fitting[0]}"
            )
        return len(planes.scores)
    raise ValueError(f"no usable file among the first {_NUM_TRIED} of {files.location}: {problem}")


def _finished(out: Location, settings: dict[str, Any]) -> dict[int, Slice]:
    """Return the slices that an earlier import of the same files has finished."""
    finished = {}
    for record in read_slices(out):
        if record.settings != settings:
            raise ValueError(f"{out} holds other labels already; remove it or give another --out")
        if is_whole(out, record):
            finished[record.number] = record
    return finished


def _convert(
    files: PublishedFiles,
    source: ImageSource | None,
    axes: str,
    fit: str,
    num_classes: int,
    k: int,
    entry: _Entry,
) -> LabelMap:
    planes = read_planes(files.read(entry.name))
    if len(planes.scores) != k:
        raise BadLabelFile(f"has {len(planes.scores)} classes per cell, the first file has {k}")
    last = int(planes.classes.max())
    if last < num_classes and planes.dtype == torch.float16 and last >= _EXACT_IN_FLOAT16:
        raise ValueError(
            f"{files.paths[entry.name]} holds class {last} as float16, which is exact only below "
            f"{_EXACT_IN_FLOAT16}: ids of this set may have been rounded to a neighbour, and "
            "nothing can tell which; make the labels anew with tl-label generate"
        )
    scores, classes = mend(planes.scores, axes), mend(planes.classes, axes)
    window = (0.0, 0.0, 1.0, 1.0)
    if source is not None and entry.sample is not None:
        size, orientation = size_and_orientation(source.read(entry.sample))
        # The published programs did not turn photos upright; a map turns with its photo.
        scores, classes = (turn_upright(array, orientation) for array in (scores, classes))
        window = place(size, fit=fit, teacher_size=1, stride=1).window
    return LabelMap(
        scores=np.ascontiguousarray(scores, dtype=np.float16),
        classes=np.ascontiguousarray(classes),
        num_classes=num_classes,
        window=window,
    )


def size_and_orientation(data: bytes) -> tuple[tuple[int, int], int]:
    """Return an image's upright (width, height) and EXIF orientation, from its header alone.

    Raises:
        BadImage: If that cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), orientation = image.size, image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise BadImage(f"the image's header cannot be read: {error}") from error
    return ((height, width) if orientation in (5, 6, 7, 8) else (width, height)), orientation


def turn_upright(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (…, rows, cols) as an image of that EXIF orientation is turned to stand upright."""
    return _UPRIGHT[orientation](planes) if orientation in _UPRIGHT else planes


# ----------------------------------------------------------------------------------- export

_Planes: TypeAlias = tuple[Float32[np.ndarray, "k rows cols"], UInt32[np.ndarray, "k rows cols"]]
"""Scores and classes."""


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export did, and what got lost."""

    num_files: int
    fill: Fill
    num_resampled: int
    """Maps whose grid was another."""
    num_turned: int
    """Maps that were turned as their photos are stored."""
    num_windows: int
    """Maps of a part of the image only, which the files do not say."""
    num_pyramids: int
    """Images of which only the first of several maps was written."""


def export_set(
    labels: LabelSet,
    out: Path,
    *,
    kind: str,
    grid: tuple[int, int] | None = None,
    top_k: int = 5,
    fill: Fill | None = None,
    source: ImageSource | None = None,
    show_progress: bool = True,
) -> ExportSummary:
    """Write a label set as one torch file per image, for the trainers that read such.

    Those put logit 0 for all classes outside the top k. With fill residual, scores are written as
    logits above the cell's residual, so that this 0 is what the teacher meant; with fill zero they
    are the teacher's raw logits, as in the published sets.

    Args:
        labels: The label set.
        out: Folder that does not exist or is empty; it appears when it is complete.
        kind: One of KINDS.
        grid: Cells (rows, cols); None means the kind's own.
        top_k: Classes kept per cell, at most.
        fill: None means residual where the maps know it, zero where they do not.
        source: The images. Given them, maps of photos with an EXIF orientation are turned as the
            photo is stored, because the published trainers do not turn photos upright.
        show_progress: Whether to draw a progress bar (on a terminal only).

    Raises:
        ValueError: If the form cannot hold the set: class ids that float16 would round, a grid
            that the trainers do not read, two images that they look for in one file.
        OSError: If `out` is in the way or cannot be written.
    """
    check_choice("kind", kind, tuple(KINDS))
    grid = grid or KINDS[kind].grid
    _check_export(labels, kind, grid, top_k)
    names = _export_names(labels.keys)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; remove it or give another folder")
    samples = {} if source is None else {sample.key: sample for sample in source.samples}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for folder in {name.rpartition("/")[0] for name in names.values()}:
        (part / folder).mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    bar = tqdm(labels.keys, desc="export", unit="img", disable=None if show_progress else True)
    for key, data in zip(bar, labels.read_each(labels.keys)):
        label_map, *others = decode(data, dictionary=labels.dictionary)
        known = label_map.log_normalizer is not None
        fill = fill or ("residual" if known else "zero")
        if fill == "residual" and not known:
            raise ValueError(
                f"{labels.folder} keeps no log_normalizer, so the teacher's residual is not known: "
                "give --fill zero"
            )
        scores, classes = _as_published(label_map, grid, top_k, fill)
        planes = np.stack([scores, classes.astype(np.float32)])
        if key in samples and source is not None:
            _, orientation = size_and_orientation(source.read(samples[key]))
            planes = turn_upright(planes, _INVERSE.get(orientation, orientation))
            counts["turned"] += orientation in _UPRIGHT
        counts["pyramids"] += bool(others)
        counts["resampled"] += label_map.grid != grid
        counts["windows"] += label_map.window != (0.0, 0.0, 1.0, 1.0)
        tensor = torch.from_numpy(np.ascontiguousarray(planes)).to(KINDS[kind].dtype)
        torch.save(tensor, part / f"{names[key]}.pt")
    summary = ExportSummary(
        num_files=len(labels),
        fill=fill or "residual",
        num_resampled=counts["resampled"],
        num_turned=counts["turned"],
        num_windows=counts["windows"],
        num_pyramids=counts["pyramids"],
    )
    if out.exists():
        out.rmdir()
    part.rename(out)
    return summary


def _check_export(labels: LabelSet, kind: str, grid: tuple[int, int], top_k: int) -> None:
    if not 1 <= top_k <= 255:
        raise ValueError(f"top-k {top_k} is not between 1 and 255")
    if grid[0] != grid[1] or grid[0] < _SMALLEST_GRID:
        raise ValueError(
            f"grid {grid[0]}x{grid[1]} cannot be used by the published trainers: they read square "
            f"maps of at least {_SMALLEST_GRID}x{_SMALLEST_GRID} cells"
        )
    if KINDS[kind].dtype == torch.float16 and labels.num_classes > _EXACT_IN_FLOAT16:
        raise ValueError(
            f"kind {kind} stores class ids as float16, exact only below {_EXACT_IN_FLOAT16}; this "
            f"set has {labels.num_classes} classes: give --kind relabel, which stores float32"
        )


def _export_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the name of each key's file; the rule is that of the published trainers."""
    names: dict[str, str] = {}
    key_of: dict[str, str] = {}
    for key in keys:
        name = published_name(unescape(key))
        if key_of.setdefault(name, key) != key:
            raise ValueError(
                f"the published trainers look for the labels of {unescape(key_of[name])!r} and "
                f"{unescape(key)!r} in the same file {name}.pt, because they cut names at the "
                "first dot; rename folders and files so that they have no dot, then label again"
            )
        names[key] = name
    return names


def _as_published(label_map: LabelMap, grid: tuple[int, int], top_k: int, fill: Fill) -> _Planes:
    """Bring a map to a grid and to top k, with scores above the fill."""
    if label_map.grid == grid:
        cut = replace(label_map, scores=label_map.scores[:top_k], classes=label_map.classes[:top_k])
        return above_fill(cut, fill), cut.classes
    return _resample(label_map, grid, top_k, fill)


def above_fill(label_map: LabelMap, fill: Fill) -> Float32[np.ndarray, "k rows cols"]:
    """Return a map's scores as logits above what each class outside a cell's top k has.

    With fill zero these are the raw scores: the classes outside are taken to have logit 0.
    """
    scores = label_map.scores.astype(np.float32)
    if fill == "zero":
        return scores
    if label_map.log_normalizer is None:
        raise ValueError("the label map keeps no log_normalizer, so its residual is not known")
    logs = scores - label_map.log_normalizer
    first = is_first(label_map.classes)
    num_outside = label_map.num_classes - first.sum(0)
    return logs - _residual_logit((np.exp(logs) * first).sum(0), num_outside)


def is_first(classes: UInt32[np.ndarray, "k rows cols"]) -> Bool[np.ndarray, "k rows cols"]:
    """Tell which ranks are classes: a cell that keeps fewer than k repeats its last one."""
    first = np.ones(classes.shape, dtype=bool)
    first[1:] = classes[1:] != classes[:-1]
    return first


def _resample(label_map: LabelMap, grid: tuple[int, int], top_k: int, fill: Fill) -> _Planes:
    """Read a map at the cells of another grid over the same window, as token targets are read."""
    palette, place = np.unique(label_map.classes, return_inverse=True)
    planes = np.zeros((len(palette), *label_map.grid), np.float32)
    np.put_along_axis(
        planes, place.reshape(label_map.classes.shape), above_fill(label_map, fill), 0
    )
    down, across = (_weights(n, m) for n, m in zip(grid, label_map.grid))
    logits = torch.from_numpy(down @ planes @ across.T)
    # Where there are fewer distinct classes than ranks, the last one is repeated.
    k = min(top_k, label_map.k)
    best = logits.topk(min(k, len(palette)), 0)
    ranks = np.arange(k).clip(max=len(palette) - 1)
    scores, classes = best.values.numpy(), palette[best.indices.numpy()]
    if fill == "residual":
        num_outside = label_map.num_classes - len(palette)
        total = np.logaddexp(logits.logsumexp(0).numpy(), np.log(max(num_outside, _TINY)))
        logs = scores - total
        num_left = np.array(label_map.num_classes - len(scores))
        scores = logs.astype(np.float32) - _residual_logit(np.exp(logs).sum(0), num_left)
    return scores[ranks], classes[ranks]


def _weights(num_cells: int, num_source_cells: int) -> Float32[np.ndarray, "n m"]:
    """Return the matrix that reads one axis of a map at the cells of another grid.

    geometry.sample_targets' rule: the mean of SAMPLES_PER_SIDE points, each bilinear, the outermost
    half cell repeating the edge.
    """
    num_points = num_cells * SAMPLES_PER_SIDE
    at = (np.arange(num_points) + 0.5) / num_points * num_source_cells - 0.5
    distance = np.abs(at.clip(0, num_source_cells - 1)[:, None] - np.arange(num_source_cells))
    weights = np.maximum(1 - distance, 0).reshape(num_cells, SAMPLES_PER_SIDE, -1).mean(1)
    return weights.astype(np.float32)


def _residual_logit(
    mass: Float[np.ndarray, "rows cols"], num_others: Int64[np.ndarray, "*#cells"]
) -> Float32[np.ndarray, "rows cols"]:
    """Return the logarithm of what each class outside the top k gets of the mass left over."""
    residual = np.maximum(1 - mass, _SMALLEST_RESIDUAL) / np.maximum(num_others, 1)
    return np.log(residual).astype(np.float32)
