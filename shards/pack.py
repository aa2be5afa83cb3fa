"""Images + label maps → dataset shards: the job behind `tl-shard pack`.

Samples are read, checked and repaired by a pool of threads (Pillow works outside Python's lock)
and written by one, in an order that depends on nothing but the seed and the keys. All files carry
hidden temporary names until the last one is complete; index.json comes after all renames.
"""

import fcntl
import hashlib
import logging
import os
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from ..labeler.images import DEFAULT_QUALITY, BadImage, portable_jpeg
from ..labeler.label_map import LabelMapError, decode
from ..labeler.label_set import LabelSet
from ..labeler.sources import ImageFolder, Sample
from . import index as index_file
from .index import ShardEntry, ShardIndex, SplitIndex

DEFAULT_SHARD_BYTES = 400_000_000
MIN_SHARD_BYTES = 10_000

_TAR_END = bytes(1024)
_NUM_SHOWN = 10
_SAMPLES_AHEAD = 8  # per worker: enough to hide a slow image, little enough to bound memory

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What a finished pack did."""

    index: ShardIndex
    split: str
    num_unused_labels: int
    """Labels without an image; above 0 only with allow_missing."""
    duration_secs: float


def pack(
    source: ImageFolder,
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
    _check_sizes(shard_bytes, shard_size, max_side_px, quality, num_workers)
    quarantined: dict[str, str] = {}
    num_unused_labels = 0
    if labels is not None:
        _check_label_classes(source, labels)
        quarantined, num_unused_labels = _join(source, labels, allow_missing)
    samples = _shuffled((s for s in source.samples if s.key not in quarantined), seed)

    out.mkdir(parents=True, exist_ok=True)
    with _only_packer(out):
        old = _index_to_extend(source, out, split, overwrite)
        _remove_parts(out)
        num_workers = num_workers or len(os.sched_getaffinity(0))
        repaired: Counter[str] = Counter()
        writer = _SplitWriter(out, split, shard_bytes, shard_size)
        try:
            with ThreadPoolExecutor(num_workers, thread_name_prefix="pack") as pool:
                prepared = _map_in_order(
                    pool,
                    lambda sample: _prepare(source, labels, sample, max_side_px, quality),
                    samples,
                    ahead=num_workers * _SAMPLES_AHEAD,
                )
                progress = tqdm(
                    zip(samples, prepared), f"pack {split}", len(samples), disable=None, unit="img"
                )
                for sample, item in progress:
                    if isinstance(item, _Rejected):
                        quarantined[sample.key] = item.reason
                        continue
                    if item.repair is not None:
                        repaired[item.repair] += 1
                    writer.add(sample.key, item.fields)
            shards = writer.close()
            if not shards:
                key, reason = next(iter(quarantined.items()))
                raise ValueError(
                    f"none of {len(source.samples)} images can be packed, e.g. {key}: {reason}"
                )
            entry = SplitIndex(
                num_samples=sum(shard.samples for shard in shards),
                has_labels=labels is not None,
                seed=seed,
                shards=shards,
                labels=None if labels is None else _label_facts(labels),
                num_listed=len(source.samples),
                quarantined=dict(sorted(quarantined.items())),
                repaired=dict(sorted(repaired.items())),
            )
            new = replace(old, splits=old.splits | {split: entry})
            _publish(new, split)
        finally:
            writer.discard()
    return PackSummary(
        index=new,
        split=split,
        num_unused_labels=num_unused_labels,
        duration_secs=time.monotonic() - begin,
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    fields: list[tuple[str, bytes]]
    """(extension, content) in the order of the tar."""
    repair: str | None
    """Why the image was encoded anew."""


@dataclass(frozen=True, slots=True)
class _Rejected:
    reason: str


def _prepare(
    source: ImageFolder,
    labels: LabelSet | None,
    sample: Sample,
    max_side_px: int | None,
    quality: int,
) -> _Prepared | _Rejected:
    try:
        data = source.read(sample)
        jpeg, repair = portable_jpeg(data, max_side_px=max_side_px, quality=quality)
    except (FileNotFoundError, PermissionError) as error:  # other OSErrors mean storage trouble
        return _Rejected(f"cannot be read: {error.strerror}")
    except BadImage as error:
        return _Rejected(str(error))
    fields = [("jpg", jpeg), ("cls", str(sample.class_index).encode())]
    if labels is not None:
        label = labels.read(sample.key)
        try:
            decode(label)
        except LabelMapError as error:
            raise ValueError(f"the label map of {sample.key} is damaged: {error}") from error
        fields.append(("tlm", label))
    return _Prepared(fields, repair)


def _map_in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    ahead: int,
) -> Iterator[_Result]:
    """Yield function(item) for each item, at most `ahead` of them computed but not yet taken."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _SplitWriter:
    """Writes the tars of a split and their .idx under temporary names."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, shard_size: int | None) -> None:
        self._folder = folder
        self._split = split
        self._shard_bytes = shard_bytes
        self._shard_size = shard_size
        self._entries: list[ShardEntry] = []
        self._shard: _ShardWriter | None = None

    def add(self, key: str, fields: list[tuple[str, bytes]]) -> None:
        """Append a sample, to a new shard where the present one is full."""
        members = [_TarMember(f"{key}.{extension}", data) for extension, data in fields]
        num_bytes = sum(member.num_bytes for member in members)
        if self._shard is not None and self._is_full(self._shard, num_bytes):
            self._finish_shard(self._shard)
        if self._shard is None:
            name = index_file.shard_name(self._split, len(self._entries))
            self._shard = _ShardWriter(self._folder, name)
        self._shard.add(members)

    def close(self) -> list[ShardEntry]:
        """Finish the last shard; return all, still under temporary names."""
        if self._shard is not None:
            self._finish_shard(self._shard)
        return self._entries

    def discard(self) -> None:
        """Remove what is still under a temporary name, as after an error."""
        if self._shard is not None:
            self._shard.abandon()
        _remove_parts(self._folder)

    def _is_full(self, shard: "_ShardWriter", num_more_bytes: int) -> bool:
        too_large = shard.num_bytes + num_more_bytes + len(_TAR_END) > self._shard_bytes
        return too_large or len(shard.rows) == self._shard_size

    def _finish_shard(self, shard: "_ShardWriter") -> None:
        self._entries.append(shard.finish())
        self._shard = None


class _ShardWriter:
    """Writes one tar and its .idx, and hashes both on the way."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.num_bytes = 0
        self.rows: list[list[tuple[str, int, int]]] = []
        """Of each sample: its members as (name in the tar, offset of the data, size)."""
        self._folder = folder
        self._sha256 = hashlib.sha256()
        with _naming(folder, name):
            self._file = _create(_part_path(folder, name))

    def add(self, members: list["_TarMember"]) -> None:
        row = []
        for member in members:
            self._write(member.header)
            row.append((member.name, self.num_bytes, len(member.data)))
            self._write(member.data)
            self._write(bytes(member.num_padding_bytes))
        self.rows.append(row)

    def finish(self) -> ShardEntry:
        self._write(_TAR_END)
        idx = index_file.format_idx(self.rows).encode()
        entry = ShardEntry(
            name=self.name,
            samples=len(self.rows),
            bytes=self.num_bytes,
            sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(idx).hexdigest(),
        )
        with _naming(self._folder, self.name):
            _close_on_disk(self._file)
            idx_file = _create(_part_path(self._folder, entry.idx_name))
            idx_file.write(idx)
            _close_on_disk(idx_file)
        return entry

    def abandon(self) -> None:
        # Closing writes what is still buffered, and may fail again on a full disk.
        with suppress(OSError):
            self._file.close()

    def _write(self, block: bytes) -> None:
        with _naming(self._folder, self.name):
            self._file.write(block)
        self._sha256.update(block)
        self.num_bytes += len(block)


class _TarMember:
    """A file in a tar, with no date and no owner."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self.header = _tar_header(name, len(data))
        self.num_padding_bytes = -len(data) % tarfile.BLOCKSIZE

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.data) + self.num_padding_bytes


def _tar_header(name: str, num_bytes: int) -> bytes:
    """Return a tar header that every reader understands.

    Names that a plain POSIX header cannot hold (100 bytes, or 255 with a '/' at the right place)
    take GNU's long form: DALI reads that without an index too, and the newer pax form it does not.
    """
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8")
    except ValueError:
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8")


def _part_path(folder: Path, name: str) -> Path:
    return folder / f".{name}{index_file.PART_SUFFIX}"


def _create(path: Path) -> BinaryIO:
    return path.open("xb")


def _close_on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextmanager
def _naming(folder: Path, name: str) -> Iterator[None]:
    """Say in an OSError which shard could not be written; the system's text does not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {folder / name}: {error.strerror}; nothing of this run was kept, "
            "make room or give another --out and run the same command again",
        ) from error


def _remove_parts(folder: Path) -> None:
    parts = list(folder.glob(f".*{index_file.PART_SUFFIX}"))
    for part in parts:
        part.unlink()


@contextmanager
def _only_packer(folder: Path) -> Iterator[None]:
    """Keep a second pack out of a folder; the lock ends with this process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another tl-shard pack is writing into {folder}; wait until it has finished"
            ) from error
        except OSError:  # some network file systems cannot lock a folder
            _logger.debug("%s cannot be locked", folder)
        yield
    finally:
        os.close(descriptor)


def _index_to_extend(source: ImageFolder, out: Path, split: str, overwrite: bool) -> ShardIndex:
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
            num_classes=source.num_classes,
            class_ids=source.class_ids,
            class_names=source.class_names,
        )
    _check_same_classes(source, index)
    return index


def _check_sizes(
    shard_bytes: int,
    shard_size: int | None,
    max_side_px: int | None,
    quality: int,
    num_workers: int | None,
) -> None:
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


def _check_label_classes(source: ImageFolder, labels: LabelSet) -> None:
    if labels.num_classes != source.num_classes:
        raise ValueError(
            f"the label maps have {labels.num_classes} classes and {source.root} has "
            f"{source.num_classes}; class labels and maps must count alike: name all classes of "
            "the teacher, in its order, in a --classes file"
        )
    for names in (source.class_ids, source.class_names):
        if sorted(names) == sorted(labels.class_names) and names != labels.class_names:
            position, ours, theirs = _first_difference(names, labels.class_names)
            raise ValueError(
                f"class {position} is {ours!r} in {source.root} and {theirs!r} in the label maps; "
                "name the classes in the order of the teacher in a --classes file"
            )


def _first_difference(ours: list[str], theirs: list[str]) -> tuple[int, str, str]:
    return next((i, a, b) for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)


def _label_facts(labels: LabelSet) -> dict[str, Any]:
    """Return what the labels' index says about how they were made, without its lists."""
    left_out = {"format", "version", "class_names", "quarantined", "shards"}
    return {name: value for name, value in labels.index.items() if name not in left_out}


def _check_same_classes(source: ImageFolder, index: ShardIndex) -> None:
    if source.class_ids == index.class_ids:
        return
    advice = "give all splits of a data set the same --classes file"
    if source.num_classes != index.num_classes:
        raise ValueError(
            f"{source.root} has {source.num_classes} classes, the data set {index.folder} has "
            f"{index.num_classes}; {advice}"
        )
    position, ours, theirs = _first_difference(source.class_ids, index.class_ids)
    raise ValueError(
        f"class {position} is {ours!r} in {source.root} and {theirs!r} in {index.folder}; {advice}"
    )


def _publish(index: ShardIndex, split: str) -> None:
    """Give the finished files their names, then the index.

    Where a split is replaced, the index forgets it first: killed in between, the folder has no
    such split rather than a mixed one.
    """
    folder = index.folder
    staged = _part_path(folder, f"{split}-{index_file.INDEX_NAME}")
    with _naming(folder, index_file.INDEX_NAME):
        index_file.stage_index(index, staged)  # before the renames, so that they never lack it
    others = {name: entry for name, entry in index.splits.items() if name != split}
    old = [path for path in folder.iterdir() if index_file.belongs_to(path.name, split)]
    if old and others:
        index_file.write_index(replace(index, splits=others))
    elif old:
        (folder / index_file.INDEX_NAME).unlink(missing_ok=True)
    for path in old:
        path.unlink()
    for shard in index.splits[split].shards:
        for name in (shard.name, shard.idx_name):
            _part_path(folder, name).replace(folder / name)
    index_file.sync_folder(folder)
    staged.replace(folder / index_file.INDEX_NAME)
    index_file.sync_folder(folder)


def _shuffled(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """Order samples by a hash of seed and key.

    Unlike the permutation of a random generator this is the same in every version of every
    library, and images added later do not move the others against each other.
    """
    return sorted(
        samples, key=lambda s: (hashlib.sha256(f"{seed}/{s.key}".encode()).digest(), s.key)
    )


def _join(source: ImageFolder, labels: LabelSet, allow_missing: bool) -> tuple[dict[str, str], int]:
    """Match images with labels by key.

    Returns:
        Why each image that has no label is left out, and the number of labels without an image.
    """
    quarantined: dict[str, str] = {}
    missing: list[str] = []
    for sample in source.samples:
        if sample.key in labels.quarantined:
            quarantined[sample.key] = f"not labelled: {labels.quarantined[sample.key]}"
        elif sample.key not in labels:
            missing.append(sample.key)
    listed = {sample.key for sample in source.samples}
    surplus = sorted(key for key in labels.keys if key not in listed)
    if not allow_missing and (missing or surplus):
        problems = []
        if missing:
            problems.append(f"{_shown(missing)} of {len(listed)} images have no label")
        if surplus:
            problems.append(f"{_shown(surplus)} of {len(labels.keys)} labels have no image")
        raise ValueError(
            f"images and labels do not match: {'; '.join(problems)}. Labels belong to the folder "
            "that was given to tl-label generate --images; --allow-missing packs what matches"
        )
    for key in missing:
        quarantined[key] = "no label in the label set"
    return quarantined, len(surplus)


def _shown(keys: list[str]) -> str:
    more = ", …" if len(keys) > _NUM_SHOWN else ""
    return f"{len(keys)} ({', '.join(keys[:_NUM_SHOWN])}{more})"
