"""Any timm classifier as a student: its own class head, and a dense head on its features.

The dense head sees of each cell of the last feature map (or of each patch token) what the class
head would see of an image of that one cell: timm's own pooling, norm and hidden layer on the way to
the classifier, then a linear layer of its own, `aux_head`. VOLO has that layer already. Where there
is batch norm on that way (MobileNetV4, EfficientViT), the dense head sees the cells themselves: as
images of their own they would spoil the statistics of whole ones.

Weights keep timm's names, without a prefix, so that plain timm reads them. A student that is taught
class labels only has no `aux_head`, and its files are timm's to the last name.

MixToken: where patches are embedded one by one (ViT, DeiT, Swin, ConvNeXt, MLP-Mixer) swapping the
pixels of whole patches is the same as swapping their embeddings, so that is what is done. In other
networks it is CutMix on the grid of cells. VOLO's stem looks across patches, and its embeddings are
swapped behind it, as its authors do.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.volo import VOLO
from torch import Tensor, nn

from ..mix_token import MixBox, mix

Layout = Literal["nchw", "nhwc", "tokens"]

DENSE_HEAD = "aux_head"
"""Name of the dense head among the weights."""
_USUAL_STRIDE_PX = 32
_NEW_HEAD_STD = 0.01
_WIDE_LOGIT_STD = 1.0
"""Of first logits on features of unit variance; usual initialisations give 0.2 to 0.7."""


class TokenLabeled(nn.Module):
    """A timm classifier that is taught, besides the class of a view, the label of every cell.

    In training mode `forward` returns (class logits, dense logits, MixToken box), the dense logits
    None without a dense head; in evaluation mode what the classifier itself returns, which the
    dense head takes no part in but in VOLO.

    Args:
        backbone: Made by timm.create_model for images of image_size, on the CPU; a dense head is
            added to it.
        image_size: Height and width in pixels of the images to come.
        dense: Whether it gets a dense head. VOLO has one anyway.

    Raises:
        ValueError: The model does not take such images, or has no grid of cells that cover them.
    """

    def __init__(
        self, backbone: nn.Module, *, image_size: tuple[int, int], dense: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = int(backbone.num_classes)  # pyright: ignore[reportArgumentType]
        stride_px = _stride_px(backbone)
        self.grid = (max(1, image_size[0] // stride_px), max(1, image_size[1] // stride_px))
        """Cells (rows, cols)."""
        with _evaluating(backbone):
            features = _features_of_blank(backbone, image_size)
            layout = _layout(backbone, features, self.grid)
            if dense and (layout is None or any(side % stride_px for side in image_size)):
                raise ValueError(_no_grid(features, image_size, stride_px))
            self._layout: Layout = layout or "nchw"
            self._num_prefix = 0
            if self._layout == "tokens":
                self._num_prefix = features.shape[1] - self.grid[0] * self.grid[1]
            self._sees_cells_themselves = dense and _has_batch_norm_in_head(backbone, features)
            if dense and self._dense_head is None:
                width = self._hidden(self._cells(features)[:, :1]).shape[-1]
                head = nn.Linear(width, self.num_classes)
                draw_small(head)
                backbone.add_module(DENSE_HEAD, head)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], box: MixBox | None = None
    ) -> (
        Float[Tensor, "b c"]
        | tuple[Float[Tensor, "b c"], Float[Tensor, "b n c"] | None, MixBox | None]
    ):
        """Classify images; in training mode also each of their cells, row-major.

        Args:
            images: Normalised pixels of the size that the model was built for.
            box: Cells that are swapped between partners, training mode only. The dense logits are
                those of each image's own cells all the same: they are swapped back.
        """
        if not self.training:
            return self.backbone(images)
        mask = None if box is None else box.mask(images.device)
        class_logits, aux_logits = self.forward_train(images, mask)
        return class_logits, aux_logits, box

    def forward_train(
        self, images: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, " n"] | None
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b n c"] | None]:
        """Compute both heads: the whole of training that torch.compile needs to see."""
        features = self._features(images, mask)
        class_logits = self._classify(features)
        if self._dense_head is None:
            return class_logits, None
        cells = self._cells(features)
        return class_logits, self._label(cells if mask is None else mix(cells, mask))

    def predict(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b n c"] | None]:
        """Compute the logits of evaluation and those of each cell, None without a dense head."""
        features = self._features(images, None)
        class_logits = self.backbone.forward_head(features)  # pyright: ignore[reportCallIssue]
        if self._dense_head is None:
            return class_logits, None
        return class_logits, self._label(self._cells(features))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Collect the weights under timm's names."""
        return self.backbone.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Fill in weights under timm's names."""
        return self.backbone.load_state_dict(state_dict, *args, **kwargs)

    def compile_training(self) -> None:
        """Compile what training computes; evaluation stays as it is, and so do parameter names."""
        self.forward_train = torch.compile(self.forward_train)

    def silence_dense_head(self, *, zero: bool) -> None:
        """Train no dense head, see LVViT; only VOLO has one to be silenced."""
        if self._dense_head is None:
            return
        self._dense_head.requires_grad_(False)
        if zero:
            for parameter in self._dense_head.parameters():
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        if not hasattr(self.backbone, "no_weight_decay"):
            return set()
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}  # pyright: ignore

    @property
    def head_names(self) -> tuple[str, ...]:
        """Name the layers that have one output a class."""
        names = classifier_names(self.backbone)
        return names if DENSE_HEAD in names else (*names, DENSE_HEAD)

    @property
    def _dense_head(self) -> nn.Module | None:
        return getattr(self.backbone, DENSE_HEAD, None)

    def _features(self, images: Tensor, mask: Bool[Tensor, " n"] | None) -> Tensor:
        """Compute the last features; the cells in `mask` are those of the partner."""
        if mask is None:
            return self.backbone.forward_features(images)  # pyright: ignore[reportCallIssue]
        if not isinstance(self.backbone, VOLO):
            mixed = _swap(images, mask, self.grid)
            return self.backbone.forward_features(mixed)  # pyright: ignore[reportCallIssue]
        embedded = _swap(self.backbone.patch_embed(images), mask, self.grid)
        tokens = self.backbone.forward_tokens(embedded.permute(0, 2, 3, 1))
        if self.backbone.post_network is not None:
            tokens = self.backbone.forward_cls(tokens)
        return self.backbone.norm(tokens)

    def _classify(self, features: Tensor) -> Float[Tensor, "b c"]:
        backbone: Any = self.backbone
        if isinstance(backbone, VOLO):  # whose forward_head adds half of the dense head's best
            return backbone.head(backbone.forward_head(features, pre_logits=True))
        return backbone.forward_head(features)

    def _label(self, cells: Float[Tensor, "b n d"]) -> Float[Tensor, "b n c"]:
        assert self._dense_head is not None
        return self._dense_head(self._hidden(cells))

    def _cells(self, features: Tensor) -> Float[Tensor, "b n d"]:
        if self._layout == "tokens":
            return features[:, self._num_prefix :]
        dim = 2 if self._layout == "nchw" else 1
        cells = features.flatten(dim, dim + 1)
        return cells.transpose(1, 2) if self._layout == "nchw" else cells

    def _hidden(self, cells: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Take each cell, as if it were an image of its own, up to the classifier."""
        if self._sees_cells_themselves:
            return cells
        flat = cells.flatten(0, 1)
        if self._layout == "tokens":
            # Whichever token the head reads, the class token or the mean of the rest, it is this.
            images = flat[:, None].expand(-1, self._num_prefix + 1, -1)
        else:
            images = flat[:, :, None, None] if self._layout == "nchw" else flat[:, None, None]
        hidden = self.backbone.forward_head(images, pre_logits=True)  # pyright: ignore[reportCallIssue]
        return hidden.flatten(1).unflatten(0, cells.shape[:2])


def narrow_heads(backbone: nn.Module) -> None:
    """Draw classifiers with wide initial weights anew, so that a loss begins near ln(classes).

    timm draws EfficientNet's the wider, the fewer classes there are: for 4 classes a first loss of
    3 to 5 instead of 1.4, and gradients that undo what a pretrained network knows.
    """
    for name in classifier_names(backbone):
        layer = backbone.get_submodule(name)
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.is_meta:
            if layer.weight.square().sum() / len(layer.weight) > _WIDE_LOGIT_STD**2:
                draw_small(layer)


def draw_small(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw the first weights of a head so small that it favours no class."""
    nn.init.trunc_normal_(layer.weight, std=_NEW_HEAD_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def classifier_names(backbone: nn.Module) -> tuple[str, ...]:
    """Name timm's own layers that have one output a class."""
    found: Any = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _swap(
    maps: Float[Tensor, "b d h w"], mask: Bool[Tensor, " n"], grid: tuple[int, int]
) -> Float[Tensor, "b d h w"]:
    """Swap what lies under the marked cells with the same part of the partner, see mix_token."""
    area = F.interpolate(mask.view(1, 1, *grid).to(maps.dtype), maps.shape[-2:]) > 0.5
    return torch.where(area, maps.flip(0), maps)


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)


def _features_of_blank(backbone: nn.Module, image_size: tuple[int, int]) -> Any:
    try:
        return backbone.forward_features(torch.zeros(1, 3, *image_size))  # pyright: ignore[reportCallIssue]
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        height, width = image_size
        raise ValueError(f"it does not take images of {height} × {width} px: {reason}") from error


def _has_batch_norm_in_head(backbone: nn.Module, features: Tensor) -> bool:
    """Tell whether features meet batch norm on their way to the classifier."""
    met: list[nn.Module] = []
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, _: met.append(norm)) for norm in norms]
    backbone.forward_head(features, pre_logits=True)  # pyright: ignore[reportCallIssue]
    for hook in hooks:
        hook.remove()
    return bool(met)


def _stride_px(backbone: nn.Module) -> int:
    """Side of a cell."""
    stages: Any = getattr(backbone, "feature_info", None) or [{}]
    return int(stages[-1].get("reduction", _USUAL_STRIDE_PX))


def _layout(backbone: nn.Module, features: Any, grid: tuple[int, int]) -> Layout | None:
    """Tell how a model arranges its features; None if they are not this grid of cells."""
    width, (rows, cols) = backbone.num_features, grid
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 3:
        known: Any = getattr(backbone, "num_prefix_tokens", None)
        num_prefix = features.shape[1] - rows * cols
        fits = num_prefix in ((0, 1) if known is None else (known,))
        return "tokens" if fits and features.shape[2] == width else None
    if features.shape[1:] == (width, rows, cols):
        return "nchw"
    return "nhwc" if features.shape[1:] == (rows, cols, width) else None


def _no_grid(features: Any, image_size: tuple[int, int], stride_px: int) -> str:
    shape = list(features.shape[1:]) if isinstance(features, Tensor) else type(features).__name__
    height, width = image_size
    return (
        f"its features for an image of {height} × {width} px are {shape}, not a grid of cells of "
        f"{stride_px} px that cover it, so it cannot have a dense head; choose an image size "
        f"that is a multiple of {stride_px}, another model, or class labels alone: "
        "--set labels.dense_weight=0 --set labels.class_target=label"
    )
