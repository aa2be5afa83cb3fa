import math

import numpy as np
import pytest
import torch
from conftest import random_map, random_map_and_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from tokenlabel.labeler.geometry import (
    Fill,
    PaletteMaps,
    apply_view,
    compose,
    crop_view,
    flip_view,
    sample_targets,
)
from tokenlabel.labeler.label_map import LabelMap, decode_batch, encode


def dense_planes(label_map: LabelMap, fill: Fill) -> torch.Tensor:
    """All num_classes planes of one map, the way a textbook would write them."""
    scores = torch.from_numpy(label_map.scores).double()
    classes = torch.from_numpy(label_map.classes.astype(np.int64))
    planes = torch.zeros(label_map.num_classes, *label_map.grid, dtype=torch.float64)
    if fill == "residual":
        assert label_map.log_normalizer is not None
        normalizer = torch.from_numpy(label_map.log_normalizer).double()
        residual = (1 - (scores - normalizer).exp().sum(0)).clamp(min=1e-4)
        planes += (residual / (label_map.num_classes - label_map.k)).log() + normalizer
    return planes.scatter(0, classes, scores)


def bilinear(planes: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Read (c, rows, cols) at (x, y) in cells; centres at +0.5, edges repeat."""
    rows, cols = planes.shape[1:]
    x, y = min(max(x - 0.5, 0), cols - 1), min(max(y - 0.5, 0), rows - 1)
    c0, r0 = min(int(x), cols - 1), min(int(y), rows - 1)
    c1, r1 = min(c0 + 1, cols - 1), min(r0 + 1, rows - 1)
    top = planes[:, r0, c0] * (1 - (x - c0)) + planes[:, r0, c1] * (x - c0)
    bottom = planes[:, r1, c0] * (1 - (x - c0)) + planes[:, r1, c1] * (x - c0)
    return top * (1 - (y - r0)) + bottom * (y - r0)


def slow_targets(label_map: LabelMap, view: np.ndarray, grid: tuple[int, int], fill: Fill):
    """Point by point, class by class, in float64: what DESIGN says in words."""
    planes = dense_planes(label_map, fill)
    x0, y0, x1, y1 = label_map.window
    rows, cols = grid
    tokens, weights, everything = [], [], []
    for r in range(rows):
        for c in range(cols):
            seen = []
            for i in range(2):
                for j in range(2):
                    u, v = (c + (j + 0.5) / 2) / cols, (r + (i + 0.5) / 2) / rows
                    x, y = view @ np.array([u, v, 1.0])
                    wx, wy = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
                    if -1e-4 <= wx <= 1 + 1e-4 and -1e-4 <= wy <= 1 + 1e-4:
                        map_rows, map_cols = label_map.grid
                        seen.append(bilinear(planes, wx * map_cols, wy * map_rows))
            everything += seen
            weights.append(float(len(seen) >= 2))
            tokens.append(torch.stack(seen).mean(0).softmax(0) if seen else None)
    whole = torch.stack(everything).mean(0).softmax(0) if everything else None
    return tokens, weights, whole, float(len(everything) >= 2 * rows * cols)


def assert_matches_slow(maps: list[LabelMap], views: torch.Tensor, grid, fill: Fill) -> None:
    targets = sample_targets(PaletteMaps.from_label_maps(maps), views, grid, fill=fill)
    dense, dense_view = targets.dense_tokens().double(), targets.dense_view().double()
    for b, label_map in enumerate(maps):
        tokens, weights, whole, view_weight = slow_targets(
            label_map, views[b].double().numpy(), grid, fill
        )
        assert targets.token_weight[b].tolist() == weights
        assert targets.view_weight[b].item() == view_weight
        for n, token in enumerate(tokens):
            if token is not None:
                torch.testing.assert_close(dense[b, n], token, atol=2e-6, rtol=1e-4)
        if whole is not None:
            torch.testing.assert_close(dense_view[b], whole, atol=2e-6, rtol=1e-4)


def random_boxes(rng: np.random.Generator, count: int) -> torch.Tensor:
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) + [[[0, 0], [0.05, 0.05]]]
    return torch.from_numpy(np.clip(corners.reshape(count, 4), 0, 1)).float()


@pytest.mark.parametrize("fill", ["residual", "zero"])
def test_targets_equal_a_slow_reference_for_mixed_grids_windows_and_views(fill: Fill):
    rng = np.random.default_rng(0)
    maps = [
        random_map(rng, grid=(6, 6)),
        random_map(rng, grid=(5, 9)),
        random_map(rng, grid=(9, 4), window=(0.125, 0.0, 0.875, 1.0)),
        random_map(rng, grid=(1, 1)),
        random_map(rng, grid=(3, 2), window=(0.25, 0.25, 0.5, 0.75)),
    ]
    views = crop_view(random_boxes(rng, 5))
    views = compose(views, flip_view(torch.tensor([True, False, True, False, True])))
    turn = math.radians(25)
    rotation = torch.tensor(
        [[math.cos(turn), -math.sin(turn), 0.2], [math.sin(turn), math.cos(turn), -0.1]]
    )
    views[1] = compose(views[1:2], rotation[None])[0]
    views[2] = compose(views[2:3], rotation[None])[0]
    assert_matches_slow(maps, views, (4, 3), fill)


def test_box_logits_equal_roi_align():
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng, 8)
    maps = [random_map(rng, grid=(7, 11), num_classes=30) for _ in range(8)]
    targets = sample_targets(
        PaletteMaps.from_label_maps(maps), crop_view(boxes), (5, 4), fill="zero"
    )
    planes = torch.stack([dense_planes(m, "zero") for m in maps]).float()
    in_cells = boxes * torch.tensor([11, 7, 11, 7])
    rois = torch.cat([torch.arange(8)[:, None].float(), in_cells], 1)
    pooled = roi_align(planes, rois, (5, 4), sampling_ratio=2, aligned=True)
    expected = pooled.flatten(2).transpose(1, 2).softmax(2)
    torch.testing.assert_close(targets.dense_tokens(), expected, atol=1e-6, rtol=1e-5)


def test_whole_image_view_on_the_maps_own_grid_reads_nearly_the_map_back():
    # Two points a side stand a quarter cell off the centre, so only a linear ramp comes back.
    rows, cols = 4, 5
    scores = np.stack([np.tile(np.arange(cols), (rows, 1)), np.zeros((rows, cols))])
    label_map = LabelMap(
        scores=scores.astype(np.float16),
        classes=np.stack([np.full((rows, cols), 1), np.full((rows, cols), 0)]).astype(np.uint32),
        num_classes=2,
    )
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    targets = sample_targets(
        PaletteMaps.from_label_maps([label_map]), whole, (rows, cols), fill="zero"
    )
    logit = targets.dense_tokens()[0, :, 1].logit().reshape(rows, cols)
    torch.testing.assert_close(logit[:, 1:-1], torch.tensor([1.0, 2.0, 3.0]).expand(rows, 3))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_flip_then_crop_equals_crop_then_flip(seed: int):
    rng = np.random.default_rng(seed)
    maps = PaletteMaps.from_label_maps([random_map(rng)])
    box = random_boxes(rng, 1)
    mirrored = box[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([1.0, 0, 1, 0])
    flip = flip_view(torch.tensor([True]))
    one = sample_targets(maps, compose(crop_view(box), flip), (3, 4))
    other = sample_targets(maps, compose(flip, crop_view(mirrored)), (3, 4))
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-4)


def test_flipping_a_view_mirrors_its_tokens():
    maps = PaletteMaps.from_label_maps([random_map(np.random.default_rng(2))])
    view = crop_view(torch.tensor([[0.1, 0.2, 0.8, 0.9]]))
    plain = sample_targets(maps, view, (3, 4)).tokens.reshape(3, 4, -1)
    flipped = sample_targets(maps, compose(view, flip_view(torch.tensor([True]))), (3, 4))
    torch.testing.assert_close(flipped.tokens.reshape(3, 4, -1).flip(1), plain)


def test_transposing_image_and_view_transposes_the_tokens():
    rng = np.random.default_rng(3)
    label_map = random_map(rng, grid=(5, 8))
    assert label_map.log_normalizer is not None
    turned = LabelMap(
        scores=label_map.scores.transpose(0, 2, 1).copy(),
        classes=label_map.classes.transpose(0, 2, 1).copy(),
        num_classes=label_map.num_classes,
        log_normalizer=label_map.log_normalizer.T.copy(),
    )
    box = random_boxes(rng, 1)
    plain = sample_targets(PaletteMaps.from_label_maps([label_map]), crop_view(box), (3, 4))
    other = sample_targets(
        PaletteMaps.from_label_maps([turned]), crop_view(box[:, [1, 0, 3, 2]]), (4, 3)
    )
    torch.testing.assert_close(
        other.tokens.reshape(4, 3, -1).transpose(0, 1), plain.tokens.reshape(3, 4, -1)
    )


def test_a_view_of_the_left_half_gets_the_labels_of_the_left_half():
    """The published code read (top, left, bottom, right) as (x1, y1, x2, y2) here."""
    classes = np.zeros((1, 4, 4), np.uint32)
    classes[0, :, :2], classes[0, :, 2:] = 1, 2
    label_map = LabelMap(
        scores=np.full((1, 4, 4), 9, np.float16),
        classes=classes,
        num_classes=3,
        log_normalizer=np.full((4, 4), 9, np.float16),
    )
    left = crop_view(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    targets = sample_targets(PaletteMaps.from_label_maps([label_map]), left, (2, 2))
    assert targets.dense_tokens()[0].argmax(1).tolist() == [1, 1, 1, 1]
    assert targets.dense_view()[0].argmax().item() == 1


def test_tokens_outside_the_window_are_not_taught():
    label_map = random_map(np.random.default_rng(4), window=(0.25, 0.0, 0.75, 1.0))
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    targets = sample_targets(PaletteMaps.from_label_maps([label_map]), whole, (1, 8))
    assert targets.token_weight[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert targets.view_weight.item() == 1
    beside = crop_view(torch.tensor([[0.8, 0.0, 1.0, 1.0]]))
    nothing = sample_targets(PaletteMaps.from_label_maps([label_map]), beside, (2, 2))
    assert nothing.token_weight.sum() == 0
    assert nothing.view_weight.item() == 0
    assert torch.isfinite(nothing.tokens).all()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["residual", "zero"]), st.integers(1, 6))
def test_every_distribution_sums_to_one(seed: int, fill: Fill, k: int):
    rng = np.random.default_rng(seed)
    maps = [random_map(rng, k=k, num_classes=6, spread=9.0), random_map(rng, k=k, num_classes=6)]
    targets = sample_targets(
        PaletteMaps.from_label_maps(maps), crop_view(random_boxes(rng, 2)), (3, 3), fill=fill
    )
    torch.testing.assert_close(targets.dense_tokens().sum(2), torch.ones(2, 9))
    torch.testing.assert_close(targets.dense_view().sum(1), torch.ones(2))


@pytest.mark.parametrize("fill", ["residual", "zero"])
@pytest.mark.parametrize("degrees", [0, 25])
def test_a_map_of_few_classes_beside_one_of_all_gets_what_it_gets_alone(fill: Fill, degrees: int):
    rng = np.random.default_rng(6)
    few, every = (
        [random_map(rng, grid=(side, side), k=k, num_classes=6) for side in sides]
        for k, sides in ((2, (1, 2)), (2, (8, 12)))
    )
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    views = torch.tensor([[[0.6 * cos, -0.6 * sin, 0.3], [0.6 * sin, 0.6 * cos, 0.2]]]).repeat(
        2, 1, 1
    )
    both = PaletteMaps.from_label_maps([few, every])
    assert both.palette_sizes[0] < 6 and both.palette_sizes[1] == 6
    found = sample_targets(both, views, (3, 3), fill=fill)
    for i, levels in enumerate((few, every)):
        maps = PaletteMaps.from_label_maps([levels])
        alone = sample_targets(maps, views[:1], (3, 3), fill=fill)
        torch.testing.assert_close(found.dense_tokens()[i], alone.dense_tokens()[0])
        torch.testing.assert_close(found.dense_view()[i], alone.dense_view()[0])


def test_residual_fill_keeps_the_teachers_probabilities_and_zero_fill_depends_on_its_offset():
    label_map, logits = random_map_and_logits(
        np.random.default_rng(5), grid=(1, 1), k=3, num_classes=20, spread=1.0
    )
    exact = torch.from_numpy(logits[:, 0, 0]).double().softmax(0)
    assert label_map.log_normalizer is not None
    shifted = LabelMap(
        scores=label_map.scores + np.float16(4),
        classes=label_map.classes,
        num_classes=20,
        log_normalizer=label_map.log_normalizer + np.float16(4),
    )
    maps = PaletteMaps.from_label_maps([label_map, shifted])
    views = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
    kept = torch.from_numpy(label_map.classes[:, 0, 0].astype(np.int64))
    residual = sample_targets(maps, views, (1, 1)).dense_tokens()[:, 0, kept].double()
    torch.testing.assert_close(residual[0], exact[kept], atol=5e-3, rtol=0)
    torch.testing.assert_close(residual[1], exact[kept], atol=1e-2, rtol=0)
    zero = sample_targets(maps, views, (1, 1), fill="zero").dense_tokens()[:, 0, kept]
    assert (zero[0] - zero[1]).abs().max() > 0.05


def test_cells_that_keep_fewer_classes_give_the_dropped_mass_to_the_background():
    """A cell with two of three classes dropped equals one that was made with k = 1."""
    label_map = random_map(np.random.default_rng(12), grid=(1, 1), k=3)
    first = LabelMap(
        scores=label_map.scores[:1].repeat(3, 0),
        classes=label_map.classes[:1].repeat(3, 0),
        num_classes=label_map.num_classes,
        log_normalizer=label_map.log_normalizer,
    )
    alone = LabelMap(
        scores=label_map.scores[:1],
        classes=label_map.classes[:1],
        num_classes=label_map.num_classes,
        log_normalizer=label_map.log_normalizer,
    )
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    repeated, single = (
        sample_targets(PaletteMaps.from_label_maps([m]), whole, (1, 1)).dense_tokens()
        for m in (first, alone)
    )
    torch.testing.assert_close(repeated, single)


def test_a_pyramid_blends_the_two_levels_nearest_to_the_views_zoom():
    rng = np.random.default_rng(9)
    levels = [random_map(rng, grid=g) for g in [(4, 4), (8, 8), (16, 16)]]

    def tokens(maps: list[LabelMap], side: float) -> torch.Tensor:
        view = crop_view(torch.tensor([[0.1, 0.1, 0.1 + side, 0.1 + side]]))
        batch = PaletteMaps.from_label_maps([maps])
        return sample_targets(batch, view, (3, 3)).dense_tokens()[0].double()

    # A view of half the image's side wants cells half as large: exactly the second level.
    torch.testing.assert_close(tokens(levels, 0.5), tokens(levels[1:2], 0.5), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tokens(levels, 0.25), tokens(levels[2:], 0.25), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tokens(levels, 0.1), tokens(levels[2:], 0.1), atol=1e-6, rtol=1e-4)
    # Halfway in the logarithm, both count alike: the normalised geometric mean.
    side = 0.5**1.5
    between = (tokens(levels[1:2], side).log() + tokens(levels[2:], side).log()) / 2
    torch.testing.assert_close(tokens(levels, side), between.softmax(1), atol=1e-6, rtol=1e-4)


def test_a_pyramid_of_views_in_one_batch_equals_the_views_one_by_one():
    rng = np.random.default_rng(10)
    pyramids = [[random_map(rng, grid=g) for g in [(3, 4), (6, 9)]] for _ in range(4)]
    views = crop_view(random_boxes(rng, 4))
    together = sample_targets(PaletteMaps.from_label_maps(pyramids), views, (2, 3)).dense_tokens()
    for i, pyramid in enumerate(pyramids):
        alone = sample_targets(
            PaletteMaps.from_label_maps([pyramid]), views[i : i + 1], (2, 3)
        ).dense_tokens()
        torch.testing.assert_close(together[i : i + 1], alone)
    torch.testing.assert_close(together.sum(2), torch.ones(4, 6))


def test_a_level_that_does_not_see_a_token_leaves_it_to_the_other():
    rng = np.random.default_rng(11)
    whole = random_map(rng, grid=(4, 4))
    middle = random_map(rng, grid=(8, 8), window=(0.25, 0.25, 0.75, 0.75))
    view = crop_view(torch.tensor([[0.0, 0.0, 0.5, 0.5]]))
    batch = PaletteMaps.from_label_maps([[whole, middle]])
    both = sample_targets(batch, view, (2, 2))
    coarse = sample_targets(PaletteMaps.from_label_maps([whole]), view, (2, 2))
    assert both.token_weight.tolist() == [[1, 1, 1, 1]]
    torch.testing.assert_close(both.dense_tokens()[0, :3], coarse.dense_tokens()[0, :3])
    assert not torch.allclose(both.dense_tokens()[0, 3], coarse.dense_tokens()[0, 3])


def test_residual_fill_without_a_normalizer_says_what_to_do():
    maps = PaletteMaps.from_label_maps([random_map(np.random.default_rng(6), normalizer=False)])
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match="use fill = 'zero'"):
        sample_targets(maps, whole, (2, 2))


def test_a_batch_equals_its_maps_one_by_one_and_bytes_equal_maps():
    rng = np.random.default_rng(7)
    maps = [random_map(rng, grid=g) for g in [(4, 4), (3, 9), (8, 2)]]
    views = crop_view(random_boxes(rng, 3))
    together = sample_targets(
        PaletteMaps.from_arrays(decode_batch([encode(m) for m in maps])), views, (3, 3)
    )
    for i, label_map in enumerate(maps):
        alone = sample_targets(PaletteMaps.from_label_maps([label_map]), views[i : i + 1], (3, 3))
        torch.testing.assert_close(together.dense_tokens()[i : i + 1], alone.dense_tokens())


def test_compose_maps_points_through_inner_then_outer():
    rng = np.random.default_rng(8)
    outer, inner = (torch.from_numpy(rng.standard_normal((2, 2, 3))) for _ in range(2))
    points = torch.from_numpy(rng.uniform(size=(5, 2)))
    through = apply_view(compose(outer, inner), points)
    for b in range(2):
        step = apply_view(inner[b : b + 1], points)[0]
        torch.testing.assert_close(apply_view(outer[b : b + 1], step)[0], through[b])


def test_what_a_frame_hides_is_not_taught():
    maps = PaletteMaps.from_label_maps([random_map(np.random.default_rng(0))] * 2)
    quarter = crop_view(torch.tensor([[0.25, 0.25, 0.75, 0.75]] * 2))
    moved = torch.tensor([[[1, 0, 0.5], [0, 1, 0.0]], [[1, 0, 0.0], [0, 1, 0.0]]])
    views = compose(quarter, moved)
    free = sample_targets(maps, views, (4, 4))
    framed = sample_targets(maps, views, (4, 4), frames=moved[:, None])
    assert torch.equal(free.token_weight, torch.ones(2, 16))
    assert torch.equal(framed.token_weight[0].reshape(4, 4)[:, :2], torch.ones(4, 2))
    assert torch.equal(framed.token_weight[0].reshape(4, 4)[:, 2:], torch.zeros(4, 2))
    assert torch.equal(framed.token_weight[1], torch.ones(16))
    assert torch.allclose(framed.tokens[1], free.tokens[1])
    left = sample_targets(maps, crop_view(torch.tensor([[0.5, 0.25, 0.75, 0.75]] * 2)), (4, 2))
    assert torch.allclose(framed.view[0], left.view[0], atol=1e-5)
