"""Checkpoints for other programs: a folder that plain timm loads, or LV-ViT's published form."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from timm.models.volo import VOLO
from torch import Tensor, nn

from .checkpoint import TrainedModel, load_model
from .models import is_own
from .models.token_labeled import DENSE_HEAD, TokenLabeled
from .recipe import Recipe

Format = Literal["timm", "published"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PUBLISHED = "model.pth.tar"


def export(
    checkpoint: Path, out: Path, *, form: Format = "timm", ema: bool | None = None
) -> list[Path]:
    """Write a checkpoint of tl-train in a form that other programs read.

    Args:
        checkpoint: Of tl-train.
        out: A folder that does not exist yet, or is empty.
        form: "timm": model.safetensors and the config.json that timm.create_model("local-dir:OUT",
            pretrained=True) reads; the dense head that we add to timm's models is left out.
            "published": model.pth.tar as the authors of LV-ViT and T2T-ViT publish theirs.
        ema: See load_model.

    Returns:
        The files written.

    Raises:
        ValueError: Not a checkpoint of tl-train, or a model that no one published in this form.
        FileExistsError: Something is in `out`.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    trained = load_model(checkpoint, ema=ema)
    if trained.recipe is None:
        raise ValueError(f"{checkpoint} is not of tl-train, and so in its published form already")
    if form == "published" and not is_own(trained.name):
        raise ValueError(
            f"--format published is for LV-ViT and T2T-ViT; {checkpoint} holds {trained.name}, "
            "which --format timm writes as its authors' library reads it"
        )
    out.mkdir(parents=True, exist_ok=True)
    if form == "published":
        content = {"state_dict": trained.model.state_dict()}
        return [_write(out / PUBLISHED, lambda path: torch.save(content, path))]
    network, weights = _as_timms(trained.model)
    text = json.dumps(_config(trained, trained.recipe, network), indent=2, ensure_ascii=False)
    return [
        _write(out / WEIGHTS, lambda path: safetensors.torch.save_file(weights, path)),
        _write(out / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8")),
    ]


def _as_timms(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the network that timm builds, and its weights without a dense head it has not."""
    network = model.backbone if isinstance(model, TokenLabeled) else model
    weights = network.state_dict()
    if isinstance(model, TokenLabeled) and not isinstance(network, VOLO):
        weights = {k: v for k, v in weights.items() if not k.startswith(f"{DENSE_HEAD}.")}
    return network, {name: tensor.contiguous() for name, tensor in weights.items()}


def _config(trained: TrainedModel, recipe: Recipe, network: nn.Module) -> dict[str, Any]:
    """Describe the model in timm's words."""
    made_for: Any = getattr(network, "pretrained_cfg", {})
    fixed = bool(made_for.get("fixed_input_size"))
    model, ids, names = recipe.model, trained.class_ids or [], trained.class_names or []
    height, width = model.image_hw
    size = {"img_size": height if height == width else [height, width]} if fixed else {}
    return {
        "architecture": trained.name.partition(".")[0],
        "num_classes": model.num_classes,
        "num_features": network.num_features,
        "label_names": ids,
        "label_descriptions": dict(zip(ids, names)),
        "model_args": size | model.kwargs,
        "pretrained_cfg": {
            "tag": "tokenlabel",
            "num_classes": model.num_classes,
            "input_size": [3, height, width],
            "fixed_input_size": fixed,
            "interpolation": recipe.evaluation.interpolation,
            "crop_pct": recipe.evaluation.crop_pct,
            "crop_mode": "center",
            "mean": list(recipe.augment.mean),
            "std": list(recipe.augment.std),
            "first_conv": made_for.get("first_conv"),
            "classifier": made_for.get("classifier"),
        },
    }


def _write(path: Path, write: Any) -> Path:
    """Write under a temporary name, flush to disk, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
