"""Mixup and CutMix: two images in one, and targets that say how much of each a token shows.

For students that learn without MixToken. Image i of a batch is mixed with image b - 1 - i:
everywhere in part (mixup, https://arxiv.org/abs/1710.09412), or wholly inside a box of pixels
(CutMix, https://arxiv.org/abs/1905.04899). The loss is linear in its target, so a target mixed in
these shares gives the two images' losses mixed in them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from ..labeler.geometry import TokenTargets
from .mix_token import MixBox, sample_box
from .recipe import AugmentConfig, Recipe
from .targets import blend_targets


@dataclass(frozen=True, kw_only=True)
class PixelMix:
    """Pixels inside a box are partly those of the partner in the reversed batch."""

    box: MixBox
    """On the grid of pixels; for mixup the whole image."""
    kept_inside: float
    """Share of its own that a pixel inside keeps: λ of mixup, 0 in CutMix."""
    tokens: tuple[int, int]
    """Token (rows, cols) of the student."""

    @property
    def kept(self) -> float:
        """Share of the whole image that is its own after mixing."""
        return 1 - (1 - self.kept_inside) * (1 - self.box.kept)

    def kept_by_tokens(self, device: torch.device) -> Float32[Tensor, " n"]:
        """Share of each token's square that is its own image's, row-major."""
        rows, cols = (
            _covered(low, high, side, num_tokens)
            for low, high, side, num_tokens in zip(
                (self.box.top, self.box.left),
                (self.box.bottom, self.box.right),
                self.box.grid,
                self.tokens,
            )
        )
        kept = (1 - (1 - self.kept_inside) * rows[:, None] * cols).flatten()
        return kept.to(device, non_blocking=True)  # or the host would wait for the step before


def _covered(low: int, high: int, side: int, num_tokens: int) -> Float32[Tensor, " t"]:
    """Part of each token along one side that lies between two pixels' edges."""
    edges = torch.arange(num_tokens + 1) * (side / num_tokens)
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * num_tokens / side


def draw_mix(recipe: Recipe, grid: tuple[int, int], step: int) -> MixBox | PixelMix | None:
    """Draw how a step's images are mixed, from the seed and the step alone.

    All processes draw the same: then how many there are changes nothing, and one box for the whole
    batch is what the papers describe.

    Args:
        recipe: Which kinds of mixing it wants.
        grid: Token (rows, cols) of the student.
        step: Number of the step, from 0.

    Returns:
        What MixToken swaps, or how pixels are mixed; None: nothing is mixed.
    """
    rng = np.random.default_rng([recipe.run.seed, step])
    if recipe.model.mix_token:
        return sample_box(grid, rng)
    return sample_mix(recipe.augment, recipe.model.image_hw, grid, rng)


def sample_mix(
    augment: AugmentConfig,
    image_hw: tuple[int, int],
    grid: tuple[int, int],
    rng: np.random.Generator,
) -> PixelMix | None:
    """Draw mixup or CutMix as timm's Mixup does for a batch; None: this batch stays as it is."""
    if not (augment.mixup or augment.cutmix) or rng.random() >= augment.mix_prob:
        return None
    is_cutmix = augment.cutmix > 0
    if augment.mixup and augment.cutmix:
        is_cutmix = rng.random() < augment.mix_switch_prob
    alpha = augment.cutmix if is_cutmix else augment.mixup
    kept = float(rng.beta(alpha, alpha))
    if is_cutmix:
        return PixelMix(box=_sample_pixels(image_hw, kept, rng), kept_inside=0.0, tokens=grid)
    whole = MixBox(0, 0, *image_hw, image_hw)
    return PixelMix(box=whole, kept_inside=kept, tokens=grid)


def _sample_pixels(image_hw: tuple[int, int], kept: float, rng: np.random.Generator) -> MixBox:
    """Draw a box of sides sqrt(1 - kept) of the image's, its centre uniform, and clip it."""
    sides = [int(side_px * math.sqrt(1 - kept)) for side_px in image_hw]
    centres = [int(rng.integers(side_px)) for side_px in image_hw]
    top, left = (max(centre - side // 2, 0) for centre, side in zip(centres, sides))
    bottom, right = (
        min(centre + (side + 1) // 2, end) for centre, side, end in zip(centres, sides, image_hw)
    )
    return MixBox(top, left, bottom, right, image_hw)


def mix_pixels(
    images: Float32[Tensor, "b 3 h w"], partners: Float32[Tensor, "b 3 h w"], mix: PixelMix
) -> Float32[Tensor, "b 3 h w"]:
    """Mix each image with its partner, which stands in the same place of the other tensor."""
    rows, cols = slice(mix.box.top, mix.box.bottom), slice(mix.box.left, mix.box.right)
    mixed = images.clone()
    mixed[:, :, rows, cols].lerp_(partners[:, :, rows, cols], 1 - mix.kept_inside)
    return mixed


def mix_targets(targets: TokenTargets, partners: TokenTargets, mix: PixelMix) -> TokenTargets:
    """Mix the targets of tokens and views as `mix_pixels` mixes what they show."""
    kept = mix.kept_by_tokens(targets.tokens.device)
    return blend_targets(targets, partners, kept_by_tokens=kept, kept=mix.kept)
