"""Writing dataset shards so that a folder never shows half a split.

New files lie in a hidden folder, .SPLIT.part, until all of a split are complete. The new index is
written there last, and from then on the split counts as made: what remains is to move the files,
and where that is broken off, the next who writes into the data set goes on with it.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..labeler.folder import sync_folder
from . import index as index_file
from .index import INDEX_NAME, PART_SUFFIX, ShardEntry, ShardIndex

Fields = list[tuple[str, bytes]]
"""A sample's (extension, content) in the order of the tar."""

_TAR_END = bytes(1024)
_WRITE_BYTES = 1_000_000

# A plain POSIX header: name, mode 644, owner and group 0; size; no date; checksum; a regular file.
_MODE_OWNER = b"0000644\0" + 2 * b"0000000\0"
_DATE = b"\0" + b"00000000000\0"
_HEADER_END = (b"0" + bytes(100) + b"ustar\00000").ljust(356, b"\0")
_CONSTANT_SUM = sum(_MODE_OWNER) + sum(_DATE) + sum(b" " * 8) + sum(_HEADER_END)

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_in_order(
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


# ----------------------------------------------------------------------------------- the folder


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other writers out of a data set; the lock ends with this process, however it ends.

    Raises:
        BlockingIOError: If another process writes there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another tl-shard pack or relabel is writing into {folder}; wait until it has "
                "finished"
            ) from error
        except OSError:  # some network file systems cannot lock a folder
            _logger.debug("%s cannot be locked", folder)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(folder: Path, split: str) -> Iterator[Path]:
    """Make the hidden folder for a split's new files, in place of what was left unfinished.

    Whatever is still in it at the end, as after an error, is removed.
    """
    _remove_unfinished(folder)
    path = folder / f".{split}{PART_SUFFIX}"
    path.mkdir()
    try:
        yield path
    finally:
        if path.exists() and not (path / INDEX_NAME).exists():
            shutil.rmtree(path)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f".*{PART_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish(index: ShardIndex, staged: Path) -> None:
    """Move a split's finished files into the data set, then the index."""
    with naming(index.folder / INDEX_NAME):
        index_file.write_index(replace(index, folder=staged))
    finish_publishing(index.folder)


def finish_publishing(folder: Path) -> ShardIndex | None:
    """Give files that are complete their names, where a process has died before it had done so.

    Where a split is replaced, the index forgets it first: killed in between, the folder has no
    such split rather than a mixed one.

    Returns:
        The data set's index, or None where there was nothing to finish.
    """
    committed = list(folder.glob(f".*{PART_SUFFIX}/{INDEX_NAME}"))
    if not committed:
        return None
    staged = committed[0].parent
    split = staged.name.removeprefix(".").removesuffix(PART_SUFFIX)
    index = replace(index_file.read_index(staged), folder=folder)
    names = {name for shard in index.split(split).shards for name in (shard.name, shard.idx_name)}
    old = [path for path in folder.iterdir() if index_file.belongs_to(path.name, split)]
    if old and (folder / INDEX_NAME).exists():
        _forget(index_file.read_index(folder), split)
    for path in old:
        if path.name not in names:
            path.unlink()
    for path in staged.iterdir():
        if path.name != INDEX_NAME:
            path.replace(folder / path.name)
    sync_folder(folder)
    (staged / INDEX_NAME).replace(folder / INDEX_NAME)
    staged.rmdir()
    sync_folder(folder)
    return index


def _forget(index: ShardIndex, split: str) -> None:
    others = {name: entry for name, entry in index.splits.items() if name != split}
    if others:
        index_file.write_index(replace(index, splits=others))
    else:
        (index.folder / INDEX_NAME).unlink()


# ------------------------------------------------------------------------------------- the files


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say in an OSError which file could not be written; the system's text does not."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error.strerror
        raise OSError(
            f"cannot write {path}: {reason}; nothing of this run was kept, "
            "make room or give another --out and run the same command again",
        ) from error


class SplitWriter:
    """Writes the tars of a split and their .idx, each as large as allowed."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, shard_size: int | None) -> None:
        self._folder = folder
        self._split = split
        self._shard_bytes = shard_bytes
        self._shard_size = shard_size
        self._entries: list[ShardEntry] = []
        self._shard: ShardWriter | None = None

    def add(self, key: str, fields: Fields) -> None:
        """Append a sample, to a new shard where the present one is full."""
        members = _members(key, fields)
        num_bytes = sum(member.num_bytes for member in members)
        if self._shard is not None and self._is_full(self._shard, num_bytes):
            self._entries.append(self._shard.finish())
            self._shard = None
        if self._shard is None:
            name = index_file.shard_name(self._split, len(self._entries))
            self._shard = ShardWriter(self._folder, name)
        self._shard.add_members(members)

    def close(self) -> list[ShardEntry]:
        """Finish the last shard; return all."""
        if self._shard is not None:
            self._entries.append(self._shard.finish())
            self._shard = None
        return self._entries

    def abandon(self) -> None:
        """Close what is open, as after an error."""
        if self._shard is not None:
            self._shard.abandon()

    def _is_full(self, shard: "ShardWriter", num_more_bytes: int) -> bool:
        too_large = shard.num_bytes + num_more_bytes + len(_TAR_END) > self._shard_bytes
        return too_large or len(shard.rows) == self._shard_size


class ShardWriter:
    """Writes one tar and its .idx, and hashes both on the way."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.num_bytes = 0
        """Of the tar so far."""
        self.rows: list[list[tuple[str, int, int]]] = []
        """Of each sample: its members as (name in the tar, offset of the data, size)."""
        self._folder = folder
        self._sha256 = hashlib.sha256()
        self._pending: list[bytes] = []
        self._num_pending_bytes = 0
        with naming(folder / name):
            self._file = create(folder / name)

    def add(self, key: str, fields: Fields) -> None:
        """Append a sample."""
        self.add_members(_members(key, fields))

    def add_members(self, members: list["_TarMember"]) -> None:
        """Append a sample's files."""
        row = []
        for member in members:
            self._append(member.header)
            row.append((member.name, self.num_bytes, len(member.data)))
            self._append(member.data)
            self._append(bytes(member.num_padding_bytes))
        self.rows.append(row)
        if self._num_pending_bytes >= _WRITE_BYTES:
            self._write()

    def finish(self) -> ShardEntry:
        """Write the end of the tar and the .idx, both down to the disk."""
        self._append(_TAR_END)
        self._write()
        idx = index_file.format_idx(self.rows).encode()
        entry = ShardEntry(
            name=self.name,
            samples=len(self.rows),
            bytes=self.num_bytes,
            sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(idx).hexdigest(),
        )
        with naming(self._folder / self.name):
            close_on_disk(self._file)
            idx_file = create(self._folder / entry.idx_name)
            idx_file.write(idx)
            close_on_disk(idx_file)
        return entry

    def abandon(self) -> None:
        """Close the tar, as after an error."""
        # Closing writes what is still buffered, and may fail again on a full disk.
        with suppress(OSError):
            self._file.close()

    def _append(self, block: bytes) -> None:
        self._pending.append(block)
        self._num_pending_bytes += len(block)
        self.num_bytes += len(block)

    def _write(self) -> None:
        # Many samples at a time: a call for each small block would take longer than the writing.
        data = b"".join(self._pending)
        self._pending.clear()
        self._num_pending_bytes = 0
        with naming(self._folder / self.name):
            self._file.write(data)
        self._sha256.update(data)


class _TarMember:
    """A file in a tar, with no date and no owner."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self.header = tar_header(name, len(data))
        self.num_padding_bytes = -len(data) % tarfile.BLOCKSIZE

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.data) + self.num_padding_bytes


def _members(key: str, fields: Fields) -> list[_TarMember]:
    return [_TarMember(f"{key}.{extension}", data) for extension, data in fields]


def tar_header(name: str, num_bytes: int) -> bytes:
    """Return a tar header that every reader understands.

    Names that a plain POSIX header cannot hold (100 bytes, or 255 with a '/' at the right place)
    take GNU's long form: DALI reads that without an index too, and the newer pax form it does not.
    """
    encoded = name.encode()
    if len(encoded) <= 100 and num_bytes < 8**11:
        size = b"%011o" % num_bytes
        # The checksum is the sum of all bytes; most of them are the same in every header.
        checksum = _CONSTANT_SUM + sum(encoded) + sum(size)
        return b"".join(
            (
                encoded.ljust(100, b"\0"),
                _MODE_OWNER,
                size,
                _DATE,
                b"%06o\0 " % checksum,
                _HEADER_END,
            )
        )
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8")
    except ValueError:
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8")


def create(path: Path) -> BinaryIO:
    """Open a new file for writing."""
    return path.open("xb")


def close_on_disk(file: BinaryIO) -> None:
    """Close a file once the disk has it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
