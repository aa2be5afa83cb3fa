"""index.json: what is in a folder of dataset shards, and DALI's .idx beside each shard.

A data set is a folder:

    index.json            this file's business; written last
    train-000000.tar      KEY.jpg, KEY.cls and, in a split with labels, KEY.tlm, sample by sample;
                          in a split for segmentation KEY.jpg and KEY.png
    train-000000.idx      where each of them lies in the tar, for DALI's webdataset reader
    val-000000.tar …

docs/dataset-shards.md shows real entries of both files.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..labeler.dictionary import from_settings
from ..labeler.folder import replace_file

INDEX_NAME = "index.json"
FORMAT = "tokenlabel-shards"
VERSION = 1
PART_SUFFIX = ".part"
"""Files still being written are hidden and end in this."""

_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SHARD_NAME = re.compile(r"(?P<split>[A-Za-z0-9][A-Za-z0-9_-]*)-\d{6,}\.tar")
_CHECKSUM = "index_sha256"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    """Size of the tar file."""
    sha256: str
    """Of the tar file, in hex."""
    idx_sha256: str
    """Of the .idx file beside it, in hex."""

    @property
    def idx_name(self) -> str:
        """Name of DALI's index beside the tar."""
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """One split, e.g. "train"."""

    num_samples: int
    has_labels: bool
    """Whether every sample has a KEY.tlm."""
    seed: int
    """Of the shuffle over the whole split."""
    shards: list[ShardEntry]
    labels: dict[str, Any] | None
    """What the label set's own index says about teacher, k, fit and so on."""
    num_listed: int
    """Images that the source listed: num_samples plus those in `quarantined`."""
    quarantined: dict[str, str]
    """Key of each image that was left out → why."""
    repaired: dict[str, int]
    """Why images were encoded anew → how many."""
    masks: dict[str, Any] | None = None
    """In a split for segmentation, whose samples have KEY.png in place of a class: "ignore_index"
    of pixels without a class, and what the masks were made from."""

    @property
    def num_bytes(self) -> int:
        """Size of all tar files."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def dictionary(self) -> bytes | None:
        """What label_map.decode needs beside the bytes of a map; None in splits without."""
        return None if self.labels is None else from_settings(self.labels)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Everything that index.json says, and the folder it stands in."""

    folder: Path
    num_classes: int
    class_ids: list[str]
    class_names: list[str]
    splits: dict[str, SplitIndex] = field(default_factory=dict)

    def split(self, name: str) -> SplitIndex:
        """Return a split.

        Raises:
            ValueError: If there is none of this name; lists those that exist.
        """
        if name not in self.splits:
            raise ValueError(
                f"{self.folder} has no split {name!r}; it has {', '.join(map(repr, self.splits))}"
            )
        return self.splits[name]

    def shard_paths(self, split: str) -> list[Path]:
        """Return the tar files of a split, in the order of the index.

        Raises:
            OSError: If one of them, or its .idx, is not there.
            ValueError: If one has another size than the index says, or the split is unknown.
        """
        shards = self.split(split).shards
        names = [name for shard in shards for name in (shard.name, shard.idx_name)]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder / missing[0]} is missing ({len(missing)} of {len(names)} files of "
                f"split {split!r} are); copy the data set again or pack it again with --overwrite"
            )
        for shard in shards:
            size = (self.folder / shard.name).stat().st_size
            if size != shard.bytes:
                raise ValueError(
                    f"{self.folder / shard.name} has {size} bytes, the index says {shard.bytes}; "
                    "copy it again or pack again with --overwrite"
                )
        return [self.folder / shard.name for shard in shards]

    def idx_paths(self, split: str) -> list[Path]:
        """Return DALI's index files, one for each of shard_paths."""
        return [self.folder / shard.idx_name for shard in self.split(split).shards]


def read_index(folder: Path) -> ShardIndex:
    """Read and check index.json.

    Raises:
        OSError: If there is none: no data set, or one whose packing did not come to its end.
        ValueError: If it is damaged, of another kind, or of a version this code does not know.
    """
    path = folder / INDEX_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(_why_no_index(folder)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        data = json.loads(text)
        kind, version = data["format"], data["version"]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no data set's index: {error!r}") from error
    if kind != FORMAT:
        raise ValueError(
            f"{path} describes {kind!r}, expected {FORMAT!r}; give a folder made by tl-shard pack"
        )
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version}, this tokenlabel reads version {VERSION}; "
            "install the tokenlabel that wrote it or pack again"
        )
    try:
        index = ShardIndex(
            folder=folder,
            num_classes=_of_type(int, data["num_classes"]),
            class_ids=_list_of(str, data["class_ids"]),
            class_names=_list_of(str, data["class_names"]),
            splits={name: _split(name, entry) for name, entry in data["splits"].items()},
        )
        if not index.num_classes == len(index.class_ids) == len(index.class_names):
            raise ValueError("num_classes, class_ids and class_names disagree")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return index


def format_index(index: ShardIndex) -> str:
    """Return the text of index.json; it ends in a checksum of the rest of itself."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "num_classes": index.num_classes,
        "class_ids": index.class_ids,
        "class_names": index.class_names,
        "splits": {name: _split_facts(split) for name, split in sorted(index.splits.items())},
    }
    digest = hashlib.sha256(_to_json(data).encode(errors="surrogatepass")).hexdigest()
    return _to_json(data | {_CHECKSUM: digest}) + "\n"


def write_index(index: ShardIndex) -> None:
    """Replace index.json in one step: a reader finds the old one or the new one."""
    # A name that the next process writes over: only one may write here at a time.
    part = index.folder / f".{INDEX_NAME}{PART_SUFFIX}"
    replace_file(index.folder / INDEX_NAME, format_index(index).encode(), part=part)


def check_split_name(split: str) -> str:
    """Return a split's name if files can be named after it.

    Raises:
        ValueError: If not.
    """
    if not _SPLIT.fullmatch(split):
        raise ValueError(
            f"split {split!r} cannot name files; use letters, digits, '-' and '_', e.g. 'train'"
        )
    return split


def shard_name(split: str, number: int) -> str:
    """Return the name of a split's shard, e.g. train-000000.tar."""
    return f"{split}-{number:06d}.tar"


def belongs_to(file_name: str, split: str) -> bool:
    """Tell whether a file is named like a finished shard of this split, or like its .idx."""
    stem, _, suffix = file_name.rpartition(".")
    match = _SHARD_NAME.fullmatch(f"{stem}.tar")
    return suffix in ("tar", "idx") and match is not None and match["split"] == split


def format_idx(rows: Sequence[Iterable[tuple[str, int, int]]]) -> str:
    """Return the text of DALI's index (v1.2) of one tar.

    Args:
        rows: For each sample its members as (name in the tar, offset of the data, size in bytes).
    """
    lines = [f"v1.2 {len(rows)}"]
    for members in rows:
        lines.append(
            " ".join(
                f"{name.rpartition('.')[2]} {offset} {size} {name}"
                for name, offset, size in members
            )
        )
    return "\n".join(lines) + "\n"


def _split_facts(split: SplitIndex) -> dict[str, Any]:
    facts = asdict(split)
    if split.masks is None:
        del facts["masks"]  # so that the index of a data set without masks has no word of them
    return facts


def _to_json(value: Any, depth: int = 4, margin: str = "") -> str:
    """Return JSON with a line for each split, shard and image left out, for people and for grep."""
    inner = margin + " "
    if depth and isinstance(value, dict) and value:
        lines = [
            f"{json.dumps(name, ensure_ascii=False)}: {_to_json(entry, depth - 1, inner)}"
            for name, entry in value.items()
        ]
        brackets = "{}"
    elif depth and isinstance(value, list) and value and isinstance(value[0], dict):
        lines = [json.dumps(entry, ensure_ascii=False) for entry in value]
        brackets = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    body = f",\n{inner}".join(lines)
    return f"{brackets[0]}\n{inner}{body}\n{margin}{brackets[1]}"


def _why_no_index(folder: Path) -> str:
    if not folder.is_dir():
        return f"data set folder {folder} does not exist"
    parts = [name for name in os.listdir(folder) if name.endswith(PART_SUFFIX)]  # noqa: PTH208
    if parts:
        return (
            f"{folder} has no {INDEX_NAME}: packing it is still going on or was broken off; "
            "run the same tl-shard pack or relabel again"
        )
    return f"{folder} has no {INDEX_NAME}, so it is no data set; make one with tl-shard pack"


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r:.60}")
    return value


def _list_of(kind: type, values: Any) -> list[Any]:
    return [_of_type(kind, value) for value in _of_type(list, values)]


def _dict_of(kind: type, values: Any) -> dict[str, Any]:
    return {key: _of_type(kind, value) for key, value in _of_type(dict, values).items()}


def _split(name: str, entry: Any) -> SplitIndex:
    shards = [_shard(name, shard) for shard in _of_type(list, entry["shards"])]
    num_samples = _of_type(int, entry["num_samples"])
    if num_samples != sum(shard.samples for shard in shards):
        raise ValueError(f"split {name!r}: num_samples is not the sum over its shards")
    labels, masks = entry["labels"], entry.get("masks")
    split = SplitIndex(
        num_samples=num_samples,
        has_labels=_of_type(bool, entry["has_labels"]),
        seed=_of_type(int, entry["seed"]),
        shards=shards,
        labels=None if labels is None else _of_type(dict, labels),
        num_listed=_of_type(int, entry["num_listed"]),
        quarantined=_dict_of(str, entry["quarantined"]),
        repaired=_dict_of(int, entry["repaired"]),
        masks=None if masks is None else _of_type(dict, masks),
    )
    if masks is not None:
        _of_type(int, masks["ignore_index"])
    _ = split.dictionary  # raises where it is damaged
    return split


def _shard(split: str, entry: Any) -> ShardEntry:
    name = _of_type(str, entry["name"])
    if not belongs_to(name, split) or not name.endswith(".tar"):
        raise ValueError(f"{name!r} is no shard name of split {split!r}")
    return ShardEntry(
        name=name,
        samples=_of_type(int, entry["samples"]),
        bytes=_of_type(int, entry["bytes"]),
        sha256=_of_type(str, entry["sha256"]),
        idx_sha256=_of_type(str, entry["idx_sha256"]),
    )
