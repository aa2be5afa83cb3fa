"""Recipes: everything that decides what a training run computes, as TOML read into frozen records.

A recipe is a TOML file with one table per section below. A key left out keeps its default, an
unknown key is refused, and the fully resolved recipe is written into the run folder. What does not
change the result (data folder, output folder, device) is not in a recipe but on the command line.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .augment_draws import Interpolation, Policy, parse_policy

RECIPE_FOLDER = Path(__file__).parent / "recipes"

_Record = TypeVar("_Record")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training in epochs or steps, written "300 epochs", "2.5 epochs" or "60 steps"."""

    amount: float
    unit: Literal["epochs", "steps"]

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read "NUMBER epochs" or "NUMBER steps"; raise ValueError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*", text)
        if not match:
            raise ValueError(f'{text!r} is no duration; write "300 epochs" or "60 steps"')
        amount, unit = float(match[1]), match[2]
        if unit == "step" and amount != int(amount):
            raise ValueError(f"{text!r} is no duration: steps are whole")
        return cls(amount, "epochs" if unit == "epoch" else "steps")

    def steps(self, steps_per_epoch: float) -> int:
        """Round to whole steps; more than nothing is at least one step."""
        if self.amount == 0:
            return 0
        factor = steps_per_epoch if self.unit == "epochs" else 1.0
        return max(1, round(self.amount * factor))

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "lvvit_s"
    """One of tokenlabel.trainer.models (lvvit_s, t2t_vit_14, …) or any classifier of timm, with or
    without a weights tag (convnext_tiny.fb_in1k)."""
    num_classes: int = 1000
    """Must equal the class count of the data set; 0 takes it from there."""
    pretrained: bool = False
    """Whether training begins with the weights that the model's authors published (downloaded on
    first use), and with their normalisation unless augment.mean, augment.std name another."""
    image_size: int | tuple[int, int] = 224
    """Pixels of the training crop and of the evaluation view: a side, or [height, width]."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; rises linearly from 0 at the first. 0 for models of timm
    that have none."""
    mix_token: bool = True
    """Whether MixToken mixes the patch embeddings of two images during training; in a network
    without patches, such as a CNN, it mixes pixels by the cells of the last feature map."""
    grad_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass instead of being kept in memory."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of the model's constructor, e.g. {depth = 6, embed_dim = 192}."""

    def __post_init__(self) -> None:
        _check("model.num_classes", self.num_classes, self.num_classes >= 0, ">= 0")
        _check("model.image_size", self.image_size, min(self.image_hw) >= 1, ">= 1 px")
        _check("model.drop_path", self.drop_path, 0 <= self.drop_path < 1, "0 <= rate < 1")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What happens to a training image between its file and the model."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area, as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's width / height, drawn uniformly in its logarithm."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str = "none"
    """RandAugment in timm's notation, e.g. "rand-m9-mstd0.5-inc1", or "none"."""
    color_jitter: float | None = None
    """Strength of random brightness, contrast and saturation: factors in 1 ± this; 0 is off. Left
    out: 0.4, or 0 beside auto_augment, which allows no other (timm's rule)."""
    random_erasing: float = 0.25
    """Probability that a random rectangle of the crop is erased."""
    erasing_mode: Literal["pixel"] = "pixel"
    """What fills the rectangle: "pixel" is normal noise for each pixel and channel."""
    mixup: float = 0.0
    """α of mixup: a batch is blended with itself reversed, λ drawn from Beta(α, α); 0 is off. Only
    without model.mix_token, as the next three."""
    cutmix: float = 0.0
    """α of CutMix: a box of pixels, of 1 - λ of the area, is swapped instead; 0 is off."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed, where one of them is on."""
    mix_switch_prob: float = 0.5
    """Probability that a batch gets CutMix, not mixup, where both are on."""
    repeats: int = 1
    """How many crops of an image a batch holds, each augmented differently: repeated augmentation.
    An epoch has as many crops as ever, and so that many times fewer images."""
    interpolation: Interpolation = "random"
    """Resampling of the crop, and of RandAugment's geometric operations; "random" draws bicubic or
    bilinear for each."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, in [0, 1]; used in evaluation too."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each channel after the mean is gone; used in evaluation too."""

    def __post_init__(self) -> None:
        low, high = self.scale
        _check("augment.scale", self.scale, 0 < low <= high <= 1, "0 < smallest <= largest <= 1")
        low, high = self.ratio
        _check("augment.ratio", self.ratio, 0 < low <= high, "0 < smallest <= largest")
        _check("augment.hflip", self.hflip, 0 <= self.hflip <= 1, "0 to 1")
        try:
            policy = self.policy
        except ValueError as error:
            raise ValueError(f"augment.auto_augment = {error}") from error
        most = 0 if policy else 1
        allowed = "0 beside augment.auto_augment, or left out" if policy else "0 to 1"
        _check("augment.color_jitter", self.color_jitter, 0 <= self.jitter <= most, allowed)
        erasing = self.random_erasing
        _check("augment.random_erasing", erasing, 0 <= erasing <= 1, "0 to 1")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            _check(f"augment.{name}", alpha, 0 <= alpha < math.inf, ">= 0; 0 is off")
        for name in ("mix_prob", "mix_switch_prob"):
            probability = getattr(self, name)
            _check(f"augment.{name}", probability, 0 <= probability <= 1, "0 to 1")
        _check("augment.repeats", self.repeats, self.repeats >= 1, ">= 1")
        _check("augment.mean", self.mean, all(0 <= m <= 1 for m in self.mean), "0 to 1")
        _check("augment.std", self.std, all(s > 0 for s in self.std), "> 0")

    @property
    def policy(self) -> Policy | None:
        """What RandAugment draws from; None where it is off."""
        return None if self.auto_augment == "none" else parse_policy(self.auto_augment)

    @property
    def jitter(self) -> float:
        """Strength of colour jitter, also where it was left out."""
        if self.color_jitter is not None:
            return self.color_jitter
        return 0.4 if self.auto_augment == "none" else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """What the model is taught."""

    fill: Literal["residual", "zero"] = "residual"
    """What stands for classes outside a label map's top-k: the teacher's remaining probability
    spread evenly, or logit 0 as in the published code."""
    smoothing: float = 0.1
    """Probability taken from every target and spread evenly over all classes."""
    class_target: Literal["pooled", "label"] = "pooled"
    """The class token's target: the label map pooled over the crop, or the image's class."""
    class_weight: float = 1.0
    """Weight of the class token's loss."""
    dense_weight: float = 1.0
    """Weight of the patch tokens' loss (β in the paper); 0 trains without label maps' tokens."""

    def __post_init__(self) -> None:
        _check("labels.smoothing", self.smoothing, 0 <= self.smoothing < 1, "0 <= smoothing < 1")
        _check("labels.class_weight", self.class_weight, self.class_weight >= 0, ">= 0")
        _check("labels.dense_weight", self.dense_weight, self.dense_weight >= 0, ">= 0")
        total = self.class_weight + self.dense_weight
        _check("labels.class_weight + labels.dense_weight", total, total > 0, "> 0")

    @property
    def needs_maps(self) -> bool:
        """Whether the targets cannot be made from the images' classes alone."""
        return self.dense_weight > 0 or self.class_target == "pooled"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW."""

    batch_size: int = 1024
    """Images in a step, over all processes."""
    lr: float = 1.6e-3
    """Peak learning rate for a batch of `lr_batch_size`; scales linearly with `batch_size`."""
    lr_batch_size: int = 1024
    """The batch that `lr`, `schedule.warmup_lr` and `schedule.min_lr` are meant for."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the gradient's running mean and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.05
    """Decoupled decay; vectors (norms, biases), pos_embed and cls_token are never decayed."""
    clip_grad: float | None = None
    """Largest allowed norm of the whole gradient; left out: no clipping."""

    def __post_init__(self) -> None:
        _check("optim.batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        _check("optim.lr", self.lr, 0 < self.lr < math.inf, "> 0")
        _check("optim.lr_batch_size", self.lr_batch_size, self.lr_batch_size >= 1, ">= 1")
        betas = self.betas
        _check("optim.betas", betas, all(0 <= b < 1 for b in betas), "0 <= beta < 1")
        _check("optim.eps", self.eps, self.eps > 0, "> 0")
        _check("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        clip = self.clip_grad
        _check("optim.clip_grad", clip, clip is None or clip > 0, "> 0, or left out for none")

    @property
    def lr_factor(self) -> float:
        """What the schedule's learning rates are multiplied by for this batch size."""
        return self.batch_size / self.lr_batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How long, and how the learning rate goes: linear warm-up, cosine, constant cool-down."""

    duration: Duration = Duration(300.0, "epochs")
    """Length of the cosine, warm-up included, cool-down not."""
    warmup: Duration = Duration(5.0, "epochs")
    """Length of the linear rise from `warmup_lr` to `optim.lr`."""
    cooldown: Duration = Duration(10.0, "epochs")
    """Length of the tail at `min_lr` after the cosine."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step when there is a warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""

    def __post_init__(self) -> None:
        length = self.duration
        _check("schedule.duration", str(length), length.amount > 0, "more than nothing")
        _check("schedule.warmup_lr", self.warmup_lr, self.warmup_lr >= 0, ">= 0")
        _check("schedule.min_lr", self.min_lr, self.min_lr >= 0, ">= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """The running average of the weights that is evaluated beside them."""

    decay: float = 0.99992
    """Share of the average kept at each step; 0 switches the average off."""
    warmup: bool = True
    """Whether the average starts short: at step t the decay is at most (1 + t) / (10 + t)."""

    def __post_init__(self) -> None:
        _check("ema.decay", self.decay, 0 <= self.decay < 1, "0 (off) <= decay < 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The view of an image in evaluation: resize, then centre crop."""

    crop_pct: float = 0.9
    """Side of the centre crop as a fraction of the resized image's shorter side."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of the resize."""
    batch_size: int = 256
    """Images at once, over all processes; no effect on the result."""
    every: Duration = Duration(1.0, "epochs")
    """Time between two evaluations during training; the end is always evaluated."""

    def __post_init__(self) -> None:
        _check("evaluation.crop_pct", self.crop_pct, 0 < self.crop_pct <= 1, "0 < crop_pct <= 1")
        _check("evaluation.batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        _check("evaluation.every", str(self.every), self.every.amount > 0, "more than nothing")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How the run is carried out."""

    seed: int = 0
    """Decides initial weights, the order of the images and all augmentation."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward pass; "auto" is bf16 where the GPU has it, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the training forward and backward pass; "auto" is on for GPUs."""
    device_batch_size: int | None = None
    """Most images that a process computes at once; a larger share of `optim.batch_size` is computed
    in equal parts whose gradients are added. Left out: the whole share."""
    workers: int | None = None
    """Decoding threads of the feed, per process; left out: the process's share of the cores."""
    checkpoint_every: Duration = Duration(1.0, "epochs")
    """Time between two checkpoints; the end is always saved."""
    log_every: Duration = Duration(50.0, "steps")
    """Time between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        _check("run.seed", self.seed, 0 <= self.seed < 2**31, "0 to 2^31 - 1")
        most = self.device_batch_size
        allowed = ">= 2, or left out for a process's whole share"
        _check("run.device_batch_size", most, most is None or most >= 2, allowed)
        workers = self.workers
        allowed = ">= 1, or left out for all cores"
        _check("run.workers", workers, workers is None or workers >= 1, allowed)
        for name in ("checkpoint_every", "log_every"):
            every: Duration = getattr(self, name)
            _check(f"run.{name}", str(every), every.amount > 0, "more than nothing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole training recipe; each field but the first two is a table of the TOML file."""

    summary: str = ""
    """One line for the list of recipes."""
    paper_top1: float | None = None
    """ImageNet-1k top-1 in percent that the paper reports, where there is one."""
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    labels: LabelConfig = LabelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        low, peak = self.schedule.min_lr, self.optim.lr
        _check("schedule.min_lr", low, low <= peak, f"at most optim.lr = {peak}")
        for name in ("mixup", "cutmix"):
            alpha, allowed = getattr(self.augment, name), "0 beside model.mix_token, which mixes"
            allowed += " each batch already; to have it instead, set model.mix_token = false"
            _check(f"augment.{name}", alpha, not (alpha and self.model.mix_token), allowed)


def recipe_names(folder: Path = RECIPE_FOLDER) -> list[str]:
    """List the recipes that ship with the package."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_recipe(name_or_file: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or any recipe by its path.

    Args:
        name_or_file: A name of `recipe_names()`, or a path that ends in .toml.
        overrides: Assignments "section.key=value" that win over the file.

    Raises:
        ValueError: Unknown name, key or value out of range; the message says what is allowed.
        FileNotFoundError: A path that does not exist.
    """
    return parse_recipe(find_recipe(name_or_file).read_text(encoding="utf-8"), overrides)


def find_recipe(name_or_file: str, folder: Path = RECIPE_FOLDER) -> Path:
    """Locate a recipe's TOML file by its shipped name or path."""
    if name_or_file.endswith(".toml"):
        path = Path(name_or_file)
        if not path.is_file():
            raise FileNotFoundError(f"recipe file {path} does not exist")
        return path
    names = recipe_names(folder)
    if name_or_file not in names:
        near = nearest(name_or_file, names)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(
            f"unknown recipe {name_or_file!r}{hint}; "
            f"known: {', '.join(names)}, or the path of a .toml file"
        )
    return folder / f"{name_or_file}.toml"


def parse_recipe(text: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from TOML text, see `load_recipe`."""
    return parse_record(Recipe, text, overrides)


def parse_record(cls: type[_Record], text: str, overrides: Iterable[str] = ()) -> _Record:
    """Read a recipe of another kind than `Recipe`, too: a dataclass of dataclasses like those here.

    Raises: see `load_recipe`.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the recipe is not valid TOML: {error}") from error
    for assignment in overrides:
        _assign(table, assignment)
    return build_record(cls, table, "")


def differences(old: _Record, new: _Record) -> list[str]:
    """Name the keys in which two recipes differ, as "section.key"."""
    before, after = _flatten(old, ""), _flatten(new, "")
    return [name for name in before if before[name] != after[name]]


def to_toml(recipe: Any) -> str:
    """Write a recipe with all defaults spelled out; `parse_record` gives the same recipe back."""
    return "\n".join(_toml_lines(recipe, "")) + "\n"


def nearest(name: str, known: Iterable[str], *, most: int = 2) -> list[str]:
    """Find the names that may have been meant: those it begins first, in order, else similar ones.

    Args:
        name: What was written; lvvit_s begins lvvit_s_224.
        known: The right names.
        most: Names to give.
    """
    known = list(known)
    begun = [right for right in known if name and right.startswith(name)]
    return (begun or difflib.get_close_matches(name, known, n=most))[:most]


def _closest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _in_tables(key: str, fields: Mapping[str, dataclasses.Field[Any]]) -> str:
    """Name the keys called so that stand one table deeper."""
    found = [
        repr(f"{table}.{key}")
        for table, field in fields.items()
        if dataclasses.is_dataclass(field.type)
        and key in {own.name for own in dataclasses.fields(field.type)}
    ]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


# ------------------------------------------------------------------- TOML tables → records


def build_record(cls: type[Any], table: dict[str, Any], prefix: str) -> Any:
    """Fill a dataclass of the kind above from a table of TOML.

    Args:
        cls: The dataclass; its fields are the keys.
        table: What the file says.
        prefix: The table's own name and a dot, for messages; empty for the whole file.

    Raises:
        ValueError: Unknown key, a value of another kind or out of range; says what is allowed.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise ValueError(
                f"unknown key {prefix + key!r}{_in_tables(key, fields) or _closest(key, fields)}; "
                f"known{' in [' + prefix[:-1] + ']' if prefix else ''}: {', '.join(fields)}"
            )
    return cls(
        **{key: _coerce(value, fields[key].type, prefix + key) for key, value in table.items()}
    )


def _coerce(value: Any, wanted: Any, name: str) -> Any:
    """Fit a TOML value to an annotation of the records above, or raise ValueError with `name`."""
    origin, args = get_origin(wanted), get_args(wanted)
    if wanted is Duration:
        return _duration(value, name)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            raise ValueError(f"{name} = {value!r} is not a table; write [{name}] and keys below it")
        return build_record(wanted, value, f"{name}.")  # pyright: ignore[reportArgumentType]
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} = {value!r}; allowed: {', '.join(map(repr, args))}")
        return value
    if origin in (Union, types.UnionType):
        return _coerce_to_either(value, [arg for arg in args if arg is not types.NoneType], name)
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(_coerce(item, arg, name) for item, arg in zip(value, args))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not (origin or wanted):
        raise ValueError(f"{name} = {value!r} is not {_kind(wanted)}")
    return value


def _coerce_to_either(value: Any, options: Sequence[Any], name: str) -> Any:
    for option in options:
        try:
            return _coerce(value, option, name)
        except ValueError:
            continue
    raise ValueError(f"{name} = {value!r} is not {' or '.join(map(_kind, options))}")


def _duration(value: Any, name: str) -> Duration:
    if not isinstance(value, str):
        raise ValueError(f'{name} = {value!r} is not a text such as "300 epochs" or "60 steps"')
    try:
        return Duration.parse(value)
    except ValueError as error:
        raise ValueError(f"{name} = {error}") from error


def _kind(wanted: Any) -> str:
    if get_origin(wanted) is tuple:
        return f"a list of {len(get_args(wanted))} numbers"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return kinds.get(wanted, "a table")


# ---------------------------------------------------------- section.key=value → TOML tables


def _assign(table: dict[str, Any], assignment: str) -> None:
    """Put "section.key=value" into the nested table, checking only what `build_record` cannot."""
    path, equals, raw = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {assignment!r} is not of the form section.key=value")
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {assignment!r}: {'.'.join(keys[: depth + 1])} is no section")
    table[keys[-1]] = _toml_value(raw.strip())


def _toml_value(raw: str) -> Any:
    """Read a value as TOML; a bare word is a text, so that run.precision=bf16 needs no quotes."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


# ------------------------------------------------------------------------- records → TOML


def _toml_lines(record: Any, path: str) -> list[str]:
    """Plain keys first, then sub-tables: TOML's order. None is left out: TOML has no null."""
    items = record if isinstance(record, dict) else _fields_of(record)
    lines = [
        f"{_toml_key(key)} = {_toml_text(value)}"
        for key, value in items.items()
        if value is not None and not _is_section(value)
    ]
    for key, value in items.items():
        if _is_section(value):
            inner = f"{path}.{_toml_key(key)}" if path else _toml_key(key)
            lines += ["", f"[{inner}]", *_toml_lines(value, inner)]
    return lines


def _flatten(record: Any, prefix: str) -> dict[str, Any]:
    flat = {}
    for name, value in _fields_of(record).items():
        is_section = _is_section(value) and not isinstance(value, dict)
        flat |= _flatten(value, f"{name}.") if is_section else {prefix + name: value}
    return flat


def _fields_of(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (
        dataclasses.is_dataclass(value) and not isinstance(value, Duration)
    )


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Duration):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_text, value))}]"
    return repr(value)
