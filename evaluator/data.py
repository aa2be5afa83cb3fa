"""Images to evaluate on, from wherever they are, as a model sees them.

Packed data sets and all that open_source lists are read alike, and either decoder takes any of
them: Pillow and timm's transforms, the way papers are measured, or DALI, the way runs are. Batches
are cut before they are shared out, so that an image meets the same neighbours on any number of
processes.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from nvidia.dali import fn as _dali_fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from ..labeler.images import BadImage, load_image, portable_pixels
from ..labeler.sources import ImageSource, Sample, open_source
from ..shards.index import INDEX_NAME, ShardIndex, read_index
from ..shards.relabel import stored_samples
from ..trainer.distributed import Place
from ..trainer.feed import default_num_threads, define_eval_views, single_core_threads

Decoder = Literal["pil", "dali"]
DECODERS: tuple[Decoder, ...] = ("pil", "dali")
DEFAULT_SPLIT = "val"

fn: Any = _dali_fn  # its stubs call every result one node or a list of nodes or None

_UNDECODABLE = re.compile(
    r"Failed to decode|nvImageCodec failure|image_shape|[Uu]nrecognized image|[Uu]nsupported image"
)


@dataclass(frozen=True, kw_only=True)
class EvalView:
    """What a model sees of an image, in timm's terms."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    crop_pct: float
    """Part of the resized image's shorter side that is seen."""
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: str = "center"
    """"center" keeps the image's shape, "squash" does not."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EvalData:
    """A set of images in its own order."""

    source: ImageSource
    split: str | None
    """None for images that are no data set of ours."""

    @property
    def is_packed(self) -> bool:
        """Whether tl-shard pack has made sure that each image is a plain, whole JPEG."""
        return self.split is not None


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images as a model sees them; without any where none of a batch can be read."""

    places: list[int]
    """Of the images in the data set."""
    images: Float32[Tensor, "b crops 3 h w"]
    """Normalised: (value in [0, 1] - mean) / std."""


# ------------------------------------------------------------------------------------ images


def open_data(
    data: Path | str,
    *,
    split: str | None = None,
    classes: Path | None = None,
    root: Path | str | None = None,
) -> EvalData:
    """List the images of a data set of tl-shard, or of any source, see open_source.

    Args:
        data: Folder of dataset shards, or a source.
        split: Of the shards; left out: val.
        classes: For other sources: a classes file elsewhere than in their root.
        root: Of a list: see open_source.

    Raises:
        ValueError: An option that this kind of data does not have, an unknown split, or whatever
            is wrong with the data.
        OSError: It is not there.
    """
    if (Path(data) / INDEX_NAME).exists():
        for option, value in (("--classes", classes), ("--root", root)):
            if value is not None:
                raise ValueError(f"{option} is for other sources; {data} holds dataset shards")
        split = split or DEFAULT_SPLIT
        return EvalData(source=_source_of(read_index(Path(data)), split), split=split)
    if split is not None:
        raise ValueError(
            f"--split {split} is for dataset shards, but {data} has no {INDEX_NAME}; for class "
            "folders give the split's own folder as --data"
        )
    return EvalData(source=open_source(data, classes=classes, root=root), split=None)


def _source_of(index: ShardIndex, split: str) -> ImageSource:
    """List the images of packed shards, in the order in which they lie there."""
    samples = []
    for path in index.shard_paths(split):
        for stored in stored_samples(path):
            if not (stored.cls.isdigit() and int(stored.cls) < index.num_classes):
                raise ValueError(
                    f"{stored.key}.cls in {path} holds {stored.cls[:20]!r}, expected a class index "
                    f"below {index.num_classes}; the shard is damaged: pack again with --overwrite"
                )
            samples.append(
                Sample(stored.key, str(path), int(stored.cls), stored.offset, stored.num_bytes)
            )
    if len(samples) != index.split(split).num_samples:
        raise ValueError(
            f"the shards of split {split!r} of {index.folder} hold {len(samples)} samples, "
            f"index.json says {index.split(split).num_samples}; run `tl-shard verify "
            f"{index.folder}`"
        )
    return ImageSource(str(index.folder), samples, index.class_ids, index.class_names)


# ------------------------------------------------------------------------------------- views


def crop_places(num_crops: int) -> list[tuple[float, float]]:
    """Say where crops lie in what one crop does not show, as fractions (down, right).

    Args:
        num_crops: 1 is the centre, 5 the centre and the corners, a square number a grid.

    Raises:
        ValueError: Another number.
    """
    side = math.isqrt(max(num_crops, 0))
    if num_crops == 1:
        return [(0.5, 0.5)]
    if num_crops == 5:
        return [(0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    if num_crops < 1 or side**2 != num_crops:
        raise ValueError(
            f"--crops {num_crops} is not possible; 1 is the centre, 5 the centre and the corners, "
            "4, 9, 16, … a grid"
        )
    steps = [i / (side - 1) for i in range(side)]
    return list(itertools.product(steps, steps))


def seen_box(image_hw: tuple[int, int], view: EvalView) -> tuple[float, float, float, float]:
    """Say which part of an image timm's transform shows: (x0, y0, x1, y1) in image fractions."""
    scaled = [math.floor(length / view.crop_pct) for length in view.image_size]
    if view.crop_mode == "squash":
        resized = scaled
    elif scaled[0] == scaled[1]:
        resized = [int(scaled[0] * length / min(image_hw)) for length in image_hw]
    else:
        ratio = min(length / scale for length, scale in zip(image_hw, scaled))
        resized = [round(length / ratio) for length in image_hw]
    starts = [round((whole - part) / 2) for whole, part in zip(resized, view.image_size)]
    y0, x0 = (start / whole for start, whole in zip(starts, resized))
    y1, x1 = (
        (start + part) / whole for start, part, whole in zip(starts, view.image_size, resized)
    )
    return x0, y0, x1, y1


class PilView:
    """timm's own evaluation transform, at one place or several."""

    def __init__(self, view: EvalView, *, num_crops: int = 1) -> None:
        """Take a view apart into resizing, cutting and normalising."""
        height, width = view.image_size
        transform: Any = create_transform(
            height if height == width else view.image_size,
            interpolation=view.interpolation,
            crop_pct=view.crop_pct,
            crop_mode=view.crop_mode,
            mean=view.mean,
            std=view.std,
        )
        self._resize, self._size = transform.transforms[0], view.image_size
        self._places = crop_places(num_crops)
        self._mean, self._std = (
            torch.tensor(values).view(3, 1, 1) for values in (view.mean, view.std)
        )

    def cut(self, image: Image.Image) -> UInt8[np.ndarray, "crops 3 h w"]:
        """Resize an image and cut the crops out of it."""
        resized = np.asarray(self._resize(image))
        height, width = self._size
        margins = (resized.shape[0] - height, resized.shape[1] - width)
        crops = []
        for place in self._places:
            top, left = (_start(margin, part) for margin, part in zip(margins, place))
            crops.append(resized[top : top + height, left : left + width].transpose(2, 0, 1))
        return np.stack(crops)

    def normalize(self, crops: UInt8[Tensor, "*b 3 h w"]) -> Float32[Tensor, "*b 3 h w"]:
        """Turn pixels into what the model takes."""
        mean, std = self._mean.to(crops.device), self._std.to(crops.device)
        return crops.float().div_(255).sub_(mean).div_(std)


def _start(margin: int, part: float) -> int:
    """Where a crop begins; torchvision rounds the half of a centre crop to even."""
    return round(margin / 2) if part == 0.5 else math.floor(margin * part + 0.5)


# ------------------------------------------------------------------------------------- feeds


class EvalImages:
    """This process's share of a data set's images, as a model sees them; one pass or many.

    Images that cannot be read are left out and noted.
    """

    unreadable: dict[str, str]
    """Key of each image of this process that the last pass could not read → why."""

    def __init__(
        self,
        data: EvalData,
        view: EvalView,
        *,
        decoder: Decoder,
        batch_size: int,
        place: Place,
        num_crops: int = 1,
        num_workers: int | None = None,
    ) -> None:
        """Share the batches out; files are opened when iteration begins.

        Args:
            data: The images.
            view: How they are seen.
            decoder: "pil" or "dali". DALI gets JPEGs as they are, of other files the pixels that
                Pillow read; its interpolation is bilinear or bicubic.
            batch_size: Images of a batch.
            place: This process among all, and where batches shall lie.
            num_crops: Of each image, see crop_places.
            num_workers: Threads that read; None takes this process's cores.

        Raises:
            ValueError: If an argument is out of range.
        """
        self.unreadable = {}
        self._data, self._place = data, place
        self._num_crops, self._image_size = num_crops, view.image_size
        first_places = range(
            place.rank * batch_size, len(data.source.samples), place.world_size * batch_size
        )
        num_all = len(data.source.samples)
        self._batches = [range(i, min(i + batch_size, num_all)) for i in first_places]
        self._num_workers = num_workers or default_num_threads()
        self._read: Callable[[bytes], Any]
        self._finish: Callable[[list[Any]], Sequence[Tensor | str]]
        if decoder == "pil":
            to_view = PilView(view, num_crops=num_crops)
            self._read = lambda data: to_view.cut(load_image(data))
            self._finish = lambda crops: _normalized(crops, to_view, place.device)
        else:
            self._read = bytes if data.is_packed else portable_pixels
            self._finish = _DaliDecoder(
                view,
                places=crop_places(num_crops),
                batch_size=batch_size,
                device=place.device,
                num_threads=self._num_workers,
            )

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.unreadable = {}
        with (
            ThreadPoolExecutor(self._num_workers, "read") as readers,
            single_core_threads() as decoder,
        ):
            ahead: list[Future[ImageBatch]] = []
            batches = iter(self._batches)
            try:
                while True:
                    for places in itertools.islice(batches, 2 - len(ahead)):
                        ahead.append(decoder.submit(self._produce, places, readers))
                    if not ahead:
                        return
                    yield ahead.pop(0).result()
            finally:
                decoder.shutdown(cancel_futures=True)

    def _produce(self, places: range, readers: ThreadPoolExecutor) -> ImageBatch:
        """Read and decode a batch."""
        samples = self._data.source.samples
        read = list(readers.map(self._try_to_read, [samples[i] for i in places]))
        readable = [i for i, found in zip(places, read) if not isinstance(found, _Problem)]
        images = self._finish([found for found in read if not isinstance(found, _Problem)])
        problems = {i: str(why) for i, why in zip(places, read) if isinstance(why, _Problem)}
        problems |= {i: why for i, why in zip(readable, images) if isinstance(why, str)}
        self.unreadable |= {samples[i].key: problems[i] for i in sorted(problems)}
        good = [image for image in images if isinstance(image, Tensor)]
        nothing = torch.empty(0, self._num_crops, 3, *self._image_size, device=self._place.device)
        return ImageBatch(
            places=[i for i in readable if i not in problems],
            images=torch.stack(good) if good else nothing,
        )

    def _try_to_read(self, sample: Sample) -> Any:
        try:
            return self._read(self._data.source.read(sample))
        except (BadImage, OSError) as error:
            return _Problem(str(error))


def _normalized(
    crops: list[UInt8[np.ndarray, "crops 3 h w"]], view: PilView, device: torch.device
) -> list[Tensor]:
    if not crops:
        return []
    return list(view.normalize(torch.from_numpy(np.stack(crops)).to(device)))


class _Problem(str):
    """Why an image could not be read."""


class _DaliDecoder:
    """Encoded images → views of them, or why not."""

    def __init__(
        self,
        view: EvalView,
        *,
        places: Sequence[tuple[float, float]],
        batch_size: int,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._gpu = device.type == "cuda"
        self._view, self._places = view, places
        self._options = {
            "batch_size": batch_size,
            "num_threads": num_threads,
            "device_id": (device.index or 0) if self._gpu else None,
            "prefetch_queue_depth": 1,
            "exec_async": False,
            "exec_pipelined": False,
        }
        self._pipeline: Pipeline | None = None
        self._build()  # out of range is out of range before the first image is read

    def __call__(self, files: list[bytes]) -> list[Tensor | str]:
        """Decode a batch; half by half where DALI refuses it, for it does not say which image."""
        if not files:
            return []
        try:
            return list(self._run(files))
        except RuntimeError as error:
            self._pipeline = None  # of no use any more
            if not _UNDECODABLE.search(str(error)):
                raise
        if len(files) == 1:
            return ["DALI cannot decode it"]
        half = len(files) // 2
        return self(files[:half]) + self(files[half:])

    def _run(self, files: list[bytes]) -> Float32[Tensor, "b crops 3 h w"]:
        pipeline = self._pipeline or self._build()
        pipeline.feed_input("images", [np.frombuffer(data, np.uint8) for data in files])
        views = [torch.from_dlpack(images.as_tensor()) for images in pipeline.run()]
        images = torch.stack(views, 1)  # a copy: DALI uses its own memory again
        if self._gpu:
            torch.cuda.current_stream(images.device).synchronize()  # and asks no other stream
        return images

    def _build(self) -> Pipeline:
        view = self._view
        with Pipeline(**self._options) as pipeline:
            _, views = define_eval_views(
                fn.external_source(name="images"),
                image_size=view.image_size,
                crop_pct=view.crop_pct,
                interpolation=view.interpolation,
                crop_mode=view.crop_mode,
                mean=view.mean,
                std=view.std,
                gpu=self._gpu,
                places=self._places,
            )
            pipeline.set_outputs(*(images for images, _, _ in views))
        pipeline.build()
        self._pipeline = pipeline
        return pipeline
