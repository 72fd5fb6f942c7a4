"""What a run shows: a bar in a terminal, plain lines elsewhere, and a log of what it said."""

import io

from qwenvl_jax.train import progress as progress_module
from qwenvl_jax.train.progress import Progress
from qwenvl_jax.train.timings import Timing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(step: int) -> dict:
    return {"step": step, "loss": 1.25, "tokens": 100, "stage": "s0"}


def test_plain_lines_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream, log = io.StringIO(), io.StringIO()
    with Progress(100, 0, log, stream) as progress:
        progress.say("starting")
        for step in range(1, 31):
            now[0] += 1.0
            progress.update(line(step))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "starting",
        "s0 step 1/100  loss 1.2500  100 tokens/s  1:39 left",
        "s0 step 11/100  loss 1.2500  100 tokens/s  1:29 left",
        "s0 step 21/100  loss 1.2500  100 tokens/s  1:19 left",
    ]
    assert log.getvalue().endswith(" starting\n")


def test_speed_counts_neither_compiling_nor_an_earlier_process(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(7250, 0, None, stream) as progress:
        progress.resume(40)
        now[0] = 1000.0
        progress.start_clock()
        now[0] = 1005.0
        progress.update(line(50))
    assert stream.getvalue() == "s0 step 50/7250  loss 1.2500  20 tokens/s  1:00:00 left\n"


def test_waits_are_shown_together_and_known_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(10, 0, None, stream) as progress:
        progress.waited(50.0)  # for the first batch, before the clock is started
        progress.start_clock()
        now[0] = 10.0
        progress.waited(2.0, 1.0)
        progress.update(line(1))
        assert progress.wait_shares == (0.2, 0.1)
    assert stream.getvalue().endswith("left  waits for data 30%\n")


def test_bar_in_a_terminal():
    stream = Terminal()
    with Progress(10, 0, None, stream) as progress:
        progress.say("[starting]")
        progress.update(line(3))
    shown = stream.getvalue()
    assert "[starting]" in shown
    assert "s0 3/10" in shown
    assert "loss 1.2500" in shown


def test_vision_tokens_and_use_of_the_devices(monkeypatch):
    """Means since the clock was started; MFU only where it is known."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(10, 0, None, stream) as progress:
        progress.update(line(1), Timing(1.0, 0.0, 100, 0, None))
        now[0] = 20.0
        progress.update(line(2), Timing(5.0, 0.0, 100, 600, 0.6))
        now[0] = 75.0
        progress.paused(35.0)  # for a validation
        progress.update(line(3) | {"loss": None}, Timing(5.0, 0.0, 100, 0, 0.6))
    assert "MFU" not in stream.getvalue().splitlines()[0] and "vision" not in stream.getvalue().splitlines()[0]
    assert stream.getvalue().splitlines()[2] == (
        "s0 step 3/10  loss none  8 tokens/s (15 vision)  MFU 15.0%  1:33 left"
    )
