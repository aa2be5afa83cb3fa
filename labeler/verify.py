"""Do label maps agree with the teacher?

A training crop gets its label out of a map of the whole image. What the teacher says when it looks
at that very crop is the standard: `crop_agreement` compares the two, `measure_crops` does so on
random crops of images, and `check_keys` compares a label set with the images it was made of. The
job behind `tl-label verify` is all three.
"""

import hashlib
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .dictionary import from_settings
from .fit import Placement, resize
from .folder import Location, open_folder
from .geometry import Fill, PaletteMaps, crop_view, sample_targets
from .images import BadImage, load_image
from .label_map import LabelMap, LabelMapError, decode
from .label_set import LabelSet, json_name, read_index, read_slice, tar_name
from .published import UNKNOWN_TEACHER
from .sources import ImageSource
from .teacher import Teacher

CROP_TO_IMAGE = 0.78
"""Side of the crops that the teacher is shown, over the side of the images it labelled.

448 px for maps made at 576: a crop is part of the image, and students, too, see crops smaller."""

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Share of the image's area and width over height of random crops, as in training."""

Box: TypeAlias = tuple[int, int, int, int]
"""(left, upper, right, lower), px."""

_NUM_BOOTSTRAP = 2_000
_MAX_LOGITS = 1 << 25  # of one forward pass: 128 MB
_MAX_CROPS = 32  # of one forward pass
_TINY = torch.finfo(torch.float32).tiny


class Interval(NamedTuple):
    """A mean over images, and where 95 % of means would lie if other images had been drawn."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class CropAgreement:
    """How the targets of crops compare with the teacher's own answer there. Sums are over tokens.

    Tokens without a target, those outside the map's window, count nowhere.
    """

    num_tokens: Float32[Tensor, " b"]
    """Tokens that have a target."""
    token_hits: Float32[Tensor, " b"]
    """Tokens whose first class is the teacher's."""
    token_kl: Float32[Tensor, " b"]
    """Sum of KL(teacher ‖ target), nats."""
    class_hits: Float32[Tensor, " b"]
    """1 where the first class of the class target is that of the teacher's mean logits."""
    class_kl: Float32[Tensor, " b"]
    """KL(teacher ‖ class target), nats."""
    num_views: Float32[Tensor, " b"]
    """1 where there is a class target."""


def crop_agreement(
    maps: PaletteMaps,
    views: Float[Tensor, "b 2 3"],
    logits: Float[Tensor, "b c rows cols"],
    *,
    fill: Fill = "residual",
) -> CropAgreement:
    """Compare the targets of crops with the teacher's logits on them.

    Args:
        maps: Label maps of each crop's image.
        views: Crop unit square → image unit square.
        logits: The teacher's, for the crop's pixels. Their grid is the grid of tokens.
        fill: See geometry.sample_targets.
    """
    targets = sample_targets(maps, views, (logits.shape[2], logits.shape[3]), fill=fill)
    cells = logits.float().flatten(2).transpose(1, 2)
    palette = targets.palette[:, None].expand_as(targets.tokens)
    token_hits, token_kl = _compare(cells, palette, targets.tokens, targets.token_background)
    class_hits, class_kl = _compare(
        cells.mean(1), targets.palette, targets.view, targets.view_background
    )
    weight, view_weight = targets.token_weight, targets.view_weight
    return CropAgreement(
        num_tokens=weight.sum(1),
        token_hits=(token_hits * weight).sum(1),
        token_kl=(token_kl * weight).sum(1),
        class_hits=class_hits * view_weight,
        class_kl=class_kl * view_weight,
        num_views=view_weight,
    )


def _compare(
    logits: Float32[Tensor, "*b c"],
    palette: Int64[Tensor, "*b u"],
    target: Float32[Tensor, "*b u"],
    background: Float32[Tensor, "*b"],
) -> tuple[Bool[Tensor, "*b"], Float32[Tensor, "*b"]]:
    """Whether first classes agree, and KL(softmax of logits ‖ target), without a dense target."""
    log_teacher = logits.log_softmax(-1)
    first = palette.gather(-1, target.argmax(-1, keepdim=True))[..., 0]
    log_background = background.clamp(min=_TINY).log()
    # Padding of the palette has the background's probability: it adds nothing to this sum.
    above = target.clamp(min=_TINY).log() - log_background[..., None]
    cross_entropy = -log_background - (log_teacher.gather(-1, palette).exp() * above).sum(-1)
    entropy = -(log_teacher.exp() * log_teacher).sum(-1)
    return first == logits.argmax(-1), cross_entropy - entropy


class LabelledImage(NamedTuple):
    """An image and what a label set says about it."""

    key: str
    image: Image.Image
    maps: Sequence[LabelMap]
    """Its map, or the levels of it."""


@dataclass(frozen=True, kw_only=True)
class CropTable:
    """Agreement of many crops: one entry per crop in every array."""

    image: Int64[np.ndarray, " n"]
    """Running number of the image."""
    area: Float32[np.ndarray, " n"]
    """Share of the image that the crop shows."""
    grid: tuple[int, int]
    """Tokens of a crop, (rows, cols)."""
    agreement: dict[str, Float32[np.ndarray, " n"]]
    """The fields of CropAgreement."""

    def __getitem__(self, which: Bool[np.ndarray, " n"]) -> "CropTable":
        """Take some crops, e.g. table[table.area < 0.35]."""
        return replace(
            self,
            image=self.image[which],
            area=self.area[which],
            agreement={name: values[which] for name, values in self.agreement.items()},
        )

    @property
    def token_top1(self) -> Interval:
        """Share of tokens whose first class is the teacher's."""
        return self._ratio("token_hits", "num_tokens")

    @property
    def token_kl(self) -> Interval:
        """KL(teacher ‖ target) per token, nats."""
        return self._ratio("token_kl", "num_tokens")

    @property
    def class_top1(self) -> Interval:
        """Share of crops whose class target names the teacher's class first."""
        return self._ratio("class_hits", "num_views")

    @property
    def class_kl(self) -> Interval:
        """KL(teacher ‖ class target) per crop, nats."""
        return self._ratio("class_kl", "num_views")

    @property
    def coverage(self) -> float:
        """Share of tokens that have a target: below 1 where maps do not cover their images."""
        return float(self.agreement["num_tokens"].mean()) / (self.grid[0] * self.grid[1])

    def _ratio(self, above: str, below: str) -> Interval:
        return bootstrap(self.agreement[above], self.agreement[below], self.image)


def bootstrap(
    above: Float[np.ndarray, " n"],
    below: Float[np.ndarray, " n"],
    image: Int64[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Return sum(above) / sum(below) and its bootstrap interval over images, not crops.

    Crops of one image are alike: drawn singly, they would promise too narrow an interval.
    """
    _, which = np.unique(image, return_inverse=True)
    num_images = which.max() + 1
    tops, bottoms = (np.bincount(which, values.astype(np.float64)) for values in (above, below))
    rng = np.random.default_rng(0)
    draws = rng.multinomial(num_images, np.full(num_images, 1 / num_images), _NUM_BOOTSTRAP)
    with np.errstate(invalid="ignore"):
        ratios = (draws @ tops) / (draws @ bottoms)
        value = tops.sum() / bottoms.sum()
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(ratios, [tail, 1 - tail]) if not np.isnan(value) else (value, value)
    return Interval(float(value), float(low), float(high))


def suggested_crop_px(index: Mapping[str, Any]) -> int | None:
    """Return the side at which a set's crops should be shown, by the size its teacher had, px.

    None if the set's index does not say. Not rounded to whole cells, which load_teacher does.
    """
    image_size = index["teacher"].get("image_size")
    return None if image_size is None else round(CROP_TO_IMAGE * image_size)


def teacher_of(index: Mapping[str, Any]) -> str:
    """Return the name of the teacher that made a set.

    Raises:
        ValueError: If the set was imported and its index does not say.
    """
    name = index["teacher"].get("name", UNKNOWN_TEACHER)
    if name == UNKNOWN_TEACHER:
        raise ValueError("the label set does not say which teacher made it: name a --teacher")
    return name


def random_crops(size: tuple[int, int], num_crops: int, *, seed: str) -> list[Box]:
    """Draw crops as torchvision's RandomResizedCrop does, with its default scale and ratio.

    Args:
        size: (width, height) of the image, px.
        num_crops: How many.
        seed: Any text; the same one draws the same crops.

    Returns:
        As many boxes.
    """
    rng = random.Random(seed)
    return [_random_crop(*size, rng) for _ in range(num_crops)]


def _random_crop(width: int, height: int, rng: random.Random) -> Box:
    for _ in range(10):
        area = rng.uniform(*SCALE) * width * height
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    # Images longer or taller than any allowed crop: their middle.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def crop_pixels(
    image: Image.Image, box: Box, side_px: int, *, interpolation: str
) -> UInt8[np.ndarray, "h w 3"]:
    """Cut a crop out of an image and make it a square of side_px."""
    left, upper, right, lower = (float(edge) for edge in box)
    placement = Placement((side_px, side_px), (left, upper, right, lower), (0.0, 0.0, 1.0, 1.0))
    return resize(image, placement, interpolation=interpolation)


def box_view(box: Box, size: tuple[int, int]) -> Float32[Tensor, "1 2 3"]:
    """Return the view of a crop: box in px, size as (width, height) px."""
    return crop_view(torch.tensor([box]) / torch.tensor([*size, *size]))


def measure_crops(
    images: Iterable[LabelledImage],
    teacher: Teacher,
    *,
    num_crops: int = 8,
    seed: int = 0,
    fill: Fill = "residual",
) -> CropTable:
    """Show the teacher random crops of images, at teacher.image_size, and compare.

    Args:
        images: With their label maps. They may come from a generator: few are held at a time.
        teacher: Its image_size is the side of a crop, see CROP_TO_IMAGE.
        num_crops: Per image.
        seed: The crops of an image depend on this and on its key alone.
        fill: See geometry.sample_targets.

    Raises:
        ValueError: If there is no image, or maps and teacher have different classes.
    """
    num_cells = (teacher.image_size // teacher.stride) ** 2
    per_batch = max(1, min(_MAX_CROPS, _MAX_LOGITS // (num_cells * teacher.num_classes)))
    numbers, areas, parts = [], [], []
    grid = (0, 0)
    crops = _crops(images, teacher, num_crops, seed)
    while batch := list(islice(crops, per_batch)):
        pixels = torch.from_numpy(np.stack([crop.pixels for crop in batch])).permute(0, 3, 1, 2)
        maps = PaletteMaps.from_label_maps([crop.maps for crop in batch])
        _check_classes(maps.num_classes, teacher)
        logits = teacher.dense(pixels)
        grid = (logits.shape[2], logits.shape[3])
        views = torch.cat([crop.view for crop in batch]).to(logits.device)
        parts.append(crop_agreement(maps.to(logits.device), views, logits, fill=fill))
        numbers += [crop.number for crop in batch]
        areas += [crop.area for crop in batch]
    if not parts:
        raise ValueError("there is no image to compare the label maps on")
    names = CropAgreement.__dataclass_fields__
    return CropTable(
        image=np.array(numbers),
        area=np.array(areas, np.float32),
        grid=grid,
        agreement={
            name: torch.cat([getattr(part, name) for part in parts]).cpu().numpy() for name in names
        },
    )


class _Crop(NamedTuple):
    number: int
    maps: Sequence[LabelMap]
    pixels: UInt8[np.ndarray, "h w 3"]
    view: Float32[Tensor, "1 2 3"]
    area: float


def _crops(
    images: Iterable[LabelledImage], teacher: Teacher, num_crops: int, seed: int
) -> Iterable[_Crop]:
    for number, (key, image, maps) in enumerate(images):
        for box in random_crops(image.size, num_crops, seed=f"{seed} {key}"):
            pixels = crop_pixels(
                image, box, teacher.image_size, interpolation=teacher.interpolation
            )
            view = box_view(box, image.size)
            yield _Crop(number, maps, pixels, view, float(torch.linalg.det(view[0, :, :2])))


def _check_classes(num_classes: int, teacher: Teacher) -> None:
    if num_classes != teacher.num_classes:
        raise ValueError(
            f"the label maps have {num_classes} classes, teacher {teacher.name} has "
            f"{teacher.num_classes}; compare them with a teacher of the same classes, in the same "
            "order"
        )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What `measure` found on a label set."""

    table: CropTable = field(repr=False)
    teacher: str
    num_images: int
    num_crops: int
    """Per image."""
    crop_px: int
    fill: Fill
    same_teacher: bool | None
    """Whether the maps were made with these very weights; None if the set does not say."""
    unreadable: dict[str, str]
    """Key of each drawn image that could not be read → why."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        names = ("token_top1", "token_kl", "class_top1", "class_kl")
        return {
            **{name: getattr(self.table, name)._asdict() for name in names},
            "coverage": self.table.coverage,
            "teacher": self.teacher,
            "num_images": self.num_images,
            "num_crops": self.num_crops,
            "crop_px": self.crop_px,
            "fill": self.fill,
            "same_teacher": self.same_teacher,
            "unreadable": self.unreadable,
        }


def measure(
    labels: LabelSet,
    source: ImageSource,
    teacher: Teacher,
    *,
    num_images: int = 100,
    num_crops: int = 8,
    seed: int = 0,
    fill: Fill | None = None,
    show_progress: bool = True,
) -> Agreement:
    """Compare random images of a label set with a teacher on random crops.

    Args:
        labels: The label set.
        source: Its images; those that are in one of both only are not drawn.
        teacher: Its image_size is the side of a crop.
        num_images: Drawn without replacement; all, if there are fewer.
        num_crops: Per image.
        seed: Of images and crops.
        fill: None means residual where the maps know it, zero where they do not.
        show_progress: Whether to draw a progress bar (on a terminal only).

    Raises:
        ValueError: If no image can be compared, or the classes differ in number.
    """
    _check_classes(labels.num_classes, teacher)
    samples = {sample.key: sample for sample in source.samples}
    common = [key for key in labels.keys if key in samples]
    if not common:
        raise ValueError(
            f"none of the {len(labels)} keys of {labels.folder} is among the {len(samples)} images "
            f"of {source.root}{_example(labels.keys, samples)}; give the --images that the set was "
            "made of"
        )
    drawn = random.Random(seed).sample(common, min(num_images, len(common)))
    unreadable: dict[str, str] = {}

    def load(key: str) -> LabelledImage | None:
        try:
            maps = decode(labels.read(key), dictionary=labels.dictionary)
            return LabelledImage(key, load_image(source.read(samples[key])), maps)
        except (BadImage, LabelMapError, FileNotFoundError, PermissionError) as error:
            unreadable[key] = str(error)
            return None

    num_workers = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(num_workers, "load") as pool,
        tqdm(
            desc="verify", total=len(drawn), unit="img", disable=None if show_progress else True
        ) as progress,
    ):

        def loaded() -> Iterator[LabelledImage]:
            keys = iter(drawn)
            while chunk := list(islice(keys, 2 * num_workers)):
                for image in pool.map(load, chunk):
                    if image is not None:
                        yield image
                    progress.update()

        images = loaded()
        first = next(images, None)
        if first is None:
            raise ValueError(f"none of {len(drawn)} images can be read, {_first_of(unreadable)}")
        if fill is None:
            fill = "zero" if first.maps[0].log_normalizer is None else "residual"
        table = measure_crops(
            chain([first], images), teacher, num_crops=num_crops, seed=seed, fill=fill
        )
    made_with = labels.index["teacher"].get("weights_sha256")
    return Agreement(
        table=table,
        teacher=teacher.name,
        num_images=len(drawn) - len(unreadable),
        num_crops=num_crops,
        crop_px=teacher.image_size,
        fill=fill,
        same_teacher=None if made_with is None else made_with == teacher.weights_sha256,
        unreadable=unreadable,
    )


def _first_of(reasons: Mapping[str, str]) -> str:
    key, why = next(iter(reasons.items()))
    return f"{key} because: {why}"


def _example(keys: Sequence[str], samples: Mapping[str, Any]) -> str:
    if not keys or not samples:
        return ""
    return f" ({keys[0]!r} there, {next(iter(samples))!r} here)"


@dataclass(frozen=True, kw_only=True)
class KeyCheck:
    """What is wrong with a label set as a set. Every entry is a key, or a file's name."""

    num_labelled: int
    num_quarantined: int
    missing: list[str]
    """Images that are neither labelled nor quarantined."""
    surplus: list[str]
    """Labelled or quarantined keys of which there is no image."""
    duplicates: list[str]
    """Keys that are labelled more than once, or labelled and quarantined."""
    undecodable: dict[str, str]
    """Key of each map that cannot be read → why."""
    damaged: dict[str, str]
    """File of the set → what is wrong with it."""

    @property
    def is_whole(self) -> bool:
        """Whether every image has its map; labels without an image do no harm."""
        return not (self.missing or self.duplicates or self.undecodable or self.damaged)


def check_keys(location: Location, source: ImageSource, *, show_progress: bool = True) -> KeyCheck:
    """Read every shard of a label set, decode every map, and compare the keys with the images.

    Args:
        location: Of the label set.
        source: Its images; nothing is read of them but their list.
        show_progress: Whether to draw a progress bar (on a terminal only).

    Raises:
        OSError: If there is no index.
        ValueError: If the index is damaged or no label set's.
    """
    index = read_index(location)
    dictionary = from_settings(index)
    seen: dict[str, int] = {}
    undecodable: dict[str, str] = {}
    damaged: dict[str, str] = {}
    with tqdm(
        desc="check",
        total=index["num_labelled"],
        unit="map",
        disable=None if show_progress else True,
    ) as progress:
        for number, shard in enumerate(index["shards"]):
            record = read_slice(location, number)
            if record is None:
                damaged[json_name(number)] = "missing or damaged"
                continue
            data = _read_tar(location, number, shard["sha256"], damaged)
            for key, (offset, size) in record.samples.items():
                seen[key] = seen.get(key, 0) + 1
                problem = None
                if data is not None:
                    problem = _problem(data[offset : offset + size], dictionary)
                if problem:
                    undecodable[key] = problem
                progress.update()
    quarantined = index["quarantined"]
    listed = {sample.key for sample in source.samples}
    return KeyCheck(
        num_labelled=len(seen),
        num_quarantined=len(quarantined),
        missing=sorted(listed - seen.keys() - quarantined.keys()),
        surplus=sorted((seen.keys() | quarantined.keys()) - listed),
        duplicates=sorted(key for key, n in seen.items() if n + (key in quarantined) > 1),
        undecodable=undecodable,
        damaged=damaged,
    )


def _read_tar(
    location: Location, number: int, sha256: str, damaged: dict[str, str]
) -> bytes | None:
    """Read a shard, noting what is wrong with it; a changed one is read all the same."""
    name = tar_name(number)
    try:
        data = open_folder(location).read(name)
    except FileNotFoundError:
        damaged[name] = "missing"
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        damaged[name] = "its checksum does not fit, it is not what was written"
    return data


def _problem(data: bytes, dictionary: bytes | None) -> str | None:
    try:
        decode(data, dictionary=dictionary)
    except LabelMapError as error:
        return str(error)
    return None
