"""Steps that must not change the weights: left out, told with their samples, and too many of them end the run."""

import dataclasses
import json

import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.models.pretrained import load
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.train.config import GuardConfig
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics
from tests.train.tiny_run import tiny_config, write_tiny_run

pytestmark = pytest.mark.usefixtures("promotion_as_usual")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("guarded")
    write_tiny_run(folder, clip)
    return folder


def config_with(folder, guard: GuardConfig, **changes):
    """The second stage of the tiny run alone: five steps for everything."""
    config = tiny_config(folder)
    return dataclasses.replace(config, stages=(dataclasses.replace(config.stages[1], guard=guard),), **changes)


def test_steps_beyond_a_bound_are_left_out_and_named(folder, tmp_path):
    """A bound that the losses of the first steps exceed, and those of later steps would not."""
    free = train(config_with(folder, GuardConfig()), tmp_path / "free")
    losses = [line["loss"] for line in read_metrics(free.out / "metrics.jsonl")]
    bound = sorted(losses)[2]
    out = tmp_path / "bounded"
    train(config_with(folder, GuardConfig(max_loss=bound)), out)
    lines = read_metrics(out / "metrics.jsonl")
    first = next(number for number, loss in enumerate(losses) if loss > bound)
    assert [line.get("skipped") for line in lines[: first + 1]] == [None] * first + [1]
    assert lines[first]["loss"] == losses[first]
    told = [line for line in (out / "train.log").read_text().splitlines() if f" step {first + 1}: left out" in line]
    assert len(told) == 1 and "its samples: " in told[0]
    ids = [json.loads(line)["id"] for line in (folder / "data.jsonl").read_text().splitlines()]
    places = {f"{folder / 'data.jsonl'}:{number + 1} ({name})" for number, name in enumerate(ids)}
    assert set(told[0].split("its samples: ")[1].split(", ")) <= places


def test_a_run_that_left_out_too_many_steps_goes_on_with_a_higher_bound(folder, tmp_path):
    """No step is taken, so the second is one too many; the same folder takes more of them, and no other bound."""
    guard, out = GuardConfig(max_loss=1e-9, abort_after=1), tmp_path / "out"
    told = r"2 steps were left out, more than guard\.abort_after=1 .* Raise guard\.abort_after to go on in this folder"
    with pytest.raises(DataError, match=told):
        train(config_with(folder, guard, checkpoint_every=1), out)
    with pytest.raises(ConfigError, match=r"holds a run with stages\.0\.guard\.max_loss=1e-09"):
        train(config_with(folder, GuardConfig(abort_after=5), checkpoint_every=1), out)
    assert train(config_with(folder, dataclasses.replace(guard, abort_after=5), checkpoint_every=1), out).step == 5
    assert [line["skipped"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert "continuing after step 1 of 5" in (out / "train.log").read_text()


@pytest.mark.slow
def test_weights_that_are_not_finite_end_the_run(folder, tmp_path):
    """NaN in the first weights: no step can be taken, and after three the run says so."""
    config = config_with(folder, GuardConfig(abort_after=2), checkpoint_every=1)
    first = train(dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], steps=1),)), tmp_path / "a")
    model: QwenVL = load(first.model, dtype="float32")
    table = model.text.embed.table
    table.set_value(table.get_value().at[0].set(np.nan))
    model.save_pretrained(first.model)
    out = tmp_path / "b"
    with pytest.raises(DataError, match=r"step 3: 3 steps were left out, more than guard.abort_after=2 \(loss None"):
        train(dataclasses.replace(config, init=str(first.model)), out)
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [1, 2, 3] and all(line["loss"] is None for line in lines)
