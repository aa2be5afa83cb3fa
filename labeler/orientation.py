"""How are the files of a published label set to be read?

They say neither which axis comes first nor which part of the image their grid covers. A classifier
that looks at some of the images can tell: its answers agree with the files where the files are
read rightly, and hardly where they are not.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt32
from PIL import Image
from tqdm import tqdm

from .fit import place, resize
from .images import BadImage, load_image
from .published import (
    AXES,
    FITS,
    BadLabelFile,
    Planes,
    PublishedFiles,
    check_choice,
    match_names,
    mend,
    read_planes,
    size_and_orientation,
    turn_upright,
)
from .sources import ImageSource
from .teacher import Teacher
from .verify import Interval, bootstrap

_TRIED_FITS = ("stretch", "center")
_MIN_IMAGES = 8
"""Nothing is concluded from fewer."""
_CONFIDENCE = 0.99


class Probe(NamedTuple):
    """How well one reading of the files agrees with a classifier."""

    axes: str
    fit: str
    agreement: Interval
    """Share of cells whose first class is the classifier's."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How the files of a set are to be read."""

    axes: str
    """One of AXES."""
    fit: str
    """One of FITS."""
    probes: tuple[Probe, ...]
    """What was tried, best first."""
    margin: Interval | None
    """By how much the best reading is ahead of the closest other one, with its 99 % interval; None
    if there was no other."""
    num_images: int
    """That were looked at."""

    def to_json(self) -> dict[str, Any]:
        """Return what was tried, for the index of the imported set."""
        return {
            "num_images": self.num_images,
            "probes": [
                {"axes": p.axes, "fit": p.fit, "agreement": p.agreement._asdict()}
                for p in self.probes
            ],
            "margin": None if self.margin is None else self.margin._asdict(),
        }


def find_geometry(
    files: PublishedFiles,
    source: ImageSource,
    teacher: Teacher,
    *,
    axes: str = "auto",
    fit: str = "auto",
    num_images: int = 64,
    seed: int = 0,
    show_progress: bool = True,
) -> Geometry:
    """Find out how a set's files are to be read, by looking at some images with a classifier.

    Every reading is tried: the classifier sees the part of the image that the grid would cover, at
    the size that gives it the same grid, and its first class of each cell is compared with the
    file's. The classifier need not be the set's own teacher, but must know its classes.

    Args:
        files: The set.
        source: Its images.
        teacher: The classifier.
        axes: One of AXES if known, else "auto".
        fit: One of FITS if known, else "auto".
        num_images: How many to look at.
        seed: Of the choice of images.
        show_progress: Whether to draw a progress bar (on a terminal only).

    Raises:
        ValueError: If too few images have a file, or no reading is clearly better than the others:
            with 99 % confidence over images.
    """
    check_choice("orientation", axes, ("auto", *AXES))
    check_choice("fit", fit, ("auto", *FITS))
    readings = [
        (a, f)
        for a in (AXES if axes == "auto" else (axes,))
        for f in (_TRIED_FITS if fit == "auto" else (fit,))
    ]
    hits: list[list[float]] = []
    same_window = True
    problem = "no image has a file"
    names = match_names(files, source)
    candidates = [sample for sample in source.samples if sample.key in names]
    random.Random(seed).shuffle(candidates)
    with tqdm(
        desc="orient",
        total=min(num_images, len(candidates)),
        unit="img",
        disable=None if show_progress else True,
    ) as progress:
        for sample in candidates:
            if len(hits) == num_images:
                break
            try:
                planes = read_planes(files.read(names[sample.key]))
                _check_ids(planes, teacher)
                stored = source.read(sample)
                _, orientation = size_and_orientation(stored)
                image = load_image(stored)
            except (BadLabelFile, BadImage, FileNotFoundError, PermissionError) as error:
                problem = f"{sample.key}: {error}"
                continue
            hits.append(_hits(readings, planes.classes[0], orientation, image, teacher))
            same_window &= image.width == image.height
            progress.update()
    if len(hits) < _MIN_IMAGES:
        raise ValueError(
            f"only {len(hits)} images of {source.root} have a usable file in {files.location} "
            f"({problem}); at least {_MIN_IMAGES} are needed to tell orientation and fit: say "
            "which they are with --orientation and --fit"
        )
    if same_window and fit == "auto":
        raise ValueError(
            f"the {len(hits)} images looked at are square, so their whole and their middle square "
            "are the same and the fit cannot be told: give --fit stretch or --fit center"
        )
    return _decide(readings, np.array(hits), files)


def _check_ids(planes: Planes, teacher: Teacher) -> None:
    if int(planes.classes.max()) >= teacher.num_classes:
        raise BadLabelFile(
            f"it names class {planes.classes.max()}, {teacher.name} has only {teacher.num_classes}"
        )


def _hits(
    readings: Sequence[tuple[str, str]],
    best: UInt32[np.ndarray, "a b"],
    orientation: int,
    image: Image.Image,
    teacher: Teacher,
) -> list[float]:
    """Return the share of cells on which teacher and file agree, for each reading."""
    seen: dict[tuple, np.ndarray] = {}
    shares = []
    for axes, fit in readings:
        cells = turn_upright(mend(best, axes), orientation)
        key = (fit, cells.shape)
        if key not in seen:
            seen[key] = _first_classes(image, fit, (cells.shape[0], cells.shape[1]), teacher)
        shares.append(float((seen[key] == cells).mean()))
    return shares


def _first_classes(
    image: Image.Image, fit: str, grid: tuple[int, int], teacher: Teacher
) -> np.ndarray:
    """Return the teacher's first class of every cell of a grid laid over the image as fitted."""
    size = (grid[0] * teacher.stride, grid[1] * teacher.stride)
    if teacher.square_only:
        size = (teacher.image_size, teacher.image_size)
    placement = place(image.size, fit=fit, teacher_size=teacher.image_size, stride=teacher.stride)
    pixels = resize(image, replace(placement, size=size), interpolation=teacher.interpolation)
    logits = teacher.dense(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    if logits.shape[2:] != grid:
        logits = F.interpolate(logits, grid, mode="bilinear", align_corners=False)
    return logits[0].argmax(0).cpu().numpy()


def _decide(
    readings: Sequence[tuple[str, str]],
    hits: Float[np.ndarray, "images readings"],
    files: PublishedFiles,
) -> Geometry:
    best, *others = np.argsort(-hits.mean(0), kind="stable").tolist()
    probes = tuple(
        Probe(axes=readings[i][0], fit=readings[i][1], agreement=_mean(hits[:, i]))
        for i in (best, *others)
    )
    margins = [_mean(hits[:, best] - hits[:, i], confidence=_CONFIDENCE) for i in others]
    closest = min(margins, key=lambda margin: margin.low, default=None)
    unclear = [probe for probe, margin in zip(probes[1:], margins) if margin.low <= 0]
    if closest is not None and unclear:
        raise ValueError(_undecided(probes, unclear, closest, len(hits), files))
    return Geometry(
        axes=probes[0].axes,
        fit=probes[0].fit,
        probes=probes,
        margin=closest,
        num_images=len(hits),
    )


def _mean(per_image: Float[np.ndarray, " images"], *, confidence: float = 0.95) -> Interval:
    ones, image = np.ones(len(per_image)), np.arange(len(per_image))
    return bootstrap(per_image, ones, image, confidence=confidence)


def _undecided(
    probes: Sequence[Probe],
    unclear: Sequence[Probe],
    closest: Interval,
    num_images: int,
    files: PublishedFiles,
) -> str:
    options = []
    if any(probe.axes != probes[0].axes for probe in unclear):
        options.append("--orientation")
    if any(probe.fit != probes[0].fit for probe in unclear):
        options.append("--fit")
    tried = "; ".join(
        f"{p.axes} {p.fit} {p.agreement.value:.3f} [{p.agreement.low:.3f}, {p.agreement.high:.3f}]"
        for p in probes
    )
    return (
        f"how the files of {files.location} are to be read cannot be told from {num_images} "
        f"images. Share of cells that agree with the classifier: {tried}; the closest two differ "
        f"by {closest.value:.3f} [{closest.low:.3f}, {closest.high:.3f}]. Say it with "
        f"{' and '.join(options)}, look at more images, or give a better classifier"
    )
