"""Pictures of label maps: who is where, and how sure the teacher is.

Each cell is painted in the colour of its best class, the more opaque the surer; the photo beneath
is grey, so that every colour in the picture means a class. The largest region of a class carries
its name, the legend lists the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .geometry import TokenTargets, apply_view
from .label_map import LabelMap

Colour: TypeAlias = tuple[int, int, int]

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), distinct to colour-blind readers too.
# Black is left out: it would read as shadow. Yellow comes last, it is weak over a light photo.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
OTHER: Colour = (130, 130, 130)
"""Colour of the classes that are not among the len(PALETTE) most present ones."""

_COLOURED_CONFIDENCE = 0.05
"""Classes that nowhere reach this probability share OTHER."""
_NAMED_CONFIDENCE = 0.25
"""Regions that nowhere reach this probability are named in the legend only."""

_MARGIN_PX = 12
_TEXT_PX = 15
_LINE_PX = _TEXT_PX + 8
_LEGEND_PX = 520
"""Least width of a legend; its last line, the key to opacity, needs this much."""
_INK: Colour = (32, 32, 32)
_PAPER: Colour = (255, 255, 255)


@runtime_checkable
class Swatch(Protocol):
    """An entry of a legend; str() of it stands beside its colour."""

    @property
    def colour(self) -> Colour:
        """What is painted."""
        ...


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """What a colour stands for."""

    name: str
    colour: Colour
    num_cells: int
    """Cells in which the class comes first."""
    confidence: float
    """Highest probability that one of these cells gives to the class."""

    def __str__(self) -> str:
        cells = "1 cell" if self.num_cells == 1 else f"{self.num_cells} cells"
        return f"{self.name} ({cells}, up to {self.confidence:.0%})"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture and what its colours stand for, most present class first."""

    image: Image.Image
    legend: tuple[LegendEntry, ...]


@dataclass(frozen=True, slots=True)
class _Cells:
    """The best class of each cell; cells without evidence have confidence 0."""

    classes: Int[np.ndarray, "rows cols"]
    confidence: Float[np.ndarray, "rows cols"]
    has_evidence: Bool[np.ndarray, "rows cols"]
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def draw_label_map(
    image: Image.Image,
    label_map: LabelMap,
    class_names: Sequence[str],
    *,
    colours: Mapping[int, Colour] | None = None,
    longest_px: int = 640,
) -> Drawing:
    """Draw a label map over its image.

    Args:
        image: The whole image, upright, any size.
        label_map: The image's map.
        class_names: Display names by class id.
        colours: Colour by class id, see colours_of; chosen from this map if None.
        longest_px: Longer side of the picture.
    """
    cells = _cells_of_map(label_map)
    return _draw(image, cells, class_names, colours, longest_px)


def draw_token_targets(
    crop: Image.Image,
    targets: TokenTargets,
    index: int,
    grid: tuple[int, int],
    class_names: Sequence[str],
    *,
    colours: Mapping[int, Colour] | None = None,
    longest_px: int = 320,
) -> Drawing:
    """Draw the targets of one training crop's tokens over the crop.

    Tokens of weight 0, which lie outside what the map covers, are struck through.

    Args:
        crop: The pixels that the student sees.
        targets: Targets of a batch.
        index: The crop's place in the batch.
        grid: Token (rows, cols).
        class_names: Display names by class id.
        colours: Colour by class id, see colours_of; chosen from these targets if None.
        longest_px: Longer side of the picture.
    """
    cells = _cells_of_targets(targets, index, grid)
    return _draw(crop, cells, class_names, colours, longest_px)


def colours_of(label_map: LabelMap) -> dict[int, Colour]:
    """Give the map's most present classes a colour each, to use in several pictures of one image.

    Returns:
        Colour by class id for at most len(PALETTE) classes, most present first.
    """
    return _colours_of_cells(_cells_of_map(label_map))


def colours_of_targets(
    targets: TokenTargets,
    index: int,
    *,
    keep: Mapping[int, Colour] | None = None,
    most: int = len(PALETTE),
) -> dict[int, Colour]:
    """Give the most present classes of one crop's targets a colour each.

    Args:
        targets: Targets of a batch.
        index: The crop's place in the batch.
        keep: Colours given already, which stay; other classes get what is left of PALETTE.
        most: Number of colours in the end.
    """
    side_by_side = (1, targets.tokens.shape[1])
    wanted = _colours_of_cells(_cells_of_targets(targets, index, side_by_side))
    given = dict(keep or {})
    free = [colour for colour in PALETTE if colour not in given.values()]
    new = [class_id for class_id in wanted if class_id not in given][: max(0, most - len(given))]
    return given | dict(zip(new, free, strict=False))


def draw_view(
    image: Image.Image, view: Float[Tensor, "2 3"], *, longest_px: int = 640
) -> Image.Image:
    """Frame the part of the image that a crop shows, and darken the rest.

    Args:
        image: The whole image.
        view: Crop unit square → image unit square.
        longest_px: Longer side of the picture.
    """
    picture = scaled(image.convert("RGB"), longest_px)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    outline = apply_view(view[None].float().cpu(), corners)[0] * torch.tensor(picture.size)
    points = [(x, y) for x, y in outline.tolist()]
    shown = Image.new("L", picture.size, 0)
    ImageDraw.Draw(shown).polygon(points, fill=255)
    picture = Image.composite(picture, picture.point(lambda value: value * 0.45), shown)
    ImageDraw.Draw(picture).polygon(points, outline=_PAPER, width=3)
    return picture


def scaled(image: Image.Image, longest_px: int) -> Image.Image:
    """Resize so that the longer side is longest_px."""
    scale = longest_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def probabilities(label_map: LabelMap) -> Float[np.ndarray, "k rows cols"]:
    """Turn a map's scores into the teacher's probabilities.

    A map without normaliser is read with zero fill: classes outside the top k have score 0.
    """
    scores = label_map.scores.astype(np.float64)
    if label_map.log_normalizer is not None:
        return np.exp(scores - label_map.log_normalizer.astype(np.float64))
    # A cell that keeps fewer than k classes repeats its last one; that counts once.
    repeats = np.zeros(scores.shape, dtype=bool)
    repeats[1:] = label_map.classes[1:] == label_map.classes[:-1]
    kept = np.logaddexp.reduce(np.where(repeats, -np.inf, scores), axis=0)
    num_outside = label_map.num_classes - (~repeats).sum(axis=0)
    outside = np.log(num_outside, out=np.full(kept.shape, -np.inf), where=num_outside > 0)
    return np.exp(scores - np.logaddexp(kept, outside))


def with_legend(drawing: Drawing, *, photo: Image.Image, title: str) -> Image.Image:
    """Put the photo and its drawing side by side, a title above and the legend below.

    Args:
        drawing: The picture at the right.
        photo: The same image as it is, scaled to the drawing's size at the left.
        title: One line above both.
    """
    left = photo.convert("RGB").resize(drawing.image.size, Image.Resampling.LANCZOS)
    sheet, y = mounted([left, drawing.image], drawing.legend, title=title, room_px=_LINE_PX)
    _write_confidence_key(sheet, y)
    return sheet


def mounted(
    pictures: Sequence[Image.Image], legend: Sequence[Swatch], *, title: str, room_px: int = 0
) -> tuple[Image.Image, int]:
    """Put pictures side by side on a sheet, a title above and a legend below.

    Args:
        pictures: From left to right; none for a legend alone.
        legend: What colours stand for.
        title: One line; cut off where the sheet ends.
        room_px: Height to leave free below the legend.

    Returns:
        The sheet, and where that room begins.
    """
    width = sum(picture.width for picture in pictures) + _MARGIN_PX * (len(pictures) - 1)
    inner_px = max(width, _LEGEND_PX)
    lines = _legend_lines(legend, inner_px)
    pictures_y = 2 * _MARGIN_PX + _TEXT_PX
    legend_y = pictures_y + max((p.height for p in pictures), default=0) + _MARGIN_PX
    end_y = legend_y + len(lines) * _LINE_PX
    sheet = Image.new("RGB", (inner_px + 2 * _MARGIN_PX, end_y + room_px + 4), _PAPER)
    pen, font = ImageDraw.Draw(sheet), text_font(_TEXT_PX, bold=True)
    pen.text(
        (_MARGIN_PX, _MARGIN_PX), shortened(title, font, float(inner_px)), fill=_INK, font=font
    )
    x = _MARGIN_PX
    for picture in pictures:
        sheet.paste(picture, (x, pictures_y))
        x += picture.width + _MARGIN_PX
    for number, line in enumerate(lines):
        _write_entries(pen, line, legend_y + number * _LINE_PX)
    return sheet, end_y


# ------------------------------------------------------------------------------------- cells


def _cells_of_map(label_map: LabelMap) -> _Cells:
    return _Cells(
        classes=label_map.classes[0].astype(np.int64),
        confidence=probabilities(label_map)[0],
        has_evidence=np.ones(label_map.grid, dtype=bool),
        window=label_map.window,
    )


def _cells_of_targets(targets: TokenTargets, index: int, grid: tuple[int, int]) -> _Cells:
    tokens = targets.tokens[index].float().cpu()
    best, slot = tokens.max(dim=1)
    has_evidence = targets.token_weight[index].cpu().numpy() > 0
    return _Cells(
        classes=targets.palette[index].cpu()[slot].numpy().reshape(grid),
        confidence=np.where(has_evidence, best.numpy().astype(np.float64), 0.0).reshape(grid),
        has_evidence=has_evidence.reshape(grid),
    )


def _colours_of_cells(cells: _Cells) -> dict[int, Colour]:
    seen = cells.confidence >= _COLOURED_CONFIDENCE
    present, where = np.unique(cells.classes[seen], return_inverse=True)
    # Squared, a few sure cells outrank a wide background that the teacher guesses at.
    presence = np.bincount(where, weights=np.square(cells.confidence[seen]))
    ranked = present[np.argsort(-presence, kind="stable")]
    return dict(zip(ranked.tolist(), PALETTE, strict=False))


def _legend(
    cells: _Cells, class_names: Sequence[str], colours: Mapping[int, Colour]
) -> tuple[LegendEntry, ...]:
    coloured = np.isin(cells.classes, list(colours))
    groups = [(class_names[c], colours[c], cells.classes == c) for c in colours]
    groups.append(("other classes", OTHER, ~coloured))
    groups = [(name, colour, mask & cells.has_evidence) for name, colour, mask in groups]
    return tuple(
        LegendEntry(name, colour, int(mask.sum()), float(cells.confidence[mask].max()))
        for name, colour, mask in groups
        if mask.any()
    )


# ----------------------------------------------------------------------------------- painting


def _draw(
    image: Image.Image,
    cells: _Cells,
    class_names: Sequence[str],
    colours: Mapping[int, Colour] | None,
    longest_px: int,
) -> Drawing:
    if colours is None:
        colours = _colours_of_cells(cells)
    photo = np.asarray(scaled(image.convert("L"), longest_px), dtype=np.float64)
    picture = _paint(photo, cells, colours)
    _strike_out(picture, cells)
    _write_names(picture, cells, class_names, colours)
    return Drawing(picture, _legend(cells, class_names, colours))


def _opacity(confidence: np.ndarray | float) -> np.ndarray | float:
    # The square root keeps a probability of 0.1 visible: with 1,000 classes that is a strong vote.
    return 0.85 * np.sqrt(confidence)


def _paint(
    grey: Float[np.ndarray, "h w"], cells: _Cells, colours: Mapping[int, Colour]
) -> Image.Image:
    height, width = grey.shape
    row, inside_y = _cell_of_pixel(height, cells.window[1], cells.window[3], cells.classes.shape[0])
    col, inside_x = _cell_of_pixel(width, cells.window[0], cells.window[2], cells.classes.shape[1])
    colour_of_cell = np.full((*cells.classes.shape, 3), OTHER, dtype=np.float64)
    for class_id, colour in colours.items():
        colour_of_cell[cells.classes == class_id] = colour
    alpha = np.asarray(_opacity(cells.confidence))[row][:, col] * np.outer(inside_y, inside_x)
    # Cell borders: a thin gap shows the grid without a line that hides the photo.
    alpha *= 1 - 0.35 * np.maximum.outer(_is_border(row), _is_border(col))
    light = (60 + 0.76 * grey)[..., None]
    pixels = light + alpha[..., None] * (colour_of_cell[row][:, col] - light)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _cell_of_pixel(
    num_px: int, start: float, stop: float, num_cells: int
) -> tuple[Int[np.ndarray, " px"], Bool[np.ndarray, " px"]]:
    """Tell for each pixel of a side which cell its centre lies in, and whether in the window."""
    fraction = ((np.arange(num_px) + 0.5) / num_px - start) / (stop - start)
    cell = np.clip(np.floor(fraction * num_cells), 0, num_cells - 1).astype(np.int64)
    return cell, (fraction >= 0) & (fraction < 1)


def _is_border(cell: Int[np.ndarray, " px"]) -> Float[np.ndarray, " px"]:
    return np.diff(cell, prepend=cell[:1]).astype(bool).astype(np.float64)


def _cell_box(cells: _Cells, row: int, col: int, size: tuple[int, int]) -> tuple[float, ...]:
    """Find the (x0, y0, x1, y1) pixels of a cell in a picture of the given (width, height)."""
    x0, y0, x1, y1 = cells.window
    rows, cols = cells.classes.shape
    xs = [(x0 + (x1 - x0) * edge / cols) * size[0] for edge in (col, col + 1)]
    ys = [(y0 + (y1 - y0) * edge / rows) * size[1] for edge in (row, row + 1)]
    return xs[0], ys[0], xs[1], ys[1]


def _strike_out(picture: Image.Image, cells: _Cells) -> None:
    pen = ImageDraw.Draw(picture)
    for row, col in np.argwhere(~cells.has_evidence):
        x0, y0, x1, y1 = _cell_box(cells, int(row), int(col), picture.size)
        pen.line((x0, y1, x1, y0), fill=_INK)


# -------------------------------------------------------------------------------------- names


def _write_names(
    picture: Image.Image,
    cells: _Cells,
    class_names: Sequence[str],
    colours: Mapping[int, Colour],
) -> None:
    """Write each coloured class on its largest region, where there is room."""
    names = []
    for class_id, colour in colours.items():
        region = largest_region((cells.classes == class_id) & cells.has_evidence)
        if max((cells.confidence[cell] for cell in region), default=0.0) < _NAMED_CONFIDENCE:
            continue
        row, col = middle_cell(region)
        x0, y0, x1, y1 = _cell_box(cells, row, col, picture.size)
        names.append((class_names[class_id], colour, ((x0 + x1) / 2, (y0 + y1) / 2)))
    write_names(picture, names)


def write_names(
    picture: Image.Image, names: Sequence[tuple[str, Colour, tuple[float, float]]]
) -> None:
    """Write names on a picture, in place; those that would cover an earlier one are left out.

    Args:
        picture: Any size.
        names: Text, colour of its frame, and pixel (x, y) of its middle.
    """
    pen = ImageDraw.Draw(picture, "RGBA")
    font = text_font(max(11, round(min(picture.size) / 28)), bold=True)
    taken: list[tuple[float, float, float, float]] = []
    for name, colour, point in names:
        text = shortened(name, font, picture.width * 0.6)
        box = _text_box(text, font, point, picture.size)
        if any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        pen.rounded_rectangle(box, radius=4, fill=(20, 20, 20, 200), outline=(*colour, 255))
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        pen.text(middle, text, fill=(255, 255, 255), font=font, anchor="mm")


def largest_region(mask: Bool[np.ndarray, "rows cols"]) -> list[tuple[int, int]]:
    """Find the largest 4-connected set of true cells."""
    left = {(int(row), int(col)) for row, col in np.argwhere(mask)}
    largest: list[tuple[int, int]] = []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            row, col = edge.pop()
            region.append((row, col))
            near = {(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)} & left
            left -= near
            edge += sorted(near)
        largest = max(largest, region, key=len)
    return sorted(largest)


def middle_cell(region: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Find the region's cell nearest to its centre, which a bent region need not contain."""
    row, col = np.mean(region, axis=0)
    return min(region, key=lambda cell: (cell[0] - row) ** 2 + (cell[1] - col) ** 2)


def _text_box(
    text: str,
    font: ImageFont.FreeTypeFont,
    middle: tuple[float, float],
    size: tuple[int, int],
) -> tuple[float, float, float, float]:
    """Place a padded box around a text, as near to the middle as the picture's edges allow."""
    width, height = font.getlength(text) + 10.0, sum(font.getmetrics()) + 2.0
    x = min(max(middle[0] - width / 2, 1.0), max(size[0] - width - 2, 1.0))
    y = min(max(middle[1] - height / 2, 1.0), max(size[1] - height - 2, 1.0))
    return x, y, x + width, y + height


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def shortened(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Cut off what does not fit into a width."""
    if font.getlength(text) <= width_px:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"


@lru_cache(maxsize=32)
def text_font(size_px: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font of all texts in pictures."""
    # matplotlib ships this font; Pillow's own has no letters beyond Latin.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size_px)


# ------------------------------------------------------------------------------------- legend


def _entry_width(entry: Swatch) -> float:
    return 20 + text_font(_TEXT_PX).getlength(str(entry)) + 18


def _legend_lines(entries: Sequence[Swatch], width_px: int) -> list[list[Swatch]]:
    lines: list[list[Swatch]] = []
    room = 0.0
    for entry in entries:
        if not lines or _entry_width(entry) > room:
            lines.append([])
            room = width_px
        lines[-1].append(entry)
        room -= _entry_width(entry)
    return lines


def _write_entries(pen: ImageDraw.ImageDraw, entries: Sequence[Swatch], y: int) -> None:
    x = float(_MARGIN_PX)
    for entry in entries:
        pen.rectangle((x, y + 2, x + 13, y + 15), fill=entry.colour)
        pen.text((x + 20, y), str(entry), fill=_INK, font=text_font(_TEXT_PX))
        x += _entry_width(entry)


def _write_confidence_key(sheet: Image.Image, y: int) -> None:
    """Show how opaque a cell is at some probabilities."""
    pen = ImageDraw.Draw(sheet, "RGBA")
    font = text_font(_TEXT_PX)
    x = float(_MARGIN_PX)
    text = "Opacity: probability of the cell's class"
    pen.text((x, y), text, fill=_INK, font=font)
    x += font.getlength(text) + 14
    for confidence in (0.05, 0.25, 0.5, 1.0):
        alpha = round(255 * float(_opacity(confidence)))
        pen.rectangle((x, y + 2, x + 22, y + 15), fill=(*_INK, alpha))
        pen.text((x + 27, y), f"{confidence:.0%}", fill=_INK, font=font)
        x += 35 + font.getlength(f"{confidence:.0%}")
