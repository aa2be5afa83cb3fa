"""How good a model is: exact top-1, top-5 and loss, each image counted once on any number of ranks.

`evaluate` takes a model and batches; `evaluate_checkpoint` is the whole job behind tl-eval.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..labeler.geometry import crop_view
from ..labeler.images import BadImage, load_image
from ..labeler.sources import CLASSES_FILE, ImageSource, Sample, open_source
from ..labeler.teacher import load_timm
from ..shards.index import INDEX_NAME, ShardIndex, read_index
from . import checkpoint as checkpoint_file
from .distributed import Place, from_all, join_processes, reduce
from .feed import Batch, EvalFeed, default_num_threads
from .models import check_name, is_own
from .models.lvvit import LVViT
from .published import fetch

Precision = Literal["fp32", "bf16"]

_logger = logging.getLogger(__name__)


class EvalResult(TypedDict):
    """What an evaluation found."""

    top1: float
    """Percent of the images whose best class is the right one."""
    top5: float
    """Percent of the images whose five best classes hold the right one."""
    loss: float
    """Mean cross-entropy with the right class, in nats."""
    num_images: int
    """Over all processes."""
    images_per_sec: float
    """Over all processes, reading included."""


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


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """A model ready for evaluation."""

    model: nn.Module
    name: str
    weights: str
    """Which weights of the file: "raw", "ema", or "published" for files of others."""
    view: EvalView
    num_classes: int
    class_ids: list[str] | None
    """What the checkpoint says its classes are, in order; None in files of others."""


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """A finished tl-eval."""

    checkpoint: str
    model: str
    weights: str
    data: str
    split: str | None
    """None for images that are no data set of ours."""
    view: EvalView
    precision: Precision
    result: EvalResult
    unreadable: dict[str, str] = field(default_factory=dict)
    """Key of each image that no decoder could read → why; they are not in the result."""
    is_main: bool = True
    """Whether this process is the one that talks."""

    def to_json(self) -> dict[str, Any]:
        """Flatten to plain values."""
        facts = asdict(self)
        del facts["is_main"]
        view, result = facts.pop("view"), facts.pop("result")
        return facts | view | result


# ------------------------------------------------------------------------- model and batches


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    place: Place,
    *,
    precision: Precision = "fp32",
    progress: bool = False,
) -> EvalResult:
    """Run a model over batches; the sums are taken over all processes.

    Args:
        model: Maps images to class logits; put in evaluation mode, and back afterwards.
        batches: This process's share; the shares may differ in length, and may be empty.
        place: This process among all.
        precision: Arithmetic of the forward pass; the loss is always taken in float32.
        progress: Whether to show a bar on a terminal.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=place.device)
    start = time.perf_counter()
    try:
        hidden = None if progress and place.is_main else True
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=hidden, leave=False):
            with torch.autocast(place.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(batch.images)
            sums += _sums(logits.float(), batch.classes)
    finally:
        model.train(was_training)
    num_right, num_in_top5, loss, num_images = reduce(place, sums, "sum").tolist()
    secs = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=place.device)
    if not num_images:
        raise ValueError("there is no image to evaluate on")
    return EvalResult(
        top1=100 * num_right / num_images,
        top5=100 * num_in_top5 / num_images,
        loss=loss / num_images,
        num_images=round(num_images),
        images_per_sec=num_images / reduce(place, secs, "max").item(),
    )


def _sums(logits: Float[Tensor, "b c"], classes: Int64[Tensor, " b"]) -> Float64[Tensor, "4"]:
    """Count right answers, answers in the top five, loss and images of a batch."""
    best = logits.topk(min(5, logits.shape[1])).indices == classes[:, None]
    loss = F.cross_entropy(logits, classes, reduction="sum")
    count = torch.tensor(len(classes), device=logits.device)
    return torch.stack([best[:, 0].sum(), best.sum(), loss, count]).double()


# --------------------------------------------------------------------------------- the job


def evaluate_checkpoint(
    checkpoint: Path | str,
    data: Path | str,
    *,
    split: str | None = None,
    classes: Path | None = None,
    root: str | None = None,
    model: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 64,
    device: str = "auto",
    ema: bool | None = None,
    precision: Precision = "fp32",
    num_workers: int | None = None,
) -> EvalReport:
    """Evaluate a checkpoint on a data set, on one process or under torchrun.

    Args:
        checkpoint: See load_for_eval; also a URL, or the name of published weights, see
            find_weights.
        data: Folder of dataset shards, or any source of images with classes, see open_source.
        split: Of the shards; left out: val.
        classes: For other sources: a classes file elsewhere than in their root.
        root: Of a list: see open_source.
        model: See load_for_eval.
        image_size: Side in pixels; left out: the checkpoint's.
        crop_pct: Left out: the checkpoint's.
        batch_size: Of each process.
        device: See distributed.join_processes.
        ema: See load_for_eval.
        precision: Arithmetic of the forward pass.
        num_workers: Reading threads or processes; None takes this process's share of the cores.

    Raises:
        ValueError: If checkpoint, model and data do not fit each other.
        OSError: If one of them is not there.
    """
    with join_processes(device) as place:
        if not place.is_main:
            logging.getLogger(__name__.partition(".")[0]).setLevel(logging.WARNING)
        opened = _open_data(str(data), split, classes, root)
        loaded = load_for_eval(
            fetch(str(checkpoint), place),
            model=model,
            image_size=image_size,
            crop_pct=crop_pct,
            ema=ema,
        )
        _check_classes(loaded, opened, data)
        feed: EvalFeed | FolderFeed
        if isinstance(opened, ShardIndex):
            split = split or "val"
            feed = EvalFeed(
                opened,
                split,
                **asdict(loaded.view),
                batch_size=batch_size,
                device=place.device,
                rank=place.rank,
                world_size=place.world_size,
                num_threads=num_workers,
            )
        else:
            feed = FolderFeed(
                opened, loaded.view, batch_size=batch_size, place=place, num_workers=num_workers
            )
        loaded.model.to(place.device)
        result = evaluate(loaded.model, feed, place, precision=precision, progress=True)
        unreadable: dict[str, str] = {}
        if isinstance(feed, FolderFeed):
            for part in from_all(place, feed.unreadable):
                unreadable |= part
        assert result["num_images"] + len(unreadable) == feed.num_samples
        return EvalReport(
            checkpoint=str(checkpoint),
            model=loaded.name,
            weights=loaded.weights,
            data=str(data),
            split=split,
            view=loaded.view,
            precision=precision,
            result=result,
            unreadable=unreadable,
            is_main=place.is_main,
        )


def _open_data(
    data: str, split: str | None, classes: Path | None, root: str | None
) -> ShardIndex | ImageSource:
    if (Path(data) / INDEX_NAME).exists():
        for option, value in (("--classes", classes), ("--root", root)):
            if value is not None:
                raise ValueError(f"{option} is for other sources; {data} holds dataset shards")
        index = read_index(Path(data))
        index.split(split or "val")  # before a large checkpoint is read
        return index
    if split is not None:
        raise ValueError(
            f"--split {split} is for dataset shards, but {data} has no {INDEX_NAME}; for class "
            "folders give the split's own folder as --data"
        )
    source = open_source(data, classes=classes, root=root)
    if not source.num_classes:
        raise ValueError(
            f"{data} says of no image which class it has, so there is nothing to compare answers "
            "with; give class folders, shards with .cls files, or a list of PATH,CLASS"
        )
    return source


def _check_classes(loaded: EvalModel, opened: ShardIndex | ImageSource, data: Path | str) -> None:
    if isinstance(opened, ImageSource):
        if _is_numbered(opened) and opened.num_classes <= loaded.num_classes:
            return  # the numbers are those of the model's outputs, of which the last may not occur
        advice = (
            f"write {CLASSES_FILE} into the folder, or give --classes FILE: one class folder's "
            "name a line, in the order of the model's outputs; it may name classes without a folder"
        )
    else:
        advice = "pack it again with tl-shard pack --classes FILE, in the order of the model"
    if opened.num_classes != loaded.num_classes:
        raise ValueError(
            f"{data} has {opened.num_classes} classes, the model {loaded.num_classes}; {advice}"
        )
    if loaded.class_ids is None:
        return
    for i, (ours, theirs) in enumerate(zip(loaded.class_ids, opened.class_ids)):
        if ours != theirs:
            raise ValueError(
                f"class {i} is {theirs!r} in {data}, but {ours!r} in the checkpoint; {advice}"
            )


def _is_numbered(source: ImageSource) -> bool:
    """Tell whether the source's classes are plain indices, as in shards and some lists."""
    return source.class_ids == [str(number) for number in range(source.num_classes)]


# --------------------------------------------------------------------------------- models


def load_for_eval(
    checkpoint: Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    ema: bool | None = None,
) -> EvalModel:
    """Build the model of a checkpoint, load its weights, and find out what it wants to see.

    Args:
        checkpoint: Our own, a published LV-ViT or T2T-ViT file, or weights of any timm model.
        model: Name of the model. Our own files know it, published ones of our models show it.
        image_size: Side in pixels instead of the one the weights are meant for.
        crop_pct: Part of the image's shorter side to see, instead of the model's own.
        ema: Whether averaged weights are taken where the file has both; left out: the better ones.
            Files of timm models leave no choice.

    Raises:
        ValueError: Unknown model, a file that is torn or says nothing about its model, weights
            that are missing, unexpected or of another shape, with their names.
        OSError: If the file is not there.
    """
    if model is None or is_own(model):
        loaded = _load_ours(checkpoint, model, image_size, ema)
    else:
        loaded = _load_timm(checkpoint, model, image_size, ema)
    if crop_pct is None:
        return loaded
    return replace(loaded, view=replace(loaded.view, crop_pct=crop_pct))


def _load_ours(path: Path, name: str | None, image_size: int | None, ema: bool | None) -> EvalModel:
    """Load what tl-train trained, or a published file of a model of ours."""
    trained = checkpoint_file.load_model(path, name=name, image_size=image_size, ema=ema)
    model, recipe = trained.model, trained.recipe
    if trained.report.resized or trained.report.begun:
        _logger.info("%s", trained.report)
    if recipe is None:
        assert isinstance(model, LVViT)
        rows, cols = model.grid
        view = replace(_timm_view(model), image_size=(16 * rows, 16 * cols))
    else:
        view = EvalView(
            image_size=(image_size, image_size) if image_size else recipe.model.image_hw,
            crop_pct=recipe.evaluation.crop_pct,
            interpolation=recipe.evaluation.interpolation,
            mean=recipe.augment.mean,
            std=recipe.augment.std,
        )
    return EvalModel(
        model=model,
        name=trained.name,
        weights=trained.report.weights,
        view=view,
        num_classes=model.num_classes,
        class_ids=trained.class_ids,
    )


def _load_timm(path: Path, name: str, image_size: int | None, ema: bool | None) -> EvalModel:
    """Load weights of a timm model, whoever trained it."""
    check_name(name)
    loaded = load_timm(name, checkpoint=path, image_size=image_size, ema=ema)
    if ema is not None and loaded.weights == "published":
        raise ValueError(
            f"--ema and --raw choose between the weights in a file of tl-train or LV-ViT; {path} "
            "is of another program (where it holds averaged weights, they are taken)"
        )
    view = _timm_view(loaded.model)
    if image_size is not None:
        view = replace(view, image_size=(image_size, image_size))
    return EvalModel(
        model=loaded.model,
        name=name,
        weights=loaded.weights,
        view=view,
        num_classes=loaded.num_classes,
        class_ids=loaded.class_ids,
    )


def _timm_view(model: nn.Module) -> EvalView:
    # As timm's validate.py: where a model has been tested in a better view than trained, that one.
    config = resolve_data_config(model=model, use_test_size=True)
    return EvalView(
        image_size=config["input_size"][1:],
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_mode=config["crop_mode"],
    )


# --------------------------------------------------------------------------- class folders


class FolderFeed:
    """This rank's share of the images of class folders, in timm's evaluation view.

    Decoded by Pillow, whatever their format. Images that cannot be read are left out and noted.
    """

    num_samples: int
    """Images in the folder, over all ranks, the unreadable ones too."""
    unreadable: dict[str, str]
    """Key of each image of this rank that the last pass could not read → why."""

    def __init__(
        self,
        source: ImageSource,
        view: EvalView,
        *,
        batch_size: int,
        place: Place,
        num_workers: int | None = None,
    ) -> None:
        """Share the images out; num_workers are processes, None takes this rank's cores."""
        self.num_samples = len(source.samples)
        self.unreadable = {}
        self._device = place.device
        self._loader = DataLoader(
            _Photos(source, source.samples[place.rank :: place.world_size], view),
            batch_size=batch_size,
            num_workers=default_num_threads() if num_workers is None else num_workers,
            collate_fn=list,
        )

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self.unreadable = {}
        for photos in self._loader:
            good = [photo for photo in photos if photo.image is not None]
            self.unreadable |= {photo.key: photo.problem for photo in photos if photo.problem}
            if not good:
                continue
            yield Batch(
                images=torch.stack([photo.image for photo in good]).to(self._device),
                classes=torch.tensor([photo.class_index for photo in good]).to(self._device),
                views=crop_view(torch.tensor([photo.box for photo in good])).to(self._device),
                maps=None,
                keys=[photo.key for photo in good],
            )


class _Photo(NamedTuple):
    key: str
    class_index: int
    image: Tensor | None
    """(3, h, w), normalised; None if it cannot be read."""
    box: tuple[float, float, float, float]
    """What the view shows, (x0, y0, x1, y1) in image fractions."""
    problem: str


class _Photos(Dataset[_Photo]):
    def __init__(self, source: ImageSource, samples: list[Sample], view: EvalView) -> None:
        self._source, self._samples, self._view = source, samples, view
        height, width = view.image_size
        self._transform: Any = create_transform(
            height if height == width else view.image_size,
            interpolation=view.interpolation,
            crop_pct=view.crop_pct,
            crop_mode=view.crop_mode,
            mean=view.mean,
            std=view.std,
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> _Photo:
        sample = self._samples[i]
        assert sample.class_index is not None
        try:
            image = load_image(self._source.read(sample))
        except (BadImage, OSError) as error:
            return _Photo(sample.key, sample.class_index, None, (0, 0, 1, 1), str(error))
        box = seen_box((image.height, image.width), self._view)
        return _Photo(sample.key, sample.class_index, self._transform(image), box, "")


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
