"""Every bad input ends in one line that names the thing and the remedy, with status 2, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qwenvl_jax import cli


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tiny_checkpoint, place):
    """A copy of a good model folder, free to damage."""
    return shutil.copytree(tiny_checkpoint, place / "model")


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _refused(arguments, capsys, *words: str) -> str:
    """Runs the command in the current folder and checks how it ends; returns the line."""
    before = _snapshot(Path.cwd())
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert err.startswith("qwenvl-jax: error: ") and err.count("\n") == 1 and len(err) < 500, err
    for word in words:
        assert word in err, err
    assert _snapshot(Path.cwd()) == before
    return err


def _missing(place, clip, run_ffmpeg):
    return place / "bad.mp4"


def _empty(place, clip, run_ffmpeg):
    (place / "bad.mp4").touch()
    return place / "bad.mp4"


def _folder(place, clip, run_ffmpeg):
    (place / "bad.mp4").mkdir()
    return place / "bad.mp4"


def _random(place, clip, run_ffmpeg):
    (place / "bad.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    return place / "bad.mp4"


def _cut(place, clip, run_ffmpeg):
    """The index stands at the end of the file, and is lost."""
    (place / "bad.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    return place / "bad.mp4"


def _cut_behind_its_index(place, clip, run_ffmpeg):
    """The index stands first and promises frames that are lost."""
    run_ffmpeg("-i", clip, "-c", "copy", "-movflags", "+faststart", place / "whole.mp4")
    whole = (place / "whole.mp4").read_bytes()
    (place / "bad.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    return place / "bad.mp4"


def _audio_only(place, clip, run_ffmpeg):
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=1", place / "bad.mp4")
    return place / "bad.mp4"


def _playlist(place, clip, run_ffmpeg):
    """Plain ffmpeg would read the other file."""
    shutil.copy(clip, place / "other.mp4")
    (place / "bad.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    return place / "bad.mp4"


def _without_times(place, clip, run_ffmpeg):
    """A bare H.264 stream holds frames and no times."""
    run_ffmpeg("-i", clip, "-c:v", "copy", "-bsf:v", "h264_mp4toannexb", "-f", "h264", place / "bad.mp4")
    return place / "bad.mp4"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_missing, ["does not exist"]),
        (_empty, ["empty"]),
        (_folder, []),
        (_random, ["not a video", "; "]),
        (_cut, ["truncated"]),
        (_cut_behind_its_index, ["truncated"]),
        (_audio_only, ["no video stream"]),
        (_playlist, ["playlist"]),
        (_without_times, ["times"]),
    ],
)
def test_video(make, words, model, place, clip, run_ffmpeg, capsys):
    file = make(place, clip, run_ffmpeg)
    line = _refused(["chat", model, "--video", file, "What happens?"], capsys, str(file), *words)
    assert ";" in line


@pytest.mark.parametrize("kind", ["missing", "empty", "random", "text", "cut", "folder", "strip"])
def test_image(kind, model, place, capsys):
    file = place / "bad.png"
    if kind == "empty":
        file.touch()
    elif kind == "random":
        file.write_bytes(np.random.default_rng(0).bytes(5_000))
    elif kind == "text":
        file.write_text("no picture")
    elif kind == "cut":
        Image.effect_noise((200, 200), 60).save(file)
        file.write_bytes(file.read_bytes()[:4_000])
    elif kind == "folder":
        file.mkdir()
    elif kind == "strip":
        Image.new("RGB", (4020, 20)).save(file)
    words = ["200"] if kind == "strip" else []
    line = _refused(["chat", model, "--image", file, "What is there?"], capsys, str(file), *words)
    assert ";" in line


def _edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _without(name):
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


def _config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _unknown_model_type(folder: Path) -> None:
    _edit_config(folder, model_type="llama")


def _weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def _truncated_shard(folder: Path) -> None:
    file = _weights(folder)
    file.write_bytes(file.read_bytes()[:-1_000])


def _tensor_missing(folder: Path) -> None:
    tensors = load_file(_weights(folder))
    del tensors[MISSING]
    save_file(tensors, _weights(folder), {"format": "pt"})


def _tensor_misshaped(folder: Path) -> None:
    tensors = load_file(_weights(folder))
    tensors[MISSING] = np.ascontiguousarray(tensors[MISSING][:-1])
    save_file(tensors, _weights(folder), {"format": "pt"})


def _tokenizer_is_no_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


MISSING = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("config.json"), ["config.json"]),
        (_without("tokenizer.json"), ["tokenizer.json"]),
        (_without("model.safetensors"), ["safetensors"]),
        (_without("preprocessor_config.json"), ["preprocessor_config.json"]),
        (_config_is_no_json, ["config.json"]),
        (_tokenizer_is_no_json, ["tokenizer.json"]),
        (_unknown_model_type, ["'llama'", "qwen3_vl"]),
        (_truncated_shard, ["model.safetensors", "truncated"]),
        (_tensor_missing, [MISSING]),
        (_tensor_misshaped, [MISSING, "[36, 24]", "[35, 24]"]),
    ],
)
def test_checkpoint(damage, words, model, capsys):
    damage(model)
    _refused(["chat", model, "Hello?"], capsys, str(model), *words)


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such/folder", "nobody/no-such-model", "file.txt"])
def test_model_that_is_nowhere(name, place, capsys):
    (place / "file.txt").touch()
    line = _refused(["chat", name, "Hello?"], capsys, name)
    assert "folder" in line


CONFIG = """
from qwenvl_jax.presets import preset
from qwenvl_jax.train.config import StageConfig, TrainConfig

def get_config():
    return TrainConfig(preset("qwen3_vl_2b"), (StageConfig("s1", steps=10),), processor="model")
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate", "0.1"], ["--lerning_rate", "learning_rate"]),
        (["--stages.s1.stepz", "3"], ["--stages.s1.stepz", "--stages.s1.steps"]),
        (["--steps", "many"], ["steps", "many"]),
        (["--steps"], ["--steps"]),
        (["--model", "qwen3_vl_2B"], ["qwen3_vl_2B"]),
    ],
)
def test_setting(arguments, words, model, place, capsys):
    (place / "config.py").write_text(CONFIG)
    _refused(["train", place / "config.py", "--out", place / "run", *arguments], capsys, *words)
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", ["get_config"]),
        ("def get_config(:\n", ["config.py:1", "SyntaxError"]),
        (CONFIG.replace("steps=10", "stepz=10"), ["config.py:6", "stepz"]),
        (CONFIG.replace("qwen3_vl_2b", "qwen3_vl_3b"), ["qwen3_vl_3b", "qwen3_vl_2b"]),
    ],
)
def test_config_file(text, words, place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (place / "config.py").write_text(text)
    _refused(["train", place / "config.py", "--out", place / "run"], capsys, *words)


def test_as_a_process(model, place):
    """The same, seen from outside: nothing but the line on standard error."""
    (model / "config.json").unlink()
    command = [sys.executable, "-m", "qwenvl_jax", "chat", str(model), "Hello?"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("qwenvl-jax: error: ") and result.stderr.count("\n") == 1
