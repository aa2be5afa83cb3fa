"""Images → label shards: the job behind `tl-label generate`.

The sorted list of images is cut into slices. A slice is the unit of work and of resume: process r
of n takes slices r, r + n, …, writes each under a temporary name and renames it. Whoever finds
that all slices are there writes index.json. Processes talk to each other through the output folder
alone, so any of them may die at any moment and the same command goes on. One that is asked to stop
(SIGTERM, Ctrl-C) also leaves what it has of the slice it was at.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from tqdm import tqdm

from .classes import check_classes, classes_of
from .dictionary import to_settings
from .folder import Location
from .interrupt import StopRequest
from .label_set import (
    Slice,
    check_output,
    is_whole,
    read_slices,
    remove_index,
    remove_slices,
    totals,
    write_index,
    write_slice,
)
from .partial import (
    SliceWork,
    list_partials,
    read_partial,
    remove_partial,
    remove_partials,
    save_partial,
)
from .pipeline import MapCoding, label_slices
from .score import (
    Scorer,
    check_scoring,
    default_batch_size,
    default_workers,
    level_batch_sizes,
    level_sizes,
    load_inputs,
    tile_side,
)
from .sources import ImageFolder, Sample
from .teacher import Teacher

DEFAULT_SHARD_SIZE = 10_000
"""About 50 MB of label maps, and half a minute of an H100 with NFNet-F6: little to lose by a
kill, few files (129 tars for ImageNet), and enough slices to keep a hundred processes busy."""

_SYSTEMIC = 32
"""A slice of so many images of which none can be labelled points at the cause, not at them."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did, and what the label set holds."""

    out: Location
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
    """Slices that are not there yet, those of other processes too; index.json is written when it
    is 0."""
    was_stopped: bool
    """Whether SIGTERM or Ctrl-C kept this process from finishing its share."""
    num_kept: int
    """Images of its unfinished slices that need not be labelled again."""


def generate(
    source: ImageFolder,
    out: Location,
    *,
    teacher: Teacher,
    fit: str = "native",
    levels: Sequence[int] = (),
    tiles: bool = False,
    top_k: int = 5,
    mass: float | None = None,
    score_bits: int = 16,
    dictionary: bytes | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Write label maps of all images of a source; go on where an earlier run was broken off.

    SIGTERM, or Ctrl-C once, ends it early and in good order: batches that have begun are finished,
    and what there is of an unfinished slice is kept for the next run.

    Args:
        source: The images.
        out: Folder of the label set, or a URL of one as a str.
        teacher: Scores the cells.
        fit: How images meet the teacher, see fit.FITS.
        levels: Sides of the teacher's square image, px, rising: a map is made at each of them. The
            first is teacher.image_size; none means that alone.
        tiles: Levels above the first see the image in overlapping tiles of the first one's side.
        top_k: Classes kept per cell.
        mass: Keep fewer classes where fewer have this probability together, see
            label_map.keep_mass.
        score_bits: 16 or 8, see label_map.encode.
        dictionary: A zstd dictionary to encode with. It is stored in the label set.
        batch_size: Images per forward pass; None means 64 on a GPU and 4 on the CPU. Larger levels
            take as many fewer as they have more pixels.
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
    sizes = level_sizes(teacher, levels)
    tile_px = tile_side(sizes) if tiles else None
    check_classes(source, teacher.classes, teacher.space)
    check_scoring(teacher, fit=fit, top_k=top_k)
    if shard_size < 1:
        raise ValueError(f"shard size {shard_size} is not a number of images, 1 or more")
    coding = MapCoding(
        num_classes=teacher.num_classes, score_bits=score_bits, mass=mass, dictionary=dictionary
    )
    settings = _settings(source, teacher, fit, top_k, shard_size)
    settings |= _optional_settings(sizes, tiles, mass, score_bits, dictionary)
    slices = _slices(source.samples, shard_size)
    check_output(out)
    _make_way(out, settings, overwrite)
    finished = _finished(out, settings)
    own = range(rank, len(slices), world_size)
    todo = [n for n in own if n not in finished or not is_whole(out, finished[n])]
    remove_slices(out, todo)
    if todo:
        remove_index(out)
    _log_plan(source, teacher, settings, len(slices))
    num_own = sum(len(slices[number]) for number in own)
    num_begun = _num_kept(out, settings, todo)
    num_done = num_own - sum(len(slices[number]) for number in todo) + num_begun
    _log_share(rank, world_size, len(own), len(todo), num_begun)
    start_secs = time.monotonic()
    with (
        tqdm(
            desc="label",
            total=num_own,
            initial=num_done,
            unit="img",
            smoothing=0.05,
            # Bars of several processes on one terminal would overwrite each other.
            disable=None if os.environ.get("LOCAL_RANK", "0") == "0" else True,
        ) as progress,
        StopRequest() as stop,
        Scorer(teacher, top_k=top_k, tile_px=tile_px) as scorer,
    ):
        label_slices(
            {number: slices[number] for number in todo},
            load=partial(load_inputs, source, teacher=teacher, fit=fit, sizes=sizes),
            scorer=scorer,
            coding=coding,
            batch_sizes=level_batch_sizes(
                sizes, batch_size or default_batch_size(teacher), tile_px=tile_px
            ),
            num_workers=num_workers or default_workers(),
            resume=partial(read_partial, out, settings=settings),
            finish=partial(
                _finish, out, settings, slices, teacher.num_classes == source.num_classes, progress
            ),
            stop=stop,
            progress=progress,
        )
    secs = time.monotonic() - start_secs
    finished = _finished(out, settings)
    if len(finished) == len(slices):
        # Those of other processes may stem from an earlier run, and nobody has looked at them yet.
        finished = {n: r for n, r in finished.items() if n in own or is_whole(out, r)}
    num_unfinished = len(slices) - len(finished)
    records = [finished[n] for n in finished if n in own or not num_unfinished]
    unfinished = [number for number in own if number not in finished]
    num_kept = _num_kept(out, settings, unfinished)
    total = totals(records)
    if not num_unfinished:
        _check_any_labelled(records)
        write_index(out, records, settings=settings, class_names=_class_names(source, teacher))
        remove_partials(out)
    return Summary(
        out=out,
        num_listed=total["num_labelled"] + total["num_quarantined"],
        num_labelled=total["num_labelled"],
        quarantined={key: why for record in records for key, why in record.quarantined.items()},
        map_bytes=total["map_bytes"],
        num_correct=total["num_correct"],
        num_new=num_own - sum(len(slices[n]) for n in unfinished) + num_kept - num_done,
        secs=secs,
        num_slices=len(slices),
        num_unfinished=num_unfinished,
        was_stopped=stop.requested and bool(unfinished),
        num_kept=num_kept,
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


def parse_levels(text: str) -> list[int]:
    """Read image sizes like "448,640,896".

    Raises:
        ValueError: If the text is anything else.
    """
    sizes = [size.strip() for size in text.split(",")]
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"levels {text!r} are not sizes in px like 448,640,896")
    return [int(size) for size in sizes]


def local_device(device: str) -> str:
    """Give each process that torchrun starts on a machine a GPU of its own.

    "auto" and "cuda" become "cuda:LOCAL_RANK" where there are GPUs; the rest stays as it is.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local_rank}"


def _finish(
    out: Location,
    settings: dict[str, Any],
    slices: Sequence[Sequence[Sample]],
    knows_folders: bool,
    progress: tqdm,
    number: int,
    work: SliceWork,
) -> None:
    """Write a slice whose images are all done; keep what there is of one that is broken off."""
    samples = slices[number]
    keys = [sample.key for sample in samples]
    if len(work.maps) + len(work.quarantined) < len(keys):
        save_partial(out, number, work, settings)
        return
    if not work.maps and len(keys) >= _SYSTEMIC:
        raise ValueError(
            f"none of the {len(keys)} images from {keys[0]} on could be labelled, "
            f"{keys[0]} because: {work.quarantined[keys[0]]}"
        )
    num_correct = sum(
        work.best[sample.key] == sample.class_index for sample in samples if sample.key in work.maps
    )
    write_slice(
        out,
        number,
        [(key, work.maps[key]) for key in keys if key in work.maps],
        settings=settings,
        quarantined={key: work.quarantined[key] for key in keys if key in work.quarantined},
        num_correct=num_correct if knows_folders else None,
    )
    remove_partial(out, number)
    _logger.log(
        # Where there is no bar, in the log of a cluster's job, these lines are the progress.
        logging.INFO if progress.disable else logging.DEBUG,
        "slice %d is finished: %d images labelled, %d left out",
        number,
        len(work.maps),
        len(work.quarantined),
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
            **(teacher.space.to_settings() if teacher.space else {}),
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


def _optional_settings(
    sizes: Sequence[int],
    tiles: bool,
    mass: float | None,
    score_bits: int,
    dictionary: bytes | None,
) -> dict[str, Any]:
    """Return what also decides the bytes, of what is not as it is by default."""
    settings: dict[str, Any] = {}
    if len(sizes) > 1:
        settings["levels"] = list(sizes)
    if tiles:
        settings["tiles"] = True
    if mass is not None:
        settings["mass"] = mass
    if score_bits != 16:
        settings["score_bits"] = score_bits
    if dictionary is not None:
        settings |= to_settings(dictionary)
    return settings


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


def _make_way(out: Location, settings: dict[str, Any], overwrite: bool) -> None:
    """Remove what other settings made, if that is allowed."""
    there = [(record.number, record.settings) for record in read_slices(out)]
    there += [(number, head.settings) for number, head in list_partials(out).items()]
    for number, theirs in there:
        if theirs == settings:
            continue
        if not overwrite:
            raise ValueError(
                f"{out} holds labels of another run ({_difference(theirs, settings)}); "
                "give --overwrite to replace them, or another --out"
            )
        remove_index(out)
        remove_slices(out, [number])
        remove_partial(out, number)


def _num_kept(out: Location, settings: dict[str, Any], numbers: Iterable[int]) -> int:
    """Count the images of unfinished slices of which a stopped run has left the map."""
    heads = list_partials(out)
    there = [heads[number] for number in numbers if number in heads]
    return sum(head.num_maps for head in there if head.settings == settings)


def _finished(out: Location, settings: dict[str, Any]) -> dict[int, Slice]:
    """Return the slices whose .json is there and sound; ascending."""
    return {r.number: r for r in read_slices(out) if r.settings == settings}


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
    own = classes_of(source)
    if own.num == teacher.num_classes and (own.is_known or not teacher.class_names):
        return source.class_names
    return teacher.class_names or [f"class {i}" for i in range(teacher.num_classes)]


def _log_plan(source: ImageFolder, teacher: Teacher, settings: dict[str, Any], count: int) -> None:
    _logger.info(
        "%d images in %s; %s at %s px (%s on %s), fit %s, top %d of %d classes",
        len(source.samples),
        "1 slice" if count == 1 else f"{count} slices",
        teacher.name,
        ", ".join(map(str, settings.get("levels", [teacher.image_size]))),
        teacher.precision,
        teacher.device,
        settings["fit"],
        settings["k"],
        teacher.num_classes,
    )


def _log_share(rank: int, world_size: int, num_own: int, num_todo: int, num_begun: int) -> None:
    if world_size > 1:
        _logger.info("process %d of %d takes %d of the slices", rank + 1, world_size, num_own)
    if num_todo < num_own:
        _logger.info("%d of %d slices are finished already", num_own - num_todo, num_own)
    if num_begun:
        _logger.info("%d images of unfinished slices are labelled already", num_begun)
