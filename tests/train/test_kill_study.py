"""The study of kills in short: `docs/benchmarks/kills.md` has a long one."""

import shutil
import subprocess
import sys

import pytest

from tests.train.tiny_run import ROOT, command_line, write_tiny_run
from tools.kill_study import different


@pytest.mark.slow
def test_a_few_kills():
    """Of every kind; the moments are others each time, and the seed is in what a failure shows."""
    command = [sys.executable, "-m", "tools.kill_study", "--kills", "5", "--steps", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = "5 of 5 kills resumed bit-equal (3 any moment, 1 inside a save, 1 workers alive;"
    assert told in done.stdout, done.stdout


@pytest.mark.slow
def test_a_run_that_is_not_the_same_is_found(tmp_path, clip):
    """Another seed: its losses, its model, the state in its checkpoints."""
    config = write_tiny_run(tmp_path, clip)
    runs = {name: tmp_path / name for name in ("whole", "other")}
    for seed, out in enumerate(runs.values()):
        assert command_line("train", config, "--out", out, "--seed", seed, "--stages.s1.steps", 1).returncode == 0
    assert different(runs["whole"], runs["whole"]) == ""
    assert different(runs["other"], runs["whole"]) == "metrics.jsonl"
    shutil.copy(runs["whole"] / "metrics.jsonl", runs["other"])
    assert different(runs["other"], runs["whole"]) == "model/model.safetensors"
    shutil.rmtree(runs["other"] / "model")
    shutil.copytree(runs["whole"] / "model", runs["other"] / "model")
    assert different(runs["other"], runs["whole"]).startswith("['state']")
