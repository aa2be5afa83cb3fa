"""How well a model segments a split: mIoU and its kin, at the masks' own size.

Each process sees other images, each image is seen once, and what is added up are counts of pixels:
any number of processes gives the same numbers.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from ..shards.index import read_index
from ..trainer.distributed import Place, join_processes
from .class_sets import ClassSet
from .feed import SegSamples, eval_images
from .inference import InferenceConfig, Precision, segment, why_too_small
from .metrics import ConfusionMatrix, SegResult
from .sheet import Compared
from .uper_net import ModelConfig, UperNet
from .weights import find_weights, load_model

_TIMEOUT = timedelta(hours=6)
"""How long a process waits for slower ones at the end."""


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What `evaluate` found."""

    checkpoint: str
    model: str
    weights: str
    """"raw", "ema", or "published" for files of others."""
    data: str
    split: str
    inference: InferenceConfig
    scales: tuple[float, ...]
    flip: bool
    precision: str
    classes: ClassSet
    result: SegResult
    counts: Int64[Tensor, "c c"]
    """Pixels by true class (rows) and predicted class (columns)."""
    compared: list[Compared]
    """The first images that the main process has seen, for sheets."""
    ignore_index: int
    secs: float
    is_main: bool

    def to_json(self) -> dict[str, Any]:
        """Flatten to plain values; the confusion matrix is a list of rows."""
        facts = {
            name: getattr(self, name)
            for name in ("checkpoint", "model", "weights", "data", "split", "flip", "precision")
        }
        found = self.result.to_json()
        for name, score in zip(self.classes.names, found["classes"]):
            score["name"] = name
        return (
            facts
            | {"inference": asdict(self.inference), "scales": list(self.scales), "secs": self.secs}
            | found
            | {"confusion": self.counts.tolist()}
        )


def evaluate(
    checkpoint: Path | str,
    data: Path,
    *,
    split: str = "val",
    ema: bool | None = None,
    inference: dict[str, Any] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    precision: Precision = "fp32",
    device: str = "auto",
    num_workers: int | None = None,
    num_compared: int = 0,
) -> EvalReport:
    """Evaluate a checkpoint on a split of dataset shards, on one process or under torchrun.

    Args:
        checkpoint: Of a segmentation model, ours or published: see weights.find_weights.
        data: Made by segmenter.pack.
        split: Of the data.
        ema: Whether averaged weights are taken where the file has both; see weights.load_model.
        inference: Fields of InferenceConfig to use instead of the checkpoint's.
        scales: See inference.segment.
        flip: See inference.segment.
        precision: Arithmetic of the forward pass.
        device: See distributed.join_processes.
        num_workers: Processes that read images; None takes this process's share of the cores.
        num_compared: Images to keep with their predictions.

    Raises:
        ValueError: The checkpoint is no segmentation model, or has other classes than the data.
        OSError: Something is not there.
    """
    with join_processes(device, timeout=_TIMEOUT) as place:
        if not place.is_main:
            logging.getLogger(__name__.partition(".")[0]).setLevel(logging.WARNING)
        index = read_index(data)
        samples = SegSamples(index, split)
        trained = load_model(find_weights(str(checkpoint), place), ema=ema)
        if trained.config.num_classes != index.num_classes:
            raise ValueError(
                f"{checkpoint} tells {trained.config.num_classes} classes apart, {data} has "
                f"{index.num_classes}; evaluate it on the data set that it was trained for"
            )
        config = InferenceConfig(**asdict(trained.inference) | (inference or {}))
        begin = time.perf_counter()
        matrix, compared = confusion(
            trained.model.to(place.device),
            samples,
            place,
            config=config,
            model_config=trained.config,
            scales=scales,
            flip=flip,
            precision=precision,
            num_workers=num_workers,
            num_compared=num_compared,
        )
        return EvalReport(
            checkpoint=str(checkpoint),
            model=trained.config.name,
            weights=trained.weights,
            data=str(data),
            split=split,
            inference=config,
            scales=tuple(scales),
            flip=flip,
            precision=precision,
            classes=trained.classes,
            result=matrix.result(),
            counts=matrix.counts.cpu(),
            compared=compared,
            ignore_index=samples.ignore_index,
            secs=time.perf_counter() - begin,
            is_main=place.is_main,
        )


def confusion(
    model: UperNet,
    samples: SegSamples,
    place: Place,
    *,
    config: InferenceConfig,
    model_config: ModelConfig,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    precision: Precision = "fp32",
    num_workers: int | None = None,
    num_compared: int = 0,
) -> tuple[ConfusionMatrix, list[Compared]]:
    """Count pixels by true and predicted class over a split, over all processes.

    Args:
        model: On the device of `place`; is in the mode it was in, afterwards.
        samples: The split.
        place: This process among all.
        config: How images are seen.
        model_config: Gives mean and std.
        scales: See inference.segment.
        flip: See inference.segment.
        precision: Arithmetic of the forward pass.
        num_workers: Processes that read images.
        num_compared: Images of this process to return with their predictions.

    Raises:
        ValueError: A sample is damaged or too small to be seen.
    """
    matrix = ConfusionMatrix(
        samples.num_classes, ignore_index=samples.ignore_index, device=place.device
    )
    compared: list[Compared] = []
    was_training = model.training
    model.eval()
    images = eval_images(
        samples, rank=place.rank, world_size=place.world_size, num_workers=num_workers
    )
    share = len(range(place.rank, len(samples), place.world_size))
    hidden = None if place.is_main else True
    for image in tqdm(images, "evaluate", share, unit="image", leave=False, disable=hidden):
        size = (image.pixels.shape[1], image.pixels.shape[2])
        if problem := why_too_small(size, config, scales=tuple(scales)):
            raise ValueError(f"sample {image.key}: {problem}")
        predicted = segment(
            model,
            image.pixels,
            config,
            mean=model_config.mean,
            std=model_config.std,
            scales=scales,
            flip=flip,
            precision=precision,
        )
        matrix.add(predicted, image.mask)
        if len(compared) < num_compared:
            compared.append(Compared(image.key, image.pixels, image.mask, predicted))
    model.train(was_training)
    matrix.reduce(place)
    return matrix, compared


def as_table(report: EvalReport) -> str:
    """Write the scores of all classes, the worst last, and the means, as columns."""
    scores = zip(report.classes.names, report.result.classes)
    rows = sorted(scores, key=lambda row: (row[1].iou != row[1].iou, -row[1].iou))
    total = max(1, report.result.num_pixels)
    width = max(len("class"), *(len(name) for name in report.classes.names))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc':>6}  {'pixels':>7}"]
    for name, score in rows:
        lines.append(
            f"{name:<{width}}  {_percent(score.iou)}  {_percent(score.accuracy)}  "
            f"{score.num_pixels / total:>7.2%}"
        )
    return "\n".join(lines)


def confusions(report: EvalReport, most: int = 5) -> list[str]:
    """Say which classes are most often taken for which others, by pixels."""
    counts = report.counts.clone().fill_diagonal_(0).flatten()
    found = counts.topk(min(most, len(counts)))
    names, num = report.classes.names, len(report.classes.names)
    total = max(1, report.result.num_pixels)
    return [
        f"{names[place // num]} taken for {names[place % num]}: {count / total:.2%} of all pixels"
        for count, place in zip(found.values.tolist(), found.indices.tolist())
        if count
    ]


def _percent(value: float) -> str:
    return f"{'–':>6}" if value != value else f"{value:>6.2f}"
