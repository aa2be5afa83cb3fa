"""T2T-ViT: a vision transformer whose patch embedding looks at overlapping patches twice.

Tokens-to-Token ViT (https://arxiv.org/abs/2101.11986, section 3 and table 1), with the dense head
and MixToken of LV-ViT. Module names are those of the weights that its authors published, so that
their files load. In shapes, n counts the patch tokens and t = 1 + n all of them.
"""

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..mix_token import mix
from .lvvit import LVViT, Mlp, resize_pos_embed, unwrap_state_dict

_log = logging.getLogger(__name__)

_PATCH_PX = 16
_TOKEN_DROP = 0.1


def linear_attention(
    q: Float[Tensor, "b n d"],
    k: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n e"],
    directions: Float[Tensor, "m d"],
) -> Float[Tensor, "b n e"]:
    """Attend in time linear in n: Performer's (https://arxiv.org/abs/2009.14794) positive features.

    The weight of token j for token i is φ(q_i) · φ(k_j), divided by its sum over j, where
    φ(x) = exp(Wx - |x|²/2) / √m and W are the `directions`.
    """
    # Single precision whatever the caller's: the exponentials span many orders of magnitude.
    with torch.autocast(q.device.type, enabled=False):
        q_features = _positive_features(q.float(), directions.float())
        k_features = _positive_features(k.float(), directions.float())
        attended = q_features @ (k_features.mT @ v.float())
        total = q_features @ k_features.sum(dim=1)[:, :, None]
        # 1e-8 as in the published code: its weights were trained with it.
        return (attended / (total + 1e-8)).to(v.dtype)


def _positive_features(
    x: Float[Tensor, "b n d"], directions: Float[Tensor, "m d"]
) -> Float[Tensor, "b n m"]:
    # The exponent is at most |w|²/2 = m/2 for each direction w, so it cannot overflow.
    exponent = x @ directions.T - x.square().sum(dim=-1, keepdim=True) / 2
    return exponent.exp() / math.sqrt(len(directions))


class TokenPerformer(nn.Module):
    """One layer on the many tokens of the first steps: Performer attention, then an MLP.

    As the layer narrows its tokens, the values stand for them in the residual connection.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(_TOKEN_DROP)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(_TOKEN_DROP)
        )
        num_directions = dim // 2
        directions = nn.init.orthogonal_(torch.empty(num_directions, dim))
        self.w = nn.Parameter(directions * math.sqrt(num_directions), requires_grad=False)

    def forward(self, x: Float[Tensor, "b n in_d"]) -> Float[Tensor, "b n d"]:
        """Let every token look at every token, approximately."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.drop(self.proj(linear_attention(q, k, v, self.w)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Self-attention in one head that narrows its tokens."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.scale = in_dim**-0.5  # of the wide tokens, not of the queries: as published
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n in_d"]) -> Float[Tensor, "b n d"]:
        """Let every token look at every token; the values stand for `x` in the residual."""
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return (v + self.proj(attended))[:, 0]


class TokenTransformer(nn.Module):
    """What `TokenPerformer` approximates: exact attention, then an MLP."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = TokenAttention(in_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Float[Tensor, "b n in_d"]) -> Float[Tensor, "b n d"]:
        """Let every token look at every token."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


TokenLayer = TokenPerformer | TokenTransformer
_TOKEN_LAYERS = {"performer": TokenPerformer, "exact": TokenTransformer}


class TokensToToken(nn.Module):
    """Three soft splits at strides 4, 2 and 2 with an attention layer between each two."""

    def __init__(
        self, in_chans: int, token_dim: int, embed_dim: int, layer: type[TokenLayer]
    ) -> None:
        super().__init__()
        self.attention1 = layer(in_chans * 7 * 7, token_dim)
        self.attention2 = layer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Embed the 16 × 16 patches and what surrounds them, row-major."""
        height, width = images.shape[-2:]
        x = self.attention1(soft_split(images, kernel=7, stride=4, padding=2))
        x = x.mT.unflatten(2, (height // 4, width // 4))
        x = self.attention2(soft_split(x, kernel=3, stride=2, padding=1))
        x = x.mT.unflatten(2, (height // 8, width // 8))
        return self.project(soft_split(x, kernel=3, stride=2, padding=1))


def soft_split(
    planes: Float[Tensor, "b c h w"], *, kernel: int, stride: int, padding: int
) -> Float[Tensor, "b n d"]:
    """Cut planes into overlapping square patches and make each a token, row-major."""
    return F.unfold(planes, kernel, stride=stride, padding=padding).mT


def sinusoids(num_tokens: int, dim: int) -> Float[Tensor, "1 t d"]:
    """Encode the place of each token in the sequence by sines and cosines of falling frequency."""
    places = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    columns = torch.arange(dim, dtype=torch.float64)
    angles = places / 10_000.0 ** (2 * (columns // 2) / dim)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).float()[None]


class T2TViT(LVViT):
    """T2T-ViT of any depth and width, for images of one size, with LV-ViT's outputs.

    Position embeddings are computed for the model's number of tokens and never trained. In
    weights of another resolution they are resized like LV-ViT's, as the published fine-tuning does.

    Args:
        img_size: Pixels, a side or (height, width); multiples of 16.
        num_classes: Outputs of each head; 0 makes `forward` return the class token's features.
        token_dim: Width of the tokens between the soft splits.
        token_attention: Between the soft splits: "performer", or "exact", which is slower.

    Raises:
        ValueError: Impossible image size, number of heads or `token_attention`.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        token_dim: int = 64,
        token_attention: str = "performer",
        drop_path_rate: float = 0.0,
    ) -> None:
        if token_attention not in _TOKEN_LAYERS:
            allowed = ", ".join(map(repr, _TOKEN_LAYERS))
            raise ValueError(f"token_attention = {token_attention!r}; allowed: {allowed}")
        super().__init__(
            img_size=img_size,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            stem_width=1,
            residual_divisor=1.0,
            drop_path_rate=drop_path_rate,
        )
        del self.patch_embed  # the convolutional stem, whose place tokens_to_token takes
        layer = _TOKEN_LAYERS[token_attention]
        self.tokens_to_token = TokensToToken(in_chans, token_dim, embed_dim, layer)
        self.tokens_to_token.apply(_init_linear)
        table = sinusoids(1 + math.prod(self.grid), embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)

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
        x = self._run(self.tokens_to_token, images)
        if mask is not None:
            x = mix(x, mask)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(module, x, use_reentrant=False)
        return module(x)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def add_dense_head(weights: dict[str, Any]) -> tuple[str, ...]:
    """Give weights that were published without a dense head one of zeros, in place.

    It adds nothing to the class head in evaluation, and learns when token labels train it.

    Returns:
        The names that were added: none where there is a dense head.
    """
    added = {
        f"aux_{name}": torch.zeros_like(weights[name])
        for name in ("head.weight", "head.bias")
        if name in weights and f"aux_{name}" not in weights
    }
    weights |= added
    return tuple(added)


# ---------------------------------------------------------------------------- timm's registry

_RELEASE = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main"


def _cfg(file: str, side_px: int = 224) -> dict[str, Any]:
    return {
        "url": f"{_RELEASE}/{file}",
        "num_classes": 1000,
        "input_size": (3, side_px, side_px),
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": ("head", "aux_head"),
    }


default_cfgs = generate_default_cfgs(
    {
        "t2t_vit_14.in1k": _cfg("81.5_T2T_ViT_14.pth.tar"),
        "t2t_vit_14.in1k_384": _cfg("83.3_T2T_ViT_14.pth.tar", 384),
        "t2t_vit_19.in1k": _cfg("81.9_T2T_ViT_19.pth.tar"),
        "t2t_vit_24.in1k": _cfg("82.3_T2T_ViT_24.pth.tar"),
        "t2t_vit_24.token_label_in1k": _cfg("84.2_T2T_ViT_24.pth.tar"),
        "t2t_vit_t_14.in1k": _cfg("81.7_T2T_ViTt_14.pth.tar"),
        "t2t_vit_t_19.in1k": _cfg("82.4_T2T_ViTt_19.pth.tar"),
        "t2t_vit_t_24.in1k": _cfg("82.6_T2T_ViTt_24.pth.tar"),
    }
)


def _adapt(content: dict[str, Any], model: T2TViT) -> dict[str, Tensor]:
    """Fit a published file to `model` for timm's pretrained=True."""
    weights = unwrap_state_dict(content)
    weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], model.grid)
    if add_dense_head(weights):
        _log.warning("the file holds no dense head: aux_head is zero until token labels train it")
    return weights


def _create(variant: str, pretrained: bool, **kwargs: Any) -> T2TViT:
    return build_model_with_cfg(T2TViT, variant, pretrained, pretrained_filter_fn=_adapt, **kwargs)


_SIZE_14: dict[str, Any] = dict(embed_dim=384, depth=14, num_heads=6)
_SIZE_19: dict[str, Any] = dict(embed_dim=448, depth=19, num_heads=7)
_SIZE_24: dict[str, Any] = dict(embed_dim=512, depth=24, num_heads=8)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT-14: 21.5 M parameters and its dense head, 81.5 % top-1 at 224 px."""
    return _create("t2t_vit_14", pretrained, **_SIZE_14 | kwargs)


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT-19: 39.2 M parameters and its dense head, 81.9 % top-1 at 224 px."""
    return _create("t2t_vit_19", pretrained, **_SIZE_19 | kwargs)


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT-24: 64.1 M parameters and its dense head, 82.3 % top-1 at 224 px."""
    return _create("t2t_vit_24", pretrained, **_SIZE_24 | kwargs)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT_t-14, whose first layers attend exactly: 81.7 % top-1 at 224 px."""
    return _create("t2t_vit_t_14", pretrained, **_SIZE_14 | {"token_attention": "exact"} | kwargs)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT_t-19, whose first layers attend exactly: 82.4 % top-1 at 224 px."""
    return _create("t2t_vit_t_19", pretrained, **_SIZE_19 | {"token_attention": "exact"} | kwargs)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT_t-24, whose first layers attend exactly: 82.6 % top-1 at 224 px."""
    return _create("t2t_vit_t_24", pretrained, **_SIZE_24 | {"token_attention": "exact"} | kwargs)
