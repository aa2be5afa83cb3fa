"""Levels above the first may be seen in overlapping tiles, as a student sees crops."""

import numpy as np
import pytest
import timm
import torch
from colour_teacher import colour_teacher, patchwork

from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.label_map import decode
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.score import level_batch_sizes, num_tiles, tile_side, tiled_cells
from tokenlabel.labeler.sources import open_source
from tokenlabel.labeler.teacher import as_teacher


@pytest.fixture
def source(tmp_path):
    for i, size in enumerate([(96, 96), (128, 72)]):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        patchwork(i, size=size).save(path)
    return open_source(tmp_path / "photos")


@pytest.fixture(scope="module")
def wide_teacher():
    """A random network with squeeze and excitation: each cell sees all of the image."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=7).eval()
    return as_teacher(model, name="test_efficientnet", image_size=64, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("side", "tile", "number"),
    [(64, 64, 1), (65, 64, 2), (640, 448, 2), (896, 448, 3), (40, 64, 1)],
)
def test_tiles_cover_a_side_with_a_third_shared(side, tile, number):
    assert num_tiles(side, tile) == number
    if number > 1:
        assert (side - tile) / (number - 1) <= 0.65 * tile + 1e-9


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (64, 224), (32, 96)])
def test_tiled_cells_are_the_weighted_mean_of_each_tiles_own(wide_teacher, size):
    teacher = wide_teacher
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    rows, cols = (side // teacher.stride for side in size)
    tile = [min(64 // teacher.stride, side) for side in (rows, cols)]
    starts = [
        np.linspace(0, side - length, num_tiles(side, length)).round().astype(int)
        for side, length in zip((rows, cols), tile)
    ]
    sums = torch.zeros(2, rows, cols, teacher.model.num_features, dtype=torch.float64)
    weights = torch.zeros(rows, cols, dtype=torch.float64)
    for top in starts[0]:
        for left in starts[1]:
            pixels = images[
                :, :,
                top * teacher.stride : (top + tile[0]) * teacher.stride,
                left * teacher.stride : (left + tile[1]) * teacher.stride,
            ]  # fmt: skip
            cells = teacher.cells(pixels)
            for row in range(tile[0]):
                for col in range(tile[1]):
                    y, x = (2 * (i + 0.5) / n - 1 for i, n in zip((row, col), tile))
                    weight = max(0.01, 1 - abs(y)) * max(0.01, 1 - abs(x))
                    sums[:, top + row, left + col] += weight * cells[:, row, col]
                    weights[top + row, left + col] += weight
    expected = sums / weights[..., None]
    torch.testing.assert_close(
        tiled_cells(teacher, images, 64).double(), expected, atol=1e-5, rtol=1e-5
    )


def test_a_tile_knows_nothing_of_what_lies_outside_it(wide_teacher):
    images = torch.randint(0, 256, (1, 3, 64, 224), dtype=torch.uint8)
    changed = images.clone()
    changed[..., 64:] = 0
    whole = wide_teacher.cells(images) - wide_teacher.cells(changed)
    tiled = tiled_cells(wide_teacher, images, 64) - tiled_cells(wide_teacher, changed, 64)
    assert whole[:, :, 0].abs().max() > 0
    assert tiled[:, :, 0].abs().max() == 0


def test_where_cells_see_only_themselves_tiles_change_nothing(source, tmp_path):
    for name, tiles in (("whole", False), ("tiles", True)):
        generate(
            source, tmp_path / name, teacher=colour_teacher(64), levels=[64, 128], tiles=tiles,
            top_k=3,
        )  # fmt: skip
    whole, tiled = (LabelSet.open(tmp_path / name) for name in ("whole", "tiles"))
    assert tiled.index["tiles"] is True
    assert "tiles" not in whole.index
    for key in whole.keys:
        for a, b in zip(decode(whole.read(key)), decode(tiled.read(key)), strict=True):
            assert a.grid == b.grid
            np.testing.assert_allclose(a.scores, b.scores, atol=0.05)


def test_the_first_level_is_always_seen_whole(source, tmp_path, wide_teacher):
    for name, tiles in (("whole", False), ("tiles", True)):
        generate(
            source, tmp_path / name, teacher=wide_teacher, levels=[64, 128], tiles=tiles, top_k=3,
            batch_size=1,
        )  # fmt: skip
    whole, tiled = (LabelSet.open(tmp_path / name) for name in ("whole", "tiles"))
    for key in whole.keys:
        (first, second), (same, other) = decode(whole.read(key)), decode(tiled.read(key))
        assert first.equals(same)
        assert not second.equals(other)


def test_a_run_with_tiles_is_another_run(source, tmp_path):
    generate(source, tmp_path / "set", teacher=colour_teacher(64), levels=[64, 96])
    with pytest.raises(ValueError, match="tiles None there, True here"):
        generate(source, tmp_path / "set", teacher=colour_teacher(64), levels=[64, 96], tiles=True)


def test_tiles_without_a_second_level_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="tiles are for levels above the first; give --levels"):
        generate(source, tmp_path / "set", teacher=colour_teacher(64), tiles=True)


def test_batches_of_tiled_levels_hold_as_many_pixels():
    assert tile_side([448, 896]) == 448
    assert level_batch_sizes([448, 896], 64, tile_px=448) == [64, 64 // 9]
    assert level_batch_sizes([448, 896], 64) == [64, 16]
