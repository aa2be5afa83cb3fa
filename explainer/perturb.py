"""Take pixels away in the order of a heatmap, or put them in, and watch the answer change.

    positive    the hottest pixels go first: a faithful map makes accuracy fall at once
    negative    the coldest pixels go first: a faithful map lets it stand
    insertion   the hottest pixels come first, into an image that shows little
    deletion    the hottest pixels go first, to the last one; probability instead of accuracy

Positive and negative are the tests of Transformer Attribution (https://arxiv.org/abs/2012.09838):
10, 20, … 90 % of the pixels become black. Insertion and deletion are those of RISE
(https://arxiv.org/abs/1806.07421).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

Curve = Literal["positive", "negative", "insertion", "deletion"]
CURVES: tuple[Curve, ...] = get_args(Curve)
ACCURACY_CURVES: tuple[Curve, ...] = ("positive", "negative")
"""Those whose area is that of accuracy; of the others it is that of the class's probability."""
Baseline = Literal["black", "mean", "blur"]
"""What stands where pixels are missing: 0 before normalising, 0 after it, or the blurred image."""

Answer = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b c"]]
"""Normalised images → logits."""

_TENTHS = 10
_BLUR_PX, _BLUR_DEVIATION_PX = 11, 5.0  # as RISE


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which curves, and how insertion and deletion go; the perturbations are as published."""

    curves: tuple[Curve, ...] = CURVES
    num_steps: int = 16
    """Of insertion and deletion, from no pixel to all; RISE has one a row of pixels: 224."""
    insert_into: Baseline = "blur"
    delete_to: Baseline = "mean"

    def __post_init__(self) -> None:
        """Refuse what makes no curve."""
        if self.num_steps < 2:
            raise ValueError(f"num_steps = {self.num_steps}; allowed: 2 or more, e.g. 16")

    def fractions(self, curve: Curve) -> list[float]:
        """Return the parts of the pixels that are changed at each point of a curve, from 0 on."""
        if curve in ACCURACY_CURVES:
            return [step / _TENTHS for step in range(_TENTHS)]
        return [step / self.num_steps for step in range(self.num_steps + 1)]


class Points(NamedTuple):
    """A curve of one image."""

    answers: Int64[Tensor, " s"]
    """The first answer at each point."""
    probability: Float64[Tensor, " s"]
    """Of the class in question."""


class Perturber:
    """One image that is taken apart by any number of heatmaps.

    No number depends on other images: all are asked about in batches of this image alone.

    Args:
        answer: The model.
        image: Normalised pixels.
        protocol: The curves.
        mean: Of the normalisation, a value per channel.
        std: Of the normalisation.
        batch_size: Images to ask about at a time.
    """

    def __init__(
        self,
        answer: Answer,
        image: Float[Tensor, "3 h w"],
        protocol: Protocol,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 32,
    ) -> None:
        self._answer, self._image, self._batch_size = answer, image, batch_size
        self._protocol = protocol
        black = (-torch.tensor(mean) / torch.tensor(std)).to(image)[:, None, None]
        self._baselines: dict[Baseline, Tensor] = {
            "black": black.expand_as(image),
            "mean": torch.zeros_like(image),
            "blur": blurred(image),
        }
        whole = self._ask(torch.stack([image, *self._baselines.values()]))
        self._clean = whole[:1]
        self._of_baseline = {
            name: whole[i : i + 1] for i, name in enumerate(self._baselines, start=1)
        }

    @property
    def best(self) -> int:
        """The model's answer to the image as it is."""
        return int(self._clean.argmax())

    def probability(self, class_index: int) -> float:
        """Return the probability of a class in the image as it is."""
        return float(self._clean.softmax(-1)[0, class_index])

    def curves(self, heat: Float[Tensor, "h w"], class_index: int) -> dict[Curve, Points]:
        """Follow each curve of the protocol.

        Args:
            heat: A value per pixel. Of equal ones, the pixel further up and left counts as hotter
                where the hottest come first, and as colder where the coldest do.
            class_index: Whose probability to follow.
        """
        names = self._protocol.curves
        if not names:
            return {}
        inner = [self._steps(name, heat) for name in names]
        found = self._ask(torch.cat(inner)).split([len(images) for images in inner])
        curves: dict[Curve, Points] = {}
        for name, own in zip(names, found, strict=True):
            first, last = self._ends(name)
            logits = torch.cat([first, own, last])
            probability = logits.softmax(-1)[:, class_index]
            curves[name] = Points(logits.argmax(-1).cpu(), probability.cpu())
        return curves

    def _steps(self, name: Curve, heat: Float[Tensor, "h w"]) -> Float[Tensor, "s 3 h w"]:
        """Make the images of a curve, but those that are the same for every heatmap."""
        counts = _counts(name, self._protocol, heat.numel())
        if name in ACCURACY_CURVES:
            black = self._baselines["black"]
            return replaced(self._image, black, heat, counts, lowest_first=name == "negative")
        if name == "insertion":
            return replaced(self._baselines[self._protocol.insert_into], self._image, heat, counts)
        return replaced(self._image, self._baselines[self._protocol.delete_to], heat, counts)

    def _ends(self, name: Curve) -> tuple[Float64[Tensor, "_ c"], Float64[Tensor, "_ c"]]:
        if name == "insertion":
            return self._of_baseline[self._protocol.insert_into], self._clean
        if name == "deletion":
            return self._clean, self._of_baseline[self._protocol.delete_to]
        return self._clean, self._clean[:0]

    @torch.inference_mode()
    def _ask(self, images: Float[Tensor, "n 3 h w"]) -> Float64[Tensor, "n c"]:
        parts = images.split(self._batch_size)
        return torch.cat([self._answer(part).double() for part in parts])


def replaced(
    start: Float[Tensor, "3 h w"],
    end: Float[Tensor, "3 h w"],
    heat: Float[Tensor, "h w"],
    counts: Sequence[int],
    *,
    lowest_first: bool = False,
) -> Float[Tensor, "s 3 h w"]:
    """Put pixels of one image into another, as many as each count says.

    Args:
        start: Where nothing is replaced yet.
        end: Where pixels come from.
        heat: The hottest pixels are replaced first; of equal ones, those further up and left.
        counts: Numbers of pixels.
        lowest_first: Whether the coldest are replaced first instead.
    """
    order = heat.flatten().argsort(descending=not lowest_first, stable=True)
    places = torch.arange(len(order), device=order.device)
    rank = torch.empty_like(order).scatter_(0, order, places).view_as(heat)
    is_replaced = rank < torch.tensor(counts, device=order.device)[:, None, None]
    return torch.where(is_replaced[:, None], end, start)


def blurred(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
    """Blur as RISE does: a Gaussian of 5 px, cut to 11 × 11; beyond its edge the image is mirrored.

    (RISE has its mean there.)
    """
    reach = min(_BLUR_PX // 2, min(image.shape[-2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / _BLUR_DEVIATION_PX) ** 2)
    kernel = (weights / weights.sum()).to(image)
    padded = F.pad(image[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])[:, 0]


def area_under(
    fractions: Sequence[float], values: Float64[np.ndarray, "n s"]
) -> Float64[np.ndarray, " n"]:
    """Integrate curves by trapezes, in percent.

    The published perturbation curves end at 0.9, so that their best is 90 and not 100.
    """
    return 100 * np.trapezoid(values, np.asarray(fractions), axis=1)


def _counts(name: Curve, protocol: Protocol, num_pixels: int) -> list[int]:
    """Return numbers of pixels, rounded down, but those of the ends that every heatmap has."""
    if name in ACCURACY_CURVES:
        return [num_pixels * step // _TENTHS for step in range(1, _TENTHS)]
    return [num_pixels * step // protocol.num_steps for step in range(1, protocol.num_steps)]
