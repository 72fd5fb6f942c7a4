"""`timings.jsonl`: what steps took, what went into waiting, and what share of all the time stands."""

import json
import math
import time

import jax
import pytest

from qwenvl_jax.flops import Work
from qwenvl_jax.train import timings
from qwenvl_jax.train.timings import LastStep, TimingLog, first_start


class Device:
    """One that tells of itself, as a CPU does not."""

    device_kind, num_cores, process_index = "TPU v6 lite", 1, 0

    def __init__(self, used: int):
        self.used = used

    def memory_stats(self) -> dict:
        return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used, "num_allocs": 3}


@pytest.fixture
def clock(monkeypatch):
    """Moves both clocks on."""
    now = [1000.0]
    monkeypatch.setattr(timings.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timings.time, "time", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def lines(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_what_a_step_took(tmp_path, clock):
    path = tmp_path / "timings.jsonl"
    log = TimingLog(path, 0, started=first_start(tmp_path), devices=[Device(7), Device(9)])
    clock(60)  # compiling
    log.start()
    log.begin(1, Work(tokens=1000, vision_tokens=400), 918e12)
    clock(7)
    log.paused(7)
    clock(1.5)
    log.waited(1.5)
    log.begin(2, Work(tokens=500), 918e12)
    clock(0.5)
    line, timing = log.finish(1)
    # 2 s, of which 1.5 s for the next batch: 918 TFLOP in 2 s on two devices of 918 TFLOP/s.
    assert line == {
        "step": 1,
        "seconds": 2.0,
        "wait": 1.5,
        "tokens_per_second": 500.0,
        "vision_tokens_per_second": 200.0,
        "mfu": 0.25,
        "memory_bytes": 9,
        "peak_memory_bytes": 18,
        "goodput": round(0.5 / 69, 4),
    }
    assert (timing.seconds, timing.vision_tokens, timing.mfu) == (2.0, 400, 0.25)
    clock(4)
    log.waited(0.5, 1.5)
    line, timing = log.finish(2)
    assert (line["wait"], line["wait_for_others"], timing.wait) == (2.0, 1.5, 2.0)
    assert line["goodput"] == round(2.5 / 73, 4)
    log.close()
    assert [found["step"] for found in lines(path)] == [1, 2]


class Result:
    """What a step gives, before and after it is computed."""

    ready = False

    def is_ready(self) -> bool:
        return self.ready


def test_when_the_last_step_was_done():
    """The host goes on meanwhile, and hands over the next."""
    last, first, second = LastStep(), Result(), Result()
    assert last.done_at() == -math.inf
    last.begin(first)
    last.begin(second)
    before = time.monotonic()
    first.ready = True
    time.sleep(0.05)
    assert last.done_at() == math.inf
    second.ready = True
    while last.done_at() == math.inf:
        assert time.monotonic() < before + 30
        time.sleep(0.001)
    assert before + 0.05 <= last.done_at() <= time.monotonic()
    last.begin(Result())
    last.close()  # whether the step is done or not


def test_goodput_counts_restarts_and_no_step_that_is_taken_again(tmp_path, clock):
    path = tmp_path / "timings.jsonl"
    devices = jax.devices("cpu")[:1]
    log = TimingLog(path, 0, started=first_start(tmp_path), devices=devices)
    for step in range(1, 5):
        log.begin(step, Work(), 0.0)
        clock(1)
        log.finish(step)
    assert lines(path)[-1]["goodput"] == 1.0
    clock(6)  # killed, and started again from the checkpoint of step 2
    again = TimingLog(path, 2, started=first_start(tmp_path), devices=devices)
    again.begin(3, Work(), 0.0)
    clock(2)
    line, _ = again.finish(3)
    # Steps 1, 2 and 3 stand: 1 + 1 + 2 of 12 seconds.
    assert line["goodput"] == round(4 / 12, 4)
    assert [found["step"] for found in lines(path)] == [1, 2, 3]
    # A CPU has no peak and tells no memory.
    assert set(line) == {"step", "seconds", "wait", "tokens_per_second", "vision_tokens_per_second", "goodput"}
