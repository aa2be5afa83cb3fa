"""Bytes of local files and of URLs: read in ranges or whole, and behind URLs also written.

Local files are read with pread, http(s) by the standard library, every other URL by fsspec (s3://
needs s3fs, gs:// gcsfs, hf:// comes with timm). Nothing stays open between two reads, so that any
number of threads and forked processes may read at once. folder.py writes local files.
"""

import atexit
import glob
import http.client
import io
import logging
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

RETRY_SECS = (1.0, 2.0, 4.0, 8.0)
"""Waits between the attempts to read from a URL."""

_HTTP = ("http://", "https://")
_LOCAL = ("file://", "local://")
_TIMEOUT_SECS = 60
_COPY_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class NoRanges(ValueError):
    """A server sends whole files only."""


class LocalFile:
    """A file on this machine, read by any number of threads at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Read from an offset on; fewer bytes where the file ends earlier."""
        data = os.pread(self._descriptor, num_bytes, offset)
        while data and len(data) < num_bytes:  # at the end of the file, or above 2 GiB
            more = os.pread(self._descriptor, num_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class HttpFile:
    """A file on a web server; each read is a request."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return _retrying(self._url, lambda: self._get(0, 1)[1])

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Read from an offset on; fewer bytes where the file ends earlier."""
        return _retrying(self._url, lambda: self._get(offset, offset + num_bytes)[0])

    def _get(self, start: int, stop: int) -> tuple[bytes, int]:
        """Return bytes start to stop, and the size of the whole file."""
        try:
            with _urlopen(self._url, {"Range": f"bytes={start}-{stop - 1}"}) as response:
                content_range = response.headers.get("Content-Range", "")
                match = re.fullmatch(rf"bytes {start}-\d+/(\d+)", content_range)
                if response.status != http.client.PARTIAL_CONTENT or match is None:
                    raise NoRanges(f"{self._url} cannot be read in parts")
                return response.read(), int(match[1])
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # behind the end
                return b"", int(error.headers.get("Content-Range", "*/0").rpartition("/")[2])
            raise


class FsspecFile:
    """A file anywhere that fsspec knows; each read is a request."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = _file_system(url)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        size = _retrying(self._url, lambda: self._fs.size(self._path))
        if size is None:
            raise NoRanges(f"{self._url} cannot be read in parts")
        return size

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Read from an offset on; fewer bytes where the file ends earlier."""
        return _retrying(self._url, lambda: self._get(offset, offset + num_bytes))

    def _get(self, start: int, stop: int) -> bytes:
        data = self._fs.cat_file(self._path, start=start, end=stop)
        assert isinstance(data, bytes)
        return data


RangeFile = LocalFile | HttpFile | FsspecFile
"""A file of which any part can be read."""


def is_url(location: str) -> bool:
    """Tell a URL from a local path."""
    return "://" in location


def is_web(location: str) -> bool:
    """Tell whether a location is on a web server, which neither lists files nor takes them."""
    return location.startswith(_HTTP)


def is_pattern(location: str) -> bool:
    """Tell whether a location stands for several files: braces, or *, ? and [] as in a shell."""
    if is_url(location):
        return bool(re.search(r"[{*]", location))
    return bool(re.search(r"[{*?\[]", location)) and not Path(location).exists()


def expand(pattern: str) -> list[str]:
    """Return the files that a pattern stands for, in order.

    Raises:
        ValueError: If it cannot be understood.
        FileNotFoundError: If *, ? or [] match nothing. Names that braces spell are not looked up.
    """
    if not is_pattern(pattern):
        return [pattern]
    found = [file for part in _expand_braces(pattern) for file in _glob(part)]
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}")
    return list(dict.fromkeys(found))


@contextmanager
def open_ranges(location: str) -> Iterator[RangeFile]:
    """Open a file for reading in ranges.

    Raises:
        OSError: If it is not there or cannot be read. URLs are tried several times before.
        ValueError: If the kind of URL is unknown or its package is not installed.
        NoRanges: On the first use of the file, see with_ranges.
    """
    if is_web(location):
        yield HttpFile(location)
    elif is_url(location):
        yield FsspecFile(location)
    else:
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield LocalFile(descriptor)
        finally:
            os.close(descriptor)


def with_ranges(location: str) -> str:
    """Return where a file can be read in ranges: the location itself or a local copy.

    A server that sends whole files only is read once from beginning to end. The copy lies in the
    folder for temporary files (TMPDIR) until this process ends.
    """
    try:
        with open_ranges(location) as file:
            _ = file.num_bytes
    except NoRanges:
        _logger.warning(
            "%s can be read as a whole only: copying it to %s", location, tempfile.gettempdir()
        )
        return _retrying(location, lambda: _copy(location))
    return location


def local_path(location: str) -> Path | None:
    """Return the path behind a local location, which a file:// URL is too; None elsewhere."""
    if not is_url(location):
        return Path(location)
    if location.startswith(_LOCAL):
        return Path(_file_system(location)[1])
    return None


def read_all(url: str) -> bytes:
    """Read the whole of what a URL names, in one request.

    Raises:
        OSError: If it is not there or cannot be read, also after several attempts.
        ValueError: If the kind of URL is unknown or its package is not installed.
    """
    if is_web(url):
        return _retrying(url, lambda: _get_all(url))
    file_system, path = _file_system(url)
    data = _retrying(url, lambda: file_system.cat_file(path))
    assert isinstance(data, bytes)
    return data


def write_all(url: str, data: bytes) -> None:
    """Replace what a URL names, in one request: object stores show the old or the new, whole.

    Raises:
        OSError: If it cannot be written, also after several attempts.
        ValueError: As read_all, or if it is on a web server.
    """
    file_system, path = _store(url)
    _retrying(url, lambda: file_system.pipe_file(path, data), verb="write")


def remove(url: str) -> None:
    """Remove what a URL names, if it is there. Raises as write_all."""
    file_system, path = _store(url)
    with suppress(FileNotFoundError):
        _retrying(url, lambda: file_system.rm_file(path), verb="remove")


def list_files(url: str) -> dict[str, int]:
    """Return names and sizes, bytes, of the files right below a URL; none if it is not there.

    Raises:
        OSError: If it cannot be listed, also after several attempts.
        ValueError: As read_all, or if it is on a web server, which lists nothing.
    """
    file_system, path = _store(url)

    def entries() -> list[dict[str, Any]]:
        file_system.invalidate_cache(path)  # others write there too
        try:
            return file_system.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []

    return {
        name: entry["size"]
        for entry in _retrying(url, entries, verb="list")
        for folder, _, name in [entry["name"].rpartition("/")]
        if entry["type"] == "file" and folder.strip("/") == path.strip("/")
    }


def _file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error


def _store(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL that is to be written or listed."""
    if is_web(url):
        raise ValueError(
            f"{url} lies on a web server, which neither takes nor lists files; give a local "
            "folder, or the URL of a store like s3://BUCKET/FOLDER"
        )
    return _file_system(url)


def _urlopen(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Send a request; what the server says about the file itself becomes the usual OSErrors."""
    request = urllib.request.Request(url, headers=headers | {"User-Agent": "tokenlabel"})
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_SECS)
    except urllib.error.HTTPError as error:
        if error.code in (http.client.NOT_FOUND, http.client.GONE):
            raise FileNotFoundError(f"HTTP {error.code}") from error
        if error.code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            raise PermissionError(f"HTTP {error.code}") from error
        raise


def _retrying(url: str, call: Callable[[], _Result], *, verb: str = "read") -> _Result:
    """Read or write a URL; networks and servers fail for moments, and jobs last for hours."""
    for wait_secs in (*RETRY_SECS, None):
        try:
            return call()
        except NoRanges:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{url} does not exist: {error}") from error
        except PermissionError as error:
            raise PermissionError(f"no permission to {verb} {url}: {error}") from error
        except Exception as error:  # every kind of storage has exceptions of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            if wait_secs is None:
                raise OSError(f"cannot {verb} {url}: {reason}") from error
            _logger.info("%s: %s; next attempt in %.0f s", url, reason, wait_secs)
            time.sleep(wait_secs)
    raise AssertionError("the last attempt returns or raises")


def _copy(url: str) -> str:
    """Read a URL from beginning to end into a local file, and return its path."""
    with tempfile.NamedTemporaryFile(dir=_copies_folder(), suffix=".tar", delete=False) as file:
        try:
            if is_web(url):
                _download(url, file)
            else:
                file_system, path = _file_system(url)
                stream: Any  # of bytes, which fsspec's types do not promise
                with file_system.open(path) as stream:
                    shutil.copyfileobj(stream, file, _COPY_BYTES)
        except BaseException:
            Path(file.name).unlink()
            raise
    return file.name


def _get_all(url: str) -> bytes:
    file = io.BytesIO()
    _download(url, file)
    return file.getvalue()


def _download(url: str, file: IO[bytes] | io.BytesIO) -> None:
    with _urlopen(url, {}) as response:
        shutil.copyfileobj(response, file, _COPY_BYTES)
        num_bytes = response.headers.get("Content-Length")
    # Where a connection breaks off, reading in pieces just ends.
    if num_bytes is not None and int(num_bytes) != file.tell():
        raise OSError(f"{file.tell()} of {num_bytes} bytes came")


@cache
def _copies_folder() -> str:
    folder, process = tempfile.mkdtemp(prefix="tokenlabel-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # and not one that was forked off it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _RANGE.fullmatch(match[1])
    if numbers is not None:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        words = match[1].split(",")
    if not words or (numbers is None and len(words) < 2):
        raise ValueError(
            f"{match[0]} in {pattern} is neither a range like {{000000..000012}}, ascending, "
            "nor a choice like {train,val}"
        )
    return [
        part
        for word in words
        for part in _expand_braces(pattern[: match.start()] + word + pattern[match.end() :])
    ]


def _glob(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern)) if is_pattern(pattern) else [pattern]  # noqa: PTH207
    if "*" not in pattern:
        return [pattern]
    if is_web(pattern):
        raise ValueError(
            f"a web server does not list its files, so {pattern} cannot be resolved; number the "
            "files in braces, e.g. train-{000000..000012}.tar"
        )
    file_system, path = _file_system(pattern)
    return sorted(file_system.unstrip_protocol(str(found)) for found in file_system.glob(path))
