"""Weights of segmentation models: where training starts, and what prediction loads.

Three kinds of files are read:

* our own checkpoints. They have the form of trainer.checkpoint; of the recipe in them, the tables
  [model] (ModelConfig) and [inference] (InferenceConfig) are read here;
* the checkpoints that the authors of token labeling published for ADE20K, whose weights lie under
  `state_dict` and whose names and shapes are our models';
* for `start_from` also classifiers, ours or published.
"""

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainer import models as students
from ..trainer.checkpoint import choose_weights, is_ours, read_content, refuse_misfit, to_checkpoint
from ..trainer.distributed import Place
from ..trainer.models.lvvit import LVViT, resize_pos_embed
from ..trainer.published import fetch
from ..trainer.recipe import ModelConfig as StudentConfig
from ..trainer.recipe import build_record, parse_recipe
from .class_sets import CLASS_SETS, ClassSet, class_set_of, numbered
from .inference import InferenceConfig
from .uper_net import MODELS, ModelConfig, UperNet, create_model

_RELEASE = "https://github.com/zihangJiang/TokenLabeling/releases/download/v1.1-seg"
PUBLISHED = {name: f"{_RELEASE}/{name}.pth" for name in MODELS if name != "upernet_lvvit_t"}
"""Name → address of what the authors of token labeling published, trained on ADE20K."""

_POS_EMBED = "backbone.pos_embed"
_CLASSIFIER_ONLY = ("backbone.norm.", "backbone.head.", "backbone.aux_head.")
_SEGMENTER_ONLY = ("backbone.side_layer", "decode_head.", "auxiliary_head.")
_LAST_LAYERS = ("decode_head.conv_seg.", "auxiliary_head.conv_seg.")


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What `start_from` took from a file and what not, by the names of the model's weights."""

    path: Path
    kind: str
    """"classifier" or "segmentation model"."""
    weights: str
    """Which weights of the file: "raw", "ema", or "published" for files of others."""
    resized: tuple[str, ...]
    """Position embeddings of another grid."""
    unused: tuple[str, ...]
    """In the file only; by the file's own names."""
    new: tuple[str, ...]
    """In the model only, so they begin anew; a last layer of another class count, too."""
    differs: tuple[str, ...]
    """Settings that no weight shows and in which the file's model differs, in words."""

    def __str__(self) -> str:
        changes = [
            (self.resized, "resized"),
            (_grouped(self.unused), "unused"),
            (_grouped(self.new), "begun anew"),
        ]
        texts = [f"{', '.join(names)} {verb}" for names, verb in changes if names]
        texts += self.differs
        return (
            f"{self.path}: {self.weights} weights of a {self.kind}; {'; '.join(texts) or 'all fit'}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainedSegmenter:
    """A model ready to use, in evaluation mode, and what its file says about it."""

    model: UperNet
    config: ModelConfig
    inference: InferenceConfig
    classes: ClassSet
    weights: str
    """Which weights of the file: "raw", "ema", or "published" for files of others."""


# ---------------------------------------------------------------------------- where training starts


def start_from(model: UperNet, path: Path, *, ema: bool | None = None) -> StartReport:
    """Begin with the weights of a classifier, or of a segmentation model for other classes.

    Of a classifier the whole backbone is taken but its last norm, which segmentation has not.

    Args:
        model: Filled in place; untouched when an error is raised.
        path: LV-ViT trained by tl-train or published, or what `load_model` reads.
        ema: Whether averaged weights are taken where the file has both; left out, those that were
            better when the file was saved as the best, otherwise the averaged ones.

    Raises:
        ValueError: The file holds another architecture or is damaged; says which weights.
        OSError: It cannot be read.
    """
    content = read_content(path)
    weights, taken = choose_weights(content, path, ema)
    is_segmenter = _is_segmenter(weights)
    if not is_segmenter:
        weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    own = model.state_dict()
    unused = () if is_segmenter else _named(weights, _CLASSIFIER_ONLY)
    may_begin = () if is_segmenter else _SEGMENTER_ONLY
    new = [name for name in _named(own, may_begin) if name not in weights]
    new += [
        n for n in _named(own, _LAST_LAYERS) if n in weights and _other_classes(weights[n], own[n])
    ]
    weights = {n: t for n, t in weights.items() if n not in unused} | {n: own[n] for n in new}
    resized = _fit_pos_embed(weights, model, content)
    refuse_misfit(weights, own, path)
    differs = () if is_segmenter else _differences(model, content, path)
    model.load_state_dict(weights)
    return StartReport(
        path=path,
        kind="segmentation model" if is_segmenter else "classifier",
        weights=taken,
        resized=resized,
        unused=tuple(name.removeprefix("backbone.") for name in unused),
        new=tuple(new),
        differs=differs,
    )


def _is_segmenter(weights: Mapping[str, Any]) -> bool:
    return any(name.startswith("decode_head.") for name in weights)


def _named(names: Iterable[str], prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith(prefixes))


def _other_classes(one: Tensor, other: Tensor) -> bool:
    return one.shape[:1] != other.shape[:1]


def _fit_pos_embed(
    weights: dict[str, Any], model: UperNet, content: Mapping[str, Any]
) -> tuple[str, ...]:
    """Resize the position embeddings where grids differ; say if so."""
    old = weights.get(_POS_EMBED)
    if old is None or old.ndim != 3:
        return ()  # refused later, by name
    side = math.isqrt(max(0, old.shape[1] - 1))
    rows, cols = content["grid"] if is_ours(content) else (side, side)
    if (rows, cols) == model.grid or rows * cols != old.shape[1] - 1:
        return ()
    weights[_POS_EMBED] = resize_pos_embed(old, model.grid, (rows, cols))
    return (_POS_EMBED,)


def _differences(model: UperNet, content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Compare the settings that a classifier's weights do not show with the model's."""
    if is_ours(content):
        config = parse_recipe(to_checkpoint(content, path).recipe).model
    else:
        name = students.guess_name(choose_weights(content, path, None)[0])
        config = StudentConfig(name=name or "", num_classes=1)
    if students.architecture(config.name) not in students.MODELS:
        return ()  # fits by its shapes, but nobody knows what it was
    with torch.device("meta"):
        theirs = students.create_model(config)
    assert isinstance(theirs, LVViT)
    pairs = zip(_settings(model.backbone.blocks[0]), _settings(theirs.blocks[0]))
    names = ("residual_divisor", "layer norm eps")
    return tuple(
        f"{name} is {here:g} here, {there:g} in the classifier"
        for name, (here, there) in zip(names, pairs)
        if here != there
    )


def _settings(block: Any) -> tuple[float, float]:
    return block.residual_divisor, block.norm1.eps


def _grouped(names: Iterable[str]) -> tuple[str, ...]:
    """Name modules in place of their weights."""
    depth = {"backbone": 2}
    heads = (name.split(".") for name in names)
    return tuple(dict.fromkeys(".".join(p[: depth.get(p[0], 1)]) for p in heads))


# --------------------------------------------------------------------------------- trained models


def find_weights(name: str, place: Place) -> Path:
    """Find a checkpoint file; the main process downloads what is not there yet.

    Args:
        name: A file's path, an address, or a key of PUBLISHED.
        place: This process among all.

    Raises:
        ValueError: No such file and no such name; says which are known.
        OSError: The download failed.
    """
    is_file = "/" in name or bool(Path(name).suffix) or Path(name).exists()
    if name not in PUBLISHED and not is_file:
        raise ValueError(
            f"{name} is neither a file nor the name of a published segmentation model; known: "
            f"{', '.join(PUBLISHED)}"
        )
    return fetch(PUBLISHED.get(name, name), place)


def load_model(path: Path, *, ema: bool | None = None) -> TrainedSegmenter:
    """Build the model of a segmentation checkpoint and load its weights, by name, all of them.

    Args:
        path: Our own checkpoint, or a published one.
        ema: See `start_from`.

    Raises:
        ValueError: The file is no segmentation model of ours, or damaged; says why.
        OSError: It cannot be read.
    """
    content = read_content(path)
    weights, taken = choose_weights(content, path, ema)
    if not _is_segmenter(weights):
        raise ValueError(
            f"{path} holds no segmentation model: it has no decode_head. A classifier can be where "
            "training one starts (tl-seg train --init), but it cannot say what a pixel shows"
        )
    if is_ours(content):
        checkpoint = to_checkpoint(content, path)
        table = tomllib.loads(checkpoint.recipe)
        config = build_record(ModelConfig, table.get("model", {}), "model.")
        inference = build_record(InferenceConfig, table.get("inference", {}), "inference.")
        config = dataclasses.replace(config, num_classes=len(checkpoint.class_names))
        classes = class_set_of(checkpoint.class_names)
    else:
        config, inference = _published_config(weights, path), InferenceConfig()
        classes = _published_classes(content, config.num_classes)
    model = create_model(config)
    refuse_misfit(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    return TrainedSegmenter(
        model=model.eval(), config=config, inference=inference, classes=classes, weights=taken
    )


def _published_config(weights: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """Read the model, its class count and its resolution off the shapes of the weights."""
    last, positions = weights.get("decode_head.conv_seg.bias"), weights.get(_POS_EMBED)
    if last is None or positions is None or positions.ndim != 3:
        raise ValueError(f"{path} is none of {', '.join(MODELS)}: it has no {_POS_EMBED}")
    widths = {"s": 384, "m": 512, "l": 768, "t": 240}
    size = next((size for size, width in widths.items() if width == positions.shape[2]), None)
    if size is None:
        raise ValueError(
            f"{path} is none of {', '.join(MODELS)}: it is {positions.shape[2]} channels wide"
        )
    side_px = 16 * math.isqrt(positions.shape[1] - 1)
    return ModelConfig(name=f"upernet_lvvit_{size}", num_classes=len(last), image_size=side_px)


def _published_classes(content: Mapping[str, Any], num_classes: int) -> ClassSet:
    """Take names and colours from the file where it has them; 150 unnamed classes are ADE20K's."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    names, colours = meta.get("CLASSES"), meta.get("PALETTE")
    if not (isinstance(names, list | tuple) and len(names) == num_classes):
        ade20k = CLASS_SETS["ade20k"]
        return ade20k if num_classes == len(ade20k.names) else numbered(num_classes)
    classes = class_set_of([str(name).strip() for name in names])
    if isinstance(colours, list | tuple) and len(colours) == num_classes:
        if all(_is_colour(colour) for colour in colours):
            return ClassSet(names=classes.names, colours=tuple((r, g, b) for r, g, b in colours))
    return classes


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(channel, int) and 0 <= channel <= 255 for channel in value)
    )
