"""The students. Importing this package registers ours with timm.

All have `grid`, `num_classes`, `head_names` or LV-ViT's two heads, and compute in training mode
(class logits, dense logits, box), in evaluation mode class logits.
"""

import difflib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import timm
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from ..recipe import ModelConfig
from .lvvit import LVViT
from .t2t_vit import T2TViT
from .token_labeled import TokenLabeled, narrow_heads

_CLASS_OF = {
    **dict.fromkeys(["lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l"], LVViT),
    **dict.fromkeys(["t2t_vit_14", "t2t_vit_19", "t2t_vit_24"], T2TViT),
    **dict.fromkeys(["t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"], T2TViT),
}
MODELS = tuple(_CLASS_OF)
"""Our own; every other name is timm's."""

Student = LVViT | TokenLabeled  # T2TViT is an LVViT, too
_LVVIT_OF_WIDTH = {240: "lvvit_t", 384: "lvvit_s", 512: "lvvit_m", 768: "lvvit_l"}

log = logging.getLogger(__name__)


def create_model(config: ModelConfig, *, dense: bool = True, pretrained: bool = False) -> Student:
    """Build the network of a recipe on the CPU.

    Args:
        config: Which one; its own `pretrained` is not looked at.
        dense: Whether a timm model gets a dense head; ours always have one.
        pretrained: Whether it begins with the weights that its authors published, downloaded on
            first use, instead of with fresh ones. Heads of another class count begin anew.

    Raises:
        ValueError: Unknown model, unknown or impossible argument; says what is known.
        OSError: The weights cannot be downloaded.
    """
    if not config.num_classes:
        raise ValueError("model.num_classes = 0 stands for a data set's count; give the number")
    check_name(config.name)
    if is_own(config.name):
        model = _create_own(config, pretrained)
        model.set_grad_checkpointing(config.grad_checkpointing)
        return model
    backbone = _create_timm(config, pretrained)
    if config.grad_checkpointing:
        _save_memory(backbone, config.name)
    try:
        return TokenLabeled(backbone, image_size=config.image_hw, dense=dense)
    except ValueError as error:
        raise ValueError(f"model.name = {config.name!r}: {error}") from error


def predict(
    model: Student, images: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b n c"] | None]:
    """Compute the logits of evaluation and those of each token, None without a dense head.

    Args:
        model: In evaluation mode.
        images: Normalised pixels.
    """
    if isinstance(model, TokenLabeled):
        return model.predict(images)
    tokens = model.forward_features(images)
    return model.forward_head(tokens), model.aux_head(tokens[:, 1:])


def head_names(model: Student) -> tuple[str, ...]:
    """Name the layers that have one output a class, the class head first."""
    return model.head_names if isinstance(model, TokenLabeled) else ("head", "aux_head")


def guess_name(weights: Mapping[str, Tensor]) -> str | None:
    """Tell by names and shapes which model of ours published weights are for; None if of none."""
    if "tokens_to_token.project.weight" in weights:
        depth = sum(name.startswith("blocks.") and name.endswith("norm1.bias") for name in weights)
        is_performer = "tokens_to_token.attention1.w" in weights
        name = f"t2t_vit_{depth}" if is_performer else f"t2t_vit_t_{depth}"
        return name if name in MODELS else None
    if not {"pos_embed", "aux_head.bias"} <= set(weights):
        return None
    return _LVVIT_OF_WIDTH.get(weights["pos_embed"].shape[-1])


def pretrained_facts(name: str) -> dict[str, Any]:
    """Say what a model's published weights were made for, in timm's words.

    Returns:
        input_size, interpolation, mean, std, crop_pct, …, and num_classes.
    """
    check_name(name)
    config = timm.get_pretrained_cfg(name)
    found = config.to_dict() if config is not None else {}
    return resolve_model_data_config(nn.Identity(), pretrained_cfg=found) | {
        "num_classes": found.get("num_classes")
    }


def is_own(name: str) -> bool:
    """Tell whether a model is one of ours, with or without a weights tag."""
    return architecture(name) in MODELS


def architecture(name: str) -> str:
    """Cut off the tag that names weights: convnext_tiny.fb_in1k is a convnext_tiny."""
    return name.partition(".")[0]


def check_name(name: str) -> None:
    """Refuse a name that neither we nor timm know.

    Raises:
        ValueError: The closest names are in the message.
    """
    bare = architecture(name)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, MODELS, n=1)
        near += difflib.get_close_matches(bare, set(timm.list_models()) - set(near), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown model {name!r}{hint}; known: {', '.join(MODELS)}, and every classifier of "
            "timm (timm.list_models() lists them)"
        )
    known = timm.list_pretrained(f"{bare}.*")
    if name != bare and name not in known:
        raise ValueError(
            f"model {bare} has no weights {name.partition('.')[2]!r}; "
            f"known: {', '.join(known) or 'none'}"
        )


def _create_own(config: ModelConfig, pretrained: bool) -> LVViT:
    fixed = {
        "img_size": config.image_hw,
        "num_classes": config.num_classes,
        "drop_path_rate": config.drop_path,
    }
    kind = _CLASS_OF[architecture(config.name)]
    free = [name for name in inspect.signature(kind).parameters if name not in fixed]
    for name in config.kwargs:
        if name not in (*free, "pretrained_cfg_overlay"):
            raise ValueError(f"unknown key 'model.kwargs.{name}'; known: {', '.join(free)}")
    try:
        return _build(config, pretrained, fixed | config.kwargs)
    except TypeError as error:
        raise ValueError(f"model.kwargs = {config.kwargs} does not build: {error}") from error


def _create_timm(config: ModelConfig, pretrained: bool) -> nn.Module:
    """Leave out what a model does not know: a size, or a drop path that is 0 anyway."""
    options: dict[str, Any] = {
        "num_classes": config.num_classes,
        "img_size": config.image_hw,
        "drop_path_rate": config.drop_path,
        **config.kwargs,
    }
    while True:
        try:
            backbone = _build(config, pretrained, options)
        except TypeError as error:  # comes before any weight is made
            unknown = {name for name in options if f"'{name}'" in str(error)}
            if "drop_path_rate" in unknown and config.drop_path:
                raise ValueError(
                    f"model.drop_path = {config.drop_path}: {config.name} has no stochastic depth; "
                    "--set model.drop_path=0"
                ) from error
            if not unknown or not unknown <= {"img_size", "drop_path_rate"} - set(config.kwargs):
                raise ValueError(
                    f"model.kwargs = {config.kwargs} does not build {config.name}: {error}"
                ) from error
            options = {name: value for name, value in options.items() if name not in unknown}
        else:
            if not pretrained or backbone.pretrained_cfg["num_classes"] != config.num_classes:
                narrow_heads(backbone)
            return backbone


def _build(config: ModelConfig, pretrained: bool, options: dict[str, Any]) -> Any:
    if not pretrained:
        try:
            return timm.create_model(config.name, **options)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"model.name = {config.name!r} does not build: {error}") from error
    log.info("loading the published weights of %s (downloaded on first use)", config.name)
    try:
        return timm.create_model(config.name, pretrained=True, **options)
    except (ValueError, TypeError):
        raise
    except Exception as error:  # whatever the hub's client, its HTTP library and timm may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the published weights of {config.name} could not be loaded ({reason}); if this "
            "machine has no network, download them elsewhere and give --init FILE with "
            "model.pretrained=false"
        ) from error


def _save_memory(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    except (AssertionError, AttributeError) as error:
        raise ValueError(
            f"model.grad_checkpointing = true: {name} has none; --set model.grad_checkpointing="
            "false"
        ) from error
