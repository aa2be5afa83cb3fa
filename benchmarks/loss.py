"""Claim: sparse targets and loss take a fraction of the time and memory of dense ones.

    python benchmarks/loss.py            label maps of the demo's photos; two minutes
    python benchmarks/loss.py --quick    a smoke test: one small batch, one repeat

One training step's targets and loss, forward and backward, for logits of 196 tokens and 1,000
classes. The baseline is the published way: the top-5 scores of each image are scattered into
1,000 planes of 18×18, RoIAlign reads them at 14×14 tokens, softmax, label smoothing, soft
cross-entropy. Both see the same maps, boxes and logits, in turn; memory is what the step adds to a
process at its peak, the gradient of the logits included.

On a CPU each way has a process of its own: the baseline's is a plain one, ours keeps freed memory,
as tl-train does there. Ratios with both plain (stock) and with both so (kept) stand beside. On a
GPU: a batch of 256, bfloat16 logits.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tokenlabel.labeler.cpu import keep_freed_memory, wait_briefly

wait_briefly()  # as the commands do, before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from photos import demo_photos, demo_teacher, label
from record import forget_peak, markdown, memory_mib, write
from torchvision.ops import roi_align
from tqdm import tqdm

from tokenlabel.labeler.geometry import PaletteMaps, crop_view
from tokenlabel.labeler.label_map import LabelMap
from tokenlabel.trainer.loss import token_label_loss
from tokenlabel.trainer.targets import batch_targets

BATCHES = (16, 32, 64)
GRID = (14, 14)
NUM_CLASSES = 1000
FORMATTER = argparse.RawDescriptionHelpFormatter
SMOOTHING = 0.1


def dense_step(
    scores: torch.Tensor,
    classes: torch.Tensor,
    boxes: torch.Tensor,
    logits: torch.Tensor,
    class_logits: torch.Tensor,
) -> torch.Tensor:
    """Do it as published, with the axes in order; boxes in image fractions."""
    planes = torch.zeros(len(scores), NUM_CLASSES, *scores.shape[2:], device=logits.device)
    for i in range(len(scores)):
        planes[i].scatter_(0, classes[i], scores[i].float())
    sides = torch.tensor(scores.shape[:1:-1] * 2, device=logits.device)
    rois = torch.cat([torch.arange(len(boxes), device=logits.device)[:, None], boxes * sides], 1)
    tokens = roi_align(planes, rois, GRID, aligned=True)
    whole = roi_align(planes, rois, (1, 1), aligned=True)
    loss = soft_cross_entropy(logits, smoothed(tokens.flatten(2).transpose(1, 2)))
    loss = loss + soft_cross_entropy(class_logits, smoothed(whole.flatten(1)))
    loss.backward()
    return loss


def smoothed(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) * (1 - SMOOTHING) + SMOOTHING / NUM_CLASSES


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (-targets * F.log_softmax(logits, -1)).sum(-1).mean()


def sparse_step(
    maps: PaletteMaps, views: torch.Tensor, logits: torch.Tensor, class_logits: torch.Tensor
) -> torch.Tensor:
    """Do it as the trainer does."""
    classes = torch.zeros(len(views), dtype=torch.int64, device=views.device)
    targets = batch_targets(
        maps, views, classes, GRID, num_classes=NUM_CLASSES, smoothing=SMOOTHING, fill="zero"
    )
    loss = token_label_loss(class_logits, logits, targets).total
    loss.backward()
    return loss


def steps(
    maps: list[LabelMap], num_images: int, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """Make both ways' step on one batch of random crops, whose label maps are decoded already."""
    rng = torch.Generator().manual_seed(0)
    few = (maps * num_images)[:num_images]
    corner = 0.4 * torch.rand(num_images, 2, generator=rng)
    boxes = torch.cat([corner, corner + 0.3 + 0.3 * torch.rand(corner.shape, generator=rng)], 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = tuple(
        torch.randn(*shape, NUM_CLASSES, generator=rng).to(device, dtype).requires_grad_()
        for shape in ((num_images, GRID[0] * GRID[1]), (num_images,))
    )
    scores, classes = (
        torch.from_numpy(np.stack(planes)).to(device)
        for planes in ([m.scores for m in few], [m.classes.astype(np.int64) for m in few])
    )
    boxes = boxes.to(device)
    palette_maps = PaletteMaps.from_label_maps(few).to(device)
    ways = {
        "dense": partial(dense_step, scores, classes, boxes, *logits),
        "sparse": partial(sparse_step, palette_maps, crop_view(boxes), *logits),
    }

    def fresh(step: Callable[[], torch.Tensor]) -> torch.Tensor:
        loss = step()
        for tensor in logits:  # each step begins without gradients, in memory, too
            tensor.grad = None
        return loss

    return {name: partial(fresh, step) for name, step in ways.items()}


def milliseconds(step: Callable[[], torch.Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def added_mib(way: str, maps: list[LabelMap], num_images: int) -> float:
    """What a step adds to this process's memory at its peak; call it in a fresh process."""
    steps(maps, 1, torch.device("cpu"))[way]()  # libraries are loaded, threads are made
    step = steps(maps, num_images, torch.device("cpu"))[way]
    forget_peak()
    before = memory_mib("VmRSS")
    step()
    return memory_mib("VmHWM") - before


_steps: dict[str, Callable[[], torch.Tensor]] = {}
"""Both ways' steps in a worker process."""


def prepare(maps: list[LabelMap], num_images: int, keep_memory: bool) -> None:
    """Set a worker process up."""
    if keep_memory:
        keep_freed_memory()
    _steps.update(steps(maps, num_images, torch.device("cpu")))


def worker_milliseconds(way: str) -> float:
    """Take a turn of a few steps; caches are another process's at the first."""
    turn = [milliseconds(_steps[way], torch.device("cpu")) for _ in range(4)]
    return statistics.median(turn[1:])


def cpu_times(
    maps: list[LabelMap], num_images: int, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Time each way in a process of its own, in turn, in milliseconds.

    Returns:
        Of (way, memory) the time of each round. memory is stock, as a Python process has it, or
        kept, as the commands of tokenlabel set it up on CPUs.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = {
            (way, memory): stack.enter_context(
                context.Pool(1, prepare, (maps, num_images, memory == "kept"))
            )
            for way in ("dense", "sparse")
            for memory in ("stock", "kept")
        }
        times: dict[tuple[str, str], list[float]] = {name: [] for name in workers}
        for _ in range(2 + rounds):
            for (way, memory), worker in workers.items():
                times[way, memory].append(worker.apply(worker_milliseconds, (way,)))
    return {name: of_way[2:] for name, of_way in times.items()}


def measure_on_cpu(maps: list[LabelMap], num_images: int, rounds: int) -> dict[str, Any]:
    """Time both ways in turn, and weigh them, each in a process of its own."""
    times = {name: np.array(found) for name, found in cpu_times(maps, num_images, rounds).items()}
    mib: dict[str, float | None] = dict.fromkeys(("dense", "sparse"))
    if Path("/proc/self/clear_refs").exists():
        for way in mib:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                mib[way] = pool.apply(added_mib, (way, maps, num_images))
    dense, sparse = times["dense", "stock"], times["sparse", "kept"]
    return row(num_images, dense, sparse, mib["dense"], mib["sparse"]) | {
        f"times_faster_{memory}": float(np.median(times["dense", memory] / times["sparse", memory]))
        for memory in ("stock", "kept")
    }


def measure_on_gpu(
    maps: list[LabelMap], num_images: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Time and weigh both ways in turn."""
    ways = steps(maps, num_images, device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 + rounds):
        for name, step in ways.items():
            times[name].append(milliseconds(step, device))
    mib: dict[str, float] = {}
    for name, step in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        mib[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    dense, sparse = (np.array(times[name][2:]) for name in ("dense", "sparse"))
    return row(num_images, dense, sparse, mib["dense"], mib["sparse"])


def row(
    num_images: int,
    dense: np.ndarray,
    sparse: np.ndarray,
    dense_mib: float | None,
    sparse_mib: float | None,
) -> dict[str, Any]:
    """Sum up rounds, in milliseconds."""
    return {
        "batch": num_images,
        "dense_ms": float(np.median(dense)),
        "sparse_ms": float(np.median(sparse)),
        "spread_ms": f"{np.ptp(dense):.1f}, {np.ptp(sparse):.1f}",
        "times_faster": float(np.median(dense / sparse)),
        "dense_mib": dense_mib,
        "sparse_mib": sparse_mib,
        "memory": sparse_mib / dense_mib if dense_mib and sparse_mib else None,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = (2,) if quick else BATCHES if device.type == "cpu" else (256,)
    teacher = demo_teacher(576)
    photos = demo_photos()[:2] if quick else demo_photos()
    maps = [label(teacher, photo, fit="stretch") for photo in tqdm(photos, disable=None)]
    rounds = 1 if quick else 15
    rows = [
        measure_on_cpu(maps, batch, rounds)
        if device.type == "cpu"
        else measure_on_gpu(maps, batch, device, rounds)
        for batch in batches
    ]
    print(markdown(rows))
    if not quick:
        print(f"written to {write('loss', rows, tokens=GRID, classes=NUM_CLASSES)}")


if __name__ == "__main__":
    main()
