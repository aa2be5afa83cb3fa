"""Claim: tl-label generate is nearly as fast as its teacher alone.

    python benchmarks/generation.py            three minutes on two cores
    python benchmarks/generation.py --quick    a smoke test: few photos, one round

The job behind tl-label generate, from JPEG files of 500×375 (60 KB) to finished label shards,
against a forward pass of the same teacher on the same batches, whose pixels lie ready in memory:

    dense    what the job has to compute: uint8 pixels in, logits of every cell out
    model    the model as it comes: normalised pixels in, one answer an image out

The job reads, decodes and resizes besides, keeps the best classes, encodes, hashes and writes. All
take turns, several rounds, and each round is compared with the fastest way of its own. Ratios are
of CPU time on a CPU, where others on the machine disturb it less, and of wall time on a GPU.

On a CPU: EfficientNet-Lite0 at 576, fit native. A batch on each core, as the job has it; the model
also with each batch on all cores, as torch does it by itself. How long each stage takes alone, as
tl-label plan measures it, is written beside.

On a GPU: the same, and NFNet-F6 at 576 with random weights in bf16, fit stretch; its model also
compiled, and plain (channels first).
"""

import argparse
import copy
import itertools
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

from tokenlabel.labeler.cpu import computes_on_cpu, keep_freed_memory, wait_briefly

wait_briefly()  # as the commands do, before torch is loaded

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
    """Make the batches that the teacher is given, on its device."""
    teacher, size = case.teacher, case.teacher.image_size
    count = case.num_images
    if teacher.device.type == "cuda":
        count = min(count, READY_BATCHES * case.batch_size)
    load = partial(load_inputs, source, teacher=teacher, fit=case.fit, sizes=[size])
    with ThreadPoolExecutor() as pool:
        pixels = [inputs[0].pixels for inputs in pool.map(load, source.samples[:count])]
    stacks = [np.stack(pixels[i : i + case.batch_size]) for i in range(0, count, case.batch_size)]
    return [torch.from_numpy(stack).permute(0, 3, 1, 2).to(teacher.device) for stack in stacks]


def normalised(teacher: Teacher, batch: Tensor) -> Tensor:
    """Make what the model itself is given."""
    mean, std = (
        torch.tensor(value, device=batch.device).view(3, 1, 1)
        for value in (teacher.mean, teacher.std)
    )
    return ((batch / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


Forward = Callable[[Tensor], object]


def alone(teacher: Teacher, model: Forward) -> Forward:
    """Return the model as a function of normalised pixels, in the teacher's precision."""

    @torch.inference_mode()
    def forward(batch: Tensor) -> object:
        in_bf16 = torch.autocast(batch.device.type, torch.bfloat16)
        with in_bf16 if teacher.precision == "bf16" else nullcontext():
            return model(batch)

    return forward


def batch_on_each_core(forward: Forward, batches: Sequence[Tensor]) -> None:
    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for _ in pool.map(forward, batches):
            pass


def batch_on_all_cores(forward: Forward, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        forward(batch)


def on_gpu(forward: Forward, batches: Sequence[Tensor], num_images: int) -> None:
    for batch in itertools.islice(itertools.cycle(batches), num_images // len(batches[0])):
        forward(batch)
    torch.cuda.synchronize()


def run_job(case: Case, source: ImageSource, scratch: Path, teacher: Teacher) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        few = ImageSource(source.root, source.samples[: case.num_images], [], [])
        summary = generate(few, Path(out), teacher=teacher, fit=case.fit)
    assert summary.num_labelled == case.num_images, summary.quarantined


def jobs(case: Case, source: ImageSource, scratch: Path) -> dict[str, Callable[[], None]]:
    """Name what takes turns: generate, dense and model, each perhaps in several ways."""
    teacher = case.teacher
    pixels = ready_batches(case, source)
    ready = [normalised(teacher, batch) for batch in pixels]
    model = alone(teacher, teacher.model)
    job = partial(run_job, case, source, scratch)
    if teacher.device.type == "cpu":
        return {
            "generate": partial(job, teacher),
            "dense, a batch on each core": partial(batch_on_each_core, teacher.dense, pixels),
            "model, a batch on each core": partial(batch_on_each_core, model, ready),
            "model, each batch on all cores": partial(batch_on_all_cores, model, ready),
        }
    run = partial(on_gpu, num_images=case.num_images)
    found: dict[str, Callable[[], None]] = {
        "generate": partial(job, teacher),
        "dense": partial(run, teacher.dense, pixels),
        "model": partial(run, model, ready),
    }
    if case.compiled:
        faster = compiled(teacher)
        plain = [batch.contiguous() for batch in ready]
        found["model, channels first"] = partial(run, model, plain)
        found["model, compiled"] = partial(run, alone(teacher, faster.model), ready)
        found["dense, compiled"] = partial(run, faster.dense, pixels)
        found["generate, compiled"] = partial(job, faster)
    return found


def compiled(teacher: Teacher) -> Teacher:
    """Return the teacher with everything up to the features compiled, beside the one given."""
    model: Any = copy.copy(teacher.model)
    model.forward_features = torch.compile(model.forward_features)
    return replace(teacher, model=model)


def timed(case: Case, source: ImageSource, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Run the jobs in turn, and compare the rounds."""
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
    clock = cpus if teacher.device.type == "cpu" else walls

    def ratio(name: str, to: str) -> float:
        best = [min(secs) for secs in zip(*(clock[n] for n in found if n.startswith(to)))]
        return statistics.median(a / b for a, b in zip(best, clock[name]))

    return [
        {
            "teacher": f"{teacher.name} at {teacher.image_size}, {teacher.precision}",
            "job": name,
            "images_per_sec": case.num_images / statistics.median(walls[name]),
            "spread_secs": max(walls[name]) - min(walls[name]),
            "cpu_ms": 1e3 * statistics.median(cpus[name]) / case.num_images,
            "of_dense": ratio(name, "dense"),
            "of_model": ratio(name, "model"),
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
    if computes_on_cpu("auto"):
        keep_freed_memory()  # as the commands do, for all jobs alike
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
