"""How good a segmentation is: exact counts of pixels, then IoU and accuracy.

All of them come from one confusion matrix over the whole data set, summed as integers: images in
any order and on any number of processes give the same bits.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64, Integer
from torch import Tensor

from ..trainer.distributed import Place, reduce


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """How well one class was found."""

    iou: float
    """Percent: pixels that are and were called this class, of those that are or were; NaN for a
    class that neither masks nor predictions have."""
    accuracy: float
    """Percent of the class's own pixels that were called so; NaN if it has none."""
    num_pixels: int
    """Pixels that the masks give to the class."""
    num_predicted: int
    """Pixels with a mask that were called this class."""


@dataclass(frozen=True, kw_only=True)
class SegResult:
    """What an evaluation found."""

    miou: float
    """Mean IoU in percent, over the classes that masks or predictions have."""
    pixel_accuracy: float
    """Percent of the pixels that got their class; called aAcc elsewhere."""
    mean_accuracy: float
    """Mean accuracy in percent over the classes that the masks have; mAcc elsewhere."""
    classes: list[ClassScore]
    """One entry a class, in order."""
    num_images: int
    num_pixels: int
    """Pixels with a class; the ignored ones are not counted."""

    def to_json(self) -> dict[str, Any]:
        """Flatten to plain values; NaN becomes None, which JSON has."""
        facts = asdict(self)
        for score in facts["classes"]:
            score |= {k: None for k in ("iou", "accuracy") if math.isnan(score[k])}
        return facts


class ConfusionMatrix:
    """Counts of pixels by true class (rows) and predicted class (columns).

    Args:
        num_classes: Classes are 0 to num_classes - 1.
        ignore_index: What masks hold where a prediction does not count.
        device: Where the counts are kept.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.num_images = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Integer[Tensor, "h w"], mask: Integer[Tensor, "h w"]) -> None:
        """Count the pixels of an image.

        Args:
            predicted: A class for each pixel.
            mask: What is right; ignore_index where nothing is.

        Raises:
            ValueError: A pixel of either is no class.
        """
        mask = mask.to(self.counts.device).long()
        predicted = predicted.to(self.counts.device).long()
        counted = mask != self.ignore_index
        true, called = mask[counted], predicted[counted]
        self._check(true, "the mask", f", or {self.ignore_index} for pixels to ignore")
        self._check(called, "the prediction", "")
        pairs = torch.bincount(true * self.num_classes + called, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts)
        self.num_images += 1

    def reduce(self, place: Place) -> None:
        """Add up the counts of all processes, in place, on every one of them."""
        reduce(place, self.counts, "sum")
        reduce(place, self.num_images, "sum")

    def result(self) -> SegResult:
        """Compute the metrics.

        Raises:
            ValueError: No pixel was counted.
        """
        counts = self.counts.double().cpu()
        right, true, called = counts.diagonal(), counts.sum(1), counts.sum(0)
        if not true.sum():
            raise ValueError("there is no pixel with a class to evaluate on")
        iou = 100 * right / (true + called - right)
        accuracy = 100 * right / true
        scores = [
            ClassScore(iou=i, accuracy=a, num_pixels=int(t), num_predicted=int(c))
            for i, a, t, c in zip(iou.tolist(), accuracy.tolist(), true.tolist(), called.tolist())
        ]
        return SegResult(
            miou=_mean(iou),
            pixel_accuracy=(100 * right.sum() / true.sum()).item(),
            mean_accuracy=_mean(accuracy),
            classes=scores,
            num_images=int(self.num_images),
            num_pixels=int(true.sum()),
        )

    def _check(self, classes: Int64[Tensor, " n"], what: str, more: str) -> None:
        if not len(classes):
            return
        low, high = (int(value) for value in classes.aminmax())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{what} has a class {wrong}; allowed: 0 to {self.num_classes - 1}{more}"
            )


def _mean(values: Float64[Tensor, " c"]) -> float:
    return values.nanmean().item()
