"""MixToken: the box, the swap, and that the swap is undone."""

import numpy as np
import pytest
import torch

from tokenlabel.trainer.mix_token import MixBox, mix, sample_box


def boxes(count: int, grid: tuple[int, int] = (14, 14)) -> list[MixBox]:
    rng = np.random.default_rng(0)
    return [sample_box(grid, rng) for _ in range(count)]


def test_mixing_twice_gives_the_tokens_back():
    tokens = torch.randn(6, 15, 4)
    for box in boxes(20, (3, 5)):
        mask = box.mask(tokens.device)
        assert torch.equal(mix(mix(tokens, mask), mask), tokens)


def test_tokens_inside_the_box_come_from_the_mirrored_image_and_others_stay():
    rows, cols = 4, 6
    image_and_place = torch.arange(3 * rows * cols).reshape(3, rows * cols, 1)
    box = MixBox(top=1, left=2, bottom=3, right=6, grid=(rows, cols))
    mixed = mix(image_and_place, box.mask(torch.device("cpu"))).reshape(3, rows, cols)
    for image in range(3):
        for row in range(rows):
            for col in range(cols):
                inside = 1 <= row < 3 and 2 <= col < 6
                source = 2 - image if inside else image
                assert mixed[image, row, col] == source * rows * cols + row * cols + col


def test_kept_is_the_share_of_tokens_outside_the_box():
    for box in boxes(50, (7, 9)):
        outside = 1 - box.mask(torch.device("cpu")).float().mean().item()
        assert box.kept == pytest.approx(outside)


def test_an_empty_box_keeps_everything():
    box = MixBox(top=3, left=3, bottom=3, right=3, grid=(7, 7))
    tokens = torch.randn(2, 49, 3)
    assert box.kept == 1.0
    assert torch.equal(mix(tokens, box.mask(tokens.device)), tokens)


def test_boxes_stay_on_the_grid():
    for box in boxes(500, (5, 11)):
        assert 0 <= box.top <= box.bottom <= 5
        assert 0 <= box.left <= box.right <= 11


def test_box_area_follows_lambda():
    # The reference draws λ and the centre by itself and clips in the unit square; the grid is so
    # fine that rounding to whole tokens does not show.
    drawn = np.array([1 - box.kept for box in boxes(4000, (200, 200))])
    rng = np.random.default_rng(1)
    half = np.sqrt(1 - rng.random((4000, 1))) / 2
    centre = rng.random((4000, 2))
    sides = np.minimum(centre + half, 1) - np.maximum(centre - half, 0)
    expected = sides.prod(axis=1)
    assert drawn.mean() == pytest.approx(expected.mean(), abs=0.015)
    assert drawn.std() == pytest.approx(expected.std(), abs=0.015)


def test_the_same_generator_state_draws_the_same_box():
    first, second = (sample_box((14, 14), np.random.default_rng([3, 17])) for _ in range(2))
    assert first == second
