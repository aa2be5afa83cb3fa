"""Images and masks → dataset shards: the job behind tl-seg pack.

A source is what was downloaded: a folder, a .zip or a .tar, none of which is unpacked. Four layouts
are known; they may lie in any folder:

    ade20k        images/training/KEY.jpg           annotations/training/KEY.png
    cityscapes    leftImg8bit/SPLIT/KEY_left….png   gtFine/SPLIT/KEY_gtFine_labelIds.png
    voc           JPEGImages/KEY.jpg                SegmentationClass/KEY.png
                                                    ImageSets/Segmentation/SPLIT.txt
    pairs         images/KEY.jpg                    masks/KEY.png
                  or images/SPLIT/KEY.jpg           masks/SPLIT/KEY.png

The first three have classes of their own; of pairs, a mask's values are class indices, or class
indices + 1 where 0 stands for no class (reduce_zero_label). In the shards masks always hold class
indices, and one value for pixels without a class.
"""

import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from PIL import Image

from ..labeler import archives, listing
from ..labeler.images import DEFAULT_QUALITY, BadImage, portable_jpeg
from ..labeler.listing import Classes
from ..labeler.sources import ImageSource, Sample, escape
from ..shards.index import ShardIndex, check_split_name
from ..shards.masks import BadMask, Mask, ignore_index_of, read_mask, shown, write_mask
from ..shards.pack import DEFAULT_SHARD_BYTES, Prepared, Rejected, check_sizes, write_split
from .class_sets import CLASS_SETS

_NOT_A_CLASS = -1
_NUM_SHOWN = 5

# Cityscapes' ids of its 19 evaluated classes, in their order; all other ids are not evaluated.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_NUM_IDS = 34


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask; nothing is read yet."""

    key: str
    image: Sample
    mask: Sample


@dataclass(frozen=True, kw_only=True)
class MaskSource:
    """Images with their masks."""

    root: str
    """What the user gave."""
    layout: str
    pairs: list[Pair]
    """Sorted by key."""
    classes: Classes
    values: Int32[np.ndarray, " n"]
    """For each value of a mask its class, ignore_index, or -1 where it must not occur; so must no
    value beyond its end."""
    ignore_index: int
    """In the shards."""


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What a finished pack did."""

    index: ShardIndex
    split: str
    layout: str
    duration_secs: float


def pack(
    source: MaskSource,
    out: Path,
    *,
    split: str,
    seed: int = 0,
    num_workers: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    shard_size: int | None = None,
    quality: int = DEFAULT_QUALITY,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> PackSummary:
    """Write one split of a data set for segmentation and add it to the index of its folder.

    Images that are no usable JPEGs are encoded anew, as by shards.pack, and images that cannot be
    decoded are quarantined in index.json. A mask that does not fit stops the job, since it is most
    often not the only one.

    Args:
        source: The images and their masks.
        out: Folder of the data set; may hold other splits with the same classes.
        split: Name of the split in `out`.
        seed: Of the shuffle over the whole split.
        num_workers: Threads that read and check; None takes the cores of this process.
        shard_bytes: Begin a new tar before one grows above this.
        shard_size: Begin a new tar after this many samples.
        quality: JPEG quality of images that are encoded anew.
        skip_bad: Whether images whose masks do not fit are quarantined, too.
        overwrite: Replace the split if the folder has it already.

    Raises:
        ValueError: A mask has values that are no class, another size than its image, or is no
            mask; names the file. Or the folder's other splits have other classes.
        OSError: If the split is there already (FileExistsError) or something cannot be written.
    """
    begin = time.monotonic()
    check_split_name(split)
    check_sizes(shard_bytes, shard_size, None, quality, num_workers)
    index = write_split(
        source.pairs,
        lambda pair, _: _prepare(source, pair, quality, skip_bad),
        source.classes,
        out,
        split=split,
        masks={"ignore_index": source.ignore_index, "layout": source.layout, "source": source.root},
        quarantined={},
        seed=seed,
        num_workers=num_workers,
        shard_bytes=shard_bytes,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    return PackSummary(
        index=index, split=split, layout=source.layout, duration_secs=time.monotonic() - begin
    )


def _prepare(source: MaskSource, pair: Pair, quality: int, skip_bad: bool) -> Prepared | Rejected:
    try:
        jpeg, repair = portable_jpeg(_read(pair.image), quality=quality)
    except (FileNotFoundError, PermissionError) as error:  # other OSErrors mean storage trouble
        return Rejected(f"cannot be read: {error.strerror}")
    except BadImage as error:
        return Rejected(str(error))
    try:
        mask = _to_classes(read_mask(_read(pair.mask)), source)
        with Image.open(io.BytesIO(jpeg)) as image:
            width, height = image.size
        if mask.shape != (height, width):
            raise BadMask(
                f"has {mask.shape[1]} × {mask.shape[0]} px (width × height), its image "
                f"{_place(pair.image, pair.key)} {width} × {height}"
            )
    except (BadMask, BadImage, FileNotFoundError, PermissionError) as error:
        text = f"the mask {_place(pair.mask, pair.key)} {error}"
        if skip_bad:
            return Rejected(text)
        raise ValueError(f"{text}. --skip-bad leaves such images out") from error
    return Prepared([("jpg", jpeg), ("png", write_mask(mask, len(source.classes.ids)))], repair)


def _read(sample: Sample) -> bytes:
    return ImageSource(sample.file, [], [], []).read(sample)


def _place(sample: Sample, key: str) -> str:
    return sample.file if sample.offset is None else f"of {key} in {sample.file}"


def _to_classes(mask: Mask, source: MaskSource) -> Mask:
    """Translate a mask's values."""
    last = len(source.values) - 1
    classes = source.values[mask.clip(0, last)]
    is_wrong = (mask < 0) | (mask > last) | (classes == _NOT_A_CLASS)
    if not is_wrong.any():
        return classes
    allowed = np.flatnonzero(source.values != _NOT_A_CLASS)
    hint = ""
    if source.layout == "pairs":
        hint = "; --ignore N allows more values, --classes more classes"
    raise BadMask(
        f"has pixels of value {shown(np.unique(mask[is_wrong]))}; allowed: {_in_ranges(allowed)} "
        f"for {len(source.classes.ids)} classes{hint}"
    )


def _in_ranges(numbers: Sequence[int] | np.ndarray) -> str:
    """Write rising numbers like 0 to 19, 255."""
    values = [int(number) for number in numbers]
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


# ------------------------------------------------------------------------------- what there is


Files = dict[str, Sample]
"""Path below the source's root → where it lies; the key of the Sample is not used."""


def open_masks(
    sources: Sequence[str],
    *,
    split: str,
    layout: str | None = None,
    classes: Path | None = None,
    ignore: Sequence[int] | None = None,
    reduce_zero_label: bool = False,
) -> MaskSource:
    """List a split of a data set with masks.

    Args:
        sources: Folders or archives that hold it; several are taken as one, such as the two zip
            files of Cityscapes.
        split: As the data set calls it; of ade20k, train and val.
        layout: One of LAYOUTS; None looks which one it is.
        classes: File with a class name a line; of pairs only, and needed there.
        ignore: Of pairs only: values of masks that stand for no class; None means 255, if that is
            no class.
        reduce_zero_label: Of pairs only: 0 stands for no class and k for class k - 1.

    Raises:
        OSError: If something does not exist or cannot be read.
        ValueError: No known layout, no such split, images without masks, or options that do not
            belong to the layout; says which.
    """
    files: Files = {}
    for source in sources:
        files |= _list(source)
    root = ", ".join(sources)
    layout = layout or _guess_layout(files, root)
    if layout != "pairs" and (classes or ignore is not None or reduce_zero_label):
        raise ValueError(
            f"the layout of {root} is {layout}, whose classes and values are known: leave "
            "--classes, --ignore and --reduce-zero-label out, or say --layout pairs"
        )
    if layout == "pairs":
        if classes is None:
            raise ValueError(
                f"--classes is missing: a file with the name of a class of {root} a line, in the "
                "order of the masks' values"
            )
        known = listing.read_classes(classes)
    else:
        names = list(CLASS_SETS[layout].names)
        known = Classes(layout, names, names)
    num_classes = len(known.ids)
    to_ignore = ignore_index_of(num_classes)
    if num_classes >= to_ignore:
        raise ValueError(f"{classes} names {num_classes} classes; masks hold at most 65534")
    if layout == "pairs":
        values = _values_of_pairs(num_classes, to_ignore, ignore, reduce_zero_label)
    else:
        values = _VALUES[layout](to_ignore)
    images, masks = _FINDERS[layout](files, split, root)
    return MaskSource(
        root=root,
        layout=layout,
        pairs=_paired(images, masks, root),
        classes=known,
        values=values,
        ignore_index=to_ignore,
    )


def _list(source: str) -> Files:
    if Path(source).is_dir():
        root = Path(source)
        paths = (path for path in root.rglob("*") if path.is_file())
        found = {p.relative_to(root).as_posix(): Sample("", str(p), None) for p in paths}
    else:
        if not source.lower().endswith(archives.SUFFIXES):
            listing.check_kind(source)
        found = {
            member.name: Sample("", source, None, member.offset, member.num_bytes)
            for member in archives.list_archive(source).members
        }
    return {path: file for path, file in found.items() if not _is_hidden(path)}


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _guess_layout(files: Files, root: str) -> str:
    for name, (folder, other) in _MARKS.items():
        if _have_folder(files, folder) and _have_folder(files, other):
            return name
    wanted = "; ".join(f"{name}: {a}/ and {b}/" for name, (a, b) in _MARKS.items())
    raise ValueError(f"{root} has none of the known layouts ({wanted})")


def _have_folder(files: Files, folder: str) -> bool:
    return any(f"/{folder}/" in f"/{path}" for path in files)


_MARKS = {
    "ade20k": ("images/training", "annotations/training"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "voc": ("JPEGImages", "SegmentationClass"),
    "pairs": ("images", "masks"),
}
LAYOUTS = tuple(_MARKS)


def _find(files: Files, folder: str, ending: str) -> Files:
    """Take the files …/FOLDER/**/KEY + ending by their keys; `ending` is a regular expression."""
    pattern = re.compile(rf"(?:.*/)?{re.escape(folder)}/(?P<key>.+?){ending}", re.IGNORECASE)
    found: Files = {}
    for path, file in files.items():
        match = pattern.fullmatch(path)
        if match is None:
            continue
        other = found.setdefault(match["key"], file)
        if other is not file:
            first, second = sorted((_place(other, path), _place(file, path)))
            raise ValueError(f"{first} and {second} would share the key {match['key']!r}")
    return found


_PHOTO = r"\.(?:jpe?g|png|webp|bmp)"


def _find_ade20k(files: Files, split: str, root: str) -> tuple[Files, Files]:
    folder = {"train": "training", "val": "validation"}.get(split)
    if folder is None:
        raise ValueError(f"ADE20K has no split {split!r} with masks; it has 'train' and 'val'")
    masks = _find(files, f"annotations/{folder}", r"\.png")
    return _find(files, f"images/{folder}", _PHOTO), masks


def _find_cityscapes(files: Files, split: str, root: str) -> tuple[Files, Files]:
    masks = _find(files, f"gtFine/{split}", r"_gtFine_labelIds\.png")
    return _find(files, f"leftImg8bit/{split}", r"_leftImg8bit\.png"), masks


def _find_voc(files: Files, split: str, root: str) -> tuple[Files, Files]:
    lists = _find(files, "ImageSets/Segmentation", r"\.txt")
    if split not in lists:
        raise ValueError(
            f"{root} has no ImageSets/Segmentation/{split}.txt; it has "
            f"{', '.join(sorted(lists)) or 'no list at all'}"
        )
    keys = set(_read(lists[split]).decode().split())
    images, masks = _find(files, "JPEGImages", _PHOTO), _find(files, "SegmentationClass", r"\.png")
    missing = sorted(keys - set(images))
    if missing:
        raise ValueError(
            f"{root} lacks {len(missing)} images of {split}.txt: {_some(missing)}; were all "
            "archives given?"
        )
    return {key: images[key] for key in keys}, {key: masks[key] for key in keys & set(masks)}


def _find_pairs(files: Files, split: str, root: str) -> tuple[Files, Files]:
    images = _find(files, f"images/{split}", _PHOTO)
    if images:
        return images, _find(files, f"masks/{split}", r"\.png")
    return _find(files, "images", _PHOTO), _find(files, "masks", r"\.png")


_FINDERS: dict[str, Callable[[Files, str, str], tuple[Files, Files]]] = {
    "ade20k": _find_ade20k,
    "cityscapes": _find_cityscapes,
    "voc": _find_voc,
    "pairs": _find_pairs,
}


def _paired(images: Files, masks: Files, root: str) -> list[Pair]:
    if not images:
        raise ValueError(f"{root} has no images of this split in the folders of its layout")
    for found, others, what, other in (
        (images, masks, "images", "mask"),
        (masks, images, "masks", "image"),
    ):
        alone = sorted(set(found) - set(others))
        if alone:
            raise ValueError(
                f"{len(alone)} of {len(found)} {what} of {root} have no {other} of the same name: "
                f"{_some(alone)}; masks must be PNG files"
            )
    return sorted(
        (Pair(escape(key), image, masks[key]) for key, image in images.items()),
        key=lambda pair: pair.key.encode(),
    )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NUM_SHOWN]) + (", …" if len(keys) > _NUM_SHOWN else "")


# ------------------------------------------------------------------------- values → classes


def _values_of_pairs(
    num_classes: int, to_ignore: int, ignore: Sequence[int] | None, reduce_zero_label: bool
) -> Int32[np.ndarray, " n"]:
    first = int(reduce_zero_label)
    if ignore is None:
        ignore = [255] if num_classes + first <= 255 else []
    if wrong := [value for value in ignore if not 0 <= value <= 65535]:
        raise ValueError(f"--ignore {wrong[0]}; allowed: 0 to 65535, the values of a PNG")
    values = np.full(max(num_classes + first - 1, *ignore, 0) + 1, _NOT_A_CLASS, np.int32)
    values[:first] = to_ignore
    values[first : num_classes + first] = np.arange(num_classes)
    if taken := [value for value in ignore if values[value] not in (_NOT_A_CLASS, to_ignore)]:
        raise ValueError(
            f"--ignore {taken[0]} is the value of class {values[taken[0]]}; name fewer classes in "
            "--classes, or ignore another value"
        )
    values[list(ignore)] = to_ignore
    return values


def _ade20k_values(to_ignore: int) -> Int32[np.ndarray, " n"]:
    return _values_of_pairs(150, to_ignore, [], True)


def _cityscapes_values(to_ignore: int) -> Int32[np.ndarray, " n"]:
    values = np.full(_CITYSCAPES_NUM_IDS, to_ignore, np.int32)
    values[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    return values


_VALUES: dict[str, Callable[[int], Int32[np.ndarray, " n"]]] = {
    "ade20k": _ade20k_values,
    "cityscapes": _cityscapes_values,
    "voc": partial(_values_of_pairs, 21, ignore=[255], reduce_zero_label=False),
}
