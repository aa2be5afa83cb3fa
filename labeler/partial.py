"""What a slice has when a run stops before its end, kept so that the next run goes on from there.

labels-NNNNN.partial lies beside the finished slices until the slice is finished too. It has three
lines, and is nobody else's business: the SHA-256 of the second line; JSON with the settings that
made it and the SHA-256 of the third; JSON with the maps so far. A damaged one counts as none.
"""

import base64
import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from .folder import Folder, Location, open_folder
from .label_map import LabelMap, decode, encode

_VERSION = 1
_FILE = re.compile(r"labels-(\d{5,})\.partial")
_HEAD_BYTES = 1 << 18
"""Read to see what a file is about; its maps may be a hundred megabytes."""
_PART_FILE = re.compile(r"\.labels-\d{5,}\.partial\..+\.part")

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SliceWork:
    """The labels of a slice, as far as they are made."""

    maps: dict[str, bytes] = field(default_factory=dict)
    """Key → the bytes that go into the label set."""
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Key of each image in `maps` → (height, width) of the teacher's input, px, per level."""
    best: dict[str, int] = field(default_factory=dict)
    """Key → the class that the teacher gives to the whole image on the first level."""
    levels: dict[str, dict[int, LabelMap]] = field(default_factory=dict)
    """Key of each image of which some levels are there and others are not → those there."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Key of each image that gets no map → why. Not kept for the next run, which looks again."""


def save_partial(folder: Location, number: int, work: SliceWork, settings: dict[str, Any]) -> None:
    """Write down what a slice has so far; the file appears whole or not at all."""
    content = {
        "maps": {key: _to_text(data) for key, data in work.maps.items()},
        "sizes": work.sizes,
        "best": work.best,
        "levels": {
            key: {str(level): _to_text(encode(label_map)) for level, label_map in levels.items()}
            for key, levels in work.levels.items()
        },
    }
    body = _to_json(content)
    head = _to_json(
        {
            "version": _VERSION,
            "settings": settings,
            "num_maps": len(work.maps),
            "sha256": _sha256(body),
        }
    )
    open_folder(folder).write(_name(number), b"\n".join([_sha256(head).encode(), head, body]))


def read_partial(folder: Location, number: int, settings: dict[str, Any]) -> SliceWork:
    """Return what a run with the same settings has left of a slice; nothing if there is none."""
    opened = open_folder(folder)
    head = _read_head(opened, number)
    if head is None or head["settings"] != settings:
        return SliceWork()
    body = opened.read(_name(number)).split(b"\n", 2)[2]
    if _sha256(body) != head["sha256"]:
        _logger.warning("%s is damaged: its slice begins anew", opened.name(_name(number)))
        return SliceWork()
    content = json.loads(body)
    return SliceWork(
        maps={key: base64.b64decode(text) for key, text in content["maps"].items()},
        sizes={key: [(h, w) for h, w in sizes] for key, sizes in content["sizes"].items()},
        best=content["best"],
        levels={
            key: {int(level): decode(base64.b64decode(text))[0] for level, text in levels.items()}
            for key, levels in content["levels"].items()
        },
    )


@dataclass(frozen=True, slots=True)
class PartialHead:
    """What is known of an unfinished slice without reading its maps."""

    settings: dict[str, Any]
    """Of the run that left it."""
    num_maps: int


def list_partials(folder: Location) -> dict[int, PartialHead]:
    """Return what was left of which slices, by their numbers."""
    opened = open_folder(folder)
    matches = [_FILE.fullmatch(name) for name in opened.files()]
    numbers = sorted(int(match[1]) for match in matches if match)
    heads = {number: _read_head(opened, number) for number in numbers}
    return {
        number: PartialHead(head["settings"], head["num_maps"])
        for number, head in heads.items()
        if head is not None
    }


def remove_partial(folder: Location, number: int) -> None:
    """Remove what is kept of a slice, if anything is."""
    open_folder(folder).remove(_name(number))


def remove_partials(folder: Location) -> None:
    """Remove what is kept of any slice, and what a kill left of such a file."""
    opened = open_folder(folder)
    for name in opened.files():
        if _FILE.fullmatch(name) or _PART_FILE.fullmatch(name):
            opened.remove(name)


def _read_head(opened: Folder, number: int) -> dict[str, Any] | None:
    name = _name(number)
    try:
        data = opened.read_at(name, 0, _HEAD_BYTES)
    except FileNotFoundError:
        return None
    if data.count(b"\n") < 2:  # the settings may name very many classes
        data = opened.read(name)
    checksum, _, rest = data.partition(b"\n")
    head = rest.partition(b"\n")[0]
    if _sha256(head).encode() != checksum:
        _logger.warning("%s is damaged: its slice begins anew", opened.name(name))
        return None
    content = json.loads(head)
    return content if content["version"] == _VERSION else None


def _name(number: int) -> str:
    return f"labels-{number:05d}.partial"


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
