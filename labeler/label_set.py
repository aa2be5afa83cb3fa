"""Label shards on disk.

A label set is a folder:

    labels-00000.tar    KEY.tlm for the images of slice 0 that could be labelled, in order of keys
    labels-00000.json   which settings made it, where each key lies, what was left out and why
    labels-00001.tar …
    index.json          the settings, the totals and every shard's checksum; written last

A slice is finished when its .json is there: the tar is renamed into place first. docs/
label-generation.md shows real entries.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

INDEX_NAME = "index.json"
FORMAT = "tokenlabel-labels"
SLICE_FORMAT = "tokenlabel-label-slice"
VERSION = 1

_SLICE_FILE = re.compile(r"labels-(\d{5,})\.(tar|json)")
_PART_FILE = re.compile(r"\.(labels-\d{5,}\.(tar|json)|index\.json)\..+\.part")
_CHECKSUM = "checksum"
_AGAIN = "run the same tl-label generate again, it mends what is damaged"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A finished slice: what labels-NNNNN.json says."""

    number: int
    settings: dict[str, Any]
    """What made it: teacher, fit, k, source, …"""
    samples: dict[str, tuple[int, int]]
    """Key → offset and size of its map in the tar, bytes."""
    quarantined: dict[str, str]
    """Key of each image that has no map → why."""
    num_correct: int | None
    """Images whose folder the teacher ranks first; None where its classes are not the folders."""
    bytes: int
    """Of the tar."""
    sha256: str
    """Of the tar."""


def tar_name(number: int) -> str:
    """Return the name of a slice's tar, e.g. labels-00000.tar."""
    return f"labels-{number:05d}.tar"


def json_name(number: int) -> str:
    """Return the name of the file that says what is in a slice's tar."""
    return f"labels-{number:05d}.json"


def write_slice(
    folder: Path,
    number: int,
    maps: Iterable[tuple[str, bytes]],
    *,
    settings: dict[str, Any],
    quarantined: dict[str, str],
    num_correct: int | None,
) -> Slice:
    """Write a slice's tar, then its .json; each appears whole or not at all.

    Args:
        folder: The label set.
        number: Of the slice.
        maps: Key and label map bytes, in the order of the tar.
        settings: See Slice.
        quarantined: See Slice.
        num_correct: See Slice.
    """
    tar, samples = _to_tar(maps)
    record = Slice(
        number=number,
        settings=settings,
        samples=samples,
        quarantined=quarantined,
        num_correct=num_correct,
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
    )
    _replace(folder / tar_name(number), tar)
    _replace(folder / json_name(number), _slice_json(record))
    return record


def read_slice(folder: Path, number: int) -> Slice | None:
    """Read what a slice's .json says, without a look into the tar; None if it is no good."""
    try:
        return _parse_slice((folder / json_name(number)).read_bytes(), number)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_whole(folder: Path, record: Slice) -> bool:
    """Tell whether a slice's tar has the bytes that were written."""
    path = folder / tar_name(record.number)
    return path.is_file() and path.stat().st_size == record.bytes and _sha256(path) == record.sha256


def slice_numbers(folder: Path) -> list[int]:
    """Return the numbers of all slices of which there is a .json, ascending."""
    matches = [_SLICE_FILE.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match and match[2] == "json")


def remove_slice(folder: Path, number: int) -> None:
    """Remove a slice; its .json goes first, so that a half removed one is not taken for whole."""
    (folder / json_name(number)).unlink(missing_ok=True)
    (folder / tar_name(number)).unlink(missing_ok=True)


def write_index(
    folder: Path,
    slices: Sequence[Slice],
    *,
    settings: dict[str, Any],
    class_names: Sequence[str],
) -> None:
    """Write index.json over all slices, and remove what killed processes left behind."""
    index = {
        "format": FORMAT,
        "version": VERSION,
        **settings,
        **totals(slices),
        "class_names": list(class_names),
        "quarantined": {key: why for record in slices for key, why in record.quarantined.items()},
        "shards": [
            {
                "name": tar_name(record.number),
                "samples": len(record.samples),
                "bytes": record.bytes,
                "sha256": record.sha256,
            }
            for record in slices
        ],
    }
    _replace(folder / INDEX_NAME, _seal(index))
    for path in folder.iterdir():
        match = _SLICE_FILE.fullmatch(path.name)
        surplus = match is not None and int(match[1]) >= len(slices)
        if surplus or _PART_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def totals(slices: Sequence[Slice]) -> dict[str, Any]:
    """Add up slices, under the names that index.json uses."""
    num_labelled = sum(len(record.samples) for record in slices)
    correct = [record.num_correct for record in slices]
    num_correct = None if None in correct else sum(filter(None, correct))
    return {
        "num_labelled": num_labelled,
        "num_quarantined": sum(len(record.quarantined) for record in slices),
        "map_bytes": sum(size for record in slices for _, size in record.samples.values()),
        "tar_bytes": sum(record.bytes for record in slices),
        "num_correct": num_correct,
    }


def read_index(folder: Path) -> dict[str, Any]:
    """Read index.json and check that it is a label set's.

    Raises:
        FileNotFoundError: If there is none: no label set, or one that is not finished.
        ValueError: If it is damaged, of another kind or version, or names files elsewhere.
    """
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(_why_no_index(folder)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
    kind = index.get("format") if isinstance(index, dict) else None
    if kind != FORMAT:
        raise ValueError(
            f"{path} describes {kind!r}, not {FORMAT!r}: give the --out folder of tl-label generate"
        )
    if index.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {index.get('version')!r}, this tokenlabel reads {VERSION}; "
            "install the tokenlabel that wrote it, or label again"
        )
    problem = _index_problem(index)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}; {_AGAIN}")
    return _without_checksum(index)


@dataclass(frozen=True, eq=False)
class LabelSet:
    """A finished label set, read by key. May be shared between threads and sent to processes."""

    folder: Path
    index: dict[str, Any] = field(repr=False)
    """index.json: teacher, fit, k, num_classes, source, totals, shards."""
    keys: list[str] = field(repr=False)
    """Of all labelled images, in the order of the source."""
    _positions: dict[str, int] = field(repr=False)
    _places: Int64[np.ndarray, "n 3"] = field(repr=False)
    """Shard, offset and size of each key's map."""

    @classmethod
    def open(cls, folder: Path) -> "LabelSet":
        """Open a label set, checking that its files are there and have their sizes.

        Raises:
            FileNotFoundError: If there is no index: no label set, or one that is not finished.
            ValueError: If the index or a shard is damaged or missing.
        """
        index = read_index(folder)
        keys, places = [], []
        for number, shard in enumerate(index["shards"]):
            record = _read_shard(folder, number, shard)
            keys += record.samples
            places += [(number, offset, size) for offset, size in record.samples.values()]
        positions = {key: position for position, key in enumerate(keys)}
        table = np.array(places, np.int64).reshape(-1, 3)
        if not len(positions) == len(keys) == index["num_labelled"]:
            raise ValueError(
                f"{folder / INDEX_NAME} counts {index['num_labelled']} label maps, its shards hold "
                f"{len(keys)} ({len(positions)} different); {_AGAIN}"
            )
        return cls(folder, index, keys, positions, table)

    @property
    def num_classes(self) -> int:
        """Number of classes the teacher chose from."""
        return self.index["num_classes"]

    @property
    def k(self) -> int:
        """Number of classes kept per cell."""
        return self.index["k"]

    @property
    def class_names(self) -> list[str]:
        """What people read, one per class."""
        return self.index["class_names"]

    @property
    def quarantined(self) -> dict[str, str]:
        """Key of each image without a map → why."""
        return self.index["quarantined"]

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def read(self, key: str) -> bytes:
        """Return an image's label map, to be decoded by label_map.decode.

        Raises:
            KeyError: If the key has none.
            ValueError: If the shard is shorter than it was.
        """
        number, offset, size = (int(x) for x in self._places[self._positions[key]])
        path = self.folder / tar_name(number)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{path} ends before the label map of {key}; {_AGAIN}")
        return data

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            ValueError: If one has changed; names it.
        """
        for shard in self.index["shards"]:
            path = self.folder / shard["name"]
            if _sha256(path) != shard["sha256"]:
                raise ValueError(
                    f"{path} is not what was written, its checksum does not fit; {_AGAIN}"
                )


def _read_shard(folder: Path, number: int, shard: Mapping[str, Any]) -> Slice:
    tar = folder / shard["name"]
    if not tar.is_file():
        raise ValueError(f"{tar} is missing, though the index names it; {_AGAIN}")
    if tar.stat().st_size != shard["bytes"]:
        raise ValueError(
            f"{tar} has {tar.stat().st_size} bytes, {shard['bytes']} were written; {_AGAIN}"
        )
    record = read_slice(folder, number)
    if record is None or record.sha256 != shard["sha256"]:
        raise ValueError(f"{folder / json_name(number)} is missing or damaged; {_AGAIN}")
    return record


def _index_problem(index: Mapping[str, Any]) -> str | None:
    kinds = {
        "teacher": dict,
        "fit": str,
        "k": int,
        "num_classes": int,
        "num_labelled": int,
        "class_names": list,
        "quarantined": dict,
        "shards": list,
    }
    for name, kind in kinds.items():
        if not isinstance(index.get(name), kind):
            return f"{name!r} is {index.get(name)!r:.60}, not {kind.__name__}"
    for number, shard in enumerate(index["shards"]):
        # Also keeps every path inside the folder, whatever the index says.
        if not isinstance(shard, dict) or shard.get("name") != tar_name(number):
            return f"shard {number} is {shard!r:.60}, expected {tar_name(number)}"
        if not {"bytes", "sha256"} <= shard.keys():
            return f"shard {number} lacks its size or checksum"
    return None if _checksum_fits(index) else "its checksum does not fit"


def _why_no_index(folder: Path) -> str:
    if not folder.is_dir():
        return f"label folder {folder} does not exist"
    if any(_SLICE_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return (
            f"{folder} has no {INDEX_NAME}: labelling is still going on or was broken off; run the "
            "same tl-label generate again, it goes on where it stopped"
        )
    return f"{folder} has no {INDEX_NAME}, so it is no label set; make one with tl-label generate"


def _to_tar(maps: Iterable[tuple[str, bytes]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a tar of KEY.tlm and where in it each map lies."""
    buffer = io.BytesIO()
    samples = {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, data in maps:
            member = tarfile.TarInfo(f"{key}.tlm")  # time, owner and mode stay constant
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            samples[key] = (buffer.tell() - -(-len(data) // 512) * 512, len(data))
    return buffer.getvalue(), samples


def _slice_json(record: Slice) -> bytes:
    return _seal(
        {
            "format": SLICE_FORMAT,
            "version": VERSION,
            "bytes": record.bytes,
            "sha256": record.sha256,
            "num_labelled": len(record.samples),
            "num_quarantined": len(record.quarantined),
            "num_correct": record.num_correct,
            "settings": record.settings,
            "quarantined": record.quarantined,
            "samples": record.samples,
        }
    )


def _parse_slice(data: bytes, number: int) -> Slice:
    content = json.loads(data)
    if (content["format"], content["version"]) != (SLICE_FORMAT, VERSION):
        raise ValueError(f"version {content['version']} of {content['format']}")
    if not _checksum_fits(content):
        raise ValueError("its checksum does not fit")
    return Slice(
        number=number,
        settings=content["settings"],
        samples={key: (offset, size) for key, (offset, size) in content["samples"].items()},
        quarantined=content["quarantined"],
        num_correct=content["num_correct"],
        bytes=content["bytes"],
        sha256=content["sha256"],
    )


def _seal(content: Mapping[str, Any]) -> bytes:
    """Turn into JSON that ends in a checksum of the rest of itself."""
    return _to_json({**content, _CHECKSUM: _digest(content)})


def _checksum_fits(content: Mapping[str, Any]) -> bool:
    return content.get(_CHECKSUM) == _digest(_without_checksum(content))


def _without_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != _CHECKSUM}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_to_json(content)).hexdigest()


def _to_json(content: Mapping[str, Any]) -> bytes:
    """Two levels deep one entry a line: people read and grep files of 10,000 keys."""
    lines = [f"{_dumps(name)}: {_to_lines(value)}" for name, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _to_lines(value: Any) -> str:
    if isinstance(value, dict) and value:
        entries = [f" {_dumps(name)}: {_dumps(entry)}" for name, entry in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f" {_dumps(entry)}" for entry in value) + "\n]"
    return _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it."""
    # The name is this process's own: two that write one slice by mistake do not mix their bytes.
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
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
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
