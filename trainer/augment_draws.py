"""What augmentation does to each sample: random choices as pure functions of (seed, batch, sample).

Every sample of every batch owns a fixed stretch of one counter-based random sequence. So a draw
needs no state, is the same on every device and after every resume, and does not depend on how many
processes share a batch. docs/feed.md has more.
"""

import math
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64
from numpy.random import Generator, Philox

Interpolation = Literal["random", "bicubic", "bilinear"]

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
"""Random erasing's rectangle, as fraction of the crop and as height / width; timm's defaults."""

COLOR_NUMBERS = 6
ERASING_NUMBERS = 23
LAYER_NUMBERS = 6
"""Uniform numbers that one sample's draw takes: colour jitter, erasing, a RandAugment layer."""

_NUM_TRIES = 10
_SHARE_OF_CUBIC = {"random": 0.5, "bicubic": 1.0, "bilinear": 0.0}
_LEVELS = 10
"""RandAugment's full magnitude; also the largest unless mmax says otherwise."""


def uniforms(
    key: UInt64[np.ndarray, "2"], batch: int, samples: range, width: int
) -> Float64[np.ndarray, "b w"]:
    """Draw numbers in [0, 1) for some samples of a batch.

    Args:
        key: Of the random sequence; made from the seed.
        batch: Number of the batch.
        samples: Places in the batch of all processes together, without gaps.
        width: Numbers for each sample.
    """
    blocks = -(-width // 4)  # one step of the counter makes four numbers
    random = Generator(Philox(key=key, counter=[samples.start * blocks, 0, 0, batch]))
    return random.random((len(samples), 4 * blocks))[:, :width]


# ------------------------------------------------------------------------- colour, erasing


def draw_colors(numbers: Float64[np.ndarray, "b 6"], strength: float) -> "Layers":
    """Draw torchvision's ColorJitter: factors of brightness, contrast, saturation, and their order.

    Args:
        numbers: Uniform.
        strength: Factors lie in 1 ± this.
    """
    kinds = np.array([Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR], np.int64)
    order = numbers[:, 3:].argsort(1)
    factors = 1 + strength * (2 * numbers[:, :3] - 1)
    return Layers(
        operations=kinds[order].T,
        amounts=np.take_along_axis(factors, order, 1).T,
        cubic=np.zeros((3, len(numbers)), bool),
    )


def draw_erased(
    numbers: Float64[np.ndarray, "b 23"], probability: float, image_hw: tuple[int, int]
) -> Int64[np.ndarray, "b 4"]:
    """Draw random erasing's rectangles as timm does: the first of ten that fits, if any.

    Returns:
        (top, left, height, width) in pixels of the crop; height 0 where nothing is erased.
    """
    limits = np.array(image_hw)
    areas, ratios = numbers[:, :_NUM_TRIES], numbers[:, _NUM_TRIES : 2 * _NUM_TRIES]
    area = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * areas) * limits.prod()
    low, high = np.log(ERASED_RATIO)
    ratio = np.exp(low + (high - low) * ratios)
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], 2))).astype(np.int64)
    fits = np.all(sides < limits, axis=2)
    chosen = sides[np.arange(len(numbers)), fits.argmax(1)]
    wanted = (numbers[:, -3] < probability) & np.any(fits, axis=1)
    chosen = np.where(wanted[:, None], chosen, 0)
    corner = np.floor(numbers[:, -2:] * (limits - chosen + 1)).astype(np.int64)
    return np.concatenate([corner, chosen], 1)


# ----------------------------------------------------------------------------- RandAugment


class Operation(IntEnum):
    """RandAugment's operations in timm's order."""

    NONE = -1
    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


NUM_OPERATIONS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How RandAugment draws (https://arxiv.org/abs/1909.13719), in timm's terms."""

    magnitude: int = _LEVELS
    """Strength of every operation, of 10."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude; infinite: it is uniform from 0 to `magnitude`."""
    magnitude_max: int = _LEVELS
    """Magnitudes above are cut to this."""
    num_layers: int = 2
    """Operations drawn for each image, one after the other, with replacement."""
    probability: float = 0.5
    """That a drawn operation is applied."""
    increasing: bool = False
    """Whether posterize, solarize and the four enhancements grow stronger with the magnitude."""


_SECTIONS = {
    "m": r"\d+",
    "mstd": r"\d+(\.\d+)?",
    "mmax": r"[1-9]\d*",
    "n": r"[1-9]\d*",
    "p": r"0(\.\d+)?|1(\.0+)?",
    "inc": r"[01]",
}
_ALLOWED = (
    "'none', or 'rand' followed by any of -mM -mstdS -mmaxX -nN -pP -inc0 -inc1, "
    "e.g. 'rand-m9-mstd0.5-inc1'"
)


def parse_policy(text: str) -> Policy:
    """Read timm's notation, e.g. "rand-m9-mstd0.5-inc1".

    m is the magnitude, mstd its standard deviation (above 100: uniform), mmax its limit, n the
    number of layers, p the probability of each; inc1 takes the increasing variants.

    Raises:
        ValueError: For anything else; timm's other sets of operations (t…, once w…) included.
    """
    head, *sections = text.split("-")
    if head != "rand":
        raise ValueError(f"{text!r} is not known; allowed: {_ALLOWED}")
    values: dict[str, str] = {}
    for section in sections:
        name = section.rstrip("0123456789.")
        number = section.removeprefix(name)
        if not re.fullmatch(_SECTIONS.get(name, "unknown"), number):
            raise ValueError(f"{text!r}, where {section!r} is not supported; allowed: {_ALLOWED}")
        if name in values:
            raise ValueError(f"{text!r}, where {name!r} stands twice; allowed: {_ALLOWED}")
        values[name] = number
    std = float(values.get("mstd", 0))
    return Policy(
        magnitude=int(values.get("m", _LEVELS)),
        magnitude_std=math.inf if std > 100 else std,
        magnitude_max=int(values.get("mmax", _LEVELS)),
        num_layers=int(values.get("n", 2)),
        probability=float(values.get("p", 0.5)),
        increasing=values.get("inc") == "1",
    )


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The operations of a batch, layer by layer in the order of application."""

    operations: Int64[np.ndarray, "n b"]
    """Numbers of Operation; NONE where the layer is not applied."""
    amounts: Float64[np.ndarray, "n b"]
    """What the operation takes: degrees, shear, part of the side, bits, threshold, addend, factor;
    0 where it takes nothing."""
    cubic: Bool[np.ndarray, "n b"]
    """Whether a geometric operation interpolates bicubically, not bilinearly."""

    def __getitem__(self, which: slice) -> "Layers":
        """Take some of the images."""
        return Layers(
            operations=self.operations[:, which],
            amounts=self.amounts[:, which],
            cubic=self.cubic[:, which],
        )


def draw_layers(
    numbers: Float64[np.ndarray, "b w"], policy: Policy, interpolation: Interpolation
) -> Layers:
    """Draw RandAugment as timm does.

    Args:
        numbers: Uniform; LAYER_NUMBERS for each layer.
        policy: What to draw from.
        interpolation: Of geometric operations; "random" draws bilinear or bicubic for each.
    """
    by_layer = numbers.reshape(len(numbers), policy.num_layers, LAYER_NUMBERS)
    drawn, applied, radius, angle, sign, filter_ = by_layer.transpose(2, 1, 0)
    operations = np.floor(drawn * NUM_OPERATIONS).astype(np.int64)
    if math.isinf(policy.magnitude_std):
        magnitudes = policy.magnitude * radius
    else:  # Box and Muller's transform
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)
        magnitudes = policy.magnitude + policy.magnitude_std * normal
    levels = magnitudes.clip(0, policy.magnitude_max) / _LEVELS
    by_operation = _amounts(levels, np.where(sign < 0.5, -1, 1), policy.increasing)
    amounts = np.select([operations == kind for kind in by_operation], [*by_operation.values()])
    is_applied = applied < policy.probability
    return Layers(
        operations=np.where(is_applied, operations, Operation.NONE),
        amounts=np.where(is_applied, amounts, 0.0),
        cubic=filter_ < _SHARE_OF_CUBIC[interpolation],
    )


def _amounts(
    levels: Float64[np.ndarray, "n b"], signs: Int64[np.ndarray, "n b"], increasing: bool
) -> dict[Operation, Float64[np.ndarray, "n b"]]:
    """What each operation takes at each level (magnitude / 10); absent: nothing."""
    bits = np.trunc(levels * 4)
    threshold = np.minimum(256, np.trunc(levels * 256))
    factor = levels * 1.8 + 0.1
    if increasing:
        bits = 4 - bits
        threshold = 256 - threshold
        factor = np.maximum(0.1, 1 + signs * levels * 0.9)
    return {
        Operation.ROTATE: signs * levels * 30,
        Operation.POSTERIZE: bits,
        Operation.SOLARIZE: threshold,
        Operation.SOLARIZE_ADD: np.minimum(128, np.trunc(levels * 110)),
        Operation.COLOR: factor,
        Operation.CONTRAST: factor,
        Operation.BRIGHTNESS: factor,
        Operation.SHARPNESS: factor,
        Operation.SHEAR_X: signs * levels * 0.3,
        Operation.SHEAR_Y: signs * levels * 0.3,
        Operation.TRANSLATE_X: signs * levels * 0.45,
        Operation.TRANSLATE_Y: signs * levels * 0.45,
    }


def layer_views(layers: Layers, image_hw: tuple[int, int]) -> Float64[np.ndarray, "n b 2 3"]:
    """Where each layer takes its pixels from: its output's unit square → its input's.

    Composed from the first layer to the last, on the right of the view of the layers' input, they
    give the view of their output. Layers without a geometric operation have the identity.
    """
    height, width = image_hw
    ops, amounts = layers.operations, layers.amounts
    views = np.zeros((*ops.shape, 2, 3))
    views[..., 0, 0] = views[..., 1, 1] = 1
    # Shears keep the upper left corner, in pixels; rotations the centre.
    views[..., 0, 1] = np.where(ops == Operation.SHEAR_X, amounts * height / width, 0)
    views[..., 1, 0] = np.where(ops == Operation.SHEAR_Y, amounts * width / height, 0)
    views[..., 0, 2] = np.where(ops == Operation.TRANSLATE_X, amounts, 0)
    views[..., 1, 2] = np.where(ops == Operation.TRANSLATE_Y, amounts, 0)
    turned = ops == Operation.ROTATE
    views[turned] = _rotations(np.radians(amounts[turned]), height / width)
    return views


def _rotations(angles: Float64[np.ndarray, " t"], aspect: float) -> Float64[np.ndarray, "t 2 3"]:
    """Views of an image of height / width = aspect turned counter-clockwise about its centre."""
    cos, sin = np.cos(angles), np.sin(angles)
    views = np.empty((len(angles), 2, 3))
    views[:, 0, 0] = views[:, 1, 1] = cos
    views[:, 0, 1], views[:, 1, 0] = -sin * aspect, sin / aspect
    views[:, :, 2] = 0.5 - views[:, :, :2].sum(2) / 2
    return views
