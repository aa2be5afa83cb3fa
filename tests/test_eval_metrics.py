"""Metrics against slow, obvious implementations and scikit-learn; no order of images matters."""

import csv
import io
import json
import math
from collections import Counter

import numpy as np
import pytest
from predicted import NAMES, predictions, shuffled, some_answers
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from tokenlabel.evaluator import metrics
from tokenlabel.evaluator.metrics import measure
from tokenlabel.evaluator.predictions import Predictions

# ------------------------------------------------------------------------------ whole numbers


def test_accuracy_and_loss_are_those_of_scikit_learn():
    probs, classes = some_answers()
    found = measure(predictions(probs, classes)).heads["model"]
    labels = np.arange(probs.shape[1])
    for name, k in (("top1", 1), ("top5", 5)):
        expected = 100 * top_k_accuracy_score(classes, probs, k=k, labels=labels)
        assert getattr(found, name).value == pytest.approx(expected)
    assert found.loss.value == pytest.approx(log_loss(classes, probs, labels=labels))
    assert found.confidence.value == pytest.approx(100 * probs.max(1).mean())
    assert 0 < found.top1.value < found.top5.value < 100


def test_the_calibration_error_is_that_of_a_slow_loop():
    probs, classes = some_answers(300)
    total = 0.0
    for low in [i / 15 for i in range(15)]:
        inside = [
            (max(row), row.argmax() == right)
            for row, right in zip(probs, classes)
            if low < max(row) <= low + 1 / 15
        ]
        if inside:
            gap = np.mean([p for p, _ in inside]) - np.mean([right for _, right in inside])
            total += len(inside) / 300 * abs(gap)
    found = measure(predictions(probs, classes)).heads["model"]
    assert found.ece.value == pytest.approx(100 * total, abs=1e-4)


def test_the_adaptive_error_sorts_images_into_bins_of_equal_counts():
    probs, classes = some_answers(150)
    rows = sorted(zip(probs.max(1), probs.argmax(1) == classes))
    gaps = [
        abs(sum(p - right for p, right in rows[start : start + 10])) for start in range(0, 150, 10)
    ]
    found = measure(predictions(probs, classes)).heads["model"]
    assert found.adaptive_ece.value == pytest.approx(100 * sum(gaps) / 150, abs=1e-4)


def test_bins_are_scikit_learns_calibration_curve():
    probs, classes = some_answers(200)
    bins = [each for each in metrics.reliability(predictions(probs, classes)) if each.num_images]
    right = probs.argmax(1) == classes
    accuracy, confidence = calibration_curve(right, probs.max(1), n_bins=metrics.NUM_BINS)
    assert [each.accuracy for each in bins] == pytest.approx(accuracy.tolist())
    assert [each.confidence for each in bins] == pytest.approx(confidence.tolist())
    assert sum(each.num_images for each in bins) == 200


def test_a_model_that_is_always_sure_and_half_right_is_off_by_fifty_points():
    probs = np.eye(2)[[0, 0, 0, 0]]
    whole = measure(predictions(probs, np.array([0, 0, 1, 1])))
    found = whole.heads["model"]
    assert found.ece.value == found.adaptive_ece.value == 50
    assert found.confidence.value == 100
    assert math.isinf(found.loss.value) and math.isnan(found.loss.high)
    plain = json.loads(json.dumps(whole.to_json(), allow_nan=False))["heads"]["model"]
    assert (plain["loss"], plain["loss_interval"], plain["top1"]) == (None, [None, None], 50)


def test_the_order_of_images_changes_no_bit():
    probs, classes = some_answers(40)
    one = predictions(probs, classes, heads=3)
    other = shuffled(one)
    assert one.keys != other.keys
    assert measure(one) == measure(other)
    assert metrics.per_class(one) == metrics.per_class(other)
    assert metrics.confusions(one) == metrics.confusions(other)
    assert metrics.reliability(one, "head1") == metrics.reliability(other, "head1")


# ------------------------------------------------------------------------------- which count


def test_images_without_a_class_do_not_count():
    probs, classes = some_answers(30)
    hidden = classes.copy()
    hidden[::3] = -1
    found = measure(predictions(probs, hidden))
    kept = hidden >= 0
    keys = [f"photo/{i}" for i in np.flatnonzero(kept)]
    assert (found.num_images, found.num_unlabelled) == (20, 10)
    assert found.heads == measure(predictions(probs, classes).select(keys)).heads


def test_nothing_can_be_measured_without_classes():
    probs, _ = some_answers(3)
    with pytest.raises(ValueError, match="none of 3 images has a class that is known"):
        measure(predictions(probs, np.full(3, -1)))


def test_any_of_several_right_classes_will_do():
    """ReaL: images without a right class are left out, the others may have more than one."""
    probs, classes = some_answers(40)
    rng = np.random.default_rng(5)
    valid = [tuple(sorted(rng.choice(8, i % 4, replace=False).tolist())) for i in range(40)]
    first = np.array([right[0] if right else -1 for right in valid])
    found = measure(predictions(probs, first, valid=valid))
    hits = [probs[i].argmax() in right for i, right in enumerate(valid) if right]
    in_top5 = [
        bool(set(np.argsort(-probs[i])[:5]) & set(right)) for i, right in enumerate(valid) if right
    ]
    assert (found.num_images, found.num_unlabelled) == (30, 10)
    assert found.heads["model"].top1.value == pytest.approx(100 * np.mean(hits))
    assert found.heads["model"].top5.value == pytest.approx(100 * np.mean(in_top5))
    assert found.heads["model"].top1.value != measure(predictions(probs, first)).heads["model"].top1


def test_one_right_class_each_is_the_same_as_no_list():
    probs, classes = some_answers(40)
    valid = [(int(c),) for c in classes]
    assert measure(predictions(probs, classes, valid=valid)) == measure(predictions(probs, classes))


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_with_fewer_than_five_classes_all_are_in_the_top_five(num_classes):
    probs, classes = some_answers(10, num_classes)
    found = measure(predictions(probs, classes)).heads["model"]
    assert found.top5.value == 100
    assert found.top1.value == pytest.approx(100 * (probs.argmax(1) == classes).mean())


def test_a_single_image_is_measured():
    found = measure(predictions(np.array([[0.1, 0.9]]), np.array([1]))).heads["model"]
    assert found.top1 == (100, pytest.approx(2.5), 100)
    assert found.loss.value == found.loss.low == found.loss.high == pytest.approx(-math.log(0.9))
    assert found.ece.value == pytest.approx(10, abs=1e-5)


# ---------------------------------------------------------------------------------- intervals


def test_heads_are_measured_on_the_same_resamples():
    probs, classes = some_answers(50)
    one = predictions(probs, classes)
    twice = Predictions(
        keys=one.keys,
        classes=one.classes,
        heads={"model": one.heads["model"], "class": one.heads["model"]},
        num_classes=8,
        class_names=one.class_names,
    )
    heads = measure(twice).heads
    assert list(heads) == ["model", "class"]
    assert heads["model"] == heads["class"] == measure(one).heads["model"]


def test_a_seed_decides_the_resamples():
    probs, classes = some_answers(50)
    one = predictions(probs, classes)
    assert measure(one, seed=3) == measure(one, seed=3)
    assert measure(one, seed=3).heads["model"].loss != measure(one, seed=4).heads["model"].loss


def test_resampled_means_are_those_of_drawn_rows(monkeypatch):
    values = np.random.default_rng(0).standard_normal((7, 3))
    rng = np.random.default_rng(5)
    expected = [values[rng.integers(7, size=7)].mean(0) for _ in range(9)]
    monkeypatch.setattr(metrics, "_MAX_COUNTS", 28)  # four at a time
    found = metrics.resampled_means(values, num_resamples=9, seed=5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Answers are right with the probability that they state: 0.75 on average."""
    rng = np.random.default_rng(0)
    num_sets, num_images, num_held = 200, 80, Counter()
    for _ in range(num_sets):
        first = rng.uniform(0.5, 1, num_images)
        classes = (rng.random(num_images) > first).astype(int)
        found = measure(
            predictions(np.stack([first, 1 - first], axis=1), classes), num_resamples=200
        ).heads["model"]
        num_held["top1"] += found.top1.low <= 75 <= found.top1.high
        num_held["confidence"] += found.confidence.low <= 75 <= found.confidence.high
    assert all(0.88 <= held / num_sets <= 0.99 for held in num_held.values()), num_held


def test_when_all_are_right_the_interval_is_the_exact_bound():
    probs = np.tile([0.9, 0.1], (20, 1))
    right, low, high = measure(predictions(probs, np.zeros(20, int))).heads["model"].top1
    assert (right, high) == (100, 100)
    assert (low / 100) ** 20 == pytest.approx(0.025)
    assert measure(predictions(probs, np.ones(20, int))).heads["model"].top1 == (0, 0, 100 - low)


def test_wilsons_interval_has_known_values():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for num_right, num_images, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        value, found_low, found_high = metrics.wilson(num_right, num_images)
        assert value == pytest.approx(100 * num_right / num_images)
        assert (found_low, found_high) == pytest.approx((100 * low, 100 * high), abs=0.005)


# -------------------------------------------------------------------------------- by class


def test_confusions_are_the_off_diagonal_of_scikit_learns_matrix():
    probs, classes = some_answers(200)
    matrix = confusion_matrix(classes, probs.argmax(1), labels=range(8))
    pairs = metrics.confusions(predictions(probs, classes))
    counts = {(pair.right, pair.answer): pair.num_images for pair in pairs}
    expected = {
        (i, j): int(matrix[i, j]) for i in range(8) for j in range(8) if i != j and matrix[i, j]
    }
    assert counts == expected
    order = [(-pair.num_images, -pair.share, pair.right, pair.answer) for pair in pairs]
    assert order == sorted(order)
    for pair in pairs:
        wrong = (classes == pair.right) & (probs.argmax(1) == pair.answer)
        assert pair.share == pytest.approx(100 * wrong.sum() / (classes == pair.right).sum())
        assert pair.confidence == pytest.approx(100 * probs.max(1)[wrong].mean())
    assert metrics.confusions(predictions(probs, classes), most=3) == pairs[:3]


def test_each_class_is_measured_by_itself():
    probs, classes = some_answers(200)
    classes[classes == 6] = 5  # no image of class 6
    rows = metrics.per_class(predictions(probs, classes))
    assert [row.index for row in rows] == [0, 1, 2, 3, 4, 5, 7]
    named = probs.argmax(1)
    for row in rows:
        mine = classes == row.index
        assert row.name == NAMES[row.index] and row.num_images == mine.sum()
        assert row.top1 == metrics.wilson(int((named[mine] == row.index).sum()), int(mine.sum()))
        in_top5 = [row.index in np.argsort(-probs[i])[:5] for i in np.flatnonzero(mine)]
        assert row.top5 == pytest.approx(100 * np.mean(in_top5))
        assert row.num_named == (named == row.index).sum()
        assert row.precision == pytest.approx(100 * mine[named == row.index].mean())
        counts = Counter(named[mine & (named != row.index)].tolist())
        assert row.num_instead == max(counts.values())
        assert counts[NAMES.index(row.instead)] == row.num_instead


def test_classes_are_written_as_csv_that_reads_back():
    probs = np.array([[0.6, 0.3, 0.1]] * 3)
    rows = metrics.per_class(predictions(probs, np.array([0, 0, 1])))
    lines = list(csv.DictReader(io.StringIO(metrics.classes_csv(rows))))
    assert [line["name"] for line in lines] == ["ant", "bee"]
    assert [float(line["top1"]) for line in lines] == [100, 0]
    assert [line["most_often_instead"] for line in lines] == ["", "ant"]
    assert [line["precision"] for line in lines] == ["66.67", ""]
    assert float(lines[0]["top1_low"]) == pytest.approx(rows[0].top1.low, abs=0.005)
