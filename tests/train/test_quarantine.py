"""Data of which a little is damaged: left out, told and written down, the same way however often the run is stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import DataConfig
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics
from tests.train.tiny_run import tiny_config, write_records, write_tiny_run

pytestmark = pytest.mark.usefixtures("promotion_as_usual")

GOOD = 792


def record(name: str, *parts, question: str = "what leaves?", answer: str = "a red square") -> dict:
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"id": name, "messages": [user, {"role": "assistant", "content": answer}]}


def video(name: str) -> dict:
    return {"type": "video", "video": name, "fps": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """800 records, one in a hundred damaged: eight kinds of damage, the one that only decoding shows first."""
    folder = tmp_path_factory.mktemp("damaged")
    write_tiny_run(folder, clip)
    whole = clip.read_bytes()
    at = whole.index(b"mdat") + 4
    damaged = {
        "scrambled.mp4": whole[: at + 200]
        + bytes(np.random.default_rng(0).integers(0, 256, 600, np.uint8))
        + whole[at + 800 :],
        "truncated.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
        "noise.mp4": np.random.default_rng(1).bytes(5000),
        "list.mp4": b"ffconcat version 1.0\nfile clip.mp4\n",
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (2, 900)).save(folder / "sliver.png")
    records = [record(name, video(name)) for name in damaged]
    records.append(record("sliver", {"type": "image", "image": "sliver.png"}))
    records.append(record("long", question="red " * 400))
    records.append({"id": "nobody", "messages": []})
    records += [record(f"good-{i}", video("clip.mp4"), question=f"when {i} ?") for i in range(GOOD)]
    write_records(folder / "data.jsonl", records)
    return folder


def run_config(folder, **data):
    config = tiny_config(folder)
    data = DataConfig(source=str(folder / "data.jsonl"), shuffle=False, **data)
    return dataclasses.replace(config, stages=(dataclasses.replace(config.stages[1], steps=6, data=data),))


def quarantine(out) -> list[dict]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train(run_config(folder), out)
    return out


def test_eight_kinds_of_damage(folder, undisturbed, capfd):
    """Seven are found before the first step, the eighth when it is decoded; each says where it stands and why."""
    found = {line["sample"].rpartition("(")[2].rstrip(")"): line for line in quarantine(undisturbed)}
    reasons = {
        "truncated.mp4": "is truncated",
        "empty.mp4": "empty",
        "noise.mp4": "noise.mp4",
        "list.mp4": "playlist",
        "sliver": "200",
        "long": "tokens, but a row has batch.length=160",
        "record 7": "expected .* at least one message",
        "scrambled.mp4": "scrambled.mp4",
    }
    assert set(found) == set(reasons)
    for name, reason in reasons.items():
        line = found[name]
        assert line["stage"] == "s1" and line["step"] == (1 if name == "scrambled.mp4" else 0)
        with pytest.raises(DataError, match=f"data.jsonl:[1-8].*{reason}"):
            raise DataError(line["reason"])
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert len(lines) == 6 and all(np.isfinite(line["loss"]) for line in lines)
    log = (undisturbed / "train.log").read_text()
    assert "s1: 7 of 800 samples are left out" in log and "step 1: left out, and written to" in log


@pytest.mark.slow
def test_stopped_and_continued(folder, undisturbed, tmp_path):
    """Stopped between checkpoints: the same batches, losses and list."""

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run_config(folder), tmp_path / "run", on_step=stop)
    train(run_config(folder, workers=1), tmp_path / "run")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == read_metrics(undisturbed / "metrics.jsonl")
    assert quarantine(tmp_path / "run") == quarantine(undisturbed)


def test_too_many_before_the_first_step(folder, tmp_path):
    with pytest.raises(DataError, match=r"stage s1: .*data\.jsonl:2: .*\(7 of 800 samples cannot be used.*allows 4;"):
        train(run_config(folder, max_failed=0.005), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"data\.max_failed=2 must be a share"):
        run_config(folder, max_failed=2)


@pytest.mark.slow
def test_too_many_in_the_middle(folder, tmp_path):
    """The run stops at the step that finds one too many, keeps what it had, and goes on where more is allowed."""
    config = run_config(folder, max_failed=7 / 800)
    with pytest.raises(DataError, match=r"stage s1, step 1: .*\(8 of 800 samples cannot be used"):
        train(config, tmp_path / "run")
    assert len(quarantine(tmp_path / "run")) == 8
    assert train(run_config(folder, max_failed=8 / 800), tmp_path / "run").step == 6


@pytest.mark.slow
def test_a_file_that_vanishes(folder, tmp_path):
    """Gone between the planning and its step."""
    clips = tmp_path / "data"
    clips.mkdir()
    for name in ("clip.mp4", "gone.mp4"):
        (clips / name).write_bytes((folder / "clip.mp4").read_bytes())
    records = [record(f"r{i}", video("clip.mp4")) for i in range(60)] + [record("late", video("gone.mp4"))]
    write_records(clips / "data.jsonl", records)
    config = run_config(folder, threads=0, prefetch=0)
    stage = dataclasses.replace(config.stages[0], steps=40)
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, source=str(clips / "data.jsonl")))
    removed = lambda line: (clips / "gone.mp4").unlink(missing_ok=True)  # noqa: E731, on_step takes a function
    train(dataclasses.replace(config, stages=(stage,)), tmp_path / "run", on_step=removed)
    (line,) = quarantine(tmp_path / "run")
    assert line["sample"].endswith("data.jsonl:61 (late)") and line["step"] > 1 and "gone.mp4" in line["reason"]
