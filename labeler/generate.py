"""Images → label shards: the job behind `tl-label generate`.

The sorted list of images is cut into slices. A slice is the unit of work and of resume: process r
of n takes slices r, r + n, …, writes each under a temporary name and renames it. Whoever finds
that all slices are there writes index.json. Processes talk to each other through the output folder
alone, so any of them may die at any moment and the same command goes on.

Within a process, threads read, decode and resize images (Pillow lets go of Python's lock for
that), the calling thread keeps the device busy, and one more thread turns what comes back from
the device into bytes and files. Which images share a batch depends on the slice alone.

On a CPU every batch is computed by one thread, and as many batches at a time as torch has threads.
That takes less time in all than cutting up each convolution, and the bytes of a map do not depend
on the number of threads.
"""

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from jaxtyping import Float, Float16, Int32, UInt8
from torch import Tensor
from tqdm import tqdm

from .fit import Placement, check_fit, place, resize
from .images import BadImage, load_image
from .label_map import LabelMap, encode
from .label_set import (
    FORMAT,
    INDEX_NAME,
    Slice,
    is_whole,
    read_slice,
    remove_slice,
    slice_numbers,
    totals,
    write_index,
    write_slice,
)
from .sources import ImageFolder, Sample
from .teacher import Teacher

DEFAULT_SHARD_SIZE = 10_000
"""About 50 MB of label maps, and half a minute of an H100 with NFNet-F6: little to lose by a
kill, few files (129 tars for ImageNet), and enough slices to keep a hundred processes busy."""

_MAX_LOGITS = 1 << 27
"""Logits of a batch are made in pieces of this many numbers (512 MB) at most."""
_NUM_AHEAD = 4
"""Batches that may wait for the device or for encoding before no more are prepared."""
_SYSTEMIC = 32
"""A slice of so many images of which none can be labelled points at the cause, not at them."""

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did, and what the label set holds."""

    out: Path
    num_listed: int
    """Images in the slices that this summary is about: all, or this process's while others run."""
    num_labelled: int
    quarantined: dict[str, str]
    """Key of each image without a map → why."""
    map_bytes: int
    """Of all label maps, tar headers not counted."""
    num_correct: int | None
    """Images whose folder the teacher ranks first; None where its classes are not the folders."""
    num_new: int
    """Images that this run labelled; the others were there already."""
    secs: float
    """That this run took to label them."""
    num_slices: int
    num_unfinished: int
    """Slices of other processes that are not there yet; index.json is written when it is 0."""


def generate(
    source: ImageFolder,
    out: Path,
    *,
    teacher: Teacher,
    fit: str = "native",
    top_k: int = 5,
    batch_size: int | None = None,
    num_workers: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Write label maps of all images of a source; go on where an earlier run was broken off.

    Args:
        source: The images.
        out: Folder of the label set.
        teacher: Scores the cells.
        fit: How images meet the teacher, see fit.FITS.
        top_k: Classes kept per cell.
        batch_size: Images per forward pass; None means 64 on a GPU and 4 on the CPU.
        num_workers: Threads that decode; None means one per core, shared fairly by
            the processes that torchrun started here.
        shard_size: Images per slice, at most.
        rank: Of this process, from 0.
        world_size: Number of processes that share the work.
        overwrite: Replace what another run, with other settings, has left in `out`. What this run
            itself has finished is kept.

    Raises:
        ValueError: If arguments do not fit together, or another run's labels are in the way.
        OSError: If the output cannot be written.
    """
    _check_arguments(teacher, fit, top_k, shard_size)
    if teacher.device.type == "cuda":  # for what names no device: pinned memory and events
        torch.cuda.set_device(teacher.device)
    on_cpu = teacher.device.type == "cpu"
    batch_size = batch_size or (4 if on_cpu else 64)
    settings = _settings(source, teacher, fit, top_k, shard_size)
    slices = _slices(source.samples, shard_size)
    check_output(out)
    _make_way(out, settings, overwrite)
    finished = _finished(out, settings)
    own = range(rank, len(slices), world_size)
    todo = [n for n in own if n not in finished or not is_whole(out, finished[n])]
    for number in todo:
        remove_slice(out, number)
    if todo:
        (out / INDEX_NAME).unlink(missing_ok=True)
    _log_plan(source, teacher, settings, len(slices))
    _log_share(rank, world_size, len(own), len(todo))
    num_new = sum(len(slices[number]) for number in todo)
    num_own = sum(len(slices[number]) for number in own)
    start_secs = time.monotonic()
    with (
        tqdm(
            desc="label",
            total=num_own,
            initial=num_own - num_new,
            unit="img",
            smoothing=0.05,
            # Bars of several processes on one terminal would overwrite each other.
            disable=None if os.environ.get("LOCAL_RANK", "0") == "0" else True,
        ) as progress,
        ThreadPoolExecutor(torch.get_num_threads(), "cpu", torch.set_num_threads, (1,)) as cpu,
    ):
        _label(
            {number: slices[number] for number in todo},
            load=partial(_load, source, teacher, fit),
            score=partial(_score_on_cpu, cpu, teacher, top_k)
            if on_cpu
            else partial(_score, teacher, top_k),
            num_ahead=_NUM_AHEAD + (torch.get_num_threads() if on_cpu else 0),
            write=partial(write_slice, out, settings=settings),
            batch_size=batch_size,
            num_workers=num_workers or _default_workers(),
            num_classes=teacher.num_classes,
            knows_folders=teacher.num_classes == source.num_classes,
            progress=progress,
        )
    secs = time.monotonic() - start_secs
    finished = _finished(out, settings)
    if len(finished) == len(slices):
        # Those of other processes may stem from an earlier run, and nobody has looked at them yet.
        finished = {n: r for n, r in finished.items() if n in own or is_whole(out, r)}
    num_unfinished = len(slices) - len(finished)
    records = [finished[n] for n in finished if n in own or not num_unfinished]
    total = totals(records)
    if not num_unfinished:
        _check_any_labelled(records)
        write_index(out, records, settings=settings, class_names=_class_names(source, teacher))
    return Summary(
        out=out,
        num_listed=total["num_labelled"] + total["num_quarantined"],
        num_labelled=total["num_labelled"],
        quarantined={key: why for record in records for key, why in record.quarantined.items()},
        map_bytes=total["map_bytes"],
        num_correct=total["num_correct"],
        num_new=num_new,
        secs=secs,
        num_slices=len(slices),
        num_unfinished=num_unfinished,
    )


def share_of_work(part: str | None = None) -> tuple[int, int]:
    """Return this process's rank and the number of processes that share the work.

    Both come from torchrun's environment and from `part`, the place in a job array: two parts
    under torchrun with four processes each are eight processes.

    Args:
        part: "1/4" to "4/4"; None means there is no job array.

    Raises:
        ValueError: If `part` is anything else.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, _, num_parts = (part or "1/1").partition("/")
    if not (number.isdecimal() and num_parts.isdecimal() and 1 <= int(number) <= int(num_parts)):
        raise ValueError(f"part {part!r} is not I/N with I from 1 to N, e.g. 1/4, 2/4, 3/4 and 4/4")
    return (int(number) - 1) * world_size + rank, int(num_parts) * world_size


def local_device(device: str) -> str:
    """Give each process that torchrun starts on a machine a GPU of its own.

    "auto" and "cuda" become "cuda:LOCAL_RANK" where there are GPUs; the rest stays as it is.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local_rank}"


def check_output(out: Path) -> None:
    """Make the output folder, and check that it does not belong to something else.

    Raises:
        OSError: If it cannot be made or is a file.
        ValueError: If it holds a data set.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        kind = json.loads((out / INDEX_NAME).read_bytes())["format"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if kind != FORMAT:
        raise ValueError(f"{out} holds {kind!r} already; give --out a folder of its own")


@dataclass(frozen=True, slots=True)
class _Loaded:
    sample: Sample
    pixels: UInt8[np.ndarray, "h w 3"]
    placement: Placement


@dataclass(frozen=True, slots=True)
class _Scores:
    classes: Int32[np.ndarray, "b k rows cols"]
    best: Int32[np.ndarray, " b"]
    """The class that the whole image gets: that of the mean over all cells."""
    scores: Float16[np.ndarray, "b k rows cols"]
    log_normalizer: Float16[np.ndarray, "b rows cols"]


@dataclass(slots=True)
class _Labels:
    """What a slice has so far."""

    maps: dict[str, bytes] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    num_correct: int = 0


def _label(
    slices: dict[int, Sequence[Sample]],
    *,
    load: Callable[[Sample], _Loaded | str],
    score: Callable[[UInt8[np.ndarray, "b h w 3"]], Callable[[], _Scores]],
    write: Callable[..., Slice],
    num_ahead: int,
    batch_size: int,
    num_workers: int,
    num_classes: int,
    knows_folders: bool,
    progress: tqdm,
) -> None:
    """Label slices one after the other, while the images of the next are decoded already."""
    loaders = ThreadPoolExecutor(num_workers, "load")
    writer = ThreadPoolExecutor(1, "write")
    in_flight: deque[Future[None]] = deque()

    def run(labels: _Labels, batch: list[_Loaded]) -> None:
        while len(in_flight) >= num_ahead:
            in_flight.popleft().result()
        fetch = score(np.stack([loaded.pixels for loaded in batch]))
        in_flight.append(writer.submit(_encode, labels, batch, fetch, num_classes, progress))

    try:
        samples = (sample for slice_samples in slices.values() for sample in slice_samples)
        loaded_images = _in_order(loaders, load, samples, ahead=num_workers + 2 * batch_size)
        for number, slice_samples in slices.items():
            labels = _Labels()
            buckets: dict[tuple[int, int], list[_Loaded]] = {}
            # The samples come first: zip must not take an image from the next slice at the end.
            for sample, loaded in zip(slice_samples, loaded_images):
                if isinstance(loaded, str):
                    labels.quarantined[sample.key] = loaded
                    progress.update()
                    continue
                bucket = buckets.setdefault(loaded.placement.size, [])
                bucket.append(loaded)
                if len(bucket) == batch_size:
                    run(labels, buckets.pop(loaded.placement.size))
            for bucket in buckets.values():
                run(labels, bucket)
            in_flight.append(
                writer.submit(_write, write, number, slice_samples, labels, knows_folders, progress)
            )
        while in_flight:
            in_flight.popleft().result()
    finally:
        loaders.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    ahead: int,
) -> Iterator[_Result]:
    """Map in a pool, in order, with at most `ahead` items under way."""
    items = iter(items)
    under_way = deque(pool.submit(function, item) for item in islice(items, ahead))
    while under_way:
        result = under_way.popleft().result()
        under_way.extend(pool.submit(function, item) for item in islice(items, 1))
        yield result


def _load(source: ImageFolder, teacher: Teacher, fit: str, sample: Sample) -> _Loaded | str:
    """Return the image as the teacher wants it, or why it is no good."""
    try:
        image = load_image(source.read(sample))
    except BadImage as error:
        return str(error)
    except (FileNotFoundError, PermissionError) as error:
        # Of this file alone. What concerns all, a lost mount or a dying disk, stops the job.
        return f"cannot be read: {error.strerror}"
    placement = place(image.size, fit=fit, teacher_size=teacher.image_size, stride=teacher.stride)
    pixels = resize(image, placement, interpolation=teacher.interpolation)
    return _Loaded(sample, pixels, placement)


def _score_on_cpu(
    pool: ThreadPoolExecutor, teacher: Teacher, top_k: int, images: UInt8[np.ndarray, "b h w 3"]
) -> Callable[[], _Scores]:
    """Start a batch in a thread of its own; else as _score."""
    computed = pool.submit(_score, teacher, top_k, images)
    return lambda: computed.result()()


@torch.inference_mode()
def _score(
    teacher: Teacher, top_k: int, images: UInt8[np.ndarray, "b h w 3"]
) -> Callable[[], _Scores]:
    """Start the teacher on a batch.

    Returns:
        A function that waits for the device and returns the scores.
    """
    batch = torch.from_numpy(images)
    on_gpu = teacher.device.type == "cuda"
    if on_gpu:
        batch = batch.pin_memory()
    try:
        cells = teacher.cells(batch.to(teacher.device, non_blocking=True).permute(0, 3, 1, 2))
        num_logits = cells[0, ..., 0].numel() * teacher.num_classes
        pieces = cells.split(max(1, _MAX_LOGITS // num_logits))
        reduced = [_reduce(teacher.classify(piece), top_k) for piece in pieces]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{len(images)} images of {images.shape[2]}x{images.shape[1]} px do not fit into the "
            f"memory of {teacher.device}; give a smaller --batch-size"
        ) from error
    parts = [torch.cat(part).contiguous() for part in zip(*reduced)]
    # One copy for all, and no wait: the memory it goes to is pinned.
    host = torch.cat([part.view(torch.uint8).flatten() for part in parts]).to(
        "cpu", non_blocking=True
    )
    done = torch.cuda.Event() if on_gpu else None
    if done is not None:
        done.record()

    def fetch() -> _Scores:
        if done is not None:
            done.synchronize()
        rest = host.numpy()
        arrays = []
        for part in parts:
            data, rest = np.split(rest, [part.numel() * part.element_size()])
            dtype = np.int32 if part.dtype == torch.int32 else np.float16
            arrays.append(data.view(dtype).reshape(part.shape))
        return _Scores(*arrays)

    return fetch


def _reduce(logits: Float[Tensor, "b rows cols c"], top_k: int) -> tuple[Tensor, ...]:
    """Reduce logits to the fields of _Scores. The wider types come first: they stay aligned."""
    scores, classes = logits.topk(top_k, dim=-1)
    return (
        classes.permute(0, 3, 1, 2).int(),
        logits.mean((1, 2)).argmax(-1).int(),
        scores.permute(0, 3, 1, 2).half(),
        logits.logsumexp(-1).half(),
    )


def _encode(
    labels: _Labels,
    batch: Sequence[_Loaded],
    fetch: Callable[[], _Scores],
    num_classes: int,
    progress: tqdm,
) -> None:
    """Wait for a batch and add its maps to the slice's labels."""
    result = fetch()
    for i, loaded in enumerate(batch):
        key = loaded.sample.key
        scores, log_normalizer = result.scores[i], result.log_normalizer[i]
        if not (np.isfinite(scores).all() and np.isfinite(log_normalizer).all()):
            labels.quarantined[key] = "the teacher's scores are not finite"
            continue
        label_map = LabelMap(
            scores=scores,
            classes=result.classes[i].astype(np.uint32),
            num_classes=num_classes,
            log_normalizer=log_normalizer,
            window=loaded.placement.window,
        )
        labels.maps[key] = encode(label_map)
        labels.num_correct += int(result.best[i]) == loaded.sample.class_index
    progress.update(len(batch))


def _write(
    write: Callable[..., Slice],
    number: int,
    samples: Sequence[Sample],
    labels: _Labels,
    knows_folders: bool,
    progress: tqdm,
) -> None:
    """Write a slice whose images are all encoded."""
    keys = [sample.key for sample in samples]
    if not labels.maps and len(keys) >= _SYSTEMIC:
        raise ValueError(
            f"none of the {len(keys)} images from {keys[0]} on could be labelled, "
            f"{keys[0]} because: {labels.quarantined[keys[0]]}"
        )
    record = write(
        number,
        [(key, labels.maps[key]) for key in keys if key in labels.maps],
        quarantined={key: labels.quarantined[key] for key in keys if key in labels.quarantined},
        num_correct=labels.num_correct if knows_folders else None,
    )
    # Where there is no bar, in the log of a cluster's job, these lines are the progress.
    _logger.log(
        logging.INFO if progress.disable else logging.DEBUG,
        "slice %d is finished: %d images labelled, %d left out",
        number,
        len(record.samples),
        len(record.quarantined),
    )


def _default_workers() -> int:
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def _check_arguments(teacher: Teacher, fit: str, top_k: int, shard_size: int) -> None:
    check_fit(fit)
    if not 1 <= top_k <= min(255, teacher.num_classes):
        raise ValueError(
            f"top-k {top_k} is not between 1 and {min(255, teacher.num_classes)}: "
            f"{teacher.name} has {teacher.num_classes} classes, and a map keeps 255 at most"
        )
    if shard_size < 1:
        raise ValueError(f"shard size {shard_size} is not a number of images, 1 or more")
    if fit == "native" and teacher.square_only:
        size = teacher.image_size
        raise ValueError(
            f"teacher {teacher.name} takes images of {size}x{size} px alone; give --fit stretch "
            "(the whole image) or --fit center (its middle)"
        )


def _settings(
    source: ImageFolder, teacher: Teacher, fit: str, top_k: int, shard_size: int
) -> dict[str, Any]:
    """Return what decides the bytes of a label set: where it differs, two runs do not mix."""
    return {
        "teacher": {
            "name": teacher.name,
            "weights_sha256": teacher.weights_sha256,
            "timm_version": timm.__version__,
            "precision": teacher.precision,
            "image_size": teacher.image_size,
            "stride": teacher.stride,
            "mean": list(teacher.mean),
            "std": list(teacher.std),
            "interpolation": teacher.interpolation,
        },
        "fit": fit,
        "k": top_k,
        "num_classes": teacher.num_classes,
        "shard_size": shard_size,
        "source": {
            "num_listed": len(source.samples),
            "num_classes": source.num_classes,
            "listing_sha256": _listing_sha256(source.samples),
        },
    }


def _listing_sha256(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.key}\t{sample.class_index}\n".encode())
    return digest.hexdigest()


def _slices(samples: Sequence[Sample], shard_size: int) -> list[Sequence[Sample]]:
    """Cut into as few slices as shard_size allows, all of one size or one less."""
    num_slices = -(-len(samples) // shard_size)
    cuts = [number * len(samples) // num_slices for number in range(num_slices + 1)]
    return [samples[start:stop] for start, stop in zip(cuts, cuts[1:])]


def _make_way(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Remove what other settings made, if that is allowed."""
    for number in slice_numbers(out):
        record = read_slice(out, number)
        if record is None or record.settings == settings:
            continue
        if not overwrite:
            raise ValueError(
                f"{out} holds labels of another run ({_difference(record.settings, settings)}); "
                "give --overwrite to replace them, or another --out"
            )
        (out / INDEX_NAME).unlink(missing_ok=True)
        remove_slice(out, number)


def _finished(out: Path, settings: dict[str, Any]) -> dict[int, Slice]:
    """Return the slices whose .json is there and sound; ascending."""
    records = [read_slice(out, number) for number in slice_numbers(out)]
    return {
        record.number: record
        for record in records
        if record is not None and record.settings == settings
    }


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the first setting that differs, with both values."""
    left, right = _flat(theirs), _flat(ours)
    name = next(name for name in {**right, **left} if left.get(name) != right.get(name))
    return f"{name} {left.get(name)!r} there, {right.get(name)!r} here"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": entry for inner, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _check_any_labelled(records: Sequence[Slice]) -> None:
    if not any(record.samples for record in records):
        key, why = next(iter(records[0].quarantined.items()))
        num_images = sum(len(record.quarantined) for record in records)
        raise ValueError(f"none of the {num_images} images could be labelled, {key} because: {why}")


def _class_names(source: ImageFolder, teacher: Teacher) -> list[str]:
    if source.num_classes == teacher.num_classes:
        return source.class_names
    return teacher.class_names or [f"class {i}" for i in range(teacher.num_classes)]


def _log_plan(source: ImageFolder, teacher: Teacher, settings: dict[str, Any], count: int) -> None:
    _logger.info(
        "%d images in %s; %s at %d px (%s on %s), fit %s, top %d of %d classes",
        len(source.samples),
        "1 slice" if count == 1 else f"{count} slices",
        teacher.name,
        teacher.image_size,
        teacher.precision,
        teacher.device,
        settings["fit"],
        settings["k"],
        teacher.num_classes,
    )
    if source.num_classes not in (0, teacher.num_classes):
        _logger.warning(
            "the teacher has %d classes, %s has %d: the maps speak of the teacher's classes",
            teacher.num_classes,
            source.root,
            source.num_classes,
        )


def _log_share(rank: int, world_size: int, num_own: int, num_todo: int) -> None:
    if world_size > 1:
        _logger.info("process %d of %d takes %d of the slices", rank + 1, world_size, num_own)
    if num_todo < num_own:
        _logger.info("%d of %d slices are finished already", num_own - num_todo, num_own)
