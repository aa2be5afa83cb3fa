"""The first SIGTERM or Ctrl-C is a wish; one that comes later acts."""

import signal

import pytest

from tokenlabel.labeler import interrupt
from tokenlabel.labeler.interrupt import StopRequest


@pytest.fixture
def clock(monkeypatch):
    """Seconds that StopRequest reads, for the test to set."""
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    return now


def test_a_signal_that_comes_twice_at_once_is_one_wish(clock):
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested


@pytest.fixture
def ctrl_c_raises():
    """As in a terminal; a job in the background is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_later_signal_acts_as_it_always_does(clock, ctrl_c_raises):
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        clock[0] += 10
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_those_from_before_in_the_end():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
