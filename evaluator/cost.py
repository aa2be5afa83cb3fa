"""What a model costs: parameters, operations, time and memory of a forward pass.

Counted and timed as timm's benchmark does it: random pixels, nothing read from a disk.
"""

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..trainer.evaluate import Precision
from .models import EvalModel

_WARM_UP = 2
_MIN_BATCHES = 3
_MIN_SECS = 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a forward pass; docs/evaluation.md says what is counted."""

    num_parameters: int
    """The dense head's included."""
    macs: int
    """Multiply-adds of matrix products and convolutions, of one image."""
    flops: int
    """Floating-point operations of these: two for each multiply-add."""
    images_per_sec: float
    """Of this process's device, the images already there."""
    batch_size: int
    image_size: tuple[int, int]
    """Height and width in pixels."""
    precision: Precision
    device: str
    """Name of the GPU, or "CPU"."""
    num_threads: int | None
    """Of torch on a CPU; None on a GPU."""
    peak_memory_bytes: int
    """On a GPU what torch held at most, weights included; on a CPU the whole process."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        return asdict(self)


def measure_cost(
    loaded: EvalModel,
    *,
    device: torch.device,
    batch_size: int,
    precision: Precision = "fp32",
    min_secs: int | float = _MIN_SECS,
) -> Cost:
    """Count and time the model's own answer to random images.

    Args:
        loaded: Is moved to the device and put into evaluation mode.
        device: Where to run.
        batch_size: Images at a time.
        precision: Arithmetic.
        min_secs: How long to time at least.
    """
    model = loaded.model.eval().to(device)
    images = torch.randn(batch_size, 3, *loaded.view.image_size, device=device)
    flops = count_flops(model, images[:1])
    with _peak_memory(device) as peak_bytes:
        images_per_sec = _throughput(model, images, precision, min_secs)
    is_gpu = device.type == "cuda"
    return Cost(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=flops // 2,
        flops=flops,
        images_per_sec=images_per_sec,
        batch_size=batch_size,
        image_size=loaded.view.image_size,
        precision=precision,
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        num_threads=None if is_gpu else torch.get_num_threads(),
        peak_memory_bytes=peak_bytes[0],
    )


@torch.no_grad()
def count_flops(model: nn.Module, images: Float32[Tensor, "b 3 h w"]) -> int:
    """Count the floating-point operations of matrix products and convolutions, two a multiply-add.

    What is done to each value by itself, norms, activations, softmax, is not counted; papers and
    timm do not count it either.
    """
    counter = FlopCounterMode(display=False)
    # Fused attention is not known to the counter on every device; its parts are.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops()


@torch.no_grad()
def _throughput(
    model: nn.Module,
    images: Float32[Tensor, "b 3 h w"],
    precision: Precision,
    min_secs: int | float,
) -> float:
    """Return images a second."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(_WARM_UP):
            model(images)
        _wait(images.device)
        start, num_batches = time.perf_counter(), 0
        while num_batches < _MIN_BATCHES or time.perf_counter() - start < min_secs:
            model(images)
            _wait(images.device)
            num_batches += 1
    return num_batches * len(images) / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Put into the list, at the end, how much memory was held at most meanwhile, bytes."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    with contextlib.suppress(OSError):  # where the kernel does not let it be reset, since the start
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    peak.append(_peak_of_process())


def _peak_of_process() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
