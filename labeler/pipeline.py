"""Slices of images → label maps: the threads behind `generate`.

Threads read, decode and resize images (Pillow lets go of Python's lock for that), the calling
thread keeps the device busy, and one more thread turns what comes back from the device into bytes
and hands on finished slices. Which images share a batch depends on the slice alone, even if an
earlier run has done a part of it: so the bytes do not depend on where runs were broken off.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from .dictionary import check_dictionary
from .images import BadImage
from .interrupt import StopRequest
from .label_map import LabelMap, encode, keep_mass
from .partial import SliceWork
from .score import CellScores, Scorer, TeacherInput
from .sources import Sample

_NUM_AHEAD = 4
"""Batches that may wait for the device or for encoding before no more are prepared."""
_MAX_WAITING_BYTES = 1 << 31
"""Pixels that may wait for others of their shape; above that the largest batch goes as it is."""

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class MapCoding:
    """How the maps of an image become bytes."""

    num_classes: int
    """That the teacher chose from."""
    score_bits: int = 16
    """See label_map.encode."""
    mass: float | None = None
    """See label_map.keep_mass; None keeps all of the top-k."""
    dictionary: bytes | None = None
    """See label_map.encode."""

    def __post_init__(self) -> None:
        if self.mass is not None and not 0 < self.mass < 1:
            raise ValueError(f"mass {self.mass} is not a probability between 0 and 1, e.g. 0.99")
        if self.score_bits not in (8, 16):
            raise ValueError(f"score bits {self.score_bits} are not 8 or 16")
        if self.dictionary is not None:
            check_dictionary(self.dictionary)

    def encode(self, levels: Sequence[LabelMap]) -> bytes:
        """Encode the maps of one image, all its levels."""
        if self.mass is not None:
            levels = [keep_mass(level, self.mass) for level in levels]
        return encode(levels, score_bits=self.score_bits, dictionary=self.dictionary)


class _Image(NamedTuple):
    """An image that is to be labelled."""

    sample: Sample
    sizes: list[tuple[int, int]]
    """(height, width) of the teacher's input, px, per level."""
    inputs: list[TeacherInput | None]
    """None for levels whose scores an earlier run has left."""


class _View(NamedTuple):
    """One level of an image."""

    image: _Image
    input: TeacherInput | None


class _Batch(NamedTuple):
    """Images of one shape on one level."""

    level: int
    views: list[_View]


def label_slices(
    slices: Mapping[int, Sequence[Sample]],
    *,
    load: Callable[[Sample], list[TeacherInput]],
    scorer: Scorer,
    coding: MapCoding,
    batch_sizes: Sequence[int],
    num_workers: int,
    resume: Callable[[int], SliceWork],
    finish: Callable[[int, SliceWork], None],
    stop: StopRequest,
    progress: tqdm,
) -> None:
    """Label slices one after the other, while the images of the next are decoded already.

    Args:
        slices: The images of each slice, by its number.
        load: Makes the teacher's input of an image, one per level, or raises BadImage.
        scorer: Runs the teacher.
        coding: Of the maps.
        batch_sizes: Images in a batch, per level.
        num_workers: Threads that load.
        resume: Gives what an earlier run has left of a slice.
        finish: Takes what there is of a slice: all of it, or less once a stop was requested.
        stop: Ends the job: batches that have begun come to their end, others are dropped.
        progress: Counts images, but for those that `resume` gives.
    """
    loaders = ThreadPoolExecutor(num_workers, "load")
    writer = ThreadPoolExecutor(1, "write")
    in_flight: deque[Future[None]] = deque()
    works: dict[int, SliceWork] = {}

    def listed() -> Iterator[tuple[Sample, SliceWork]]:
        for number, samples in slices.items():
            works[number] = resume(number)
            for sample in samples:
                yield sample, works[number]

    def run(work: SliceWork, batch: _Batch) -> None:
        views = [view for view in batch.views if view.input is not None]
        while len(in_flight) >= _NUM_AHEAD + scorer.num_parallel:
            in_flight.popleft().result()
        if views and not stop.requested:
            images = np.stack([view.input.pixels for view in views if view.input])
            fetch = scorer.start(images, level=batch.level)
            in_flight.append(
                writer.submit(_record, work, _Batch(batch.level, views), fetch, coding, progress)
            )

    try:
        loaded_images = _in_order(
            loaders,
            lambda image: _load(load, *image),
            listed(),
            ahead=num_workers + 2 * batch_sizes[0],
        )
        for number, samples in slices.items():
            waiting = _Waiting(batch_sizes)
            # The samples come first: zip must not take an image from the next slice at the end.
            for sample, loaded in zip(samples, loaded_images):
                if stop.requested:
                    break
                if isinstance(loaded, str):
                    works[number].quarantined[sample.key] = loaded
                    progress.update()
                    continue
                for batch in waiting.add(loaded):
                    run(works[number], batch)
            for batch in waiting.rest():
                run(works[number], batch)
            in_flight.append(writer.submit(finish, number, works.pop(number)))
            if stop.requested:
                _logger.info("told to stop: finishing what has begun (once more stops at once)")
                scorer.drop_waiting()
                break
        while in_flight:
            in_flight.popleft().result()
    finally:
        loaders.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)


class _Waiting:
    """Images that wait until enough others of their shape have come."""

    def __init__(self, batch_sizes: Sequence[int]) -> None:
        self._batch_sizes = batch_sizes
        self._views: dict[tuple[int, int, int], list[_View]] = {}
        """Level, height and width → images, each of which has so many pixels."""
        self._num_bytes = 0

    def add(self, image: _Image) -> Iterator[_Batch]:
        """Take an image, and give the batches that it makes full."""
        for level, (height, width) in enumerate(image.sizes):
            shape = level, height, width
            self._views.setdefault(shape, []).append(_View(image, image.inputs[level]))
            # Of images that an earlier run has done, too: batches must come out as they did then.
            self._num_bytes += _num_bytes(shape)
            if len(self._views[shape]) == self._batch_sizes[level]:
                yield self._take(shape)
        while self._num_bytes > _MAX_WAITING_BYTES:
            yield self._take(max(self._views, key=lambda s: len(self._views[s]) * _num_bytes(s)))

    def rest(self) -> Iterator[_Batch]:
        """Give all that are left."""
        while self._views:
            yield self._take(next(iter(self._views)))

    def _take(self, shape: tuple[int, int, int]) -> _Batch:
        views = self._views.pop(shape)
        self._num_bytes -= len(views) * _num_bytes(shape)
        return _Batch(shape[0], views)


def _num_bytes(shape: tuple[int, int, int]) -> int:
    _, height, width = shape
    return 3 * height * width


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


def _load(
    load: Callable[[Sample], list[TeacherInput]], sample: Sample, work: SliceWork
) -> _Image | str:
    """Return the image as the teacher wants it, or why it is no good."""
    sizes = work.sizes.get(sample.key)
    if sizes is not None:
        return _Image(sample, sizes, [None] * len(sizes))
    try:
        inputs = load(sample)
    except BadImage as error:
        return str(error)
    there = work.levels.get(sample.key, {})
    return _Image(
        sample,
        [view.placement.size for view in inputs],
        [None if level in there else view for level, view in enumerate(inputs)],
    )


def _record(
    work: SliceWork,
    batch: _Batch,
    fetch: Callable[[], CellScores],
    coding: MapCoding,
    progress: tqdm,
) -> None:
    """Wait for a batch and add its maps to the slice's; encode those of images now complete."""
    try:
        found = fetch()
    except CancelledError:  # told to stop before the batch had begun
        return
    for i, (image, view) in enumerate(batch.views):
        assert view is not None
        key = image.sample.key
        if key in work.quarantined:
            continue
        if not (np.isfinite(found.scores[i]).all() and np.isfinite(found.log_normalizer[i]).all()):
            work.quarantined[key] = "the teacher's scores are not finite"
            work.levels.pop(key, None)
            progress.update()
            continue
        if batch.level == 0:
            work.best[key] = int(found.best[i])
        levels = work.levels.setdefault(key, {})
        levels[batch.level] = LabelMap(
            scores=found.scores[i],
            classes=found.classes[i].astype(np.uint32),
            num_classes=coding.num_classes,
            log_normalizer=found.log_normalizer[i],
            window=view.placement.window,
        )
        if len(levels) == len(image.sizes):
            work.maps[key] = coding.encode([levels[level] for level in sorted(levels)])
            work.sizes[key] = image.sizes
            del work.levels[key]
            progress.update()
