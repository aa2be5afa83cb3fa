"""What a run writes about itself: metrics.jsonl, dashboards, curves.png, environment.json.

metrics.jsonl holds one JSON object a line, each with `kind`, `step` (steps taken so far) and
`epoch`; units are in the names:

    kind "train"   means over the steps since the line before: loss, class_loss, dense_loss,
                   grad_norm, images_per_sec, data_wait (share of time spent waiting for the feed),
                   gpu_memory_gb (on GPUs: peak of this start); then lr, and num_skipped since
                   the start of the run
    kind "eval"    raw_top1, raw_top5 (percent), raw_loss, and the same as ema_… where there is a
                   running average; num_images
    kind "skipped" keys: the images of a step that was not finite and changed nothing
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from .dashboards import WANDB_FOLDER, WANDB_ID, Dashboard
from .evaluate import EvalResult

METRICS = "metrics.jsonl"
CURVES = "curves.png"
ENVIRONMENT = "environment.json"
RECIPE = "recipe.toml"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
REPORT = "report.html"
PREDICTIONS = "predictions.png"
"""Of segmentation runs."""
_CONTENT = {
    *(METRICS, CURVES, ENVIRONMENT, RECIPE, CHECKPOINTS, TENSORBOARD, REPORT, PREDICTIONS),
    *(WANDB_FOLDER, WANDB_ID),
}

Panel = tuple[str, str, tuple[str, ...]]
"""Of curves.png: its title, the kind of the lines of metrics.jsonl, and which of their values."""
PANELS: tuple[Panel, ...] = (
    ("loss", "train", ("loss", "class_loss", "dense_loss")),
    ("top-1 in %", "eval", ("raw_top1", "ema_top1")),
    ("learning rate", "train", ("lr",)),
)

_SECS_BETWEEN_DRAWINGS = 60
_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy")


class RunLog:
    """Writes metrics as they come; a context manager.

    Args:
        folder: The run folder.
        step: Steps already taken. Lines of later steps, which a killed run has left behind, are
            dropped: the run will write them again.
        dashboards: Where numbers and pictures are shown besides; closed with this.
        panels: Of curves.png, see draw_curves.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        dashboards: Sequence[Dashboard] = (),
        panels: Sequence[Panel] = PANELS,
    ) -> None:
        self.folder = folder
        self._panels = panels
        self._dashboards = dashboards
        lines = [json.dumps(line) + "\n" for line in read_metrics(folder) if line["step"] <= step]
        replace_text(folder / METRICS, "".join(lines))
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._drawn_at = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def write(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Append one line, and show its numbers as KIND/NAME."""
        line = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
        # JSON has no NaN; a line that not every reader can parse is worse than a missing number.
        self._file.write(json.dumps({k: _finite_or_none(v) for k, v in line.items()}) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{n}": v for n, v in values.items() if isinstance(v, int | float)}
        for dashboard in self._dashboards if numbers else ():
            dashboard.numbers(step, numbers)

    def show(self, name: str, step: int, picture: Image.Image) -> None:
        """Show a picture on the dashboards."""
        for dashboard in self._dashboards:
            dashboard.picture(step, name, picture)

    def draw(self) -> None:
        """Draw curves.png anew, unless that was done a moment ago."""
        if time.monotonic() - self._drawn_at > _SECS_BETWEEN_DRAWINGS:
            self._draw()
            self._drawn_at = time.monotonic()

    def close(self, *, failed: bool = False) -> None:
        """Flush everything and draw curves.png a last time; an error ends the run if `failed`."""
        with ExitStack() as stack:
            stack.callback(self._draw)
            for dashboard in self._dashboards:
                stack.callback(dashboard.close, failed=failed)
            self._file.close()

    def _draw(self) -> None:
        draw_curves(read_metrics(self.folder), self.folder / CURVES, self._panels)


def summarise(
    results: Mapping[str, EvalResult], done: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Flatten evaluations of raw and averaged weights into a line, and name the better one.

    Returns:
        The values of a line of kind "eval", and of the better weights what Checkpoint.best holds.
    """
    metrics: dict[str, float] = {"num_images": float(results["raw"]["num_images"])}
    for weights, result in results.items():
        metrics[f"{weights}_top1"] = result["top1"]
        metrics[f"{weights}_top5"] = result["top5"]
        metrics[f"{weights}_loss"] = result["loss"]
    candidates = [
        {"top1": result["top1"], "loss": result["loss"], "step": done, "weights": weights}
        for weights, result in results.items()
    ]
    # Where top-1 is the same, the lower loss is better.
    return metrics, max(candidates, key=lambda found: (found["top1"], -found["loss"]))


def in_words(metrics: Mapping[str, float]) -> str:
    """Put a line of kind "eval" into words."""
    parts = [
        f"{weights} top-1 {metrics[f'{weights}_top1']:.2f} %, "
        f"top-5 {metrics[f'{weights}_top5']:.2f} %, loss {metrics[f'{weights}_loss']:.4g}"
        for weights in ("raw", "ema")
        if f"{weights}_top1" in metrics
    ]
    return f"{'; '.join(parts)} on {metrics['num_images']:.0f} images"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line torn by a kill is left out, a missing file is empty."""
    path = folder / METRICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Check that a run may be written here, without touching anything.

    Returns:
        Whether there is a run to resume in it.

    Raises:
        FileExistsError: Something is there and neither resume nor overwrite was asked for, or
            overwriting would delete files that no run wrote.
        ValueError: Both were asked for.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it: give only one")
    entries = list(folder.iterdir()) if folder.exists() else []
    if entries and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} is not empty; --resume goes on with the run in it, --overwrite deletes it, "
            "or choose another --out"
        )
    foreign = [e.name for e in entries if e.name not in _CONTENT and not _is_temporary(e)]
    if overwrite and foreign:
        raise FileExistsError(
            f"{folder} is not deleted: it holds {foreign[0]}, which no run has written; "
            "choose another --out"
        )
    return resume and any((folder / CHECKPOINTS).glob("*.pt"))


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the run folder that `check_folder` has allowed, emptied of an earlier run."""
    if overwrite and folder.exists():
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)


def write_environment(folder: Path, *, step: int, about: dict[str, Any]) -> None:
    """Add to environment.json what this start of the run runs on: versions, code, command."""
    path = folder / ENVIRONMENT
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and step else []
    starts.append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": _versions(),
            "code": _git_state(Path(__file__).parents[1]),
            "machine": platform.machine(),
            "num_cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **about,
        }
    )
    replace_text(path, json.dumps(starts, indent=1) + "\n")


def draw_curves(
    metrics: list[dict[str, Any]], path: Path, panels: Sequence[Panel] = PANELS
) -> None:
    """Draw values over the steps, as a PNG; unless told otherwise loss, accuracy, learning rate."""
    figure = Figure(figsize=(12, 3.6))
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.15, wspace=0.25)
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, kind, names) in zip(subplots, panels):
        for name in names:
            points = [
                (line["step"], line[name])
                for line in metrics
                if line["kind"] == kind and line.get(name) is not None
            ]
            if points:
                # Markers, since a line through one point is invisible.
                axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
        axes.set(title=title, xlabel="step")
        # Where all is 0, as a first top-1 is, matplotlib would show a range of a few hundredths.
        axes.set_ylim(0, None if any(max(line.get_ydata()) > 0 for line in axes.lines) else 1)
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in ("tokenlabel", *_PACKAGES) if name in installed}


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None where the code is no git checkout."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    return done.stdout.strip()
