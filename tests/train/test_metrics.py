"""`metrics.jsonl`: whole lines, each step once."""

import jax.numpy as jnp
import pytest

from qwenvl_jax.train.metrics import MetricsLog, read_metrics
from qwenvl_jax.train.step import StepOutput


def line(step: int) -> dict:
    return {"step": step, "tokens": 10 * step, "batch": f"hash {step}", "stage": "s0"}


def output(loss: float, skipped: int = 0) -> StepOutput:
    return StepOutput(jnp.float32(loss), jnp.float32(2.0), jnp.int32(skipped), {})


def write(path, steps, done=0):
    log = MetricsLog(path, done)
    for step in steps:
        log.push(line(step), output(step / 3))
    log.flush()
    log.close()


def test_lines(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, range(1, 4))
    lines = read_metrics(path)
    assert list(lines[0]) == ["step", "loss", "tokens", "batch", "stage", "grad_norm"]
    assert [found["step"] for found in lines] == [1, 2, 3]
    # Losses are written with all their bits.
    assert [jnp.float32(found["loss"]) for found in lines] == [jnp.float32(step / 3) for step in (1, 2, 3)]


def test_a_line_is_written_when_the_next_step_is_given(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    assert log.push(line(1), output(0.5)) is None
    assert read_metrics(path) == []
    assert log.push(line(2), output(0.25))["loss"] == 0.5
    assert [found["step"] for found in read_metrics(path)] == [1]
    log.sync()
    assert [found["step"] for found in read_metrics(path)] == [1, 2]
    log.close()


def test_a_step_that_was_left_out_says_so_in_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.push(line(1), output(float("nan"), skipped=3))
    log.flush()
    log.close()
    assert "NaN" not in path.read_text()
    (found,) = read_metrics(path)
    assert found["loss"] is None and found["skipped"] == 3


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6}', "null\n"])
@pytest.mark.parametrize("done", [0, 2, 5])
def test_what_lies_behind_the_checkpoint_is_cut_off(tmp_path, tail, done):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    with path.open("a") as file:
        file.write(tail)
    write(path, range(done + 1, 8), done)
    assert [found["step"] for found in read_metrics(path)] == list(range(1, 8))
