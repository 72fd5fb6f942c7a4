"""Signals that stop a run in this process."""

import os
import signal
import time

import pytest

from qwenvl_jax.train import stopping
from qwenvl_jax.train.processes import Processes
from qwenvl_jax.train.stopping import stop_signals


@pytest.fixture
def others():
    """Hears the signals that nobody of ours listens to."""
    heard = []
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


def stops(stop) -> bool:
    """Whether it is asked to stop, soon."""
    end = time.monotonic() + 10
    while not stop.here() and time.monotonic() < end:
        time.sleep(0.01)
    return stop.here()


def test_sigterm_twice_at_once_is_one_wish(others):
    """As from a launcher that passes on what its whole group was sent."""
    with stop_signals(Processes(0, 1)) as stop:
        assert not stop.here()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stops(stop) and others == []


@pytest.mark.parametrize(("seconds", "second"), [(0.0, signal.SIGTERM), (5.0, signal.SIGINT)])
def test_a_second_signal_acts_as_if_nobody_listened(others, monkeypatch, seconds, second):
    """SIGTERM after a while, Ctrl-C at once."""
    monkeypatch.setattr(stopping, "_ONE_WISH_SECONDS", seconds)
    with stop_signals(Processes(0, 1)) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert others == []
        os.kill(os.getpid(), second)
        assert stops(stop) and others == [second]
