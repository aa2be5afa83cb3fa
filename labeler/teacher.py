"""Any timm classifier made dense: class logits at every cell of its last feature map.

The classifier is timm's own `forward_head`, applied to each cell as if it were a whole image with
a 1×1 feature map. What that promises depends on the model:

- A linear classifier on average-pooled features (ResNet, RegNet, EfficientNet, NFNet and most
  CNNs; Swin): the mean of the dense logits over all cells is the model's own output.
- A head that is not linear after pooling (the norm of ConvNeXt, the hidden layer of MobileNetV3):
  each cell gets what the head says of that cell's feature alone, and wherever all cells agree
  this is the model's output. The mean over cells is close to it, not equal.
- A vision transformer: each patch token takes the place of the pooled token (the class token, the
  mean, or what attention pooling collects). Only mean pooling into a linear layer keeps the first
  promise.
"""

import argparse
import contextlib
import difflib
import hashlib
import logging
import pickle
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import (
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import Tensor, nn

from .classes import ClassList, LabelSpace, Reduction

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_logger = logging.getLogger(__name__)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Where training scripts put the weights, best first: the averaged ones are those people report.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
_OWN_FORMAT = "tokenlabel-checkpoint"  # of trainer/checkpoint.py, a later stage
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_NUM_SHOWN = 5
_MAX_LOGITS = 1 << 26  # 256 MB: of all classes, where only some are wanted

Layout = Literal["nchw", "nhwc", "tokens"]
WeightsKind = Literal["ema", "raw", "published"]
"""Averaged or raw weights of tl-train, or those of another program's file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Teacher:
    """A frozen classifier that scores every cell of its feature map."""

    name: str
    """timm's name of the architecture."""
    model: nn.Module = field(repr=False)
    layout: Layout
    """How the model arranges its features."""
    device: torch.device
    precision: str
    """fp32, bf16 or fp16: of everything up to the features. The classifier runs in fp32."""
    image_size: int
    """Side of the square image the model was made for, px; a multiple of stride."""
    stride: int
    """Side of a cell, px."""
    square_only: bool
    """Whether the model takes images of image_size × image_size px alone."""
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of the pixels in [0, 1], per channel."""
    interpolation: str
    """How the model's training images were resized: bicubic, bilinear, …"""
    weights_sha256: str
    """Over names, shapes and values of the weights, however they were stored."""
    class_ids: list[str] | None = field(repr=False)
    """wnids, or the names of the folders it learnt from. Ids and names are known for ImageNet and
    its kin, and where the weights bring them along."""
    class_names: list[str] | None = field(repr=False)
    """What people read."""
    space: LabelSpace | None = field(default=None, repr=False)
    """What its classes were made of, if not all of the model's own in their order were wanted."""
    # On the device already: making them anew would wait for the batch before.
    _mean: Float[Tensor, "3 1 1"] = field(repr=False)
    _std: Float[Tensor, "3 1 1"] = field(repr=False)
    _reduction: Reduction | None = field(default=None, repr=False)

    @property
    def classes(self) -> ClassList:
        """The classes of its logits."""
        return ClassList(self.name, self.num_classes, self.class_ids, self.class_names)

    def in_space(self, space: LabelSpace | None) -> "Teacher":
        """Return a teacher whose logits are those of a label space; itself if that is None."""
        if space is None:
            return self
        assert self.space is None and space.num_teacher_classes == self.num_classes
        return replace(
            self,
            num_classes=space.num_classes,
            class_ids=None if space.ids is None else list(space.ids),
            class_names=None if space.names is None else list(space.names),
            space=space,
            _reduction=None if space.is_unchanged else Reduction(space, self.device),
        )

    def dense(
        self, images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b c rows cols"]:
        """Return the class logits of every cell, in fp32.

        Args:
            images: RGB, uint8 in [0, 255] or float in [0, 1]; sides are multiples of stride.
        """
        return self.classify(self.cells(images)).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def cells(
        self, images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b rows cols d"]:
        """Return the features of every cell, from images as in dense."""
        grid = images.shape[2] // self.stride, images.shape[3] // self.stride
        images = images.to(self.device, non_blocking=True)
        scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
        pixels = (images * scale - self._mean) / self._std
        with self._autocast():
            features = self.model.forward_features(  # pyright: ignore[reportCallIssue]: timm's API
                pixels.contiguous(memory_format=torch.channels_last)
            )
        return _to_cells(features, self.layout, _num_prefix_tokens(self.model), grid)

    @torch.inference_mode()
    def classify(self, cells: Float[Tensor, "b rows cols d"]) -> Float[Tensor, "b rows cols c"]:
        """Apply the classifier to each cell's features."""
        flat = cells.flatten(0, 2)
        if self._reduction is None or self.space is None:
            logits = self._head(flat)
        else:
            # The caller knows how many logits come out, not how many there are on the way.
            pieces = flat.split(max(1, _MAX_LOGITS // self.space.num_teacher_classes))
            logits = torch.cat([self._reduction(self._head(piece)) for piece in pieces])
        return logits.reshape(*cells.shape[:3], -1)

    def _head(self, cells: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        # In fp32 always: bf16 logits around 12 would come in steps of 1/16.
        inputs = _as_images(cells.float(), self.layout, _num_prefix_tokens(self.model))
        return self.model.forward_head(inputs)  # pyright: ignore[reportCallIssue]: timm's API

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.precision])


def load_teacher(
    name: str,
    *,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Teacher:
    """Build a teacher with its weights.

    Args:
        name: A timm model name, with or without a weights tag ("resnet50.a1_in1k").
        checkpoint: Weights to use instead of those timm downloads: safetensors or what torch.save
            wrote, bare or nested as training scripts leave it. The number of classes is read from
            it.
        image_size: Side of the images in px, rounded to a multiple of the model's stride; None
            means what the model's own configuration evaluates at.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", …
        precision: "auto" (bf16 on CUDA, else fp32), "fp32", "bf16" or "fp16".

    Raises:
        ValueError: If the model is unknown, cannot be made dense, or the weights do not fit it.
        OSError: If the checkpoint cannot be read or the weights cannot be downloaded.
    """
    _check_name(name)
    torch_device = resolve_device(device)
    if checkpoint is None:
        model = pretrained_timm(name, image_size)
    else:
        model = load_timm(name, checkpoint=checkpoint, image_size=image_size).model
    return as_teacher(
        model, name=name, image_size=image_size, device=torch_device, precision=precision
    )


def classes_of_teacher(name: str, *, checkpoint: Path | None = None) -> ClassList:
    """Return the classes of a teacher, without the weights of timm's.

    Args:
        name: See load_teacher.
        checkpoint: See load_teacher.

    Raises:
        ValueError: If the model or its classes are unknown, or the checkpoint does not fit it.
        OSError: If the checkpoint cannot be read.
    """
    _check_name(name)
    if checkpoint is None:
        found = timm.get_pretrained_cfg(name)
        config = found.to_dict() if found is not None else {}
        num_classes = config.get("num_classes", 0)
    else:
        loaded = load_timm(name, checkpoint=checkpoint)
        config, num_classes = _config_of(loaded.model), loaded.num_classes
    if not num_classes:
        raise ValueError(f"teacher {name} has no classifier in timm; choose another weights tag")
    ids, names = known_classes(config, num_classes) or (None, None)
    return ClassList(name, num_classes, ids, names)


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A timm model with the weights of a checkpoint, on the CPU."""

    model: nn.Module
    """Its pretrained_cfg says what the weights want to see, also where tl-train made them."""
    num_classes: int
    weights: WeightsKind
    class_ids: list[str] | None
    """What the checkpoint says its classes are, in order; None in files of other programs."""
    class_names: list[str] | None
    """What people read, one per class id."""


def load_timm(
    name: str, *, checkpoint: Path, image_size: int | None = None, ema: bool | None = None
) -> TimmModel:
    """Build a timm model and fill it with the weights of a checkpoint.

    Args:
        name: A timm model name, with or without a weights tag.
        checkpoint: See load_teacher.
        image_size: Side of the images it will see, px, for models that are built for one size.
        ema: See read_weights.

    Raises:
        ValueError: If the model is unknown, or the weights do not fit it; names what does not.
        OSError: If the checkpoint cannot be read.
    """
    _check_name(name)
    weights = read_weights(checkpoint, ema=ema)
    if weights.trained_as not in (None, name.partition(".")[0]):
        raise ValueError(
            f"checkpoint {checkpoint} was trained as {weights.trained_as}, not as {name}; "
            "name that model"
        )
    model = create_timm(
        name,
        image_size=image_size,
        num_classes=_num_classes(name, weights.tensors),
        **weights.options,
    )
    tensors = weights.tensors
    if weights.trained_as is not None:
        tensors = _without_dense_head(tensors, model, checkpoint)
    _load(model, tensors, checkpoint)
    return TimmModel(
        model=model,
        num_classes=int(model.num_classes),  # pyright: ignore[reportArgumentType]: timm's API
        weights=weights.kind,
        class_ids=weights.class_ids,
        class_names=weights.class_names,
    )


def create_timm(name: str, *, image_size: int | None = None, **options: Any) -> nn.Module:
    """Build a timm model so that it takes other image sizes than its own, where timm can do that.

    Args:
        name: A timm model name.
        image_size: Side of the images, px, for models that are built for one size.
        options: For timm.create_model.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size:
        return timm.create_model(name, **options)
    flexible: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}]
    if image_size is not None:
        flexible.append({"img_size": image_size})
    for flexibility in flexible:
        # A model that does not know the option refuses it before any weight is made.
        with contextlib.suppress(TypeError):
            return timm.create_model(name, **flexibility, **options)
    return timm.create_model(name, **options)


def as_teacher(
    model: nn.Module,
    *,
    name: str,
    image_size: int | None = None,
    device: torch.device,
    precision: str = "auto",
) -> Teacher:
    """Make a timm model dense, with the weights it has. The model is changed and frozen.

    Args:
        model: Made by timm.create_model.
        name: What to call it.
        image_size: See load_teacher.
        device: Where to run.
        precision: See load_teacher.

    Raises:
        ValueError: If the model has no classifier or no grid of features, or refuses image_size.
    """
    config = resolve_model_data_config(model, use_test_size=True)
    if len(config["mean"]) != 3:
        raise ValueError(f"teacher {name} takes {len(config['mean'])} channels; 3 are needed")
    weights_sha256 = _sha256(model.state_dict())
    fold_standardization(model)
    model.eval().requires_grad_(False)
    model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    stride = int(model.feature_info[-1]["reduction"])  # pyright: ignore
    size = round_to_stride(image_size or config["input_size"][-1], stride)
    layout, num_classes = _probe(model, name, size, stride, device)
    class_ids, class_names = known_classes(_config_of(model), num_classes) or (None, None)
    return Teacher(
        name=name,
        model=model,
        layout=layout,
        device=device,
        precision=_resolve_precision(precision, device),
        image_size=size,
        stride=stride,
        square_only=not _takes(model, (size - stride, size + stride), device),
        num_classes=num_classes,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        weights_sha256=weights_sha256,
        class_ids=class_ids,
        class_names=class_names,
        _mean=torch.tensor(config["mean"], device=device).view(3, 1, 1),
        _std=torch.tensor(config["std"], device=device).view(3, 1, 1),
    )


def round_to_stride(length: int | float, stride: int) -> int:
    """Round a length in px to a multiple of stride, at least one."""
    return max(1, int(length / stride + 0.5)) * stride


def resolve_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1", … into a device that exists.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used: {reason}; {torch.cuda.device_count()} CUDA devices "
            "are visible; give 'auto', 'cpu', 'cuda' or 'cuda:N'"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a checkpoint file, and what it says about them."""

    tensors: dict[str, Tensor] = field(repr=False)
    kind: WeightsKind
    trained_as: str | None = None
    """Name of the model; this and the rest are known of tl-train's own files alone."""
    class_ids: list[str] | None = None
    class_names: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """For timm.create_model: what the model was made with, and in pretrained_cfg_overlay its image
    size, normalisation and class names."""


def read_weights(path: Path, *, ema: bool | None = None) -> Weights:
    """Read the weights of a checkpoint file; code in it is never run.

    Nested dicts are opened, prefixes of wrappers taken off.

    Args:
        path: Of tl-train, or of another program.
        ema: Whether averaged weights are taken where a file of tl-train has both; left out: those
            that were better when the file was saved as the best, otherwise the averaged ones.
            Of other programs' files the averaged ones are taken.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, or holds more than tensors and plain values.
    """
    content = _read_file(path)
    if isinstance(content, Mapping) and content.get("format") == _OWN_FORMAT:
        return _own_weights(content, path, ema)
    return Weights(tensors=_unwrap(content, path), kind="published")


def _read_file(path: Path) -> Any:
    """Read what torch.save or safetensors wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, or holds more than tensors and plain values.
    """
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a folder; give the file in it")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    try:
        # Training scripts save their command line, a Namespace of plain values, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} is damaged or holds Python objects besides tensors, which could "
            "run code and are not loaded; save the model's state_dict alone, with torch.save or "
            f"safetensors ({_first_line(error)})"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch's readers raise anything on damaged bytes
        raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from error
    return content


def _own_weights(content: Mapping[str, Any], path: Path, ema: bool | None) -> Weights:
    try:
        recipe = tomllib.loads(content["recipe"])
        if ema is None:
            best = content["best"]
            ema = not best or best["step"] != content["step"] or best["weights"] == "ema"
        kind = "ema" if ema and content["ema"] else "raw"
        tensors, ids, names = content[{"ema": "ema", "raw": "model"}[kind]], *_names(content)
        step, trained_as = content["step"], recipe["model"]["name"].partition(".")[0]
        options, config = recipe["model"].get("kwargs", {}), _config(recipe, ids, names)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} lacks what tl-train writes: {error}") from error
    word = {"ema": "averaged", "raw": "raw"}[kind]
    _logger.info("%s: taking the %s weights of step %d of %s", path, word, step, trained_as)
    return Weights(
        tensors=_unwrap(tensors, path),
        kind=kind,
        trained_as=trained_as,
        class_ids=ids,
        class_names=names,
        options={**options, "pretrained_cfg_overlay": config},
    )


def _names(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    return list(content["class_ids"]), list(content["class_names"])


def _config(recipe: Mapping[str, Any], ids: list[str], names: list[str]) -> dict[str, Any]:
    """Return what a recipe decides of timm's pretrained_cfg."""
    size = recipe["model"]["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    augment, view = recipe["augment"], recipe["evaluation"]
    return {
        "input_size": (3, height, width),
        "test_input_size": None,
        "mean": tuple(augment["mean"]),
        "std": tuple(augment["std"]),
        "crop_pct": view["crop_pct"],
        "test_crop_pct": None,
        "crop_mode": "center",
        "interpolation": view["interpolation"],
        "label_names": ids,
        "label_descriptions": dict(zip(ids, names, strict=True)),
    }


def fold_standardization(model: nn.Module) -> None:
    """Replace weight-standardised convolutions by plain ones with the standardised weights.

    NFNets and their kin standardise the same weights anew in every forward pass.
    """
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, _STANDARDIZED) and isinstance(child, nn.Conv2d):
                setattr(module, child_name, _plain_conv(child))


_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def _plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    is_same = getattr(conv, "same_pad", False)
    kind: Any = Conv2dSame if is_same else nn.Conv2d  # timm's decorator hides its type
    plain = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight = nn.Parameter(_standardized_weight(conv))
    plain.bias = conv.bias
    return plain


def _standardized_weight(conv: nn.Conv2d) -> Tensor:
    """Zero mean and unit variance over each output channel's weights, times the gain (NFNet)."""
    gain = getattr(conv, "gain", None)
    with torch.no_grad():
        return F.batch_norm(
            conv.weight.reshape(1, conv.out_channels, -1),
            None,
            None,
            weight=None if gain is None else (gain * conv.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=conv.eps,  # pyright: ignore[reportArgumentType]: the four classes have a number
        ).reshape_as(conv.weight)


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        known, what = timm.list_models(), f"unknown teacher {name!r}"
        close = difflib.get_close_matches(architecture, known, n=5)
    elif tag and name not in timm.list_pretrained():
        known, what = timm.list_pretrained(), f"teacher {architecture} has no weights {tag!r}"
        close = [other for other in known if other.partition(".")[0] == architecture]
    else:
        return
    hint = f"did you mean {', '.join(close)}?" if close else f"timm has {len(known)} others"
    raise ValueError(f"{what}; {hint} (any timm classifier will do: timm.list_models() lists them)")


def pretrained_timm(name: str, image_size: int | None) -> nn.Module:
    """Build a timm model with the weights that timm downloads.

    Args:
        name: A timm model name, with or without a weights tag.
        image_size: See create_timm.

    Raises:
        ValueError: If timm has no weights for it.
        OSError: If they cannot be downloaded.
    """
    _logger.info("loading timm's weights of %s (downloaded on first use)", name)
    try:
        return create_timm(name, image_size=image_size, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # whatever the hub's client, its HTTP library and timm may raise
        raise OSError(
            f"timm's weights of {name} could not be loaded ({_first_line(error)}); if this machine "
            "has no network, download them elsewhere and give --checkpoint FILE"
        ) from error


def _num_classes(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Read the number of classes off the classifier's weights; None where they are not found."""
    config = timm.get_pretrained_cfg(name)
    classifier = config.classifier if config is not None else None
    names = [classifier] if isinstance(classifier, str) else classifier or []
    found = [weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights]
    return found[0].shape[0] if found else None


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            _logger.info("%s: taking the weights under %r", path, nest)
            content = content[nest]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"checkpoint {path} holds no weights but {type(content).__name__}; expected a dict of "
            f"tensors, bare or under one of {', '.join(_NESTS)}"
        )
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"checkpoint {path} holds more than tensors ({_shown(others)}) and no weights under "
            f"any of {', '.join(_NESTS)}"
        )
    weights = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _load(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    if _match_in_order(weights, expected):
        _logger.info(
            "%s: its %d tensors have other names than timm's but the same kinds and shapes in the "
            "same order; loaded in that order",
            path,
            len(weights),
        )
        weights = dict(zip(expected, weights.values(), strict=True))
    # Checkpoints older than torch 0.4.1 lack this counter; nothing reads it in evaluation.
    missing = [
        name
        for name in expected
        if name not in weights and not name.endswith("num_batches_tracked")
    ]
    surplus = [name for name in weights if name not in expected]
    if missing or surplus:
        raise ValueError(
            f"checkpoint {path} is not of this architecture: {len(missing)} tensors are missing"
            f"{_listed(missing)}, {len(surplus)} are unknown to it{_listed(surplus)}; "
            "name the model that it was trained as"
        )
    reshaped = [
        f"{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if value.shape != expected[name].shape
    ]
    if reshaped:
        raise ValueError(
            f"checkpoint {path} is not of this architecture: {len(reshaped)} tensors have another "
            f"shape{_listed(reshaped)}"
        )
    model.load_state_dict(weights, strict=False)


def _without_dense_head(
    weights: dict[str, Tensor], model: nn.Module, path: Path
) -> dict[str, Tensor]:
    """Leave out the layer that tl-train adds to a model that learns token labels."""
    if hasattr(model, "aux_head"):  # VOLO's own
        return weights
    rest = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    if len(rest) < len(weights):
        _logger.info("%s: its class head labels the cells, its dense head is left out", path)
    return rest


def _match_in_order(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Tell whether no name is known, yet kinds (weight, bias, …) and shapes agree one by one."""
    return (
        len(weights) == len(expected)
        and weights.keys().isdisjoint(expected)
        and all(
            theirs.rpartition(".")[2] == ours.rpartition(".")[2]
            and weights[theirs].shape == expected[ours].shape
            for theirs, ours in zip(weights, expected, strict=True)
        )
    )


def _listed(names: Sequence[str]) -> str:
    return f" ({_shown(names)})" if names else ""


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", …" if len(names) > _NUM_SHOWN else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _sha256(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _resolve_precision(precision: str, device: torch.device) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; give bf16 or fp32 on the CPU")
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def _probe(
    model: nn.Module, name: str, size: int, stride: int, device: torch.device
) -> tuple[Layout, int]:
    """Run one blank image: find the layout of the features and the number of classes."""
    if not getattr(model, "num_classes", 0):
        raise ValueError(
            f"teacher {name} has no classifier in timm; choose a model or weights tag that has one"
        )
    try:
        features = _features(model, (size, size), device)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ValueError(
            f"teacher {name} does not take images of {size}x{size} px: {_first_line(error)}"
        ) from error
    layout = _layout(model, features, (size // stride) ** 2)
    if layout is None:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"teacher {name} cannot be made dense: its features are {shape}, not a grid of "
            f"{model.num_features} channels nor a token for each of its patches"
        )
    prefix = _num_prefix_tokens(model)
    cell = _to_cells(features, layout, prefix, (size // stride, size // stride))[0, 0, :1]
    with torch.inference_mode():
        logits = model.forward_head(_as_images(cell, layout, prefix))  # pyright: ignore
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"teacher {name} cannot be made dense: its head gives more than logits")
    return layout, logits.shape[1]


def _takes(model: nn.Module, size: tuple[int, int], device: torch.device) -> bool:
    """Tell whether the model takes images of (height, width) px."""
    if not _config_of(model).get("fixed_input_size"):
        return True
    try:
        _features(model, size, device)
    except (RuntimeError, AssertionError, ValueError, IndexError):
        return False
    return True


@torch.inference_mode()
def _features(model: nn.Module, size: tuple[int, int], device: torch.device) -> Any:
    return model.forward_features(torch.zeros(1, 3, *size, device=device))  # pyright: ignore


def _layout(model: nn.Module, features: Any, num_cells: int) -> Layout | None:
    depth = model.num_features
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 3:
        fits = features.shape[1:] == (_num_prefix_tokens(model) + num_cells, depth)
        return "tokens" if fits else None
    if features.ndim == 4 and features.shape[1] == depth:
        return "nchw"
    return "nhwc" if features.ndim == 4 and features.shape[3] == depth else None


def _num_prefix_tokens(model: nn.Module) -> int:
    """Class, distillation and register tokens, which come before the patch tokens."""
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def _to_cells(
    features: Tensor, layout: Layout, num_prefix: int, grid: tuple[int, int]
) -> Float[Tensor, "b rows cols d"]:
    if layout == "tokens":
        return features[:, num_prefix:].unflatten(1, grid)
    return features.permute(0, 2, 3, 1) if layout == "nchw" else features


def _as_images(cells: Float[Tensor, "n d"], layout: Layout, num_prefix: int) -> Tensor:
    """Dress each cell as the features of an image with one cell."""
    if layout == "tokens":
        # Whichever token the head reads, class, distillation or the mean of the rest, it is this.
        return cells[:, None].expand(-1, num_prefix + 1, -1)
    return cells[:, :, None, None] if layout == "nchw" else cells[:, None, None]


def _config_of(model: nn.Module) -> Mapping[str, Any]:
    return getattr(model, "pretrained_cfg", {})


def known_classes(
    config: Mapping[str, Any], num_classes: int
) -> tuple[list[str], list[str]] | None:
    """Return ids and display names of the classes, if timm's configuration tells."""
    labels: list[str] = list(config.get("label_names") or ())
    if len(labels) == num_classes:
        descriptions = config.get("label_descriptions") or {}
        return labels, [descriptions.get(label, label) for label in labels]
    subset = infer_imagenet_subset({**config, "num_classes": num_classes})
    if subset is None or ImageNetInfo(subset).num_classes() != num_classes:
        return None
    info = ImageNetInfo(subset)
    return info.label_names(), [info.index_to_description(i) for i in range(num_classes)]
