"""UperNet on LV-ViT: which class each pixel of an image belongs to.

UperNet (https://arxiv.org/abs/1807.10221) pools the coarsest feature map at four scales and adds it
to the finer ones from the top down; an auxiliary head, a small FCN, reads one feature map during
training. Names and shapes are those of the checkpoints that the authors of token labeling published
for ADE20K, so that these load as they are. In shapes, c counts the classes.
"""

import difflib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..trainer.recipe import IMAGENET_MEAN, IMAGENET_STD
from .backbone import Features, LVViTBackbone

POOL_SCALES = (1, 2, 3, 6)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which segmentation model it is: the [model] table of a segmentation recipe."""

    name: str = "upernet_lvvit_s"
    """upernet_lvvit_ and the size of LV-ViT: t, s, m or l. The last three are published."""
    num_classes: int = 150
    """Must equal the class count of the data set; 0 takes it from there."""
    image_size: int | tuple[int, int] | None = None
    """Pixels whose token grid the position embeddings have: a side, or [height, width]. Other
    images resize them. Left out: as published, 448 for upernet_lvvit_l and 512 for the others."""
    mlp_drop: float = 0.0
    """Dropout in the MLP of the last block, rising linearly from 0. This is what drop_path_rate
    does in the published code: 0.1 for S, 0.2 for M, 0.5 for L."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0; none in the published code."""
    head_drop: float = 0.1
    """Dropout of whole channels before the last layer of both heads."""
    grad_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass instead of being kept in memory."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, in [0, 1]: in training, evaluation and prediction."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each channel after the mean is gone."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of UperNet, e.g. {depth = 4, out_blocks = [0, 1, 2, 3]}."""

    def __post_init__(self) -> None:
        for name in ("mlp_drop", "drop_path", "head_drop"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"model.{name} = {value}; allowed: 0 <= rate < 1")
        if self.num_classes < 0:
            raise ValueError(f"model.num_classes = {self.num_classes}; allowed: >= 0")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"model.std = {self.std}; allowed: > 0")


_COMMON: dict[str, Any] = dict(image_hw=(512, 512), residual_divisor=2.0, head_dim=256)
_SIZES: dict[str, dict[str, Any]] = {
    "upernet_lvvit_t": _COMMON
    | dict(embed_dim=240, depth=12, num_heads=4, out_blocks=(2, 5, 8, 11), residual_divisor=1.0),
    "upernet_lvvit_s": _COMMON
    | dict(embed_dim=384, depth=16, num_heads=6, out_blocks=(6, 9, 12, 15)),
    "upernet_lvvit_m": _COMMON
    | dict(embed_dim=512, depth=20, num_heads=8, out_blocks=(10, 13, 16, 19)),
    # Residuals are not divided here, though those of the classifier are, by 3: as published.
    "upernet_lvvit_l": _COMMON
    | dict(embed_dim=768, depth=24, num_heads=12, out_blocks=(14, 17, 20, 23), stem_width=128)
    | dict(image_hw=(448, 448), residual_divisor=1.0, head_dim=512),
}
MODELS = tuple(_SIZES)


def create_model(config: ModelConfig) -> "UperNet":
    """Build the network of a recipe with fresh weights.

    Raises:
        ValueError: Unknown model, unknown or impossible argument; says what is known.
    """
    if not config.num_classes:
        raise ValueError("model.num_classes = 0 stands for a data set's count; give the number")
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown segmentation model {config.name!r}{hint}; known: {', '.join(MODELS)}"
        )
    fixed: dict[str, Any] = {
        "num_classes": config.num_classes,
        "mlp_drop": config.mlp_drop,
        "drop_path": config.drop_path,
        "head_drop": config.head_drop,
        "grad_checkpointing": config.grad_checkpointing,
    }
    size = config.image_size
    if size is not None:
        fixed["image_hw"] = (size, size) if isinstance(size, int) else size
    free = [name for name in inspect.signature(UperNet).parameters if name not in fixed]
    free += [name for name in inspect.signature(LVViTBackbone).parameters if name not in fixed]
    free = [name for name in free if name not in ("backbone", "image_hw")]
    for name in config.kwargs:
        if name not in free:
            raise ValueError(f"unknown key 'model.kwargs.{name}'; known: {', '.join(free)}")
    options = _SIZES[config.name] | config.kwargs | fixed
    options["out_blocks"] = tuple(options["out_blocks"])  # TOML has lists only
    try:
        return UperNet(**options)
    except TypeError as error:
        raise ValueError(f"model.kwargs = {config.kwargs} does not build: {error}") from error


class UperNet(nn.Module):
    """LV-ViT, UperNet's head, and an auxiliary head for training.

    In training mode `forward` returns the logits of both heads at the resolution at which each
    works, a quarter and a sixteenth of the image; in evaluation mode those of the main head,
    resized to the image.

    Args:
        num_classes: Outputs of each head.
        head_dim: Channels within both heads.
        deep_dim: Channels of the coarsest feature map.
        head_drop: Dropout of whole channels before the last layer of both heads.
        head_std: Standard deviation of that layer's first weights. As published it is so small
            that all classes begin alike, and the rest of the heads gets next to no gradient until
            it has grown; a run of a few hundred steps does not live to see it, and needs 0.1.
        backbone: More arguments of LVViTBackbone.

    Raises:
        ValueError: Numbers out of range, or that do not fit each other.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        head_dim: int = 256,
        deep_dim: int = 2048,
        head_drop: int | float = 0.1,
        head_std: int | float = 0.01,
        **backbone: Any,
    ) -> None:
        super().__init__()
        if not head_std > 0:
            raise ValueError(f"head_std = {head_std}; allowed: > 0")
        self.num_classes = num_classes
        self.backbone = LVViTBackbone(deep_dim=deep_dim, **backbone)
        embed_dim = self.backbone.cls_token.shape[-1]
        self.decode_head = UPerHead(embed_dim, deep_dim, head_dim, num_classes, head_drop)
        self.auxiliary_head = FCNHead(embed_dim, head_dim, num_classes, head_drop)
        for head in (self.decode_head, self.auxiliary_head):
            init_classifier(head.conv_seg, head_std)

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns that the position embeddings have."""
        return self.backbone.grid

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> (
        Float[Tensor, "b c h w"] | tuple[Float[Tensor, "b c h4 w4"], Float[Tensor, "b c rows cols"]]
    ):
        """Compute one logit a class; see the class.

        Args:
            images: Normalised pixels, of any size from 15 × 15 px on.

        Raises:
            ValueError: An image is too small, or training sees a single image.
        """
        features = self.backbone(images)
        if self.training:
            self._refuse_single(images)
            return self.decode_head(features), self.auxiliary_head(features.tokens)
        return resize(self.decode_head(features), tuple(images.shape[-2:]))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing of the blocks."""
        self.backbone.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Name the matrices that weight decay should leave alone; the published code decays all."""
        return {"backbone.pos_embed", "backbone.cls_token"}

    def _refuse_single(self, images: Tensor) -> None:
        # The norm behind the pooling to 1 × 1 would have one value a channel.
        if len(images) == 1 and any(isinstance(m, nn.BatchNorm2d) for m in self.modules()):
            raise ValueError(
                "UperNet cannot be trained with one image per process, because its batch norms "
                "need two; take a larger batch, or several processes with synchronised norms"
            )


class UPerHead(nn.Module):
    """UperNet's head: a pyramid of pooled features, added to the finer maps from the top down."""

    def __init__(
        self, dim: int, deep_dim: int, head_dim: int, num_classes: int, drop: int | float
    ) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(head_dim, num_classes, 1)
        self.dropout = nn.Dropout2d(drop)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormReLU(deep_dim, head_dim, 1))
            for scale in POOL_SCALES
        )
        self.bottleneck = ConvNormReLU(deep_dim + len(POOL_SCALES) * head_dim, head_dim, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(dim, head_dim, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvNormReLU(head_dim, head_dim, 3) for _ in range(3))
        self.fpn_bottleneck = ConvNormReLU(4 * head_dim, head_dim, 3)

    def forward(self, features: Features) -> Float[Tensor, "b c h4 w4"]:
        """Classify each position of the finest feature map."""
        finer = zip(self.lateral_convs, features[:3])
        maps = [conv(feature) for conv, feature in finer] + [self._pooled(features.deep)]
        for level in (3, 2, 1):
            maps[level - 1] = maps[level - 1] + resize(maps[level], _size(maps[level - 1]))
        smooth = [conv(map_) for conv, map_ in zip(self.fpn_convs, maps)] + [maps[3]]
        stacked = torch.cat([resize(map_, _size(maps[0])) for map_ in smooth], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(stacked)))

    def _pooled(self, deep: Float[Tensor, "b deep_d rows cols"]) -> Float[Tensor, "b d rows cols"]:
        """See the coarsest map beside its means over 1, 2 × 2, 3 × 3 and 6 × 6 parts."""
        pools = [resize(module(deep), _size(deep)) for module in self.psp_modules]
        return self.bottleneck(torch.cat([deep, *pools], dim=1))


class FCNHead(nn.Module):
    """One convolution and a classifier for every token: the auxiliary head."""

    def __init__(self, dim: int, head_dim: int, num_classes: int, drop: int | float) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(head_dim, num_classes, 1)
        self.dropout = nn.Dropout2d(drop)
        self.convs = nn.Sequential(ConvNormReLU(dim, head_dim, 3))

    def forward(self, tokens: Float[Tensor, "b d rows cols"]) -> Float[Tensor, "b c rows cols"]:
        """Classify each token."""
        return self.conv_seg(self.dropout(self.convs(tokens)))


class ConvNormReLU(nn.Module):
    """Convolution without bias that keeps the size, batch norm, ReLU."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b e h w"]:
        """Compute the three."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def init_classifier(conv: nn.Conv2d, std: int | float) -> None:
    """Draw the weights of a head's last layer."""
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def resize(
    maps: Float[Tensor, "b d h w"], size: tuple[int, ...]
) -> Float[Tensor, "b d new_h new_w"]:
    """Resize maps to (height, width), bilinearly, by pixel areas."""
    if _size(maps) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
