"""What benchmarks/learning.py adds to the commands it runs: published geometry, intervals."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_map
from scipy.stats import ttest_rel

from tokenlabel.labeler.geometry import PaletteMaps, crop_view, flip_view, sample_targets
from tokenlabel.trainer.feed import Batch

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def learning():
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("learning")
    sys.path.remove(BENCHMARKS)


class OneBatch:
    """A feed of the same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.is_closed = batch, False

    def __next__(self) -> Batch:
        return self.batch

    def state(self) -> str:
        return "here"

    def close(self) -> None:
        self.is_closed = True


def a_batch(boxes: torch.Tensor) -> tuple[Batch, list]:
    rng = np.random.default_rng(0)
    levels = [random_map(rng, grid=(6, 6), window=(0.2, 0.0, 0.8, 1.0))]
    batch = Batch(
        images=torch.rand(len(boxes), 3, 8, 8),
        classes=torch.arange(len(boxes)),
        views=crop_view(boxes),
        maps=PaletteMaps.from_label_maps([levels] * len(boxes)),
        keys=[str(i) for i in range(len(boxes))],
    )
    return batch, levels


BOXES = torch.tensor([[0.0, 0.1, 0.4, 0.9], [0.5, 0.2, 0.9, 0.6], [0.0, 0.0, 1.0, 1.0]])


def test_the_published_geometry_is_that_of_the_alignment_benchmark(learning):
    alignment = importlib.import_module("alignment")
    batch, levels = a_batch(BOXES)
    read = next(learning.PublishedGeometry(OneBatch(batch)))
    assert read.maps is not None
    targets = sample_targets(read.maps, read.views, (4, 4), fill="zero")
    expected = alignment.published(mend_axes=False)(levels, BOXES, (4, 4))
    torch.testing.assert_close(targets.dense_tokens(), expected.dense_tokens())
    torch.testing.assert_close(targets.dense_view(), expected.dense_view())
    assert batch.maps is not None
    ours = sample_targets(batch.maps, batch.views, (4, 4), fill="zero")
    assert (targets.dense_tokens() - ours.dense_tokens()).abs().max() > 0.1


def test_the_published_geometry_changes_labels_alone(learning):
    batch, _ = a_batch(BOXES)
    inner = OneBatch(batch)
    feed = learning.PublishedGeometry(inner)
    read = next(feed)
    assert read.images is batch.images and read.classes is batch.classes
    assert read.keys == batch.keys and feed.state() == "here"
    feed.close()
    assert inner.is_closed


def test_axes_exchanged_twice_are_as_before(learning):
    views = crop_view(BOXES)
    swapped = learning.exchange_axes(views)
    torch.testing.assert_close(swapped, crop_view(BOXES[:, [1, 0, 3, 2]]))
    torch.testing.assert_close(learning.exchange_axes(swapped), views)
    flips = flip_view(torch.ones(1, dtype=torch.bool))
    upside_down = torch.tensor([[[1.0, 0.0, 0.0], [0.0, -1.0, 1.0]]])
    torch.testing.assert_close(learning.exchange_axes(flips), upside_down)


def test_the_truth_of_a_crop_is_the_digit_with_most_ink_there(learning):
    class_map = np.full((40, 60), learning.BACKGROUND, np.uint8)
    class_map[:20, 30:] = 7  # the upper right quarter
    class_map[30:, :3] = 4  # less than a sixth of its token
    whole, left, upper = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5]
    truth = learning.true_labels(
        [class_map] * 3, crop_view(torch.tensor([whole, left, upper])), (2, 2)
    )
    none = learning.BACKGROUND
    assert truth.tokens.tolist() == [[none, 7, none, none], [none] * 4, [7] * 4]
    assert truth.view.tolist() == [7, 4, 7]


def test_the_interval_of_a_gain_is_that_of_the_paired_t_test(learning):
    arm, base = np.random.default_rng(0).normal(50, 5, (2, 4))
    low, high = ttest_rel(arm, base).confidence_interval(0.95)
    assert learning.half_interval(arm - base) == pytest.approx((high - low) / 2)


def test_one_seed_has_no_interval(learning):
    assert learning.half_interval(np.ones(1)) is None


def test_the_teacher_learns_to_be_undecided_where_there_is_no_digit(learning):
    digits = learning.Digits([np.ones((20, 14), np.float32)] * 10, np.arange(10))
    images, targets = learning.digits_or_none(digits, 10, 32, seed=0)
    assert images.shape == (10, 3, 32, 32)
    assert targets[:2].tolist() == [[pytest.approx(0.1)] * 10] * 2
    assert targets[2:].sum(1).tolist() == [1] * 8 and targets[2:].max(1).values.tolist() == [1] * 8
    assert images[2:].float().amax((1, 2, 3)).mean() > images[:2].float().amax((1, 2, 3)).mean()


def test_a_finished_run_is_not_trained_again(learning, tmp_path, monkeypatch):
    calls = []

    def train(folder, student, arm, seed, out, *, quick):
        calls.append((student, arm, seed))
        return {10: 12.5, 20: 50.0}

    monkeypatch.setattr(learning, "train", train)
    for _ in range(2):
        assert learning.run(tmp_path, "LV-ViT", "token labels", 3, quick=True) == {10: 12.5, 20: 50}
    assert calls == [("LV-ViT", learning.ARMS["token labels"], 3)]


def test_each_arm_is_a_recipe_for_each_student(learning):
    for changes in learning.STUDENTS.values():
        for arm in learning.ARMS.values():
            recipe = learning.load_recipe(
                str(Path(BENCHMARKS) / "learning.toml"), [*changes, *arm.changes]
            )
            assert recipe.labels.needs_maps or not arm.is_published


def test_rows_and_figure_come_from_the_results(learning, tmp_path):
    curves = {
        student: {arm: [{10: 20.0, 20: 60.0 + i}, {10: 30.0, 20: 62.0 + i}] for i, arm in arms}
        for student in learning.STUDENTS
        for arms in [list(enumerate(learning.ARMS))]
    }
    rows = learning.summarise("LV-ViT", curves["LV-ViT"])
    assert [row["top-1"] for row in rows] == [61 + i for i in range(len(rows))]
    names = [row["learns from"] for row in rows]
    assert rows[0]["gain"] is rows[0]["±"] is rows[0]["against"] is None
    for i, row in enumerate(rows[1:], 1):
        assert row["gain"] == pytest.approx(i - names.index(row["against"]))
        assert row["±"] == pytest.approx(0)
    learning.draw(curves, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
