"""What the loop keeps an eye on without holding up the device: health, speed, lost memory."""

import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from .distributed import Place, from_all, reduce

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20


class DivergedError(ValueError):
    """Training cannot go on: step after step is not finite."""


class Health:
    """Learns, a step late, whether steps were finite and whether a process was told to stop.

    A step late, so that the host never waits for the device's latest work; always by one step, so
    that all processes learn it at the same step and act alike.
    """

    def __init__(self, num_skipped: int) -> None:
        self.num_skipped = num_skipped
        self.stop_requested = False
        self._num_in_a_row = 0
        self._pending: deque[_Flags] = deque()

    def note(self, done: int, flags: Float[Tensor, "2"], keys: list[str]) -> None:
        """Take the flags (not finite, stop requested) of the step that made it `done` steps."""
        self._pending.append(_Flags(done, flags, keys))

    def look(self, place: Place, *, wait: bool) -> list[tuple[int, list[str]]]:
        """Read all flags but the latest, or all if `wait` or when it is time to stop.

        Returns:
            For each step that was skipped: how many steps were done after it, and the keys of its
            images on all processes.
        """
        skipped = []
        while len(self._pending) > (0 if wait or self.stop_requested else 1):
            flags = self._pending.popleft()
            is_bad, stop = flags.read()
            self.stop_requested |= stop
            self._num_in_a_row = self._num_in_a_row + 1 if is_bad else 0
            if is_bad:
                self.num_skipped += 1
                keys = [key for keys in from_all(place, flags.keys) for key in keys]
                log.warning(
                    "step %d skipped: its loss or gradient is not finite; images %s",
                    flags.done, ", ".join(keys[:8]) + (", …" if len(keys) > 8 else ""),
                )  # fmt: skip
                skipped.append((flags.done, keys))
            if self._num_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"the last {MAX_SKIPPED_IN_A_ROW} steps, up to step {flags.done}, had a loss "
                    "or gradient that is not finite. Look at the images named above; if they are "
                    "fine, start again with --init and the last checkpoint and with a lower "
                    "optim.lr, with optim.clip_grad=1, or with run.precision=fp32"
                )
        return skipped


class _Flags:
    """A step's flags on their way to the host."""

    def __init__(self, done: int, flags: Float[Tensor, "2"], keys: list[str]) -> None:
        self.done, self.keys = done, keys
        self._copy = flags.to("cpu", non_blocking=True)
        self._arrived = None
        if flags.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[bool, bool]:
        """Wait for the copy, then read it."""
        if self._arrived:
            self._arrived.synchronize()
        is_bad, stop = self._copy.tolist()
        return bool(is_bad), bool(stop)


class Window:
    """Means over the steps since the last line of metrics.jsonl, summed up on the device.

    Args:
        place: This process among all.
        names: Of the values of a step, in the order in which `add` gets them.
    """

    def __init__(
        self,
        place: Place,
        names: Sequence[str] = ("loss", "class_loss", "dense_loss", "grad_norm"),
    ) -> None:
        self._place = place
        self._names = tuple(names)
        self.restart()

    def restart(self) -> None:
        """Forget all steps; time begins now."""
        # the last one: number of finite steps
        size = len(self._names) + 1
        self._sums = torch.zeros(size, dtype=torch.float64, device=self._place.device)
        self._num_steps = 0
        self._waited_secs = 0.0
        self._begun = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for the feed."""
        begun = time.perf_counter()
        yield
        self._waited_secs += time.perf_counter() - begun

    def add(self, values: list[Tensor], bad: Float[Tensor, ""]) -> None:
        """Add a step's losses and gradient norm, unless it was skipped."""
        row = torch.stack([value.detach().double() for value in values] + [1 - bad.double()])
        self._sums += torch.where(bad.bool(), 0.0, row)
        self._num_steps += 1

    def close(self, batch_size: int) -> dict[str, float]:
        """Return the means and speeds, and restart."""
        sums = reduce(self._place, self._sums, "sum").tolist()
        secs = time.perf_counter() - self._begun
        values = {
            name: total / sums[-1] if sums[-1] else math.nan
            for name, total in zip(self._names, sums)
        }
        values["images_per_sec"] = self._num_steps * batch_size / secs
        values["data_wait"] = self._waited_secs / secs
        if self._place.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._place.device) / 1e9
        self.restart()
        return values


@contextmanager
def naming_bus_errors(describe: Callable[[], str]) -> Iterator[None]:
    """End the process with status 2 and one line where a mapped file cannot be read any more.

    Shards are read as mapped memory, by threads of DALI. Where a page of one is gone (the file was
    cut short, the disk or its server fails), the kernel sends SIGBUS, which no code can go on from.
    Python's own handlers wait for the main thread; the byte that each signal sends to the wake-up
    descriptor does not.

    Args:
        describe: Gives the line; called in another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main one may set handlers
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGBUS:
                end_of_bar = "\n" if sys.stderr.isatty() else ""
                os.write(sys.stderr.fileno(), f"{end_of_bar}{describe()}\n".encode())
                os._exit(2)  # the page is asked for again and again: nothing else can end here

    watcher = threading.Thread(target=wait, daemon=True, name="bus errors")
    fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGBUS, lambda number, frame: None)
    watcher.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGBUS, before or signal.SIG_DFL)
        signal.set_wakeup_fd(fd_before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def in_short(values: Mapping[str, float]) -> str:
    """Put a line of metrics.jsonl into the words of the progress line."""
    memory = f", {values['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in values else ""
    return (
        f"loss {values['loss']:.4g}, lr {values['lr']:.3g}, "
        f"{values['images_per_sec']:.4g} images/s, data wait {values['data_wait']:.0%}{memory}"
    )


def clock(secs: float) -> str:
    """Write a time as hours:minutes:seconds."""
    minutes, seconds = divmod(round(secs), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
