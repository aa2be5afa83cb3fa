"""The job behind tl-explain evaluate: how faithful are a model's heatmaps, method by method?

    OUT/images.jsonl    what decides the numbers, then a line for each image: all its curves
    OUT/results.json    the numbers, with 95 % intervals over images
    OUT/curves.png      the curves

Images are looked at one by one and in order, whatever the number of processes, so that images.jsonl
is the same to the last byte. A second start goes on behind its last whole line.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluator.data import EvalView, PilView
from ..evaluator.labels import Truth
from ..evaluator.models import EvalModel
from ..evaluator.predictions import MODEL
from ..labeler.folder import replace_file
from ..labeler.images import BadImage, load_image
from ..labeler.sources import Sample
from ..trainer.distributed import Place, from_all, from_main
from .curves import draw_curves
from .explain import methods_of, spread
from .localize import Annotations, localize, segment
from .methods import Options, explain, upsample
from .perturb import Perturber, Points, Protocol
from .scores import CONTROL, Faithfulness, sum_up

IMAGES, RESULTS, PICTURE = "images.jsonl", "results.json", "curves.png"

Explained = Literal["prediction", "label"]
"""Which class heatmaps are made of: the model's answer to the whole image, or the right one."""

_FORMAT, _VERSION = "tokenlabel-faithfulness", 1
_DIGITS = 7

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FaithfulnessConfig:
    """Everything that decides the numbers but model, images and annotations.

    The published perturbation tests have options=Options(target="class", start_layer=1).
    """

    methods: tuple[str, ...] = ("all",)
    """Keys of METHODS, or "all": all that are possible. "random" always takes part."""
    explained: Explained = "prediction"
    options: Options = Options()
    protocol: Protocol = Protocol()
    num_images: int | None = None
    """Images to look at, spread evenly over the source; None for all."""
    num_compared: int = 16
    """Images, the first, whose heatmaps are made in the other precision, too."""
    double: bool = False
    """Whether to compute in float64, and compare with float32, instead of the reverse."""
    batch_size: int = 32
    """Changed images that the model is asked about at a time."""


def evaluate(
    model: EvalModel,
    truth: Truth,
    out: Path,
    config: FaithfulnessConfig,
    place: Place,
    *,
    boxes: Annotations | None = None,
    masks: Annotations | None = None,
    segmentation: Annotations | None = None,
) -> Faithfulness | None:
    """Measure how faithful heatmaps are; go on where an earlier start has stopped.

    Args:
        model: See load_for_eval. It is moved to the place's device.
        truth: The images with their right classes, see find_truth.
        out: Folder for images.jsonl, results.json and curves.png.
        config: The rest.
        place: This process among all.
        boxes: Where objects are: pointing game and heat inside. Images without count elsewhere.
        masks: The same, pixel by pixel.
        segmentation: Objects to segment by heat. Images are then seen whole, squeezed to the
            model's size, as that protocol has it.

    Returns:
        The numbers, on the main process; None on others.

    Raises:
        ValueError: Unknown or impossible method, no class where one is needed, no image that can be
            read or that an annotation knows, or results of another configuration in `out`.
        OSError: Something cannot be read or written.
    """
    annotations = {
        name: given
        for name, given in (("boxes", boxes), ("masks", masks), ("segmentation", segmentation))
        if given is not None
    }
    methods = methods_of(model, config.methods)
    methods += [CONTROL] if CONTROL not in methods else []
    samples = _chosen(truth, config, annotations)
    view = model.view if segmentation is None else _whole(model.view)
    model.model.eval().to(place.device, torch.float64 if config.double else torch.float32)
    path = out / IMAGES
    started: int | Exception = 0
    if place.is_main:
        try:
            header = _header(model, view, truth, samples, methods, config, annotations)
            started = _start(path, header, [sample.key for _, sample in samples])
        except (ValueError, OSError) as error:
            started = error
    num_done = from_main(place, started)
    if isinstance(num_done, Exception):
        raise num_done
    look = _Look(model, view, truth, methods, config, annotations, place.device)
    todo = samples[num_done:]
    num_rounds = -(-len(todo) // place.world_size)
    with tqdm(
        total=len(samples),
        initial=num_done,
        desc="evaluate",
        unit="image",
        disable=None if place.is_main else True,
    ) as bar:
        for first in range(0, num_rounds * place.world_size, place.world_size):
            own = first + place.rank
            found = look.at(*todo[own], num_done + own) if own < len(todo) else None
            records = [each for each in from_all(place, found) if each is not None]
            for record in records:
                if isinstance(record, Exception):  # on every process, so that none waits for it
                    raise record
                if "unreadable" in record and place.is_main:
                    _logger.warning("%s is left out: %s", record["key"], record["unreadable"])
            if place.is_main:
                _append(path, records)
            bar.update(len(records))
    if not place.is_main:
        return None
    header, *records = _read(path, path.read_bytes())
    found = sum_up(header, records)
    text = json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n"
    replace_file(out / RESULTS, text.encode("utf-8", errors="surrogateescape"))
    if config.protocol.curves:
        replace_file(out / PICTURE, draw_curves(found))
    return found


# -------------------------------------------------------------------------------- what to look at


def _chosen(
    truth: Truth, config: FaithfulnessConfig, annotations: Mapping[str, Annotations]
) -> list[tuple[int, Sample]]:
    """Choose the images to look at, with their places in the source."""
    source = truth.data.source
    samples = list(enumerate(source.samples))
    if not samples:
        raise ValueError(f"{source.root} holds no images")
    if config.explained == "label" and not truth.is_known:
        raise ValueError(
            f"the right classes shall be explained, but {source.root} says of no image which it "
            "has; explain the predicted ones, or give class folders or a list of PATH,CLASS"
        )
    if truth.is_known:
        samples = [(i, sample) for i, sample in samples if truth.classes[i] >= 0]
    if not config.protocol.curves:
        if not annotations:
            raise ValueError("there is nothing to measure: neither curves nor annotations")
        known = annotations.values()
        samples = [(i, each) for i, each in samples if any(each.key in given for given in known)]
    samples = spread(samples, config.num_images)
    for name, given in annotations.items():
        if not any(sample.key in given for _, sample in samples):
            raise ValueError(
                f"{given.name}, given as {name}, says nothing of any image that is looked at; keys "
                f"of images are like {source.samples[0].key!r}"
            )
    return samples


def _whole(view: EvalView) -> EvalView:
    return replace(view, crop_pct=1.0, crop_mode="squash")


def _header(
    model: EvalModel,
    view: EvalView,
    truth: Truth,
    samples: Sequence[tuple[int, Sample]],
    methods: Sequence[str],
    config: FaithfulnessConfig,
    annotations: Mapping[str, Annotations],
) -> dict[str, Any]:
    """Write down what decides the numbers."""
    valid = truth.valid
    images = [
        (sample.key, int(truth.classes[i]), valid and list(valid[i])) for i, sample in samples
    ]
    annotated = {
        name: {
            "name": Path(given.name).name,
            "images": _digest([sample.key for _, sample in samples if sample.key in given]),
        }
        for name, given in annotations.items()
    }
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": model.name,
        "weights": _digest_of_weights(model.model),
        "view": asdict(view),
        "num_images": len(images),
        "images": _digest(images),
        "labels_known": truth.is_known,
        "methods": list(methods),
        "explained": config.explained,
        "options": asdict(config.options),
        "protocol": asdict(config.protocol),
        "num_compared": config.num_compared,
        "precision": "fp64" if config.double else "fp32",
        "annotations": annotated,
    }
    return json.loads(json.dumps(header))  # as it is read again


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _digest_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ one image


class _Look:
    """What happens to each image."""

    def __init__(
        self,
        model: EvalModel,
        view: EvalView,
        truth: Truth,
        methods: Sequence[str],
        config: FaithfulnessConfig,
        annotations: Mapping[str, Annotations],
        device: torch.device,
    ) -> None:
        self._model, self._view, self._truth, self._methods = model, view, truth, methods
        self._config, self._annotations, self._device = config, annotations, device
        self._dtype = torch.float64 if config.double else torch.float32
        self._to_view = PilView(view)
        self._other: nn.Module | None = None  # the model in the other precision

    def at(self, i: int, sample: Sample, number: int) -> dict[str, Any] | Exception:
        """Measure all methods on one image.

        Args:
            i: Its place in the source.
            sample: Where it is.
            number: Its place among the images that are looked at.

        Returns:
            A line of images.jsonl, or the user's mistake that shows in this image.
        """
        try:
            photo = load_image(self._truth.data.source.read(sample))
        except (BadImage, OSError) as error:
            return {"key": sample.key, "unreadable": str(error)}
        try:
            return self._record(i, sample.key, photo, compare=number < self._config.num_compared)
        except (ValueError, OSError) as error:
            return error

    def _record(self, i: int, key: str, photo: Image.Image, *, compare: bool) -> dict[str, Any]:
        pixels = torch.from_numpy(self._to_view.cut(photo)).to(self._device)
        images = self._to_view.normalize(pixels).to(self._dtype)
        perturber = Perturber(
            lambda batch: self._model.logits(batch)[MODEL],
            images[0],
            self._config.protocol,
            mean=self._view.mean,
            std=self._view.std,
            batch_size=self._config.batch_size,
        )
        label = int(self._truth.classes[i])
        explained = perturber.best if self._config.explained == "prediction" else label
        right = self._right(i, perturber.best)
        places = self._places(key, (photo.height, photo.width))
        methods = {}
        for name in self._methods:
            heatmap = self._explain(name, self._model.model, images, explained)
            heat = upsample(heatmap, self._view.image_size)
            methods[name] = {
                curve: _curve_record(points, right)
                for curve, points in perturber.curves(heat[0], explained).items()
            } | _place_record(heat.float().cpu(), places)
            if compare:
                other = self._explain(name, self._other_model, images, explained)
                methods[name]["correlation"] = _correlation(heatmap, other)
        return {
            "key": key,
            "class": explained,
            "right": perturber.best in right,
            "probability": _short(perturber.probability(explained)),
            "methods": methods,
        }

    def _right(self, i: int, answer: int) -> set[int]:
        """Return which answers count as right."""
        truth = self._truth
        if not truth.is_known:
            return {answer}
        return {int(truth.classes[i])} if truth.valid is None else set(truth.valid[i])

    def _places(self, key: str, image_hw: tuple[int, int]) -> dict[str, Tensor]:
        """Say where the object is, by each annotation that knows the image and sees it in view."""
        found = {
            name: given.mask(key, self._view, image_hw)
            for name, given in self._annotations.items()
            if key in given
        }
        return {name: mask for name, mask in found.items() if bool((mask == 1).any())}

    def _explain(
        self, name: str, model: nn.Module, images: Float[Tensor, "1 3 h w"], class_index: int
    ) -> Float[Tensor, "1 rows cols"]:
        dtype = next(model.parameters()).dtype
        classes = torch.tensor([class_index], device=images.device)
        return explain(name, model, images.to(dtype), classes, self._config.options)

    @property
    def _other_model(self) -> nn.Module:
        """The model in the precision to compare with."""
        if self._other is None:
            other = torch.float32 if self._config.double else torch.float64
            self._other = copy.deepcopy(self._model.model).to(other)
        return self._other


def _curve_record(points: Points, right: set[int]) -> dict[str, Any]:
    return {
        "right": [int(answer in right) for answer in points.answers.tolist()],
        "probability": [_short(p) for p in points.probability.tolist()],
    }


def _place_record(
    heat: Float32[Tensor, "1 h w"], places: Mapping[str, Tensor]
) -> dict[str, list[Any]]:
    """Compare heat with the place of the object."""
    found: dict[str, list[Any]] = {}
    for name, mask in places.items():
        if name == "segmentation":
            found[name] = list(segment(heat[0], mask))
            continue
        hit, mass = localize(heat, mask[None] == 1)
        found[name] = [int(hit), _short(float(mass))]
    return found


def _correlation(a: Float[Tensor, "1 rows cols"], b: Float[Tensor, "1 rows cols"]) -> float | None:
    """Correlate two heatmaps; None where one is the same everywhere."""
    both = torch.stack([a.double().flatten(), b.double().flatten()]).cpu()
    both -= both.mean(1, keepdim=True)
    lengths = both.norm(dim=1)
    return _short(float(both[0] @ both[1] / lengths.prod())) if bool((lengths > 0).all()) else None


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


# ------------------------------------------------------------------------------------- the file


def _start(path: Path, header: dict[str, Any], keys: Sequence[str]) -> int:
    """Begin a file, or make sure that an earlier start meant the same, and cut off half a line.

    Returns:
        Number of images that are done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        replace_file(path, (json.dumps(header, ensure_ascii=False) + "\n").encode())
        return 0
    lines = _read(path, whole)
    _check_same(path, next(lines), header)
    num_done = 0
    for number, (record, key) in enumerate(zip(lines, keys), start=2):
        if record.get("key") != key:
            raise ValueError(
                f"{path}, line {number}, is of the image {record.get('key')!r}, expected {key!r}; "
                "the file is damaged: remove it to begin anew"
            )
        num_done += 1
    if len(whole) < len(data):
        replace_file(path, whole)
    if num_done:
        _logger.info("%s: %d of %d images are done already", path, num_done, len(keys))
    return num_done


def _read(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"{path}, line {number}, is damaged; remove the file to begin anew"
            ) from None
        yield found


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to add to the results of another configuration."""
    if before.get("format") != _FORMAT:
        raise ValueError(f"{path} is no file of tl-explain evaluate; give another --out")
    earlier, wanted = _flat(before), _flat(now)
    for name in wanted | earlier:
        was, value = earlier.get(name), wanted.get(name)
        if was == value:
            continue
        what = f"{name} {json.dumps(was)}, now {json.dumps(value)}"
        if name in ("weights", "images") or name.startswith("annotations"):
            what = f"other {name.partition('.')[0]}"
        raise ValueError(
            f"{path} holds results of another configuration: {what}; give another --out, or remove "
            "the file to begin anew"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with path.open("ab") as file:
        file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
