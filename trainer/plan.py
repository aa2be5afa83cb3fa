"""What a training run takes: the feed and the steps of a recipe, timed on this device.

Three things are timed: the feed alone, steps on one batch alone, and both together, as a run has
them. On a CPU they compete for the cores, so together they take longer than the longer one alone.
"""

import resource
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from ..shards.index import ShardIndex, read_index
from .distributed import join_processes
from .feed import Batch, TrainFeed, default_num_threads
from .mixup import draw_mix
from .models import create_model
from .optim import Ema, Schedule, make_optimizer
from .recipe import Recipe
from .step import (
    add_gradients,
    is_compiled_on,
    num_parts,
    precision_on,
    share_of,
    targets_of,
)

_WARM_UP = 3
"""Batches and steps before the clock starts: the feed's queues fill, kernels are compiled."""
_MOST_SECS = 60.0
"""No part of the measurement goes on for longer, once something has been timed."""
_CLEARLY = 1.1
"""Feed and step limit both where neither takes so many times as long as the other."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a run would take, measured on this device."""

    model: str
    device: str
    precision: str
    num_processes: int
    """Each with a device, cores and storage like those measured."""
    share: int
    """Images of a step that fall to each process."""
    parts: int
    """In which it computes them."""
    workers: int
    """Decoding threads of each process."""
    num_steps_timed: int
    """Of the feed and the steps together; fewer than wished where they are slow."""
    feed_images_per_sec: float
    """Of one process, like the two below."""
    step_images_per_sec: float
    images_per_sec: float
    """Both together."""
    eval_images_per_sec: float | None
    """Of the forward pass; None where nothing is evaluated."""
    limit: Literal["feed", "step", "both"]
    total_steps: int
    train_hours: float
    eval_hours: float
    memory_bytes: int
    """Peak: on a GPU of what torch allocated there, else of what is resident of this process."""
    memory_limit_bytes: int | None
    """What the GPU has; None on a CPU."""
    advice: str

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def measure(
    recipe: Recipe,
    data: Path,
    *,
    split: str = "train",
    val_split: str | None = None,
    device: str = "auto",
    num_processes: int = 1,
    num_steps: int = 8,
) -> TrainPlan:
    """Time a few batches and steps of a recipe, and work out what the whole run takes.

    Nothing is written, no weights are downloaded. The exchange of gradients between processes is
    not in it.

    Args:
        recipe: With the class count of the data set, see loop.resolve.
        data: The data set's folder.
        split: The data set's split to learn from.
        val_split: The split to evaluate on; left out: "val" where the data set has it.
        device: See distributed.join_processes.
        num_processes: Of the run; this process takes the share of one of them.
        num_steps: Batches, and steps, that are timed.

    Raises:
        ValueError: Recipe, data and processes do not fit each other, or the step does not fit into
            the device's memory; says what to change.
        OSError: The data set is not there.
    """
    if num_steps < 1:
        raise ValueError(f"--steps {num_steps}: allowed: >= 1")
    index = read_index(data)
    share = share_of(recipe.optim.batch_size, num_processes)
    parts = num_parts(share, recipe.run.device_batch_size)
    with join_processes(device) as place:
        feed = _open_feed(recipe, index, split, share, num_processes, place.device)
        with closing(feed):
            batch = next(feed)
            feed_secs, _ = _secs_of(lambda: next(feed), num_steps, place.device, "feed")
            try:
                step = _Step(recipe, parts, place.device)
                if is_compiled_on(place.device, recipe.run):
                    step(batch)  # compiling may take minutes, which say nothing of later steps
                step_secs, _ = _secs_of(lambda: step(batch), num_steps, place.device, "step")
                both_secs, num_timed = _secs_of(
                    lambda: step(next(feed)), num_steps, place.device, "both"
                )
                memory_bytes, limit_bytes = _memory(place.device)
                eval_secs, _ = _secs_of(lambda: step.predict(batch), 2, place.device, "evaluation")
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{share // parts} images at once do not fit into the memory of "
                    f"{_device_name(place.device)}; lower run.device_batch_size, e.g. "
                    f"--set run.device_batch_size={max(2, share // parts // 2)}, or set "
                    "model.grad_checkpointing=true"
                ) from error
        device_name = _device_name(place.device)
        precision = precision_on(place.device, recipe.run)
    steps_per_epoch = index.split(split).num_samples / recipe.optim.batch_size
    total = Schedule.of(recipe, steps_per_epoch).total_steps
    if val_split is None and "val" in index.splits:
        val_split = "val"
    num_evaluated = 0
    if val_split is not None:
        times = -(-total // recipe.evaluation.every.steps(steps_per_epoch))
        num_evaluated = times * index.split(val_split).num_samples
    nets = 2 if recipe.ema.decay else 1
    # An evaluation decodes its images anew for each set of weights.
    secs_per_image = max(eval_secs, feed_secs) / share
    return TrainPlan(
        model=recipe.model.name,
        device=device_name,
        precision=precision,
        num_processes=num_processes,
        share=share,
        parts=parts,
        workers=recipe.run.workers or default_num_threads(),
        num_steps_timed=num_timed,
        feed_images_per_sec=share / feed_secs,
        step_images_per_sec=share / step_secs,
        images_per_sec=share / both_secs,
        eval_images_per_sec=share / eval_secs if val_split else None,
        limit=_limit(feed_secs, step_secs),
        total_steps=total,
        train_hours=total * both_secs / 3600,
        eval_hours=nets * num_evaluated * secs_per_image / num_processes / 3600,
        memory_bytes=memory_bytes,
        memory_limit_bytes=limit_bytes,
        advice=advise(feed_secs, step_secs, both_secs, memory_bytes, limit_bytes),
    )


def in_words(plan: TrainPlan) -> dict[str, str]:
    """Return a line about each thing that people want to know."""
    in_parts = f" in {plan.parts} parts" if plan.parts > 1 else ""
    hours = plan.train_hours + plan.eval_hours
    of_memory = "of this process at most"
    if plan.memory_limit_bytes is not None:
        of_memory = f"of the GPU's {plan.memory_limit_bytes / 1e9:.0f} GB at most"
    each = f" on {plan.num_processes} such devices" if plan.num_processes > 1 else " here"
    steps = "step" if plan.num_steps_timed == 1 else "steps"
    limits = {"feed": "the feed", "step": "the step on the device", "both": "feed and step alike"}
    return {
        "with": f"{plan.model}, {plan.precision} on {plan.device}",
        "measured": f"{plan.num_steps_timed} {steps} of {plan.share} images{in_parts}, "
        f"{plan.workers} workers",
        "feed": _speed(plan.feed_images_per_sec, plan.num_processes),
        "step": _speed(plan.step_images_per_sec, plan.num_processes),
        "together": _speed(plan.images_per_sec, plan.num_processes),
        "time": f"{_duration(hours)}{each}: {plan.total_steps:,} steps "
        f"{_duration(plan.train_hours)}, evaluations {_duration(plan.eval_hours)}",
        "memory": f"{plan.memory_bytes / 1e9:.1f} GB {of_memory}",
        "limit": limits[plan.limit],
        "advice": plan.advice,
    }


def _speed(images_per_sec: float, num_processes: int) -> str:
    text = f"{images_per_sec:.4g} images/s"
    if num_processes > 1:
        text += f" each, {num_processes * images_per_sec:.4g} on all {num_processes}"
    return text


class _Step:
    """A step as loop.fit takes it, without what is between processes."""

    def __init__(self, recipe: Recipe, parts: int, device: torch.device) -> None:
        self._recipe, self._parts = recipe, parts
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        config = replace(recipe.model, pretrained=False)
        self._model = create_model(config, dense=recipe.labels.dense_weight > 0).to(device)
        if device.type == "cuda":
            self._model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._optimizer = make_optimizer(self._model, recipe.optim)
        self._ema = Ema(self._model, recipe.ema) if recipe.ema.decay else None
        self._bf16 = precision_on(device, recipe.run) == "bf16"
        if is_compiled_on(device, recipe.run):
            self._model.compile_training()
        self._num = 0

    def __call__(self, batch: Batch) -> None:
        model, recipe = self._model.train(), self._recipe
        mix = draw_mix(recipe, model.grid, self._num)
        self._optimizer.zero_grad()
        targets = targets_of(batch, recipe, model.grid)
        add_gradients(model, batch, targets, mix, recipe, parts=self._parts, bf16=self._bf16)
        gradients = [p for p in model.parameters() if p.grad is not None]
        nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])
        self._optimizer.step()
        if self._ema:
            self._ema.update(self._num)
        self._num += 1

    @torch.no_grad()
    def predict(self, batch: Batch) -> None:
        self._model.eval()
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._bf16):
            self._model(batch.images)


def _open_feed(
    recipe: Recipe,
    index: ShardIndex,
    split: str,
    share: int,
    num_processes: int,
    device: torch.device,
) -> TrainFeed:
    return TrainFeed(
        index,
        split,
        image_size=recipe.model.image_hw,
        batch_size=share,
        augment=recipe.augment,
        device=device,
        seed=recipe.run.seed,
        world_size=num_processes,
        num_threads=recipe.run.workers,
        with_labels=recipe.labels.needs_maps,
    )


def _secs_of(
    job: Callable[[], object], times: int, device: torch.device, title: str
) -> tuple[float, int]:
    """Time a job once it is warm; return its mean seconds, and how often it was done for them."""
    with tqdm(total=_WARM_UP + times, desc=title, disable=None, leave=False) as bar:
        _repeat(job, _WARM_UP, bar)
        _finish(device)
        begun = time.perf_counter()
        done = _repeat(job, times, bar)
        _finish(device)
        return (time.perf_counter() - begun) / done, done


def _repeat(job: Callable[[], object], times: int, bar: tqdm) -> int:
    """Do a job so many times, or fewer where that takes very long; return how many."""
    begun = time.perf_counter()
    for done in range(1, times + 1):
        job()
        bar.update()
        if time.perf_counter() - begun > _MOST_SECS:
            return done
    return times


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _limit(feed_secs: float, step_secs: float) -> Literal["feed", "step", "both"]:
    if feed_secs > _CLEARLY * step_secs:
        return "feed"
    return "step" if step_secs > _CLEARLY * feed_secs else "both"


def advise(
    feed_secs: float,
    step_secs: float,
    both_secs: float,
    memory_bytes: int,
    limit_bytes: int | None,
) -> str:
    """Say in one line what would make a run faster, from the seconds of a batch and a step."""
    if both_secs > _CLEARLY * max(feed_secs, step_secs):
        return "feed and step compete for the cores: together they are slower than either alone"
    limit = _limit(feed_secs, step_secs)
    if limit == "feed":
        return (
            "the device waits for the feed: give it more cores (run.workers), or pack smaller "
            "images with tl-shard pack --max-side-px"
        )
    if limit_bytes and memory_bytes < limit_bytes / 2:
        return "less than half of the GPU's memory is used: larger parts may be faster"
    return "the feed keeps up" if limit == "step" else "feed and step take the same time"


def _memory(device: torch.device) -> tuple[int, int | None]:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device), total
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _duration(hours: float) -> str:
    for least, factor, unit in ((48, 1 / 24, "days"), (1, 1, "h"), (1 / 60, 60, "min")):
        if hours >= least:
            return f"{hours * factor:.1f} {unit}"
    return f"{hours * 3600:.1f} s"
