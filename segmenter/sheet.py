"""A sheet that shows images with the masks that are right beside those that were predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from ..labeler.draw import mounted, scaled
from ..labeler.sheet import stack
from ..labeler.sources import unescape
from .class_sets import ClassSet
from .draw import legend, overlay

_PICTURE_PX = 384


@dataclass(frozen=True)
class Compared:
    """An image with a prediction."""

    key: str
    pixels: UInt8[Tensor, "3 h w"]
    mask: Int64[Tensor, "h w"]
    predicted: Int64[Tensor, "h w"]


def draw_sheet(images: Sequence[Compared], classes: ClassSet, *, ignore_index: int) -> Image.Image:
    """Draw images under each other: as they are, with their masks, with their predictions."""
    return draw_comparison({"prediction": images}, classes, ignore_index=ignore_index)


def draw_comparison(
    answers: Mapping[str, Sequence[Compared]], classes: ClassSet, *, ignore_index: int
) -> Image.Image:
    """Draw images under each other as `draw_sheet` does, with the predictions of several models.

    Args:
        answers: Name of each model → the same images, with its predictions.
        classes: Names and colours.
        ignore_index: Of the masks.
    """
    rows = zip(*answers.values(), strict=True)
    return stack([_row(dict(zip(answers, row)), classes, ignore_index) for row in rows])


def _row(answers: Mapping[str, Compared], classes: ClassSet, ignore_index: int) -> Image.Image:
    image = next(iter(answers.values()))
    photo = Image.fromarray(image.pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    mask = image.mask.cpu()
    is_class = mask != ignore_index
    # What is no class is no pixel's colour, nor of the legend.
    layers = [torch.where(is_class, mask, -1).numpy()]
    words = ["mask"]
    for name, answer in answers.items():
        predicted = answer.predicted.cpu()
        right = int((mask == predicted)[is_class].sum()) / max(1, int(is_class.sum()))
        layers.append(predicted.numpy())
        words.append(f"{name} ({right:.0%} of the pixels right)")
    factor = max(1, _PICTURE_PX // max(photo.size))
    photo = photo.resize((photo.width * factor, photo.height * factor))
    pictures = [scaled(photo, _PICTURE_PX)]
    for labels in layers:
        labels = labels.repeat(factor, 0).repeat(factor, 1)
        picture = overlay(photo, labels, classes, opacity=0.6, longest_px=_PICTURE_PX)
        pictures.append(scaled(picture, _PICTURE_PX))
    title = f"{unescape(image.key)}: {', '.join(words)}"
    together = np.concatenate([labels.ravel() for labels in layers])[None]
    return mounted(pictures, legend(together, classes), title=title)[0]
