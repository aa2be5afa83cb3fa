"""Pictures of explanations: a PNG for each image, and one HTML page of all.

The photo stands in its own colours at the left; beneath a heatmap it is grey, so that every colour
there is the map's. Each map is stretched between its least and its largest value, which stand below
it; maps of probabilities go from 0 to 1 instead, so that a class that is nowhere has no colour.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Float32
from PIL import Image, ImageDraw

from ..labeler.draw import Drawing, mounted, scaled, shortened, text_font
from ..labeler.sheet import stack
from ..trainer import page
from .methods import METHODS, normalize, upsample

PICTURE_PX = 224
"""Longer side of each picture."""
_TEXT_PX = 13
_LINE_PX = _TEXT_PX + 5
_MARGIN_PX = 12
_BAR_PX = (240, 14)
_INK, _SOFT, _PAPER = (32, 32, 32), (110, 110, 110), (255, 255, 255)
_BAR_COLOUR = (207, 227, 243)
_COLOURS: Float[np.ndarray, "256 3"] = (
    255 * matplotlib.colormaps["inferno"](np.linspace(0.25, 1, 256))[:, :3]
)
_OPACITY = 0.85
"""Of the most; the least is not painted."""

Heatmap = Float32[np.ndarray, "rows cols"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassView:
    """One class, explained."""

    name: str
    probability: float
    heatmaps: Mapping[str, Heatmap]
    """By method."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelView:
    """What one model sees in an image."""

    name: str
    photo: Image.Image
    """As the model saw it, in its resolution."""
    answers: Sequence[tuple[str, float]]
    """Its best classes with their probabilities."""
    labels: Drawing | None
    """The teacher's labels of the same tokens."""
    heatmaps: Mapping[str, Heatmap]
    """By method: those that know of no class."""
    classes: Sequence[ClassView]


@dataclass(frozen=True, eq=False, kw_only=True)
class Explanation:
    """An image, explained by one model or several."""

    title: str
    right: str | None
    """Its true class, where that is known."""
    views: Sequence[ModelView]


@dataclass(frozen=True, eq=False)
class _Row:
    """Pictures that belong together."""

    heading: str
    panels: list[tuple[Image.Image, list[str]]]
    """Pictures with the lines below them."""
    drawing: Drawing | None = None
    """Of the panels, the one that has a legend."""
    answers: Sequence[tuple[str, float]] = ()


def draw_sheet(explanation: Explanation) -> Image.Image:
    """Draw all about one image, several models side by side."""
    columns = []
    for view in explanation.views:
        rows = []
        for row in _rows(view):
            pictures = [_captioned(picture, lines) for picture, lines in row.panels]
            if row.answers:
                pictures.append(_ranking(row.answers, explanation.right))
            legend = row.drawing.legend if row.drawing else ()
            rows.append(mounted(pictures, legend, title=row.heading)[0])
        columns.append(stack(rows))
    sheet, _ = mounted(columns, (), title=_title(explanation))
    return stack([sheet, _colour_bar()])


def to_html(explanations: Sequence[Explanation], *, title: str, notes: Sequence[str]) -> str:
    """Put everything onto one page that needs no other file."""
    bar = page.figure(_colour_bar(), "colours of the heatmaps, from the least to the most")
    sections = [page.title(title), *map(page.text, notes), f'<div style="width:28rem">{bar}</div>']
    for explanation in explanations:
        columns = [page.cards(_cards(explanation, view)) for view in explanation.views]
        if len(columns) > 1:
            columns = [page.card("", columns)]
        sections.append(page.section(_title(explanation), *columns))
    return page.page(title, sections)


def _cards(explanation: Explanation, view: ModelView) -> Iterator[str]:
    for row in _rows(view):
        figures = [page.figure(image, " · ".join(lines)) for image, lines in row.panels]
        if row.answers:
            right = [] if explanation.right is None else [explanation.right]
            figures.append(page.beside("answers", page.ranking(row.answers, right=right)))
        below = ""
        if row.drawing is not None:
            below = page.legend({str(each): each.colour for each in row.drawing.legend})
        yield page.card(row.heading, figures, below=below)


def overlay(photo: Image.Image, heatmap: Heatmap, *, is_probability: bool = False) -> Image.Image:
    """Paint a heatmap over a photo, which becomes grey.

    Args:
        photo: What the heatmap's grid covers, any size.
        heatmap: A value per patch.
        is_probability: Whether 0 and 1 are the ends of the colours, instead of least and most.
    """
    values = torch.from_numpy(np.ascontiguousarray(heatmap))[None]
    values = upsample(values, (photo.height, photo.width))
    heat = (values.clamp(0, 1) if is_probability else normalize(values))[0].numpy()[..., None]
    colours = _COLOURS[(255 * heat[..., 0]).round().astype(np.int64)]
    grey = np.asarray(photo.convert("L"), dtype=np.float64)[..., None]
    light = 60 + 0.76 * grey  # as beneath label maps: dark photos would swallow the colours
    mixed = light + _OPACITY * heat * (colours - light)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _title(explanation: Explanation) -> str:
    right = "" if explanation.right is None else f" · class: {explanation.right}"
    return f"{explanation.title}{right}"


def _rows(view: ModelView) -> Iterator[_Row]:
    photo = scaled(view.photo, PICTURE_PX)
    panels = [(photo, ["what the model saw"])]
    if view.labels is not None:
        panels.append((view.labels.image, ["the teacher's token labels"]))
    yield _Row(view.name, panels, view.labels, view.answers)
    for each in view.classes:
        if each.heatmaps:
            heading = f"{each.name}, {each.probability:.1%}"
            yield _Row(heading, [_panel(photo, *item) for item in each.heatmaps.items()])
    if view.heatmaps:
        yield _Row(
            "the same for every class", [_panel(photo, *item) for item in view.heatmaps.items()]
        )


def _panel(photo: Image.Image, name: str, heatmap: Heatmap) -> tuple[Image.Image, list[str]]:
    method = METHODS[name]
    low, high = float(heatmap.min()), float(heatmap.max())
    ends = f"{low:.1%} to {high:.1%}" if method.is_probability else f"{low:.3g} to {high:.3g}"
    return overlay(photo, heatmap, is_probability=method.is_probability), [name, ends]


def _captioned(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    height = picture.height + 4 + _LINE_PX * len(lines)
    sheet = Image.new("RGB", (picture.width, height), _PAPER)
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        font = text_font(_TEXT_PX)
        text = shortened(line, font, float(picture.width))
        y = picture.height + 4 + number * _LINE_PX
        pen.text((0, y), text, fill=_SOFT if number else _INK, font=font)
    return sheet


def _ranking(answers: Sequence[tuple[str, float]], right: str | None) -> Image.Image:
    """List the model's answers, a bar each; the right one is bold."""
    height_px = _LINE_PX + 8
    sheet = Image.new("RGB", (PICTURE_PX, height_px * len(answers)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (name, probability) in enumerate(answers):
        y, font = number * height_px, text_font(_TEXT_PX, bold=name == right)
        pen.rectangle((0, y, probability * PICTURE_PX, y + height_px - 4), fill=_BAR_COLOUR)
        percent = f"{probability:.1%}"
        pen.text((PICTURE_PX - 2, y + 3), percent, fill=_INK, font=font, anchor="ra")
        room = PICTURE_PX - font.getlength(percent) - 16
        pen.text((4, y + 3), shortened(name, font, room), fill=_INK, font=font)
    return sheet


def _colour_bar() -> Image.Image:
    """Show the colours from the least to the most, as over a middle grey."""
    width, height = _BAR_PX
    ramp = np.linspace(0, 1, width, dtype=np.float32)[None]
    grey = Image.new("RGB", (width, height), (128, 128, 128))
    bar = overlay(grey, ramp)
    font = text_font(_TEXT_PX)
    left, right = "least (dense: 0 %)", "most (dense: 100 %)"
    x = _MARGIN_PX + round(font.getlength(left)) + 8
    end = x + width + 8 + round(font.getlength(right)) + _MARGIN_PX
    sheet = Image.new("RGB", (end, height + 2 * _MARGIN_PX), _PAPER)
    sheet.paste(bar, (x, _MARGIN_PX))
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN_PX, _MARGIN_PX - 1), left, fill=_INK, font=font)
    pen.text((x + width + 8, _MARGIN_PX - 1), right, fill=_INK, font=font)
    return sheet
