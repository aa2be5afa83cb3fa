"""Images + label maps → dataset shards: the job behind `tl-shard pack`.

Samples are read, checked and repaired by a pool of threads (Pillow works outside Python's lock)
and written by one, in an order that depends on nothing but the seed and the keys.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from ..labeler import label_map
from ..labeler.images import DEFAULT_QUALITY, BadImage, Check, portable_jpeg
from ..labeler.label_set import LabelSet
from ..labeler.listing import Classes
from ..labeler.sources import ImageSource, Sample
from . import index as index_file
from .index import PART_SUFFIX, ShardIndex, SplitIndex
from .writer import (
    Fields,
    SplitWriter,
    finish_publishing,
    map_in_order,
    only_writer,
    publish,
    staging,
)

DEFAULT_SHARD_BYTES = 400_000_000
MIN_SHARD_BYTES = 10_000

_NUM_SHOWN = 10
_SAMPLES_AHEAD = 8  # per worker: enough to hide a slow image, little enough to bound memory


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What a finished pack did."""

    index: ShardIndex
    split: str
    num_unused_labels: int
    """Labels without an image; above 0 only with allow_missing."""
    duration_secs: float


def pack(
    source: ImageSource,
    out: Path,
    *,
    split: str,
    labels: LabelSet | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    shard_size: int | None = None,
    max_side_px: int | None = None,
    quality: int = DEFAULT_QUALITY,
    check: Check = "decode",
    allow_missing: bool = False,
    overwrite: bool = False,
) -> PackSummary:
    """Write one split of a data set and add it to the index of its folder.

    The bytes depend on the images, the labels and the arguments, not on the machine, the day or
    the number of workers (of images encoded anew they depend on Pillow's version too). Images
    that cannot be decoded, and those that the labeler left out, are quarantined in index.json:
    packed + quarantined = listed.

    Args:
        source: The images and their classes.
        out: Folder of the data set; may hold other splits with the same classes.
        split: Name of the split, e.g. "train".
        labels: Label maps by key; None makes a split without, e.g. for validation.
        seed: Of the shuffle over the whole split.
        num_workers: Threads that read and check images; None takes the cores of this process.
        shard_bytes: Begin a new tar before one grows above this.
        shard_size: Begin a new tar after this many samples.
        max_side_px: Shrink images whose longer side is above this.
        quality: JPEG quality of images that are encoded anew.
        check: See images.portable_jpeg; "ends" packs several times as fast.
        allow_missing: Leave images without a label out, instead of refusing the label set.
        overwrite: Replace the split if the folder has it already. The old one stays in place
            until the new one is complete.

    Raises:
        ValueError: If labels and images do not belong together, the folder's other splits have
            other classes, no image is usable, or an argument is out of range.
        OSError: If the split is there already (FileExistsError) or something cannot be written.
    """
    begin = time.monotonic()
    index_file.check_split_name(split)
    check_sizes(shard_bytes, shard_size, max_side_px, quality, num_workers)
    _check_has_classes(source)
    quarantined: dict[str, str] = {}
    num_unused_labels = 0
    if labels is not None:
        check_label_classes(source.root, source.class_ids, source.class_names, labels)
        keys = [sample.key for sample in source.samples]
        quarantined, num_unused_labels = join(keys, labels, allow_missing)
    new = write_split(
        [sample for sample in source.samples if sample.key not in quarantined],
        lambda sample, near: _prepare(source, near, sample, max_side_px, quality, check),
        Classes(source.root, source.class_ids, source.class_names),
        out,
        split=split,
        labels=labels,
        quarantined=quarantined,
        seed=seed,
        num_workers=num_workers,
        shard_bytes=shard_bytes,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    return PackSummary(
        index=new,
        split=split,
        num_unused_labels=num_unused_labels,
        duration_secs=time.monotonic() - begin,
    )


@runtime_checkable
class Keyed(Protocol):
    """What a sample is made of; nothing is read yet."""

    @property
    def key(self) -> str:
        """Unique within the split."""
        ...


_Sample = TypeVar("_Sample", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample ready to be written."""

    fields: Fields
    repair: str | None
    """Why the image was encoded anew."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A sample that is left out."""

    reason: str


def write_split(
    samples: Sequence[_Sample],
    prepare: Callable[[_Sample, LabelSet | None], Prepared | Rejected],
    classes: Classes,
    out: Path,
    *,
    split: str,
    labels: LabelSet | None = None,
    masks: dict[str, Any] | None = None,
    quarantined: Mapping[str, str],
    seed: int,
    num_workers: int | None,
    shard_bytes: int,
    shard_size: int | None,
    overwrite: bool,
) -> ShardIndex:
    """Write one split, whatever its samples consist of, and add it to the index of its folder.

    Args:
        samples: In any order.
        prepare: Makes the files of a sample, in threads; gets `labels`, close at hand.
        classes: Of the data set.
        out: As for `pack`, as is what is not listed here.
        split: Its name.
        labels: Label maps by key.
        masks: What the index is to say about masks, see SplitIndex.
        quarantined: Key of each image that was left out before → why.
        seed: Of the shuffle.
        num_workers: Threads.
        shard_bytes: Size of a tar.
        shard_size: Samples of a tar.
        overwrite: Whether the split may be there.

    Returns:
        The data set's new index.
    """
    ordered = shuffled(samples, seed)
    left_out = dict(quarantined)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        finish_publishing(out)
        old = _index_to_extend(classes, out, split, overwrite)
        num_workers = num_workers or len(os.sched_getaffinity(0))
        repaired: Counter[str] = Counter()
        with staging(out, split) as staged, at_hand(labels, out) as near:
            writer = SplitWriter(staged, split, shard_bytes, shard_size)
            try:
                with ThreadPoolExecutor(num_workers, thread_name_prefix="pack") as pool:
                    prepared = map_in_order(
                        pool,
                        lambda sample: prepare(sample, near),
                        ordered,
                        ahead=num_workers * _SAMPLES_AHEAD,
                    )
                    for sample, item in tqdm(
                        zip(ordered, prepared),
                        desc=f"pack {split}",
                        total=len(ordered),
                        disable=None,
                        unit="img",
                    ):
                        if isinstance(item, Rejected):
                            left_out[sample.key] = item.reason
                            continue
                        if item.repair is not None:
                            repaired[item.repair] += 1
                        writer.add(sample.key, item.fields)
                shards = writer.close()
            finally:
                writer.abandon()
            num_listed = len(samples) + len(quarantined)
            if not shards:
                key, reason = next(iter(left_out.items()))
                raise ValueError(f"none of {num_listed} images can be packed, e.g. {key}: {reason}")
            entry = SplitIndex(
                num_samples=sum(shard.samples for shard in shards),
                has_labels=labels is not None,
                seed=seed,
                shards=shards,
                labels=None if labels is None else label_facts(labels),
                num_listed=num_listed,
                quarantined=dict(sorted(left_out.items())),
                repaired=dict(sorted(repaired.items())),
                masks=masks,
            )
            new = replace(old, splits=old.splits | {split: entry})
            publish(new, staged)
    return new


def _prepare(
    source: ImageSource,
    labels: LabelSet | None,
    sample: Sample,
    max_side_px: int | None,
    quality: int,
    check: Check,
) -> Prepared | Rejected:
    try:
        data = source.read(sample)
        jpeg, repair = portable_jpeg(data, max_side_px=max_side_px, quality=quality, check=check)
    except (FileNotFoundError, PermissionError) as error:  # other OSErrors mean storage trouble
        return Rejected(f"cannot be read: {error.strerror}")
    except BadImage as error:
        return Rejected(str(error))
    fields = [("jpg", jpeg), ("cls", str(sample.class_index).encode())]
    if labels is not None:
        fields.append(("tlm", read_label(labels, sample.key)))
    return Prepared(fields, repair)


_Labels = TypeVar("_Labels", LabelSet, LabelSet | None)


@contextmanager
def at_hand(labels: _Labels, folder: Path) -> Iterator[_Labels]:
    """Copy label maps that lie behind a URL beside the shards that are being written.

    The samples are shuffled: a request for each would take hours where whole tars take minutes.
    """
    if labels is None or not labels.is_remote:
        yield labels
        return
    with TemporaryDirectory(prefix=".labels-", suffix=PART_SUFFIX, dir=folder) as copies:
        yield labels.copy_to(Path(copies))


def read_label(labels: LabelSet, key: str) -> bytes:
    """Return an image's label map once its checksum has been looked at.

    Raises:
        ValueError: If it is damaged.
    """
    label = labels.read(key)
    try:
        label_map.check(label, dictionary=labels.dictionary)
    except label_map.LabelMapError as error:
        raise ValueError(f"the label map of {key} is damaged: {error}") from error
    return label


def _index_to_extend(classes: Classes, out: Path, split: str, overwrite: bool) -> ShardIndex:
    """Return the index that the split is added to, an empty one in a new folder.

    Raises:
        FileExistsError: If the split, or files that are named like it, are there already.
        ValueError: If the other splits have other classes.
    """
    exists = (out / index_file.INDEX_NAME).exists()
    index = index_file.read_index(out) if exists else None
    if not overwrite:
        if index is not None and split in index.splits:
            raise FileExistsError(
                f"{out} holds a split {split!r} already ({index.splits[split].num_samples} "
                "samples); --overwrite replaces it, another --split adds to it"
            )
        in_the_way = sorted(
            path.name for path in out.iterdir() if index_file.belongs_to(path.name, split)
        )
        if in_the_way:
            raise FileExistsError(
                f"{out} holds {in_the_way[0]} and {len(in_the_way) - 1} more files that no index "
                f"names; --overwrite replaces those of split {split!r}"
            )
    if index is None or set(index.splits) == {split}:
        return ShardIndex(
            folder=out,
            num_classes=len(classes.ids),
            class_ids=classes.ids,
            class_names=classes.names,
        )
    _check_same_classes(classes, index)
    return index


def check_sizes(
    shard_bytes: int,
    shard_size: int | None,
    max_side_px: int | None,
    quality: int,
    num_workers: int | None,
) -> None:
    """Raise ValueError where an argument of `pack` is out of range."""
    if shard_bytes < MIN_SHARD_BYTES:
        raise ValueError(
            f"shard_bytes is {shard_bytes}, less than most images; allowed from "
            f"{MIN_SHARD_BYTES}, usual {DEFAULT_SHARD_BYTES}"
        )
    for name, value in (
        ("shard_size", shard_size),
        ("max_side_px", max_side_px),
        ("num_workers", num_workers),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, allowed from 1")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}, allowed from 1 to 95")


def _check_has_classes(source: ImageSource) -> None:
    if not source.num_classes:
        raise ValueError(
            f"{source.root} says of no image which class it has, but samples of a data set have "
            "one each; put the images into class folders, or give a list with PATH,CLASS a line"
        )


def check_label_classes(
    images: Path | str, class_ids: list[str], class_names: list[str], labels: LabelSet
) -> None:
    """Check that class labels and label maps speak of the same classes.

    Raises:
        ValueError: If their numbers differ, or the same names come in another order.
    """
    if labels.num_classes != len(class_ids):
        raise ValueError(
            f"the label maps have {labels.num_classes} classes and {images} has "
            f"{len(class_ids)}; class labels and maps must count alike: name all classes of "
            "the teacher, in its order, in a --classes file"
        )
    for names in (class_ids, class_names):
        if sorted(names) == sorted(labels.class_names) and names != labels.class_names:
            position, ours, theirs = _first_difference(names, labels.class_names)
            raise ValueError(
                f"class {position} is {ours!r} in {images} and {theirs!r} in the label maps; "
                "name the classes in the order of the teacher in a --classes file"
            )


def _first_difference(ours: list[str], theirs: list[str]) -> tuple[int, str, str]:
    return next((i, a, b) for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)


def label_facts(labels: LabelSet) -> dict[str, Any]:
    """Return what the labels' index says about how they were made, without its lists."""
    left_out = {"format", "version", "class_names", "quarantined", "shards"}
    return {name: value for name, value in labels.index.items() if name not in left_out}


def _check_same_classes(classes: Classes, index: ShardIndex) -> None:
    if classes.ids == index.class_ids:
        return
    advice = "give all splits of a data set the same --classes file"
    if len(classes.ids) != index.num_classes:
        raise ValueError(
            f"{classes.where} has {len(classes.ids)} classes, the data set {index.folder} has "
            f"{index.num_classes}; {advice}"
        )
    position, ours, theirs = _first_difference(classes.ids, index.class_ids)
    raise ValueError(
        f"class {position} is {ours!r} in {classes.where} and {theirs!r} in {index.folder}; "
        f"{advice}"
    )


def shuffled(samples: Iterable[_Sample], seed: int) -> list[_Sample]:
    """Order samples by a hash of seed and key.

    Unlike the permutation of a random generator this is the same in every version of every
    library, and images added later do not move the others against each other.
    """
    return sorted(
        samples, key=lambda s: (hashlib.sha256(f"{seed}/{s.key}".encode()).digest(), s.key)
    )


def join(
    keys: Sequence[str],
    labels: LabelSet,
    allow_missing: bool,
    *,
    left_out_before: Collection[str] = (),
) -> tuple[dict[str, str], int]:
    """Match images with labels by key.

    Args:
        keys: Of the images.
        labels: Their label maps.
        allow_missing: Leave images without a label out, instead of refusing the label set.
        left_out_before: Keys of images that are known not to be here: no label misses them.

    Returns:
        Why each image that has no label is left out, and the number of labels without an image.

    Raises:
        ValueError: If images without labels, or labels without images, are not allowed.
    """
    quarantined: dict[str, str] = {}
    missing: list[str] = []
    for key in keys:
        if key in labels.quarantined:
            quarantined[key] = f"not labelled: {labels.quarantined[key]}"
        elif key not in labels:
            missing.append(key)
    listed = {*keys, *left_out_before}
    surplus = sorted(key for key in labels.keys if key not in listed)
    if not allow_missing and (missing or surplus):
        problems = []
        if missing:
            problems.append(f"{_shown(missing)} of {len(keys)} images have no label")
        if surplus:
            problems.append(f"{_shown(surplus)} of {len(labels.keys)} labels have no image")
        raise ValueError(
            f"images and labels do not match: {'; '.join(problems)}. Labels belong to the images "
            "that were given to tl-label generate --images; --allow-missing takes what matches"
        )
    for key in missing:
        quarantined[key] = "no label in the label set"
    return quarantined, len(surplus)


def _shown(keys: list[str]) -> str:
    more = ", …" if len(keys) > _NUM_SHOWN else ""
    return f"{len(keys)} ({', '.join(keys[:_NUM_SHOWN])}{more})"
