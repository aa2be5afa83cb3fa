"""A sheet that shows images with the masks that are right beside those that were predicted."""

from collections.abc import Sequence
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
    return stack([_row(image, classes, ignore_index) for image in images])


def _row(image: Compared, classes: ClassSet, ignore_index: int) -> Image.Image:
    photo = Image.fromarray(image.pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    mask, predicted = image.mask.cpu(), image.predicted.cpu()
    is_class = mask != ignore_index
    right = int((mask == predicted)[is_class].sum()) / max(1, int(is_class.sum()))
    # What is no class is no pixel's colour, nor of the legend.
    true = torch.where(is_class, mask, -1).numpy()
    both = np.concatenate([true.ravel(), predicted.numpy().ravel()])[None]
    factor = max(1, _PICTURE_PX // max(photo.size))
    photo = photo.resize((photo.width * factor, photo.height * factor))
    pictures = [scaled(photo, _PICTURE_PX)]
    for labels in (true, predicted.numpy()):
        labels = labels.repeat(factor, 0).repeat(factor, 1)
        picture = overlay(photo, labels, classes, opacity=0.6, longest_px=_PICTURE_PX)
        pictures.append(scaled(picture, _PICTURE_PX))
    title = f"{unescape(image.key)}: mask, prediction; {right:.0%} of the pixels are right"
    return mounted(pictures, legend(both, classes), title=title)[0]
