"""Images and masks out of shards: random crops for training, whole images for evaluation.

What happens to an image in training is described by SegAugmentConfig. Everything random about a
crop comes from (seed, its position in the run), and so does the order of the images: a feed can go
on at any step, on any number of processes, with the same crops. In shapes, b counts images.
"""

import io
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Integer, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..labeler.images import BadImage, load_image
from ..shards.index import ShardIndex
from ..shards.masks import BadMask, Mask, check_classes, read_mask
from ..trainer.feed import default_num_threads
from .backbone import MIN_SIDE_PX
from .inference import InferenceConfig, view_hw

_CROP_TRIES = 10
_HUES = 256
"""Steps of the hue circle in Pillow's HSV."""

Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegAugmentConfig:
    """What happens to a training image: the [augment] table of a segmentation recipe.

    In this order: it is resized, as in evaluation but by a random factor; a crop is cut out,
    mirrored, and distorted in colour; where the image is smaller than the crop, the rest is 0
    after normalisation, and teaches nothing.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor of `short_px` and `long_px`, drawn uniformly."""
    short_px: int = 512
    """What the shorter side of an image is resized to, if the longer one allows it."""
    long_px: int = 2048
    """Most pixels of the longer side."""
    crop_px: int = 512
    """Side of the crop."""
    cat_max_ratio: float = 0.75
    """Largest part of a crop's pixels with a class that one class should have: up to 10 crops are
    passed over that do not keep to it. 1 takes the first."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    brightness: int = 32
    """Most levels, of 255, that are added to or taken from a crop. This and the next three are
    each applied to half of the crops."""
    contrast: tuple[float, float] = (0.5, 1.5)
    """Range of the factor of all channels."""
    saturation: tuple[float, float] = (0.5, 1.5)
    """Range of the factor of the saturation."""
    hue: int = 18
    """Most steps, of 180 around the circle, by which the hue is turned."""

    def __post_init__(self) -> None:
        for name in ("scale", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"augment.{name} = {[low, high]}; allowed: 0 < smallest <= largest"
                )
        if not MIN_SIDE_PX <= self.short_px <= self.long_px:
            raise ValueError(
                f"augment.short_px = {self.short_px}; allowed: {MIN_SIDE_PX} to augment.long_px = "
                f"{self.long_px}"
            )
        if self.crop_px < 32:
            raise ValueError(f"augment.crop_px = {self.crop_px}; allowed: >= 32")
        for name in ("cat_max_ratio", "hflip"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{name} = {value}; allowed: 0 to 1")
        if not 0 <= self.brightness <= 255:
            raise ValueError(f"augment.brightness = {self.brightness}; allowed: 0 to 255")
        if not 0 <= self.hue <= 90:
            raise ValueError(f"augment.hue = {self.hue}; allowed: 0 to 90")


@dataclass(frozen=True, kw_only=True)
class SegBatch:
    """What a step of training sees."""

    images: Float32[Tensor, "b 3 h w"]
    """Normalised."""
    masks: Int64[Tensor, "b h w"]
    """A class for each pixel, or the data set's ignore_index."""
    keys: list[str]


class SegImage(NamedTuple):
    """An image for evaluation, at its own size."""

    key: str
    pixels: UInt8[Tensor, "3 h w"]
    mask: Int64[Tensor, "h w"]


# ------------------------------------------------------------------------------------- samples


class SegSamples:
    """The samples of a split, read one at a time from anywhere in its shards.

    Raises:
        ValueError: The split has no masks, or its .idx files are damaged.
        OSError: Shards are missing.
    """

    def __init__(self, index: ShardIndex, split: str) -> None:
        entry = index.split(split)
        if entry.masks is None:
            raise ValueError(
                f"split {split!r} of {index.folder} has no masks; segmentation learns from what "
                "tl-seg pack makes"
            )
        self.num_classes = index.num_classes
        self.ignore_index: int = entry.masks["ignore_index"]
        self._shards = [str(path) for path in index.shard_paths(split)]
        rows = [row for i, idx in enumerate(index.idx_paths(split)) for row in _rows(idx, i)]
        self._keys = [key for key, _ in rows]
        self._places = np.array([place for _, place in rows], dtype=np.int64).reshape(-1, 5)
        if len(rows) != entry.num_samples:
            raise ValueError(
                f"the .idx files of split {split!r} of {index.folder} name {len(rows)} samples, "
                f"the index {entry.num_samples}; tl-shard verify {index.folder} says more"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        """Return the key of a sample."""
        return self._keys[i]

    def read(self, i: int) -> tuple[Pixels, Mask]:
        """Decode a sample.

        Raises:
            ValueError: It is damaged; names the shard.
            OSError: The shard cannot be read.
        """
        shard, *ranges = self._places[i].tolist()
        path = self._shards[shard]
        with Path(path).open("rb") as file:
            jpeg, png = (_read(file, *ranges[k : k + 2]) for k in (0, 2))
        try:
            pixels, mask = np.array(load_image(jpeg)), read_mask(png)
            check_classes(mask, self.num_classes, self.ignore_index)
            if mask.shape != pixels.shape[:2]:
                raise BadMask(f"is not as large as the image: {mask.shape}, {pixels.shape[:2]}")
        except (BadImage, BadMask) as error:
            what = "mask" if isinstance(error, BadMask) else "image:"
            raise ValueError(
                f"sample {self._keys[i]} in {path} is damaged: its {what} {error}; "
                "tl-shard verify says what else is"
            ) from error
        return pixels, mask


def _read(file: io.BufferedReader, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _rows(idx: Path, shard: int) -> Iterator[tuple[str, list[int]]]:
    """Read an .idx file: for each sample its key, and shard, offset and size of both files."""
    lines = idx.read_text(encoding="utf-8").splitlines()[1:]
    for number, line in enumerate(lines, start=2):
        words = line.split(" ")
        if len(words) != 8 or words[0] != "jpg" or words[4] != "png":
            raise ValueError(f"{idx}, line {number} is damaged; expected one jpg and one png")
        yield words[3].removesuffix(".jpg"), [shard, *map(int, (*words[1:3], *words[5:7]))]


# -------------------------------------------------------------------------------------- crops


def random_crop(
    pixels: Pixels, mask: Mask, config: SegAugmentConfig, *, ignore_index: int, seed: Sequence[int]
) -> tuple[UInt8[np.ndarray, "crop_h crop_w 3"], Integer[np.ndarray, "crop_h crop_w"]]:
    """Make a training crop; smaller than wanted where the resized image is.

    Args:
        pixels: The image.
        mask: Class of each pixel.
        config: See there.
        ignore_index: Of pixels without a class.
        seed: The crop depends on nothing else.
    """
    random = np.random.default_rng(list(seed))
    seen = InferenceConfig(short_px=config.short_px, long_px=config.long_px)
    height, width = view_hw(mask.shape, seen, scale=random.uniform(*config.scale))
    rows_of, cols_of = _nearest(mask.shape[0], height), _nearest(mask.shape[1], width)
    tries = 0
    while True:
        rows = _random_part(height, config.crop_px, random)
        cols = _random_part(width, config.crop_px, random)
        crop_mask = mask[rows_of[rows][:, None], cols_of[cols]]
        if tries == _CROP_TRIES or _is_varied(crop_mask, config.cat_max_ratio, ignore_index):
            break
        tries += 1
    crop = resize_part(pixels, (height, width), rows, cols)
    if random.random() < config.hflip:
        crop, crop_mask = crop[:, ::-1], crop_mask[:, ::-1]
    return distort(np.ascontiguousarray(crop), config, random), np.ascontiguousarray(crop_mask)


def resize_part(
    pixels: Pixels, size: tuple[int, int], rows: slice, cols: slice
) -> UInt8[np.ndarray, "part_h part_w 3"]:
    """Resize an image bilinearly, without antialiasing, and compute a part of the result only.

    Args:
        pixels: The image.
        size: Height and width of the resized image.
        rows: Of it, which rows.
        cols: Of it, which columns.
    """
    above, below, down = _neighbours(pixels.shape[0], size[0], rows)
    before, behind, right = _neighbours(pixels.shape[1], size[1], cols)
    mixed = _mix(pixels[above], pixels[below], down[:, None, None])
    mixed = _mix(mixed[:, before], mixed[:, behind], right[:, None])
    return (mixed + 0.5).astype(np.uint8)


def _neighbours(
    old: int, new: int, part: slice
) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """For positions along a resized side: the pixels on both sides, and how near the second is."""
    place = ((np.arange(part.start, part.stop) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, old - 1), (place - first).astype(np.float32)


def _mix(a: np.ndarray, b: np.ndarray, share: Float32[np.ndarray, "..."]) -> np.ndarray:
    a = a.astype(np.float32)
    return a + share * (b - a)


def _nearest(old: int, new: int) -> Integer[np.ndarray, " new"]:
    return np.minimum((np.arange(new) * (old / new)).astype(np.int64), old - 1)


def _random_part(length_px: int, most_px: int, random: np.random.Generator) -> slice:
    part_px = min(length_px, most_px)
    start = int(random.integers(length_px - part_px + 1))
    return slice(start, start + part_px)


def _is_varied(mask: Mask, cat_max_ratio: float, ignore_index: int) -> bool:
    """Tell whether a crop has several classes, none of them too large."""
    if cat_max_ratio >= 1:
        return True
    counts = np.bincount(mask[mask != ignore_index].ravel())
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


def distort(pixels: Pixels, config: SegAugmentConfig, random: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and hue, each of them for half of the crops.

    Contrast, a factor of the levels themselves, comes before the other two or after them, by
    chance.
    """
    if random.random() < 0.5:
        pixels = _scaled(pixels, 1.0, random.uniform(-config.brightness, config.brightness))
    contrast_first = random.random() < 0.5
    contrast = random.uniform(*config.contrast) if random.random() < 0.5 else 1.0
    if contrast_first:
        pixels = _scaled(pixels, contrast, 0.0)
    if random.random() < 0.5:
        factor = random.uniform(*config.saturation)
        pixels = _in_hsv(pixels, 1, np.minimum(np.arange(256) * factor, 255).astype(np.uint8))
    if random.random() < 0.5:
        turn = round(random.integers(-config.hue, config.hue + 1) * _HUES / 180)
        pixels = _in_hsv(pixels, 0, ((np.arange(256) + turn) % _HUES).astype(np.uint8))
    return pixels if contrast_first else _scaled(pixels, contrast, 0.0)


def _scaled(pixels: Pixels, factor: float, offset: float) -> Pixels:
    if factor == 1 and offset == 0:
        return pixels
    table = (np.arange(256) * factor + offset).clip(0, 255).astype(np.uint8)
    return table[pixels]


def _in_hsv(pixels: Pixels, channel: int, table: UInt8[np.ndarray, "256"]) -> Pixels:
    """Look up new values of the hue (0) or the saturation (1)."""
    if (table == np.arange(256)).all():
        return pixels  # the way to HSV and back moves levels, too
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    hsv[..., channel] = table[hsv[..., channel]]
    return np.array(Image.fromarray(hsv, mode="HSV").convert("RGB"))


# -------------------------------------------------------------------------------------- feeds


class _Crop(NamedTuple):
    key: str
    pixels: UInt8[np.ndarray, "3 crop crop"]
    mask: Int64[np.ndarray, "crop crop"]
    size: tuple[int, int]
    """Of the part that is no padding."""


class _Problem(NamedTuple):
    """What went wrong in another process; raised there, it would be lost in a traceback."""

    text: str


class _Crops(Dataset[_Crop | _Problem]):
    """Crop number p of a run, without end."""

    def __init__(self, samples: SegSamples, config: SegAugmentConfig, seed: int) -> None:
        self._samples, self._config, self._seed = samples, config, seed
        self._order: tuple[int, Integer[np.ndarray, " n"]] | None = None

    def __getitem__(self, position: int) -> _Crop | _Problem:
        number = self._sample_at(position)
        try:
            pixels, mask = self._samples.read(number)
        except (ValueError, OSError) as error:
            return _Problem(str(error))
        ignore = self._samples.ignore_index
        pixels, mask = random_crop(
            pixels, mask, self._config, ignore_index=ignore, seed=(self._seed, 1, position)
        )
        side, size = self._config.crop_px, (mask.shape[0], mask.shape[1])
        room = [(0, side - size[0]), (0, side - size[1])]
        return _Crop(
            key=self._samples.key(number),
            pixels=np.pad(pixels.transpose(2, 0, 1), [(0, 0), *room]),
            mask=np.pad(mask.astype(np.int64), room, constant_values=ignore),
            size=size,
        )

    def _sample_at(self, position: int) -> int:
        """Each pass has every sample once, in an order of its own."""
        number, place = divmod(position, len(self._samples))
        if self._order is None or self._order[0] != number:
            random = np.random.default_rng([self._seed, 0, number])
            self._order = (number, random.permutation(len(self._samples)))
        return int(self._order[1][place])


class SegTrainFeed:
    """Endless iterator of batches of random crops.

    Args:
        samples: To learn from.
        config: What happens to them.
        batch_size: Images of a step, over all processes; a multiple of their number.
        mean: Subtracted from each channel, in [0, 1].
        std: Divides each channel after that.
        seed: Of order and crops.
        step: Steps that were done before.
        rank: Of this process.
        world_size: Number of processes.
        device: Where batches go.
        num_workers: Processes that make crops; None takes this process's share of the cores, 0
            makes them here.
    """

    def __init__(
        self,
        samples: SegSamples,
        config: SegAugmentConfig,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        num_workers: int | None = None,
    ) -> None:
        assert batch_size % world_size == 0
        share = batch_size // world_size
        self._device = torch.device(device)
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
        self._loader = DataLoader(
            _Crops(samples, config, seed),
            batch_sampler=_Positions(step, batch_size, rank * share, share),
            num_workers=default_num_threads() if num_workers is None else num_workers,
            collate_fn=list,
            worker_init_fn=_ignore_signals,
        )
        self._batches = iter(self._loader)

    def __next__(self) -> SegBatch:
        """Give the next batch.

        Raises:
            ValueError: A sample is damaged, or cannot be read.
        """
        crops: list[_Crop | _Problem] = next(self._batches)
        for crop in crops:
            if isinstance(crop, _Problem):
                raise ValueError(crop.text)
        good = [crop for crop in crops if isinstance(crop, _Crop)]
        pixels = self._moved(np.stack([crop.pixels for crop in good]))
        images = (pixels.float() / 255 - self._mean) / self._std
        sides = torch.arange(pixels.shape[-1], device=self._device)
        heights, widths = self._moved(np.array([crop.size for crop in good])).T[:, :, None]
        inside = (sides < heights)[:, :, None] & (sides < widths)[:, None]
        return SegBatch(
            images=torch.where(inside[:, None], images, 0.0),
            masks=self._moved(np.stack([crop.mask for crop in good])),
            keys=[crop.key for crop in good],
        )

    def close(self) -> None:
        """End the processes that make crops."""
        self._batches = iter(())

    def _moved(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


class _Positions:
    """For each step the positions of a process's crops in the run, from a step on."""

    def __init__(self, step: int, batch_size: int, first: int, share: int) -> None:
        self._step, self._batch_size, self._first, self._share = step, batch_size, first, share

    def __iter__(self) -> Iterator[list[int]]:
        step = self._step
        while True:
            start = step * self._batch_size + self._first
            yield list(range(start, start + self._share))
            step += 1


def _ignore_signals(worker: int) -> None:
    """Leave it to the process that trains to stop; its helpers end with it."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Images(Dataset[SegImage | _Problem]):
    def __init__(self, samples: SegSamples, numbers: Sequence[int]) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> SegImage | _Problem:
        if i >= len(self):
            raise IndexError(i)
        number = self._numbers[i]
        try:
            pixels, mask = self._samples.read(number)
        except (ValueError, OSError) as error:
            return _Problem(str(error))
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return SegImage(self._samples.key(number), image, torch.from_numpy(mask.astype(np.int64)))


def eval_images(
    samples: SegSamples, *, rank: int = 0, world_size: int = 1, num_workers: int | None = None
) -> Iterator[SegImage]:
    """Read this process's share of the samples, each once over all processes.

    Raises:
        ValueError: A sample is damaged, or cannot be read.
    """
    loader = DataLoader(
        _Images(samples, range(rank, len(samples), world_size)),
        batch_size=None,
        num_workers=default_num_threads() if num_workers is None else num_workers,
        worker_init_fn=_ignore_signals,
    )
    for item in loader:
        if isinstance(item, _Problem):
            raise ValueError(item.text)
        yield item
