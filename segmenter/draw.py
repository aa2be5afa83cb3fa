"""Pictures of segmentations: an overlay with a legend for people, a PNG of indices for programs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer
from PIL import Image

from ..labeler.draw import (
    Colour,
    largest_region,
    middle_cell,
    mounted,
    scaled,
    write_names,
)
from .class_sets import ClassSet

MAX_PALETTE = 256
"""Most classes that a PNG with a palette can have."""

_NUM_NAMED = 24
_NAMED_SHARE = 0.02
"""Classes with less than this part of the pixels are named in the legend only."""
_COARSE_CELLS = 48
"""Along the longer side of the grid on which the largest region of a class is looked for."""
_OTHER: Colour = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class SegEntry:
    """What a colour stands for."""

    name: str
    colour: Colour
    share: float
    """Of the pixels that have a class."""

    def __str__(self) -> str:
        percent = f"{self.share:.0%}" if self.share >= 0.01 else "< 1%"
        return f"{self.name} {percent}"


def draw_segmentation(
    image: Image.Image,
    labels: Integer[np.ndarray, "h w"],
    classes: ClassSet,
    *,
    title: str,
    opacity: float = 0.5,
    longest_px: int = 1024,
) -> Image.Image:
    """Paint each pixel's class over an image, name large regions, and put the legend below.

    Args:
        image: The image, as large as the labels.
        labels: Class of each pixel; what is no index of a class is not painted.
        classes: Names and colours.
        title: One line above the picture.
        opacity: Of the colours, 0 to 1.
        longest_px: Longer side of the overlay; smaller images stay as they are.
    """
    picture = overlay(image, labels, classes, opacity=opacity, longest_px=longest_px)
    _name_regions(picture, labels, classes)
    sheet, _ = mounted([picture], legend(labels, classes), title=title)
    return sheet


def overlay(
    image: Image.Image,
    labels: Integer[np.ndarray, "h w"],
    classes: ClassSet,
    *,
    opacity: float = 0.5,
    longest_px: int = 1024,
) -> Image.Image:
    """Paint each pixel's class over an image; bright lines run where classes meet.

    Args: see `draw_segmentation`.
    """
    assert image.size == labels.shape[::-1]
    photo = image.convert("RGB")
    if max(photo.size) > longest_px:
        photo = scaled(photo, longest_px)
        labels = _nearest(labels, (photo.height, photo.width))
    pixels = np.asarray(photo, dtype=np.float32)
    is_class = (labels >= 0) & (labels < len(classes.names))
    colours = np.array(classes.colours, dtype=np.float32)[np.where(is_class, labels, 0)]
    alpha = np.where(is_class, opacity, 0.0)[..., None]
    painted = pixels + alpha * (colours - pixels)
    # Lines in a lighter tone of the colour show the edge of a region whose colour is the photo's.
    line = (_is_edge(labels) & is_class)[..., None]
    painted = np.where(line, 0.4 * colours + 0.6 * 255, painted)
    return Image.fromarray(np.clip(painted + 0.5, 0, 255).astype(np.uint8))


def legend(labels: Integer[np.ndarray, "h w"], classes: ClassSet) -> list[SegEntry]:
    """List the classes of an image, the largest first; the smallest of very many share a line."""
    counts = np.bincount(labels[(labels >= 0) & (labels < len(classes.names))])
    total = max(1, int(counts.sum()))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    entries = [
        SegEntry(classes.names[index], classes.colours[index], float(counts[index]) / total)
        for index in order[:_NUM_NAMED]
    ]
    if rest := order[_NUM_NAMED:]:
        share = float(counts[rest].sum()) / total
        entries.append(SegEntry(f"and {len(rest)} more classes", _OTHER, share))
    return entries


def label_image(labels: Integer[np.ndarray, "h w"], colours: Sequence[Colour]) -> Image.Image:
    """Make an image whose pixels are class indices.

    Up to 256 classes it has 8 bits and a palette, so that it can be looked at, too; above, it has
    16 bits and none.

    Args:
        labels: Class of each pixel.
        colours: One for each class.
    """
    if len(colours) > MAX_PALETTE:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette(bytes(channel for colour in colours for channel in colour))
    return picture


def _name_regions(
    picture: Image.Image, labels: Integer[np.ndarray, "h w"], classes: ClassSet
) -> None:
    """Write the name of each large class on its largest region."""
    factor = min(1.0, _COARSE_CELLS / max(labels.shape))
    rows, cols = (max(1, round(side * factor)) for side in labels.shape)
    coarse = _nearest(labels, (rows, cols))
    counts = np.bincount(coarse[(coarse >= 0) & (coarse < len(classes.names))])
    names = []
    for index in map(int, np.argsort(-counts, kind="stable")):
        if counts[index] < _NAMED_SHARE * coarse.size:
            break
        row, col = middle_cell(largest_region(coarse == index))
        point = ((col + 0.5) / cols * picture.width, (row + 0.5) / rows * picture.height)
        names.append((classes.names[index], classes.colours[index], point))
    write_names(picture, names)


def _is_edge(labels: Integer[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return edge


def _nearest(
    labels: Integer[np.ndarray, "h w"], size: tuple[int, int]
) -> Integer[np.ndarray, "new_h new_w"]:
    rows, cols = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size, labels.shape)
    )
    return labels[rows][:, cols]
