"""Training on pooled videos: one program for all steps, settings that change what is learnt, and a run that goes on."""

import dataclasses
import signal

import jax
import pytest

from qwenvl_jax.data.mixture import VideoBudget
from qwenvl_jax.errors import DataError
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics
from tests.train.test_resume import check_equal
from tests.train.tiny_run import command_line, killed, tiny_config, write_tiny_run

pytestmark = pytest.mark.usefixtures("promotion_as_usual")


@pytest.fixture(scope="module")
def config(tmp_path_factory, clip):
    """The file of a run over a clip, whose frames have 2 x 3 merged tokens, and text."""
    return write_tiny_run(tmp_path_factory.mktemp("run"), clip)


def pooled(folder, taps: int = 4, steps: int = 4, **budget):
    """One stage over everything, its videos with this budget."""
    config = tiny_config(folder)
    (_, stage) = config.stages
    data = dataclasses.replace(stage.data, video_budget=VideoBudget(**budget))
    stage = dataclasses.replace(
        stage, steps=steps, data=data, batch=dataclasses.replace(stage.batch, pool_taps=taps, rows=1)
    )
    return dataclasses.replace(config, stages=(stage,), checkpoint_every=100)


@pytest.mark.slow
def test_a_run_over_pooled_videos(config, tmp_path, caplog):
    """Steps with pooled videos and steps of text alone share one program, and what is seen is learnt."""
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(pooled(config.parent, pool=2, steps=8), tmp_path / "out")
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert sum("jit(step)" in message for message in compiled) == 1
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_how_videos_are_pooled_changes_the_run(config, tmp_path):
    """Batches, and losses from the first step on."""
    first = {}
    for name, budget in (("whole", {}), ("by 2", {"pool": 2}), ("mean", {"pool": 2, "pool_method": "mean"})):
        train(pooled(config.parent, steps=1, **budget), tmp_path / name)
        (first[name],) = read_metrics(tmp_path / name / "metrics.jsonl")
    assert first["by 2"]["tokens"] == first["mean"]["tokens"]
    assert len({line["batch"] for line in first.values()}) == len({line["loss"] for line in first.values()}) == 3


def test_pooled_data_wants_room_in_the_batch(config, tmp_path):
    with pytest.raises(DataError, match=r"pooled from 9 merged tokens to one, but batch\.pool_taps=4"):
        train(pooled(config.parent, pool=3, pool_method="mean"), tmp_path / "out")


@pytest.mark.slow
def test_killed_and_continued(config):
    settings = ("--data.video_budget.pool", 2, "--batch.pool_taps", 4)
    whole, out = config.parent / "whole", config.parent / "killed"
    done = command_line("train", config, "--out", whole, *settings)
    assert done.returncode == 0, done.stderr
    dead = killed("SIGKILL:step:5", config, out, *settings)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    done = command_line("train", config, "--out", out, *settings)
    assert done.returncode == 0, done.stderr
    assert "continuing after step " in done.stderr
    check_equal(out, whole)
