"""MixToken: CutMix on the grid of patch tokens instead of pixels.

Token labeling (https://arxiv.org/abs/2104.10858, section 3.3). A box of the token grid is swapped
between each image of a batch and its partner, image i with image b - 1 - i, after the patch
embedding; so no patch ever holds two images. After the blocks the tokens are swapped back and every
token meets its own image's label. The class token has seen both images: its target is the two
images' targets, mixed by the share of tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


@dataclass(frozen=True)
class MixBox:
    """Rows top ≤ row < bottom and columns left ≤ col < right of a token grid; may be empty."""

    top: int
    left: int
    bottom: int
    right: int
    grid: tuple[int, int]

    @property
    def kept(self) -> float:
        """Share of an image's tokens that are its own after mixing: λ corrected for clipping."""
        rows, cols = self.grid
        return 1.0 - (self.bottom - self.top) * (self.right - self.left) / (rows * cols)

    def mask(self, device: torch.device) -> Bool[Tensor, " n"]:
        """Mark the tokens inside the box, row-major."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=device)
        mask[self.top : self.bottom, self.left : self.right] = True
        return mask.flatten()


def sample_box(grid: tuple[int, int], rng: np.random.Generator) -> MixBox:
    """Draw a box: λ ~ Beta(1, 1), sides sqrt(1 - λ) of the grid's, centre uniform, clipped.

    Args:
        grid: Token (rows, cols).
        rng: The only source of randomness; used up by the same amount at each call.
    """
    rows, cols = grid
    side = math.sqrt(1.0 - rng.beta(1.0, 1.0))
    # Half sides are whole tokens, as in the published code: boxes reach an even number of tokens
    # across before clipping, and one smaller than two tokens is empty.
    half_rows, half_cols = int(rows * side) // 2, int(cols * side) // 2
    row, col = int(rng.integers(rows)), int(rng.integers(cols))
    return MixBox(
        top=max(row - half_rows, 0),
        left=max(col - half_cols, 0),
        bottom=min(row + half_rows, rows),
        right=min(col + half_cols, cols),
        grid=grid,
    )


def mix(tokens: Shaped[Tensor, "b n d"], mask: Bool[Tensor, " n"]) -> Shaped[Tensor, "b n d"]:
    """Swap the marked tokens of each image with those of its partner in the reversed batch.

    Its own inverse. In a batch of odd size the middle image is its own partner.
    """
    return torch.where(mask[:, None], tokens.flip(0), tokens)
