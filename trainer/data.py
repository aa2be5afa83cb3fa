"""What a run learns from: dataset shards opened as its recipe wants them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..shards.index import read_index
from .distributed import Place
from .feed import Batch, EvalFeed, TrainFeed
from .recipe import Recipe
from .step import share_of


@runtime_checkable
class Feed(Protocol):
    """What the loop asks of a source of training batches; feed.TrainFeed is the real one."""

    def __next__(self) -> Batch:
        """Give the next batch, without end."""
        ...

    def state(self) -> Any:
        """Describe the position after the last batch, in values that torch.save keeps safe."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from."""

    source: str
    """Where it lies, for the records."""
    split: str = "train"
    """Which part of it is learned from, for the records."""
    class_ids: list[str]
    class_names: list[str]
    num_samples: int
    """In one pass over the training split, over all processes."""
    open_train: Callable[[Any, int], Feed]
    """Make the feed, from its state after the last batch, or from None for the beginning of a pass,
    whose number, 0 in a new run, comes second."""
    eval_batches: Iterable[Batch] | None
    """The validation split, iterated anew at each evaluation; None where there is none."""


def open_data(
    recipe: Recipe,
    folder: Path,
    place: Place,
    *,
    split: str = "train",
    val_split: str | None = None,
) -> Data:
    """Open dataset shards as a recipe wants them.

    Raises:
        ValueError: Class counts differ, or label maps are missing.
    """
    index = read_index(folder)
    if index.split(split).masks is not None:
        raise ValueError(
            f"split {split!r} of {folder} has masks in place of classes; use tl-seg train"
        )
    wanted = recipe.model.num_classes
    labels = index.split(split).labels if recipe.labels.needs_maps else None
    if recipe.labels.needs_maps and not index.split(split).has_labels:
        raise ValueError(
            f"split {split!r} of {folder} has no label maps, which the recipe learns from; pack it "
            "with tl-shard pack --labels, or learn from classes alone: "
            "--set labels.dense_weight=0 --set labels.class_target=label"
        )
    if labels is not None and labels.get("num_classes", wanted) != wanted:
        raise ValueError(
            f"the label maps of {folder} are over {labels['num_classes']} classes, the recipe's "
            f"model has {wanted}; --set model.num_classes={labels['num_classes']}, or make labels "
            f"with a teacher of {wanted} classes"
        )
    if index.num_classes != wanted:
        raise ValueError(
            f"{folder} has {index.num_classes} classes, the recipe's model {wanted}; "
            f"--set model.num_classes={index.num_classes}"
            + (", and give tl-shard pack the teacher's --classes" if labels is not None else "")
        )
    if val_split is None and "val" in index.splits:
        val_split = "val"
    size, view = recipe.model.image_hw, recipe.evaluation

    def open_train(state: Any, first_pass: int) -> Feed:
        seed = _pass_seed(recipe.run.seed, first_pass) if state is None else state["seed"]
        return TrainFeed(
            index,
            split,
            image_size=size,
            batch_size=share_of(recipe.optim.batch_size, place.world_size),
            augment=recipe.augment,
            device=place.device,
            seed=seed,
            rank=place.rank,
            world_size=place.world_size,
            num_threads=recipe.run.workers,
            with_labels=recipe.labels.needs_maps,
            state=state,
        )

    eval_batches = None
    if val_split is not None:
        eval_batches = EvalFeed(
            index,
            val_split,
            image_size=size,
            crop_pct=view.crop_pct,
            interpolation=view.interpolation,
            mean=recipe.augment.mean,
            std=recipe.augment.std,
            batch_size=max(1, view.batch_size // place.world_size),
            device=place.device,
            rank=place.rank,
            world_size=place.world_size,
            num_threads=recipe.run.workers,
        )
    return Data(
        source=str(folder.resolve()),
        split=split,
        class_ids=index.class_ids,
        class_names=index.class_names,
        num_samples=index.split(split).num_samples,
        open_train=open_train,
        eval_batches=eval_batches,
    )


def _pass_seed(seed: int, first_pass: int) -> int:
    """Seed of a feed that begins with a later pass than the first: it has no position to go to."""
    if first_pass == 0:
        return seed
    return int(np.random.SeedSequence([seed, first_pass]).generate_state(1)[0])
