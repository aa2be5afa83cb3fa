"""What a process sets up once, to compute on a CPU. docs/performance.md has numbers.

Memory: each layer's output is a block of megabytes. glibc maps a new one and unmaps it afterwards,
so that every page of it is cleared and entered anew: up to half of a forward pass.

Threads: those of torch's OpenMP spin for milliseconds while they wait for work, and DALI's, or
another job's, stand still meanwhile: on 2 shared cores a training step takes five times as long.
Threads that sleep at once take longer to wake up than many an operation takes.
"""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_SETTINGS = (
    # A thread's own arena holds no block above 64 MiB and is given back once it is empty.
    (_ARENA_MAX, 1),
    (_MMAP_MAX, 0),
    (_TRIM_THRESHOLD, 2**31 - 1),  # bytes free at the end before the system gets them
)
_SPINS = "10000"
"""A tenth of a millisecond and more, by the processor."""
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def wait_briefly() -> None:
    """Let OpenMP's threads spin briefly before they sleep; call it before torch is loaded.

    A user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stays as it is.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for OpenMPs other than GCC's
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, up to the end of this process; elsewhere do nothing.

    A user who has set up glibc's allocator by its own variables (MALLOC_…, GLIBC_TUNABLES) is left
    alone.

    Returns:
        Whether the allocator was told.
    """
    if is_set_up_by(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is None:
        return False
    return all([mallopt(parameter, value) == 1 for parameter, value in _SETTINGS])


def is_set_up_by(environment: Mapping[str, str]) -> bool:
    """Tell whether glibc's own variables say how memory is given out."""
    has_own = any(name.startswith("MALLOC_") for name in environment)
    return has_own or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")


def computes_on_cpu(device: str) -> bool:
    """Tell what --device means, without loading torch: auto is a CPU where no GPU's driver is."""
    return device == "cpu" or device == "auto" and not any(Path(f).exists() for f in _GPU_FILES)
