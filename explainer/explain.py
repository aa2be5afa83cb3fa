"""The job behind tl-explain: checkpoints and images → pictures of what was looked at.

    OUT/KEY.png       a sheet of one image
    OUT/index.html    all sheets on one page that needs no other file; written last

Sheets of an earlier run stay where they are, unless they are of the same images.
"""

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..evaluator.data import PilView, seen_box
from ..evaluator.models import EvalModel
from ..evaluator.predictions import MODEL
from ..labeler.classes import ClassList
from ..labeler.draw import Drawing, colours_of, colours_of_targets, draw_token_targets
from ..labeler.folder import replace_file
from ..labeler.geometry import PaletteMaps, crop_view, sample_targets
from ..labeler.images import BadImage, load_image
from ..labeler.label_map import LabelMap, decode
from ..labeler.label_set import LabelSet
from ..labeler.sources import ImageSource, Sample, unescape
from .attention import transformer_of
from .methods import DEFAULT, METHODS, Options, explain, find, grid_for, possible
from .sheet import PICTURE_PX, ClassView, Explanation, Heatmap, ModelView, draw_sheet, to_html

PAGE = "index.html"

_NUM_ANSWERS = 5
_BEST = re.compile(r"top([1-9]\d*)")
_DIGITS = 6

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Everything that decides the pictures but models and images."""

    methods: tuple[str, ...] = (DEFAULT,)
    """Keys of METHODS, or "all": all that are possible."""
    classes: tuple[str, ...] = ("top1",)
    """What to explain: topN, the model's N best, or a class by name, id or index."""
    options: Options = Options()
    limit: int | None = 24
    """Images to explain, spread evenly over the source; None for all."""
    batch_size: int = 4
    """Heatmaps at a time."""
    double: bool = False
    """Whether to compute in float64."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExplainReport:
    """What was written."""

    explanations: dict[str, Explanation]
    """By key."""
    sheets: dict[str, Path]
    """By key."""
    page: Path
    unreadable: dict[str, str]
    """Key of each image that could not be read → why."""
    num_listed: int
    """Images of the source."""

    def to_json(self) -> dict[str, Any]:
        """Lay out answers and heatmaps as plain values."""
        return {
            "page": str(self.page),
            "num_listed": self.num_listed,
            "images": {
                key: {
                    "sheet": str(self.sheets[key]),
                    "class": each.right,
                    "models": [_view_json(view) for view in each.views],
                }
                for key, each in self.explanations.items()
            },
            "unreadable": self.unreadable,
        }


def explain_images(
    models: Mapping[str, EvalModel],
    source: ImageSource,
    out: Path,
    config: ExplainConfig,
    *,
    device: torch.device,
    labels: LabelSet | None = None,
) -> ExplainReport:
    """Explain what one or several models say of images, and draw it.

    Args:
        models: By what tells them apart, e.g. their files. Each sees an image as it wants to, and
            is asked about its own answers.
        source: The images.
        out: Folder to write into; sheets of the same keys are replaced.
        config: The rest.
        device: Where to compute.
        labels: The images' label maps, to be drawn beside the photo.

    Raises:
        ValueError: An unknown method or class, a method that a model does not know, no readable
            image, or labels of other images.
        OSError: Something cannot be read or written.
    """
    for model in models.values():
        methods_of(model, config.methods)  # what is wrong is wrong before the first image is read
        _chosen(torch.zeros(model.num_classes), model.classes, config.classes)
        model.model.eval().to(device, torch.float64 if config.double else torch.float32)
    samples = spread(source.samples, config.limit)
    if labels is not None and not any(sample.key in labels for sample in samples):
        raise ValueError(
            f"{labels.folder} has labels for none of these images, whose keys are like "
            f"{samples[0].key!r}; its own are like {next(iter(labels.keys), '')!r}: give --images "
            "the source that was labelled"
        )
    explanations: dict[str, Explanation] = {}
    sheets: dict[str, Path] = {}
    unreadable: dict[str, str] = {}
    for sample in tqdm(samples, desc="explain", unit="image", disable=None):
        try:
            photo = load_image(source.read(sample))
        except (BadImage, FileNotFoundError) as error:
            unreadable[sample.key] = str(error)
            _logger.warning("%s is left out: %s", sample.key, error)
            continue
        maps = _read_maps(labels, sample.key)
        explanation = Explanation(
            title=unescape(sample.key),
            right=_right_name(source, sample),
            views=[
                _explain_one(model, called, photo, maps, labels, config, device)
                for called, model in models.items()
            ],
        )
        explanations[sample.key] = explanation
        sheets[sample.key] = out / f"{sample.key}.png"
        sheets[sample.key].parent.mkdir(parents=True, exist_ok=True)
        png = io.BytesIO()
        draw_sheet(explanation).save(png, "PNG")
        replace_file(sheets[sample.key], png.getvalue())
    if not explanations:
        key, why = next(iter(unreadable.items()))
        raise ValueError(f"none of the images can be read; {key}: {why}")
    html = to_html(list(explanations.values()), title=_title(models), notes=_notes(models, config))
    replace_file(out / PAGE, html.encode())
    return ExplainReport(
        explanations=explanations,
        sheets=sheets,
        page=out / PAGE,
        unreadable=unreadable,
        num_listed=len(source.samples),
    )


# ----------------------------------------------------------------------------------- one image


def _explain_one(
    model: EvalModel,
    called: str,
    photo: Image.Image,
    maps: Sequence[LabelMap],
    labels: LabelSet | None,
    config: ExplainConfig,
    device: torch.device,
) -> ModelView:
    view = PilView(model.view)
    crop = view.cut(photo)
    shown = Image.fromarray(np.ascontiguousarray(crop[0].transpose(1, 2, 0)))
    image = view.normalize(torch.from_numpy(crop)).to(
        device, torch.float64 if config.double else torch.float32
    )
    with torch.inference_mode():
        probs = model.logits(image)[MODEL][0].softmax(-1).cpu()
    drawing = None
    if labels is not None and maps:
        box = seen_box((photo.height, photo.width), model.view)
        drawing = _draw_labels(shown, maps, box, grid_for(model.model, image), labels)
    classes = _chosen(probs, model.classes, config.classes)
    found = {
        name: list(_heatmaps(name, model, image, classes, config))
        for name in methods_of(model, config.methods)
    }
    per_class = [name for name in found if METHODS[name].of_class]
    best = probs.topk(min(_NUM_ANSWERS, len(probs)))
    return ModelView(
        name=f"{_model_name(model)}, {called}",
        photo=shown,
        answers=[
            (_name(model.classes, index), p)
            for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
        labels=drawing,
        heatmaps={name: each[0] for name, each in found.items() if name not in per_class},
        classes=[
            ClassView(
                name=_name(model.classes, index),
                probability=float(probs[index]),
                heatmaps={name: found[name][number] for name in per_class},
            )
            for number, index in enumerate(classes)
        ],
    )


def _heatmaps(
    name: str,
    model: EvalModel,
    image: Float[Tensor, "1 3 h w"],
    classes: Sequence[int],
    config: ExplainConfig,
) -> Iterator[Heatmap]:
    """Make a heatmap for each class; one alone where they would be the same."""
    wanted = torch.tensor(classes if METHODS[name].of_class else classes[:1], device=image.device)
    for part in wanted.split(config.batch_size):
        images = image.expand(len(part), -1, -1, -1)
        maps = explain(name, model.model, images, part, config.options)
        yield from maps.float().cpu().numpy()


def _draw_labels(
    shown: Image.Image,
    maps: Sequence[LabelMap],
    box: tuple[float, float, float, float],
    grid: tuple[int, int],
    labels: LabelSet,
) -> Drawing:
    """Draw the labels that the model's tokens would be taught in this view."""
    fill = "zero" if maps[0].log_normalizer is None else "residual"
    view = crop_view(torch.tensor([box]))
    targets = sample_targets(PaletteMaps.from_label_maps([maps]), view, grid, fill=fill)
    colours = colours_of_targets(targets, 0, keep=colours_of(maps[0]))
    return draw_token_targets(
        shown, targets, 0, grid, labels.class_names, colours=colours, longest_px=PICTURE_PX
    )


def _read_maps(labels: LabelSet | None, key: str) -> Sequence[LabelMap]:
    if labels is None or key not in labels:
        return ()
    return decode(labels.read(key), dictionary=labels.dictionary)


# ------------------------------------------------------------------------------------- choices


def methods_of(model: EvalModel, wanted: Sequence[str]) -> list[str]:
    """List the methods to use with a model, each once.

    Args:
        model: The model.
        wanted: Keys of METHODS; with "all" among them, all that are possible.

    Raises:
        ValueError: An unknown method, or one that the model does not know.
    """
    known = [name for name in possible(model.model) if name != "dense" or model.has_dense_head]
    if not known:
        transformer_of(model.model)  # says why
    chosen = known if "all" in wanted else list(dict.fromkeys(wanted))
    for name in chosen:
        find(name)
        if name not in known:
            raise ValueError(
                f"{name} does not work with {model.name}; possible: {', '.join(known)}"
            )
    return chosen


def _chosen(probs: Float32[Tensor, " c"], classes: ClassList, wanted: Sequence[str]) -> list[int]:
    """Turn topN, names, ids and indices into classes, each once."""
    found: list[int] = []
    for text in wanted:
        match = _BEST.fullmatch(text)
        if match:
            found += probs.topk(min(int(match[1]), len(probs))).indices.tolist()
        else:
            found.append(classes.find(text))
    return list(dict.fromkeys(found))


def spread(samples: Sequence[_T], limit: int | None) -> list[_T]:
    """Take no more than `limit` of a sequence, evenly spread over it."""
    if limit is None or len(samples) <= limit:
        return list(samples)
    return [samples[i * len(samples) // limit] for i in range(limit)]


# --------------------------------------------------------------------------------------- words


def _name(classes: ClassList, index: int) -> str:
    """Return the first of a class's names, or what it is called without."""
    return classes.names[index].split(",")[0] if classes.names else classes.called(index)


def _right_name(source: ImageSource, sample: Sample) -> str | None:
    if sample.class_index is None:
        return None
    return source.class_names[sample.class_index].split(",")[0]


def _model_name(model: EvalModel) -> str:
    height, width = model.view.image_size
    return f"{model.name}, {model.weights} weights, {height} × {width} px"


def _title(models: Mapping[str, EvalModel]) -> str:
    names = dict.fromkeys(model.name for model in models.values())
    return f"What {' and '.join(names)} looked at"


def _notes(models: Mapping[str, EvalModel], config: ExplainConfig) -> list[str]:
    used = dict.fromkeys(
        name for each in models.values() for name in methods_of(each, config.methods)
    )
    lines = "; ".join(f"{name}: {METHODS[name].what}" for name in used)
    return [
        f"{lines}.",
        "Each map is stretched between the two values below it, its least and its largest. Only "
        "dense shows probabilities, from 0 to 100 %.",
    ]


def _view_json(view: ModelView) -> dict[str, Any]:
    return {
        "model": view.name,
        "answers": dict(view.answers),
        "classes": [
            {
                "class": each.name,
                "probability": each.probability,
                "heatmaps": _plain(each.heatmaps),
            }
            for each in view.classes
        ],
        "heatmaps": _plain(view.heatmaps),
    }


def _plain(heatmaps: Mapping[str, Heatmap]) -> dict[str, list[list[float]]]:
    return {
        name: [[float(f"{value:.{_DIGITS}g}") for value in row] for row in values.tolist()]
        for name, values in heatmaps.items()
    }
