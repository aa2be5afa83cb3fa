"""Any checkpoint as a model ready to evaluate: ours, the published ones, timm's."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float, Float32
from timm.data.config import resolve_data_config
from timm.models.volo import VOLO
from torch import Tensor, nn

from ..labeler.classes import ClassList
from ..labeler.teacher import known_classes, load_timm, pretrained_timm
from ..trainer import checkpoint as checkpoint_file
from ..trainer.models import check_name, is_own
from ..trainer.models.lvvit import LVViT
from ..trainer.models.token_labeled import TokenLabeled
from .data import EvalView
from .predictions import MODEL

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalModel:
    """A model ready for evaluation."""

    model: nn.Module
    name: str
    weights: str
    """Which weights of the file: "raw", "ema", or "published" for those of others."""
    view: EvalView
    num_classes: int
    class_ids: list[str] | None
    """What the checkpoint says its classes are, in order; None in files of others."""
    class_names: list[str] | None = None
    """What people read, one per class id."""
    has_dense_head: bool = False
    """Whether it was taught to label tokens."""

    @cached_property
    def classes(self) -> ClassList:
        """Its classes: what the checkpoint says, else ImageNet's where their number fits."""
        if self.class_ids is not None:
            return ClassList(self.name, self.num_classes, self.class_ids, self.class_names)
        config: Mapping[str, Any] = getattr(self.model, "pretrained_cfg", {})
        ids, names = known_classes(config, self.num_classes) or (None, None)
        return ClassList(self.name, self.num_classes, ids, names)

    def logits(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float32[Tensor, "b c"]]:
        """Compute what each head says; Predictions.heads lists them.

        Args:
            images: Normalised pixels. The model is in evaluation mode.
        """
        if not self.has_dense_head:
            return {MODEL: self.model(images).float()}
        model: Any = self.model
        # Both heads as training sees them; in evaluation mode nothing in it is random.
        class_logits, dense = model.forward_train(images, None)
        best = dense.amax(dim=1)
        published = class_logits + 0.5 * best
        found = {
            MODEL: published if _adds_dense_head(model) else class_logits,
            "class": class_logits,
            "dense_mean": dense.mean(dim=1),
            "dense_max": best,
            "published": published,
        }
        return {name: logits.float() for name, logits in found.items()}


def load_for_eval(
    checkpoint: Path | None,
    *,
    model: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    ema: bool | None = None,
) -> EvalModel:
    """Build the model of a checkpoint, load its weights, and find out what it wants to see.

    Args:
        checkpoint: Our own, a published LV-ViT or T2T-ViT file, or weights of any timm model. None
            downloads the weights that timm has for the model.
        model: Name of the model. Our own files know it, published ones of our models show it.
        image_size: Side in pixels instead of the one the weights are meant for.
        crop_pct: Part of the image's shorter side to see, instead of the model's own.
        ema: Whether averaged weights are taken where the file has both; left out: the better ones.
            Files of timm models leave no choice.

    Raises:
        ValueError: Unknown model, a file that is torn or says nothing about its model, weights
            that are missing, unexpected or of another shape, with their names.
        OSError: If the file is not there, or cannot be downloaded.
    """
    if checkpoint is None:
        loaded = _load_pretrained(model, image_size, ema)
    elif model is None or is_own(model):
        loaded = _load_ours(checkpoint, model, image_size, ema)
    else:
        loaded = _load_timm(checkpoint, model, image_size, ema)
    if crop_pct is None:
        return loaded
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct = {crop_pct}; allowed: 0 < crop_pct <= 1, e.g. 0.9")
    return replace(loaded, view=replace(loaded.view, crop_pct=crop_pct))


def _load_ours(path: Path, name: str | None, image_size: int | None, ema: bool | None) -> EvalModel:
    """Load what tl-train trained, or a published file of a model of ours."""
    trained = checkpoint_file.load_model(path, name=name, image_size=image_size, ema=ema)
    model, recipe = trained.model, trained.recipe
    if trained.report.resized or trained.report.begun:
        _logger.info("%s", trained.report)
    if recipe is None:
        assert isinstance(model, LVViT)
        rows, cols = model.grid
        view = replace(_timm_view(model), image_size=(16 * rows, 16 * cols))
        is_taught = not trained.report.begun
    else:
        view = EvalView(
            image_size=(image_size, image_size) if image_size else recipe.model.image_hw,
            crop_pct=recipe.evaluation.crop_pct,
            interpolation=recipe.evaluation.interpolation,
            mean=recipe.augment.mean,
            std=recipe.augment.std,
        )
        is_taught = recipe.labels.dense_weight > 0
    return EvalModel(
        model=model,
        name=trained.name,
        weights=trained.report.weights,
        view=view,
        num_classes=model.num_classes,
        class_ids=trained.class_ids,
        class_names=trained.class_names,
        has_dense_head=is_taught,
    )


def _load_timm(path: Path, name: str, image_size: int | None, ema: bool | None) -> EvalModel:
    """Load weights of a timm model, whoever trained it."""
    check_name(name)
    loaded = load_timm(name, checkpoint=path, image_size=image_size, ema=ema)
    if ema is not None and loaded.weights == "published":
        raise ValueError(
            f"--ema and --raw choose between the weights in a file of tl-train or LV-ViT; {path} "
            "is of another program (where it holds averaged weights, they are taken)"
        )
    return EvalModel(
        model=loaded.model,
        name=name,
        weights=loaded.weights,
        view=_timm_view(loaded.model, image_size),
        num_classes=loaded.num_classes,
        class_ids=loaded.class_ids,
        class_names=loaded.class_names,
    )


def _load_pretrained(name: str | None, image_size: int | None, ema: bool | None) -> EvalModel:
    """Download the weights that timm, or the authors of a model of ours, published."""
    if name is None:
        raise ValueError("--pretrained needs --model NAME: of which model?")
    if ema is not None:
        raise ValueError("--ema and --raw choose between weights in a file; --pretrained has one")
    check_name(name)
    model: Any = pretrained_timm(name, image_size)
    return EvalModel(
        model=model,
        name=name,
        weights="published",
        view=_timm_view(model, image_size),
        num_classes=int(model.num_classes),
        class_ids=None,
        has_dense_head=is_own(name) and bool(model.aux_head.weight.any()),
    )


def _timm_view(model: nn.Module, image_size: int | None = None) -> EvalView:
    # As timm's validate.py: where a model has been tested in a better view than trained, that one.
    config = resolve_data_config(model=model, use_test_size=True)
    size = (image_size, image_size) if image_size is not None else config["input_size"][1:]
    return EvalView(
        image_size=size,
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_mode=config["crop_mode"],
    )


def _adds_dense_head(model: nn.Module) -> bool:
    """Tell whether a model's own answer has half of its dense head's best in it."""
    return isinstance(model, LVViT) or (
        isinstance(model, TokenLabeled) and isinstance(model.backbone, VOLO)
    )
