"""How an image meets the teacher: which part of it, at what size.

native   the whole image, its shape kept as nearly as whole cells allow, its area that of the
         teacher's square image: 500×375 px become 672×512 for a teacher at 576, a grid of 16×21
stretch  the whole image, made square
center   the largest square in the middle; the map's window says what part of the image that is
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image

from .teacher import round_to_stride

FITS = ("native", "stretch", "center")

MAX_ASPECT = 4.0
"""Images longer or taller than this are squeezed to this ratio of sides by the native fit.

They are still covered whole: a panorama of 20,000×300 px meets the teacher at 4:1, and not as a
strip that is a single cell high."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_BY_TORCH = ("bilinear", "bicubic")
"""Where torch takes half of Pillow's time, for whole images; it comes within 2 of 255 of Pillow."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How one image goes into the teacher's input."""

    size: tuple[int, int]
    """(height, width) of the teacher's input, px. Images of one size share a batch."""
    box: tuple[float, float, float, float]
    """(left, upper, right, lower): the part of the image that fills it, px."""
    window: tuple[float, float, float, float]
    """The same part in image fractions; the window of the label map."""


def place(image_size: tuple[int, int], *, fit: str, teacher_size: int, stride: int) -> Placement:
    """Decide how an image meets the teacher.

    Args:
        image_size: (width, height) of the image, px, each at least 1.
        fit: One of FITS.
        teacher_size: Side of the teacher's square image, px.
        stride: Side of a cell, px. The sides of the result are multiples of it, at least one.

    Raises:
        ValueError: If there is no such fit.
    """
    check_fit(fit)
    width, height = image_size
    if fit == "center":
        box = _middle_square(width, height)
    else:
        box = (0.0, 0.0, float(width), float(height))
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT) if fit == "native" else 1.0
    size = (
        round_to_stride(teacher_size / aspect**0.5, stride),
        round_to_stride(teacher_size * aspect**0.5, stride),
    )
    left, upper, right, lower = box
    return Placement(size, box, (left / width, upper / height, right / width, lower / height))


def resize(
    image: Image.Image, placement: Placement, *, interpolation: str
) -> UInt8[np.ndarray, "h w 3"]:
    """Cut and resize an RGB image as placed, with antialiasing.

    Args:
        image: The whole image.
        placement: From place, for an image of this size.
        interpolation: nearest, bilinear, bicubic or lanczos; anything else means bicubic.
    """
    height, width = placement.size
    interpolation = interpolation if interpolation in _RESAMPLING else "bicubic"
    if interpolation in _BY_TORCH and placement.box == (0, 0, *image.size):
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = F.interpolate(planes, (height, width), mode=interpolation, antialias=True)
        return resized[0].permute(1, 2, 0).contiguous().numpy()
    return np.array(image.resize((width, height), _RESAMPLING[interpolation], box=placement.box))


def check_fit(fit: str) -> None:
    """Check that a fit exists.

    Raises:
        ValueError: If not.
    """
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is not one of {', '.join(FITS)}")


def _middle_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side
