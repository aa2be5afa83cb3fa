"""Recipes of segmentation: everything that decides what a run computes, as TOML.

They are read as trainer.recipe reads those of classifiers: one table per section below, keys left
out keep their defaults, unknown ones are refused, and the resolved recipe stands in the run folder.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..trainer.recipe import Duration, EmaConfig, find_recipe, parse_record
from .feed import SegAugmentConfig
from .inference import InferenceConfig
from .loss import Averaging
from .uper_net import ModelConfig

RECIPE_FOLDER = Path(__file__).parent / "recipes"


def _check(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value}; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegLossConfig:
    """What the model is taught; see loss.seg_loss."""

    averaging: Averaging = "published"
    """What the sum over the pixels is divided by: the number of all pixels, or ("standard") of
    those that have a class."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss."""

    def __post_init__(self) -> None:
        _check("loss.aux_weight", self.aux_weight, self.aux_weight >= 0, ">= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegOptimConfig:
    """AdamW."""

    batch_size: int = 16
    """Images in a step, over all processes."""
    lr: float = 6e-5
    """Peak learning rate, for this batch size: it is not scaled."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the gradient's running mean and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled decay."""
    decayed: Literal["all", "matrices"] = "all"
    """Which weights are decayed: all, as published, or all but vectors (norms, biases) and the
    embeddings of positions and class token."""
    clip_grad: float | None = None
    """Largest allowed norm of the whole gradient; left out: no clipping."""

    def __post_init__(self) -> None:
        _check("optim.batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        _check("optim.lr", self.lr, 0 < self.lr < math.inf, "> 0")
        betas = self.betas
        _check("optim.betas", betas, all(0 <= b < 1 for b in betas), "0 <= beta < 1")
        _check("optim.eps", self.eps, self.eps > 0, "> 0")
        _check("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        clip = self.clip_grad
        _check("optim.clip_grad", clip, clip is None or clip > 0, "> 0, or left out for none")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegScheduleConfig:
    """How long, and how the learning rate goes: a power of the rest of the way, and a warm-up."""

    duration: Duration = Duration(160_000.0, "steps")
    """Length of the run, warm-up included."""
    warmup: Duration = Duration(1500.0, "steps")
    """Length of the linear rise of a factor of the learning rate."""
    warmup_ratio: float = 1e-6
    """That factor at the first step."""
    power: float = 1.0
    """Of the rest of the way, by which the learning rate falls; 1 is a straight line."""
    min_lr: float = 0.0
    """Learning rate at the end."""

    def __post_init__(self) -> None:
        length = self.duration
        _check("schedule.duration", str(length), length.amount > 0, "more than nothing")
        ratio = self.warmup_ratio
        _check("schedule.warmup_ratio", ratio, 0 <= ratio <= 1, "0 to 1")
        _check("schedule.power", self.power, self.power > 0, "> 0")
        _check("schedule.min_lr", self.min_lr, self.min_lr >= 0, ">= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegEvaluationConfig:
    """Evaluation during training, by the rules of [inference]."""

    every: Duration = Duration(8000.0, "steps")
    """Time between two evaluations; the end is always evaluated."""
    num_sheets: int = 4
    """Images whose prediction is drawn at each evaluation, the first ones of the split."""

    def __post_init__(self) -> None:
        _check("evaluation.every", str(self.every), self.every.amount > 0, "more than nothing")
        _check("evaluation.num_sheets", self.num_sheets, self.num_sheets >= 0, ">= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegRunConfig:
    """How the run is carried out."""

    seed: int = 0
    """Decides initial weights, the order of the images and all crops."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward pass; "auto" is bf16 where the GPU has it, fp32 elsewhere."""
    workers: int | None = None
    """Processes that make crops, for each process that trains; left out: its share of the cores."""
    checkpoint_every: Duration = Duration(8000.0, "steps")
    """Time between two checkpoints; the end is always saved."""
    log_every: Duration = Duration(50.0, "steps")
    """Time between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        _check("run.seed", self.seed, 0 <= self.seed < 2**31, "0 to 2^31 - 1")
        workers = self.workers
        allowed = ">= 0, or left out for all cores"
        _check("run.workers", workers, workers is None or workers >= 0, allowed)
        for name in ("checkpoint_every", "log_every"):
            every: Duration = getattr(self, name)
            _check(f"run.{name}", str(every), every.amount > 0, "more than nothing")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegRecipe:
    """A whole recipe; each field but the first two is a table of the TOML file."""

    summary: str = ""
    """One line for the list of recipes."""
    paper_miou: float | None = None
    """mIoU on ADE20K's validation split in percent, of one pass, that the paper reports."""
    model: ModelConfig = ModelConfig()
    inference: InferenceConfig = InferenceConfig()
    augment: SegAugmentConfig = SegAugmentConfig()
    loss: SegLossConfig = SegLossConfig()
    optim: SegOptimConfig = SegOptimConfig()
    schedule: SegScheduleConfig = SegScheduleConfig()
    ema: EmaConfig = EmaConfig(decay=0.0)
    evaluation: SegEvaluationConfig = SegEvaluationConfig()
    run: SegRunConfig = SegRunConfig()

    def __post_init__(self) -> None:
        low, peak = self.schedule.min_lr, self.optim.lr
        _check("schedule.min_lr", low, low <= peak, f"at most optim.lr = {peak}")


def load_recipe(name_or_file: str, overrides: Iterable[str] = ()) -> SegRecipe:
    """Read a shipped recipe by name, or any recipe by its path; see trainer.recipe.load_recipe."""
    text = find_recipe(name_or_file, RECIPE_FOLDER).read_text(encoding="utf-8")
    return parse_record(SegRecipe, text, overrides)


@dataclass(frozen=True, kw_only=True)
class SegSchedule:
    """Learning rate of every step."""

    total_steps: int
    warmup_steps: int
    lr: float
    config: SegScheduleConfig

    @classmethod
    def of(cls, recipe: SegRecipe, steps_per_epoch: float) -> "SegSchedule":
        """Turn a recipe's durations into steps.

        Raises:
            ValueError: The warm-up is longer than the run.
        """
        plan = recipe.schedule
        total, warmup = (d.steps(steps_per_epoch) for d in (plan.duration, plan.warmup))
        if warmup > total:
            raise ValueError(
                f"schedule.warmup = {plan.warmup} is longer than schedule.duration = "
                f"{plan.duration}: {warmup} and {total} steps"
            )
        return cls(total_steps=total, warmup_steps=warmup, lr=recipe.optim.lr, config=plan)

    def lr_of(self, step: int) -> float:
        """Learning rate of step 0, 1, … total_steps - 1."""
        plan = self.config
        rest = (1 - step / self.total_steps) ** plan.power
        lr = plan.min_lr + (self.lr - plan.min_lr) * rest
        if step < self.warmup_steps:
            lr *= 1 - (1 - step / self.warmup_steps) * (1 - plan.warmup_ratio)
        return lr
