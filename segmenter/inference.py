"""From a photo to a class for each of its pixels: resize, window by window, several sizes, flipped.

The rules are those by which the published numbers on ADE20K were measured:

* An image is resized so that its shorter side has 512 px and its longer one at most 2048,
  bilinearly, without antialiasing, to whole levels of brightness.
* "slide" computes windows of 512 px every 341 px, the last one of a row pushed back to the edge,
  and averages the logits where windows overlap; "whole" computes the image at once.
* Logits are resized to the image's own size, and the class with the highest one is the answer.
* With several sizes (0.5 to 1.75 of the above) and flips, probabilities are averaged at the
  image's own size, each pass by the rule above.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from .backbone import MIN_SIDE_PX
from .uper_net import UperNet, resize

PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Sizes of the published multi-scale numbers; each is computed with and without a flip."""

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_WINDOWS_AT_ONCE = 4
_BAND_BYTES = 1 << 27
"""Of logits at an image's own size: 150 classes of a photo from a phone would take 7 GB at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceConfig:
    """How an image is seen: the [inference] table of a segmentation recipe."""

    mode: Literal["slide", "whole"] = "slide"
    """Window by window, or the whole image at once."""
    short_px: int = 512
    """What the shorter side of an image is resized to, if the longer one allows it."""
    long_px: int = 2048
    """Most pixels of the longer side."""
    window_px: int = 512
    """Side of a window; no effect on "whole"."""
    stride_px: int = 341
    """From one window to the next; no effect on "whole"."""

    def __post_init__(self) -> None:
        short, window, stride = self.short_px, self.window_px, self.stride_px
        if not MIN_SIDE_PX <= short <= self.long_px:
            raise ValueError(
                f"inference.short_px = {short}; allowed: {MIN_SIDE_PX} to inference.long_px = "
                f"{self.long_px}"
            )
        if window < MIN_SIDE_PX:
            raise ValueError(f"inference.window_px = {window}; allowed: >= {MIN_SIDE_PX}")
        if not 1 <= stride <= window:
            raise ValueError(
                f"inference.stride_px = {stride}; allowed: 1 to inference.window_px = {window}, or "
                "pixels between two windows would never be seen"
            )


@torch.inference_mode()
def segment(
    model: UperNet,
    image: UInt8[Tensor, "3 h w"],
    config: InferenceConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    precision: Precision = "fp32",
) -> Int64[Tensor, "h w"]:
    """Classify every pixel of an image.

    Several passes add up probabilities at the image's own size: 4 bytes for each class and pixel.

    Args:
        model: In evaluation mode.
        image: RGB, on any device.
        config: How it is seen.
        mean: Subtracted from each channel, in [0, 1].
        std: Divides each channel after that.
        scales: Factors of config.short_px and config.long_px, one pass each.
        flip: Whether each pass is repeated on the mirrored image.
        precision: Arithmetic of the forward pass; logits are averaged in float32.

    Returns:
        A class for each pixel, on the model's device.

    Raises:
        ValueError: The image is too small or too narrow.
    """
    assert not model.training
    device = next(model.parameters()).device
    image = image.to(device)
    image_hw = (image.shape[1], image.shape[2])
    passes = [
        (scale, flipped) for scale in scales for flipped in ((False, True) if flip else (False,))
    ]
    total = None
    for scale, flipped in passes:
        pixels = view(image, config, mean=mean, std=std, scale=scale)[None]
        pixels = pixels.flip(3) if flipped else pixels
        with torch.autocast(device.type, _DTYPES.get(precision), enabled=precision != "fp32"):
            logits = view_logits(model, pixels, config)
        logits = logits.flip(3) if flipped else logits
        if len(passes) == 1:
            return torch.cat([band.argmax(1)[0] for band in _bands(logits, image_hw)])
        probabilities = torch.cat([band.softmax(1) for band in _bands(logits, image_hw)], dim=2)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total.argmax(1)[0]


def view(
    image: UInt8[Tensor, "3 h w"],
    config: InferenceConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: float = 1.0,
) -> Float[Tensor, "3 new_h new_w"]:
    """Resize and normalise an image as the model is to see it."""
    size = view_hw((image.shape[1], image.shape[2]), config, scale=scale)
    pixels = resize(image[None].float(), size)[0].round() / 255
    shape = (3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def view_hw(
    image_hw: tuple[int, int], config: InferenceConfig, *, scale: float = 1.0
) -> tuple[int, int]:
    """Compute the height and width to which an image of (height, width) px is resized."""
    short_px, long_px = int(config.short_px * scale), int(config.long_px * scale)
    factor = min(short_px / min(image_hw), long_px / max(image_hw))
    height, width = (max(1, int(side * factor + 0.5)) for side in image_hw)
    return height, width


def why_too_small(
    image_hw: tuple[int, int], config: InferenceConfig, *, scales: Sequence[float] = (1.0,)
) -> str | None:
    """Say why an image cannot be segmented; None if it can."""
    seen = view_hw(image_hw, config, scale=min(scales))
    if min(seen) >= MIN_SIDE_PX:
        return None
    (height, width), (seen_height, seen_width) = image_hw, seen
    return (
        f"{height} × {width} px (height × width) would be seen at {seen_height} × {seen_width} px; "
        f"both sides must have {MIN_SIDE_PX} px at least"
    )


def view_logits(
    model: UperNet, images: Float[Tensor, "b 3 h w"], config: InferenceConfig
) -> Float[Tensor, "b c h w"]:
    """Compute the logits of images as they are, window by window or whole, in float32."""
    if config.mode == "whole":
        return model(images).float()
    return slide_logits(model, images, window_px=config.window_px, stride_px=config.stride_px)


def slide_logits(
    model: UperNet, images: Float[Tensor, "b 3 h w"], *, window_px: int, stride_px: int
) -> Float[Tensor, "b c h w"]:
    """Average the logits of overlapping windows, in float32; a small image is one window."""
    height, width = images.shape[-2:]
    corners = [
        (y, x)
        for y in window_starts(height, window_px, stride_px)
        for x in window_starts(width, window_px, stride_px)
    ]
    total = images.new_zeros((len(images), model.num_classes, height, width), dtype=torch.float32)
    count = images.new_zeros((height, width), dtype=torch.float32)
    for first in range(0, len(corners), _WINDOWS_AT_ONCE):
        some = corners[first : first + _WINDOWS_AT_ONCE]
        windows = [images[:, :, y : y + window_px, x : x + window_px] for y, x in some]
        logits = model(torch.cat(windows)).float().split(len(images))
        for (y, x), part in zip(some, logits):
            total[:, :, y : y + window_px, x : x + window_px] += part
            count[y : y + window_px, x : x + window_px] += 1
    return total / count


def window_starts(length_px: int, window_px: int, stride_px: int) -> list[int]:
    """Say where windows begin along a side; the last one ends where the side does."""
    last = max(length_px - window_px, 0)
    return [*range(0, last, stride_px), last]


def _bands(
    logits: Float[Tensor, "1 c h w"], image_hw: tuple[int, int]
) -> Iterator[Float[Tensor, "1 c band_h image_w"]]:
    """Resize logits to an image's size as `resize` does, some rows at a time."""
    height, width = image_hw
    num_rows = max(1, _BAND_BYTES // (4 * logits.shape[1] * width))
    rows = torch.arange(height, device=logits.device)
    source = ((rows + 0.5) * (logits.shape[2] / height) - 0.5).clamp(min=0)
    above = source.floor().long().clamp(max=logits.shape[2] - 1)
    below = (above + 1).clamp(max=logits.shape[2] - 1)
    share = (source - above).to(logits.dtype)[:, None]
    for first in range(0, height, num_rows):
        band = slice(first, first + num_rows)
        top, bottom = logits[:, :, above[band]], logits[:, :, below[band]]
        mixed = torch.lerp(top, bottom, share[band])
        yield F.interpolate(
            mixed, size=(mixed.shape[2], width), mode="bilinear", align_corners=False
        )
