"""What lies where in a tar or zip file, found by reading its headers alone.

Nothing is unpacked: a member is a range of bytes of the archive. A tar may lie within another
one, as the class tars of ILSVRC2012_img_train.tar do.
"""

import logging
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from . import storage
from .images import BadImage

SUFFIXES = (".tar", ".zip")
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst")
"""What they hold cannot be read at random places; list_archive says so."""
SMALL_BYTES = 16
"""Members up to this size, such as a WebDataset sample's .cls, are read while listing."""

_BLOCK_BYTES = 512
_LOCAL_READ_BYTES = 2048  # a header and the small members behind it
_REMOTE_READ_BYTES = 1 << 20  # a request takes as long as this many bytes
_MAX_EXTENSION_BYTES = 1 << 20
_MAX_IMAGE_BYTES = 1 << 30

_FILE_KINDS = (b"0", b"\0", b"7")
_FOLDER_KIND = b"5"
_EXTENSION_KINDS = (b"L", b"K", b"x", b"g")
_LINK_KINDS = {b"1": "hard link", b"2": "link", b"S": "sparse file"}
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_OCTAL = re.compile(rb"[0-7]+")
_ZIP_HEADER = struct.Struct("<4s2xHH4xI8x2H")
_HAS_LATE_CRC = 1 << 3
_S_IFMT, _S_IFLNK = 0o170000, 0o120000

_logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    """Path in the archive, '/'-separated, without '.' and '..'."""
    offset: int
    """Of the content in the archive file; in a zip, of the member's header."""
    num_bytes: int
    """As stored: in a zip perhaps compressed."""
    content: bytes | None
    """Of members up to SMALL_BYTES; None for larger ones, and in a zip."""


@dataclass(frozen=True)
class Contents:
    """What an archive holds."""

    members: list[Member] = field(default_factory=list)
    """In the order of the archive."""
    folders: list[str] = field(default_factory=list)
    """Paths of the folders that have an entry of their own."""


def list_archive(location: str) -> Contents:
    """List a tar file, local or at a URL, or a local zip file.

    Raises:
        ValueError: If it is damaged, truncated, compressed as a whole, or holds what must not be
            followed: paths that leave the folder, links. Names the archive and the offset.
        OSError: If it cannot be read.
    """
    return _list_zip(location) if _is_zip(location) else list_tar(location)


def read_member(location: str, offset: int, num_bytes: int) -> bytes:
    """Read a member's content; any number of threads may do so at once.

    Raises:
        OSError: If the archive cannot be read, or is shorter than when it was listed.
        BadImage: If the member of a zip is damaged.
    """
    try:
        with storage.open_ranges(location) as file:
            if _is_zip(location):
                return _unzipped(location, file, offset, num_bytes)
            return _read_all(location, file, offset, num_bytes)
    except (FileNotFoundError, PermissionError) as error:
        # Not of one image: the archive went away as a whole, and that is for a job to stop at.
        raise OSError(f"{location} could be read before and now cannot: {error}") from error


def _is_zip(location: str) -> bool:
    return location.lower().endswith(".zip")


def _read_all(location: str, file: storage.RangeFile, offset: int, num_bytes: int) -> bytes:
    data = file.read_at(offset, num_bytes)
    if len(data) != num_bytes:
        raise OSError(
            f"{location} ends within the {num_bytes} bytes at offset {offset}: it has become "
            "shorter since it was listed"
        )
    return data


def _safe_path(name: str, location: str, offset: int) -> str:
    """Return a member's path without '.' components.

    Raises:
        ValueError: If the path is absolute or contains '..'.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise ValueError(
            f"{location}: the name {name!r} at offset {offset} leads out of the archive's folder; "
            "make the archive again with relative names, from inside the folder"
        )
    return "/".join(parts)


def _refuse_link(name: str, kind: str, location: str, offset: int) -> None:
    raise ValueError(
        f"{location}: {name} at offset {offset} is a {kind}, not a plain file; make the archive "
        "again with the files themselves, e.g. tar --dereference --hard-dereference"
    )


# ----------------------------------------------------------------------------------------- tar


class _Window:
    """Reads forward through a file, in pieces that are worth a system call or a request."""

    def __init__(self, file: storage.RangeFile, stop: int, piece_bytes: int) -> None:
        self._file = file
        self._stop = stop
        self._piece_bytes = piece_bytes
        self._offset = 0
        self._data = b""

    def at(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes at an offset; fewer where the file ends earlier."""
        begin = offset - self._offset
        if begin < 0 or begin + num_bytes > len(self._data):
            wanted = min(max(num_bytes, self._piece_bytes), self._stop - offset)
            self._data = self._file.read_at(offset, wanted) if wanted > 0 else b""
            self._offset, begin = offset, 0
        return self._data[begin : begin + num_bytes]


class _Header(NamedTuple):
    name: bytes
    num_bytes: int
    kind: bytes


def list_tar(location: str, start: int = 0, stop: int | None = None) -> Contents:
    """List a tar file, or one that lies within another file from start to stop.

    Raises:
        ValueError: As list_archive.
        OSError: As list_archive.
    """
    contents = Contents()
    with storage.open_ranges(location) as file:
        stop = file.num_bytes if stop is None else stop
        piece_bytes = _REMOTE_READ_BYTES if storage.is_url(location) else _LOCAL_READ_BYTES
        window = _Window(file, stop, piece_bytes)
        offset = start
        long_name, long_size = None, None  # from an extension in front of the member's own header
        while True:
            block = window.at(offset, _BLOCK_BYTES)
            if len(block) < _BLOCK_BYTES:
                _check_end(location, block, start, offset, stop)
                break
            if block.count(0) == _BLOCK_BYTES:
                break
            header = _parse_header(block)
            if header is None:
                _refuse_compressed(location, block, start, offset)
                raise ValueError(_why_no_header(location, start, offset))
            num_bytes = header.num_bytes if long_size is None else long_size
            data_offset = offset + _BLOCK_BYTES
            if data_offset + num_bytes > stop:
                raise ValueError(
                    f"{location} is truncated: the member at offset {offset} has {num_bytes} "
                    f"bytes, of which {stop - data_offset} are there; copy it again"
                )
            if header.kind in _EXTENSION_KINDS:
                if num_bytes > _MAX_EXTENSION_BYTES:
                    raise ValueError(f"{location} is damaged at offset {offset}: name too long")
                text = window.at(data_offset, num_bytes)
                if header.kind == b"L":
                    long_name = text.rstrip(b"\0")
                elif header.kind == b"x":
                    long_name, long_size = _parse_pax(text, long_name, location, offset)
            else:
                raw_name = header.name if long_name is None else long_name
                name = raw_name.decode("utf-8", "surrogateescape")
                path = _safe_path(name, location, offset)
                if header.kind in _LINK_KINDS:
                    _refuse_link(name, _LINK_KINDS[header.kind], location, offset)
                if header.kind == _FOLDER_KIND or name.endswith("/"):
                    contents.folders.extend([path] if path else [])
                elif header.kind in _FILE_KINDS and path:
                    is_small = num_bytes <= SMALL_BYTES
                    content = window.at(data_offset, num_bytes) if is_small else None
                    contents.members.append(Member(path, data_offset, num_bytes, content))
                long_name, long_size = None, None
            offset = data_offset + num_bytes + -num_bytes % _BLOCK_BYTES
    return contents


def _check_end(location: str, rest: bytes, start: int, offset: int, stop: int) -> None:
    """Judge a tar that ends where a header or the end mark should stand."""
    if offset == start and not rest:
        raise ValueError(f"{location} is empty: {stop - start} bytes at offset {start}")
    _refuse_compressed(location, rest, start, offset)
    if rest:
        raise ValueError(
            f"{location} is truncated: {len(rest)} bytes of a header at offset {offset}, "
            f"expected {_BLOCK_BYTES}; copy it again"
        )
    # Some writers never close their tars, so this alone does not condemn one.
    _logger.warning(
        "%s has no end mark at offset %d: if it was cut off there, the rest is missing",
        location,
        offset,
    )


def _parse_header(block: bytes) -> _Header | None:
    """Return what a header says; None if its checksum does not fit."""
    checksum = _number(block[148:156])
    num_bytes = _number(block[124:136])
    if checksum is None or num_bytes is None:
        return None
    # The sum of all bytes, the checksum's own taken as blanks. The lower half of Adler-32 is such a
    # sum plus one, modulo 65521, forty times as fast as sum().
    if (checksum + 1) % 65521 != zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xFFFF:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name, num_bytes, block[156:157])


def _number(digits: bytes) -> int | None:
    """Read a number: octal, or where that is too short base 256 behind a set highest bit."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    digits = digits.split(b"\0", 1)[0].strip(b" ") or b"0"
    return int(digits, 8) if _OCTAL.fullmatch(digits) else None


def _parse_pax(
    text: bytes, name: bytes | None, location: str, offset: int
) -> tuple[bytes | None, int | None]:
    """Return path and size from a pax header; where it gives no path, the name known so far.

    Its records are "LENGTH KEY=VALUE\\n", the length counting the whole record.
    """
    fields = {}
    position = 0
    while position < len(text) and text[position]:
        digits = text[position : position + 20].partition(b" ")[0]
        if not digits.isdigit() or int(digits) <= len(digits):
            raise ValueError(f"{location} is damaged at offset {offset}: no pax record there")
        record = text[position : position + int(digits)]
        key, _, value = record[len(digits) + 1 : -1].partition(b"=")
        fields[key] = value
        position += int(digits)
    size = fields.get(b"size")
    if any(key.startswith(b"GNU.sparse.") for key in fields):
        _refuse_link("the member", _LINK_KINDS[b"S"], location, offset)
    if size is not None and not size.isdigit():
        raise ValueError(f"{location} is damaged at offset {offset}: {size!r} is no size")
    return fields.get(b"path", name), None if size is None else int(size)


def _refuse_compressed(location: str, block: bytes, start: int, offset: int) -> None:
    for magic, unpack in _COMPRESSED.items():
        if offset == start and block.startswith(magic):
            raise ValueError(
                f"{location} at offset {offset} is compressed, and no place within it can be read "
                f"without all before it; unpack it first: {unpack} FILE"
            )


def _why_no_header(location: str, start: int, offset: int) -> str:
    if offset == start:
        return f"{location} is no tar file: its first 512 bytes, at offset {offset}, are no header"
    return f"{location} is damaged at offset {offset}: expected the header of a member"


# ----------------------------------------------------------------------------------------- zip


def _list_zip(path: str) -> Contents:
    contents = Contents()
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or damaged, the directory at its end cannot be read: {error}"
        ) from error
    for info in infos:
        name = _safe_path(info.filename, path, info.header_offset)
        if (info.external_attr >> 16) & _S_IFMT == _S_IFLNK:
            _refuse_link(info.filename, "link", path, info.header_offset)
        if info.flag_bits & 1:
            raise ValueError(f"{path}: {name} at offset {info.header_offset} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {name} at offset {info.header_offset} is compressed by method "
                f"{info.compress_type}; make the zip again with the usual one (deflate) or none"
            )
        if info.is_dir():
            contents.folders.append(name)
        else:
            contents.members.append(Member(name, info.header_offset, info.compress_size, None))
    return contents


def _unzipped(location: str, file: storage.RangeFile, offset: int, num_bytes: int) -> bytes:
    header = _read_all(location, file, offset, _ZIP_HEADER.size)
    magic, flags, method, crc, num_name_bytes, num_extra_bytes = _ZIP_HEADER.unpack(header)
    if magic != b"PK\3\4":
        raise BadImage(f"{location} is damaged at offset {offset}: expected the header of a member")
    data_offset = offset + _ZIP_HEADER.size + num_name_bytes + num_extra_bytes
    data = _read_all(location, file, data_offset, num_bytes)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, _MAX_IMAGE_BYTES)
        except zlib.error as error:
            raise BadImage(f"{location} is damaged behind offset {offset}: {error}") from error
    if not flags & _HAS_LATE_CRC and zlib.crc32(data) != crc:
        raise BadImage(f"{location} is damaged behind offset {offset}: its checksum does not fit")
    return data
