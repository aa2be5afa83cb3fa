"""What the loop keeps an eye on without holding up the device: health, speed, the wish to stop."""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """Means over the steps since the last line of metrics.jsonl, summed up on the device."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.restart()

    def restart(self) -> None:
        """Forget all steps; time begins now."""
        # total, class and dense loss, gradient norm, number of finite steps
        self._sums = torch.zeros(5, dtype=torch.float64, device=self._place.device)
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
        names = ("loss", "class_loss", "dense_loss", "grad_norm")
        values = {
            name: total / sums[-1] if sums[-1] else math.nan for name, total in zip(names, sums)
        }
        values["images_per_sec"] = self._num_steps * batch_size / secs
        values["data_wait"] = self._waited_secs / secs
        if self._place.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._place.device) / 1e9
        self.restart()
        return values


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag, once; a second one acts as it always does."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _on_signal(self, _number: int, _frame: object) -> None:
        # Nothing is logged here: the signal may have come in the middle of writing to stderr.
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
