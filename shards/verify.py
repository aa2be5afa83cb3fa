"""Is this data set whole? The job behind `tl-shard verify`."""

import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from ..labeler.folder import sha256_of
from ..labeler.label_map import LabelMapError, decode
from .index import (
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    SplitIndex,
    format_idx,
    format_index,
    read_index,
)
from .masks import BadMask, check_classes, read_mask

_CHANGED = "changed after packing: its checksum does not fit"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was packed."""

    file: str
    """Name within the data set's folder."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify(folder: Path, *, num_workers: int | None = None) -> list[Problem]:
    """Compare every byte and every count of a data set with its index.

    Finds changed bytes in any file, missing and surplus files, wrong counts, an .idx that does
    not fit its tar, samples with a field too few or too many, classes out of range (also those of
    masks), label maps and masks that cannot be read, and keys that occur twice in a split.

    Args:
        folder: The data set.
        num_workers: Shards checked at a time; None takes the cores of this process.

    Returns:
        What is wrong, sorted by file; nothing when the data set is whole.

    Raises:
        OSError: If there is no index at all, or a file that is there cannot be read.
    """
    try:
        index = read_index(folder)
    except ValueError as error:
        return [Problem(INDEX_NAME, str(error))]
    problems = [*_index_problems(index), *_surplus_files(index)]
    with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
        for name, split in index.splits.items():
            checks = pool.map(partial(_check_shard, index, split), split.shards)
            progress = tqdm(checks, f"verify {name}", len(split.shards), disable=None, unit="shard")
            shard_of: dict[str, str] = {}
            for shard, (found, keys) in zip(split.shards, progress):
                problems += found
                for key in keys:
                    if key in shard_of:
                        what = f"sample {key} is in {shard_of[key]} already"
                        problems.append(Problem(shard.name, what))
                    shard_of[key] = shard.name
    return sorted(problems, key=str)


def _index_problems(index: ShardIndex) -> Iterator[Problem]:
    expected = format_index(index).encode(
        errors="surrogatepass"
    )  # JSON may spell what UTF-8 may not
    if (index.folder / INDEX_NAME).read_bytes() != expected:
        yield Problem(INDEX_NAME, _CHANGED)


def _surplus_files(index: ShardIndex) -> Iterator[Problem]:
    shards = [shard for split in index.splits.values() for shard in split.shards]
    known = {INDEX_NAME, *(s.name for s in shards), *(s.idx_name for s in shards)}
    for path in index.folder.iterdir():
        if path.name not in known:
            yield Problem(path.name, "is not part of the data set")


def _check_shard(
    index: ShardIndex, split: SplitIndex, shard: ShardEntry
) -> tuple[list[Problem], list[str]]:
    """Return what is wrong with a tar and its .idx, and the keys in the tar."""
    tar, idx = index.folder / shard.name, index.folder / shard.idx_name
    problems = [
        Problem(path.name, damage)
        for path, sha256, num_bytes in (
            (tar, shard.sha256, shard.bytes),
            (idx, shard.idx_sha256, None),
        )
        if (damage := _damage(path, sha256, num_bytes))
    ]
    if problems:  # bytes that nobody packed tell nothing more
        return problems, []
    try:
        samples = _read_tar(tar)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        return [Problem(tar.name, f"is no readable tar: {error}")], []
    for key, fields in samples:
        what = _sample_problem(fields, split, index.num_classes)
        if what is not None:
            problems.append(Problem(tar.name, f"sample {key} {what}"))
    if len(samples) != shard.samples:
        what = f"holds {len(samples)} samples, the index says {shard.samples}"
        problems.append(Problem(tar.name, what))
    rows = [[(f.name, f.offset, f.num_bytes) for f in fields] for _, fields in samples]
    if idx.read_bytes() != format_idx(rows).encode():
        problems.append(Problem(idx.name, f"does not fit {tar.name}"))
    return problems, [key for key, _ in samples]


def _damage(path: Path, sha256: str, num_bytes: int | None) -> str | None:
    if not path.is_file():
        return "is missing"
    if num_bytes is not None and path.stat().st_size != num_bytes:
        return f"has {path.stat().st_size} bytes, {num_bytes} were packed"
    return None if sha256_of(path) == sha256 else _CHANGED


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    offset: int
    num_bytes: int
    data: bytes
    """Empty for an image: the tar's checksum says that it is what was packed."""


def _read_tar(path: Path) -> list[tuple[str, list[_Field]]]:
    """Return the samples of a tar: runs of members whose names share all before the first dot."""
    with tarfile.open(path, "r:") as archive:
        fields = [
            _Field(m.name, m.offset_data, m.size, _small_content(archive, m)) for m in archive
        ]
    return [(key, list(run)) for key, run in groupby(fields, lambda field: _key(field.name))]


def _small_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a plain file")
    return b"" if member.name.endswith(".jpg") else file.read()


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _sample_problem(fields: list[_Field], split: SplitIndex, num_classes: int) -> str | None:
    extensions = [field.name.rpartition(".")[2] for field in fields]
    expected = ["jpg", "cls", "tlm"] if split.has_labels else ["jpg", "cls"]
    if split.masks is not None:
        expected = ["jpg", "png"]
    if extensions != expected:
        return f"has the fields {' '.join(extensions)}, expected {' '.join(expected)}"
    if split.masks is not None:
        return _mask_problem(fields[1].data, num_classes, split.masks["ignore_index"])
    digits = fields[1].data
    if not digits.isdigit() or len(digits) > 10 or int(digits) >= num_classes:
        return f"has class {digits[:20]!r}, allowed are 0 to {num_classes - 1}"
    if not split.has_labels:
        return None
    return _label_problem(fields[2].data, num_classes, split.dictionary)


def _mask_problem(data: bytes, num_classes: int, ignore_index: int) -> str | None:
    try:
        check_classes(read_mask(data), num_classes, ignore_index)
    except BadMask as error:
        return f"has a mask that {error}"
    return None


def _label_problem(data: bytes, num_classes: int, dictionary: bytes | None) -> str | None:
    try:
        found = decode(data, dictionary=dictionary)[0].num_classes
    except LabelMapError as error:
        return f"has a damaged label map: {error}"
    if found != num_classes:
        return f"has a label map of {found} classes, the data set has {num_classes}"
    return None
