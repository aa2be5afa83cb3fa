"""Claim: a training step of LV-ViT-S keeps a GPU busy, and its targets and loss take little memory.

    python benchmarks/training_step.py            on a CPU memory, on a GPU speed; minutes
    python benchmarks/training_step.py --quick    a smoke test

On a GPU: images per second of whole steps in bf16 (targets, forward, loss, backward, clipping norm,
AdamW, average of the weights), batch 256, eager and compiled: on one batch that lies on the device,
and with the feed beside it, from photos of 500×375 with RandAugment and token labels.

On a CPU, where a network is too slow to be ranked by speed: what forward and backward pass of 16
images add to the memory of a process at their peak, and what they allocate in all, with our sparse
targets and loss, with dense ones as published (see loss.py), and with the sum of the logits as
loss, which is what the network takes by itself. Each in a process of its own.
"""

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss import dense_step, sparse_step
from record import forget_peak, markdown, memory_mib, write
from samples import random_map
from torch.profiler import ProfilerActivity, profile

from tokenlabel.labeler.geometry import PaletteMaps, crop_view
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.recipe import ModelConfig, load_recipe

BATCH, BATCH_ON_CPU = 256, 16
NUM_PHOTOS = 4096
NUM_STEPS = 50
FORMATTER = argparse.RawDescriptionHelpFormatter
WAYS = ("network alone", "dense", "sparse")
TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2, "stem_width": 4}


def gpu_rows(quick: bool) -> list[dict[str, Any]]:
    """Time a run's steps as tl-train plan does, eager and compiled."""
    # These need DALI, which the rows for a CPU do without.
    from samples import lay_out, make_samples

    from tokenlabel.labeler.label_set import LabelSet
    from tokenlabel.labeler.sources import open_source
    from tokenlabel.shards.pack import pack
    from tokenlabel.trainer.plan import measure

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, shards = Path(name), Path(name) / "shards"
        lay_out(make_samples(2 * BATCH if quick else NUM_PHOTOS), folder)
        source = open_source(str(folder / "images"), classes=folder / "classes.txt")
        pack(source, shards, split="train", labels=LabelSet.open(folder / "labels"))
        for job, compiled in (("eager", "off"), ("compiled", "on")):
            settings = [f"optim.batch_size={BATCH}", f"run.compile={compiled}"]
            torch.cuda.reset_peak_memory_stats()
            found = measure(
                load_recipe("lvvit_s_224", settings), shards, num_steps=2 if quick else NUM_STEPS
            )
            rows.append(
                {
                    "job": job,
                    "batch": BATCH,
                    "synthetic_images_per_sec": found.step_images_per_sec,
                    "with_feed_images_per_sec": found.images_per_sec,
                    "of_synthetic": found.images_per_sec / found.step_images_per_sec,
                    "feed_images_per_sec": found.feed_images_per_sec,
                    "peak_gib": found.memory_bytes / 2**30,
                }
            )
    return rows


class Pass:
    """Forward and backward pass of LV-ViT-S on random images, with one of the losses."""

    def __init__(self, way: str, num_images: int, **kwargs: Any) -> None:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        self._way = way
        self._model = create_model(ModelConfig(name="lvvit_s", kwargs=kwargs)).train()
        self._images = torch.randn(num_images, 3, 224, 224)
        maps = [random_map(rng) for _ in range(num_images)]
        corners = torch.from_numpy(0.4 * rng.random((num_images, 2))).float()
        self._boxes = torch.cat([corners, corners + 0.5], 1)
        self._scores = torch.from_numpy(np.stack([found.scores for found in maps]))
        self._classes = torch.from_numpy(
            np.stack([found.classes.astype(np.int64) for found in maps])
        )
        self._maps = PaletteMaps.from_label_maps(maps)

    def __call__(self) -> None:
        self._model.zero_grad()
        class_logits, logits, _ = self._model(self._images)
        if self._way == "dense":
            dense_step(self._scores, self._classes, self._boxes, logits, class_logits)
        elif self._way == "sparse":
            sparse_step(self._maps, crop_view(self._boxes), logits, class_logits)
        else:
            (logits.sum() + class_logits.sum()).backward()


def weigh(way: str, num_images: int) -> dict[str, Any]:
    """Measure the memory of one way; call it in a fresh process."""
    Pass(way, 2, **TINY)()  # libraries are loaded, threads are made
    once = Pass(way, num_images)
    forget_peak()
    before = memory_mib("VmRSS")
    once()
    peak_mib = memory_mib("VmHWM") - before
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the profiler says of itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        once()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    taken = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    return {
        "job": way,
        "batch": num_images,
        "peak_mib": peak_mib,
        "allocations": len(taken),
        "allocated_mib": sum(taken) / 2**20,
    }


def cpu_rows(quick: bool) -> list[dict[str, Any]]:
    """Weigh each way in a process of its own, and take off what the network takes by itself."""
    num_images = 2 if quick else BATCH_ON_CPU
    rows = []
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(weigh, (way, num_images)))
    alone = rows[0]
    for row in rows:
        row["more_peak_mib"] = row["peak_mib"] - alone["peak_mib"]
        row["more_allocations"] = row["allocations"] - alone["allocations"]
        row["more_allocated_mib"] = row["allocated_mib"] - alone["allocated_mib"]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = gpu_rows(quick) if torch.cuda.is_available() else cpu_rows(quick)
    print(markdown(rows))
    if not quick:
        print(f"written to {write('training_step', rows, model='lvvit_s', side_px=224)}")


if __name__ == "__main__":
    main()
