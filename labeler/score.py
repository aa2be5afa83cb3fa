"""Images → what the teacher says of every cell, in batches, on any device.

`load_inputs` makes of one image what the teacher is shown, at one size or several. A `Scorer`
starts batches of such inputs on the teacher's device and hands back the best classes of every cell.

On a CPU every batch is computed by one thread, and as many batches at a time as torch has threads.
That takes less time in all than cutting up each convolution, and the scores do not depend on the
number of threads.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Int32, UInt8
from torch import Tensor

from .fit import Placement, check_fit, place, resize
from .images import BadImage, load_image
from .sources import ImageSource, Sample
from .teacher import Teacher, round_to_stride

_MAX_LOGITS = 1 << 27
"""Logits of a batch are made in pieces of this many numbers (512 MB) at most."""


_TILE_STEP = 0.65
"""From one tile to the next, at most, as a fraction of a tile. At 0.5 labels agree no better with
the teacher, for a third more time; without overlap they agree less."""


class TeacherInput(NamedTuple):
    """An image as the teacher is shown it."""

    pixels: UInt8[np.ndarray, "h w 3"]
    placement: Placement


@dataclass(frozen=True, slots=True)
class CellScores:
    """The best classes of every cell of a batch of images."""

    classes: Int32[np.ndarray, "b k rows cols"]
    best: Int32[np.ndarray, " b"]
    """The class that the whole image gets: that of the mean over all cells."""
    scores: Float16[np.ndarray, "b k rows cols"]
    """Logits, descending along k."""
    log_normalizer: Float16[np.ndarray, "b rows cols"]
    """Logsumexp over all classes."""


def level_sizes(teacher: Teacher, levels: Sequence[int]) -> list[int]:
    """Return the sides of the teacher's square image on each level, px, in whole cells.

    Args:
        teacher: Its image_size must be the first level.
        levels: Sides in px, rising; none means image_size alone.

    Raises:
        ValueError: If they do not rise, or the teacher does not take them.
    """
    if not levels:
        return [teacher.image_size]
    given = ",".join(str(size) for size in levels)
    if min(levels) < 1:
        raise ValueError(f"levels {given}: each is the side of an image, 1 px or more")
    sizes = [round_to_stride(size, teacher.stride) for size in levels]
    if any(larger <= smaller for smaller, larger in zip(sizes, sizes[1:])):
        raise ValueError(
            f"levels {given} come to {','.join(map(str, sizes))} px in whole cells of "
            f"{teacher.stride} px; each must be larger than the one before"
        )
    if teacher.square_only and sizes != [teacher.image_size]:
        raise ValueError(
            f"teacher {teacher.name} takes images of {teacher.image_size}x{teacher.image_size} px "
            f"alone and cannot make levels {given}; leave them out, or choose a teacher that "
            "takes other sizes"
        )
    if sizes[0] != teacher.image_size:
        raise ValueError(
            f"levels {given}: the first is not {teacher.image_size} px, the size that teacher "
            f"{teacher.name} was loaded for"
        )
    return sizes


def check_scoring(teacher: Teacher, *, fit: str, top_k: int) -> None:
    """Check that a teacher can score images so.

    Raises:
        ValueError: Unknown fit, k not in 1 to 255 or above the classes, a size it does not take.
    """
    check_fit(fit)
    most = min(255, teacher.num_classes)
    if not 1 <= top_k <= most:
        raise ValueError(
            f"top-k {top_k} is not between 1 and {most}: {teacher.name} has "
            f"{teacher.num_classes} classes, and a map keeps 255 at most"
        )
    if fit == "native" and teacher.square_only:
        size = teacher.image_size
        raise ValueError(
            f"teacher {teacher.name} takes images of {size}x{size} px alone; give --fit stretch "
            "(the whole image) or --fit center (its middle)"
        )


def level_batch_sizes(
    sizes: Sequence[int], batch_size: int, *, tile_px: int | None = None
) -> list[int]:
    """Return how many images share a forward pass on each level: all take about the same memory.

    Args:
        sizes: From level_sizes.
        batch_size: On the first level.
        tile_px: See Scorer.
    """
    seen = [size if tile_px is None else tile_px * num_tiles(size, tile_px) for size in sizes]
    return [max(1, batch_size * sizes[0] ** 2 // side**2) for side in seen]


def tile_side(sizes: Sequence[int]) -> int:
    """Return the side of tiles, px, for levels of these sizes: the first.

    Raises:
        ValueError: If there is no level above it.
    """
    if len(sizes) < 2:
        raise ValueError("tiles are for levels above the first; give --levels, e.g. 448,896")
    return sizes[0]


def num_tiles(side_px: int, tile_px: int) -> int:
    """Return how many tiles cover a side; neighbours share about a third or more of themselves."""
    beyond = max(0, side_px - tile_px)
    return 1 + math.ceil(beyond / (_TILE_STEP * tile_px))


def tiled_cells(
    teacher: Teacher, images: UInt8[Tensor, "b 3 h w"], tile_px: int
) -> Float[Tensor, "b rows cols d"]:
    """Return the features of every cell, as the teacher sees it in a tile of the image.

    A teacher that sees the whole image at four times its size knows from the surroundings what a
    part is. A student that is given the part alone does not, nor does the teacher then. Where
    tiles overlap, their features are averaged, the more of a tile's the closer to its middle.

    Args:
        teacher: Scores the cells.
        images: Sides are multiples of its stride.
        tile_px: Side of a tile, a multiple of the stride; an image's own side if that is shorter.
    """
    rows, cols = (side // teacher.stride for side in images.shape[2:])
    tile = [min(tile_px // teacher.stride, side) for side in (rows, cols)]
    weight = _tent(tile[0])[:, None] * _tent(tile[1])
    weight = weight.to(images.device)[..., None]
    sums: Tensor | None = None
    for top in _tile_starts(rows, tile[0]):
        for left in _tile_starts(cols, tile[1]):
            area = slice(top, top + tile[0]), slice(left, left + tile[1])
            y, x = (slice(s.start * teacher.stride, s.stop * teacher.stride) for s in area)
            cells = teacher.cells(images[:, :, y, x]).float()
            if sums is None:
                sums = cells.new_zeros(len(images), rows, cols, cells.shape[3] + 1)
            sums[:, area[0], area[1], :-1] += cells * weight
            sums[:, area[0], area[1], -1:] += weight
    assert sums is not None
    return sums[..., :-1] / sums[..., -1:]


def _tile_starts(num_cells: int, tile_cells: int) -> list[int]:
    """First cells of the tiles along a side, evenly spread from end to end."""
    count = num_tiles(num_cells, tile_cells)
    beyond = num_cells - tile_cells
    return [round(i * beyond / max(1, count - 1)) for i in range(count)]


def _tent(num_cells: int) -> Float[Tensor, " n"]:
    """Weights that fall from the middle of a tile to its ends, but not to nothing."""
    places = (torch.arange(num_cells) + 0.5) / num_cells
    return (1 - (2 * places - 1).abs()).clamp(min=0.01)


def load_inputs(
    source: ImageSource, sample: Sample, *, teacher: Teacher, fit: str, sizes: Sequence[int]
) -> list[TeacherInput]:
    """Read and decode an image once, and resize it for the teacher to each of several sizes.

    Args:
        source: Where the image is.
        sample: Which one.
        teacher: Who will look at it.
        fit: How it meets the teacher, see fit.FITS.
        sizes: Sides of the teacher's square image, px; each is teacher.image_size in its turn.

    Raises:
        BadImage: If this one image is no good; the message is one line that says why.
        OSError: If the storage fails, which concerns all images.
    """
    try:
        image = load_image(source.read(sample))
    except (FileNotFoundError, PermissionError) as error:
        # Of this file alone. What concerns all, a lost mount or a dying disk, stops the job.
        raise BadImage(f"cannot be read: {error.strerror}") from error
    inputs = []
    for size in sizes:
        placement = place(image.size, fit=fit, teacher_size=size, stride=teacher.stride)
        pixels = resize(image, placement, interpolation=teacher.interpolation)
        inputs.append(TeacherInput(pixels, placement))
    return inputs


class Scorer:
    """Runs a teacher on batches of images, several of them under way at a time.

    A context manager: threads of its own end with it.
    """

    def __init__(self, teacher: Teacher, *, top_k: int, tile_px: int | None = None) -> None:
        """Start the threads that a CPU needs.

        Args:
            teacher: Scores the cells.
            top_k: Classes kept per cell, 1 to teacher.num_classes.
            tile_px: Above the first level, images are seen in overlapping tiles of this side;
                None: whole.
        """
        self._start = partial(start_batch, teacher, top_k=top_k)
        self._tile_px = tile_px
        on_cpu = teacher.device.type == "cpu"
        self.num_parallel = torch.get_num_threads() if on_cpu else 1
        """Batches that are computed at the same time; the others wait for them."""
        self._threads = (
            ThreadPoolExecutor(self.num_parallel, "score", torch.set_num_threads, (1,))
            if on_cpu
            else None
        )
        if teacher.device.type == "cuda":  # for what names no device: pinned memory and events
            torch.cuda.set_device(teacher.device)

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def start(
        self, images: UInt8[np.ndarray, "b h w 3"], *, level: int = 0
    ) -> Callable[[], CellScores]:
        """Start the teacher on a batch of images on one level.

        Returns:
            A function that waits for the device and returns the scores. It raises ValueError if
            the batch does not fit into the device's memory, CancelledError (concurrent.futures)
            after drop_waiting.
        """
        tile_px = self._tile_px if level > 0 else None
        if self._threads is None:
            return self._start(images, tile_px=tile_px)
        computed = self._threads.submit(self._start, images, tile_px=tile_px)
        return lambda: computed.result()()

    def drop_waiting(self) -> None:
        """Drop the batches that a CPU has not begun; no others can be started afterwards."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def start_batch(
    teacher: Teacher,
    images: UInt8[np.ndarray, "b h w 3"],
    *,
    top_k: int,
    tile_px: int | None = None,
) -> Callable[[], CellScores]:
    """Start the teacher on a batch: on a GPU without waiting for it, on a CPU to the end.

    Args:
        teacher: Scores the cells.
        images: Sides are multiples of its stride.
        top_k: Classes kept per cell.
        tile_px: See tiled_cells; None: each image is seen whole.

    Returns:
        A function that waits for the device and returns the scores.

    Raises:
        ValueError: If the batch does not fit into the device's memory.
    """
    batch = torch.from_numpy(images)
    on_gpu = teacher.device.type == "cuda"
    if on_gpu:
        batch = batch.pin_memory()
    try:
        batch = batch.to(teacher.device, non_blocking=True).permute(0, 3, 1, 2)
        cells = teacher.cells(batch) if tile_px is None else tiled_cells(teacher, batch, tile_px)
        num_logits = cells[0, ..., 0].numel() * teacher.num_classes
        pieces = cells.split(max(1, _MAX_LOGITS // num_logits))
        reduced = [reduce_to_top_k(teacher.classify(piece), top_k) for piece in pieces]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{len(images)} images of {images.shape[2]}x{images.shape[1]} px do not fit into the "
            f"memory of {teacher.device}; give a smaller --batch-size"
        ) from error
    parts = [torch.cat(part).contiguous() for part in zip(*reduced)]
    # One copy for all, and no wait: the memory it goes to is pinned.
    host = torch.cat([part.flatten().view(torch.uint8) for part in parts]).to(
        "cpu", non_blocking=True
    )
    done = torch.cuda.Event() if on_gpu else None
    if done is not None:
        done.record()

    def fetch() -> CellScores:
        if done is not None:
            done.synchronize()
        rest = host.numpy()
        arrays = []
        for part in parts:
            data, rest = np.split(rest, [part.numel() * part.element_size()])
            dtype = np.int32 if part.dtype == torch.int32 else np.float16
            arrays.append(data.view(dtype).reshape(part.shape))
        return CellScores(*arrays)

    return fetch


def reduce_to_top_k(logits: Float[Tensor, "b rows cols c"], top_k: int) -> tuple[Tensor, ...]:
    """Reduce logits to the fields of CellScores, in their order, on the logits' device.

    The wider types come first: laid one after the other, all of them are aligned.
    """
    scores, classes = logits.topk(top_k, dim=-1)
    return (
        classes.permute(0, 3, 1, 2).int(),
        logits.mean((1, 2)).argmax(-1).int(),
        scores.permute(0, 3, 1, 2).half(),
        logits.logsumexp(-1).half(),
    )


def default_batch_size(teacher: Teacher) -> int:
    """Return how many images share a forward pass: 64 on a GPU, 4 on a CPU."""
    return 4 if teacher.device.type == "cpu" else 64


def default_workers() -> int:
    """Return how many threads decode: one per core, shared fairly by torchrun's processes here."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // num_processes)
