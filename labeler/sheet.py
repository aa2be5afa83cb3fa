"""A sheet about one image of a label set: the job behind `tl-label show`.

From top to bottom: the photo beside its map; how sure the teacher is in each cell, what the top k
leave over, and which part a random training crop shows; that crop beside its token targets.
"""

import base64
import difflib
import html
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .draw import (
    colours_of,
    colours_of_targets,
    draw_label_map,
    draw_token_targets,
    draw_view,
    with_legend,
)
from .geometry import PaletteMaps, sample_targets
from .images import BadImage, load_image
from .label_map import LabelMap, LabelMapError, decode
from .label_set import LabelSet
from .published import is_first
from .sources import ImageSource, Sample
from .verify import box_view, random_crops

_PX = 460
"""Longer side of each of the two pictures of a panel."""
_NUM_RANDOM = 3
_MARGIN_PX = 12
_WIDTH_PX = 2 * _PX + 3 * _MARGIN_PX
_DPI = 100
_PAPER = (255, 255, 255)
_INK = "#202020"


def draw_sheets(
    labels: LabelSet,
    source: ImageSource,
    keys: Sequence[str],
    *,
    seed: int = 0,
    grid: tuple[int, int] = (14, 14),
) -> dict[str, Image.Image]:
    """Draw a sheet for each key.

    Args:
        labels: The label set.
        source: Its images.
        keys: Of the images; three at random if there is none.
        seed: Of the crops and of keys not given.
        grid: Token (rows, cols) of the crops.

    Raises:
        ValueError: If a key has no label or no image, or its image or map cannot be read.
    """
    samples = {sample.key: sample for sample in source.samples}
    if not keys:
        common = [key for key in labels.keys if key in samples]
        keys = sorted(random.Random(seed).sample(common, min(_NUM_RANDOM, len(common))))
        if not keys:
            raise ValueError(f"no image of {source.root} has a label in {labels.folder}")
    sheets = {}
    for key in keys:
        _check_key(key, labels, samples)
        sample = samples[key]
        folder = None if sample.class_index is None else source.class_names[sample.class_index]
        try:
            image = load_image(source.read(sample))
            maps = decode(labels.read(key), dictionary=labels.dictionary)
        except (BadImage, LabelMapError) as error:
            raise ValueError(f"{key}: {error}") from error
        sheets[key] = draw_sheet(
            key, image, maps, labels.class_names, folder_class=folder, seed=seed, grid=grid
        )
    return sheets


def _check_key(key: str, labels: LabelSet, samples: Mapping[str, Sample]) -> None:
    if key in labels.quarantined:
        raise ValueError(f"{key} was left out of {labels.folder}: {labels.quarantined[key]}")
    known = labels.keys if key not in labels else samples
    if key not in known:
        where = f"label in {labels.folder}" if known is labels.keys else "image"
        close = difflib.get_close_matches(key, known, n=3) or list(known)[:1]
        raise ValueError(
            f"{key!r} has no {where}; did you mean {', '.join(close)}? A key is the path below the "
            "images' root, without the suffix"
        )


def write_sheets(sheets: Mapping[str, Image.Image], out: Path, *, title: str) -> None:
    """Write sheets under each other into a .png, or onto a page, .html.

    Raises:
        ValueError: If `out` has another suffix.
        OSError: If it cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in (".png", ".html"):
        raise ValueError(f"{out} ends neither in .png nor in .html")
    out.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".png":
        out.write_bytes(to_png(stack(list(sheets.values()))))
    else:
        out.write_text(to_html(sheets, title=title), encoding="utf-8")


def draw_sheet(
    key: str,
    image: Image.Image,
    maps: Sequence[LabelMap],
    class_names: Sequence[str],
    *,
    folder_class: str | None = None,
    seed: int = 0,
    grid: tuple[int, int] = (14, 14),
) -> Image.Image:
    """Draw everything that a label set says about an image.

    Args:
        key: Of the image; its crop depends on it and on the seed.
        image: The whole image, upright.
        maps: Its map, or the levels of it.
        class_names: Display names by class id.
        folder_class: What the image's folder is called, for the title.
        seed: Of the crop.
        grid: Token (rows, cols) of the crop.
    """
    (box,) = random_crops(image.size, 1, seed=f"{seed} {key}")
    view = box_view(box, image.size)
    fill = "zero" if maps[0].log_normalizer is None else "residual"
    targets = sample_targets(PaletteMaps.from_label_maps([maps]), view, grid, fill=fill)
    colours = colours_of(maps[0])
    folder = "" if folder_class is None else f" · folder: {folder_class}"
    parts = [_strip(f"{key}{folder}")]
    for level in maps:
        drawing = draw_label_map(image, level, class_names, colours=colours, longest_px=_PX)
        rows, cols = level.grid
        title = f"Label map, {rows}×{cols} cells, {level.k} classes each"
        parts.append(with_legend(drawing, photo=image, title=title))
    parts.append(_heat_panel(image, maps[0], draw_view(image, view[0], longest_px=_PX)))
    crop = image.crop(box)
    drawing = draw_token_targets(
        crop,
        targets,
        0,
        grid,
        class_names,
        colours=colours_of_targets(targets, 0, keep=colours),
        longest_px=_PX,
    )
    title = f"The crop and its {grid[0]}×{grid[1]} token targets ({fill} fill)"
    parts.append(with_legend(drawing, photo=crop, title=title))
    best = targets.view[0].topk(min(3, targets.view.shape[1]))
    names = [class_names[i] for i in targets.palette[0][best.indices].tolist()]
    answers = [f"{name} {p:.1%}" for name, p in zip(names, best.values.tolist())]
    parts.append(_strip(f"Class target of the crop: {', '.join(answers)}"))
    return stack(parts)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures under each other, at the left."""
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def to_png(sheet: Image.Image, *, optimize: bool = True) -> bytes:
    """Encode a sheet; to `optimize` saves bytes and takes ten times as long."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def to_html(sheets: Mapping[str, Image.Image], *, title: str) -> str:
    """Put sheets on one page that needs no other file.

    Args:
        sheets: By key.
        title: Of the page.
    """
    title = html.escape(title)
    figures = "\n".join(
        f'<img alt="{html.escape(key)}" src="data:image/png;base64,'
        f'{base64.b64encode(to_png(sheet)).decode()}">'
        for key, sheet in sheets.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n"
        "<style>body { font-family: sans-serif; margin: 2rem } "
        "img { display: block; max-width: 100%; margin-bottom: 3rem }</style>\n"
        f"<h1>{title}</h1>\n{figures}\n</html>\n"
    )


def _strip(line: str) -> Image.Image:
    """Write a line of text, as wide as the panels."""
    figure = Figure((_WIDTH_PX / _DPI, 0.4), dpi=_DPI)
    figure.text(_MARGIN_PX / _WIDTH_PX, 0.3, line, fontsize=12, weight="bold", color=_INK)
    return _render(figure)


def _heat_panel(image: Image.Image, label_map: LabelMap, framed: Image.Image) -> Image.Image:
    height_px = _WIDTH_PX / 3.7 * image.height / image.width + 50
    figure = Figure((_WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI)
    margin = _MARGIN_PX / _WIDTH_PX
    figure.set_layout_engine("constrained", rect=(margin, 0, 1 - 2 * margin, 1))
    first, residual, crop = figure.subplots(1, 3)
    if label_map.log_normalizer is None:
        for axes in (first, residual):
            axes.text(0.5, 0.5, "not known:\nthe map keeps no normaliser", ha="center")
            axes.axis("off")
    else:
        logs = label_map.scores.astype(np.float32) - label_map.log_normalizer
        kept = (np.exp(logs) * is_first(label_map.classes)).sum(0)
        _draw_heat(first, np.exp(logs[0]), label_map, image)
        _draw_heat(residual, np.clip(1 - kept, 0, 1), label_map, image)
    first.set_title("Confidence: probability of the first class", fontsize=9)
    residual.set_title(f"Residual: outside the top {label_map.k}", fontsize=9)
    crop.imshow(framed)
    crop.axis("off")
    crop.set_title("Part that the crop below shows", fontsize=9)
    return _render(figure)


def _draw_heat(
    axes: Axes, values: Float[np.ndarray, "rows cols"], label_map: LabelMap, image: Image.Image
) -> None:
    x0, y0, x1, y1 = label_map.window
    width, height = image.size
    extent = (x0 * width, x1 * width, y1 * height, y0 * height)
    shown = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", extent=extent)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    assert axes.figure is not None
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.8, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"], fontsize=8)


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
