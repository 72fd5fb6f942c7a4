"""`metrics.jsonl`: whole lines, each step once."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.data.classes import SampleClass
from qwenvl_jax.train.config import OptimizerConfig, StageConfig
from qwenvl_jax.train.metrics import MetricsLog, learning_rates, read_metrics
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


def test_losses_told_apart(tmp_path):
    """The mean over the tokens of a data set, whatever it shows, and of a modality, whichever set it is of."""
    classes = [SampleClass("notes", "text"), SampleClass("notes", "image"), SampleClass("clips", "video")]
    classes.append(SampleClass("rare", "text"))
    sums = {
        "loss": jnp.array([2, 6, 5, 0], jnp.float32),
        "weight": jnp.array([4, 8, 2, 0], jnp.float32),
        "router_balance": jnp.float32(1.5),
        "router_z": jnp.float32(0.25),
        # Of 8 choices a layer over two experts: 6 and 2, 4 and 4.
        "experts": jnp.array([[6, 2], [4, 4]], jnp.float32),
    }
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.push(line(1), StepOutput(jnp.float32(1), jnp.float32(1), jnp.int32(0), sums), classes)
    found = log.flush()
    assert found["loss_by_data"] == {"notes": 8 / 12, "clips": 2.5}  # nothing of "rare" in this batch
    assert found["loss_by_modality"] == {"text": 0.5, "image": 0.75, "video": 2.5}
    assert (found["router_balance"], found["router_z"]) == (1.5, 0.25)
    assert found["experts"] == [1.25, 0.75]
    log.close()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.usefixtures("promotion_as_usual")
def test_learning_rates(schedule):
    optimizer = OptimizerConfig(learning_rate=0.5, warmup_steps=2, schedule=schedule)
    rates = learning_rates(StageConfig(name="s", steps=6, optimizer=optimizer))
    assert rates.shape == (6,) and rates.dtype == np.float32
    assert rates[0] < rates[1] < rates[2] == 0.5
    assert (rates[5] < 0.5) == (schedule == "cosine")
