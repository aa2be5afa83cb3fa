"""Claim: tl-label generate is nearly as fast as its teacher alone.

    python benchmarks/generation.py            five minutes on two cores
    python benchmarks/generation.py --quick    a smoke test: few photos, one round

The job behind tl-label generate, from JPEG files of 500×375 (60 KB) to finished label shards,
against the bare forward pass of the same teacher on the same batches, whose pixels lie ready in
memory, normalised. The job does more: it reads, decodes, resizes, classifies every cell, keeps the
best classes, encodes, hashes and writes. All take turns, several rounds; the baseline of a round is
the fastest bare way. "cpu" compares CPU time, which others on the machine disturb less.

On a CPU: EfficientNet-Lite0 at 576, fit native. Bare: a batch on each core, as the job has it, and
each batch on all cores, as torch does it by itself. How long each stage takes alone, as tl-label
plan measures it, is written beside.

On a GPU: the same, and NFNet-F6 at 576 with random weights in bf16, fit stretch. Bare: as the job
has it (channels last), compiled as well, and plain (channels first).
"""

import argparse
import copy
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands have it

import numpy as np
import timm
import torch
from photos import demo_teacher
from record import markdown, write
from samples import make_samples
from torch import Tensor

from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.plan import measure
from tokenlabel.labeler.score import default_batch_size, load_inputs
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.teacher import Teacher, as_teacher

NFNET = "dm_nfnet_f6"
READY_BATCHES = 4
"""Different batches that lie ready on a GPU; more would take its memory."""
FORMATTER = argparse.RawDescriptionHelpFormatter


@dataclass(frozen=True, kw_only=True)
class Case:
    """A teacher, how photos meet it, and how many of them."""

    teacher: Teacher
    fit: str
    num_images: int
    compiled: bool = False
    """Whether to measure the compiled teacher, too."""

    @property
    def batch_size(self) -> int:
        return default_batch_size(self.teacher)


def cases(quick: bool) -> list[Case]:
    lite0 = demo_teacher(64 if quick else 576)
    if lite0.device.type == "cpu":
        return [Case(teacher=lite0, fit="native", num_images=8 if quick else 96)]
    nfnet = as_teacher(
        timm.create_model("dm_nfnet_f0" if quick else NFNET),
        name=NFNET,
        image_size=64 if quick else 576,
        device=lite0.device,
    )
    return [
        Case(teacher=lite0, fit="native", num_images=128 if quick else 4096),
        Case(teacher=nfnet, fit="stretch", num_images=128 if quick else 1536, compiled=True),
    ]


def lay_out(count: int, folder: Path) -> ImageSource:
    """Write photos as files, without classes."""
    (folder / "images").mkdir()
    for i, sample in enumerate(make_samples(count)):
        (folder / f"images/{i:06d}.jpg").write_bytes(sample["jpg"])
    return open_source(str(folder / "images"))


def ready_batches(case: Case, source: ImageSource) -> list[Tensor]:
    """Make the tensors that the teacher sees, normalised, on its device."""
    teacher, size = case.teacher, case.teacher.image_size
    count = case.num_images
    if teacher.device.type == "cuda":
        count = min(count, READY_BATCHES * case.batch_size)
    load = partial(load_inputs, source, teacher=teacher, fit=case.fit, sizes=[size])
    with ThreadPoolExecutor() as pool:
        pixels = [inputs[0].pixels for inputs in pool.map(load, source.samples[:count])]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    batches = []
    for start in range(0, count, case.batch_size):
        images = torch.from_numpy(np.stack(pixels[start : start + case.batch_size]))
        batch = (images.permute(0, 3, 1, 2) / 255 - mean) / std
        batches.append(batch.to(teacher.device).contiguous(memory_format=torch.channels_last))
    return batches


@torch.inference_mode()
def forward(model: Callable[[Tensor], Tensor], precision: str, batch: Tensor) -> None:
    in_bf16 = torch.autocast(batch.device.type, torch.bfloat16)
    with in_bf16 if precision == "bf16" else nullcontext():
        model(batch)


def batch_on_each_core(teacher: Teacher, batches: Sequence[Tensor]) -> None:
    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for _ in pool.map(partial(forward, teacher.model, teacher.precision), batches):
            pass


def batch_on_all_cores(teacher: Teacher, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        forward(teacher.model, teacher.precision, batch)


def on_gpu(
    model: Callable[[Tensor], Tensor], precision: str, batches: Sequence[Tensor], num_images: int
) -> None:
    turns = num_images // len(batches[0])
    for batch in itertools.islice(itertools.cycle(batches), turns):
        forward(model, precision, batch)
    torch.cuda.synchronize()


def run_job(case: Case, source: ImageSource, scratch: Path, teacher: Teacher) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        few = ImageSource(source.root, source.samples[: case.num_images], [], [])
        summary = generate(few, Path(out), teacher=teacher, fit=case.fit)
    assert summary.num_labelled == case.num_images, summary.quarantined


def jobs(case: Case, source: ImageSource, scratch: Path) -> dict[str, Callable[[], None]]:
    """Name what takes turns; the bare ways begin with "bare"."""
    teacher = case.teacher
    batches = ready_batches(case, source)
    job = partial(run_job, case, source, scratch)
    found: dict[str, Callable[[], None]] = {"generate": partial(job, teacher)}
    if teacher.device.type == "cpu":
        found["bare, a batch on each core"] = partial(batch_on_each_core, teacher, batches)
        found["bare, each batch on all cores"] = partial(batch_on_all_cores, teacher, batches)
        return found
    bare = partial(on_gpu, precision=teacher.precision, num_images=case.num_images)
    found["bare"] = partial(bare, teacher.model, batches=batches)
    if case.compiled:
        plain = [batch.contiguous() for batch in batches]
        found["bare, channels first"] = partial(bare, teacher.model, batches=plain)
        faster = compiled(teacher)
        found["bare, compiled"] = partial(bare, faster.model, batches=batches)
        found["generate, compiled"] = partial(job, faster)
    return found


def compiled(teacher: Teacher) -> Teacher:
    """Return the teacher with everything up to the features compiled, beside the one given."""
    model: Any = copy.copy(teacher.model)
    model.forward_features = torch.compile(teacher.model.forward_features)
    return replace(teacher, model=model)


def timed(case: Case, source: ImageSource, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Run the jobs in turn; the ratio of a round is to its fastest bare way."""
    found, teacher = jobs(case, source, scratch), case.teacher
    walls: dict[str, list[float]] = {name: [] for name in found}
    cpus: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1 + rounds):
        for name, job in found.items():
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    for secs in itertools.chain(walls.values(), cpus.values()):
        secs.pop(0)  # loads libraries, chooses algorithms, compiles
    bare = [name for name in found if name.startswith("bare")]
    best_wall = [min(walls[name][i] for name in bare) for i in range(rounds)]
    best_cpu = [min(cpus[name][i] for name in bare) for i in range(rounds)]
    return [
        {
            "teacher": f"{teacher.name} at {teacher.image_size}, {teacher.precision}",
            "job": name,
            "images_per_sec": case.num_images / statistics.median(walls[name]),
            "best_images_per_sec": case.num_images / min(walls[name]),
            "spread_secs": max(walls[name]) - min(walls[name]),
            "cpu_ms": 1e3 * statistics.median(cpus[name]) / case.num_images,
            "of_bare": statistics.median(a / b for a, b in zip(best_wall, walls[name])),
            "of_bare_cpu": statistics.median(a / b for a, b in zip(best_cpu, cpus[name])),
        }
        for name in found
    ]


def stages(case: Case, source: ImageSource) -> dict[str, Any]:
    """Milliseconds an image of each stage alone, of one thread."""
    found = measure(source, teacher=case.teacher, fit=case.fit)
    num_images = sum(wave.num_batches for wave in found.waves) * found.batch_size
    secs = {
        "reading": statistics.median(found.read_secs),
        "decoding and resizing": statistics.median(found.decode_secs),
        "teacher": sum(w.secs for w in found.waves) / num_images * max(1, found.teacher_cores),
        "encoding": statistics.median(found.encode_secs),
    }
    return {"stages of": case.teacher.name} | {name: 1e3 * value for name, value in secs.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = cases(quick)
        source = lay_out(max(case.num_images for case in every), folder)
        for case in every:
            rows += timed(case, source, folder, 1 if quick else 5)
            parts.append(stages(case, source))
    print(markdown(rows))
    print(markdown(parts))
    if not quick:
        sizes = {name: [getattr(c, name) for c in every] for name in ("num_images", "batch_size")}
        print(f"written to {write('generation', rows, stage_ms=parts, **sizes)}")


if __name__ == "__main__":
    main()
