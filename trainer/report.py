"""report.html: one file that shows what a run learned from, how it went, and what it now sees.

It is written from what the run folder and its data set hold, after the run or at any time during
it; what is not there (label maps, a validation split, a checkpoint) is left out and said so.
"""

import json
import math
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..labeler.draw import (
    Colour,
    colours_of,
    colours_of_targets,
    draw_label_map,
    draw_token_targets,
    draw_view,
    scaled,
)
from ..labeler.geometry import Fill, PaletteMaps, TokenTargets, sample_targets
from ..labeler.images import load_image
from ..labeler.label_map import LabelMap, decode
from ..labeler.sources import unescape
from ..shards.index import ShardIndex, SplitIndex, read_index
from . import page
from .checkpoint import TrainedModel, latest, load_model
from .feed import Batch, EvalFeed, TrainFeed
from .models import create_model, predict
from .optim import Schedule
from .recipe import AugmentConfig, Recipe, parse_recipe
from .run_log import CHECKPOINTS, ENVIRONMENT, RECIPE, REPORT, read_metrics, replace_text

NUM_PHOTOS = 8
"""Photos shown of each split."""
NUM_GUESSES = 3
"""Classes listed for teacher and student."""

_PICTURE_PX = 320
_NUM_TEACHER_COLOURS = 4  # the rest of the palette is left to what only the student sees


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run folder and its data set hold."""

    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    """Each start of the run: versions, machine, data set; see run_log.write_environment."""
    whole: ShardIndex | None
    """The data set."""
    index: ShardIndex | None
    """Its first shard of each split: enough to show, however large the data set is."""
    trained: TrainedModel | None
    notes: list[str]
    """What is missing, for the reader."""

    @property
    def train_split(self) -> str | None:
        """The split that the run learned from, where the data set can be read."""
        split = self.starts[-1].get("split", "train") if self.starts else "train"
        return split if self.index is not None and split in self.index.splits else None


@dataclass(frozen=True, kw_only=True)
class _Sample:
    image: Image.Image
    class_index: int
    levels: tuple[LabelMap, ...]
    """The label map: one, or several of a pyramid; empty where the split has no maps."""


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A batch from the feed and the whole samples that it came from."""

    batch: Batch
    samples: dict[str, _Sample]
    grid: tuple[int, int]
    """Token (rows, cols) of the student."""
    class_names: list[str]
    augment: AugmentConfig

    def sample(self, i: int) -> _Sample:
        return self.samples[self.batch.keys[i]]

    def title(self, i: int) -> str:
        return f"{self.class_names[self.sample(i).class_index]}: {unescape(self.batch.keys[i])}"

    def pixels(self, i: int) -> Image.Image:
        """Undo the normalisation."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.augment.mean, self.augment.std))
        pixels = (self.batch.images[i] * std + mean).clamp(0, 1) * 255
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def write_report(run_folder: Path, *, pictures: Sequence[tuple[Path, str]] = ()) -> Path:
    """Write report.html into a run folder, replacing an earlier one.

    Args:
        run_folder: Made by `tl-train run`; the run may still be going on or have been broken off.
        pictures: Files to show below all else, each with what it shows.

    Returns:
        The report's path.

    Raises:
        OSError: If the folder is no run folder or cannot be written to, or a file no picture.
    """
    run = _read_run(run_folder)
    sections = [_opening(run)]
    if run.index is not None and run.train_split is not None:
        sections.append(_crops(run, run.index, run.train_split))
    sections.append(_curves(run))
    if run.index is not None and run.trained is not None:
        splits = sorted(run.index.splits, key=lambda name: (name != run.train_split, name))
        sections += [_predictions(run, run.index, run.trained, name) for name in splits]
    sections.append(_facts(run))
    if pictures:
        figures = [page.figure(_opened(path), caption) for path, caption in pictures]
        sections.append(page.section("More pictures", *figures))
    path = run_folder / REPORT
    replace_text(path, page.page(_name(run_folder), sections))
    return path


# -------------------------------------------------------------------------------------- read


def _read_run(folder: Path) -> _Run:
    recipe_file, environment = folder / RECIPE, folder / ENVIRONMENT
    if not recipe_file.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECIPE}: it is not a folder of tl-train run")
    notes: list[str] = []
    starts = json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else []
    whole = _read_data(starts, notes)
    return _Run(
        folder=folder,
        recipe=parse_recipe(recipe_file.read_text(encoding="utf-8")),
        metrics=read_metrics(folder),
        starts=starts,
        whole=whole,
        index=_first_shards(whole) if whole else None,
        trained=_read_model(folder / CHECKPOINTS, notes),
        notes=notes,
    )


def _read_data(starts: Sequence[Mapping[str, Any]], notes: list[str]) -> ShardIndex | None:
    folder = starts[-1].get("data") if starts else None
    if folder is None:
        notes.append(f"{ENVIRONMENT} names no data set, so nothing of it is shown.")
        return None
    try:
        whole = read_index(Path(folder))
        for split in whole.splits:
            whole.shard_paths(split)
    except (OSError, ValueError) as error:
        notes.append(f"The data set cannot be read, so nothing of it is shown: {error}.")
        return None
    return whole


def _first_shards(whole: ShardIndex) -> ShardIndex:
    splits = {
        name: replace(split, shards=split.shards[:1], num_samples=split.shards[0].samples)
        for name, split in whole.splits.items()
        if split.num_samples
    }
    return replace(whole, splits=splits)


def _read_model(checkpoints: Path, notes: list[str]) -> TrainedModel | None:
    best = checkpoints / "best.pt"
    try:
        return load_model(best if best.is_file() else latest(checkpoints))
    except (OSError, ValueError) as error:
        notes.append(f"There is no model to show predictions of: {error}.")
        return None


def _samples(index: ShardIndex, split: str, keys: Collection[str]) -> dict[str, _Sample]:
    """Read samples by key from the split's only shard in this index."""
    (path,) = index.shard_paths(split)
    dictionary = index.split(split).dictionary
    fields: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, name = member.name.rpartition(".")
            file = tar.extractfile(member) if key in keys else None
            if file is not None:
                fields.setdefault(key, {})[name] = file.read()
    return {
        key: _Sample(
            image=load_image(found["jpg"]),
            class_index=int(found["cls"]),
            levels=decode(found["tlm"], dictionary=dictionary) if "tlm" in found else (),
        )
        for key, found in fields.items()
    }


def _classes(index: ShardIndex, split: str) -> set[int]:
    """Read which classes occur in a split of one shard."""
    (path,) = index.shard_paths(split)
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".cls")]
        return {int(file.read()) for file in files if file is not None}


def _shown(run: _Run, index: ShardIndex, split: str, batch: Batch) -> _Shown:
    model = run.trained.model if run.trained else None
    if model is None:
        model = create_model(run.recipe.model, dense=run.recipe.labels.dense_weight > 0)
    return _Shown(
        batch=batch,
        samples=_samples(index, split, set(batch.keys)),
        grid=model.grid,
        class_names=index.class_names,
        augment=run.recipe.augment,
    )


# --------------------------------------------------------------------- how the run went


def _opening(run: _Run) -> str:
    trains = [line for line in run.metrics if line["kind"] == "train"]
    evals = [line for line in run.metrics if line["kind"] == "eval"]
    parts = [page.title(_name(run.folder))]
    if run.recipe.summary:
        parts.append(page.text(run.recipe.summary))
    if trains:
        of_total = ""
        if run.whole is not None and run.train_split is not None:
            num_samples = run.whole.split(run.train_split).num_samples
            schedule = Schedule.of(run.recipe, num_samples / run.recipe.optim.batch_size)
            of_total = f" of {schedule.total_steps}"
        parts.append(
            page.text(f"{run.recipe.model.name}, {trains[-1]['step']}{of_total} steps taken.")
        )
    if evals:
        parts.append(page.text(_in_words(evals[-1])))
    return "\n".join(parts + [page.text(note) for note in run.notes])


def _name(folder: Path) -> str:
    return f"Training run {'/'.join(folder.resolve().parts[-2:])}"


def _in_words(line: Mapping[str, Any]) -> str:
    weights = {"raw": "the weights themselves", "ema": "their running average"}
    results = [
        f"{words}: top-1 {line[f'{kind}_top1']:.1f} %, top-5 {line[f'{kind}_top5']:.1f} %"
        for kind, words in weights.items()
        if line.get(f"{kind}_top1") is not None
    ]
    return f"Last evaluation, on {line['num_images']:.0f} images: {'; '.join(results)}."


def _curves(run: _Run) -> str:
    losses = {"loss": "total", "class_loss": "class token", "dense_loss": "patch tokens"}
    accuracies = {"raw_top1": "weights", "ema_top1": "their running average"}
    charts = [
        page.line_chart(
            title, _series(run.metrics, kind, names), x_label="step", from_zero=from_zero
        )
        for title, kind, names, from_zero in [
            ("Training loss (nats)", "train", losses, False),
            ("Top-1 on the validation split (%)", "eval", accuracies, True),
            ("Learning rate", "train", {"lr": "AdamW"}, True),
            ("Speed (images per second)", "train", {"images_per_sec": "training"}, True),
        ]
    ]
    words = (
        "The loss is a cross-entropy with the soft labels of the teacher: its floor is the "
        "teacher's own uncertainty about each token, not 0."
    )
    soft = page.text(words) if run.recipe.labels.needs_maps else ""
    return page.section("How the run went", soft, f'<div class="charts">{"".join(charts)}</div>')


def _series(
    metrics: Iterable[Mapping[str, Any]], kind: str, names: Mapping[str, str]
) -> dict[str, page.Points]:
    """Collect the (step, value) points of some metrics under names that people read."""
    lines = [line for line in metrics if line["kind"] == kind]
    series = {
        label: [
            (float(line["step"]), float(line[name])) for line in lines if line.get(name) is not None
        ]
        for name, label in names.items()
    }
    return {label: points for label, points in series.items() if points}


def _facts(run: _Run) -> str:
    facts: dict[str, object] = {}
    for name, split in run.whole.splits.items() if run.whole is not None else ():
        facts[f"split {name}"] = f"{split.num_samples} images, {_labels_in_words(split)}"
    for start in run.starts[-1:]:
        facts |= {
            name.replace("_", " "): _plain(value)
            for name, value in start.items()
            if value is not None and name != "step"
        }
    if len(run.starts) > 1:
        steps = ", ".join(str(start["step"]) for start in run.starts)
        facts["started"] = f"{len(run.starts)} times, at steps {steps}"
    recipe = (run.folder / RECIPE).read_text(encoding="utf-8")
    return page.section("Facts", page.table(facts), page.details("The whole recipe", recipe))


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _labels_in_words(split: SplitIndex) -> str:
    if not split.has_labels:
        return "without label maps"
    teacher = (split.labels or {}).get("teacher", {}).get("name")
    return "with label maps" + (f" by {teacher}" if teacher else "")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


# ---------------------------------------------------------------- what it learned from


def _crops(run: _Run, index: ShardIndex, name: str) -> str:
    """Show photos with their label maps, and training crops with the targets of their tokens."""
    labels, split = run.recipe.labels, index.split(name)
    feed = TrainFeed(
        index,
        name,
        image_size=run.recipe.model.image_hw,
        batch_size=min(NUM_PHOTOS, split.num_samples),
        augment=run.recipe.augment,
        seed=run.recipe.run.seed,
        with_labels=split.has_labels,
    )
    with closing(feed):
        shown = _shown(run, index, name, next(feed))
    targets = None
    batch = shown.batch
    if batch.maps is not None:
        targets = sample_targets(
            batch.maps, batch.views, shown.grid, frames=batch.frames, fill=labels.fill
        )
    words = (
        "Photos of the training split. The frame in the photo is the part that a training crop "
        "shows; the crop is what the student was given, with all augmentation. "
    )
    if targets is not None:
        words += (
            "The label map is what the teacher said about each cell of the whole photo, once, "
            "before training. The token targets are that map seen through the crop's frame, one "
            "for each token of the student, before label smoothing. Colours name the best class; "
            "the more opaque a cell, the higher its probability. "
        )
    if targets is None or not labels.needs_maps:
        words += "The student learned from class labels alone, without label maps."
    cards = [_crop_card(shown, i, targets) for i in range(len(shown.batch.keys))]
    return page.section("What it learned from", page.text(words), page.cards(cards))


def _crop_card(shown: _Shown, i: int, targets: TokenTargets | None) -> str:
    sample, view, crop = shown.sample(i), shown.batch.views[i], shown.pixels(i)
    mirrored = " (mirrored)" if torch.linalg.det(view[:, :2]) < 0 else ""
    framed = draw_view(sample.image, view, longest_px=_PICTURE_PX)
    figures = [
        page.figure(framed, "Photo and crop's frame"),
        page.figure(scaled(crop, _PICTURE_PX), f"Training crop{mirrored}"),
    ]
    if not sample.levels or targets is None:
        return page.card(shown.title(i), figures)
    label_map = sample.levels[0]
    names, colours = shown.class_names, colours_of(label_map)
    whole = draw_label_map(sample.image, label_map, names, colours=colours, longest_px=_PICTURE_PX)
    tokens = draw_token_targets(
        crop, targets, i, shown.grid, names, colours=colours, longest_px=_PICTURE_PX
    )
    figures.insert(1, page.figure(whole.image, f"Label map, {_by(label_map.grid)} cells"))
    figures.append(page.figure(tokens.image, f"Token targets, {_by(shown.grid)}"))
    legend = page.legend({str(entry): entry.colour for entry in whole.legend})
    return page.card(shown.title(i), figures, below=legend)


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}"


# ------------------------------------------------------------------------ what it now sees


def _predictions(run: _Run, index: ShardIndex, trained: TrainedModel, split: str) -> str:
    """Show the student's answers beside the teacher's."""
    recipe = run.recipe
    feed = EvalFeed(
        index,
        split,
        image_size=recipe.model.image_hw,
        crop_pct=recipe.evaluation.crop_pct,
        interpolation=recipe.evaluation.interpolation,
        mean=recipe.augment.mean,
        std=recipe.augment.std,
        batch_size=min(NUM_PHOTOS, index.split(split).num_samples),
    )
    shown = _shown(run, index, split, next(iter(feed)))
    teacher = _teacher_answers(shown, recipe.labels.fill)
    student = _student_answers(trained, shown.batch.images)
    words = (
        f"{len(shown.batch.keys)} photos of split {split!r} in the evaluation view, with the most "
        "probable classes of the whole view; the true class is bold. The student is "
        f"{trained.report.path.name}, {trained.report.weights} weights. "
    )
    if recipe.labels.dense_weight:
        words += "Its colours show its dense head, token by token. "
    if _has_unseen_classes_only(run, split):
        words += (
            "None of its classes has a photo in the training split: the student cannot know them. "
        )
    if teacher is None:
        words += "The split has no label maps, so the teacher's answer is not known."
    else:
        words += "The teacher's answer is what its label maps say about this view."
    cards = [
        _prediction_card(shown, i, teacher, student, dense=recipe.labels.dense_weight > 0)
        for i in range(len(shown.batch.keys))
    ]
    relation = "trained on" if split == run.train_split else "not trained on"
    heading = f"What it sees in split {split!r}, {relation}"
    return page.section(heading, page.text(words), page.cards(cards))


def _has_unseen_classes_only(run: _Run, split: str) -> bool:
    """Tell whether no class of a split was trained on; False where that takes long to find out."""
    whole, seen = run.whole, run.train_split
    if whole is None or seen is None:
        return False
    if max(len(whole.split(name).shards) for name in (split, seen)) > 1:
        return False
    return _classes(whole, split).isdisjoint(_classes(whole, seen))


def _teacher_answers(shown: _Shown, fill: Fill) -> TokenTargets | None:
    """Read the label maps in the evaluation view; None unless every sample has one."""
    levels = [shown.sample(i).levels for i in range(len(shown.batch.keys))]
    if not all(levels):
        return None
    palette_maps = PaletteMaps.from_label_maps(levels)
    return sample_targets(palette_maps, shown.batch.views, shown.grid, fill=fill)


@torch.inference_mode()
def _student_answers(trained: TrainedModel, images: Float[Tensor, "b 3 h w"]) -> TokenTargets:
    """Give the student's probabilities the form of targets on a palette of all classes."""
    class_logits, aux_logits = predict(trained.model.eval(), images)
    view = class_logits.float().softmax(-1)
    b, num_classes = view.shape
    n = math.prod(trained.model.grid)
    if aux_logits is None:  # nothing is drawn of its tokens then
        dense = view[:, None].expand(-1, n, -1)
    else:
        dense = aux_logits.float().softmax(-1)
    return TokenTargets(
        palette=torch.arange(num_classes).repeat(b, 1),
        tokens=dense,
        token_background=torch.zeros(b, n),
        token_weight=torch.ones(b, n),
        view=view,
        view_background=torch.zeros(b),
        view_weight=torch.ones(b),
        num_classes=num_classes,
    )


def _prediction_card(
    shown: _Shown, i: int, teacher: TokenTargets | None, student: TokenTargets, *, dense: bool
) -> str:
    names, crop = shown.class_names, shown.pixels(i)
    colours: dict[int, Colour] = {}
    if teacher is not None:
        colours = colours_of_targets(teacher, i, most=_NUM_TEACHER_COLOURS)
    colours = colours_of_targets(student, i, keep=colours)
    figures = [page.figure(scaled(crop, _PICTURE_PX), "Evaluation view")]
    legend: dict[str, Colour] = {}
    for who, answers in {"Teacher": teacher, "Student": student}.items():
        if answers is None:
            continue
        ranking = page.ranking(
            _ranked(answers, i, names), right=[names[shown.sample(i).class_index]]
        )
        picture = scaled(crop, _PICTURE_PX)
        if dense or answers is teacher:
            drawing = draw_token_targets(
                crop, answers, i, shown.grid, names, colours=colours, longest_px=_PICTURE_PX
            )
            picture = drawing.image
            legend |= {entry.name: entry.colour for entry in drawing.legend}
        figures.append(page.figure(picture, who, below=ranking))
    return page.card(shown.title(i), figures, below=page.legend(legend))


def _ranked(targets: TokenTargets, i: int, class_names: Sequence[str]) -> list[tuple[str, float]]:
    """List the most probable classes of a whole view."""
    best, slots = targets.view[i].topk(min(NUM_GUESSES, targets.view.shape[1]))
    classes = targets.palette[i, slots].tolist()
    return [(class_names[int(c)], float(p)) for c, p in zip(classes, best.tolist(), strict=True)]
