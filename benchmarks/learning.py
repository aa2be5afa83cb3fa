"""Claim: a student learns more from token labels than from class labels, if they lie right.

    OMP_NUM_THREADS=1 python benchmarks/learning.py --out runs/learning    needs the extra [demo]
    python benchmarks/learning.py --quick    a smoke test: one seed, few steps, nothing is proven

Scenes of several handwritten digits (scenes.py); a scene's class is its largest digit. A small CNN
learns single digits and becomes the teacher: tl-label's job makes label maps with it, tl-shard's
packs them, tl-train's loop trains two students, an LV-ViT and a ResNet, on the same scenes in the
same order, each in all ways of ARMS. Top-1 is that of the raw weights on scenes of digits that
neither teacher nor student has seen.

A run that was stopped goes on when the same command is given again. The full set takes 75 minutes
of one core.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from record import markdown, write
from scenes import (
    BACKGROUND,
    NUM_CLASSES,
    TRAIN_SCENES,
    VAL_SCENES,
    Digits,
    compose_scenes,
    load_digits,
    write_image_folder,
)
from scipy.stats import t as student_t
from torch import Tensor

from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.geometry import apply_view, sample_targets, token_points
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import open_source
from tokenlabel.labeler.teacher import load_teacher
from tokenlabel.segmenter import digit_teacher
from tokenlabel.segmenter.digit_teacher import SIDES_PX, Labelled, one_digit
from tokenlabel.shards.pack import pack
from tokenlabel.trainer.data import Data, Feed, open_data
from tokenlabel.trainer.distributed import Place, join_processes
from tokenlabel.trainer.feed import Batch
from tokenlabel.trainer.loop import fit
from tokenlabel.trainer.recipe import Recipe, load_recipe
from tokenlabel.trainer.run_log import read_metrics

RECIPE = str(Path(__file__).with_suffix(".toml"))
GRID = (4, 4)
"""Tokens of both students."""
NUM_TRAIN = 3000
FIGURE = Path(__file__).parent.parent / "docs/images/learning.png"
TEACHER_PX = {"native": 160, "center": 128}
"""Side of the teacher's view by fit: both show 64 × 96 px twice as large, as it learned digits."""
TOP_K = 3
STUDENTS = {
    "LV-ViT": [],
    "ResNet": [
        'model.name="test_resnet"',
        "model.kwargs={output_stride=16}",
        "optim.lr=4e-3",
        "schedule.duration=360 steps",
        "evaluation.every=90 steps",
        "run.checkpoint_every=90 steps",
    ],
}


@dataclass(frozen=True)
class Arm:
    """One way to teach a student."""

    changes: tuple[str, ...] = ()
    """To learning.toml, which teaches token labels as the shipped recipes do."""
    is_published: bool = False
    """Whether label maps are made and read as by the published code, see PublishedGeometry."""
    base: str = "class labels"
    """The arm that it is compared with."""
    color: str = "#555555"
    line: str = ""
    """Of its curve in the figure; empty: it has none."""


WITH_CLASS_LABEL = ("labels.class_target=label",)
"""The class token learns the scene's class, not the label map pooled over the crop."""
_TOKEN, _BOTH = "token labels", "token labels with class label"
ARMS = {
    "class labels": Arm(("labels.dense_weight=0", *WITH_CLASS_LABEL), line="-"),
    "pooled labels": Arm(("labels.dense_weight=0",), color="#009e73", line="-"),
    _TOKEN: Arm(color="#0072b2", line="-"),
    _BOTH: Arm(WITH_CLASS_LABEL, color="#0072b2", line="--"),
    "token labels, zero fill": Arm(("labels.fill=zero",), base=_TOKEN, color="#0072b2"),
    "token labels, MixToken": Arm(("model.mix_token=true",), base=_TOKEN, color="#0072b2"),
    "token labels, published geometry": Arm(
        is_published=True, base=_TOKEN, color="#d55e00", line="-"
    ),
    "the same with class label": Arm(
        WITH_CLASS_LABEL, is_published=True, base=_BOTH, color="#d55e00", line="--"
    ),
}


def exchange_axes(views: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 2 3"]:
    """Read the views of boxes (x0, y0, x1, y1) as those of (y0, x0, y1, x1)."""
    return views.flip(1)[:, :, [1, 0, 2]]


class PublishedGeometry:
    """A feed whose labels lie where the published code looks for them; its images are the same.

    Crops are looked up with x and y exchanged, in maps of the centre crop that are read as if they
    covered the whole image. alignment.py compares the same reading with the teacher.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __next__(self) -> Batch:
        batch = next(self._feed)
        assert batch.maps is not None
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand_as(batch.maps.windows)
        maps = replace(batch.maps, windows=whole)
        return replace(batch, maps=maps, views=exchange_axes(batch.views))

    def state(self) -> Any:
        """See Feed."""
        return self._feed.state()

    def close(self) -> None:
        """See Feed."""
        self._feed.close()


# --------------------------------------------------------------------- teacher and data


def digits_or_none(digits: Digits, num: int, side_px: int, *, seed: int) -> Labelled:
    """Make pictures of one digit each, or of none, and the probabilities of what they show.

    Every fifth picture shows background and scraps only: there a teacher shall be undecided.
    """
    alone, num_empty = one_digit(side_px), num // 5
    empty = replace(alone, num_digits=(0, 0))
    scenes = [
        *compose_scenes(digits, num_empty, seed=seed, config=empty),
        *compose_scenes(digits, num - num_empty, seed=seed + 1, config=alone),
    ]
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2)
    targets = torch.full((num, NUM_CLASSES), 1 / NUM_CLASSES)
    shown = torch.tensor([scene.label for scene in scenes[num_empty:]])
    targets[num_empty:] = F.one_hot(shown, NUM_CLASSES).float()
    return pixels.contiguous(), targets


@torch.inference_mode()
def accuracy(model: torch.nn.Module, digits: Digits, num_images: int) -> float:
    """Share of single held-out digits that the teacher names."""
    images, targets = digits_or_none(digits, num_images, SIDES_PX[0], seed=1)
    shown = targets.max(1).values == 1
    answers = model(digit_teacher.teacher_input(model, images[shown])).argmax(1)
    return (answers == targets[shown].argmax(1)).float().mean().item()


def make_data(folder: Path, *, quick: bool) -> dict[str, float]:
    """Compose scenes, train the teacher, label and pack; return what is worth knowing of them."""
    done = folder / "facts.json"
    if done.exists():
        return json.loads(done.read_text())
    seen, held_out = load_digits()
    num_train, num_val = (300, 200) if quick else (NUM_TRAIN, 2000)
    write_image_folder(seen, folder / "train", num_train, seed=1, config=TRAIN_SCENES)
    write_image_folder(held_out, folder / "val", num_val, seed=2, config=VAL_SCENES)
    num_pictures, num_steps = (300, 30) if quick else (10_000, 800)
    model = digit_teacher.train_on(
        [digits_or_none(seen, num_pictures, side, seed=2 * side) for side in SIDES_PX],
        num_steps=num_steps,
    )
    torch.save(model.state_dict(), folder / "teacher.pth")
    source, facts = open_source(folder / "train"), {}
    for fit_name, size_px in TEACHER_PX.items():
        checkpoint = folder / "teacher.pth"
        teacher = load_teacher(
            digit_teacher.NAME, checkpoint=checkpoint, image_size=size_px, device="cpu"
        )
        labels, shards = folder / f"labels-{fit_name}", folder / f"shards-{fit_name}"
        made = generate(source, labels, teacher=teacher, fit=fit_name, top_k=TOP_K, overwrite=True)
        pack(source, shards, split="train", labels=LabelSet.open(labels), overwrite=True)
        pack(open_source(folder / "val"), shards, split="val", overwrite=True)
        facts[f"teacher_on_scenes_{fit_name}"] = (made.num_correct or 0) / made.num_labelled
    facts["teacher_on_held_out_digits"] = accuracy(model, held_out, 200 if quick else 1000)
    write_whole(done, facts)
    return facts


def write_whole(path: Path, content: Any) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


# --------------------------------------------------------------------- runs


def run(folder: Path, student: str, arm: str, seed: int, *, quick: bool) -> dict[int, float]:
    """Train one student, or go on; return its top-1, percent, by training step."""
    name = f"{student}-{list(ARMS).index(arm)}-{seed}"
    done = folder / "results" / f"{name}.json"
    if not done.exists():
        done.parent.mkdir(exist_ok=True)
        write_whole(done, train(folder, student, ARMS[arm], seed, folder / name, quick=quick))
    return {int(step): top1 for step, top1 in json.loads(done.read_text()).items()}


def open_arm(recipe: Recipe, folder: Path, arm: Arm, place: Place) -> Data:
    """Open the data set of an arm, read as it says."""
    if not arm.is_published:
        return open_data(recipe, folder / "shards-native", place)
    data = open_data(recipe, folder / "shards-center", place)
    return replace(data, open_train=lambda *at: PublishedGeometry(data.open_train(*at)))


def train(
    folder: Path, student: str, arm: Arm, seed: int, out: Path, *, quick: bool
) -> dict[int, float]:
    """Train one student, or go on where its run was stopped."""
    changes = [f"run.seed={seed}", *STUDENTS[student], *arm.changes]
    if quick:
        changes += ["schedule.duration=20 steps", "schedule.warmup=2 steps"]
    recipe = load_recipe(RECIPE, changes)
    with join_processes("cpu") as place:
        outcome = fit(recipe, open_arm(recipe, folder, arm, place), out, place, resume=True)
    if outcome.step < outcome.total_steps:
        raise SystemExit("stopped; the same command goes on with this run")
    return {
        record["step"]: record["raw_top1"]
        for record in read_metrics(out)
        if record["kind"] == "eval"
    }


class Truth(NamedTuple):
    """What a crop shows."""

    tokens: Int64[Tensor, "b n"]
    """The digit that covers most of each token; BACKGROUND where none covers a sixth of it."""
    view: Int64[Tensor, " b"]
    """The digit that covers most of the crop."""


def true_labels(
    class_maps: Sequence[UInt8[np.ndarray, "_ _"]],
    views: Float[Tensor, "b 2 3"],
    grid: tuple[int, int],
    *,
    per_side: int = 8,
) -> Truth:
    """Look up in scenes what each token of a crop shows, at per_side² points."""
    points = apply_view(views, token_points(grid, per_side=per_side))
    shown = []
    for class_map, (x, y) in zip(class_maps, points.transpose(1, 2)):
        height, width = class_map.shape
        rows = (y * height).long().clamp(0, height - 1)
        cols = (x * width).long().clamp(0, width - 1)
        shown.append(torch.from_numpy(class_map).long()[rows, cols])
    parts = torch.stack(shown).view(-1, grid[0], per_side, grid[1], per_side)
    parts = parts.transpose(2, 3).reshape(len(class_maps), -1, per_side**2)
    ink = (parts[..., None] == torch.arange(NUM_CLASSES)).float().mean(2)
    most = ink.max(2)
    tokens = torch.where(most.values >= 1 / 6, most.indices, BACKGROUND)
    return Truth(tokens, ink.sum(1).argmax(1))


def label_quality(folder: Path, *, quick: bool) -> dict[str, float]:
    """Tell how often each kind of label says what a training crop shows, shares of 1."""
    num_train = 300 if quick else NUM_TRAIN
    scenes = list(compose_scenes(load_digits()[0], num_train, seed=1, config=TRAIN_SCENES))
    right: dict[str, list[Tensor]] = {}
    for kind, arm in (("ours", Arm()), ("published", Arm(is_published=True))):
        with join_processes("cpu") as place:
            recipe = load_recipe(RECIPE)
            feed = open_arm(recipe, folder, arm, place).open_train(None, 0)
            for _ in range(2 if quick else 40):
                batch = next(feed)
                assert batch.maps is not None
                views = exchange_axes(batch.views) if arm.is_published else batch.views
                maps = [scenes[int(Path(key).name)].class_map for key in batch.keys]
                truth = true_labels(maps, views, GRID)
                targets = sample_targets(batch.maps, batch.views, GRID)
                told = targets.dense_tokens().argmax(2) == truth.tokens
                for name, values in {
                    f"{kind} tokens": told[truth.tokens != BACKGROUND],
                    f"{kind} pooled": targets.dense_view().argmax(1) == truth.view,
                    "class labels": batch.classes == truth.view,
                }.items():
                    right.setdefault(name, []).append(values.float())
            feed.close()
    return {name: torch.cat(values).mean().item() for name, values in right.items()}


Curves = dict[str, list[dict[int, float]]]
"""By arm, one for each seed: top-1 by step."""


def final(runs: list[dict[int, float]]) -> Float[np.ndarray, " seeds"]:
    """Return the accuracies of an arm at the end."""
    return np.array([curve[max(curve)] for curve in runs])


def half_interval(gains: Float[np.ndarray, " seeds"]) -> float | None:
    """Half of the 95 % interval of a mean, Student's t; None for one seed."""
    if len(gains) < 2:
        return None
    return float(student_t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5)


def summarise(student: str, curves: Curves) -> list[dict[str, Any]]:
    """One line per arm: mean top-1, and its gain over the arm's base with the same seeds."""
    rows = []
    for arm, runs in curves.items():
        values, base = final(runs), ARMS[arm].base
        gains = values - final(curves[base])
        rows.append(
            {
                "student": student,
                "learns from": arm,
                "top-1": float(values.mean()),
                "against": base if base != arm else None,
                "gain": float(gains.mean()) if base != arm else None,
                "±": half_interval(gains) if base != arm else None,
                "seeds": ", ".join(f"{value:.1f}" for value in values),
            }
        )
    return rows


def draw(results: dict[str, Curves], out: Path) -> None:
    """Draw, for each student, some arms over the steps, and all gains at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(results), figsize=(11, 8), layout="constrained", sharey="row", squeeze=False
    )
    for (upper, lower), (student, curves) in zip(axes.T, results.items()):
        for arm, runs in curves.items():
            if ARMS[arm].line:
                steps = sorted(runs[0])
                mean = [np.mean([curve[step] for curve in runs]) for step in steps]
                color, line = ARMS[arm].color, ARMS[arm].line
                upper.plot(steps, mean, color=color, ls=line, lw=2, marker="o", label=arm)
        upper.set(title=student, xlabel="training step")
        compared = [arm for arm in curves if ARMS[arm].base != arm]
        for place, arm in enumerate(compared):
            gains, color = final(curves[arm]) - final(curves[ARMS[arm].base]), ARMS[arm].color
            bar = {"xerr": half_interval(gains), "fmt": "o", "color": color, "capsize": 4}
            lower.errorbar(gains.mean(), place, **bar)
            lower.scatter(gains, [place + 0.2] * len(gains), s=9, color=color, alpha=0.6)
        lower.axvline(0, color="black", lw=1)
        names = [f"{arm}\nagainst {ARMS[arm].base}" for arm in compared]
        lower.set_yticks(range(len(compared)), names, fontsize=8)
        lower.set(xlabel="gain in top-1 at the end, points")
    axes[0, 0].set(ylabel="top-1 on held-out scenes, %")
    axes[1, 0].invert_yaxis()
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=3, frameon=False, handlelength=4)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def in_words(facts: dict[str, float]) -> str:
    """Write facts in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in facts.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smoke test: proves nothing")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, help="only these: no results")
    parser.add_argument("--out", type=Path, help="folder of data and runs; a second start goes on")
    options = parser.parse_args(arguments)
    logging.getLogger("tokenlabel").setLevel(logging.WARNING)
    num_seeds = 1 if options.quick else options.seeds
    with ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder / "quick" if options.quick else folder
        folder.mkdir(parents=True, exist_ok=True)
        facts = make_data(folder, quick=options.quick)
        print(in_words(facts), flush=True)
        results: dict[str, Curves] = {
            student: {arm: [] for arm in ARMS} for student in options.students or STUDENTS
        }
        for seed in range(num_seeds):
            for student, curves in results.items():
                for arm, runs in curves.items():
                    runs.append(run(folder, student, arm, seed, quick=options.quick))
                    top1 = max(runs[-1].items())[1]
                    print(f"seed {seed}, {student}, {arm}: {top1:.1f} %", flush=True)
        quality = {} if options.students else label_quality(folder, quick=options.quick)
        print(in_words(quality))
    rows = [row for student, curves in results.items() for row in summarise(student, curves)]
    print(markdown(rows))
    if not options.quick and not options.students:
        draw(results, FIGURE)
        kept = {**facts, "label_quality": quality, "curves": results}
        print(f"written to {write('learning', rows, seeds=num_seeds, **kept)}")


if __name__ == "__main__":
    main()
