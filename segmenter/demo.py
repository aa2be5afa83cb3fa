"""The job behind tl-seg demo: does a segmentation model gain from a token-labelled start?

Scenes of handwritten digits (scenes.py), whose masks are known to the pixel. A small CNN learns
single digits and labels scenes densely; a small LV-ViT learns from these labels, without a mask;
then the same UperNet learns from few scenes with masks, starting from that LV-ViT and from scratch.
Every step of it is the job that real data take: tl-label, tl-shard, tl-train, tl-seg.

    OUT/scenes-labelled     scenes for the LV-ViT, in class folders
    OUT/scenes-masks/SPLIT  images/ and masks/, for tl-seg pack
    OUT/labels, OUT/shards  label maps, and what the LV-ViT learns from
    OUT/classifier          its run
    OUT/masks               what the segmentation models learn from
    OUT/ARM-SEED            their runs
    OUT/demo.png            scenes with masks, and what both models say of them
    OUT/result.json         written last
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
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
from .digit_teacher import save_as_teacher, train_teacher
from .evaluate import EvalReport, evaluate
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
from .sheet import draw_sheet
from .train import train

TOKEN_LABELLED, SCRATCH = "token-labelled", "from-scratch"
NAMES = ("background", *(f"digit {digit}" for digit in range(NUM_CLASSES)))
RESULT = "result.json"

_NUM_SHOWN = 4
_CLASSIFIER = (
    "model.num_classes=10", "model.image_size=64", "model.mix_token=false",
    "augment.hflip=0", "augment.scale=[0.5,1]", "augment.color_jitter=0",
    "augment.interpolation=bilinear", "optim.batch_size=32", "optim.lr_batch_size=32",
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
    num_labelled: int = 2000
    """Scenes with label maps and without masks."""
    num_masked: int = 200
    """Scenes with masks to learn from."""
    num_val: int = 200
    """Scenes with masks to measure on."""
    num_single: int = 4000
    """Images of single digits, twice, for the teacher."""
    teacher_steps: int = 400
    classifier_steps: int = 600
    steps: int = 1000
    """Of each segmentation model."""

    @classmethod
    def quick(cls) -> "DemoConfig":
        """So little of everything that only the way is shown."""
        return cls(
            num_seeds=1, num_labelled=100, num_masked=20, num_val=10, num_single=100,
            teacher_steps=4, classifier_steps=6, steps=6,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value}; allowed: >= 1")


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo has found."""

    config: DemoConfig
    miou: dict[str, list[float]]
    """Of each arm: mIoU in percent on held-out scenes at the last step, one entry a seed."""
    secs: float
    out: str

    @property
    def gains(self) -> list[float]:
        """Of the token-labelled start over scratch, with the same seed."""
        pairs = zip(self.miou[TOKEN_LABELLED], self.miou[SCRATCH])
        return [labelled - scratch for labelled, scratch in pairs]

    def to_json(self) -> dict[str, Any]:
        """Flatten to plain values."""
        return asdict(self) | {"gains": self.gains}

    def as_table(self) -> str:
        """Write both arms and the gain as columns."""
        rows = [(arm.replace("-", " ", 1), values) for arm, values in self.miou.items()]
        rows.append(("gain", self.gains))
        lines = [f"{'start':<16}{'mIoU':>7}{'std':>7}   seeds"]
        for name, values in rows:
            spread = f"{stdev(values):.1f}" if len(values) > 1 else "–"
            each = ", ".join(f"{value:.1f}" for value in values)
            lines.append(f"{name:<16}{mean(values):>7.1f}{spread:>7}   {each}")
        return "\n".join(lines)


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
    _write_masked(seen, out / "scenes-masks" / "train", config.num_masked, seed=3)
    _write_masked(held_out, out / "scenes-masks" / "val", config.num_val, seed=2)
    for split in ("train", "val"):
        folder = out / "scenes-masks" / split
        source = open_masks([str(folder)], split=split, classes=folder / "classes.txt")
        pack(source, out / "masks", split=split)
    miou: dict[str, list[float]] = {TOKEN_LABELLED: [], SCRATCH: []}
    for seed in range(config.num_seeds):
        recipe = load_recipe("demo", [f"run.seed={seed}", *_lasting(config.steps)])
        for arm, init in {TOKEN_LABELLED: start, SCRATCH: None}.items():
            outcome = train(
                recipe, data=out / "masks", out=out / f"{arm}-{seed}", init=init, device=device
            )
            if outcome.step < outcome.total_steps:
                raise ValueError(
                    f"the demo was stopped in {arm}-{seed} of {out}; it does not go on from there: "
                    "start it again with another --out"
                )
            miou[arm].append(outcome.metrics["raw_miou"])
            log.info("seed %d, %s: mIoU %.2f %%", seed, arm, miou[arm][-1])
    reports = [
        evaluate(
            out / f"{arm}-0" / "checkpoints" / "last.pt", out / "masks",
            device=device, num_workers=0, num_compared=_NUM_SHOWN,
        )
        for arm in miou
    ]  # fmt: skip
    replace_file(out / "demo.png", to_png(_draw(dict(zip(miou, reports)))))
    report = DemoReport(config=config, miou=miou, secs=time.monotonic() - begin, out=str(out))
    replace_file(out / RESULT, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    return report


def _make_classifier(digits: Digits, out: Path, config: DemoConfig, device: str) -> Path:
    """Label scenes with a teacher of single digits, and train an LV-ViT on them."""
    model = train_teacher(digits, num_steps=config.teacher_steps, num_images=config.num_single)
    teacher = save_as_teacher(model, out / "teacher.pth", device=device)
    scenes = out / "scenes-labelled"
    write_image_folder(digits, scenes, config.num_labelled, seed=1, config=SceneConfig())
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
    scenes = compose_scenes(digits, num_scenes, seed=seed, config=SceneConfig())
    for i, scene in enumerate(tqdm(scenes, "scenes with masks", num_scenes, disable=None)):
        mask = scene.class_map.astype("int32") + 1
        mask[scene.class_map == BACKGROUND] = 0
        Image.fromarray(scene.pixels).save(folder / "images" / f"{i:04}.jpg", quality=92)
        (folder / "masks" / f"{i:04}.png").write_bytes(write_mask(mask, len(NAMES)))
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")


def _draw(reports: dict[str, EvalReport]) -> Image.Image:
    sheets = []
    for arm, report in reports.items():
        sheet = draw_sheet(report.compared, report.classes, ignore_index=report.ignore_index)
        sheets.append(mounted([sheet], [], title=f"{arm}: mIoU {report.result.miou:.1f} %")[0])
    wide = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), "white")
    for number, sheet in enumerate(sheets):
        wide.paste(sheet, (sum(s.width for s in sheets[:number]), 0))
    return wide
