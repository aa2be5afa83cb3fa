"""A folder of files that are each written once and whole: on this machine, or behind a URL.

Label sets lie in such folders. A local file is written under a temporary name, flushed and renamed;
behind a URL it is one request, which object stores carry out wholly or not at all. Either way a
reader meets no half written file, and the bytes are the same.
"""

import contextlib
import hashlib
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import storage

Location = Path | str
"""Of a folder: a path, or a URL as a str."""

REQUESTS_AT_A_TIME = 16
"""Files that are read from a URL side by side: each waits for the network most of the time."""


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def name(self, file: str) -> str:
        """Return what messages call a file of this folder."""
        return str(self._path / file)

    def make(self) -> None:
        """Make the folder and those above it, if they are not there."""
        self._path.mkdir(parents=True, exist_ok=True)

    def exists(self) -> bool:
        """Tell whether there is such a folder."""
        return self._path.is_dir()

    def files(self) -> list[str]:
        """Return the names of all files, in no order."""
        return [path.name for path in self._path.iterdir()]

    def sizes(self, files: Sequence[str]) -> dict[str, int]:
        """Return the sizes, bytes, of those of some files that are there."""
        paths = [self._path / file for file in files]
        return {path.name: path.stat().st_size for path in paths if path.is_file()}

    def read(self, file: str) -> bytes:
        """Return the content of a file."""
        return (self._path / file).read_bytes()

    def read_at(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Return a part of a file, which is shorter where the file ends earlier."""
        with (self._path / file).open("rb") as opened:
            opened.seek(offset)
            return opened.read(num_bytes)

    def sha256(self, file: str) -> str:
        """Return the checksum of a file, in hex."""
        return sha256_of(self._path / file)

    def write(self, file: str, data: bytes) -> None:
        """Write a file: it appears, or changes, whole or not at all.

        Raises:
            OSError: If it cannot be written; names it.
        """
        replace_file(self._path / file, data)

    def remove(self, file: str) -> None:
        """Remove a file, if it is there."""
        (self._path / file).unlink(missing_ok=True)


class UrlFolder:
    """A folder behind a URL. Object stores have none: it is what its files' names begin with.

    Every method raises OSError if the storage fails, also after several attempts, and ValueError
    if this kind of URL is not known here, see storage.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._prefix = url if url.endswith("/") else f"{url}/"

    def __str__(self) -> str:
        return self._url

    def name(self, file: str) -> str:
        """Return the URL of a file of this folder."""
        return self._prefix + file

    def make(self) -> None:
        """Find out whether the store answers; the folder is there as soon as a file is in it."""
        self.files()

    def exists(self) -> bool:
        """Tell whether there is any file in it; no on a web server, where nobody knows."""
        return not storage.is_web(self._url) and bool(self.files())

    def files(self) -> list[str]:
        """Return the names of all files, in no order."""
        return [*storage.list_files(self._url)]

    def sizes(self, files: Sequence[str]) -> dict[str, int]:
        """Return the sizes, bytes, of those of some files that are there."""
        if storage.is_web(self._url):
            return self._sizes_one_by_one(files)
        there = storage.list_files(self._url)
        return {file: there[file] for file in files if file in there}

    def read(self, file: str) -> bytes:
        """Return the content of a file."""
        return storage.read_all(self.name(file))

    def read_at(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Return a part of a file, which is shorter where the file ends earlier."""
        with storage.open_ranges(self.name(file)) as opened:
            return opened.read_at(offset, num_bytes)

    def sha256(self, file: str) -> str:
        """Return the checksum of a file, in hex. The file is read for that."""
        return hashlib.sha256(self.read(file)).hexdigest()

    def write(self, file: str, data: bytes) -> None:
        """Write a file in one request."""
        storage.write_all(self.name(file), data)

    def remove(self, file: str) -> None:
        """Remove a file, if it is there."""
        storage.remove(self.name(file))

    def _sizes_one_by_one(self, files: Sequence[str]) -> dict[str, int]:
        def size(file: str) -> int | None:
            with contextlib.suppress(FileNotFoundError), storage.open_ranges(self.name(file)) as it:
                return it.num_bytes

        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            sizes = zip(files, pool.map(size, files))
            return {file: num_bytes for file, num_bytes in sizes if num_bytes is not None}


Folder = LocalFolder | UrlFolder


def open_folder(location: Location) -> Folder:
    """Return the folder at a path or URL, whether it is there or not.

    Raises:
        ValueError: If the kind of URL is unknown or its package is not installed.
    """
    path = storage.local_path(str(location))
    return UrlFolder(str(location)) if path is None else LocalFolder(path)


def sha256_of(path: Path) -> str:
    """Return the checksum of a file on this machine, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, data: bytes, *, part: Path | None = None) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it.

    Args:
        path: Of the file.
        data: Its content.
        part: Its temporary name. None gives one, .NAME.….part, that no other process uses: two
            that write one file by mistake do not mix their bytes.

    Raises:
        OSError: If it cannot be written; names it.
    """
    own = f".{path.name}.{socket.gethostname()}-{os.getpid()}.part"
    part = part or path.with_name(own)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
