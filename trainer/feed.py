"""The feed: dataset shards → batches of images, the views that made them, and their label maps.

Files are read and JPEGs decoded on the CPU in any case, by DALI, only the region of the crop. What
follows runs where the batch is wanted. On a GPU DALI resizes and flips; on a CPU torch does, which
takes a fifth of the time there. Colour jitter, RandAugment and erasing are torch's on both. Every
random choice but the crop is drawn in numpy from (seed, number of the batch, place in it), so it
needs no state, is the same on every device, and is known to the code that builds the view.
docs/feed.md has more.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Int32, Int64, Num, UInt8, UInt64
from numpy.random import SeedSequence
from nvidia.dali import fn as _dali_fn
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIInterpType
from torch import Tensor

from ..labeler.geometry import PaletteMaps, compose, crop_view, flip_view
from ..labeler.label_map import LabelMapError, decode, decode_batch
from ..shards.index import ShardIndex
from .augment_draws import (
    COLOR_NUMBERS,
    ERASING_NUMBERS,
    LAYER_NUMBERS,
    Layers,
    draw_colors,
    draw_erased,
    draw_layers,
    layer_views,
    uniforms,
)
from .rand_augment import apply_layers
from .recipe import AugmentConfig

SHUFFLE_BUFFER = 4096
"""Samples among which the next one is drawn. They wait in the mapped files, not in memory."""

fn: Any = _dali_fn  # its stubs call every result one node or a list of nodes or None

_STATE_VERSION = 4
_READER = "reader"
_IMAGES_AT_ONCE = 8
"""What one thread finishes in one go on a CPU."""
_FILTERS = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}
_UNDECODABLE = re.compile(r"Failed to decode sample #\d+ : (.*)")
_UNREADABLE = re.compile(r"nvImageCodec failure|Error reading from a file|outside of the archive")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step of training or evaluation sees."""

    images: Float32[Tensor, "b 3 h w"]
    """Normalised: (value in [0, 1] - mean) / std."""
    classes: Int64[Tensor, " b"]
    views: Float32[Tensor, "b 2 3"]
    """Where the crop lies in the image; labeler/geometry.py says how to read it."""
    maps: PaletteMaps | None
    """Label maps of the whole images; None where the feed was built without labels."""
    keys: list[str]
    frames: Float32[Tensor, "b f 2 3"] | None = None
    """Crop unit square → unit square of each RandAugment layer's input. A point outside one of them
    shows the fill, not the image. None without RandAugment."""

    def __getitem__(self, which: slice) -> "Batch":
        """Take some of the images."""
        return Batch(
            images=self.images[which],
            classes=self.classes[which],
            views=self.views[which],
            maps=None if self.maps is None else self.maps[which],
            keys=self.keys[which],
            frames=None if self.frames is None else self.frames[which],
        )


def default_num_threads() -> int:
    """Return this process's share of the cores it may run on (torchrun says how many share)."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class TrainFeed:
    """Endless iterator of augmented batches; batches run on across the end of a pass.

    Within a pass over the split each sample comes exactly once, over all ranks together; the order
    of shards and the neighbours within them change from pass to pass. DALI prepares batches ahead,
    and one thread here decodes label maps and finishes one batch ahead.

    With augment.repeats = r a batch of b holds ceil(b / r) samples, r crops of each (of as many
    samples as b falls short, the last ones, r - 1), and a pass takes r times as many batches.
    """

    num_samples: int
    """Samples in one pass, over all ranks."""

    def __init__(
        self,
        index: ShardIndex,
        split: str = "train",
        *,
        image_size: tuple[int, int],
        batch_size: int,
        augment: AugmentConfig,
        device: torch.device | str = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
        with_labels: bool = True,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the shards and begin to prepare the first batch.

        Args:
            index: The data set.
            split: Which of its splits.
            image_size: Height and width of the crops in pixels.
            batch_size: Of this process.
            augment: What to do to the images; holds mean and std, too.
            device: Where batches shall lie; everything after decoding runs there.
            seed: Of all randomness; ranks draw differently from the same seed.
            rank: Of this process.
            world_size: Number of processes that share each pass.
            num_threads: DALI's CPU threads; None shares the cores evenly among local processes.
            with_labels: Whether to read label maps.
            shuffle_buffer: Samples among which the next one is drawn.
            state: What `state()` of an earlier feed returned: go on after its last batch.

        Raises:
            ValueError: If the split is unknown, has no labels though they are wanted, has fewer
                samples than there are processes, if crops are repeated more often than a batch has
                room for, or if the state belongs to another feed.
            OSError: If a shard is not there.
        """
        self.num_samples = index.split(split).num_samples
        if with_labels and not index.split(split).has_labels:
            raise ValueError(
                f"split {split!r} of {index.folder} has no label maps; pack it with --labels, "
                "or train on class labels alone (labels.dense_weight = 0, labels.class_target = "
                "'label')"
            )
        if self.num_samples < world_size:
            raise ValueError(
                f"split {split!r} of {index.folder} has {self.num_samples} samples, too few for "
                f"{world_size} processes; start at most {self.num_samples}"
            )
        self._index, self._split = index, split
        self._augment, self._image_size = augment, image_size
        red, green, blue = (min(255, round(255 * value)) for value in augment.mean)
        self._fill = (red, green, blue)
        self._batch_size, self._device = batch_size, _with_index(torch.device(device))
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._identity = {
            "version": _STATE_VERSION,
            "split": split,
            "num_samples": self.num_samples,
            "batch_size": batch_size,
            "repeats": augment.repeats,
            "device": self._device.type,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "shuffle_buffer": shuffle_buffer,
        }
        if state is not None:
            _check_state(state, self._identity)
        if augment.repeats > max(1, batch_size):
            raise ValueError(
                f"augment.repeats = {augment.repeats}: a process has only {batch_size} images in "
                "each step; allowed: at most as many"
            )
        self._num_batches: int = 0 if state is None else state["num_batches"]
        num_read = math.ceil(batch_size / augment.repeats)
        own_seeds = SeedSequence([seed, rank]).generate_state(1 + augment.repeats)
        reader_seed, *crop_seeds = own_seeds.tolist()
        common_seeds = SeedSequence(seed)  # the same on all ranks
        shard_seed = common_seeds.generate_state(1).tolist()[0]
        key = common_seeds.spawn(1)[0].generate_state(2, np.uint64)
        num_drawn = num_read * augment.repeats
        samples = range(rank * num_drawn, (rank + 1) * num_drawn)
        self._choose = _Chooser(augment, image_size, samples, key)
        self._pipeline = _train_pipeline(
            index,
            split,
            image_size=image_size,
            augment=augment,
            choose=self._choose,
            gpu=self._device.type == "cuda",
            with_labels=with_labels,
            reader={
                "shard_id": rank,
                "num_shards": world_size,
                "random_shuffle": True,
                "initial_fill": shuffle_buffer,
                "seed": reader_seed,
                "shuffle_after_epoch": True,  # the order of shards; off unless asked for
                "shuffle_after_epoch_seed": shard_seed,
            },
            crop_seeds=crop_seeds,
            options={
                **_pipeline_options(num_read, self._device, num_threads),
                "enable_checkpointing": True,
                "checkpoint": None if state is None else state["pipeline"],
            },
        )
        _build(self._pipeline, index, split)
        self._checkpoint: bytes = self._pipeline.checkpoint()
        self._worker = single_core_threads()
        self._threads = single_core_threads(num_threads or default_num_threads())
        self._ahead: Future[tuple[Batch, bytes]] = self._worker.submit(
            self._produce, self._num_batches
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._checkpoint = self._ahead.result()
        self._num_batches += 1
        self._ahead = self._worker.submit(self._produce, self._num_batches)
        if self._device.type == "cuda":
            _record_stream(batch)
        return batch

    def state(self) -> dict[str, Any]:
        """Describe the position after the last batch handed out: numbers, a string and bytes."""
        return self._identity | {"num_batches": self._num_batches, "pipeline": self._checkpoint}

    def close(self) -> None:
        """Stop the thread and free DALI's threads and memory; `state` still answers."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown()
        self.__dict__.pop("_pipeline", None)  # the last reference; a second close does nothing

    def _produce(self, num: int) -> tuple[Batch, bytes]:
        """Finish one batch; the checkpoint describes the position right after it."""
        repeats = self._augment.repeats
        outputs = _run(self._pipeline, self._index, self._split)
        checkpoint = self._pipeline.checkpoint()  # knows nothing of batches prepared ahead
        images, starts, extents = (outputs[i * repeats : (i + 1) * repeats] for i in range(3))
        shapes, classes, *labels = outputs[3 * repeats :]
        chosen = self._choose.take(num)
        keys, shards = _sources(classes, self._index.folder)
        class_indices = _class_indices(classes, keys, shards, self._index.num_classes)
        dictionary = self._index.split(self._split).dictionary
        maps = _decode_labels(labels[0], keys, shards, dictionary) if labels else None
        boxes = [
            _boxes(start.as_array(), extent.as_array(), shapes.as_array())
            for start, extent in zip(starts, extents)
        ]
        crops = crop_view(torch.cat(boxes))
        if maps is not None and repeats > 1:
            maps = maps[torch.arange(len(keys)).repeat(repeats)]
        views = compose(crops, flip_view(torch.from_numpy(chosen.flips)))
        frames = None
        if chosen.layers:
            layers = layer_views(chosen.layers, self._image_size).astype(np.float32)
            frames = _frames([torch.from_numpy(layer) for layer in layers])
            views = compose(views, frames[:, 0])
        with torch.cuda.stream(self._stream):
            batch = Batch(
                images=self._finish(images, chosen),
                classes=class_indices.repeat(repeats).to(self._device),
                views=views.to(self._device),
                maps=None if maps is None else maps.to(self._device),
                keys=keys * repeats,
                frames=None if frames is None else frames.to(self._device),
            )[: self._batch_size]
        if self._stream is not None:
            self._stream.synchronize()
        return batch, checkpoint

    def _finish(self, crops: Sequence[Any], chosen: "_Draw") -> Float32[Tensor, "b 3 h w"]:
        """Turn DALI's images into normalised ones, with all that is drawn for them."""
        if self._stream is not None:
            # A copy, for DALI reuses GPU memory in its own order, torch in torch's.
            pixels = torch.cat([torch.from_dlpack(part.as_tensor()) for part in crops])
            images = torch.empty_like(pixels, dtype=torch.float32)
            self._change(pixels, chosen, images)
            return images
        regions = [part[i] for part in crops for i in range(len(part))]
        images = torch.empty(len(regions), 3, *self._image_size)

        def work(start: int) -> None:
            few = slice(start, start + _IMAGES_AT_ONCE)
            own = chosen[few]
            pixels = torch.empty(images[few].shape, dtype=torch.uint8)
            for i, region in enumerate(regions[few]):
                resized = resize(torch.from_dlpack(region), self._image_size, own.cubic[i])
                pixels[i] = resized.flip(2) if own.flips[i] else resized
            self._change(pixels, own, images[few])

        list(self._threads.map(work, range(0, len(regions), _IMAGES_AT_ONCE)))
        return images

    def _change(
        self,
        pixels: UInt8[Tensor, "b 3 h w"],
        chosen: "_Draw",
        images: Float32[Tensor, "b 3 h w"],
    ) -> None:
        """Apply what is drawn to resized crops, and write the result into images."""
        for layers in (chosen.colors, chosen.layers):
            if layers is not None:
                apply_layers(pixels, layers, fill=self._fill)
        normalize(pixels, self._augment.mean, self._augment.std, out=images)
        _erase(images, chosen.erased, chosen.noise_seeds)


class EvalFeed:
    """Each sample of a split exactly once over all ranks, in timm's evaluation view.

    The shorter side is resized to image_size / crop_pct with antialiasing, then the centre is cut
    out. Ranks may have one sample more or less than each other, and so one batch.
    """

    num_samples: int
    """Samples in the split, over all ranks."""

    def __init__(
        self,
        index: ShardIndex,
        split: str = "val",
        *,
        image_size: tuple[int, int],
        crop_pct: float,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
    ) -> None:
        """Check the arguments; files are opened when iteration begins.

        Args:
            index: The data set.
            split: Which of its splits.
            image_size: Height and width of the views in pixels.
            crop_pct: Part of the resized shorter side that the view keeps.
            interpolation: How to resize: bicubic or bilinear.
            crop_mode: center as above; squash resizes both sides to theirs.
            mean: Subtracted from each channel, in [0, 1].
            std: Divides each channel.
            batch_size: Of this process; the last batch may be smaller.
            device: Where batches shall lie.
            rank: Of this process.
            world_size: Number of processes that share the split.
            num_threads: DALI's CPU threads; None shares the cores evenly among local processes.

        Raises:
            ValueError: If the split is unknown or an argument is out of range.
        """
        self.num_samples = index.split(split).num_samples
        _check_eval_view(crop_pct, interpolation, crop_mode)
        self._index, self._split, self._batch_size = index, split, batch_size
        self._device = _with_index(torch.device(device))
        # DALI refuses more shards than samples; ranks beyond them have nothing to do.
        num_shards = min(world_size, self.num_samples)
        first, last = (self.num_samples * (rank + i) // max(num_shards, 1) for i in (0, 1))
        self._num_local = last - first if rank < num_shards else 0
        self._options = {
            "image_size": image_size,
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "crop_mode": crop_mode,
            "mean": mean,
            "std": std,
            "gpu": self._device.type == "cuda",
            "reader": {
                "shard_id": rank,
                "num_shards": num_shards,
                "pad_last_batch": True,  # with repeats, which are cut off, not with other samples
            },
            "options": _pipeline_options(batch_size, self._device, num_threads),
        }

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return math.ceil(self._num_local / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A pipeline per pass: between passes an evaluation feed holds no memory and no threads.
        if not self._num_local:
            return
        pipeline = _eval_pipeline(self._index, self._split, **self._options)
        _build(pipeline, self._index, self._split)
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for first in range(0, self._num_local, self._batch_size):
            size = min(self._batch_size, self._num_local - first)
            images, shapes, starts, ends, classes = _run(pipeline, self._index, self._split)
            keys, shards = _sources(classes, self._index.folder)
            class_indices = _class_indices(classes, keys, shards, self._index.num_classes)
            starts, ends = starts.as_array(), ends.as_array()
            views = crop_view(_boxes(starts, ends - starts, shapes.as_array()))
            with torch.cuda.stream(stream):
                pixels = torch.from_dlpack(images.as_tensor())[:size]
                batch = Batch(
                    # A copy on a GPU, as in TrainFeed; memory of a CPU is DALI's until it is free.
                    images=pixels if stream is None else pixels.clone(),
                    classes=class_indices[:size].to(self._device),
                    views=views[:size].to(self._device),
                    maps=None,
                    keys=keys[:size],
                )
            if stream is not None:
                stream.synchronize()  # and not the stream that the model computes on
                _record_stream(batch)
            yield batch


def _check_eval_view(crop_pct: float, interpolation: str, crop_mode: str) -> None:
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct = {crop_pct}; allowed: 0 < crop_pct <= 1, e.g. 0.9")
    for name, value, allowed in (
        ("interpolation", interpolation, _FILTERS),
        ("crop_mode", crop_mode, ("center", "squash")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """The random choices for one batch."""

    flips: Bool[np.ndarray, " b"]
    cubic: Bool[np.ndarray, " b"]
    """Whether the crop is resized bicubically, not bilinearly."""
    colors: Layers | None
    """What colour jitter does; None where it is off."""
    layers: Layers | None
    """What RandAugment does; None where it is off."""
    erased: Int64[np.ndarray, "b 4"]
    """(top, left, height, width) in pixels of the crop; height 0 where nothing is erased."""
    noise_seeds: Int64[np.ndarray, " b"]
    """Of the noise in each rectangle."""

    def __getitem__(self, which: slice) -> "_Draw":
        """Take some of the images."""
        return _Draw(
            flips=self.flips[which],
            cubic=self.cubic[which],
            colors=None if self.colors is None else self.colors[which],
            layers=None if self.layers is None else self.layers[which],
            erased=self.erased[which],
            noise_seeds=self.noise_seeds[which],
        )

    def for_dali(self) -> list[np.ndarray]:
        """List the arrays in the order in which _train_pipeline takes them."""
        filters = np.where(self.cubic, _FILTERS["bicubic"].value, _FILTERS["bilinear"].value)
        return [self.flips.astype(np.int32), filters.astype(np.int32)]


class _Chooser:
    """Makes a batch's random choices, on a GPU when DALI asks for them, some batches ahead."""

    def __init__(
        self,
        config: AugmentConfig,
        image_size: tuple[int, int],
        samples: range,
        key: UInt64[np.ndarray, "2"],
    ) -> None:
        self._config, self._image_size, self._samples = config, image_size, samples
        self._key = key
        self._ahead: dict[int, _Draw] = {}

    def __call__(self, num: int) -> list[np.ndarray]:
        """Choose for batch number num; a pure function of it and of what the chooser was given.

        Returns:
            What for_dali lists for the first crop of each image, then for the second, and so on.
        """
        self._ahead[num] = self._draw(num)
        arrays = self._ahead[num].for_dali()
        by_crop = [np.split(array, self._config.repeats) for array in arrays]
        return [part for parts in zip(*by_crop) for part in parts]

    def take(self, num: int) -> _Draw:
        """Return the choices for a batch and forget them."""
        return self._ahead.pop(num, None) or self._draw(num)

    def _draw(self, num: int) -> _Draw:
        config, policy = self._config, self._config.policy
        layer_numbers = policy.num_layers * LAYER_NUMBERS if policy else 0
        widths = (3, COLOR_NUMBERS, ERASING_NUMBERS, layer_numbers)
        numbers = uniforms(self._key, num, self._samples, sum(widths))
        own, color, erasing, layers = np.split(numbers, np.cumsum(widths)[:-1], axis=1)
        kinds = ("bilinear", "bicubic") if config.interpolation == "random" else None
        is_cubic = np.array([kind == "bicubic" for kind in kinds or (config.interpolation,)])
        return _Draw(
            flips=own[:, 0] < config.hflip,
            cubic=is_cubic[np.floor(own[:, 1] * len(is_cubic)).astype(np.int64)],
            colors=draw_colors(color, config.jitter) if config.jitter else None,
            layers=draw_layers(layers, policy, config.interpolation) if policy else None,
            erased=draw_erased(erasing, config.random_erasing, self._image_size),
            noise_seeds=np.floor(own[:, 2] * 2**53).astype(np.int64),
        )


def _train_pipeline(
    index: ShardIndex,
    split: str,
    *,
    image_size: tuple[int, int],
    augment: AugmentConfig,
    choose: _Chooser,
    gpu: bool,
    with_labels: bool,
    crop_seeds: Sequence[int],
    reader: dict[str, Any],
    options: dict[str, Any],
) -> Pipeline:
    """Define images, crops' starts and extents, shapes, classes, and label maps if wanted.

    Images are crops of image_size in planes on a GPU, and the crops' decoded regions on a CPU. Of
    images, starts and extents there is one output for each of the crops of an image.
    """
    with Pipeline(**options) as pipeline:
        jpegs, classes, *labels = _read(index, split, with_labels, reader)
        shapes = fn.peek_image_shape(jpegs, dtype=DALIDataType.INT32)
        num_crops = len(crop_seeds)
        choices = list(fn.external_source(choose, num_outputs=2 * num_crops)) if gpu else []
        crops = []
        for number, crop_seed in enumerate(crop_seeds):
            starts, extents = fn.random_crop_generator(
                shapes, random_area=augment.scale, random_aspect_ratio=augment.ratio, seed=crop_seed
            )
            # Decoding stays on the CPU: with device="mixed" the decoder of a region is reported to
            # crash (NVIDIA/nvImageCodec#55), and it would take the GPU's time from the model.
            images = fn.decoders.image_slice(jpegs, start=starts, shape=extents, axis_names="HW")
            if gpu:
                flips, filters = choices[2 * number : 2 * number + 2]
                images = fn.resize(
                    images.gpu(),
                    size=image_size,
                    interp_type=fn.cast(filters, dtype=DALIDataType.INTERP_TYPE),
                    antialias=True,
                )
                images = fn.crop_mirror_normalize(  # flips, turns to planes; mean 0 and std 1
                    images, mirror=flips, dtype=DALIDataType.UINT8, output_layout="CHW"
                )
            crops.append((images, starts, extents))
        pipeline.set_outputs(
            *(node for nodes in zip(*crops) for node in nodes), shapes, classes, *labels
        )
    return pipeline


def _eval_pipeline(
    index: ShardIndex,
    split: str,
    *,
    image_size: tuple[int, int],
    crop_pct: float,
    interpolation: str,
    crop_mode: str,
    mean: Sequence[float],
    std: Sequence[float],
    gpu: bool,
    reader: dict[str, Any],
    options: dict[str, Any],
) -> Pipeline:
    """Define images, shapes, the views' starts and ends, and classes."""
    with Pipeline(**options) as pipeline:
        jpegs, classes = _read(index, split, False, reader)
        shapes, [(images, starts, ends)] = define_eval_views(
            jpegs,
            image_size=image_size,
            crop_pct=crop_pct,
            interpolation=interpolation,
            crop_mode=crop_mode,
            mean=mean,
            std=std,
            gpu=gpu,
        )
        pipeline.set_outputs(images, shapes, starts, ends, classes)
    return pipeline


def define_eval_views(
    jpegs: DataNode,
    *,
    image_size: tuple[int, int],
    crop_pct: float,
    interpolation: str,
    crop_mode: str,
    mean: Sequence[float],
    std: Sequence[float],
    gpu: bool,
    places: Sequence[tuple[float, float]] = ((0.5, 0.5),),
) -> tuple[DataNode, list[tuple[DataNode, DataNode, DataNode]]]:
    """Define timm's evaluation view of encoded images, inside a pipeline.

    Args:
        jpegs: The images' bytes.
        image_size: See EvalFeed, as for the next five.
        crop_pct: Part of the resized shorter side that the view keeps.
        interpolation: How to resize.
        crop_mode: center or squash.
        mean: Subtracted from each channel.
        std: Divides each channel.
        gpu: Whether everything behind the decoder runs on the GPU.
        places: For each view, where in the margins that it does not show it lies: (down, right)
            from 0 to 1; (0.5, 0.5) is the centre.

    Returns:
        Shapes of the images as (rows, cols, channels), and of each view its normalised pixels
        (3, h, w), and its start and end in the image as (y, x) in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_eval_view(crop_pct, interpolation, crop_mode)
    shapes = fn.peek_image_shape(jpegs, dtype=DALIDataType.INT32)
    decoded = fn.decoders.image(jpegs)
    decoded = decoded.gpu() if gpu else decoded
    views = []
    for place in places:
        starts, ends = _seen_region(shapes[:2], image_size, crop_pct, crop_mode, place)
        # The filter reads beyond the region's edge: this equals resizing all, then cropping.
        images = fn.resize(
            decoded,
            size=image_size,
            roi_start=starts,
            roi_end=ends,
            interp_type=_FILTERS[interpolation],
            antialias=True,
        )
        images = fn.crop_mirror_normalize(
            images,
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
        )
        views.append((images, starts, ends))
    return shapes, views


def _read(
    index: ShardIndex, split: str, with_labels: bool, options: dict[str, Any]
) -> list[DataNode]:
    return fn.readers.webdataset(
        paths=[str(path) for path in index.shard_paths(split)],
        index_paths=[str(path) for path in index.idx_paths(split)],
        ext=["jpg", "cls", "tlm"] if with_labels else ["jpg", "cls"],
        missing_component_behavior="error",
        tensor_init_bytes=4096,  # the default reserves 1 MiB for each place of the shuffle buffer
        name=_READER,
        **options,
    )


def _seen_region(
    side: DataNode,
    image_size: tuple[int, int],
    crop_pct: float,
    crop_mode: str,
    place: tuple[float, float],
) -> tuple[DataNode, DataNode]:
    """Where timm's evaluation view lies in an image: its start and end as (y, x) in pixels."""
    side = fn.cast(side, dtype=DALIDataType.FLOAT64)
    view = np.array(image_size, np.int32)
    resized: Any = np.floor(view / crop_pct).astype(np.int32)
    if crop_mode == "center":
        fitted = dali_math.max(side * resized[0] / side[0], side * resized[1] / side[1])
        # timm truncates the longer side of a square view and rounds both sides of any other.
        rounding = 0.0 if view[0] == view[1] else 0.5
        resized = fn.cast(dali_math.floor(fitted + rounding), dtype=DALIDataType.INT32)
    margin = resized - view
    if place == (0.5, 0.5):
        half = margin // 2
        start = half + (margin & half & 1)  # half of the margin, rounded half to even as in Python
    else:
        start = dali_math.floor(margin * np.array(place) + 0.5)
    scale = side / resized
    return (
        fn.cast(scale * start, dtype=DALIDataType.FLOAT),
        fn.cast(scale * (start + view), dtype=DALIDataType.FLOAT),
    )


def _pipeline_options(
    batch_size: int, device: torch.device, num_threads: int | None
) -> dict[str, Any]:
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; allowed: >= 1")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads = {num_threads}; allowed: >= 1, or none for all cores")
    return {
        "batch_size": batch_size,
        "num_threads": num_threads or default_num_threads(),
        "device_id": device.index if device.type == "cuda" else None,
        "py_num_workers": 0,
    }


def single_core_threads(count: int = 1) -> ThreadPoolExecutor:
    """Start threads in which torch's operations take one core, and others what they took before.

    DALI's threads keep the cores busy; a small operation split over several would wait for them.
    """
    num_threads = torch.get_num_threads()
    all_here = Barrier(count)

    def settle() -> None:
        torch.get_num_threads()  # torch sets a thread up at its first call
        torch.set_num_threads(1)

    threads = ThreadPoolExecutor(count, thread_name_prefix="feed", initializer=settle)
    list(threads.map(lambda _: all_here.wait(), range(count)))
    torch.set_num_threads(num_threads)  # for threads that start later; these have their own count
    return threads


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _build(pipeline: Pipeline, index: ShardIndex, split: str) -> None:
    try:
        pipeline.build()
    except RuntimeError as error:
        raise ValueError(
            f"DALI cannot open split {split!r} of {index.folder}: {_last_line(error)}; "
            f"`tl-shard verify {index.folder}` says which file is damaged"
        ) from error
    num_listed = pipeline.reader_meta(_READER)["epoch_size"]
    if num_listed != index.split(split).num_samples:
        raise ValueError(
            f"the .idx files of split {split!r} of {index.folder} list {num_listed} samples, "
            f"index.json {index.split(split).num_samples}; run `tl-shard verify {index.folder}`"
        )


def _run(pipeline: Pipeline, index: ShardIndex, split: str) -> tuple[Any, ...]:
    try:
        return pipeline.run()
    except RuntimeError as error:
        named = _UNDECODABLE.search(str(error))
        if not named and not _UNREADABLE.search(str(error)):
            raise
        where = named[1] if named else f"split {split!r} of {index.folder}: {_last_line(error)}"
        raise ValueError(
            f"DALI cannot decode an image of {where}; "
            f"`tl-shard verify {index.folder}` says which shards are damaged"
        ) from error


def _last_line(error: RuntimeError) -> str:
    """Pick the cause out of DALI's message, which wraps it in a trace and general remarks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(("Current pipeline", "C++ context"))]
    return causes[-1] if causes else repr(error)


def _check_state(state: Mapping[str, Any], identity: dict[str, Any]) -> None:
    differing = [name for name, value in identity.items() if state.get(name) != value]
    if differing:
        name = differing[0]
        raise ValueError(
            f"the feed's state was saved with {name} = {state.get(name)!r}, now it is "
            f"{identity[name]!r}; resume with the same data set, seed, batch size, device and "
            "number of processes"
        )


def _sources(classes: Any, folder: Path) -> tuple[list[str], list[str]]:
    """Keys and shard names of a batch, out of DALI's "PATH:OFFSET:KEY.cls"."""
    places = [
        classes[i].source_info().removeprefix(f"{folder}/").split(":", 2)
        for i in range(len(classes))
    ]
    return [place[2].removesuffix(".cls") for place in places], [place[0] for place in places]


def _class_indices(
    classes: Any, keys: list[str], shards: list[str], num_classes: int
) -> Int64[Tensor, " b"]:
    texts = [classes.at(i).tobytes() for i in range(len(classes))]
    for text, key, shard in zip(texts, keys, shards):
        if not (text.isdigit() and int(text) < num_classes):
            raise ValueError(
                f"{key}.cls in {shard} holds {text[:20]!r}, expected a class index below "
                f"{num_classes}; the shard is damaged: pack again with --overwrite"
            )
    return torch.tensor([int(text) for text in texts])


def _decode_labels(
    labels: Any, keys: list[str], shards: list[str], dictionary: bytes | None
) -> PaletteMaps:
    data = [labels.at(i).tobytes() for i in range(len(labels))]
    try:
        return PaletteMaps.from_arrays(decode_batch(data, dictionary=dictionary))
    except LabelMapError:
        for one, key, shard in zip(data, keys, shards):
            try:
                decode(one, dictionary=dictionary)
            except LabelMapError as error:
                raise ValueError(
                    f"the label map {key}.tlm in {shard} cannot be used: {error}; "
                    "`tl-shard verify` lists all damaged shards"
                ) from error
        raise


def _boxes(
    starts: Num[np.ndarray, "b 2"],
    extents: Num[np.ndarray, "b 2"],
    shapes: Int32[np.ndarray, "b 3"],
) -> Float32[Tensor, "b 4"]:
    """Crops given as (y, x) in pixels → (x0, y0, x1, y1) in image fractions."""
    corners = np.stack([starts, starts + extents], 1)[:, :, ::-1] / shapes[:, None, 1::-1]
    return torch.from_numpy(corners.reshape(-1, 4).astype(np.float32))


def resize(
    region: UInt8[Tensor, "rh rw 3"], image_size: tuple[int, int], cubic: Any
) -> UInt8[Tensor, "3 h w"]:
    """Resize a decoded region with antialiasing, as Pillow does."""
    mode = "bicubic" if cubic else "bilinear"
    planes = region.permute(2, 0, 1)[None]  # in the order of memory that torch is fast in
    return F.interpolate(planes, image_size, mode=mode, antialias=True)[0]


def normalize(
    pixels: UInt8[Tensor, "b 3 h w"],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    out: Float32[Tensor, "b 3 h w"],
) -> None:
    """Write (pixels / 255 - mean) / std into out."""
    offset, scale = (
        torch.tensor(values, device=pixels.device)[:, None, None] * 255 for values in (mean, std)
    )
    if pixels.is_cuda:
        torch.sub(pixels, offset, out=out).div_(scale)
        return
    for image, own in zip(pixels, out):  # what one step writes the next finds in the core's cache
        own.copy_(image).sub_(offset).div_(scale)


def _frames(layers: Sequence[Float32[Tensor, "b 2 3"]]) -> Float32[Tensor, "b f 2 3"]:
    """Crop unit square → the input of each layer, first layer first."""
    frames = [layers[-1]]
    for layer in reversed(layers[:-1]):
        frames.insert(0, compose(layer, frames[0]))
    return torch.stack(frames, 1)


def _erase(
    images: Float32[Tensor, "b 3 h w"],
    rectangles: Int64[np.ndarray, "b 4"],
    seeds: Int64[np.ndarray, " b"],
) -> None:
    """Fill rectangles with normal noise, in place."""
    generator = torch.Generator(images.device)
    for image, rectangle, seed in zip(images, rectangles.tolist(), seeds.tolist()):
        top, left, height, width = rectangle
        if height:
            generator.manual_seed(seed)
            noise = torch.randn(3, height, width, generator=generator, device=images.device)
            image[:, top : top + height, left : left + width] = noise


def _record_stream(batch: Batch) -> None:
    """Tell torch's allocator that the batch, made on another stream, is used on this one."""
    tensors = [batch.images, batch.classes, batch.views, batch.frames]
    tensors += [] if batch.maps is None else list(vars(batch.maps).values())
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
