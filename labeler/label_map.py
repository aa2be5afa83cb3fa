"""LabelMap and its bytes (.tlm).

A label map holds the k best classes of a teacher at every cell of a grid laid over one image.
docs/label-map-format.md describes every byte with a worked example; the short form:

    header     magic, version, flags, number of levels, k, classes, palette size, CRC-32
    levels     rows, cols, window of each level
    payload    one zstd frame: palette · palette codes · scores · normaliser

The payload is built for zstd's entropy coder: values are split into planes of bytes, and each kind
of plane is flushed as a block of its own, so that it gets its own Huffman table.
"""

import math
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import zstandard
from jaxtyping import Bool, Float16, Float32, Int32, Int64, Shaped, UInt, UInt8, UInt16, UInt32

MAGIC = b"\x89TLM"
VERSION = 1
MAX_PAYLOAD_BYTES = 1 << 26
"""Refuse maps that unpack to more than this (64 MiB; an 18×18 top-5 map unpacks to 6 KiB)."""

_HAS_NORMALIZER = 1
_WIDE_CODES = 2
_BYTE_SCORES = 4
_EMPTY_RANKS = 8
_HEADER = struct.Struct("<4sBBBBIII")  # magic, version, flags, levels, k, classes-1, palette, crc
_HEAD = struct.Struct("<BBBBI")  # of these: version to classes-1
_LEVEL = struct.Struct("<HH4f")  # rows, cols, window
_STEPS = struct.Struct("<5f")  # of 8-bit scores, see _Steps
_VERSION_AT, _PALETTE_AT, _CRC_AT = 4, 12, 16
_PALETTE_AND_CRC = struct.Struct("<II")
_ZSTD_LEVEL = 1
_MAX_WINDOW_BYTES = 1 << 23
_MAPS_AT_ONCE = 128
"""Of a batch: what reading them takes then fits a core's cache."""
_MAX_KEPT_BYTES = 1 << 22
"""Of each array between bytes and maps, from one call to the next."""
_MAX_ODDS = 16.0
_SMALLEST_STEP = 0.09
"""Of 8-bit scores, in logits: finer ones cost bytes, and teachers are not that sure."""


class LabelMapError(ValueError):
    """The bytes or arrays are not a label map; the message says what is wrong with them."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class LabelMap:
    """A teacher's top-k scores on a grid of cells over one image.

    A cell that keeps fewer than k classes repeats its last class and score to the end.

    Raises:
        LabelMapError: If shapes disagree, a score is not finite, scores do not descend along k,
            a class is out of range or twice in one cell, or the window is empty.
    """

    scores: Float16[np.ndarray, "k rows cols"]
    """Raw teacher logits, descending along k."""
    classes: UInt32[np.ndarray, "k rows cols"]
    """Class ids, each below num_classes, distinct within a cell but for repeats of the last."""
    num_classes: int
    """Number of classes the teacher chose from, 1 to 2**32."""
    log_normalizer: Float16[np.ndarray, "rows cols"] | None = None
    """Logsumexp of all num_classes logits of a cell: score - log_normalizer is a log-probability.

    None in label sets made by others, which did not keep it."""
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """(x0, y0, x1, y1): the part of the image the grid covers, in image fractions, as float32."""

    def __post_init__(self) -> None:
        if self.scores.shape != self.classes.shape or self.scores.ndim != 3:
            raise LabelMapError(
                f"scores are {self.scores.shape} and classes {self.classes.shape}; "
                "both must be (k, rows, cols)"
            )
        k, rows, cols = self.scores.shape
        _check_counts(k, rows, cols, self.num_classes)
        if self.log_normalizer is not None and self.log_normalizer.shape != (rows, cols):
            raise LabelMapError(
                f"log_normalizer is {self.log_normalizer.shape}, expected {(rows, cols)}"
            )
        _check_window(self.window)
        # Windows are stored as float32; rounding here makes decode(encode(m)) equal m.
        window = tuple(float(np.float32(v)) for v in self.window)
        object.__setattr__(self, "window", window)
        if int(self.classes.max()) >= self.num_classes:
            raise LabelMapError(
                f"class {int(self.classes.max())} is not below num_classes {self.num_classes}"
            )
        _check_scores(_monotone(self.scores))
        _check_distinct(self.classes[None], self.scores[None])
        if self.log_normalizer is not None:
            _check_finite(_monotone(self.log_normalizer), "log_normalizer")

    @property
    def k(self) -> int:
        """Number of classes kept per cell."""
        return self.scores.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Cells as (rows, cols)."""
        return self.scores.shape[1], self.scores.shape[2]

    def equals(self, other: "LabelMap") -> bool:
        """Tell whether two maps hold the same bits."""
        same_normalizer = (
            self.log_normalizer is other.log_normalizer
            or self.log_normalizer is not None
            and other.log_normalizer is not None
            and np.array_equal(self.log_normalizer, other.log_normalizer)
        )
        return (
            same_normalizer
            and self.num_classes == other.num_classes
            and self.window == other.window
            and np.array_equal(self.scores, other.scores)
            and np.array_equal(self.classes, other.classes)
        )


def keep_mass(label_map: LabelMap, mass: float) -> LabelMap:
    """Drop, in each cell, the classes behind those that together have the given probability.

    Args:
        label_map: With a log_normalizer.
        mass: Between 0 and 1; at least the best class stays.

    Raises:
        LabelMapError: If the map has no log_normalizer, or mass is out of range.
    """
    if label_map.log_normalizer is None:
        raise LabelMapError("without a log_normalizer the probability of a class is not known")
    if not 0 < mass <= 1:
        raise LabelMapError(f"mass = {mass}; allowed: above 0, up to 1")
    log_probabilities = label_map.scores.astype(np.float32) - label_map.log_normalizer
    before = np.cumsum(np.exp(log_probabilities), axis=0)[:-1]
    last = (before < mass).sum(axis=0)  # rank of the last class that is kept
    ranks = np.minimum(np.arange(label_map.k)[:, None, None], last)
    return replace(
        label_map,
        scores=np.take_along_axis(label_map.scores, ranks, 0),
        classes=np.take_along_axis(label_map.classes, ranks, 0),
    )


class PaletteArrays(NamedTuple):
    """The label maps of a batch of images, each image on its own palette, padded to the largest.

    b images, l levels each, u the largest palette, mh and mw the largest grid. Padding is 0.
    """

    palette: Int64[np.ndarray, "b u"]
    """Distinct classes of each image's maps, ascending, then padding."""
    palette_sizes: Int64[np.ndarray, " b"]
    indices: Int32[np.ndarray, "b l k mh mw"]
    """Position of each cell's classes in its image's palette."""
    scores: Float16[np.ndarray, "b l k mh mw"]
    log_normalizer: Float16[np.ndarray, "b l mh mw"] | None
    """None as soon as one map of the batch has none."""
    grids: Int64[np.ndarray, "b l 2"]
    """(rows, cols) of each map before padding."""
    windows: Float32[np.ndarray, "b l 4"]
    num_classes: int


def encode(
    levels: LabelMap | Sequence[LabelMap], *, score_bits: int = 16, dictionary: bytes | None = None
) -> bytes:
    """Turn the label map of one image into bytes; lossless with 16-bit scores.

    Args:
        levels: One map, or several of one image made at rising teacher scales. All levels share
            k, num_classes and whether they have a log_normalizer.
        score_bits: 16, or 8: scores, and the mass outside the top-k, are rounded to 255 steps
            between the file's extremes.
        dictionary: A zstd dictionary (train_dictionary), used if it makes this map smaller;
            reading needs the same one.

    Raises:
        LabelMapError: If the levels do not belong together.
    """
    if score_bits not in (8, 16):
        raise LabelMapError(f"score_bits = {score_bits}; allowed: 8, 16")
    levels = [levels] if isinstance(levels, LabelMap) else list(levels)
    first = _check_levels(levels)
    palette = np.unique(np.concatenate([level.classes.ravel() for level in levels]))
    indices = [np.searchsorted(palette, level.classes) for level in levels]
    empty_ranks = any((index[1:] == index[:-1]).any() for index in indices)
    codes = [_neighbor_codes(index, empty_ranks) for index in indices]
    wide = max(int(code.max()) for code in codes) > 255
    steps = _Steps.of(levels) if score_bits == 8 else None
    blocks = [b"".join(_planes(np.diff(palette, prepend=np.uint32(0)), 4))]
    for level, code in zip(levels, codes):
        blocks += _planes(code, 2 if wide else 1)
        blocks += _score_planes(level) if steps is None else steps.planes(level)
    flags = (
        _HAS_NORMALIZER * (first.log_normalizer is not None)
        | _WIDE_CODES * wide
        | _BYTE_SCORES * (steps is not None)
        | _EMPTY_RANKS * empty_ranks
    )
    head = (MAGIC, VERSION, flags, len(levels), first.k, first.num_classes - 1, palette.size)
    body = b"".join(_LEVEL.pack(*level.grid, *level.window) for level in levels)
    body += b"" if steps is None else _STEPS.pack(*steps)
    frames = [_compress(blocks, None)]
    if dictionary is not None:
        frames.append(_compress(blocks, dictionary))
    body += min(frames, key=len)
    return _HEADER.pack(*head, _crc(_HEADER.pack(*head, 0), body)) + body


def train_dictionary(
    samples: Sequence[bytes], *, size_bytes: int = 16_384, dictionary: bytes | None = None
) -> bytes:
    """Train a zstd dictionary on encoded maps of one set, for encode and decode.

    Args:
        samples: What encode made.
        size_bytes: Of the dictionary, at most.
        dictionary: The one that the samples were encoded with, if any.

    Raises:
        LabelMapError: If the samples are too few or too small to train on.
    """
    decompressor = _decompressor(dictionary)
    payloads = [_unpack(_read_header(data), decompressor).payload for data in samples]
    try:
        trained = zstandard.train_dictionary(
            size_bytes,
            payloads,  # pyright: ignore[reportArgumentType]: its stub takes list[ByteString] alone
            level=_ZSTD_LEVEL,
        )
    except zstandard.ZstdError as error:
        raise LabelMapError(
            f"no dictionary can be trained on {len(samples)} label maps: {error}"
        ) from error
    return trained.as_bytes()


def decode(data: bytes, *, dictionary: bytes | None = None) -> tuple[LabelMap, ...]:
    """Read the label maps of one image, one per level.

    Args:
        data: What encode made.
        dictionary: The one that encode was given, if any.

    Raises:
        LabelMapError: Whatever the bytes are, nothing else is raised.
    """
    image = [_unpack(_read_header(data), _decompressor(dictionary))]
    kind = image[0].kind
    palette = np.empty((1, image[0].palette_size), np.int64)
    _fill_palettes(palette, image)
    maps = []
    for number, level in enumerate(kind.levels):
        indices = _resolve(_codes(image, number), _first_indices(image))
        _check_indices(indices, image)
        scores, normalizer = _scores(image, number, indices)
        maps.append(
            LabelMap(
                scores=scores[0].copy(),
                classes=palette[0, indices[0]].astype(np.uint32),
                num_classes=kind.num_classes,
                log_normalizer=None if normalizer is None else normalizer[0].copy(),
                window=level.window,
            )
        )
    return tuple(maps)


def check(data: bytes, *, dictionary: bytes | None = None) -> None:
    """Find out whether bytes are what encode made, by header and checksum, in a tenth of the time.

    Args:
        data: What encode made.
        dictionary: The one that encode was given, if any.

    Raises:
        LabelMapError: If they are not.
    """
    _unpack(_read_header(data), _decompressor(dictionary))


def decode_batch(batch: Sequence[bytes], *, dictionary: bytes | None = None) -> PaletteArrays:
    """Read the maps of many images into padded arrays, without a Python loop over cells.

    Args:
        batch: What encode made, per image.
        dictionary: The one that encode was given, if any.

    Raises:
        LabelMapError: If one of them is damaged, or if k, num_classes or the number of levels
            differ; the message gives the position in the batch.
    """
    try:
        return _read_together([_read_header(data) for data in batch], _decompressor(dictionary))
    except LabelMapError:
        for position, data in enumerate(batch):
            try:
                decode(data, dictionary=dictionary)
            except LabelMapError as error:
                raise LabelMapError(f"label map {position} of the batch: {error}") from error
        raise  # each is whole, but they do not belong together


def to_arrays(images: Sequence[LabelMap | Sequence[LabelMap]]) -> PaletteArrays:
    """Pad the label maps of several images into one batch; what decode_batch does from bytes.

    Args:
        images: The map of each image, or its levels; every image has as many.
    """
    pyramids = [[image] if isinstance(image, LabelMap) else list(image) for image in images]
    palettes = [np.unique(np.concatenate([m.classes.ravel() for m in ms])) for ms in pyramids]
    everything = [label_map for pyramid in pyramids for label_map in pyramid]
    arrays = _empty_arrays(
        [[_Level(m.grid, m.window) for m in pyramid] for pyramid in pyramids],
        [palette.size for palette in palettes],
        ks={m.k for m in everything},
        class_counts={m.num_classes for m in everything},
        has_normalizer=all(m.log_normalizer is not None for m in everything),
    )
    for i, (pyramid, palette) in enumerate(zip(pyramids, palettes)):
        arrays.palette[i, : palette.size] = palette
        for j, label_map in enumerate(pyramid):
            rows, cols = label_map.grid
            arrays.indices[i, j, :, :rows, :cols] = np.searchsorted(palette, label_map.classes)
            arrays.scores[i, j, :, :rows, :cols] = label_map.scores
            if arrays.log_normalizer is not None and label_map.log_normalizer is not None:
                arrays.log_normalizer[i, j, :rows, :cols] = label_map.log_normalizer
    return arrays


class _Level(NamedTuple):
    grid: tuple[int, int]
    window: tuple[float, float, float, float]


class _Steps(NamedTuple):
    """How 8-bit scores are spaced, and 8-bit residuals: the mass outside a cell's top-k."""

    lowest_top: float
    top: float
    gap: float
    lowest_odds: float
    odds: float
    """Of log(residual / (1 - residual)): a small residual is as exact as a large one."""

    @staticmethod
    def of(levels: Sequence[LabelMap]) -> "_Steps":
        """Spread 255 steps over what these maps hold, or fewer that are wide enough."""
        tops = np.concatenate([level.scores[0].ravel() for level in levels]).astype(np.float32)
        gaps = [-np.diff(level.scores.astype(np.float32), axis=0).ravel() for level in levels]
        odds = [_log_odds(level).ravel() for level in levels if level.log_normalizer is not None]
        lowest_top, top = _spread(tops)
        lowest_odds, step = _spread(np.concatenate(odds)) if odds else (0.0, 0.0)
        widest = max(float(gap.max(initial=0)) for gap in gaps)
        top, gap = max(top, _SMALLEST_STEP), max(widest / 255, _SMALLEST_STEP)
        return _Steps(lowest_top, top, gap, lowest_odds, step)

    def planes(self, level: LabelMap) -> list[bytes]:
        """Round to steps, each rank against the rounded one before, so that errors do not add."""
        scores = level.scores.astype(np.float32)
        rounded = _to_steps(scores[0] - np.float32(self.lowest_top), self.top)
        planes = [rounded.tobytes()]
        reached = np.float32(self.lowest_top) + np.float32(self.top) * rounded
        for rank in range(1, level.k):
            rounded = _to_steps(reached - scores[rank], self.gap)
            rounded[level.classes[rank] == level.classes[rank - 1]] = 0  # an empty rank repeats
            reached = reached - np.float32(self.gap) * rounded
            planes.append(rounded.tobytes())
        blocks = [b"".join(planes)]
        if level.log_normalizer is not None:
            odds = _log_odds(level) - np.float32(self.lowest_odds)
            blocks.append(_to_steps(odds, self.odds).tobytes())
        return blocks


class _Kind(NamedTuple):
    """What a header says about the arrangement of the bytes; many maps of a set share it."""

    flags: int
    k: int
    num_classes: int
    levels: tuple[_Level, ...]
    starts: tuple[int, ...]
    """Of each level's uncompressed bytes, behind the palette; then where the last one's end."""

    @property
    def has_normalizer(self) -> bool:
        return bool(self.flags & _HAS_NORMALIZER)

    @property
    def has_empty_ranks(self) -> bool:
        return bool(self.flags & _EMPTY_RANKS)

    @property
    def code_bytes(self) -> int:
        return _code_bytes(self.flags)


class _Header(NamedTuple):
    """One image's maps, checked but for the compressed frame."""

    kind: _Kind
    palette_size: int
    steps: _Steps | None
    """Of 8-bit scores."""
    frame: memoryview


class _Unpacked(NamedTuple):
    """The same with the frame uncompressed."""

    kind: _Kind
    palette_size: int
    steps: _Steps | None
    payload: bytes


def _code_bytes(flags: int) -> int:
    return 2 if flags & _WIDE_CODES else 1


def _crc(header: bytes, body: bytes | memoryview) -> int:
    """CRC-32 of everything but itself, so that a flipped bit is found wherever it is."""
    return zlib.crc32(body, zlib.crc32(header[:_CRC_AT]))


@lru_cache(maxsize=1024)
def _read_kind(head: bytes, levels: bytes) -> _Kind:
    """Read what stands in a header between its magic and the palette size, and behind it."""
    _, flags, num_levels, k, last_class = _HEAD.unpack(head)
    if flags & ~(_HAS_NORMALIZER | _WIDE_CODES | _BYTE_SCORES | _EMPTY_RANKS):
        raise LabelMapError(f"flags {flags:#x} are not known to version {VERSION}")
    score_bytes = 1 if flags & _BYTE_SCORES else 2
    per_cell = k * (_code_bytes(flags) + score_bytes) + score_bytes * (flags & _HAS_NORMALIZER)
    found, sizes = [], [0]
    for i in range(num_levels):
        rows, cols, *window = _LEVEL.unpack_from(levels, i * _LEVEL.size)
        _check_counts(k, rows, cols, last_class + 1)
        _check_window(tuple(window))
        found.append(_Level((rows, cols), tuple(window)))
        sizes.append(rows * cols * per_cell)
    return _Kind(flags, k, last_class + 1, tuple(found), tuple(accumulate(sizes)))


def _read_header(data: bytes) -> _Header:
    """Check checksum and header."""
    if len(data) < _HEADER.size:
        raise LabelMapError(f"{len(data)} bytes are too few for a header of {_HEADER.size}")
    if not data.startswith(MAGIC):
        raise LabelMapError(f"starts with {data[:4]!r}, a label map with {MAGIC!r}")
    version, flags, num_levels = data[_VERSION_AT : _VERSION_AT + 3]
    if version != VERSION:
        raise LabelMapError(f"version {version} is not known; this program reads {VERSION}")
    view = memoryview(data)
    palette_size, crc = _PALETTE_AND_CRC.unpack_from(data, _PALETTE_AT)
    if _crc(data, view[_HEADER.size :]) != crc:
        raise LabelMapError("the checksum does not fit: the bytes are damaged or cut short")
    steps_at = _HEADER.size + num_levels * _LEVEL.size
    frame_at = steps_at + (_STEPS.size if flags & _BYTE_SCORES else 0)
    if num_levels == 0 or len(data) < frame_at:
        raise LabelMapError(f"{num_levels} levels do not fit in {len(data) - _HEADER.size} bytes")
    kind = _read_kind(data[_VERSION_AT:_PALETTE_AT], data[_HEADER.size : steps_at])
    steps = _read_steps(data, steps_at) if flags & _BYTE_SCORES else None
    if not (1 if kind.has_empty_ranks else kind.k) <= palette_size <= kind.num_classes:
        raise LabelMapError(f"a palette of {palette_size}, k {kind.k}, {kind.num_classes} classes")
    return _Header(kind, palette_size, steps, view[frame_at:])


def _read_steps(data: bytes, offset: int) -> _Steps:
    steps = _Steps(*_STEPS.unpack_from(data, offset))
    if not all(map(math.isfinite, steps)) or min(steps.top, steps.gap, steps.odds) < 0:
        raise LabelMapError(f"{steps} are no steps of 8-bit scores")
    return steps


def _unpack(header: _Header, decompressor: zstandard.ZstdDecompressor) -> _Unpacked:
    """Decompress; never allocates beyond the header's claim."""
    kind, palette_size, steps, frame = header
    num_bytes = 4 * palette_size + kind.starts[-1]
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise LabelMapError(
            f"unpacks to {num_bytes} bytes; at most {MAX_PAYLOAD_BYTES} are allowed"
        )
    try:
        # A size in the frame's own header would override max_output_size.
        if zstandard.frame_content_size(frame) not in (-1, num_bytes):
            raise LabelMapError("the compressed frame claims another size than the header")
        payload = decompressor.decompress(
            frame,
            max_output_size=num_bytes,
            allow_extra_data=False,
        )
    except (zstandard.ZstdError, MemoryError) as error:
        raise LabelMapError(_why_unreadable(frame, error)) from error
    if len(payload) != num_bytes:
        raise LabelMapError(f"{len(payload)} bytes unpacked, {num_bytes} expected")
    return _Unpacked(kind, palette_size, steps, payload)


def _why_unreadable(frame: memoryview, error: Exception) -> str:
    try:
        dict_id = zstandard.get_frame_parameters(frame).dict_id
    except zstandard.ZstdError:
        dict_id = 0
    if not dict_id or "dictionary" not in str(error).lower():
        return f"the compressed frame cannot be read: {error}"
    return (
        f"the compressed frame needs zstd dictionary {dict_id}: give the one that is stored in the "
        "index.json of the label set, or data set, that the map belongs to"
    )


def _read_together(
    headers: list[_Header], decompressor: zstandard.ZstdDecompressor
) -> PaletteArrays:
    kinds = [header.kind for header in headers]
    arrays = _empty_arrays(
        [kind.levels for kind in kinds],
        [header.palette_size for header in headers],
        ks={kind.k for kind in kinds},
        class_counts={kind.num_classes for kind in kinds},
        has_normalizer=all(kind.has_normalizer for kind in kinds),
    )
    for start in range(0, len(headers), _MAPS_AT_ONCE):
        end = min(start + _MAPS_AT_ONCE, len(headers))
        images = [_unpack(header, decompressor) for header in headers[start:end]]
        _fill_palettes(arrays.palette[start:end], images)
        for level in range(len(kinds[0].levels)):
            _fill_level(arrays, slice(start, end), level, images)
    return arrays


def _fill_palettes(palettes: Int64[np.ndarray, "b u"], images: Sequence[_Unpacked]) -> None:
    """Read all palettes at once: differences, in planes of bytes, most significant first."""
    b, u = palettes.shape
    parts = [
        image.payload[start : start + image.palette_size].ljust(u, b"\0")
        for image in images
        for start in range(0, 4 * image.palette_size, image.palette_size)
    ]
    steps = _scratch.take("steps", (b, u), np.uint32)
    _join_planes(np.frombuffer(b"".join(parts), np.uint8).reshape(b, 4, u), steps)
    np.cumsum(steps, axis=1, out=palettes)
    sizes = np.array([image.palette_size for image in images], np.int32)
    num_classes = np.array([image.kind.num_classes for image in images])
    ascending = np.count_nonzero(steps[:, 1:]) == sizes.sum() - b
    if not ascending or (palettes[:, -1] >= num_classes).any():
        raise LabelMapError("the palette does not ascend below num_classes")
    palettes *= np.arange(u, dtype=np.int32) < sizes[:, None]


def _fill_level(
    arrays: PaletteArrays, part: slice, level: int, images: Sequence[_Unpacked]
) -> None:
    """Decode one level of a part of the images and write it into the batch."""
    # Maps of one shape are read together; the neighbour codes of all shapes are resolved at once.
    groups: dict[tuple, list[int]] = {}
    for position, image in enumerate(images):
        kind = (image.kind.flags & (_HAS_NORMALIZER | _BYTE_SCORES), image.kind.levels[level].grid)
        groups.setdefault(kind, []).append(position)
    first_indices = _first_indices(images)
    if len(groups) == 1:
        codes = _codes(images, level)
    else:
        shape = (len(images), images[0].kind.k, *arrays.grids[part, level].max(axis=0).tolist())
        codes = _scratch.take("padded codes", shape, np.uint16)
        codes[:] = first_indices[:, None, None, None]
        for (_, (rows, cols)), positions in groups.items():
            codes[positions, :, :rows, :cols] = _codes([images[p] for p in positions], level)
    indices = _resolve(codes, first_indices)
    _check_indices(indices, images)
    arrays.indices[part, level, :, : indices.shape[2], : indices.shape[3]] = indices
    for (_, (rows, cols)), positions in groups.items():
        which = positions if len(groups) > 1 else slice(None)
        own = indices[which, :, :rows, :cols]
        scores, normalizer = _scores([images[p] for p in positions], level, own)
        _check_distinct(own, scores)
        arrays.scores[part, level][which, :, :rows, :cols] = scores
        if arrays.log_normalizer is not None:
            arrays.log_normalizer[part, level][which, :rows, :cols] = normalizer


def _codes(images: Sequence[_Unpacked], level: int) -> UInt16[np.ndarray, "b k rows cols"]:
    """Read the neighbour codes of maps of one shape; repeats of a rank become what they repeat."""
    k, (rows, cols) = images[0].kind.k, images[0].kind.levels[level].grid
    num_codes = k * rows * cols
    code_bytes = max(image.kind.code_bytes for image in images)
    parts = []
    for image in images:
        start = 4 * image.palette_size + image.kind.starts[level]
        if image.kind.code_bytes < code_bytes:
            parts.append(bytes(num_codes))
        parts.append(image.payload[start : start + num_codes * image.kind.code_bytes])
    planes = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, code_bytes, num_codes)
    codes = _scratch.take("codes", (len(images), num_codes), np.uint16)
    _join_planes(planes, codes)
    codes = codes.reshape(-1, k, rows, cols)
    may_repeat = np.array([image.kind.has_empty_ranks for image in images])
    if may_repeat.any():
        repeats = (codes == 2 * k) & may_repeat[:, None, None, None]
        if repeats[:, 0].any():
            raise LabelMapError("a cell without any class")
        for rank in range(1, k):
            np.copyto(codes[:, rank], codes[:, rank - 1], where=repeats[:, rank])
    return codes


def _first_indices(images: Sequence[_Unpacked]) -> UInt16[np.ndarray, " b"]:
    """The code that stands for the first class of the palette, of each map."""
    codes = [2 * image.kind.k + image.kind.has_empty_ranks for image in images]
    return np.array(codes, np.uint16)


def _check_indices(
    indices: UInt16[np.ndarray, "b k rows cols"], images: Sequence[_Unpacked]
) -> None:
    sizes = np.array([image.palette_size for image in images])
    if (indices.reshape(len(images), -1).max(axis=1) >= sizes).any():
        raise LabelMapError("a palette index lies beyond its palette")


def _scores(
    images: Sequence[_Unpacked], level: int, indices: UInt16[np.ndarray, "b k rows cols"]
) -> tuple[Float16[np.ndarray, "b k rows cols"], Float16[np.ndarray, "b rows cols"] | None]:
    """Read scores and normaliser of several maps of one shape."""
    parts = []
    for image in images:
        start, end = image.kind.starts[level : level + 2]
        start += indices[0].size * image.kind.code_bytes
        parts.append(image.payload[4 * image.palette_size + start : 4 * image.palette_size + end])
    table = np.frombuffer(b"".join(parts), np.uint8).reshape(len(images), -1)
    steps = [image.steps for image in images if image.steps is not None]
    if steps:
        return _read_byte_scores(table, indices, images[0].kind.has_normalizer, steps)
    return _read_scores(table, indices.shape, images[0].kind.has_normalizer)


def _empty_arrays(
    pyramids: Sequence[Sequence[_Level]],
    palette_sizes: list[int],
    *,
    ks: set[int],
    class_counts: set[int],
    has_normalizer: bool,
) -> PaletteArrays:
    num_levels = {len(pyramid) for pyramid in pyramids}
    if max(len(ks), len(class_counts), len(num_levels)) > 1:
        raise LabelMapError(
            f"maps of different kinds in one batch: k {sorted(ks)}, "
            f"classes {sorted(class_counts)}, levels {sorted(num_levels)}"
        )
    distinct = {id(pyramid): pyramid for pyramid in pyramids}  # most often all are one object
    numbers = {key: number for number, key in enumerate(distinct)}
    which = [numbers[id(pyramid)] for pyramid in pyramids]
    grids = np.array([[m.grid for m in ms] for ms in distinct.values()], np.int64)
    windows = np.array([[m.window for m in ms] for ms in distinct.values()], np.float32)[which]
    is_padded = (grids != grids.max(axis=(0, 1))).any()
    new = np.zeros if is_padded else np.empty  # without padding all is written to
    grids = grids[which]
    padded = (*grids.shape[:2], ks.pop(), *grids.max(axis=(0, 1)).tolist())
    return PaletteArrays(
        palette=np.zeros((len(pyramids), max(palette_sizes)), np.int64),
        palette_sizes=np.array(palette_sizes, np.int64),
        indices=new(padded, np.int32),
        scores=new(padded, np.float16),
        log_normalizer=new(padded[:2] + padded[3:], np.float16) if has_normalizer else None,
        grids=grids,
        windows=windows,
        num_classes=class_counts.pop(),
    )


def _monotone(values: Float16[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """Float16 as integers in the same order, so that near values have small differences."""
    bits = (values + np.float16(0)).view(np.uint16)  # + 0 turns -0.0 into 0.0: one code for both
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)


def _from_monotone(codes: UInt16[np.ndarray, "*shape"]) -> Float16[np.ndarray, "*shape"]:
    """Undo _monotone in place, by shifts: a table of 65,536 would not stay in a core's cache."""
    is_positive = _scratch.take("signs", codes.shape, np.int16)
    np.right_shift(codes.view(np.int16), 15, out=is_positive)  # all bits or none
    is_positive &= 0x7FFF
    np.invert(codes, out=codes)
    codes ^= is_positive.view(np.uint16)
    return codes.view(np.float16)


def _score_planes(level: LabelMap) -> list[bytes]:
    """The top-1, how far each rank lies below the one before, the normaliser above the top-1."""
    monotone = _monotone(level.scores)
    planes = _planes(np.concatenate([monotone[:1], monotone[:-1] - monotone[1:]]), 2)
    if level.log_normalizer is not None:
        planes += _planes(_monotone(level.log_normalizer) - monotone[0], 2)  # modulo 2**16
    return planes


def _read_scores(
    table: UInt8[np.ndarray, "b bytes"], shape: tuple[int, ...], has_normalizer: bool
) -> tuple[Float16[np.ndarray, "b k rows cols"], Float16[np.ndarray, "b rows cols"] | None]:
    """Undo _score_planes for several maps of one (b, k, rows, cols)."""
    b, num_cells = shape[0], math.prod(shape[2:])
    num_scores = shape[1] * num_cells
    monotone = _scratch.take("scores", (b, num_scores), np.uint16)
    _join_planes(table[:, : 2 * num_scores].reshape(b, 2, num_scores), monotone)
    monotone = monotone.reshape(shape)
    for rank in range(1, shape[1]):
        np.subtract(monotone[:, rank - 1], monotone[:, rank], out=monotone[:, rank])
    if (monotone[:, 1:] > monotone[:, :-1]).any():  # wrapped around
        raise LabelMapError("a score falls below the lowest float16")
    _check_finite(monotone[:, 0], "scores")
    _check_finite(monotone[:, -1], "scores")
    total = None
    if has_normalizer:
        total = _scratch.take("normalizers", (b, num_cells), np.uint16)
        _join_planes(table[:, 2 * num_scores :].reshape(b, 2, num_cells), total)
        total = total.reshape(b, *shape[2:])
        total += monotone[:, 0]
        _check_finite(total, "log_normalizer")
        total = _from_monotone(total)
    return _from_monotone(monotone), total


def _read_byte_scores(
    table: UInt8[np.ndarray, "b bytes"],
    indices: UInt16[np.ndarray, "b k rows cols"],
    has_normalizer: bool,
    steps: list[_Steps],
) -> tuple[Float16[np.ndarray, "b k rows cols"], Float16[np.ndarray, "b rows cols"] | None]:
    """Undo _Steps.planes for several maps of the shape of their indices."""
    per_map = np.array(steps, np.float32).T.reshape(5, -1, 1, 1, 1)
    lowest_top, top_step, gap_step, lowest_odds, odds_step = per_map
    num_scores = math.prod(indices.shape[1:])
    counts = table[:, :num_scores].reshape(indices.shape)
    top = lowest_top + top_step * counts[:, :1]
    below_top = gap_step * np.cumsum(counts[:, 1:], axis=1, dtype=np.float32)
    scores = np.concatenate([top, top - below_top], axis=1)
    _check_range(scores, "scores")
    if not has_normalizer:
        return scores.astype(np.float16), None
    over = table[:, num_scores:].reshape(top.shape)
    # log_normalizer = log(kept mass) - log(1 - residual), and -log(1 - sigmoid(x)) = log(1 + e^x).
    odds = np.clip(lowest_odds + odds_step * over, -_MAX_ODDS, _MAX_ODDS)
    kept = np.where(_is_first(indices), np.exp(scores - top), 0).sum(axis=1, keepdims=True)
    normalizer = (top + np.log(kept) + np.logaddexp(0, odds))[:, 0]
    _check_range(normalizer, "log_normalizer")
    return scores.astype(np.float16), normalizer.astype(np.float16)


def _log_odds(level: LabelMap) -> Float32[np.ndarray, "rows cols"]:
    """Log of residual / (1 - residual), the residual being the mass outside the top-k."""
    assert level.log_normalizer is not None
    log_probabilities = level.scores.astype(np.float32) - level.log_normalizer
    first = _is_first(level.classes[None])[0]
    kept = np.where(first, np.exp(log_probabilities), 0).sum(axis=0)
    residual = np.clip(1 - kept, 1e-4, 1 - 1e-4)
    return np.log(residual / (1 - residual))


def _is_first(classes: Shaped[np.ndarray, "b k rows cols"]) -> Bool[np.ndarray, "b k rows cols"]:
    """Mark the ranks that do not repeat the one before."""
    first = np.ones(classes.shape, bool)
    first[:, 1:] = classes[:, 1:] != classes[:, :-1]
    return first


def _spread(values: Float32[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the lowest value and the width of 255 steps up to the highest."""
    lowest, highest = float(values.min()), float(values.max())
    return lowest, (highest - lowest) / 255


def _to_steps(values: Float32[np.ndarray, "..."], step: float) -> UInt8[np.ndarray, "..."]:
    return np.clip(np.rint(values / (step or 1.0)), 0, 255).astype(np.uint8)


def _neighbor_codes(
    indices: Int64[np.ndarray, "k rows cols"], empty_ranks: bool
) -> Int64[np.ndarray, "k rows cols"]:
    """Name each class by a neighbour's rank where one has it, else by its palette index.

    0 … k-1: the class at that rank in the cell above; k … 2k-1: in the cell to the left; from 2k
    on: palette index + 2k. With empty_ranks, 2k says that the rank repeats the one before, and
    palette indices start at 2k + 1.
    """
    k = indices.shape[0]
    codes = indices + 2 * k + empty_ranks
    for rank in reversed(range(k)):
        left = indices[rank, :, :-1] == indices[:, :, 1:]
        codes[:, :, 1:][left] = k + rank
    for rank in reversed(range(k)):
        above = indices[rank, :-1] == indices[:, 1:]
        codes[:, 1:][above] = rank
    if empty_ranks:
        codes[1:][indices[1:] == indices[:-1]] = 2 * k
    return codes


def _resolve(
    codes: UInt16[np.ndarray, "b k rows cols"], first_indices: UInt16[np.ndarray, " b"]
) -> UInt16[np.ndarray, "b k rows cols"]:
    """Palette indices from neighbour codes and from those of indices, which begin at the given.

    A cell needs those above and to the left, so all cells of a diagonal can be resolved at once,
    in all maps. With the maps along the last axis each step runs through contiguous memory.
    """
    b, k, rows, cols = codes.shape
    by_cell = _scratch.take("cells", (k * rows * cols, b), np.uint16)
    by_cell[:] = codes.reshape(b, -1).T
    grid = by_cell.reshape(k, rows * cols, b)
    left_border = grid[:, ::cols] - np.uint16(k)  # below k wraps around to the largest
    if (grid[:, :cols] < k).any() or (left_border < k).any():
        raise LabelMapError("a cell at the border names a neighbour outside the grid")
    # What a code may name: for each row of the present diagonal the ranks above, then those to the
    # left. Codes of indices point behind them, at a 0, so that the larger of both is the answer.
    named = _scratch.take("named", (2 * k * rows * b + 1,), np.uint16)
    named[-1] = 0
    above, left = named[:-1].reshape(2, k, rows, b)
    place = np.arange(rows * b).reshape(rows, b)
    source = _scratch.take("source", (k * min(rows, cols) * b,), np.intp)
    for diagonal in range(rows + cols - 1):
        top, end = max(0, diagonal - cols + 1), min(diagonal + 1, rows)
        cell = top * cols + diagonal - top
        now = grid[:, cell : cell + (end - top - 1) * (cols - 1) + 1 : max(cols - 1, 1)]
        places = source[: now.size].reshape(now.shape)
        np.multiply(now, rows * b, out=places, dtype=np.intp)
        places += place[top:end]
        np.maximum(now, named.take(places, mode="clip"), out=now)
        left[:, top:end] = now
        above[:, top + 1 : end + 1] = now[:, : rows - top - 1]
    indices = _scratch.take("indices", (b, k * rows * cols), np.uint16)
    for start in range(0, indices.shape[1], 64):  # all at once, each write would miss the cache
        indices[:, start : start + 64] = by_cell[start : start + 64].T
    indices -= first_indices[:, None]
    return indices.reshape(codes.shape)


def _planes(values: np.ndarray, num_bytes: int) -> list[bytes]:
    """Split integers into planes of bytes, most significant first."""
    raw = np.ascontiguousarray(values).astype(f"<u{num_bytes}").view(np.uint8)
    table = raw.reshape(-1, num_bytes)
    return [table[:, i].tobytes() for i in reversed(range(num_bytes))]


def _join_planes(planes: UInt8[np.ndarray, "b planes n"], values: UInt[np.ndarray, "b n"]) -> None:
    """Undo _planes, for several maps."""
    values[:] = planes[:, 0]
    for i in range(1, planes.shape[1]):
        values <<= 8
        values |= planes[:, i]


class _Scratch(threading.local):
    """Memory for what lies between bytes and arrays, kept for the next call.

    Taking it anew for each batch would cost as much again: the system clears every page.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, UInt8[np.ndarray, " n"]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Return an array with whatever it held before; the next of this name overwrites it."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < num_bytes:
            buffer = np.empty(num_bytes, np.uint8)
            if num_bytes <= _MAX_KEPT_BYTES:
                self._buffers[name] = buffer
        return buffer[:num_bytes].view(dtype).reshape(shape)


_scratch = _Scratch()


def _compress(blocks: list[bytes], dictionary: bytes | None) -> bytes:
    """One zstd frame with a block per plane: each gets the Huffman table that fits it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _ZSTD_LEVEL,
        # Fewer matches than a level's own strategy finds, and longer ones: 2 % smaller.
        strategy=zstandard.STRATEGY_LAZY,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=True,
    )
    compressor = zstandard.ZstdCompressor(
        compression_params=parameters, dict_data=_zstd_dictionary(dictionary)
    ).compressobj()
    frame = b""
    for block in blocks:
        frame += compressor.compress(block)
        frame += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return frame + compressor.flush()


def _decompressor(dictionary: bytes | None) -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(
        max_window_size=_MAX_WINDOW_BYTES, dict_data=_zstd_dictionary(dictionary)
    )


def _zstd_dictionary(dictionary: bytes | None) -> zstandard.ZstdCompressionDict | None:
    if dictionary is None:
        return None
    return zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT)


def _check_levels(levels: Sequence[LabelMap]) -> LabelMap:
    if not 1 <= len(levels) <= 255:
        raise LabelMapError(f"{len(levels)} levels; 1 to 255 can be stored")
    kinds = {(m.k, m.num_classes, m.log_normalizer is not None) for m in levels}
    if len(kinds) != 1:
        raise LabelMapError(f"levels differ in (k, num_classes, has log_normalizer): {kinds}")
    densities = [math.prod(m.grid) / _area(m.window) for m in levels]
    if any(finer <= coarser for coarser, finer in zip(densities, densities[1:])):
        raise LabelMapError(
            f"levels of {[m.grid for m in levels]} cells; each must be finer than the one before"
        )
    return levels[0]


def _area(window: tuple[float, ...]) -> float:
    return (window[2] - window[0]) * (window[3] - window[1])


def _check_counts(k: int, rows: int, cols: int, num_classes: int) -> None:
    if not (1 <= k <= 255 and 1 <= rows <= 65535 and 1 <= cols <= 65535):
        raise LabelMapError(f"k {k}, rows {rows}, cols {cols}: each from 1, k to 255, else 65535")
    if not k <= num_classes <= 2**32:
        raise LabelMapError(f"{num_classes} classes; k = {k} to 2**32 are allowed")


def _check_window(window: tuple[float, ...]) -> None:
    x0, y0, x1, y1 = window
    if not (all(map(math.isfinite, window)) and x0 < x1 and y0 < y1):
        raise LabelMapError(f"window {window} is not (x0, y0, x1, y1) with x0 < x1 and y0 < y1")


def _check_scores(monotone: UInt16[np.ndarray, "k rows cols"]) -> None:
    if (monotone[:-1] < monotone[1:]).any():
        raise LabelMapError("scores do not descend along k")
    _check_finite(monotone[[0, -1]], "scores")


def _check_finite(monotone: UInt16[np.ndarray, "..."], name: str) -> None:
    if ((monotone < 0x0400) | (monotone > 0xFBFF)).any():  # the float16 codes of ±65504
        raise LabelMapError(f"{name} holds a value that is not finite")


def _check_range(values: Float32[np.ndarray, "..."], name: str) -> None:
    if not (np.abs(values) <= 65504).all():
        raise LabelMapError(f"{name} holds a value beyond float16")


def _check_distinct(
    classes: Shaped[np.ndarray, "b k rows cols"], scores: Float16[np.ndarray, "b k rows cols"]
) -> None:
    """Check that no cell names a class twice, but for repeats of its last class and score."""
    distinct = classes
    repeats = classes[:, 1:] == classes[:, :-1]
    if repeats.any():
        repeats &= scores[:, 1:] == scores[:, :-1]
        if (repeats[:, :-1] & ~repeats[:, 1:]).any():
            raise LabelMapError("a cell goes on after repeating a class")
        own_number = -np.arange(1, classes.shape[1]).reshape(-1, 1, 1)
        distinct = classes.astype(np.int64)
        distinct[:, 1:] = np.where(repeats, own_number, distinct[:, 1:])
    for distance in range(1, classes.shape[1]):
        if (distinct[:, distance:] == distinct[:, :-distance]).any():
            raise LabelMapError("a cell names one class twice")
