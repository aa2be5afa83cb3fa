"""The job behind tl-seg predict: a checkpoint and images → label PNGs and overlays.

    OUT/labels/KEY.png      class index of each pixel, at the image's own size, with a palette
    OUT/overlays/KEY.jpg    the same, painted over the image, with a legend
    OUT/classes.tsv         index, name and colour of each class
    OUT/legend.png          the classes that occur
    OUT/settings.json       what decides the predictions
    OUT/index.json          counts, and the images that could not be read; written last

A run that was killed goes on where it stopped: files are written whole or not at all.
"""

import io
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..labeler.draw import mounted
from ..labeler.folder import replace_file, sha256_of
from ..labeler.images import BadImage, load_image
from ..labeler.listing import IMAGE_SUFFIXES, read_classes
from ..labeler.sources import ImageSource, Sample, escape, open_source
from ..trainer.distributed import Place, from_all, from_main, join_processes, reduce
from ..trainer.feed import default_num_threads
from .class_sets import CLASS_SETS, ClassSet, class_set_of, generated_colours
from .draw import SegEntry, draw_segmentation, label_image
from .inference import InferenceConfig, Precision, segment, why_too_small
from .weights import TrainedSegmenter, find_weights, load_model

FORMAT = "tokenlabel-segmentations"
VERSION = 1
LABELS, OVERLAYS = "labels", "overlays"
PALETTES = (*CLASS_SETS, "generated")

_SETTINGS, _INDEX, _CLASSES, _LEGEND = "settings.json", "index.json", "classes.tsv", "legend.png"
_NUM_WRITERS = 4
_TIMEOUT = timedelta(hours=6)
"""How long a process waits for slower ones at the end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PredictReport:
    """A finished run."""

    out: str
    checkpoint: str
    model: str
    weights: str
    num_images: int
    """That have their files now."""
    num_before: int
    """Of them, those that an earlier run had done."""
    unreadable: dict[str, str]
    """Key of each image without files → why."""
    pixels: dict[str, int]
    """Class → its pixels in all images; classes that occur, most frequent first."""
    images_per_sec: float
    """Of this run, over all processes."""
    is_main: bool = field(default=True)
    """Whether this process is the one that talks."""

    def to_json(self) -> dict[str, Any]:
        """Flatten to plain values."""
        facts = asdict(self)
        del facts["is_main"]
        return facts


class Look(NamedTuple):
    """How predictions are drawn."""

    overlays: bool = True
    """Whether they are painted over the images, too."""
    opacity: float = 0.5
    longest_px: int = 1024
    """Longer side of an overlay."""


def predict(
    checkpoint: Path | str,
    images: str,
    out: Path,
    *,
    root: str | None = None,
    ema: bool | None = None,
    inference: dict[str, Any] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    precision: Precision = "fp32",
    classes: Path | None = None,
    palette: str | None = None,
    look: Look = Look(),  # noqa: B008
    device: str = "auto",
    num_workers: int | None = None,
    overwrite: bool = False,
) -> PredictReport:
    """Segment images, on one process or under torchrun.

    Args:
        checkpoint: Of a segmentation model, ours or published: a file, a URL or a name, see
            weights.find_weights.
        images: One image, or whatever open_source lists; classes of images are not looked at.
        out: Folder to write into.
        root: Of a list: see open_source.
        ema: Whether averaged weights are taken where the file has both.
        inference: Fields of InferenceConfig to use instead of the checkpoint's.
        scales: See inference.segment.
        flip: See inference.segment.
        precision: Arithmetic of the forward pass.
        classes: File with a class name a line, where the checkpoint's are to be replaced.
        palette: One of PALETTES, instead of the colours that go with the names.
        look: How predictions are drawn.
        device: See distributed.join_processes.
        num_workers: Processes that read images; None takes this process's share of the cores.
        overwrite: Whether predictions of other settings in `out` are removed first.

    Raises:
        ValueError: Unknown settings, a checkpoint that is no segmentation model, or an `out` that
            holds predictions of other settings.
        OSError: Something is not there, or cannot be written.
    """
    with join_processes(device, timeout=_TIMEOUT) as place:
        if not place.is_main:
            logging.getLogger(__name__.partition(".")[0]).setLevel(logging.WARNING)
        source = open_images(images, root)
        path = find_weights(str(checkpoint), place)
        trained = load_model(path, ema=ema)
        named = choose_classes(trained.classes, names=classes, palette=palette)
        config = InferenceConfig(**asdict(trained.inference) | (inference or {}))
        if place.is_main:
            settings = {
                "checkpoint_sha256": sha256_of(path),
                "weights": trained.weights,
                "images": source.root,
                "inference": asdict(config),
                "scales": list(scales),
                "flip": flip,
                "precision": precision,
                "classes": list(named.names),
                "colours": [_hex(colour) for colour in named.colours],
                "look": look._asdict(),
            }
            _begin(out, settings, overwrite=overwrite)
        from_main(place, None)
        trained.model.to(place.device)
        job = _Job(trained, config, tuple(scales), flip, precision, named, look, out)
        start = time.perf_counter()
        mine = source.samples[place.rank :: place.world_size]
        found = _segment_all(job, source, mine, place, num_workers)
        secs = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=place.device)
        pixels = reduce(place, found.pixels.to(place.device), "sum").tolist()
        unreadable: dict[str, str] = {}
        for part in from_all(place, found.unreadable):
            unreadable |= part
        num_before = sum(from_all(place, found.num_before))
        num_images = len(source.samples) - len(unreadable)
        order = sorted((i for i in range(len(pixels)) if pixels[i]), key=lambda i: -pixels[i])
        report = PredictReport(
            out=str(out),
            checkpoint=str(checkpoint),
            model=trained.config.name,
            weights=trained.weights,
            num_images=num_images,
            num_before=num_before,
            unreadable=dict(sorted(unreadable.items())),
            pixels={named.names[i]: pixels[i] for i in order},
            images_per_sec=(num_images - num_before) / reduce(place, secs, "max").item(),
            is_main=place.is_main,
        )
        if place.is_main:
            _write_legend(out, named, {i: pixels[i] for i in order})
            index = {"format": FORMAT, "version": VERSION, **report.to_json()}
            replace_file(out / _INDEX, _to_json(index))
        return report


def open_images(images: str, root: str | None = None) -> ImageSource:
    """List images as open_source does; a single image will do, too."""
    path = Path(images)
    if root is None and path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(images, [Sample(escape(path.stem), images, None)], [], [])
    return open_source(images, root=root)


def choose_classes(
    classes: ClassSet, *, names: Path | None = None, palette: str | None = None
) -> ClassSet:
    """Replace names or colours of classes.

    Args:
        classes: What the checkpoint says.
        names: File with a class name a line.
        palette: One of PALETTES.

    Raises:
        ValueError: Their number is another one than the model's.
        OSError: The file cannot be read.
    """
    if names is not None:
        given = read_classes(names).names
        if len(given) != len(classes.names):
            raise ValueError(
                f"{names} names {len(given)} classes, the model has {len(classes.names)}; expected "
                "one a line, in the order of the model's outputs"
            )
        classes = class_set_of(given)
    if palette is None:
        return classes
    if palette == "generated":
        return ClassSet(names=classes.names, colours=generated_colours(len(classes.names)))
    colours = CLASS_SETS[palette].colours
    if len(colours) < len(classes.names):
        raise ValueError(
            f"palette {palette} has {len(colours)} colours, the model {len(classes.names)} "
            "classes; take the palette called generated"
        )
    return ClassSet(names=classes.names, colours=colours[: len(classes.names)])


# ------------------------------------------------------------------------------------ the folder


def _begin(out: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder, or accept one that a run of the same settings left."""
    path = out / _SETTINGS
    if path.is_file() and not overwrite:
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged; give --overwrite to begin anew") from error
        changed = [key for key in settings if old.get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{out} holds predictions of other settings ({', '.join(changed)} differ); give "
                "another --out, or --overwrite to replace them"
            )
    elif out.is_dir() and not path.is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no predictions; give another --out")
    if overwrite and path.is_file():
        for folder in (LABELS, OVERLAYS):
            shutil.rmtree(out / folder, ignore_errors=True)
    for name in (_INDEX, _LEGEND):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(path, _to_json(settings))
    rows = enumerate(zip(settings["classes"], settings["colours"]))
    table = "".join(f"{index}\t{name}\t{colour}\n" for index, (name, colour) in rows)
    replace_file(out / _CLASSES, ("index\tname\tcolour\n" + table).encode())


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _write_legend(out: Path, classes: ClassSet, pixels: dict[int, int]) -> None:
    total = sum(pixels.values())
    entries = [
        SegEntry(classes.names[i], classes.colours[i], count / total) for i, count in pixels.items()
    ]
    sheet, _ = mounted([], entries, title="Classes, and their part of all pixels")
    replace_file(out / _LEGEND, _encoded(sheet, "PNG"))


# ------------------------------------------------------------------------------------ the images


class _Job(NamedTuple):
    trained: TrainedSegmenter
    config: InferenceConfig
    scales: tuple[float, ...]
    flip: bool
    precision: Precision
    classes: ClassSet
    look: Look
    out: Path


class _Found(NamedTuple):
    """What this process's images gave."""

    pixels: Int64[Tensor, " c"]
    unreadable: dict[str, str]
    num_before: int


class _Photo(NamedTuple):
    key: str
    pixels: UInt8[Tensor, "3 h w"] | None
    """None if there is a problem."""
    problem: str


class _Photos(Dataset[_Photo]):
    def __init__(self, source: ImageSource, samples: list[Sample]) -> None:
        self._source, self._samples = source, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> _Photo:
        sample = self._samples[i]
        try:
            image = load_image(self._source.read(sample))
        except (BadImage, OSError) as error:
            return _Photo(sample.key, None, str(error))
        return _Photo(sample.key, torch.from_numpy(np.array(image)).permute(2, 0, 1), "")


def _segment_all(
    job: _Job,
    source: ImageSource,
    samples: list[Sample],
    place: Place,
    num_workers: int | None,
) -> _Found:
    """Do the images whose files are not there yet; writing runs beside computing."""
    num_classes = job.trained.config.num_classes
    pixels = torch.zeros(num_classes, dtype=torch.int64)
    unreadable: dict[str, str] = {}
    todo = []
    for sample in samples:
        done = _pixels_before(job, sample.key, num_classes)
        if done is None:
            todo.append(sample)
        else:
            pixels += done
    loader = DataLoader(
        _Photos(source, todo),
        batch_size=None,
        num_workers=default_num_threads() if num_workers is None else num_workers,
    )
    writing: deque[Future[None]] = deque()
    hidden = None if place.is_main else True
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        for photo in tqdm(loader, desc="segment", unit="image", disable=hidden):
            image, problem = photo.pixels, photo.problem
            if image is not None:
                size = (image.shape[1], image.shape[2])
                problem = why_too_small(size, job.config, scales=job.scales) or ""
            if image is None or problem:
                unreadable[photo.key] = problem
                continue
            labels = segment(
                job.trained.model,
                image,
                job.config,
                mean=job.trained.config.mean,
                std=job.trained.config.std,
                scales=job.scales,
                flip=job.flip,
                precision=job.precision,
            ).cpu()
            pixels += torch.bincount(labels.flatten(), minlength=num_classes)
            writing.append(pool.submit(_write, job, photo.key, image.numpy(), labels.numpy()))
            if len(writing) > 2 * _NUM_WRITERS:
                writing.popleft().result()
        for written in writing:
            written.result()
    return _Found(pixels, unreadable, len(samples) - len(todo))


def _pixels_before(job: _Job, key: str, num_classes: int) -> Int64[Tensor, " c"] | None:
    """Count the pixels of an image that an earlier run has done; None if there is work to do."""
    path = _label_path(job.out, key)
    if not path.is_file() or (job.look.overlays and not _overlay_path(job.out, key).is_file()):
        return None
    try:
        with Image.open(path) as image:
            labels = np.array(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError):
        return None  # damaged since: it is done anew
    if labels.size == 0 or labels.max() >= num_classes:
        return None
    return torch.from_numpy(np.bincount(labels.ravel(), minlength=num_classes))


def _write(
    job: _Job,
    key: str,
    pixels: UInt8[np.ndarray, "3 h w"],
    labels: Int64[np.ndarray, "h w"],
) -> None:
    path = _label_path(job.out, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _encoded(label_image(labels, job.classes.colours), "PNG"))
    if not job.look.overlays:
        return
    sheet = draw_segmentation(
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))),
        labels,
        job.classes,
        title=key,
        opacity=job.look.opacity,
        longest_px=job.look.longest_px,
    )
    path = _overlay_path(job.out, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _encoded(sheet, "JPEG"))


def _label_path(out: Path, key: str) -> Path:
    return out / LABELS / f"{key}.png"


def _overlay_path(out: Path, key: str) -> Path:
    return out / OVERLAYS / f"{key}.jpg"


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=90)
    return buffer.getvalue()
