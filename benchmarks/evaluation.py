"""Claim: tl-eval takes less time than timm's validate.py on the same images and model.

    python benchmarks/evaluation.py            the demo's model on 128 photos; two minutes
    python benchmarks/evaluation.py --quick    a smoke test: few photos, one pass

The baseline is written after the description of timm's validate.py: timm's ImageDataset, its
evaluation transform, a DataLoader with worker processes (four by default; as many as there are
cores as well), the model in inference mode, top-1, top-5 and loss summed up on the way. Ours is the
job behind tl-eval: the same, and all predictions, with Pillow (the same pixels) or DALI. The model
alone, a whole batch of pixels that lie in memory at a time, is timm's limit.

All take turns in one process tree, in batches of 64, with OpenMP's threads asleep while they wait,
as tl-eval sets them. Each has a process of its own, which stays; only ours keeps freed memory, as
tl-eval does on a CPU. Numbers must agree where pixels do. On a machine that others use, too,
compare CPU time, or the best times.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tokenlabel.labeler.cpu import keep_freed_memory, wait_briefly

wait_briefly()  # as the commands do, before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from photos import DEMO_MODEL, demo_checkpoint, demo_classes, demo_photos
from PIL import Image
from record import markdown, write
from timm.data.config import resolve_data_config
from timm.data.dataset import ImageDataset
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader

from tokenlabel.evaluator.data import Decoder
from tokenlabel.evaluator.metrics import measure
from tokenlabel.evaluator.models import load_for_eval
from tokenlabel.evaluator.predict import PredictConfig, predict
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.pack import pack
from tokenlabel.trainer.distributed import Place

PHOTOS = 128
REPEATS = 5
BATCH = 64
PHOTO_PX = (500, 375)
PLACE = Place(device=torch.device("cpu"))
FORMATTER = argparse.RawDescriptionHelpFormatter


def lay_out(count: int, folder: Path) -> None:
    """Write shifted demo photos as class folders, named by ImageNet's numbers, and as shards."""
    photos = [np.asarray(photo.resize(PHOTO_PX)) for photo in demo_photos()]
    classes = demo_classes()
    for i in range(count):
        which = i % len(photos)
        path = folder / f"photos/{classes[which]}/{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(photos[which], i, axis=1)).save(path, quality=92)
    pack(open_source(str(folder / "photos")), folder / "shards", split="val")


@torch.inference_mode()
def with_timm(folder: Path, num_workers: int) -> float:
    """Validate as timm does; return top-1 in percent."""
    model = load_for_eval(demo_checkpoint(), model=DEMO_MODEL).model.eval()
    config = resolve_data_config(model=model, use_test_size=True)
    dataset = ImageDataset(
        str(folder / "photos"),
        class_map={str(number): number for number in range(1000)},
        transform=create_transform(**config),
    )
    sums = torch.zeros(3, dtype=torch.float64)
    loader = DataLoader(dataset, BATCH, num_workers=num_workers, multiprocessing_context="fork")
    for images, classes in loader:
        logits = model(images)
        right = logits.topk(5).indices == classes[:, None]
        loss = F.cross_entropy(logits, classes, reduction="sum")
        sums += torch.stack([right[:, 0].sum(), right.sum(), loss]).double()
    return 100 * sums[0].item() / len(dataset)


def with_ours(data: Path, decoder: Decoder) -> float:
    """Run the job behind tl-eval; return top-1 in percent."""
    config = PredictConfig(model=DEMO_MODEL, decoder=decoder, batch_size=BATCH)
    predictions = predict(demo_checkpoint(), data, config, PLACE)
    return measure(predictions).heads["model"].top1.value


@torch.inference_mode()
def model_alone(count: int) -> None:
    """Answer to pixels that lie in memory."""
    model = load_for_eval(demo_checkpoint(), model=DEMO_MODEL).model.eval()
    images = torch.rand(BATCH, 3, 224, 224)
    for start in range(0, count, BATCH):
        model(images[: count - start])


def prepare(keep_memory: bool) -> None:
    """Set a job's process up."""
    logging.getLogger("tokenlabel").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")
    if keep_memory:
        keep_freed_memory()


def timed(job: Callable[[], float | None]) -> tuple[float | None, float, float]:
    """Run a job; return its top-1, and how long it took by the clock and in CPU time, s."""
    wall, cpu = time.perf_counter(), cpu_secs()
    top1 = job()
    return top1, time.perf_counter() - wall, cpu_secs() - cpu


def cpu_secs() -> float:
    """CPU time of this process and of all its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    count, repeats = (40, 1) if quick else (PHOTOS, REPEATS)
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lay_out(count, folder)
        jobs: dict[str, Callable[[], float | None]] = {
            f"timm, {num} workers": partial(with_timm, folder, num) for num in sorted({4, cores})
        }
        jobs["ours, folders, Pillow"] = partial(with_ours, folder / "photos", "pil")
        jobs["ours, folders, DALI"] = partial(with_ours, folder / "photos", "dali")
        jobs["ours, shards, DALI"] = partial(with_ours, folder / "shards", "dali")
        jobs["the model alone"] = partial(model_alone, count)
        spawn = multiprocessing.get_context("spawn")
        processes = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, spawn, prepare, (name.startswith("ours"),))
            )
            for name in jobs
        }
        secs: dict[str, list[float]] = {name: [] for name in jobs}
        cpus: dict[str, list[float]] = {name: [] for name in jobs}
        top1: dict[str, float | None] = {}
        for _ in range(repeats):
            for name, job in jobs.items():
                top1[name], wall, cpu = processes[name].submit(timed, job).result()
                secs[name].append(wall)
                cpus[name].append(cpu)
    baseline = min((name for name in jobs if "timm" in name), key=lambda n: min(secs[n]))

    def ratio(of: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(of[baseline], of[name]))

    rows = [
        {
            "job": name,
            "images_per_sec": count / statistics.median(secs[name]),
            "secs": statistics.median(secs[name]),
            "spread_secs": max(secs[name]) - min(secs[name]),
            "best_secs": min(secs[name]),
            "cpu_ms": 1e3 * statistics.median(cpus[name]) / count,
            "times_faster": ratio(secs, name),
            "best_times_faster": min(secs[baseline]) / min(secs[name]),
            "cpu_times_faster": ratio(cpus, name),
            "top1": top1[name],
        }
        for name in jobs
    ]
    print(markdown(rows))
    assert top1["ours, folders, Pillow"] == top1[baseline], "the same pixels, other answers"
    if not quick:
        facts = {"model": DEMO_MODEL, "photos": count, "photo_px": PHOTO_PX, "batch": BATCH}
        print(f"written to {write('evaluation', rows, baseline=baseline, **facts)}")


if __name__ == "__main__":
    main()
