"""The wish that a long job should stop, which SIGTERM and Ctrl-C bring."""

import signal
import threading
import time
from types import TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_WISH_SECS = 2.0
"""Schedulers signal all processes and torchrun passes signals on: the same wish comes twice."""


class StopRequest:
    """Holds back the first SIGTERM or Ctrl-C; one that comes later acts as it always does.

    A context manager that takes over both signals while it is open. In other threads than the main
    one, which Python never tells about signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the job was told to stop."""
        self._requested_secs = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._let_go()

    def _note(self, number: int, frame: object) -> None:
        # No word is logged here: the signal may have come in the middle of writing one.
        if not self.requested:
            self.requested, self._requested_secs = True, time.monotonic()
        elif time.monotonic() - self._requested_secs > _ONE_WISH_SECS:
            self._let_go()
            signal.raise_signal(number)

    def _let_go(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())
