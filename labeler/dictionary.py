"""Zstd dictionaries: what the label maps of a set have in common, kept once instead of in each map.

A map that was encoded with a dictionary can be read with that very dictionary alone. So that
nobody can lose it, it lies in the settings of every label set and slice that was made with it:
base64 text under "dictionary", its SHA-256 under "dictionary_sha256".
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from .label_map import LabelMapError, train_dictionary

DEFAULT_BYTES = 16_384
MAX_BYTES = 65_536
"""Largest dictionary: it lies in each .json of a label set, and every process reads it."""
_MAX_MAPS = 2_000
"""Maps to train on: some hundred times the dictionary is enough, and takes seconds."""


def train_on_set(
    keys: Sequence[str],
    read_each: Callable[[Sequence[str]], Iterable[bytes]],
    *,
    size_bytes: int = DEFAULT_BYTES,
    dictionary: bytes | None = None,
) -> bytes:
    """Train a dictionary on label maps from all over a set.

    Args:
        keys: Of all maps.
        read_each: Gives the bytes of several, in order.
        size_bytes: Of the dictionary, at most.
        dictionary: The one that these maps were encoded with, if any.

    Raises:
        ValueError: If the size is out of range, or the maps are too few or too small.
    """
    if not 256 <= size_bytes <= MAX_BYTES:
        raise ValueError(f"size {size_bytes} is not between 256 and {MAX_BYTES} bytes")
    step = max(1, -(-len(keys) // _MAX_MAPS))
    maps = list(read_each(keys[::step]))
    try:
        return train_dictionary(maps, size_bytes=size_bytes, dictionary=dictionary)
    except LabelMapError as error:
        raise ValueError(
            f"{error}; give a label set of more images, some hundreds at least, "
            f"or a --size below {size_bytes}"
        ) from error


def read_dictionary(path: Path) -> bytes:
    """Read a dictionary from a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is none, or larger than MAX_BYTES.
    """
    data = path.read_bytes()
    try:
        check_dictionary(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return data


def check_dictionary(data: bytes) -> None:
    """Check that maps can be encoded with a dictionary.

    Raises:
        ValueError: If not, or if it is larger than MAX_BYTES.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"a dictionary of {len(data)} bytes; a label set takes {MAX_BYTES} at most, as it lies "
            "in every one of its .json files: train a smaller one, with tl-label dictionary --size"
        )
    try:
        dictionary = zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_FULLDICT)
        dictionary.precompute_compress(level=3)
    except zstandard.ZstdError as error:
        raise ValueError(
            "not a zstd dictionary; tl-label dictionary trains one on a label set"
        ) from error


def to_settings(dictionary: bytes) -> dict[str, str]:
    """Return the settings that a label set carries its dictionary in."""
    return {
        # First, so that a message about two sets that differ shows this and not the dictionary.
        "dictionary_sha256": hashlib.sha256(dictionary).hexdigest(),
        "dictionary": base64.b64encode(dictionary).decode(),
    }


def from_settings(settings: Mapping[str, Any]) -> bytes | None:
    """Return the dictionary that the maps of a label set are read with; None if without.

    Raises:
        ValueError: If it is damaged.
    """
    text = settings.get("dictionary")
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the dictionary of the label set is damaged: {error}") from error
    if hashlib.sha256(data).hexdigest() != settings.get("dictionary_sha256"):
        raise ValueError("the dictionary of the label set is damaged: its checksum does not fit")
    return data
