"""Claim: heatmaps say what the model looked at. Which ones, and by how much more than noise?

    OMP_NUM_THREADS=1 python benchmarks/faithfulness.py --out runs/faithful    needs extra [demo]
    python benchmarks/faithfulness.py --quick    a smoke test: few steps, nothing is proven

Scenes of handwritten digits (scenes.py), whose class is the largest digit, so that it is known to
the pixel what a model has to look at. LV-ViTs of a few seeds learn class labels and token labels as
in learning.py; then every method explains held-out scenes, and tl-explain evaluate's job takes its
measures. Draws docs/images/faithfulness.png, and docs/images/explanations.jpg: tl-explain's sheet
of one scene.

A run that was stopped goes on when the same command is given again. All of it takes 12 minutes of
one core.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from learning import RECIPE, digits_or_none, write_whole
from PIL import Image
from record import markdown, write
from scenes import Scene, SceneConfig, compose_scenes, load_digits, write_image_folder
from scipy.stats import rankdata

from tokenlabel.evaluator.data import PilView, open_data
from tokenlabel.evaluator.labels import find_truth
from tokenlabel.evaluator.models import EvalModel, load_for_eval
from tokenlabel.evaluator.predictions import MODEL
from tokenlabel.explainer.evaluate import FaithfulnessConfig, evaluate
from tokenlabel.explainer.explain import ExplainConfig, explain_images
from tokenlabel.explainer.localize import open_annotations
from tokenlabel.explainer.methods import Options, explain
from tokenlabel.explainer.perturb import Curve
from tokenlabel.explainer.scores import MEASURES, MethodScores
from tokenlabel.explainer.sheet import overlay
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import open_source
from tokenlabel.labeler.teacher import Teacher, load_teacher
from tokenlabel.segmenter import digit_teacher
from tokenlabel.shards.pack import pack
from tokenlabel.trainer.distributed import join_processes
from tokenlabel.trainer.loop import train
from tokenlabel.trainer.recipe import load_recipe

IMAGES = Path(__file__).parent.parent / "docs/images"
SCENES = SceneConfig(sides_px=(96, 96), num_digits=(3, 5), largest_px=(30, 44))
NUM_TRAIN, NUM_HELD_OUT = 2000, 200
CHANGES = [
    "summary=scenes of digits: which heatmaps are faithful?",
    "model.image_size=96",  # 6 × 6 tokens
    "model.kwargs={embed_dim=96, depth=4, num_heads=3, stem_width=16}",
    "augment.scale=[0.6, 1.0]",
    "labels.class_target=label",
    "labels.smoothing=0.0",
    "schedule.duration=1000 steps",
    "evaluation.every=500 steps",
    "run.checkpoint_every=500 steps",
]
"""To learning.toml."""
ARMS = {
    "gae": ("gae", Options()),
    "transformer_attribution": ("transformer_attribution", Options()),
    "transformer_attribution, start layer 1": ("transformer_attribution", Options(start_layer=1)),
    "dense": ("dense", Options()),
    "rollout": ("rollout", Options()),
    "raw": ("raw", Options()),
    "random": ("random", Options()),
}
_GAE, _TA, _TA_1, _DENSE, _ROLLOUT, _RAW, _RANDOM = ARMS
COLOURS = {
    _GAE: "#0072b2", _TA: "#d55e00", _TA_1: "#d55e00", _DENSE: "#009e73", _ROLLOUT: "#cc79a7",
    _RAW: "#56b4e9", _RANDOM: "#777777",
}  # fmt: skip
LINES = {_TA_1: "--", _RANDOM: ":"}
TABLES = {
    "pixels taken away": ("positive", "negative", "insertion", "deletion"),
    "on the object": (
        "boxes_hit", "boxes_mass", "masks_hit", "masks_mass", "pixel_accuracy", "mean_ap", "miou",
    ),
}  # fmt: skip
"""Measures that answer the same question; arms are ranked by each question on its own."""
BARS = ("positive", "negative", "insertion", "deletion", "boxes_hit", "boxes_mass", "miou")
CURVE_TITLES: dict[Curve, tuple[str, Literal["accuracy", "probability"]]] = {
    "positive": ("hottest pixels blackened first", "accuracy"),
    "negative": ("coldest pixels blackened first", "accuracy"),
    "insertion": ("hottest pixels put into the blurred scene", "probability"),
}
NUM_EXAMPLES = 2

Run = dict[str, Any]
"""What was measured on one model: {"clean": interval, "arms": {arm: see plain}}."""


class Example(NamedTuple):
    """A scene and its heatmaps by arm."""

    key: str
    scene: Scene
    heatmaps: dict[str, Float[np.ndarray, "rows cols"]]


# --------------------------------------------------------------------- teacher and data


def make_data(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Compose scenes, with masks of what counts, and label and pack them."""
    done = folder / "facts.json"
    if done.exists():
        return json.loads(done.read_text())
    seen, held_out = load_digits()
    num_train, num_held_out = (100, 8) if quick else (NUM_TRAIN, NUM_HELD_OUT)
    write_image_folder(seen, folder / "train", num_train, seed=1, config=SCENES)
    write_image_folder(held_out, folder / "held-out", num_held_out, seed=2, config=SCENES)
    scenes = list(compose_scenes(held_out, num_held_out, seed=2, config=SCENES))
    write_annotations(scenes, folder)
    num_pictures, num_steps = (200, 10) if quick else (4000, 350)
    model = digit_teacher.train_on(
        [digits_or_none(seen, num_pictures, s, seed=2 * s) for s in digit_teacher.SIDES_PX],
        num_steps=num_steps,
    )
    torch.save(model.state_dict(), folder / "teacher.pth")
    source = open_source(folder / "train")
    generate(source, folder / "labels", teacher=open_teacher(folder), top_k=3, overwrite=True)
    labels, shards = LabelSet.open(folder / "labels"), folder / "shards"
    pack(source, shards, split="train", labels=labels, overwrite=True)
    pack(open_source(folder / "held-out"), shards, split="val", overwrite=True)
    facts = {
        "scenes_to_train_on": num_train,
        "held_out": num_held_out,
        "ink_of_scene": float(np.mean([scene.class_map == scene.label for scene in scenes])),
    }
    write_whole(done, facts)
    return facts


def write_annotations(scenes: Sequence[Scene], folder: Path) -> None:
    """Write box and mask of each scene's largest digit, under the scenes' own names."""
    lines = ["image,x0,y0,x1,y1"]
    for i, scene in enumerate(scenes):
        lines.append(",".join([key_of(i, scene), *map(str, scene.digits[0].box)]))
        path = folder / f"masks/{key_of(i, scene)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scene.class_map == scene.label).astype(np.uint8)).save(path)
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


def key_of(i: int, scene: Scene) -> str:
    """Name a scene as write_image_folder does."""
    return f"digit-{scene.label}/{i:06}"


def open_teacher(folder: Path) -> Teacher:
    """Open the teacher so that it sees scenes as large as it learned digits."""
    return load_teacher(
        digit_teacher.NAME,
        checkpoint=folder / "teacher.pth",
        image_size=SCENES.sides_px[0] * digit_teacher.SCALE,
        device="cpu",
    )


def train_student(folder: Path, seed: int, *, quick: bool) -> Path:
    """Train one student, or go on where its run was stopped; return its checkpoint."""
    changes = [*CHANGES, f"run.seed={seed}"]
    if quick:
        changes += ["schedule.duration=8 steps", "schedule.warmup=2 steps"]
    out = folder / f"student-{seed}"
    train(load_recipe(RECIPE, changes), data=folder / "shards", out=out, device="cpu", resume=True)
    return out / "checkpoints/last.pt"


# --------------------------------------------------------------------- measures


def measure(folder: Path, seed: int, *, quick: bool) -> Run:
    """Train a model and measure all arms on it, or return what was measured before."""
    done = folder / f"measured-{seed}.json"
    if not done.exists():
        model = load_for_eval(train_student(folder, seed, quick=quick))
        truth = find_truth(open_data(folder / "held-out"), model)
        boxes, masks = (open_annotations(folder / name) for name in ("boxes.csv", "masks"))
        arms, clean = {}, None
        for number, (options, names) in enumerate(by_options().items()):
            config = FaithfulnessConfig(
                methods=tuple(names.values()), explained="label", options=options
            )
            with join_processes("cpu") as place:
                found = evaluate(
                    model, truth, folder / f"evaluated-{seed}-{number}", config, place,
                    boxes=boxes, masks=masks, segmentation=masks,
                )  # fmt: skip
            assert found is not None and found.clean_accuracy is not None
            clean = list(found.clean_accuracy)
            arms |= {arm: plain(found.methods[method]) for arm, method in names.items()}
        write_whole(done, {"clean": clean, "arms": {arm: arms[arm] for arm in ARMS}})
    return json.loads(done.read_text())


def by_options() -> dict[Options, dict[str, str]]:
    """Group arms that can be measured together: the method of each arm, by options."""
    groups: dict[Options, dict[str, str]] = {}
    for arm, (method, options) in ARMS.items():
        groups.setdefault(options, {})[arm] = method
    return groups


def plain(scores: MethodScores) -> dict[str, Any]:
    """Turn into plain values."""
    return {
        "measures": {name: list(found) for name, found in scores.measures.items()},
        "like_random": [name for name in scores.less_random if scores.is_like_random(name)],
        "correlation": None if scores.correlation is None else scores.correlation.median,
        "curves": {
            name: {
                "fractions": curve.fractions,
                "accuracy": [point.value for point in curve.accuracy],
                "probability": [point.value for point in curve.probability],
            }
            for name, curve in scores.curves.items()
        },
    }


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One line per arm: means over seeds, of values and of the ends of their intervals; places."""
    rows = [
        {"method": arm} | {k: v for name in MEASURES for k, v in summary(runs, arm, name).items()}
        for arm in ARMS
    ]
    for table, names in TABLES.items():
        signs = [-1 if MEASURES[name].higher_is_better else 1 for name in names]
        places = rankdata([[s * row[n] for s, n in zip(signs, names)] for row in rows], axis=0)
        for row, mean_place in zip(rows, places.mean(1).tolist()):
            row[f"place, {table}"] = mean_place
    return rows


def summary(runs: Sequence[Run], arm: str, name: str) -> dict[str, Any]:
    """Take one measure of one arm together."""
    found = np.array([run["arms"][arm]["measures"][name] for run in runs])
    value, low, high = found.mean(0).tolist()
    return {
        name: value,
        f"{name} low": low,
        f"{name} high": high,
        f"{name} seeds": found[:, 0].tolist(),
        f"{name} like random": sum(name in run["arms"][arm]["like_random"] for run in runs),
    }


def ranked(rows: Sequence[dict[str, Any]], table: str) -> list[dict[str, Any]]:
    """Sort arms by their mean place in a table's measures."""
    return sorted(rows, key=lambda row: row[f"place, {table}"])


# --------------------------------------------------------------------- pictures


def find_examples(model: EvalModel, scenes: Sequence[Scene]) -> list[Example]:
    """Explain the first scenes, each of another class, whose two best answers they do show.

    The first of these has to be right.
    """
    view, examples, shown = PilView(model.view), [], set()
    for i, scene in enumerate(scenes):
        image = view.normalize(torch.from_numpy(view.cut(Image.fromarray(scene.pixels))))
        with torch.inference_mode():
            best, second = model.logits(image)[MODEL][0].topk(2).indices.tolist()
        is_shown = second in {placed.digit for placed in scene.digits}
        if scene.label in shown or best != scene.label or not is_shown:
            continue
        shown.add(scene.label)
        right = torch.tensor([scene.label])
        heatmaps = {
            arm: explain(method, model.model, image, right, options)[0].numpy()
            for arm, (method, options) in ARMS.items()
        }
        examples.append(Example(key_of(i, scene), scene, heatmaps))
        if len(examples) == NUM_EXAMPLES:
            break
    return examples


def draw(runs: Sequence[Run], examples: Sequence[Example], out: Path) -> None:
    """Draw curves, all arms by each measure, and heatmaps of a few scenes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 8 + 1.9 * len(examples)), layout="constrained")
    heights = [4.4, 3.6, 1.9 * len(examples)][: 3 if examples else 2]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    upper, middle, *lower = parts
    draw_curves(runs, upper)
    rows = ranked(summarise(runs), next(iter(TABLES)))
    draw_bars(rows, middle)
    if lower:
        draw_examples(examples, [row["method"] for row in rows], lower[0])
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_curves(runs: Sequence[Run], figure: Any) -> None:
    """Draw means over the seeds."""
    axes = figure.subplots(1, len(CURVE_TITLES))
    for axis, (name, (title, kind)) in zip(axes, CURVE_TITLES.items()):
        for arm, colour in COLOURS.items():
            curves = [run["arms"][arm]["curves"][name] for run in runs]
            percent = [100 * fraction for fraction in curves[0]["fractions"]]
            values = 100 * np.mean([curve[kind] for curve in curves], axis=0)
            axis.plot(percent, values, color=colour, label=arm, ls=LINES.get(arm, "-"))
        what = "right answers" if kind == "accuracy" else "probability of the class"
        axis.set(title=title, xlabel="% of the pixels", ylabel=f"{what}, %", ylim=(0, 100))
        axis.grid(alpha=0.3)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=4, frameon=False, handlelength=3)


def draw_bars(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    """Draw a panel for each measure, with intervals; the dotted line is the control."""
    axes = figure.subplots(1, len(BARS), sharey=True)
    control = next(row for row in rows if row["method"] == "random")
    for axis, name in zip(axes, BARS):
        for place, row in enumerate(rows):
            axis.barh(place, row[name], color=COLOURS[row["method"]], alpha=0.75)
            axis.plot([row[f"{name} low"], row[f"{name} high"]], [place, place], "k-", lw=1.2)
        axis.axvline(control[name], color="black", ls=":", lw=1)
        most = "most" if MEASURES[name].higher_is_better else "least"
        axis.set_title(f"{MEASURES[name].title}, %\n({most} is best)", fontsize=10)
        axis.set_yticks(range(len(rows)), [in_lines(row["method"]) for row in rows])
    axes[0].invert_yaxis()


def draw_examples(examples: Sequence[Example], arms: Sequence[str], figure: Any) -> None:
    """Draw a row for each scene: the photo, and a heatmap of its class by each arm.

    All are stretched, dense too: only the order of its values was measured.
    """
    axes = figure.subplots(len(examples), 1 + len(arms), squeeze=False)
    for row, example in zip(axes, examples):
        photo = Image.fromarray(example.scene.pixels).resize((192, 192), Image.Resampling.NEAREST)
        row[0].imshow(photo)
        row[0].set_title(f"a {example.scene.label}", fontsize=9)
        for axis, arm in zip(row[1:], arms):
            axis.imshow(overlay(photo, example.heatmaps[arm]))
            axis.set_title(in_lines(arm), fontsize=9)
        for axis in row:
            axis.axis("off")


def in_lines(arm: str) -> str:
    """Break a long name."""
    return arm.replace("r_a", "r_\na").replace(", ", ",\n")


def draw_sheet(model: EvalModel, folder: Path, key: str, out: Path) -> None:
    """Draw tl-explain's sheet of one held-out scene, with its two best answers."""
    source = open_source(folder / "held-out")
    source = replace(source, samples=[sample for sample in source.samples if sample.key == key])
    labels = folder / "sheet-labels"
    generate(source, labels, teacher=open_teacher(folder), top_k=3, overwrite=True)
    report = explain_images(
        {"digits": model},
        source,
        folder / "sheet",
        ExplainConfig(methods=("all",), classes=("top2",)),
        device=torch.device("cpu"),
        labels=LabelSet.open(labels),
    )
    Image.open(report.sheets[key]).convert("RGB").save(out, quality=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smoke test: proves nothing")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of data and runs; a second start goes on")
    options = parser.parse_args(arguments)
    logging.getLogger("tokenlabel").setLevel(logging.WARNING)
    num_seeds = 1 if options.quick else options.seeds
    with ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder / "quick" if options.quick else folder
        folder.mkdir(parents=True, exist_ok=True)
        facts = make_data(folder, quick=options.quick)
        print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
        runs = []
        for seed in range(num_seeds):
            runs.append(measure(folder, seed, quick=options.quick))
            print(f"seed {seed}: {runs[-1]['clean'][0]:.1f} % right", flush=True)
        rows = summarise(runs)
        for table, names in TABLES.items():
            shown = ["method", f"place, {table}", *names]
            print(f"\n{table}\n")
            print(markdown([{n: row[n] for n in shown} for row in ranked(rows, table)]), flush=True)
        if not options.quick:
            model = load_for_eval(train_student(folder, 0, quick=False))
            scenes = compose_scenes(load_digits()[1], facts["held_out"], seed=2, config=SCENES)
            examples = find_examples(model, list(scenes))
            draw(runs, examples, IMAGES / "faithfulness.png")
            draw_sheet(model, folder, examples[0].key, IMAGES / "explanations.jpg")
            kept = {"seeds": num_seeds, **facts, "tables": tables(), "runs": runs}
            print(f"written to {write('faithfulness', rows, **kept)}")


def tables() -> dict[str, dict[str, tuple[str, bool]]]:
    """Say of each table's measures what they are called and whether more is better."""
    return {
        table: {name: (MEASURES[name].title, MEASURES[name].higher_is_better) for name in names}
        for table, names in TABLES.items()
    }


if __name__ == "__main__":
    main()
