"""What will labelling a source take? The job behind `tl-label plan`.

`measure` takes images spread evenly over the source through the stages of labelling, one stage at a
time: reading, decoding, teacher, encoding. `extrapolate` turns what that took into hours and bytes
for the whole source, and says which stage limits. Nothing is written.

In the job itself the stages overlap, and it is as fast as the slowest. But those that need the
machine's cores share them: on a CPU the times of decoding and teacher add up.
"""

import os
import resource
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from .images import BadImage
from .label_map import LabelMap
from .pipeline import MapCoding
from .score import (
    CellScores,
    Scorer,
    TeacherInput,
    check_scoring,
    default_batch_size,
    default_workers,
    level_batch_sizes,
    level_sizes,
    load_inputs,
    tile_side,
)
from .sources import ImageSource, Sample
from .teacher import Teacher
from .verify import Interval, bootstrap

STAGES = ("reading", "decoding", "teacher", "encoding")

_Item = TypeVar("_Item")

_NUM_BATCHES = 6
"""Batches' worth of images that are measured, for each batch that the device computes at a time."""
_TAR_BLOCK_BYTES = 512
_TAR_END_BYTES = 1024
_TAR_RECORD_BYTES = 10_240
_NEARLY_FULL, _HALF_EMPTY = 0.9, 0.5  # of a GPU's memory
_UNEVEN = 1.1
"""A process may get so many times its fair share of images before that is worth a word."""


class Wave(NamedTuple):
    """Full batches that the device computed side by side, as many as the job would: 1 on a GPU."""

    level: int
    num_batches: int
    num_px: int
    """Of all their images, as the teacher sees them."""
    secs: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was timed and counted."""

    settings: dict[str, Any]
    """Teacher, device, sizes, …: with what."""
    num_listed: int
    """Images of the whole source."""
    read_secs: list[float]
    """Of each image measured, good or bad, in the thread that read it; decode_secs likewise."""
    decode_secs: list[float]
    """Decoding and resizing."""
    bad: dict[str, str]
    """Key of each image measured that the job would leave out → why."""
    waves: list[Wave]
    image_px: list[list[int]]
    """For each level the px of each readable image, at the teacher's size."""
    encode_secs: list[float]
    """Of each good image, like map_bytes and tar_bytes."""
    map_bytes: list[int]
    tar_bytes: list[int]
    """What the map takes in a tar: header, bytes, padding."""
    batch_size: int
    """On the first level."""
    num_workers: int
    """Threads that read and decoded at the same time."""
    num_cores: int
    """That this process may use."""
    teacher_cores: int
    """That the teacher keeps busy; 0 where it runs on a GPU."""
    memory_bytes: int
    """Peak: on a GPU of what torch allocated there, else of what is resident of this process."""
    memory_limit_bytes: int | None
    """What the GPU has; None on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the whole source takes.

    Intervals hold 95 % of what other samples of as many images would give; those of the teacher
    reach from its slowest wave to its fastest. Hours begin when the first image is read.
    """

    settings: dict[str, Any]
    """With what this was measured."""
    num_images: int
    num_measured: int
    bad: dict[str, str]
    """Key of each image measured that would be left out → why."""
    num_quarantined: int
    """Images of the whole source that are expected to be left out."""
    batch_size: int
    num_batches: int
    """Timed, to learn the teacher's speed."""
    num_workers: int
    images_per_sec: dict[str, Interval]
    """Of each of STAGES while it has the machine to itself; of all of them "together"."""
    limit: str
    """The one of STAGES that decides how fast all are."""
    hours: Interval
    """Of one process."""
    num_processes: int
    hours_shared: Interval
    """Of the busiest of num_processes, each with a device and workers like those measured."""
    num_busiest: int
    """Images that it has."""
    bytes_per_map: Interval
    tar_bytes: Interval
    """Of all label shards; what index.json calls tar_bytes."""
    num_slices: int
    num_files: int
    """A .tar and a .json for each slice, and index.json."""
    memory_bytes: int
    memory_limit_bytes: int | None
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values; an interval as value, low and high."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def measure(
    source: ImageSource,
    *,
    teacher: Teacher,
    levels: Sequence[int] = (),
    tiles: bool = False,
    fit: str = "native",
    top_k: int = 5,
    mass: float | None = None,
    score_bits: int = 16,
    batch_size: int | None = None,
    num_workers: int | None = None,
    num_images: int | None = None,
) -> Measured:
    """Take some images of a source through the stages of labelling, and look at the clock.

    Args:
        source: The images. Those measured are spread evenly over it.
        teacher: Scores the cells.
        levels: Sides of the teacher's square image, px, see generate; none means its own size.
        tiles: See generate.
        fit: How images meet the teacher, see fit.FITS.
        top_k: Classes kept per cell.
        mass: See generate.
        score_bits: See generate.
        batch_size: Images per forward pass on the first level; None means what generate takes.
        num_workers: Threads that read and decode; None means what generate takes.
        num_images: How many to measure; None means six batches for each that the device computes
            at a time. A source that has fewer is measured whole.

    Raises:
        ValueError: If arguments do not fit together, no image can be labelled, or a batch does not
            fit into the device's memory.
        OSError: If storage fails.
    """
    batch_size = batch_size or default_batch_size(teacher)
    num_workers = num_workers or default_workers()
    sizes = level_sizes(teacher, levels)
    check_scoring(teacher, fit=fit, top_k=top_k)
    tile_px = tile_side(sizes) if tiles else None
    batch_sizes = level_batch_sizes(sizes, batch_size, tile_px=tile_px)
    coding = MapCoding(num_classes=teacher.num_classes, score_bits=score_bits, mass=mass)
    load = partial(load_inputs, teacher=teacher, fit=fit, sizes=sizes)
    with Scorer(teacher, top_k=top_k, tile_px=tile_px) as scorer:
        wanted = num_images or _NUM_BATCHES * batch_size * scorer.num_parallel
        chosen = [source.samples[i] for i in spread(len(source.samples), wanted)]
        loaded = _load_all(_ClockedSource.of(source), chosen, load, num_workers)
        readable = [image for image in loaded if image.inputs]
        bad = {image.key: image.problem for image in loaded if image.problem is not None}
        _check_any(readable, bad)
        waves, scores = _score_all(scorer, readable, batch_sizes)
        teacher_cores = scorer.num_parallel if teacher.device.type == "cpu" else 0
    _encode(readable[0], scores[0], coding)  # the first of all takes longer
    encoded = [_encode(*image, coding) for image in zip(readable, scores)]
    good = [image for image in encoded if image.problem is None]
    bad |= {image.key: image.problem for image in encoded if image.problem is not None}
    _check_any(good, bad)
    memory_bytes, memory_limit_bytes = _memory(teacher.device)
    return Measured(
        settings={
            "teacher": teacher.name,
            "image_sizes": list(sizes),
            "device": _device_name(teacher.device),
            "precision": teacher.precision,
            "fit": fit,
            "top_k": top_k,
        },
        num_listed=len(source.samples),
        read_secs=[image.read_secs for image in loaded],
        decode_secs=[image.decode_secs for image in loaded],
        bad=bad,
        waves=waves,
        image_px=[
            [_num_px(image.inputs[level].pixels) for image in readable]
            for level in range(len(sizes))
        ],
        encode_secs=[image.secs for image in good],
        map_bytes=[image.num_bytes for image in good],
        tar_bytes=[_bytes_in_tar(image.key, image.num_bytes) for image in good],
        batch_size=batch_size,
        num_workers=num_workers,
        num_cores=len(os.sched_getaffinity(0)),
        teacher_cores=teacher_cores,
        memory_bytes=memory_bytes,
        memory_limit_bytes=memory_limit_bytes,
    )


def spread(num_listed: int, num_wanted: int) -> list[int]:
    """Return the middles of num_wanted equal stretches of range(num_listed), or all of it."""
    if num_wanted >= num_listed:
        return list(range(num_listed))
    return [(2 * i + 1) * num_listed // (2 * num_wanted) for i in range(num_wanted)]


# ------------------------------------------------------------------------------ reading, decoding


@dataclass(frozen=True, eq=False)
class _ClockedSource(ImageSource):
    """A source that notes how long it took to read each image."""

    read_secs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ImageSource) -> "_ClockedSource":
        return cls(source.root, source.samples, source.class_ids, source.class_names)

    def read(self, sample: Sample) -> bytes:
        start_secs = time.perf_counter()
        try:
            return super().read(sample)
        finally:
            self.read_secs[sample.key] = time.perf_counter() - start_secs


class _Loaded(NamedTuple):
    key: str
    inputs: list[TeacherInput]
    """One a level; none where the image is no good."""
    problem: str | None
    read_secs: float
    decode_secs: float


_Load = Callable[[ImageSource, Sample], list[TeacherInput]]


def _load_all(
    source: _ClockedSource, samples: Sequence[Sample], load: _Load, num_workers: int
) -> list[_Loaded]:
    # Pillow loads its readers with the first image, whichever it is.
    _load_one(source, load, source.samples[0])
    with (
        tqdm(desc="read", total=len(samples), unit="img", disable=None) as progress,
        ThreadPoolExecutor(num_workers, "load") as pool,
    ):
        loaded = []
        for image in pool.map(partial(_load_one, source, load), samples):
            loaded.append(image)
            progress.update()
    return loaded


def _load_one(source: _ClockedSource, load: _Load, sample: Sample) -> _Loaded:
    start_secs = time.perf_counter()
    try:
        inputs, problem = load(source, sample), None
    except BadImage as error:
        inputs, problem = [], str(error)
    secs = time.perf_counter() - start_secs
    read_secs = source.read_secs[sample.key]
    return _Loaded(sample.key, inputs, problem, read_secs, secs - read_secs)


def _check_any(images: Sequence[Any], bad: dict[str, str]) -> None:
    if not images:
        key, why = next(iter(bad.items()))
        raise ValueError(f"none of the {len(bad)} images measured can be labelled, {key}: {why}")


# ---------------------------------------------------------------------------------------- teacher


class _Shown(NamedTuple):
    """An image as the teacher sees it at one level."""

    number: int
    level: int
    pixels: UInt8[np.ndarray, "h w 3"]


_Batch = Sequence[_Shown]
_Scores = dict[int, tuple[CellScores, int]]
"""Of one image: level → the scores of a batch, and the image's place in it."""


def _score_all(
    scorer: Scorer, images: Sequence[_Loaded], batch_sizes: Sequence[int]
) -> tuple[list[Wave], list[_Scores]]:
    """Score every image, and time full batches: the job has few others."""
    scores: list[_Scores] = [{} for _ in images]
    waves = []
    levels = []
    for level, batch_size in enumerate(batch_sizes):
        shown = [_Shown(i, level, image.inputs[level].pixels) for i, image in enumerate(images)]
        levels.append(_batches(shown, batch_size, scorer.num_parallel))
    num_batches = sum(len(batches) for parts in levels for batches in parts)
    with tqdm(desc="score", total=num_batches, unit="batch", disable=None) as progress:
        for level, (partial_batches, first_batches, full_batches) in enumerate(levels):
            # On a GPU the first batch of a shape takes longer; the job sees each shape often.
            for wave in _run(scorer, [*partial_batches, *first_batches], progress):
                _keep(scores, wave)
            for wave in _run(scorer, full_batches, progress):
                _keep(scores, wave)
                num_px = sum(_num_px(shown.pixels) for batch in wave.batches for shown in batch)
                waves.append(Wave(level, len(wave.batches), num_px, wave.secs))
    return waves, scores


def _batches(
    shown: Sequence[_Shown], batch_size: int, num_parallel: int
) -> tuple[list[_Batch], list[_Batch], list[_Batch]]:
    """Sort images of one level into batches of one shape each.

    Returns:
        The batches that are not full; the first full one of each shape; all full ones, alike ones
        together. What a batch or a wave lacks at the end is filled with images that it has: what
        is on an image does not change its time.
    """
    shapes: dict[tuple[int, ...], list[_Shown]] = {}
    for one in shown:
        shapes.setdefault(one.pixels.shape, []).append(one)
    chunks = [chunk for members in shapes.values() for chunk in _chunks(members, batch_size)]
    full = [chunk for chunk in chunks if len(chunk) == batch_size]
    if not full:
        full = [list(islice(cycle(max(chunks, key=len)), batch_size))]
    first = {batch[0].pixels.shape: batch for batch in reversed(full)}
    partial_batches = [chunk for chunk in chunks if len(chunk) < batch_size]
    full += list(islice(cycle(full), -len(full) % num_parallel))
    return partial_batches, list(first.values()), full


class _Run(NamedTuple):
    batches: Sequence[_Batch]
    scores: list[CellScores]
    secs: float


def _run(scorer: Scorer, batches: Sequence[_Batch], progress: tqdm) -> Iterator[_Run]:
    """Compute as many batches at a time as the job does, and have the next ones ready as it has.

    The seconds of a wave are those from the end of the wave before.
    """
    waves = _chunks(batches, scorer.num_parallel)
    end_secs = time.perf_counter()
    started: Sequence[Callable[[], CellScores]] = []
    for wave, following in zip([[], *waves], [*waves, []]):
        ready = [
            scorer.start(np.stack([one.pixels for one in batch]), level=batch[0].level)
            for batch in following
        ]
        if wave:
            scores = [fetch() for fetch in started]
            start_secs, end_secs = end_secs, time.perf_counter()
            progress.update(len(wave))
            yield _Run(wave, scores, end_secs - start_secs)
        started = ready


def _keep(scores: list[_Scores], run: _Run) -> None:
    for batch, batch_scores in zip(run.batches, run.scores):
        for place, one in enumerate(batch):
            scores[one.number][one.level] = (batch_scores, place)


def _num_px(pixels: UInt8[np.ndarray, "h w 3"]) -> int:
    return pixels.shape[0] * pixels.shape[1]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _memory(device: torch.device) -> tuple[int, int | None]:
    """Return the peak so far and, of a GPU, what there is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None


# --------------------------------------------------------------------------------------- encoding


class _Encoded(NamedTuple):
    key: str
    num_bytes: int
    secs: float
    problem: str | None


def _encode(image: _Loaded, scores: _Scores, coding: MapCoding) -> _Encoded:
    start_secs = time.perf_counter()
    levels = []
    for level, shown in enumerate(image.inputs):
        batch, place = scores[level]
        cells, log_normalizer = batch.scores[place], batch.log_normalizer[place]
        if not (np.isfinite(cells).all() and np.isfinite(log_normalizer).all()):
            return _Encoded(image.key, 0, 0.0, "the teacher's scores are not finite")
        levels.append(
            LabelMap(
                scores=cells,
                classes=batch.classes[place].astype(np.uint32),
                num_classes=coding.num_classes,
                log_normalizer=log_normalizer,
                window=shown.placement.window,
            )
        )
    data = coding.encode(levels)
    return _Encoded(image.key, len(data), time.perf_counter() - start_secs, None)


def _bytes_in_tar(key: str, num_bytes: int) -> int:
    header = tarfile.TarInfo(f"{key}.tlm").tobuf(tarfile.PAX_FORMAT)
    return len(header) + _round_up(num_bytes, _TAR_BLOCK_BYTES)


# ---------------------------------------------------------------------------------- extrapolation


def extrapolate(measured: Measured, *, shard_size: int, num_processes: int = 1) -> Plan:
    """Turn what some images took into what all take.

    Args:
        measured: By measure.
        shard_size: Images per slice, at most.
        num_processes: That share the slices, each with a device, cores and workers of its own,
            like those measured.

    Raises:
        ValueError: If shard_size or num_processes is below 1.
    """
    for name, value in (("shard size", shard_size), ("number of processes", num_processes)):
        if value < 1:
            raise ValueError(f"{name} {value} is not 1 or more")
    num_images, num_measured = measured.num_listed, len(measured.read_secs)
    good_share = len(measured.map_bytes) / num_measured
    num_quarantined = round(num_images * (1 - good_share))
    stage_secs = _stage_secs(measured)
    used = {  # by an image of the source, on average
        name: _scaled(secs, good_share if name in ("teacher", "encoding") else 1.0)
        for name, secs in stage_secs.items()
    }
    together = Interval(
        *(
            max(sum(needs.values()) for needs in _needs(measured, used, bound))
            for bound in Interval._fields
        )
    )
    num_slices = _num_slices(num_images, shard_size)
    num_busiest = min(num_images, -(-num_slices // num_processes) * -(-num_images // num_slices))
    bytes_per_map = _mean_of(measured.map_bytes, of=num_images)
    per_slice = _scaled(
        _mean_of(measured.tar_bytes, of=num_images), (num_images - num_quarantined) / num_slices
    )
    tar_bytes = Interval(
        *(
            num_slices * _round_up(round(bound) + _TAR_END_BYTES, _TAR_RECORD_BYTES)
            for bound in per_slice
        )
    )
    plan = Plan(
        settings=measured.settings,
        num_images=num_images,
        num_measured=num_measured,
        bad=measured.bad,
        num_quarantined=num_quarantined,
        batch_size=measured.batch_size,
        num_batches=sum(wave.num_batches for wave in measured.waves),
        num_workers=measured.num_workers,
        images_per_sec={
            name: _inverse(secs) for name, secs in {**stage_secs, "together": together}.items()
        },
        limit=_limit(_needs(measured, used, "value")),
        hours=_scaled(together, num_images / 3600),
        num_processes=num_processes,
        hours_shared=_scaled(together, num_busiest / 3600),
        num_busiest=num_busiest,
        bytes_per_map=bytes_per_map,
        tar_bytes=tar_bytes,
        num_slices=num_slices,
        num_files=2 * num_slices + 1,
        memory_bytes=measured.memory_bytes,
        memory_limit_bytes=measured.memory_limit_bytes,
        advice=[],
    )
    return replace(plan, advice=list(_advice(plan, measured)))


def _stage_secs(measured: Measured) -> dict[str, Interval]:
    """Return the seconds that go by for an image in each stage while all its threads are busy."""
    return {
        "reading": _scaled(_mean_of(measured.read_secs), 1 / measured.num_workers),
        "decoding": _scaled(_mean_of(measured.decode_secs), 1 / measured.num_workers),
        "teacher": _teacher_secs(measured),
        "encoding": _mean_of(measured.encode_secs),
    }


def _teacher_secs(measured: Measured) -> Interval:
    """Add up the levels; within one, an image takes as long as its px."""
    value = low = high = 0.0
    for level, sizes_px in enumerate(measured.image_px):
        waves = [wave for wave in measured.waves if wave.level == level]
        num_px = sum(sizes_px) / len(sizes_px)
        per_px = [wave.secs / wave.num_px for wave in waves]
        value += num_px * sum(wave.secs for wave in waves) / sum(wave.num_px for wave in waves)
        low += num_px * min(per_px)
        high += num_px * max(per_px)
    return Interval(value, low, high)


def _needs(measured: Measured, used: dict[str, Interval], bound: str) -> list[dict[str, float]]:
    """Return what an image takes of each thing that can run out: stage → seconds.

    Those are the threads that load, the device, the thread that encodes, and the cores.
    """
    secs = {name: getattr(interval, bound) for name, interval in used.items()}
    num_cores = measured.num_cores
    threads = {
        "decoding": measured.num_workers,
        "teacher": measured.teacher_cores,
        "encoding": 1,
    }
    return [
        {"reading": secs["reading"], "decoding": secs["decoding"]},
        {"teacher": secs["teacher"]},
        {"encoding": secs["encoding"]},
        {name: secs[name] * min(n, num_cores) / num_cores for name, n in threads.items()},
    ]


def _limit(needs: Sequence[dict[str, float]]) -> str:
    """Return the stage that takes most of what runs out first."""
    scarce = max(needs, key=lambda need: sum(need.values()))
    return max(scarce, key=lambda name: scarce[name])


def _advice(plan: Plan, measured: Measured) -> Iterator[str]:
    """Say what would make it faster, and what may go wrong."""
    on_gpu = measured.teacher_cores == 0
    used, limit = measured.memory_bytes, measured.memory_limit_bytes
    memory = "" if limit is None else f"{used / 1e9:.1f} of {limit / 1e9:.1f} GB"
    if plan.limit == "reading":
        yield (
            f"more --workers than {plan.num_workers}: they wait for the storage, not for a core; "
            "or faster storage"
        )
    elif plan.limit == "decoding" and measured.num_workers < measured.num_cores:
        yield f"more --workers: {plan.num_workers} decode, there are {measured.num_cores} cores"
    elif plan.limit == "decoding":
        whose = " for each GPU" if on_gpu else ""
        yield f"more cores{whose}, more machines (--part), or images made smaller beforehand"
    elif plan.limit == "encoding":
        yield "one thread encodes: more processes (torchrun, --part), or a smaller --top-k"
    elif limit is None:
        yield "a GPU, more machines (--part), a smaller --image-size or --teacher"
    elif used < _HALF_EMPTY * limit:
        yield (
            f"try a --batch-size above {plan.batch_size}, {memory} are in use; after that more "
            "GPUs (torchrun, --part)"
        )
    else:
        yield "more GPUs (torchrun, --part), a smaller --image-size or --teacher"
    if limit is not None and used > _NEARLY_FULL * limit:
        yield (
            f"a smaller --batch-size: {memory} are in use, and photos of another shape may need "
            "more"
        )
    if plan.num_busiest * plan.num_processes > _UNEVEN * plan.num_images:
        yield (
            f"--shard-size {_even_shard_size(plan)}: the slices do not share out evenly, one of "
            f"the {plan.num_processes} processes has {plan.num_busiest:,} images"
        )


def _even_shard_size(plan: Plan) -> int:
    """Return a smaller shard size that gives every process as many slices."""
    per_process = -(-plan.num_slices // plan.num_processes)
    return -(-plan.num_images // (per_process * plan.num_processes))


def in_words(plan: Plan) -> dict[str, str]:
    """Return a line about each thing that people want to know."""
    with_what = plan.settings
    sizes = " + ".join(str(size) for size in with_what["image_sizes"])
    lines = {
        "with": f"{with_what['teacher']} at {sizes} px, {with_what['precision']} on "
        f"{with_what['device']}; fit {with_what['fit']}, top {with_what['top_k']}",
        "measured": f"{plan.num_measured:,} of {_counted(plan.num_images, 'image')}, "
        f"{plan.num_batches} batches of {plan.batch_size}, "
        f"{_counted(plan.num_workers, 'worker')}",
    }
    for name, speed in plan.images_per_sec.items():
        lines[name] = f"{_span(speed, _rate)} images/s"
    lines["time"] = f"{_span(plan.hours, _duration)} here"
    if plan.num_processes > 1:
        lines["time"] += (
            f"; {_span(plan.hours_shared, _duration)} on {plan.num_processes} such devices, "
            f"{_counted(plan.num_workers, 'worker')} each"
        )
    lines["left out"] = (
        f"about {_counted(plan.num_quarantined, 'image')}, as {len(plan.bad):,} of those measured"
        if plan.bad
        else "none of those measured"
    )
    lines["label set"] = (
        f"{_span(plan.tar_bytes, _size)}; {_span(plan.bytes_per_map, _whole)} bytes a map; "
        f"{_counted(plan.num_slices, 'slice')}, {plan.num_files:,} files"
    )
    total = plan.memory_limit_bytes
    lines["memory"] = f"{_size(plan.memory_bytes)} " + (
        "of this process at most" if total is None else f"of the GPU's {_size(total)} at most"
    )
    lines["limit"] = plan.limit
    lines["advice"] = f"\n{'':<12}".join(plan.advice)
    return lines


def _span(interval: Interval, words: Callable[[float], str]) -> str:
    low, high = words(interval.low), words(interval.high)
    return words(interval.value) + (f" ({low} to {high})" if low != high else "")


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _duration(hours: float) -> str:
    for limit, factor, unit in ((48, 1 / 24, "days"), (1, 1, "h"), (1 / 60, 60, "min")):
        if hours >= limit:
            return f"{hours * factor:.1f} {unit}"
    return f"{hours * 3600:.1f} s"


def _size(num_bytes: int | float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _mean_of(values: Sequence[int | float], *, of: int | None = None) -> Interval:
    """Return the mean and 95 % bounds for that of all; `of` so many, those seen need no guess."""
    numbers = np.array(values, np.float64)
    mean, low, high = bootstrap(numbers, np.ones_like(numbers), np.arange(len(numbers)))
    unseen = 1.0 if of is None else (1 - len(numbers) / of) ** 0.5
    return Interval(mean, mean + unseen * (low - mean), mean + unseen * (high - mean))


def _scaled(interval: Interval, factor: int | float) -> Interval:
    return Interval(*(bound * factor for bound in interval))


def _inverse(secs: Interval) -> Interval:
    return Interval(1 / secs.value, 1 / secs.high, 1 / secs.low)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _num_slices(num_images: int, shard_size: int) -> int:
    return -(-num_images // shard_size)


def _chunks(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value
