"""What moves the weights: AdamW's parameter groups, the learning rate, the running average."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from .recipe import EmaConfig, OptimConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate of every step: linear warm-up, cosine, constant tail."""

    total_steps: int
    cosine_steps: int
    """Length of the cosine, which starts at step 0, beneath the warm-up."""
    warmup_steps: int
    peak_lr: float
    warmup_lr: float
    min_lr: float

    @classmethod
    def of(cls, recipe: Recipe, steps_per_epoch: float) -> "Schedule":
        """Turn a recipe's durations into steps and scale its learning rates to its batch.

        Raises:
            ValueError: The warm-up is longer than the cosine.
        """
        plan, factor = recipe.schedule, recipe.optim.lr_factor
        cosine_steps = plan.duration.steps(steps_per_epoch)
        warmup_steps = plan.warmup.steps(steps_per_epoch)
        if warmup_steps > cosine_steps:
            raise ValueError(
                f"schedule.warmup = {plan.warmup} is longer than schedule.duration = "
                f"{plan.duration}: {warmup_steps} and {cosine_steps} steps"
            )
        return cls(
            total_steps=cosine_steps + plan.cooldown.steps(steps_per_epoch),
            cosine_steps=cosine_steps,
            warmup_steps=warmup_steps,
            peak_lr=recipe.optim.lr * factor,
            warmup_lr=plan.warmup_lr * factor,
            min_lr=plan.min_lr * factor,
        )

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, … total_steps - 1."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        if step < self.cosine_steps:
            fall = (1 + math.cos(math.pi * step / self.cosine_steps)) / 2
            return self.min_lr + (self.peak_lr - self.min_lr) * fall
        return self.min_lr


def explain_lr(config: OptimConfig, *, num_processes: int = 1, num_parts: int = 1) -> str:
    """Say in one line which peak learning rate is used and why.

    Args:
        config: Batch and rates.
        num_processes: Processes that share the batch.
        num_parts: Parts in which each of them computes its share.
    """
    factors = [(num_processes, "processes"), (num_parts, "parts")]
    shared = [f"{number} {noun}" for number, noun in factors if number > 1]
    if shared:
        num_images = config.batch_size // (num_processes * num_parts)
        made_of = f"; {config.batch_size} = {' × '.join(shared)} × {num_images} images"
    else:
        made_of = ""
    if config.lr_factor == 1:
        return (
            f"peak learning rate {config.lr:g}, as the recipe says for batch {config.batch_size}"
            f"{made_of}"
        )
    return (
        f"peak learning rate {config.lr * config.lr_factor:g} = optim.lr {config.lr:g} × "
        f"batch {config.batch_size} / {config.lr_batch_size}: the recipe's rate is for a batch of "
        f"{config.lr_batch_size} and scales linearly{made_of}"
    )


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW; vectors and what model.no_weight_decay() names are not decayed.

    It is the fused one: it alone can be told on the device to leave out a step, see `skip_if`.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # pyright: ignore[reportCallIssue]
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim <= 1 or name in exempt
            (others if is_vector else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def skip_if(optimizer: torch.optim.AdamW, bad: torch.Tensor) -> None:
    """Make the next optimizer.step() change nothing where `bad` is 1, a float scalar.

    It is decided on the device, so the host need not wait for the backward pass. The attribute is
    the one through which torch.amp.GradScaler tells fused optimizers the same.
    """
    optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]


class Ema:
    """Running average of a model's weights and buffers."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.config = config
        self._pairs = list(zip(_tensors(self.model), _tensors(model)))

    @torch.no_grad()
    def update(self, step: int, bad: torch.Tensor | None = None) -> None:
        """Move the average towards the weights that step 0, 1, … has left behind.

        Args:
            step: Which one.
            bad: 1 where the step was skipped, a float scalar on the weights' device: then the
                average stays where it is, as if it had not been updated.
        """
        floats = [pair for pair in self._pairs if pair[0].is_floating_point()]
        averages, weights = [a for a, _ in floats], [w for _, w in floats]
        share = 1 - self.decay(step)
        # pyright: ignore below, since torch's stubs do not know these.
        moves = torch._foreach_sub(weights, averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(moves, share if bad is None else share * (1 - bad))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, moves)  # pyright: ignore[reportPrivateImportUsage]
        for average, weight in self._pairs:
            if not average.is_floating_point():
                average.copy_(weight)

    def decay(self, step: int) -> float:
        """Share of the average that step 0, 1, … keeps."""
        if not self.config.warmup:
            return self.config.decay
        # Without a warm-up the average would consist of the initial weights for thousands of steps.
        return min(self.config.decay, (1 + step) / (10 + step))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
