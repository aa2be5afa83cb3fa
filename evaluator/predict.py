"""The job: a checkpoint and images → predictions, on one process or many, each image once."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..labeler.images import BadImage, load_image
from ..trainer.distributed import Place, from_all, reduce
from ..trainer.evaluate import Precision
from ..trainer.published import fetch
from .data import DECODERS, Decoder, EvalData, EvalImages, EvalView, open_data
from .labels import Truth, find_truth
from .models import EvalModel, load_for_eval
from .predictions import MODEL, TOP_K, HeadScores, Predictions

_IMAGES_IN_CACHE = 4
"""What a CPU computes at a time."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Everything that decides predictions but checkpoint and data."""

    model: str | None = None
    """See load_for_eval, as for the next three."""
    image_size: int | None = None
    crop_pct: float | None = None
    ema: bool | None = None
    split: str | None = None
    """See open_data, as for the next two."""
    classes: Path | None = None
    root: str | None = None
    labels: str | None = None
    """See find_truth, as for the next one."""
    subset: str | None = None
    without_labels: bool = False
    """Whether images without known classes will do, too."""
    decoder: Decoder | None = None
    """None takes DALI for data sets of ours, Pillow for all else."""
    flip: bool = False
    """Whether each view is seen mirrored, too; probabilities are averaged."""
    num_crops: int = 1
    """See crop_places; probabilities are averaged."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass; logits are float32 or better in any case."""
    batch_size: int = 64
    """Images a process has at a time; of crops there are more."""
    num_workers: int | None = None
    """Threads that read; None takes this process's share of the cores."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A model, images and right answers that fit each other."""

    model: EvalModel
    truth: Truth
    config: PredictConfig
    place: Place
    facts: dict[str, Any]
    """See Predictions."""

    @property
    def decoder(self) -> Decoder:
        """Who decodes."""
        return self.config.decoder or ("dali" if self.truth.data.is_packed else "pil")

    def images(self, decoder: Decoder) -> EvalImages:
        """Open this process's share of the images."""
        return EvalImages(
            self.truth.data,
            self.model.view,
            decoder=decoder,
            batch_size=self.config.batch_size,
            place=self.place,
            num_crops=self.config.num_crops,
            num_workers=self.config.num_workers,
        )


def predict(
    checkpoint: Path | str | None,
    data: Path | str,
    config: PredictConfig,
    place: Place,
) -> Predictions:
    """Ask a checkpoint about each image of a data set; every process gets all answers.

    Args:
        checkpoint: See load_for_eval; also a URL, or the name of published weights, see
            find_weights. None downloads those of config.model.
        data: See open_data.
        config: The rest.
        place: This process among all.

    Raises:
        ValueError: If checkpoint, data and options do not fit each other.
        OSError: If one of them is not there.
    """
    job = prepare(checkpoint, data, config, place)
    return run(job, job.decoder)


def prepare(
    checkpoint: Path | str | None,
    data: Path | str,
    config: PredictConfig,
    place: Place,
) -> Job:
    """Open data and checkpoint and check that they fit each other; see predict."""
    opened = open_data(data, split=config.split, classes=config.classes, root=config.root)
    if not (opened.source.num_classes or config.labels or config.without_labels):
        raise ValueError(
            f"{data} says of no image which class it has, so there is nothing to compare answers "
            "with; give class folders, shards with .cls files, a list of PATH,CLASS, or --predict "
            "FILE for the answers alone"
        )
    model = load_for_eval(
        None if checkpoint is None else fetch(str(checkpoint), place),
        model=config.model,
        image_size=config.image_size,
        crop_pct=config.crop_pct,
        ema=config.ema,
    )
    truth = find_truth(opened, model, labels=config.labels, subset=config.subset)
    model.model.eval().to(place.device)
    model.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    facts = {
        "checkpoint": "pretrained" if checkpoint is None else str(checkpoint),
        "model": model.name,
        "weights": model.weights,
        "data": str(data),
        "split": opened.split,
        "labels": config.labels,
        "subset": config.subset,
        "num_left_out": truth.num_left_out,
        "view": asdict(model.view),
        "num_crops": config.num_crops,
        "flip": config.flip,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "device": place.device.type,
        "num_processes": place.world_size,
    }
    return Job(model=model, truth=truth, config=config, place=place, facts=facts)


def log_on_main(place: Place) -> None:
    """Let one process alone report progress; warnings come from all."""
    if not place.is_main:
        logging.getLogger(__name__.partition(".")[0]).setLevel(logging.WARNING)


def open_photos(data: EvalData) -> Callable[[Sequence[str]], dict[str, Image.Image]]:
    """Return a function that finds photos by their keys, but those that cannot be read."""
    sample_of = {sample.key: sample for sample in data.source.samples}

    def find(keys: Sequence[str]) -> dict[str, Image.Image]:
        found = {}
        for key in keys:
            with contextlib.suppress(BadImage, OSError, KeyError):
                found[key] = load_image(data.source.read(sample_of[key]))
        return found

    return find


def run(job: Job, decoder: Decoder) -> Predictions:
    """Look at all images.

    Raises:
        ValueError: If none of them can be read.
    """
    images = job.images(decoder)
    start = time.perf_counter()
    shares = [
        _answer(job, batch.places, _log_probs(job, batch.images))
        for batch in _shown(images, len(images), job.place)
        if batch.places
    ]
    secs = time.perf_counter() - start
    return _gather(job, shares, images.unreadable, {"decoder": decoder}, secs)


def _gather(
    job: Job,
    shares: list["_Share"],
    unreadable: dict[str, str],
    facts: dict[str, Any],
    secs: float,
) -> Predictions:
    """Put the shares of all processes into the order of the data set."""
    slowest = reduce(
        job.place, torch.tensor([secs], dtype=torch.float64, device=job.place.device), "max"
    )
    shares = [share for part in from_all(job.place, shares) for share in part]
    problems = {k: why for part in from_all(job.place, unreadable) for k, why in part.items()}
    samples, truth = job.truth.data.source.samples, job.truth
    if not shares:
        raise ValueError(
            f"none of the {len(samples)} images of {job.facts['data']} can be read; "
            + "; ".join(": ".join(one) for one in list(problems.items())[:1])
        )
    places = np.concatenate([share.places for share in shares])
    order = np.argsort(places)
    places = places[order]
    assert len(places) + len(problems) == len(samples)
    return Predictions(
        keys=[samples[i].key for i in places.tolist()],
        classes=truth.classes[places],
        heads={
            name: _join([share.heads[name] for share in shares], order) for name in shares[0].heads
        },
        num_classes=job.model.num_classes,
        class_names=truth.class_names,
        valid=None if truth.valid is None else [truth.valid[i] for i in places.tolist()],
        unreadable={s.key: problems[s.key] for s in samples if s.key in problems},
        facts={**job.facts, **facts, "images_per_sec": len(samples) / slowest.item()},
    )


@dataclass(frozen=True, kw_only=True)
class _Share:
    places: Int64[np.ndarray, " n"]
    heads: dict[str, HeadScores]


def _shown(batches: Iterable[_T], num_batches: int, place: Place) -> Iterable[_T]:
    """Show a bar on a terminal."""
    hidden = None if place.is_main else True
    return tqdm(
        batches, desc="evaluate", total=num_batches, unit="batch", disable=hidden, leave=False
    )


@torch.no_grad()
def _log_probs(
    job: Job, images: Float32[Tensor, "b crops 3 h w"]
) -> dict[str, Float64[Tensor, "b c"]]:
    """Return log-probabilities over all classes: of a view, or of the mean over several."""
    num_crops = images.shape[1]
    views = images.flatten(0, 1)
    bf16 = job.config.precision == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        found = [_logits(job, views)]
        if job.config.flip:
            found.append(_logits(job, views.flip(-1)))
    considered = job.truth.considered
    log_probs = {}
    for name in found[0]:
        logits = torch.stack([one[name] for one in found]).double()
        if considered is not None:
            mask = torch.full(logits.shape[-1:], -math.inf, device=logits.device)
            mask[torch.from_numpy(considered).to(logits.device)] = 0
            logits = logits + mask
        of_views = logits.log_softmax(-1).unflatten(1, (-1, num_crops))
        num_views = of_views.shape[0] * num_crops
        # Several views are averaged as probabilities: unlike logits they have a common scale.
        averaged = of_views.logsumexp((0, 2)) - math.log(num_views)
        log_probs[name] = averaged if num_views > 1 else of_views[0, :, 0]
    return log_probs


def _logits(job: Job, views: Float32[Tensor, "v 3 h w"]) -> dict[str, Float32[Tensor, "v c"]]:
    # A CPU is up to three times as fast when what a layer hands to the next stays in its cache.
    few = _IMAGES_IN_CACHE if views.device.type == "cpu" else len(views)
    views = views.contiguous(memory_format=torch.channels_last)
    parts = [job.model.logits(part) for part in views.split(few)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _answer(job: Job, places: list[int], log_probs: dict[str, Float64[Tensor, "b c"]]) -> _Share:
    """Keep of a batch's probabilities what Predictions hold."""
    truth = job.truth
    num_considered = job.model.num_classes if truth.considered is None else len(truth.considered)
    right = _right_classes(truth, places, job.model.num_classes).to(job.place.device)
    heads = {}
    for name, values in log_probs.items():
        top = values.topk(min(TOP_K, num_considered), dim=1)
        true = values.masked_fill(~right, -math.inf).logsumexp(1)
        true = true.masked_fill(~right.any(1), math.nan)
        heads[name] = HeadScores(
            top_classes=top.indices.cpu().numpy(),
            top_probs=top.values.exp().float().cpu().numpy(),
            true_log_probs=true.cpu().numpy(),
        )
    return _Share(places=np.array(places, np.int64), heads=heads)


def _right_classes(truth: Truth, places: list[int], num_classes: int) -> Bool[Tensor, "b c"]:
    right = torch.zeros(len(places), num_classes, dtype=torch.bool)
    for row, i in enumerate(places):
        if truth.valid is not None:
            right[row, list(truth.valid[i])] = True
        elif truth.classes[i] >= 0:
            right[row, int(truth.classes[i])] = True
    return right


def _join(parts: list[HeadScores], order: Int64[np.ndarray, " n"]) -> HeadScores:
    return HeadScores(
        top_classes=np.concatenate([part.top_classes for part in parts])[order],
        top_probs=np.concatenate([part.top_probs for part in parts])[order],
        true_log_probs=np.concatenate([part.true_log_probs for part in parts])[order],
    )


# ---------------------------------------------------------------------------------- decoders


@dataclass(frozen=True, kw_only=True)
class DecoderComparison:
    """What two decoders make of the same images, and a model of what they made."""

    pil: Predictions
    dali: Predictions
    num_images: int
    """Images that both could read."""
    differing_answers: float
    """Percent of these whose first answer differs."""
    prob_difference: float
    """Mean over the images of |Δ| of the probability of the first answer to Pillow's pixels."""
    max_pixel_difference: float
    """Of any channel of any pixel that the model sees, in steps of 1/255."""
    mean_pixel_difference: float
    """Over all of them."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers alone."""
        return {name: value for name, value in vars(self).items() if name not in DECODERS}


def compare_decoders(job: Job) -> DecoderComparison:
    """Look at all images twice, decoded and resized by Pillow and by DALI.

    Raises:
        ValueError: If no image can be read by both.
    """
    pil, dali = job.images("pil"), job.images("dali")
    both = _shown(zip(pil, dali, strict=True), len(pil), job.place)
    shares: tuple[list[_Share], list[_Share]] = ([], [])
    sums = torch.zeros(5, dtype=torch.float64, device=job.place.device)
    largest = torch.zeros(1, dtype=torch.float64, device=job.place.device)
    start = time.perf_counter()
    for batches in both:
        log_probs = [_log_probs(job, batch.images) for batch in batches]
        for share, batch, found in zip(shares, batches, log_probs):
            if batch.places:
                share.append(_answer(job, batch.places, found))
        common = sorted(set(batches[0].places) & set(batches[1].places))
        if not common:
            continue
        rows = [[batch.places.index(i) for i in common] for batch in batches]
        pixels = _pixel_differences(job.model.view, *(b.images[r] for b, r in zip(batches, rows)))
        ours, theirs = (found[MODEL][r] for found, r in zip(log_probs, rows))
        first = ours.argmax(1, keepdim=True)
        gaps = (ours.gather(1, first).exp() - theirs.gather(1, first).exp()).abs()
        num_differing = (first[:, 0] != theirs.argmax(1)).sum()
        size = torch.tensor([len(common), pixels.numel()], device=sums.device)
        sums += torch.stack([*size, num_differing, gaps.sum(), pixels.double().sum()])
        largest = torch.maximum(largest, pixels.max())
    secs = time.perf_counter() - start
    found = [
        _gather(job, share, images.unreadable, {"decoder": decoder}, secs)
        for share, images, decoder in zip(shares, (pil, dali), DECODERS)
    ]
    num_images, num_pixels, num_differing, gap, total = reduce(job.place, sums, "sum").tolist()
    if not num_images:
        raise ValueError(f"no image of {job.facts['data']} can be read by both decoders")
    return DecoderComparison(
        pil=found[0],
        dali=found[1],
        num_images=round(num_images),
        differing_answers=100 * num_differing / num_images,
        prob_difference=gap / num_images,
        max_pixel_difference=reduce(job.place, largest, "max").item(),
        mean_pixel_difference=total / num_pixels,
    )


def _pixel_differences(
    view: EvalView, ours: Float32[Tensor, "b crops 3 h w"], theirs: Float32[Tensor, "b crops 3 h w"]
) -> Float32[Tensor, "b crops 3 h w"]:
    """In steps of 1/255."""
    std = torch.tensor(view.std, device=ours.device).view(3, 1, 1)
    return (ours - theirs).abs() * (255 * std)
