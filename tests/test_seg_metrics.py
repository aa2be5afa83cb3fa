"""The confusion matrix and what is made of it, against scikit-learn."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from tokenlabel.segmenter.metrics import ConfusionMatrix
from tokenlabel.trainer.distributed import Place

ONE = Place(device=torch.device("cpu"))
NO_MEAN: Any = None  # scikit-learn's annotations know of no such thing


def pairs(num_images: int = 5, num_classes: int = 6, seed: int = 0) -> list[tuple]:
    """Predictions that are right now and then, and masks with ignored pixels, of several sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num_images):
        size = (7 + number, 9)
        mask = rng.integers(0, num_classes, size)
        predicted = np.where(rng.random(size) < 0.6, mask, rng.integers(0, num_classes, size))
        mask[rng.random(size) < 0.2] = 255
        found.append((torch.from_numpy(predicted), torch.from_numpy(mask)))
    return found


def counted(images: list[tuple], num_classes: int = 6) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    for predicted, mask in images:
        matrix.add(predicted, mask)
    return matrix


def flat(images: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes of all pixels that count."""
    true = np.concatenate([mask.numpy().ravel() for _, mask in images])
    called = np.concatenate([predicted.numpy().ravel() for predicted, _ in images])
    return true[true != 255], called[true != 255]


def test_counts_and_metrics_are_those_of_scikit_learn():
    images = pairs()
    true, called = flat(images)
    matrix = counted(images)
    assert np.array_equal(matrix.counts.numpy(), confusion_matrix(true, called))
    result = matrix.result()
    iou = np.array(jaccard_score(true, called, average=NO_MEAN))
    assert [score.iou for score in result.classes] == pytest.approx(100 * iou)
    assert result.miou == pytest.approx(100 * iou.mean())
    assert result.pixel_accuracy == pytest.approx(100 * accuracy_score(true, called))
    recall = np.array(recall_score(true, called, average=NO_MEAN))
    assert [score.accuracy for score in result.classes] == pytest.approx(100 * recall)
    assert result.mean_accuracy == pytest.approx(100 * recall.mean())
    assert [s.num_pixels for s in result.classes] == np.bincount(true).tolist()
    assert [s.num_predicted for s in result.classes] == np.bincount(called).tolist()
    assert (result.num_images, result.num_pixels) == (5, len(true))


def test_iou_is_taken_over_the_whole_set_and_not_per_image():
    images = [
        (torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 0, 0]])),
        (torch.tensor([[1]]), torch.tensor([[1]])),
    ]
    result = counted(images, num_classes=2).result()
    assert [score.iou for score in result.classes] == pytest.approx([75, 50])


def test_a_class_that_nobody_has_is_left_out_of_the_means():
    images = [(torch.tensor([[0, 0, 2]]), torch.tensor([[0, 0, 0]]))]
    result = counted(images, num_classes=4).result()
    first, second, third, fourth = result.classes
    assert math.isnan(second.iou)
    assert math.isnan(fourth.iou)
    assert third.iou == 0  # called, but never there: it counts against the mean
    assert math.isnan(third.accuracy)
    assert result.miou == pytest.approx((200 / 3 + 0) / 2)
    assert result.mean_accuracy == pytest.approx(first.accuracy)
    facts = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert facts["classes"][1]["iou"] is None
    assert facts["classes"][2] == {
        "iou": 0.0,
        "accuracy": None,
        "num_pixels": 0,
        "num_predicted": 1,
    }


def test_predictions_on_ignored_pixels_do_not_count():
    predicted = torch.tensor([[0, 1, 1]])
    matrix = counted([(predicted, torch.tensor([[0, 255, 255]]))], num_classes=2)
    assert matrix.counts.tolist() == [[1, 0], [0, 0]]
    matrix = ConfusionMatrix(2, ignore_index=7)
    matrix.add(predicted, torch.tensor([[0, 7, 1]]))
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]


def test_any_order_and_any_split_over_processes_gives_the_same_bits(monkeypatch):
    images = pairs(num_images=9, seed=4)
    whole = counted(images).result()
    random.Random(0).shuffle(images)
    assert counted(images).result() == whole
    parts = [counted(images[rank::3]) for rank in range(3)]
    sums = [torch.stack([part.counts for part in parts]).sum(0)]
    sums.append(torch.stack([part.num_images for part in parts]).sum(0))

    def all_reduce(tensor, operation):
        assert operation == torch.distributed.ReduceOp.SUM
        assert tensor.dtype == torch.int64  # no rounding, whatever the order of the sum
        tensor.copy_(next(total for total in sums if total.shape == tensor.shape))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for rank, part in enumerate(parts):
        part.reduce(Place(device=torch.device("cpu"), rank=rank, world_size=3))
        assert part.result() == whole
        part.reduce(ONE)
        assert part.result() == whole


def test_masks_of_8_bits_are_counted_alike():
    images = pairs()
    small = [(predicted, mask.to(torch.uint8)) for predicted, mask in images]
    assert counted(small).result() == counted(images).result()


@pytest.mark.parametrize(
    "predicted, mask, message",
    [
        (0, 6, "the mask has a class 6; allowed: 0 to 5, or 255 for pixels to ignore"),
        (0, -1, "the mask has a class -1; allowed: 0 to 5, or 255"),
        (6, 0, "the prediction has a class 6; allowed: 0 to 5$"),
        (255, 0, "the prediction has a class 255"),
    ],
)
def test_a_pixel_that_is_no_class_is_refused_and_nothing_counted(predicted, mask, message):
    matrix = ConfusionMatrix(6)
    with pytest.raises(ValueError, match=message):
        matrix.add(torch.tensor([[0, predicted]]), torch.tensor([[1, mask]]))
    assert matrix.counts.sum() == 0
    assert matrix.num_images == 0


def test_nothing_to_evaluate_is_said():
    matrix = ConfusionMatrix(6)
    matrix.add(torch.tensor([[0, 1]]), torch.tensor([[255, 255]]))
    with pytest.raises(ValueError, match="no pixel with a class"):
        matrix.result()
