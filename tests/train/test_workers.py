"""A run whose workers are killed under it is the run that was left alone, and its waits are on record."""

import dataclasses
import json
import multiprocessing
import os
import signal

import pytest

from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics
from tests.train.tiny_run import tiny_config, write_tiny_run

pytestmark = pytest.mark.usefixtures("promotion_as_usual")

STEPS = 14


def workers() -> list:
    return [process for process in multiprocessing.active_children() if "prefetch" in process.name]


@pytest.mark.slow
def test_a_worker_killed_under_a_run(tmp_path, clip):
    """Long before its last batch is made: it makes few ahead."""
    write_tiny_run(tmp_path, clip)
    config = tiny_config(tmp_path)

    def run(name: str, on_step=None, **data) -> list[dict]:
        stage = dataclasses.replace(config.stages[1], steps=STEPS)
        stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, prefetch=1, **data))
        train(dataclasses.replace(config, stages=(stage,)), tmp_path / name, on_step=on_step)
        return read_metrics(tmp_path / name / "metrics.jsonl")

    def kill(line) -> None:
        if line["step"] == 2:
            os.kill(workers()[0].pid, signal.SIGKILL)

    assert run("killed", on_step=kill, workers=1) == run("whole")
    assert not workers()
    log = (tmp_path / "killed" / "train.log").read_text()
    assert log.count("was killed by SIGKILL") == 1
    timings = [json.loads(line) for line in (tmp_path / "killed" / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == list(range(1, STEPS + 1))
    # The workers' start is a wait, and is among the seconds of its step.
    assert all(0 <= line["wait"] <= line.get("seconds", line["wait"]) for line in timings)
