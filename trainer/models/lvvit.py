"""LV-ViT: a vision transformer with a convolutional stem, a class head and a dense head.

Token labeling (https://arxiv.org/abs/2104.10858, section 3 and table 1). Module names are those of
the weights that its authors published, so that their files load. In shapes, n counts the patch
tokens and t = 1 + n all of them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..mix_token import MixBox, mix

_STEM_STRIDE, _PROJ_STRIDE = 2, 8
_PATCH_PX = _STEM_STRIDE * _PROJ_STRIDE


class PatchEmbed(nn.Module):
    """Three convolutions at half resolution, then one that makes a token of each 16 × 16 patch."""

    def __init__(self, in_chans: int, stem_width: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, stem_width, 7, _STEM_STRIDE, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.conv2 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_width)
        self.conv3 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_width)
        self.proj = nn.Conv2d(stem_width, embed_dim, _PROJ_STRIDE, _PROJ_STRIDE)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Embed the patches, row-major."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Let every token look at every token."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform each token by itself."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP whose residual branches are divided by `residual_divisor`."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, residual_divisor: float
    ) -> None:
        super().__init__()
        self.residual_divisor = residual_divisor
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Add both branches."""
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.residual_divisor
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.residual_divisor


class LVViT(nn.Module):
    """LV-ViT of any depth and width, for images of one size.

    In training mode `forward` returns (class logits, dense logits, MixToken box); in evaluation
    mode one logit per class: the class head plus half the best token of the dense head.

    Args:
        img_size: Pixels, a side or (height, width); multiples of 16.
        num_classes: Outputs of each head; 0 makes `forward` return the class token's features.
        residual_divisor: Called skip_lam in the published code.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem_width: int = 64,
        residual_divisor: float = 2.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < _PATCH_PX or height % _PATCH_PX or width % _PATCH_PX:
            raise ValueError(
                f"an image size of {height} × {width} px is not possible: both sides must be "
                f"multiples of {_PATCH_PX}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim = {embed_dim} is not divisible by num_heads = {num_heads}")
        self.grid = (height // _PATCH_PX, width // _PATCH_PX)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(in_chans, stem_width, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        num_tokens = 1 + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        drop_paths = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, residual_divisor) for rate in drop_paths
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = self._new_head()
        self.aux_head = self._new_head()
        self._init_weights()

    def forward(
        self, images: Float[Tensor, "b 3 h w"], box: MixBox | None = None
    ) -> Float[Tensor, "b c"] | tuple[Float[Tensor, "b c"], Float[Tensor, "b n c"], MixBox | None]:
        """Classify images; in training mode also each of their patches, row-major.

        Args:
            images: Normalised pixels of the size that the model was built for.
            box: Tokens that MixToken swaps between partners, training mode only. The dense logits
                are those of each image's own patches all the same: they are swapped back.
        """
        if self.training:
            mask = None if box is None else box.mask(images.device)
            class_logits, aux_logits = self.forward_train(images, mask)
            return class_logits, aux_logits, box
        return self.forward_head(self.forward_features(images))

    def forward_train(
        self, images: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, " n"] | None
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b n c"]]:
        """Compute both heads: the whole of training that torch.compile needs to see.

        The box comes as a tensor here, for a new box must not mean a new compilation.
        """
        tokens = self.forward_features(images, mask)
        # Swapped back before the head and not after: it works on each token alone, and tokens are
        # narrower than logits.
        patches = tokens[:, 1:] if mask is None else mix(tokens[:, 1:], mask)
        return self.head(tokens[:, 0]), self.aux_head(patches)

    def forward_features(
        self, images: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, " n"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Compute the normed tokens, class token first; those in `mask` are still swapped."""
        wanted = tuple(side * _PATCH_PX for side in self.grid)
        if tuple(images.shape[-2:]) != wanted:
            raise ValueError(
                f"images of {images.shape[-2]} × {images.shape[-1]} px, but the model was built "
                f"for {wanted[0]} × {wanted[1]} px; resize them or build it with another img_size"
            )
        x = self.patch_embed(images)
        if mask is not None:
            x = mix(x, mask)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def forward_head(
        self, tokens: Float[Tensor, "b t d"], pre_logits: bool = False
    ) -> Float[Tensor, "b c"]:
        """Turn normed tokens into the logits of evaluation, or into the class token's features."""
        if pre_logits or self.num_classes == 0:
            return tokens[:, 0]
        return self.head(tokens[:, 0]) + 0.5 * self.aux_head(tokens[:, 1:]).amax(dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing of the blocks."""
        self.grad_checkpointing = enable

    def compile_training(self) -> None:
        """Compile what training computes; evaluation stays as it is, and so do parameter names."""
        self.forward_train = torch.compile(self.forward_train)

    def silence_dense_head(self, *, zero: bool) -> None:
        """Train no dense head: freeze it, and let it say nothing in evaluation if `zero`.

        A head that is never taught would add half of its noise to every evaluation.
        """
        self.aux_head.requires_grad_(False)
        if zero:
            for parameter in self.aux_head.parameters():
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Name the matrices that weight decay must leave alone."""
        return {"pos_embed", "cls_token"}

    def get_classifier(self) -> nn.Module:
        """Return the class head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both heads by fresh ones."""
        self.num_classes = num_classes
        self.head = self._new_head().to(self.pos_embed.device)
        self.aux_head = self._new_head().to(self.pos_embed.device)
        self.head.apply(init_module)
        self.aux_head.apply(init_module)

    def _new_head(self) -> nn.Module:
        return nn.Linear(self.embed_dim, self.num_classes) if self.num_classes else nn.Identity()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_module)


def init_module(module: nn.Module) -> None:
    """Draw the first weights of a linear layer; leave any other module as it is."""
    # Convolutions keep torch's initialisation, and so do norms: theirs is 1 and 0 anyway.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def unwrap_state_dict(content: Mapping[str, Any], *, ema: bool = True) -> dict[str, Any]:
    """Find the weights in a published checkpoint.

    Args:
        content: A state dict, or a dict that holds one as `state_dict`, `model` or their averaged
            variants; names may be prefixed with "module." by DistributedDataParallel.
        ema: Whether averaged weights win over the raw ones where a file has both.
    """
    averaged, raw = ["state_dict_ema", "model_ema", "ema"], ["state_dict", "model"]
    for name in averaged + raw if ema else raw + averaged:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def resize_pos_embed(
    pos_embed: Float[Tensor, "1 t d"],
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
) -> Float[Tensor, "1 new_t d"]:
    """Resize position embeddings to another token grid, bicubically; the class part is kept.

    Args:
        pos_embed: One vector for the class token, then one for each grid token, row-major.
        grid: Token (rows, cols) wanted.
        old_grid: Token (rows, cols) of `pos_embed`; taken to be square when left out.
    """
    num_old = pos_embed.shape[1] - 1
    if old_grid is None:
        old_grid = (math.isqrt(num_old), math.isqrt(num_old))
    if math.prod(old_grid) != num_old:
        raise ValueError(f"pos_embed has {num_old} grid tokens, which is no {old_grid} grid")
    class_part, grid_part = pos_embed[:, :1], pos_embed[:, 1:]
    grid_part = grid_part.transpose(1, 2).unflatten(2, old_grid)
    grid_part = F.interpolate(grid_part.float(), size=grid, mode="bicubic", align_corners=False)
    grid_part = grid_part.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([class_part, grid_part], dim=1)


# ---------------------------------------------------------------------------- timm's registry

_RELEASES = "https://github.com/zihangJiang/TokenLabeling/releases/download"


def _cfg(url: str, side_px: int, crop_pct: float) -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/{url}",
        "num_classes": 1000,
        "input_size": (3, side_px, side_px),
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.in1k": _cfg("v0.2.0/lvvit_t.pth", 224, 0.9),
        "lvvit_s.in1k": _cfg("1.0/lvvit_s-26M-224-83.3.pth.tar", 224, 0.9),
        "lvvit_s.in1k_384": _cfg("1.0/lvvit_s-26M-384-84.4.pth.tar", 384, 0.9),
        "lvvit_m.in1k": _cfg("1.0/lvvit_m-56M-224-84.0.pth.tar", 224, 1.0),
        "lvvit_m.in1k_384": _cfg("1.0/lvvit_m-56M-384-85.4.pth.tar", 384, 1.0),
        "lvvit_m.in1k_448": _cfg("1.1/lvvit_m-56M-448-85.5.pth.tar", 448, 1.0),
        "lvvit_l.in1k_448": _cfg("1.0/lvvit_l-150M-448-86.2.pth.tar", 448, 1.0),
        "lvvit_l.in1k_512": _cfg("1.0/lvvit_l-150M-512-86.4.pth.tar", 512, 1.0),
    }
)


def _adapt(content: dict[str, Any], model: LVViT) -> dict[str, Tensor]:
    """Fit a published file to `model` for timm's pretrained=True."""
    weights = unwrap_state_dict(content)
    weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], model.grid)
    return weights


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LVViT:
    return build_model_with_cfg(LVViT, variant, pretrained, pretrained_filter_fn=_adapt, **kwargs)


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-T: 8.5 M parameters, 79.1 % top-1 at 224 px."""
    size = dict(embed_dim=240, depth=12, num_heads=4, residual_divisor=1.0)
    return _create("lvvit_t", pretrained, **size | kwargs)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-S: 26 M parameters, 83.3 % top-1 at 224 px."""
    size = dict(embed_dim=384, depth=16, num_heads=6, residual_divisor=2.0)
    return _create("lvvit_s", pretrained, **size | kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-M: 56 M parameters, 84.0 % top-1 at 224 px."""
    size = dict(embed_dim=512, depth=20, num_heads=8, residual_divisor=2.0)
    return _create("lvvit_m", pretrained, **size | kwargs)


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """Build LV-ViT-L: 150 M parameters, 86.2 % top-1 at 448 px, which is its default size."""
    size = dict(embed_dim=768, depth=24, num_heads=12, residual_divisor=3.0, stem_width=128)
    return _create("lvvit_l", pretrained, **size | kwargs)
