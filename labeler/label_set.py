"""Label shards on disk, or behind a URL.

A label set is a folder, see folder.py:

    labels-00000.tar    KEY.tlm for the images of slice 0 that could be labelled, in order of keys
    labels-00000.json   which settings made it, where each key lies, what was left out and why
    labels-00001.tar …
    index.json          the settings, the totals and every shard's checksum; written last

A slice is finished when its .json is there: the tar gets its name first. docs/
label-generation.md shows real entries.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from .dictionary import from_settings
from .folder import REQUESTS_AT_A_TIME, Folder, Location, open_folder, replace_file
from .storage import local_path

INDEX_NAME = "index.json"
FORMAT = "tokenlabel-labels"
SLICE_FORMAT = "tokenlabel-label-slice"
VERSION = 1

_SLICE_FILE = re.compile(r"labels-(\d{5,})\.(tar|json)")
_PART_FILE = re.compile(r"\.(labels-\d{5,}\.(tar|json)|index\.json)\..+\.part")
_CHECKSUM = "checksum"
_DICTIONARY = "dictionary_sha256"
_TARS_AT_A_TIME = 4  # each is read as fast as a connection allows, and held in memory
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
    location: Location,
    number: int,
    maps: Iterable[tuple[str, bytes]],
    *,
    settings: dict[str, Any],
    quarantined: dict[str, str],
    num_correct: int | None,
) -> Slice:
    """Write a slice's tar, then its .json; each appears whole or not at all.

    Args:
        location: Of the label set.
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
    folder = open_folder(location)
    folder.write(tar_name(number), tar)
    folder.write(json_name(number), slice_json(record))
    return record


def read_slice(location: Location, number: int) -> Slice | None:
    """Read what a slice's .json says, without a look into the tar; None if it is no good."""
    return _read_slice(open_folder(location), number)


def read_slices(location: Location) -> list[Slice]:
    """Read the .json of every slice of which there is a sound one, ascending."""
    folder = open_folder(location)
    matches = [_SLICE_FILE.fullmatch(name) for name in folder.files()]
    numbers = sorted(int(match[1]) for match in matches if match and match[2] == "json")
    return [record for record in _read_each(folder, numbers) if record is not None]


def is_whole(location: Location, record: Slice) -> bool:
    """Tell whether a slice's tar has the bytes that were written."""
    try:
        return open_folder(location).sha256(tar_name(record.number)) == record.sha256
    except FileNotFoundError:
        return False


def remove_slices(location: Location, numbers: Iterable[int]) -> None:
    """Remove slices, as far as they are there.

    The .json of each goes first, so that a half removed one is not taken for whole.
    """
    folder = open_folder(location)
    there = set(folder.files())
    for number in numbers:
        for name in (json_name(number), tar_name(number)):
            if name in there:
                folder.remove(name)


def remove_index(location: Location) -> None:
    """Remove index.json, if it is there: from now on the set is an unfinished one."""
    open_folder(location).remove(INDEX_NAME)


def write_index(
    location: Location,
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
    folder = open_folder(location)
    folder.write(INDEX_NAME, _seal(index))
    for name in folder.files():
        match = _SLICE_FILE.fullmatch(name)
        surplus = match is not None and int(match[1]) >= len(slices)
        if surplus or _PART_FILE.fullmatch(name):
            folder.remove(name)


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


def check_output(location: Location) -> None:
    """Make a folder for a label set, and check that it does not belong to something else.

    Raises:
        OSError: If it cannot be made or is a file.
        ValueError: If it holds a data set, or is a URL that nothing can be written to.
    """
    folder = open_folder(location)
    folder.make()
    try:
        data = folder.read(INDEX_NAME)
    except FileNotFoundError:
        return
    try:
        kind = json.loads(data)["format"]
    except (ValueError, KeyError, TypeError):
        return
    if kind != FORMAT:
        raise ValueError(f"{folder} holds {kind!r} already; give --out a folder of its own")


def in_words(settings: Mapping[str, Any]) -> str:
    """Describe in a line how the maps of a set were made.

    Args:
        settings: What index.json says, or a data set's copy of it.
    """
    teacher = settings.get("teacher", {})
    sizes = settings.get("levels") or [teacher.get("image_size")]
    mass = f" (up to {settings['mass']:.4g} of the mass)" if "mass" in settings else ""
    tiles = " in tiles" if settings.get("tiles") else ""
    dictionary = from_settings(settings)
    facts = [
        teacher.get("name", "unknown teacher"),
        f"{settings['fit']} fit",
        f"at {' + '.join(map(str, sizes))} px{tiles}" if sizes[0] else "",
        f"top {settings['k']}{mass}",
        f"{settings.get('score_bits', 16)}-bit scores",
        "" if dictionary is None else f"a dictionary of {len(dictionary):,} bytes",
    ]
    return ", ".join(filter(None, facts))


def read_index(location: Location) -> dict[str, Any]:
    """Read index.json and check that it is a label set's.

    Raises:
        FileNotFoundError: If there is none: no label set, or one that is not finished.
        ValueError: If it is damaged, of another kind or version, or names files elsewhere.
    """
    folder = open_folder(location)
    path = folder.name(INDEX_NAME)
    try:
        data = folder.read(INDEX_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(_why_no_index(folder)) from error
    try:
        index = json.loads(data)
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

    folder: Location
    index: dict[str, Any] = field(repr=False)
    """index.json: teacher, fit, k, num_classes, source, totals, shards."""
    keys: list[str] = field(repr=False)
    """Of all labelled images, in the order of the source."""
    dictionary: bytes | None = field(repr=False)
    """What label_map.decode needs beside the bytes of a map; None in sets without."""
    _positions: dict[str, int] = field(repr=False)
    _places: Int64[np.ndarray, "n 3"] = field(repr=False)
    """Shard, offset and size of each key's map."""

    @classmethod
    def open(cls, location: Location) -> "LabelSet":
        """Open a label set, checking that its files are there and have their sizes.

        Args:
            location: A folder, or a URL of one as a str.

        Raises:
            FileNotFoundError: If there is no index: no label set, or one that is not finished.
            OSError: If the storage fails.
            ValueError: If the index or a shard is damaged or missing.
        """
        index = read_index(location)
        folder = open_folder(location)
        sizes = folder.sizes([shard["name"] for shard in index["shards"]])
        records = _read_each(folder, range(len(index["shards"])))
        keys, places = [], []
        for number, (shard, record) in enumerate(zip(index["shards"], records)):
            samples = _checked(folder, number, index, sizes.get(shard["name"]), record).samples
            keys += samples
            places += [(number, offset, size) for offset, size in samples.values()]
        positions = {key: position for position, key in enumerate(keys)}
        table = np.array(places, np.int64).reshape(-1, 3)
        if not len(positions) == len(keys) == index["num_labelled"]:
            raise ValueError(
                f"{folder.name(INDEX_NAME)} counts {index['num_labelled']} label maps, its shards "
                f"hold {len(keys)} ({len(positions)} different); {_AGAIN}"
            )
        return cls(location, index, keys, from_settings(index), positions, table)

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

    @property
    def is_remote(self) -> bool:
        """Whether it lies behind a URL, and every read is a request."""
        return local_path(str(self.folder)) is None

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
        folder = open_folder(self.folder)
        data = folder.read_at(tar_name(number), offset, size)
        if len(data) != size:
            raise ValueError(
                f"{folder.name(tar_name(number))} ends before the label map of {key}; {_AGAIN}"
            )
        return data

    def read_each(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Read several label maps, in order; behind a URL many at a time. Raises as read."""
        if not self.is_remote:
            yield from map(self.read, keys)
            return
        ahead = 4 * REQUESTS_AT_A_TIME
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME, "read") as pool:
            for start in range(0, len(keys), ahead):
                yield from pool.map(self.read, keys[start : start + ahead])

    def copy_to(self, folder: Path) -> "LabelSet":
        """Copy the maps into a folder on this machine, and return them as they lie there.

        Whole tars are read: for most of a set behind a URL that takes minutes where a request
        for each map takes hours. The folder does not become a label set.

        Raises:
            OSError: If the storage fails.
            ValueError: If a tar is not what was written; names it.
        """

        def copy(shard: Mapping[str, Any]) -> None:
            data = theirs.read(shard["name"])
            self._check(shard, hashlib.sha256(data).hexdigest())
            replace_file(folder / shard["name"], data)

        theirs, shards = open_folder(self.folder), self.index["shards"]
        with ThreadPoolExecutor(_TARS_AT_A_TIME, "copy") as pool:
            copied = pool.map(copy, shards)
            for _ in tqdm(copied, "fetch labels", len(shards), disable=None, unit="shard"):
                pass
        return replace(self, folder=folder)

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            ValueError: If one has changed; names it.
        """
        folder = open_folder(self.folder)
        for shard in self.index["shards"]:
            self._check(shard, folder.sha256(shard["name"]))

    def _check(self, shard: Mapping[str, Any], sha256: str) -> None:
        if sha256 != shard["sha256"]:
            path = open_folder(self.folder).name(shard["name"])
            raise ValueError(f"{path} is not what was written, its checksum does not fit; {_AGAIN}")


def _checked(
    folder: Folder,
    number: int,
    index: Mapping[str, Any],
    num_bytes: int | None,
    found: Slice | None,
) -> Slice:
    """Return what was found of a slice, if it is what the index says."""
    shard = index["shards"][number]
    tar = folder.name(shard["name"])
    if num_bytes is None:
        raise ValueError(f"{tar} is missing, though the index names it; {_AGAIN}")
    if num_bytes != shard["bytes"]:
        raise ValueError(f"{tar} has {num_bytes} bytes, {shard['bytes']} were written; {_AGAIN}")
    if found is None or found.sha256 != shard["sha256"]:
        raise ValueError(f"{folder.name(json_name(number))} is missing or damaged; {_AGAIN}")
    if found.settings.get(_DICTIONARY) != index.get(_DICTIONARY):
        raise ValueError(
            f"{folder.name(json_name(number))} is of maps with another dictionary than "
            f"{INDEX_NAME}; {_AGAIN}"
        )
    return found


def _read_slice(folder: Folder, number: int) -> Slice | None:
    try:
        data = folder.read(json_name(number))
    except FileNotFoundError:
        return None
    try:
        return _parse_slice(data, number)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_each(folder: Folder, numbers: Iterable[int]) -> Iterator[Slice | None]:
    with ThreadPoolExecutor(REQUESTS_AT_A_TIME, "read") as pool:
        yield from pool.map(partial(_read_slice, folder), numbers)


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


def _why_no_index(folder: Folder) -> str:
    if not folder.exists():
        return f"label folder {folder} does not exist"
    if any(_SLICE_FILE.fullmatch(name) for name in folder.files()):
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


def slice_json(record: Slice) -> bytes:
    """Return what labels-NNNNN.json holds."""
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
