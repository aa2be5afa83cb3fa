"""Claim: a student learns more from token labels than from class labels, in the same steps.

    python benchmarks/learning.py            needs the extra [demo]; about half an hour on 2 cores
    python benchmarks/learning.py --quick    a smoke test: one seed, few steps, nothing is proven

Scenes of several handwritten digits (scenes.py); a scene's class is its largest digit. A small CNN
learns single digits and becomes the teacher: tl-label's job makes label maps with it, tl-shard's
packs them, tl-train's loop trains the same LV-ViT on the same scenes in the same order with

    class labels               no label maps: the scene's class alone
    token labels               the scene's class for the class token, the maps for the patch tokens
    token labels, pooled       as published: the class token, too, learns from the map

Accuracy is top-1 of the raw weights on scenes of digits that neither teacher nor student has seen.
"""

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from record import markdown, write
from scenes import (
    NUM_CLASSES,
    Digits,
    SceneConfig,
    compose_scenes,
    load_digits,
    write_image_folder,
)
from tqdm import trange

from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import open_source
from tokenlabel.labeler.teacher import load_teacher
from tokenlabel.shards.pack import pack
from tokenlabel.trainer.loop import train
from tokenlabel.trainer.recipe import load_recipe
from tokenlabel.trainer.run_log import read_metrics

FIGURE = Path(__file__).parent.parent / "docs/images/learning.png"
TEACHER = "test_resnet"
TEACHER_SCALE = 2
"""How much larger than its pixels the teacher sees a scene: its cells of 32 px are 16 px of it."""
TEACHER_SIDES = (32, 48)
"""Sides of the images of single digits that the teacher learns from, px."""
ARMS = {
    "class labels": ["labels.dense_weight=0"],
    "token labels": [],
    "token labels, pooled": ["labels.class_target=pooled"],
}


def single_digits(
    digits: Digits, num: int, side_px: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make images of one digit each, large and small as in scenes; uint8 (n, 3, h, w), classes."""
    config = SceneConfig()
    alone = replace(
        config,
        side_px=side_px,
        num_digits=(1, 1),
        largest_px=(config.smallest_px, min(config.largest_px[1], side_px - 2)),
        num_scraps=round(2 * config.num_scraps * (side_px / config.side_px) ** 2),
    )
    scenes = list(compose_scenes(digits, num, seed=seed, config=alone))
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.tensor([scene.label for scene in scenes])


def train_teacher(digits: Digits, num_steps: int, num_images: int) -> torch.nn.Module:
    """Teach a small CNN single digits, at two sizes of the surroundings."""
    torch.manual_seed(0)
    model = timm.create_model(TEACHER, num_classes=NUM_CLASSES)
    sets = [single_digits(digits, num_images, side, seed=side) for side in TEACHER_SIDES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps, pct_start=0.06)
    model.train()
    for step in trange(num_steps, desc="teacher", disable=None):
        images, classes = sets[step % 2]
        chosen = torch.randint(len(images), (128 if step % 2 == 0 else 57,))  # as many pixels
        loss = F.cross_entropy(model(teacher_input(model, images[chosen])), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def teacher_input(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Enlarge and normalise as tl-label does at an image size of TEACHER_SCALE times the scene."""
    size = images.shape[-1] * TEACHER_SCALE
    larger = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    config: dict[str, Any] = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (larger.clamp(0, 255) / 255 - mean) / std


@torch.inference_mode()
def accuracy(model: torch.nn.Module, digits: Digits, num_images: int) -> float:
    """Share of single held-out digits that the teacher names."""
    images, classes = single_digits(digits, num_images, TEACHER_SIDES[0], seed=1)
    return (model(teacher_input(model, images)).argmax(1) == classes).float().mean().item()


def make_data(folder: Path, *, quick: bool) -> dict[str, float]:
    """Compose scenes, train the teacher, label and pack; return what is worth knowing of them."""
    seen, held_out = load_digits()
    config = SceneConfig()
    write_image_folder(seen, folder / "train", 300 if quick else 2000, seed=1, config=config)
    write_image_folder(held_out, folder / "val", 200 if quick else 1000, seed=2, config=config)
    model = train_teacher(seen, 30 if quick else 800, 300 if quick else 10_000)
    torch.save(model.state_dict(), folder / "teacher.pth")
    teacher = load_teacher(
        TEACHER,
        checkpoint=folder / "teacher.pth",
        image_size=config.side_px * TEACHER_SCALE,
        device="cpu",
    )
    source = open_source(folder / "train")
    made = generate(source, folder / "labels", teacher=teacher)
    pack(source, folder / "shards", split="train", labels=LabelSet.open(folder / "labels"))
    pack(open_source(folder / "val"), folder / "shards", split="val")
    return {
        "teacher_on_held_out_digits": accuracy(model, held_out, 200 if quick else 500),
        "teacher_on_training_scenes": (made.num_correct or 0) / made.num_labelled,
        "map_bytes": made.map_bytes / made.num_labelled,
    }


def run(folder: Path, arm: str, seed: int, *, quick: bool) -> dict[int, float]:
    """Train one student; return its top-1 on held-out scenes, percent, by training step."""
    changes = [f"run.seed={seed}", *ARMS[arm]]
    if quick:
        changes += ["schedule.duration=20 steps", "schedule.warmup=2 steps"]
    recipe = load_recipe(str(Path(__file__).with_suffix(".toml")), changes)
    out = folder / f"{arm.replace(' ', '-')}-{seed}"
    train(recipe, data=folder / "shards", out=out, device="cpu")
    return {
        record["step"]: record["raw_top1"]
        for record in read_metrics(out)
        if record["kind"] == "eval"
    }


def summarise(curves: dict[str, list[dict[int, float]]]) -> list[dict[str, Any]]:
    """One line per arm: mean and spread over seeds, and the paired gain over class labels."""
    final = {arm: np.array([last(curve) for curve in runs]) for arm, runs in curves.items()}
    rows = []
    for arm, values in final.items():
        gain = values - final["class labels"]
        several = len(values) > 1
        # Two-sided 95 % of Student's t for 2, 3, 4 and 5 seeds.
        quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.6)
        half = quantile * gain.std(ddof=1) / len(gain) ** 0.5 if several else None
        rows.append(
            {
                "student learns from": arm,
                "top-1": float(values.mean()),
                "std": float(values.std(ddof=1)) if several else None,
                "gain": float(gain.mean()),
                "±": None if half is None else float(half),
                "per seed": ", ".join(f"{value:.1f}" for value in values),
            }
        )
    return rows


def last(curve: dict[int, float]) -> float:
    """Return the accuracy at the end."""
    return curve[max(curve)]


def draw(curves: dict[str, list[dict[int, float]]], out: Path) -> None:
    """Draw accuracy over training steps: a thin line per seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (arm, runs), color in zip(curves.items(), ("#555555", "#0072b2", "#d55e00")):
        steps = sorted(runs[0])
        for curve in runs:
            axis.plot(steps, [curve[step] for step in steps], color=color, lw=0.6, alpha=0.6)
        mean = [np.mean([curve[step] for curve in runs]) for step in steps]
        axis.plot(steps, mean, color=color, lw=2, marker="o", label=arm)
    axis.set(xlabel="training step", ylabel="top-1 on held-out scenes, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smoke test: proves nothing")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    logging.getLogger("tokenlabel").setLevel(logging.WARNING)
    num_seeds = 1 if options.quick else options.seeds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = make_data(folder, quick=options.quick)
        print(", ".join(f"{key} {value:.3f}" for key, value in facts.items()))
        curves: dict[str, list[dict[int, float]]] = {arm: [] for arm in ARMS}
        for seed in range(num_seeds):
            for arm, runs in curves.items():
                runs.append(run(folder, arm, seed, quick=options.quick))
                print(f"seed {seed}, {arm}: {last(runs[-1]):.1f} %", flush=True)
    rows = summarise(curves)
    print(markdown(rows))
    if not options.quick:
        draw(curves, FIGURE)
        print(f"written to {write('learning', rows, seeds=num_seeds, curves=curves, **facts)}")


if __name__ == "__main__":
    main()
