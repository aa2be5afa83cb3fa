import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from conftest import random_map
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.labeler import label_map as module
from tokenlabel.labeler.label_map import (
    LabelMap,
    LabelMapError,
    check,
    decode,
    decode_batch,
    encode,
    keep_mass,
    to_arrays,
    train_dictionary,
)


@st.composite
def label_maps(draw: st.DrawFn) -> LabelMap:
    """Draw maps of every kind, with the extremes of float16 and uint32 among them."""
    k = draw(st.integers(1, 6))
    num_classes = draw(st.sampled_from([k, k + 1, 1000, 100_000, 2**32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    near = draw(st.booleans())  # few distinct classes: neighbour codes and small palettes
    pool = rng.choice(min(num_classes, k + 3 if near else 3000), size=grid + (k,))
    classes = np.moveaxis(np.sort(pool, -1), -1, 0)
    for rank in range(1, k):  # make classes of a cell distinct
        classes[rank] = np.maximum(classes[rank], classes[rank - 1] + 1)
    classes = np.minimum(classes, num_classes - k + np.arange(k)[:, None, None])
    if draw(st.booleans()):
        classes = classes + (num_classes - 1 - classes.max())
    bits = rng.integers(0, 2**16, size=(k, *grid), dtype=np.uint16)
    scores = bits.view(np.float16)
    scores = np.where(np.isfinite(scores), scores, np.float16(65504))
    normalizer = rng.standard_normal(grid).astype(np.float16) * 9
    x0, x1 = sorted(rng.choice(100, 2, replace=False) / 64)
    return LabelMap(
        scores=-np.sort(-scores, axis=0),
        classes=classes.astype(np.uint32),
        num_classes=num_classes,
        log_normalizer=normalizer if draw(st.booleans()) else None,
        window=(x0, 0.25, x1, 0.75),
    )


@settings(max_examples=300)
@given(label_maps())
def test_decode_gives_back_what_was_encoded(label_map: LabelMap):
    (read,) = decode(encode(label_map))
    assert read.equals(label_map)


def keep_mass_slowly(label_map: LabelMap, mass: float) -> LabelMap:
    """Drop classes behind the given mass cell by cell."""
    assert label_map.log_normalizer is not None
    scores, classes = label_map.scores.copy(), label_map.classes.copy()
    for r in range(label_map.grid[0]):
        for c in range(label_map.grid[1]):
            p = np.exp(scores[:, r, c].astype(float) - float(label_map.log_normalizer[r, c]))
            last = min(int(np.searchsorted(np.cumsum(p), mass)), label_map.k - 1)
            scores[last + 1 :, r, c] = scores[last, r, c]
            classes[last + 1 :, r, c] = classes[last, r, c]
    return replace(label_map, scores=scores, classes=classes)


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 1.0])
def test_keep_mass_drops_what_a_loop_over_cells_drops(mass: float):
    label_map = random_map(np.random.default_rng(12), grid=(7, 8), num_classes=60)
    assert keep_mass(label_map, mass).equals(keep_mass_slowly(label_map, mass))


def test_cells_may_keep_fewer_classes_and_then_take_fewer_bytes():
    label_map = random_map(np.random.default_rng(9), grid=(12, 12), num_classes=200, spread=6.0)
    fewer = keep_mass(label_map, 0.7)
    assert (fewer.classes[1:] == fewer.classes[:-1]).any()
    data = encode(fewer)
    assert decode(data)[0].equals(fewer)
    assert len(data) < 0.8 * len(encode(label_map))
    batch, expected = decode_batch([data, encode(label_map)]), to_arrays([fewer, label_map])
    for name, got, want in zip(batch._fields, batch, expected):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_a_class_that_comes_back_after_another_is_refused():
    scores = np.array([3, 2, 2, 1], np.float16).reshape(4, 1, 1)
    for classes in ([1, 2, 1, 3], [1, 1, 2, 3], [1, 2, 2, 3]):
        with pytest.raises(LabelMapError, match="twice|goes on after repeating"):
            LabelMap(
                scores=scores,
                classes=np.array(classes, np.uint32).reshape(4, 1, 1),
                num_classes=9,
            )


def assert_residuals_agree(read: LabelMap, label_map: LabelMap):
    """To 5 %, and to one float16 step of the normaliser, which neither map can tell apart."""
    assert label_map.log_normalizer is not None
    off = np.abs(residual_of(read) - residual_of(label_map))
    float16_step = np.spacing(np.abs(label_map.log_normalizer)).astype(float)
    assert (off <= 0.05 * residual_of(label_map).clip(0) + 1.2 * float16_step).all()


def residual_of(label_map: LabelMap) -> np.ndarray:
    """The mass outside a cell's kept classes, each counted once."""
    assert label_map.log_normalizer is not None
    p = np.exp(label_map.scores.astype(float) - label_map.log_normalizer)
    p[1:][label_map.classes[1:] == label_map.classes[:-1]] = 0
    return 1 - p.sum(0)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_eight_bit_scores_are_within_half_a_step_and_stay_so(seed: int, normalizer: bool):
    rng = np.random.default_rng(seed)
    label_map = random_map(rng, grid=(9, 8), num_classes=99, normalizer=normalizer, spread=4.0)
    (read,) = decode(encode(label_map, score_bits=8))
    np.testing.assert_array_equal(read.classes, label_map.classes)
    scores = label_map.scores.astype(float)
    widest = max(np.ptp(scores[0]), -np.diff(scores, axis=0).min())
    assert np.abs(read.scores.astype(float) - scores).max() <= max(widest / 255, 0.09) / 2 + 0.02
    if normalizer:
        assert_residuals_agree(read, label_map)
    assert len(encode(label_map, score_bits=8)) < len(encode(label_map))


def test_eight_bit_scores_decode_in_batches_and_with_equal_scores():
    rng = np.random.default_rng(10)
    maps = [random_map(rng, grid=(4, 5)), random_map(rng, grid=(4, 5), spread=0.0)]
    data = [encode(m, score_bits=8) for m in maps]
    batch, expected = decode_batch(data), to_arrays([decode(d)[0] for d in data])
    for name, got, want in zip(batch._fields, batch, expected):
        np.testing.assert_array_equal(got, want, err_msg=name)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.99))
def test_eight_bit_scores_and_fewer_classes_go_together(seed: int, mass: float):
    rng = np.random.default_rng(seed)
    fewer = keep_mass(random_map(rng, grid=(9, 8), num_classes=99, spread=4.0), mass)
    (read,) = decode(encode(fewer, score_bits=8))
    np.testing.assert_array_equal(read.classes, fewer.classes)
    assert_residuals_agree(read, fewer)


def test_a_dictionary_makes_maps_smaller_and_reading_needs_it():
    rng = np.random.default_rng(11)
    maps = [random_map(rng, grid=(8, 8), num_classes=30) for _ in range(200)]
    plain = [encode(m) for m in maps]
    dictionary = train_dictionary(plain)
    packed = encode(maps[0], dictionary=dictionary)
    assert len(packed) < len(plain[0])
    assert decode(packed, dictionary=dictionary)[0].equals(maps[0])
    batch = decode_batch([packed], dictionary=dictionary)
    np.testing.assert_array_equal(batch.scores[0, 0], maps[0].scores)
    with pytest.raises(LabelMapError, match="compressed frame"):
        decode(packed)
    with pytest.raises(LabelMapError, match="no dictionary can be trained on 1 label maps"):
        train_dictionary(plain[:1])


def test_the_check_finds_every_flipped_byte():
    data = encode(random_map(np.random.default_rng(13), grid=(3, 3)))
    check(data)
    for position in range(len(data)):
        with pytest.raises(LabelMapError):
            check(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


def test_several_levels_of_one_image_keep_their_grids_and_windows():
    rng = np.random.default_rng(0)
    levels = [
        random_map(rng, grid=(4, 6)),
        random_map(rng, grid=(9, 13), window=(0.1, 0.2, 0.9, 0.7)),
    ]
    read = decode(encode(levels))
    assert [level.grid for level in read] == [(4, 6), (9, 13)]
    assert all(a.equals(b) for a, b in zip(read, levels))


def test_batch_decoding_equals_decoding_one_by_one():
    rng = np.random.default_rng(1)
    maps = [
        random_map(rng, grid=grid, num_classes=600, normalizer=True)
        for grid in [(18, 18), (16, 21), (18, 18), (3, 40)]
    ]
    batch, expected = decode_batch([encode(m) for m in maps]), to_arrays(maps)
    for name, got, want in zip(batch._fields, batch, expected):
        np.testing.assert_array_equal(got, want, err_msg=name)
    for i, m in enumerate(maps):
        rows, cols = m.grid
        read = batch.palette[i][batch.indices[i, 0, :, :rows, :cols]]
        np.testing.assert_array_equal(read, m.classes)


def test_pyramids_decode_in_batches_too():
    rng = np.random.default_rng(8)
    pyramids = [
        [random_map(rng, grid=(4, 6)), random_map(rng, grid=(9, 13))],
        [random_map(rng, grid=(5, 5)), random_map(rng, grid=(4, 6), window=(0.0, 0.0, 0.5, 0.5))],
    ]
    batch, expected = decode_batch([encode(levels) for levels in pyramids]), to_arrays(pyramids)
    for name, got, want in zip(batch._fields, batch, expected):
        np.testing.assert_array_equal(got, want, err_msg=name)
    with pytest.raises(LabelMapError, match=r"levels \[1, 2\]"):
        decode_batch([encode(pyramids[0]), encode(pyramids[0][0])])


@pytest.mark.parametrize("grids", [[(4, 6), (9, 13)], [(5, 5), (7, 6)]])
def test_padding_is_zero_whatever_the_memory_held(
    grids: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(16)
    pyramid = [random_map(rng, grid=grid) for grid in grids]
    data = encode(pyramid)
    monkeypatch.setattr(module.np, "empty", lambda shape, dtype: np.full(shape, 9, dtype))
    for arrays in (decode_batch([data, data]), to_arrays([pyramid, pyramid])):
        assert arrays.log_normalizer is not None
        (rows, cols), _ = grids
        for padded in (
            arrays.indices[:, 0, 0],
            arrays.scores[:, 0, 0],
            arrays.log_normalizer[:, 0],
        ):
            assert not padded[:, rows:].any() and not padded[:, :, cols:].any()


def test_one_map_without_normalizer_leaves_the_batch_without():
    rng = np.random.default_rng(2)
    batch = decode_batch([encode(random_map(rng)), encode(random_map(rng, normalizer=False))])
    assert batch.log_normalizer is None


def test_batch_errors_name_the_position():
    good = encode(random_map(np.random.default_rng(3)))
    with pytest.raises(LabelMapError, match="label map 1 of the batch: the checksum"):
        decode_batch([good, good[:-1]])
    with pytest.raises(LabelMapError, match=r"k \[3, 5\]"):
        decode_batch([good, encode(random_map(np.random.default_rng(3), k=3))])


def test_damage_that_only_decoding_finds_is_named_in_a_batch():
    beyond = _forge(SAMPLE, palette=struct.unpack_from("<I", SAMPLE, 12)[0] + 1)
    with pytest.raises(LabelMapError) as alone:
        decode(beyond)
    with pytest.raises(LabelMapError) as caught:
        decode_batch([SAMPLE, SAMPLE, beyond])
    assert str(caught.value) == f"label map 2 of the batch: {alone.value}"


def test_a_large_batch_of_maps_of_all_kinds_decodes_as_one_by_one():
    rng = np.random.default_rng(14)
    grids = [(5, 6), (6, 5), (7, 7), (1, 9), (9, 1)]
    maps = [random_map(rng, grid=grids[i % 5], num_classes=90, spread=4.0) for i in range(150)]
    maps[7] = random_map(rng, grid=(19, 20), num_classes=900)  # codes of two bytes
    maps[140] = random_map(rng, grid=(19, 20), num_classes=900)
    maps = [keep_mass(m, 0.8) if i % 3 == 0 else m for i, m in enumerate(maps)]
    maps = [replace(m, num_classes=900) for m in maps]
    data = [encode(m, score_bits=8 if i % 4 == 1 else 16) for i, m in enumerate(maps)]
    batch, expected = decode_batch(data), to_arrays([decode(d)[0] for d in data])
    for name, got, want in zip(batch._fields, batch, expected):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_what_was_decoded_stays_when_more_is_decoded():
    rng = np.random.default_rng(15)
    first, second = (encode(random_map(rng, grid=(6, 7))) for _ in range(2))
    (one,), batch = decode(first), decode_batch([first])
    decode(second)
    decode_batch([second])
    assert one.equals(decode(first)[0])
    for got, want in zip(batch, decode_batch([first])):
        np.testing.assert_array_equal(got, want)


def test_palettes_of_more_than_a_byte_survive():
    rng = np.random.default_rng(4)
    label_map = random_map(rng, grid=(30, 30), num_classes=2000)
    assert np.unique(label_map.classes).size > 255
    assert decode(encode(label_map))[0].equals(label_map)


def _forge(data: bytes, **changes: int) -> bytes:
    """Change header fields and put the checksum right, as somebody who means harm would."""
    names = ["magic", "version", "flags", "levels", "k", "last_class", "palette", "crc"]
    fields = dict(zip(names, struct.unpack_from("<4sBBBBIII", data))) | changes
    head, body = struct.pack("<4sBBBBIII", *fields.values()), data[20:]
    crc = zlib.crc32(body, zlib.crc32(head[:16]))
    return head[:16] + struct.pack("<I", crc) + body


SAMPLE = encode(random_map(np.random.default_rng(5), grid=(5, 6), num_classes=50))
EMPTY = encode(keep_mass(random_map(np.random.default_rng(5), grid=(5, 6), num_classes=50), 0.7))
BYTES = encode(random_map(np.random.default_rng(5), grid=(5, 6), num_classes=50), score_bits=8)


def _decodes_or_refuses(data: bytes) -> None:
    try:
        levels = decode(data)
    except LabelMapError:
        return
    assert all(decode(encode(level))[0].equals(level) for level in levels)


@settings(max_examples=1500)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_and_nothing_else_happens(data: bytes, with_magic: bool):
    _decodes_or_refuses(b"\x89TLM\x01" + data if with_magic else data)


@settings(max_examples=1500)
@given(st.integers(0, 8 * len(SAMPLE) - 1))
def test_every_flipped_bit_is_found(bit: int):
    damaged = bytearray(SAMPLE)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LabelMapError):
        decode(bytes(damaged))


@settings(max_examples=3000)
@given(
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 255),
    st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1)),
    st.lists(st.tuples(st.integers(20, len(SAMPLE) - 1), st.integers(0, 255)), max_size=3),
)
def test_forged_bytes_with_a_right_checksum_decode_or_are_refused(
    flags: int, levels: int, k: int, last_class: int, palette: int, edits: list[tuple[int, int]]
):
    body = bytearray(SAMPLE)
    for position, value in edits:
        body[position] = value
    header = struct.unpack_from("<4sBBBBIII", SAMPLE)
    # Most draws keep most fields, so that the checks behind the first one are reached too.
    pick = lambda drawn, own, keep: own if keep % 4 else drawn  # noqa: E731
    _decodes_or_refuses(
        _forge(
            bytes(body),
            flags=pick(flags, header[2], flags + k),
            levels=pick(levels, header[3], levels + k),
            k=pick(k, header[4], k),
            last_class=pick(last_class, header[5], last_class),
            palette=pick(palette, header[6], palette),
        )
    )


@settings(max_examples=1000)
@given(st.data())
def test_forged_payloads_decode_or_are_refused(data: st.DataObject):
    """Compress changed planes anew: damage that neither CRC nor zstd can notice."""
    original = data.draw(st.sampled_from([SAMPLE, EMPTY, BYTES]))
    score_bytes, frame_at = (1, 60) if original is BYTES else (2, 40)
    num_palette = struct.unpack_from("<I", original, 12)[0]
    size = 4 * num_palette + 5 * 6 * (5 * (1 + score_bytes) + score_bytes)
    frame = original[frame_at:]
    payload = bytearray(zstandard.ZstdDecompressor().decompress(frame, max_output_size=size))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    compressed = zstandard.ZstdCompressor().compress(bytes(payload))
    _decodes_or_refuses(_forge(original[:frame_at] + compressed))


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken():
    huge = bytearray(SAMPLE)
    struct.pack_into("<HH", huge, 20, 65535, 65535)
    tracemalloc.start()
    with pytest.raises(LabelMapError, match="at most 67108864 are allowed"):
        decode(_forge(bytes(huge)))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_compression_bomb_is_cut_at_the_size_the_header_implies():
    known = zstandard.ZstdCompressor().compress(bytes(100_000_000))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100_000_000))
    tracemalloc.start()
    for bomb in (known, unknown):
        with pytest.raises(LabelMapError, match="compressed frame"):
            decode(_forge(SAMPLE[:40] + bomb))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_newer_version_is_named():
    with pytest.raises(LabelMapError, match="version 9 is not known; this program reads 1"):
        decode(_forge(SAMPLE, version=9))


def test_unknown_flags_are_refused_not_ignored():
    with pytest.raises(LabelMapError, match="flags 0x81 are not known"):
        decode(_forge(SAMPLE, flags=0x80 | 1))


def _arrays(**changes: object) -> dict:
    base = {
        "scores": np.array([[[2.0]], [[1.0]]], np.float16),
        "classes": np.array([[[3]], [[4]]], np.uint32),
        "num_classes": 5,
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.array([[[1.0]], [[2.0]]], np.float16)}, "do not descend"),
        ({"scores": np.array([[[np.nan]], [[1.0]]], np.float16)}, "not finite"),
        ({"scores": np.array([[[np.inf]], [[1.0]]], np.float16)}, "not finite"),
        ({"classes": np.array([[[3]], [[3]]], np.uint32)}, "names one class twice"),
        ({"num_classes": 4}, "class 4 is not below num_classes 4"),
        ({"num_classes": 1}, "1 classes; k = 2 to"),
        ({"window": (0.5, 0.0, 0.5, 1.0)}, "x0 < x1"),
    ],
)
def test_maps_that_make_no_sense_are_refused_when_they_are_made(changes: dict, message: str):
    with pytest.raises(LabelMapError, match=message):
        LabelMap(**_arrays(**changes))


def test_levels_that_do_not_belong_together_are_refused():
    rng = np.random.default_rng(6)
    with pytest.raises(LabelMapError, match="levels differ"):
        encode([random_map(rng, k=5), random_map(rng, k=4)])
    with pytest.raises(LabelMapError, match="each must be finer than the one before"):
        encode([random_map(rng, grid=(8, 8)), random_map(rng, grid=(8, 8))])
    with pytest.raises(LabelMapError, match="0 levels"):
        encode([])


def test_negative_zero_is_kept_as_zero():
    label_map = LabelMap(
        **_arrays(scores=np.array([[[-0.0]], [[0.0]]], np.float16), num_classes=2**32)
    )
    assert decode(encode(label_map))[0].equals(label_map)


def test_the_worked_example_of_the_documentation_is_true(docs_folder):
    """docs/label-map-format.md shows a map and its bytes; both must be what the code makes."""
    text = (docs_folder / "label-map-format.md").read_text()
    block = text.split("```hex\n")[1].split("```")[0]
    data = bytes.fromhex("".join(line.split("|")[0] for line in block.splitlines()))
    (read,) = decode(data)
    expected = LabelMap(
        scores=np.array([[[2.0, 4.0]], [[1.0, 1.5]]], np.float16),
        classes=np.array([[[7, 7]], [[3, 900]]], np.uint32),
        num_classes=1000,
        log_normalizer=np.array([[2.5, 4.25]], np.float16),
        window=(0.125, 0.0, 0.875, 1.0),
    )
    assert read.equals(expected)
    assert module.encode(expected) == data
