"""The guide docs/fine-tune.md: its five commands, with a tiny model in place of the released one and sizes to match."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.overrides import apply_overrides

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/fine-tune.md").read_text()
MODEL = "Qwen/Qwen3-VL-4B-Instruct"
# A tiny model on CPU takes steps of another size, by the settings that the guide names.
SMALL = "--steps 3 --batch.rows 1 --batch.groups 1 --batch.length 320 --mesh.fsdp 1"


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return found


def test_the_guide_has_five_commands_and_the_settings_it_names():
    commands = block("bash").splitlines()
    assert len(commands) == 5 and all(command.startswith("qwenvl-jax ") for command in commands)
    assert all(f"--model {MODEL}" in command for command in commands[:4])
    settings = (ROOT / "tests/golden/configs/sft-own_data.txt").read_text()
    named = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", GUIDE.partition("What to change first")[2]))
    assert {"batch.length", "trainable", "optimizer.rates", "param_dtype"} <= named
    for name in named:
        assert re.search(rf"^(stages\.0\.)?{re.escape(name)} = ", settings, re.MULTILINE), name


def test_rows_of_the_guide_hold_its_videos():
    """A video as long as the settings allow, and words about it."""
    config, _ = load_config_file(ROOT / "configs/sft/own_data.py")
    shortened = [span for span in re.findall(r"`(--[^`]+)`", GUIDE) if re.search(r"--batch\.length \d", span)]
    assert len(shortened) >= 2
    for settings in ("", *shortened):
        (stage,) = apply_overrides(config, settings.split()).stages
        assert stage.data.video_budget.max_video_tokens <= 0.75 * stage.batch.length, settings


@pytest.mark.slow
def test_the_five_commands(tiny_checkpoint, clip, tmp_path):
    (tmp_path / "clips.jsonl").write_text(block("json"))
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"videos/{name}.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = block("bash").replace(MODEL, str(tiny_checkpoint))
    commands = re.sub(r"^(qwenvl-jax train .*)$", rf"\1 {SMALL}", commands, flags=re.MULTILINE)
    commands = re.sub(r" --steps 20$", f" {SMALL.partition(' --mesh')[0]}", commands, flags=re.MULTILINE)
    commands = commands.replace('"When does', '--max-new-tokens 4 "When does')
    folder = Path(sys.executable).parent
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, commands + done.stdout + done.stderr
    assert (tmp_path / "stats.png").exists() and (tmp_path / "built/dataset_info.json").exists()
    assert "own: 3 steps of 1 rows of 320 tokens" in done.stdout
    assert len(read_metrics(tmp_path / "runs/own/metrics.jsonl")) == 3
    log = (tmp_path / "runs/own/train.log").read_text()
    assert re.search(r"([\d,]+) of ([\d,]+) weights learn", log)
    settings = json.loads((tmp_path / "runs/own/config.json").read_text())
    assert settings["stages.0.trainable"] == repr(r"^(merger|deepstack|text)\.")
