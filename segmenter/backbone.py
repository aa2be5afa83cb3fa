"""LV-ViT as the backbone of a segmentation model: four feature maps of an image.

Token labeling (https://arxiv.org/abs/2104.10858, section 4.5) transfers LV-ViT to ADE20K. Names and
shapes are those of the checkpoints that its authors published; so are the numbers below that differ
from the classifier's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..trainer.models.lvvit import Block, Mlp, PatchEmbed, init_module, resize_pos_embed

PATCH_PX = 16
MIN_SIDE_PX = 15
"""The stem rounds up where it halves, so a side of 15 px still has a token."""


class Features(NamedTuple):
    """What the backbone sees of a batch of images, fine to coarse."""

    quarter: Float[Tensor, "b d h4 w4"]
    """4 × 4 for each token."""
    eighth: Float[Tensor, "b d h8 w8"]
    """2 × 2 for each token."""
    tokens: Float[Tensor, "b d rows cols"]
    """One for each token."""
    deep: Float[Tensor, "b deep_d rows cols"]
    """One for each token, of the last block; as fine as `tokens`."""


class SegMlp(Mlp):
    """LV-ViT's MLP with dropout behind both of its layers."""

    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__(dim, hidden_dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform each token by itself."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SegBlock(Block):
    """LV-ViT's block with the two settings that the published segmentation models change."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        drop_path: float,
        mlp_drop: float,
        residual_divisor: float,
        norm_eps: float,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, drop_path, residual_divisor)
        self.norm1.eps = self.norm2.eps = norm_eps
        self.mlp = SegMlp(dim, int(dim * mlp_ratio), mlp_drop)


class LVViTBackbone(nn.Module):
    """LV-ViT without heads and without its last norm, for images of any size from 15 px on.

    The class token takes part in attention and is dropped at the end. Position embeddings are
    resized to the tokens of each batch, bicubically.

    Args:
        image_hw: Height and width in pixels whose token grid the position embeddings have.
        out_blocks: The four blocks, counted from 0, whose tokens become feature maps.
        deep_dim: Channels of the last feature map.
        residual_divisor: Called skip_lam in the published code.
        norm_eps: Of the layer norms.
        mlp_drop: Dropout in the MLP of the last block; rises linearly from 0 at the first. This is
            what drop_path_rate sets in the published segmentation code.
        drop_path: Stochastic depth of the last block; rises likewise.
        grad_checkpointing: Whether blocks are computed again in the backward pass instead of being
            kept in memory.

    Raises:
        ValueError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        image_hw: tuple[int, int] = (512, 512),
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: int | float = 3.0,
        stem_width: int = 64,
        out_blocks: tuple[int, int, int, int] = (6, 9, 12, 15),
        deep_dim: int = 2048,
        residual_divisor: int | float = 2.0,
        norm_eps: float = 1e-6,
        mlp_drop: int | float = 0.0,
        drop_path: int | float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim = {embed_dim} is not divisible by num_heads = {num_heads}")
        if list(out_blocks) != sorted(set(out_blocks) & set(range(depth))):
            raise ValueError(
                f"out_blocks = {list(out_blocks)}; allowed: four rising numbers from 0 to "
                f"{depth - 1}, the last of {depth} blocks"
            )
        self.grid = token_grid(image_hw)
        self.out_blocks = out_blocks
        self.grad_checkpointing = grad_checkpointing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        num_tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        self.patch_embed = PatchEmbed(3, stem_width, embed_dim)
        depths = [index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            SegBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                drop_path=drop_path * share,
                mlp_drop=mlp_drop * share,
                residual_divisor=residual_divisor,
                norm_eps=norm_eps,
            )
            for share in depths
        )
        self.side_layer1 = nn.Sequential(*_upscale(embed_dim, 4), *_project(embed_dim, embed_dim))
        self.side_layer2 = nn.Sequential(*_upscale(embed_dim, 2), *_project(embed_dim, embed_dim))
        self.side_layer3 = nn.Sequential(*_project(embed_dim, embed_dim))
        self.side_layer4 = nn.Sequential(*_project(embed_dim, deep_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_module)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Compute the feature maps of normalised pixels."""
        rows, cols = token_grid((images.shape[2], images.shape[3]))
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self._positions((rows, cols))
        maps = []
        for number, block in enumerate(self.blocks):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if number in self.out_blocks:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, (rows, cols)))
        return Features(
            self.side_layer1(maps[0]),
            self.side_layer2(maps[1]),
            self.side_layer3(maps[2]),
            self.side_layer4(maps[3]),
        )

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 t d"]:
        if grid == self.grid:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, grid, self.grid)


def token_grid(image_hw: tuple[int, int]) -> tuple[int, int]:
    """Count the rows and columns of tokens that an image of (height, width) px becomes.

    Raises:
        ValueError: A side is too small for one token.
    """
    height, width = image_hw
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(
            f"an image of {height} × {width} px (height × width) is too small: both sides must "
            f"have {MIN_SIDE_PX} px at least"
        )
    return (height + 1) // PATCH_PX, (width + 1) // PATCH_PX


def _upscale(dim: int, factor: int) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(dim, dim, factor, stride=factor, bias=False)
    return [conv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]


def _project(dim: int, out_dim: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU(inplace=True)]
