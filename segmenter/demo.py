"""The job behind tl-seg demo: does a segmentation model gain from a token-labelled start?

Scenes of handwritten digits on stickers (scenes.py), whose masks are known to the pixel. A small
CNN learns single digits and labels scenes densely; a small LV-ViT learns from these labels, without
a mask; then the same UperNet learns from few scenes with masks, starting from that LV-ViT and from
scratch, with the same recipe, crops and number of steps. Scenes to measure on show digits that none
of them has seen. Every step of it is the job that real data take: tl-label, tl-shard, tl-train,
tl-seg.

    OUT/scenes-labelled     scenes for the LV-ViT, in class folders
    OUT/scenes-masks/SPLIT  images/ and masks/, for tl-seg pack
    OUT/labels, OUT/shards  label maps, and what the LV-ViT learns from
    OUT/classifier          its run
    OUT/masks               what the segmentation models learn from
    OUT/ARM-SEED            their runs
    OUT/demo.png            scenes to measure on, their masks, and what both models of seed 0 say
    OUT/result.json         written last
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..labeler.draw import mounted
from ..labeler.folder import replace_file
from ..labeler.generate import generate
from ..labeler.label_set import LabelSet
from ..labeler.sheet import to_png
from ..labeler.sources import open_source
from ..shards.masks import write_mask
from ..shards.pack import pack as pack_labelled
from ..trainer.loop import train as train_classifier
from ..trainer.recipe import load_recipe as load_classifier_recipe
from .class_sets import ClassSet, class_set_of
from .digit_teacher import save_as_teacher, train_teacher
from .evaluate import evaluate
from .metrics import SegResult
from .pack import open_masks, pack
from .recipe import load_recipe
from .scenes import (
    BACKGROUND,
    NUM_CLASSES,
    Digits,
    SceneConfig,
    compose_scenes,
    load_digits,
    write_image_folder,
)
from .sheet import Compared, draw_comparison
from .train import train

TOKEN_LABELLED, SCRATCH = "token-labelled", "from-scratch"
NAMES = ("background", *(f"digit {digit}" for digit in range(NUM_CLASSES)))
RESULT = "result.json"

SCENES = SceneConfig(
    num_digits=(2, 4), largest_px=(24, 32), smallest_px=15, next_largest=0.85, rim_px=3
)
"""Stickers, because UperNet tells positions apart that are 4 px from each other: bare strokes of
these digits are 2 to 4 px wide, and masks of them cannot be had from so coarse a grid."""

_SPLITS = ("train", "test")
"""None is called "val": the runs are evaluated once, at their end, and nothing is chosen by it."""
_IGNORED = 255
_NUM_SHOWN = 4
_CLASSIFIER = (
    "model.num_classes=10", "model.image_size=64", "model.mix_token=false",
    "augment.hflip=0", "augment.scale=[0.5,1]", "augment.color_jitter=0",
    "augment.interpolation=bilinear", "optim.batch_size=16", "optim.lr_batch_size=16",
    "optim.lr=1e-3", "optim.clip_grad=1", "schedule.cooldown=0 steps",
    "ema.decay=0", "evaluation.every=10000 steps", "run.log_every=100 steps",
    "run.checkpoint_every=10000 steps",
)  # fmt: skip
"""What the scenes change in tl-train's recipe `demo`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """How much of everything."""

    num_seeds: int = 3
    num_labelled: int = 3000
    """Scenes with label maps and without masks."""
    num_masked: int = 200
    """Scenes with masks to learn from."""
    num_test: int = 200
    """Scenes with masks to measure on."""
    num_single: int = 4000
    """Images of single digits, twice, for the teacher."""
    teacher_steps: int = 250
    classifier_steps: int = 1500
    steps: int = 300
    """Of each segmentation model."""

    @classmethod
    def quick(cls) -> "DemoConfig":
        """So little of everything that only the way is shown."""
        return cls(
            num_seeds=1, num_labelled=100, num_masked=20, num_test=40, num_single=100,
            teacher_steps=4, classifier_steps=6, steps=6,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value}; allowed: >= 1")


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo has found on scenes of digits that no model has seen."""

    config: DemoConfig
    miou: dict[str, list[float]]
    """Of each arm: mIoU in percent at the last step, one entry a seed."""
    class_iou: dict[str, dict[str, float]]
    """Of each arm and class: IoU in percent, mean over the seeds."""
    secs: float
    out: str

    @property
    def gains(self) -> list[float]:
        """Of the token-labelled start over scratch, with the same seed."""
        pairs = zip(self.miou[TOKEN_LABELLED], self.miou[SCRATCH])
        return [labelled - scratch for labelled, scratch in pairs]

    @property
    def gain_within(self) -> float | None:
        """Half of the 95 % interval of the mean gain, Student's t; None for one seed."""
        if len(self.gains) < 2:
            return None
        from scipy.stats import t  # mlxtend has brought it along

        num = len(self.gains)
        return float(t.ppf(0.975, num - 1)) * stdev(self.gains) / num**0.5

    def to_json(self) -> dict[str, Any]:
        """Flatten to plain values."""
        found = {"gains": self.gains, "gain": mean(self.gains), "gain_within": self.gain_within}
        return asdict(self) | found

    def as_table(self) -> str:
        """Write the classes, both arms and the gain as columns."""
        both = (TOKEN_LABELLED, SCRATCH)
        lines = [f"{'IoU in %, mean of seeds':<24}" + "".join(f"{arm:>16}" for arm in both)]
        for name in self.class_iou[TOKEN_LABELLED]:
            values = (self.class_iou[arm][name] for arm in both)
            lines.append(f"{name:<24}" + "".join(f"{value:>16.1f}" for value in values))
        lines += ["", f"{'start':<24}{'mIoU':>8}   seeds"]
        for name, values in (*self.miou.items(), ("gain", self.gains)):
            each = ", ".join(f"{value:.1f}" for value in values)
            lines.append(f"{name:<24}{mean(values):>8.1f}   {each}")
        return "\n".join([*lines, "", self.in_short()])

    def in_short(self) -> str:
        """Write the means in one line, with the gain's interval where there are several seeds."""
        arms = ", ".join(f"{arm} {mean(values):.1f} %" for arm, values in self.miou.items())
        within = f" ± {self.gain_within:.1f} (95 %)" if self.gain_within is not None else ""
        num = len(self.gains)
        return (
            f"mIoU on {self.config.num_test} scenes of unseen digits, {num} "
            f"{'seeds' if num > 1 else 'seed'}: {arms}, gain {mean(self.gains):.1f}{within}"
        )


def demo(out: Path, config: DemoConfig, *, device: str = "cpu") -> DemoReport:
    """Make scenes, label them, train all models and measure.

    Args:
        out: A new folder.
        config: How much of everything.
        device: See distributed.join_processes.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: A package of the extra [demo] is missing.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give another --out")
    begin = time.monotonic()
    seen, held_out = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    start = _make_classifier(seen, out, config, device)
    scenes = ((seen, config.num_masked, 3), (held_out, config.num_test, 2))
    for split, (digits, num, seed) in zip(_SPLITS, scenes):
        folder = out / "scenes-masks" / split
        _write_masked(digits, folder, num, seed=seed)
        source = open_masks([str(folder)], split=split, classes=folder / "classes.txt")
        pack(source, out / "masks", split=split)
    inits = {TOKEN_LABELLED: start, SCRATCH: None}
    results: dict[str, list[SegResult]] = {arm: [] for arm in inits}
    shown: dict[str, list[Compared]] = {}
    for seed in range(config.num_seeds):
        recipe = load_recipe("demo", [f"run.seed={seed}", *_lasting(config.steps)])
        for arm, init in inits.items():
            run = out / f"{arm}-{seed}"
            outcome = train(recipe, data=out / "masks", out=run, init=init, device=device)
            if outcome.step < outcome.total_steps:
                raise ValueError(
                    f"the demo was stopped in {run}; it does not go on from there: start it again "
                    "with another --out"
                )
            found = evaluate(
                run / "checkpoints" / "last.pt", out / "masks", split=_SPLITS[1],
                device=device, num_workers=0, num_compared=_NUM_SHOWN,
            )  # fmt: skip
            results[arm].append(found.result)
            shown.setdefault(arm, found.compared)
            log.info("seed %d, %s: mIoU %.2f %%", seed, arm, found.result.miou)
    report = DemoReport(
        config=config,
        miou={arm: [result.miou for result in found] for arm, found in results.items()},
        class_iou={arm: _class_iou(found) for arm, found in results.items()},
        secs=time.monotonic() - begin,
        out=str(out),
    )
    sheet = draw_comparison(shown, _classes(), ignore_index=_IGNORED)
    replace_file(out / "demo.png", to_png(mounted([sheet], [], title=report.in_short())[0]))
    replace_file(out / RESULT, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    return report


def _make_classifier(digits: Digits, out: Path, config: DemoConfig, device: str) -> Path:
    """Label scenes with a teacher of single digits, and train an LV-ViT on them."""
    model = train_teacher(
        digits, num_steps=config.teacher_steps, num_images=config.num_single, config=SCENES
    )
    teacher = save_as_teacher(model, out / "teacher.pth", device=device)
    scenes = out / "scenes-labelled"
    write_image_folder(digits, scenes, config.num_labelled, seed=1, config=SCENES)
    source = open_source(scenes)
    generate(source, out / "labels", teacher=teacher)
    pack_labelled(source, out / "shards", split="train", labels=LabelSet.open(out / "labels"))
    recipe = load_classifier_recipe("demo", [*_CLASSIFIER, *_lasting(config.classifier_steps)])
    train_classifier(recipe, data=out / "shards", out=out / "classifier", device=device)
    return out / "classifier" / "checkpoints" / "last.pt"


def _lasting(num_steps: int) -> list[str]:
    warmup = max(1, num_steps // 15)
    return [f"schedule.duration={num_steps} steps", f"schedule.warmup={warmup} steps"]


def _write_masked(digits: Digits, folder: Path, num_scenes: int, *, seed: int) -> None:
    """Write scenes and masks, whose values are the classes of NAMES."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    scenes = compose_scenes(digits, num_scenes, seed=seed, config=SCENES)
    for i, scene in enumerate(tqdm(scenes, "scenes with masks", num_scenes, disable=None)):
        mask = scene.class_map.astype("int32") + 1
        mask[scene.class_map == BACKGROUND] = 0
        Image.fromarray(scene.pixels).save(folder / "images" / f"{i:04}.jpg", quality=92)
        (folder / "masks" / f"{i:04}.png").write_bytes(write_mask(mask, len(NAMES)))
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")


def _classes() -> ClassSet:
    """Give the background a grey that digits stand out from."""
    classes = class_set_of(NAMES)
    return replace(classes, colours=((70, 70, 70), *classes.colours[1:]))


def _class_iou(results: Sequence[SegResult]) -> dict[str, float]:
    ious = zip(*([score.iou for score in result.classes] for result in results))
    return {name: mean(values) for name, values in zip(NAMES, ious)}
