"""What a student sees in training: crops with all augmentation, and beside them their targets.

The same sheet is written by `tl-train preview` before a run and to TensorBoard during it.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from jaxtyping import Float32
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..labeler.draw import draw_token_targets, scaled, with_legend
from ..labeler.geometry import TokenTargets
from ..labeler.sheet import stack
from ..labeler.sources import unescape
from ..shards.index import read_index
from .feed import Batch, TrainFeed
from .mix_token import MixBox
from .mixup import PixelMix, draw_mix, mix_pixels, mix_targets
from .models import create_model
from .recipe import AugmentConfig, Recipe
from .step import targets_of
from .targets import pick

_PICTURE_PX = 320
_NUM_GUESSES = 3
_LEAST = 0.005
"""Probability below which a class target is not named."""
_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def write_preview(
    recipe: Recipe, data: Path, out: Path, *, split: str = "train", num_crops: int = 8
) -> None:
    """Draw the first crops that a run of this recipe, or one with this batch, would be given.

    Args:
        recipe: With the class count of the data set, see loop.resolve. Its batch is `num_crops`
            here, so the images that others are mixed with are among those shown.
        data: The data set's folder.
        out: PNG file to write.
        split: The data set's split to learn from.
        num_crops: Crops on the sheet.

    Raises:
        ValueError: Recipe and data do not fit each other.
        OSError: The data set is not there, or the file cannot be written.
    """
    if num_crops < 1:
        raise ValueError(f"--count {num_crops}: a sheet shows at least 1 crop")
    index = read_index(data)
    grid = create_model(recipe.model, dense=recipe.labels.dense_weight > 0).grid
    feed = TrainFeed(
        index,
        split,
        image_size=recipe.model.image_hw,
        batch_size=num_crops,
        augment=recipe.augment,
        seed=recipe.run.seed,
        num_threads=recipe.run.workers,
        with_labels=recipe.labels.needs_maps,
    )
    with closing(feed):
        batch = next(feed)
    mix = draw_mix(recipe, grid, 0)
    sheet = draw_crops(batch, recipe, grid, index.class_names, mix=mix, most=num_crops)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")


def draw_crops(
    batch: Batch,
    recipe: Recipe,
    grid: tuple[int, int],
    class_names: Sequence[str],
    *,
    mix: MixBox | PixelMix | None,
    most: int,
) -> Image.Image:
    """Draw the first crops of a batch, as pixels and with their token targets, in two columns.

    Args:
        batch: From a TrainFeed, on any device.
        recipe: What is taught.
        grid: Token (rows, cols) of the student.
        class_names: Display names, in the order of the logits.
        mix: See mixup.draw_mix: crops and targets are shown mixed.
        most: Crops on the sheet.
    """
    num = min(most, len(batch.keys))
    front, back = slice(0, num), slice(len(batch.keys) - num, None)
    shown, partners = batch[front], batch[back]
    images, targets = shown.images, targets_of(shown, recipe, grid)
    if isinstance(mix, MixBox):
        mix = _in_pixels(mix, recipe.model.image_hw)
    if mix is not None:
        images = mix_pixels(images, partners.images.flip(0), mix)
        mirrored = torch.arange(num - 1, -1, -1, device=images.device)
        targets = mix_targets(targets, pick(targets_of(partners, recipe, grid), mirrored), mix)
    cards = []
    for i in range(num):
        crop = scaled(_to_image(images[i], recipe.augment), _PICTURE_PX)
        title = f"{class_names[int(shown.classes[i])]}: {unescape(shown.keys[i])}"
        if batch.maps is None:
            card = stack([_text(title), crop])
        else:
            drawing = draw_token_targets(
                crop, targets, i, grid, class_names, longest_px=_PICTURE_PX
            )
            card = with_legend(drawing, photo=crop, title=title)
        lines = [_text(f"Class target: {_best(targets, i, class_names)}")]
        if mix is not None and mix.kept < 1:
            partner = unescape(partners.keys[num - 1 - i])
            lines.append(_text(f"mixed with {1 - mix.kept:.0%} of {partner}"))
        weights = targets.token_weight[i]
        lesser = weights[(weights > 0) & (weights < 1)]
        if len(lesser):
            least = f"the least {float(lesser.min()):.0%}"
            lines.append(_text(f"{len(lesser)} cells count less than the others, {least}"))
        cards.append(stack([card, *lines]))
    return _in_columns(cards, 2)


def _in_pixels(box: MixBox, image_hw: tuple[int, int]) -> PixelMix:
    """Say what the tokens that MixToken swaps show."""
    (rows, cols), (height, width) = box.grid, image_hw
    pixels = MixBox(
        top=box.top * height // rows,
        left=box.left * width // cols,
        bottom=box.bottom * height // rows,
        right=box.right * width // cols,
        grid=image_hw,
    )
    return PixelMix(box=pixels, kept_inside=0.0, tokens=box.grid)


def _to_image(pixels: Float32[Tensor, "3 h w"], augment: AugmentConfig) -> Image.Image:
    """Undo the normalisation."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (augment.mean, augment.std))
    bytes_ = ((pixels.cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).numpy())


def _best(targets: TokenTargets, i: int, class_names: Sequence[str]) -> str:
    best = targets.dense_view()[i].topk(min(_NUM_GUESSES, targets.num_classes))
    pairs = zip(best.values.tolist(), best.indices.tolist())
    return ", ".join(f"{class_names[class_id]} {p:.0%}" for p, class_id in pairs if p > _LEAST)


def _text(line: str) -> Image.Image:
    """Write a line on paper as wide as it."""
    font = ImageFont.load_default(size=15)
    strip = Image.new("RGB", (24 + round(font.getlength(line)), 28), _PAPER)
    ImageDraw.Draw(strip).text((12, 6), line, fill=_INK, font=font)
    return strip


def _in_columns(cards: Sequence[Image.Image], num_columns: int) -> Image.Image:
    rows = [cards[first : first + num_columns] for first in range(0, len(cards), num_columns)]
    width = max(card.width for card in cards)
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (width * len(rows[0]), sum(heights)), _PAPER)
    for number, row in enumerate(rows):
        for column, card in enumerate(row):
            sheet.paste(card, (column * width, sum(heights[:number])))
    return sheet
