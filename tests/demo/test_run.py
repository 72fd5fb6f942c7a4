"""The whole demo, as small as it gets: every step runs, tells what it missed, and goes on when it is run again."""

import dataclasses
import json

import pytest

from qwenvl_jax.demo import curriculum, run, weights_card
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.train.config import MeshConfig
from tests.demo.test_heldout import tiny_config


@pytest.fixture
def small(monkeypatch):
    """Two steps a stage of a model of a few thousand weights, a few clips and questions, one device."""
    steps = dict.fromkeys(curriculum.QUICK_STEPS, 2)
    monkeypatch.setattr(curriculum, "QUICK_STEPS", steps)
    monkeypatch.setattr(curriculum, "FULL_STEPS", steps)
    monkeypatch.setattr(curriculum, "train_clips", lambda full: 16)
    monkeypatch.setattr(curriculum, "tiny_config", tiny_config)
    whole = curriculum.run_config
    alone = MeshConfig(fsdp=1)
    monkeypatch.setattr(curriculum, "run_config", lambda *args: dataclasses.replace(whole(*args), mesh=alone))
    monkeypatch.setattr(run, "QUESTIONS", 5)
    monkeypatch.setattr(run, "BLANK_QUESTIONS", 8)
    monkeypatch.setattr(run, "VALIDATION_CLIPS", 3)


def test_a_missing_shipped_model_is_told_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="demo --full"):
        run.demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_does_not_exist_is_told_before_anything_is_made(seed, tmp_path):
    with pytest.raises(ConfigError, match=f"seed={seed} must be from 0 to 4294967295"):
        run.demo(tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_runs_from_clips_to_report(small, monkeypatch, tmp_path, capsys, optax_promotes):
    assert run.demo(tmp_path / "full", full=True, seed=1) == run.MISSED
    said = capsys.readouterr().out
    assert "missed   starts within 0.5 s" in said and "5 of 5 answers are the same" in said
    model = tmp_path / "full" / "train" / "model"
    assert weights_card.read(model)["command"] == "qwenvl-jax demo --full --seed 1"

    # The model that the full run made is the one that the short one ships with, and judges.
    monkeypatch.setattr(run, "SHIPPED", model)
    assert run.demo(tmp_path / "quick") == run.MISSED
    page = (tmp_path / "quick" / "report.html").read_text(encoding="utf-8")
    for part in ("shipped model", "fresh model", "pixels blanked", "chance", "demo --full --seed 1", "Wrong (5)"):
        assert part in page
    made = json.loads((tmp_path / "quick" / "figures.json").read_text(encoding="utf-8"))
    assert set(made["held_out_loss"]) == set(curriculum.ABOUT)
    assert made["figures"]["shipped model"]["count"] == 5
    exported = {path.name for path in (tmp_path / "quick" / "export").iterdir()}
    assert exported >= {"config.json", "model.safetensors", "tokenizer.json", "video_preprocessor_config.json"}

    steps = (tmp_path / "quick" / "train" / "metrics.jsonl").read_text()
    assert run.demo(tmp_path / "quick") == run.MISSED
    assert (tmp_path / "quick" / "train" / "metrics.jsonl").read_text() == steps
