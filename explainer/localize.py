"""Does heat lie on the object? Pointing game, heat inside, and objects segmented by heatmaps.

Where objects lie is read from boxes or masks of the original images and moved into the model's view
of them: a pixel of the view is inside where its centre is.
"""

import csv
import functools
import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int8, Integer
from PIL import Image
from torch import Tensor

from ..evaluator.data import EvalView, seen_box
from ..labeler.folder import replace_file
from ..labeler.sources import IMAGE_SUFFIXES, unescape
from ..shards.masks import BadMask, read_mask
from .methods import normalize

VOID = -1
"""In masks: a pixel that does not count."""
CSV_COLUMNS = ("image", "x0", "y0", "x1", "y1")

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_PNG_VOID = 255
_NUM_SHOWN = 3

Mask = Int8[Tensor, "h w"]
"""1 on the object, 0 beside it, VOID where nothing is said."""


# -------------------------------------------------------------------------------- heat inside


class Localization(NamedTuple):
    """How heat of each image lies to its object."""

    hit: Bool[Tensor, " b"]
    """Whether the hottest pixel lies inside: the pointing game (https://arxiv.org/abs/1608.00507),
    here without its tolerance of 15 px. If several are hottest, all of them must."""
    mass: Float32[Tensor, " b"]
    """Share of the positive heat that lies inside; 0 where there is none."""


def localize(heat: Float[Tensor, "b h w"], inside: Bool[Tensor, "b h w"]) -> Localization:
    """Compare heat with the place of the object, pixel by pixel."""
    heat, inside = heat.flatten(1), inside.flatten(1)
    lowest = float("-inf")
    hottest = heat.masked_fill(~inside, lowest).amax(1)
    positive = heat.double().clamp(min=0)
    total = positive.sum(1)
    mass = (positive * inside).sum(1) / torch.where(total > 0, total, 1.0)
    return Localization(hottest > heat.masked_fill(inside, lowest).amax(1), mass.float())


# ------------------------------------------------------------------------------- segmentation


class SegmentedImage(NamedTuple):
    """Pixels of an image by truth and answer, and how well its heat ranks them."""

    background_as_background: int
    background_as_object: int
    object_as_background: int
    object_as_object: int
    average_precision: float


def segment(heat: Float[Tensor, "h w"], mask: Integer[Tensor, "h w"]) -> SegmentedImage:
    """Segment one image by its heat, by the protocol of Transformer Attribution.

    (https://arxiv.org/abs/2012.09838, section 4.) Heat is stretched to 0 … 1; where it is above its
    mean, void pixels included, the answer is "object". The average precision ranks two answers of
    each pixel, "object" by its heat h and "background" by 1 - h. Heat that is the same everywhere
    says "background" with no rank. As published, heat and mask have the size of the model's
    input, 224 px, and the view is the whole image, not a crop.

    Args:
        heat: A value per pixel.
        mask: 1 on the object, 0 beside it, VOID where no answer counts.

    Raises:
        ValueError: Other values in the mask, or nothing but VOID.
    """
    heat, mask = heat.detach().float().cpu(), mask.cpu()
    _check_mask(mask)
    stretched = normalize(heat[None])[0]
    is_flat = not bool(stretched.any())
    counted = mask != VOID
    answer, truth = (stretched > stretched.mean())[counted], mask[counted] == 1
    right = torch.bincount(2 * truth + answer.long(), minlength=4).tolist()
    background = torch.zeros_like(stretched) if is_flat else 1 - stretched
    scores = torch.cat([background[counted], stretched[counted]]).numpy()
    precision = average_precision(scores, torch.cat([~truth, truth]).numpy())
    return SegmentedImage(right[0], right[1], right[2], right[3], precision)


def average_precision(scores: Float32[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    """Sum precision over the steps of recall, from the highest score down; ties are one step.

    Not interpolated, as scikit-learn's average_precision_score.

    Args:
        scores: Of answers.
        right: Which of them are; at least one.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(right[order])
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    precision = hits[ends] / (ends + 1)
    return float((np.diff(hits[ends], prepend=0) * precision).sum() / hits[-1])


def segmentation_scores(means: Float64[np.ndarray, "r 5"]) -> dict[str, Float64[np.ndarray, " r"]]:
    """Tell how well heat finds objects, from what segment found, averaged over images; percent.

    Returns:
        pixel_accuracy, of all pixels of all images; mean_ap, the mean over images of the average
        precision; miou, the mean of the IoUs of object and background, each over all pixels of all
        images. One of each for every row.
    """
    right_background, false_object, missed, right_object, precision = means.T
    wrong = false_object + missed
    pixels = right_background + right_object + wrong
    ious = [
        right / np.where(right + wrong > 0, right + wrong, 1)
        for right in (right_background, right_object)
    ]
    return {
        "pixel_accuracy": 100 * (right_background + right_object) / pixels,
        "mean_ap": 100 * precision,
        "miou": 50 * (ious[0] + ious[1]),
    }


def _check_mask(mask: Integer[Tensor, "h w"]) -> None:
    values = mask.unique().tolist()
    if wrong := [value for value in values if value not in (0, 1, VOID)]:
        raise ValueError(
            f"the mask has pixels of value {wrong[0]}; allowed: 1 on the object, 0 beside it, "
            f"{VOID} where nothing is said"
        )
    if values == [VOID]:
        raise ValueError("the mask says of no pixel whether the object is there")


# -------------------------------------------------------------------------------- annotations


class _Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float
    where: str
    """File and line, for messages."""


@dataclass(frozen=True, eq=False)
class _Boxes:
    """The object is what the boxes cover; edges in px of the original image."""

    where: str
    boxes: list[_Box]
    image_hw: tuple[int, int] | None
    """Of the image that they belong to, where the file says so."""

    def check(self, image_hw: tuple[int, int]) -> None:
        """Refuse boxes that reach beyond the image."""
        for x0, y0, x1, y1, where in self.boxes:
            if min(x0, y0) < 0 or x1 > image_hw[1] or y1 > image_hw[0]:
                raise ValueError(
                    f"{where}: the box {x0:g},{y0:g},{x1:g},{y1:g} reaches beyond its image of "
                    f"{_size(image_hw)}; boxes are x0,y0,x1,y1 in px of the original image"
                )

    def at(
        self, rows: Float64[np.ndarray, " h"], cols: Float64[np.ndarray, " w"]
    ) -> Int8[np.ndarray, "h w"]:
        """Tell which points, given in px, lie in a box."""
        covered = np.zeros((len(rows), len(cols)), bool)
        for x0, y0, x1, y1, _ in self.boxes:
            covered |= ((rows >= y0) & (rows < y1))[:, None] & (cols >= x0) & (cols < x1)
        return covered.astype(np.int8)


@dataclass(frozen=True, eq=False)
class _Pixels:
    """The object is what a mask of the original image says."""

    where: str
    mask: Int8[np.ndarray, "h w"]

    @property
    def image_hw(self) -> tuple[int, int]:
        return self.mask.shape  # pyright: ignore[reportReturnType]

    def at(
        self, rows: Float64[np.ndarray, " h"], cols: Float64[np.ndarray, " w"]
    ) -> Int8[np.ndarray, "h w"]:
        """Look points up, given in px."""
        at_rows, at_cols = (
            np.floor(at).astype(np.int64).clip(0, n - 1)
            for at, n in zip((rows, cols), self.mask.shape)
        )
        return self.mask[at_rows[:, None], at_cols]


_Read = Callable[[], _Boxes | _Pixels]


class Annotations:
    """Where the objects of images are.

    An image is asked for by its key or its path, with or without suffix; its last part is enough
    where no other annotation has the same one.

    Args:
        name: The file or folder, for messages.
        readers: By the image's path without suffix: what reads its annotation.
    """

    def __init__(self, name: str, readers: dict[str, _Read]) -> None:
        self.name = name
        self._readers = readers
        self._by_last_part: dict[str, list[str]] = {}
        for path in readers:
            self._by_last_part.setdefault(path.rpartition("/")[2], []).append(path)

    def __len__(self) -> int:
        """Return the number of images with an annotation."""
        return len(self._readers)

    def __contains__(self, name: str) -> bool:
        """Tell whether an image has an annotation."""
        return bool(self._found(name))

    def inside(self, name: str, view: EvalView, image_hw: tuple[int, int]) -> Bool[Tensor, "h w"]:
        """Tell which pixels of the model's view show the object; see mask."""
        return self.mask(name, view, image_hw) == 1

    def mask(self, name: str, view: EvalView, image_hw: tuple[int, int]) -> Mask:
        """Lay an annotation into the model's view of its image.

        Args:
            name: Of the image.
            view: What the model sees of it.
            image_hw: Height and width of the original image, px, turned as its EXIF data say.

        Returns:
            A value per pixel of the view: 1, 0 or VOID.

        Raises:
            ValueError: No annotation of this image, or one that is damaged or of another image.
            OSError: It cannot be read.
        """
        found = self._found(name)
        if not found:
            first = ", ".join(list(self._readers)[:_NUM_SHOWN])
            more = ", …" if len(self) > _NUM_SHOWN else ""
            raise ValueError(
                f"{self.name} has no annotation of the image {name}, only of {first}{more}"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.name} has annotations of {' and '.join(found[:_NUM_SHOWN])}, so it is not "
                f"clear which is that of {name}; name the images by their paths"
            )
        place = self._readers[found[0]]()
        if place.image_hw is not None and place.image_hw != image_hw:
            raise ValueError(
                f"{place.where} is of an image of {_size(place.image_hw)}, but {name} has "
                f"{_size(image_hw)}; give the annotations of these very images, before any resizing"
            )
        if isinstance(place, _Boxes):
            place.check(image_hw)
        x0, y0, x1, y1 = seen_box(image_hw, view)
        height, width = view.image_size
        rows = (y0 + (y1 - y0) * (np.arange(height) + 0.5) / height) * image_hw[0]
        cols = (x0 + (x1 - x0) * (np.arange(width) + 0.5) / width) * image_hw[1]
        is_seen = ((rows >= 0) & (rows < image_hw[0]))[:, None] & (cols >= 0) & (cols < image_hw[1])
        return torch.from_numpy(np.where(is_seen, place.at(rows, cols), np.int8(VOID)))

    def _found(self, name: str) -> list[str]:
        for path in (_without_suffix(name), _without_suffix(unescape(name))):
            if path in self._readers:
                return [path]
            if found := self._by_last_part.get(path.rpartition("/")[2]):
                return found
        return []


def open_annotations(path: Path | str) -> Annotations:
    """Open what says where objects are.

    It is one of

    * a table, .csv, with the columns image, x0, y0, x1, y1: edges of a box, px of the original
      image; an image may have several;
    * a folder of XML files as ImageNet has them for its boxes (CLS-LOC), in subfolders or not;
    * a folder of masks, PATH.png for PATH.jpg and as large as it: 0 is beside the object, all else
      on it, but 255 is void where other values than 0 and 255 occur, as in VOC's masks;
    * ImageNet-Segmentation, gtsegs_ijcv.mat, whose images write_images takes out; needs h5py.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is none of these, or damaged.
        OSError: It cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return Annotations(str(path), _readers_in(path))
    if path.suffix == ".csv":
        return Annotations(str(path), _read_csv(path))
    if path.suffix == ".mat":
        return Annotations(str(path), _readers_of_mat(path))
    raise ValueError(
        f"{path} holds no annotations that are known; expected a table .csv "
        f"({','.join(CSV_COLUMNS)}), a folder of XML files or of PNG masks, or gtsegs_ijcv.mat"
    )


def write_images(mat: Path, folder: Path) -> int:
    """Take the images out of ImageNet-Segmentation: FOLDER/n01440764_10043.png, and so on.

    Those that are there already stay.

    Returns:
        The number of images in the file.

    Raises:
        ValueError: As open_annotations.
        OSError: Something cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = _names_in_mat(mat)
    with _open_mat(mat) as file:
        for number, name in enumerate(names):
            if (path := folder / f"{name}.png").exists():
                continue
            pixels = np.array(file[file["/value/img"][number, 0]]).transpose(2, 1, 0)
            png = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(png, "PNG")
            replace_file(path, png.getvalue())
    return len(names)


# -------------------------------------------------------------------------------------- files


def _read_csv(path: Path) -> dict[str, _Read]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [name for name in CSV_COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; its first line must name the columns: "
                f"{','.join(CSV_COLUMNS)}"
            )
        boxes: dict[str, list[_Box]] = {}
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            image = _without_suffix(row["image"])
            boxes.setdefault(image, []).append(_box([row[n] for n in CSV_COLUMNS[1:]], where))
    if not boxes:
        raise ValueError(f"{path} has no boxes")
    return {
        image: functools.partial(_Boxes, str(path), found, None) for image, found in boxes.items()
    }


def _box(texts: Sequence[str | None], where: str) -> _Box:
    """Read the edges of a box."""
    x0, y0, x1, y1 = _four_numbers(texts, where)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(
            f"{where}: the box {x0:g},{y0:g},{x1:g},{y1:g} is empty; x0 must be less than x1, and "
            "y0 less than y1"
        )
    return _Box(x0, y0, x1, y1, where)


def _four_numbers(texts: Sequence[str | None], where: str) -> list[float]:
    try:
        return [float(text or "") for text in texts]
    except ValueError:
        shown = ",".join(text or "" for text in texts)
        raise ValueError(f"{where}: the box {shown!r} is not four numbers") from None


def _readers_in(folder: Path) -> dict[str, _Read]:
    found = {suffix: sorted(folder.rglob(f"*{suffix}")) for suffix in (".xml", ".png")}
    if not (found[".xml"] or found[".png"]):
        raise ValueError(
            f"{folder} holds no annotations: neither .xml files (boxes) nor .png (masks)"
        )
    if found[".xml"] and found[".png"]:
        raise ValueError(
            f"{folder} holds both boxes (.xml) and masks (.png); give the folder of one of them"
        )
    read = _read_xml if found[".xml"] else _read_png
    return {
        path.relative_to(folder).with_suffix("").as_posix(): functools.partial(read, path)
        for path in found[".xml"] or found[".png"]
    }


def _read_xml(path: Path) -> _Boxes:
    """Read boxes whose corners are pixels, counted from 0; both corners belong to the box."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{path} is no XML file: {error}") from error
    height, width = (_length(root.findtext(f"size/{name}"), path) for name in ("height", "width"))
    boxes = [_pixel_box(found, path, (width, height)) for found in root.iter("bndbox")]
    if not boxes:
        raise ValueError(f"{path} has no boxes: no <bndbox>")
    return _Boxes(str(path), boxes, (height, width))


def _pixel_box(found: ET.Element, path: Path, size: tuple[int, int]) -> _Box:
    x0, y0, x1, y1 = _four_numbers([found.findtext(name) for name in _CORNERS], str(path))
    if x1 < x0 or y1 < y0:
        raise ValueError(f"{path}: the box {x0:g},{y0:g},{x1:g},{y1:g} is empty: min above max")
    # A corner on the image's far edge, which is no pixel, occurs, too.
    x1, y1 = (max(far, min(far + 1, length)) for far, length in zip((x1, y1), size))
    return _Box(x0, y0, x1, y1, str(path))


def _length(text: str | None, path: Path) -> int:
    if not (text and text.strip().isdigit()):
        raise ValueError(f"{path} does not say how large its image is: <size> holds {text!r}")
    return int(text)


def _read_png(path: Path) -> _Pixels:
    try:
        values = read_mask(path.read_bytes())
    except BadMask as error:
        raise ValueError(f"{path}: the mask {error}") from error
    mask = (values != 0).astype(np.int8)
    if ((values != 0) & (values != _PNG_VOID)).any():
        mask[values == _PNG_VOID] = VOID
    return _Pixels(str(path), mask)


def _open_mat(path: Path) -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingImports]  # of no extra: for one file
    except ImportError as error:
        raise ValueError(f"{path} is an HDF5 file; to read it: pip install h5py") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not gtsegs_ijcv.mat: {error}") from error


def _readers_of_mat(path: Path) -> dict[str, _Read]:
    return {
        name: functools.partial(_read_mat_mask, path, number)
        for number, name in enumerate(_names_in_mat(path))
    }


def _names_in_mat(path: Path) -> list[str]:
    """Read which image of ImageNet each one is, e.g. n01440764_10043."""
    with _open_mat(path) as file:
        try:
            references = file["/value/id"][:, 0]
            return ["".join(map(chr, np.array(file[each]).ravel())) for each in references]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not gtsegs_ijcv.mat, which has the images' names in /value/id: {error}"
            ) from error


def _read_mat_mask(path: Path, number: int) -> _Pixels:
    with _open_mat(path) as file:
        segmentations = file[file["/value/gt"][number, 0]]
        mask = np.array(file[segmentations[0, 0]]).T
    return _Pixels(f"{path}, image {number}", (mask > 0).astype(np.int8))


def _without_suffix(path: str) -> str:
    return path.rpartition(".")[0] if path.lower().endswith(IMAGE_SUFFIXES) else path


def _size(image_hw: tuple[int, int]) -> str:
    return f"{image_hw[1]} × {image_hw[0]} px"
