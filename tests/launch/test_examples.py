"""The commands that `launch/` gives as examples start runs that `train` accepts, on as many devices as they name."""

import math
import re
import shlex
import subprocess
import sys

import jax
import pytest

from qwenvl_jax.demo import curriculum
from qwenvl_jax.demo.clips import make_clips
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.devices import mesh_of
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.overrides import apply_overrides
from tests.train.tiny_run import ROOT, environment

README = (ROOT / "launch/README.md").read_text()
# Chips are devices; the names of v4 and v5p count two cores for each.
CORES = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}


def _examples() -> list[str]:
    """Commands of the table, and those of the headers and messages that name a config and its devices."""
    found = re.findall(r"^\| .* \| `(.*launch/\w+\.sh (?:train )?configs/.*)` \|$", README, re.MULTILINE)
    assert len(found) == 5
    for name in ("local", "slurm"):
        text = (ROOT / f"launch/{name}.sh").read_text()
        inside = re.findall(r"(?:^#     |For example: )(.*launch/\w+\.sh configs/[^\"\n]*)", text, re.MULTILINE)
        assert len(inside) == {"local": 3, "slurm": 2}[name]
        found += inside
    return found


def _taken_apart(command: str) -> tuple[str, dict[str, str], list[str]]:
    """(the script, variables and options before it, the arguments of `train`)."""
    words = shlex.split(command)
    [place] = [place for place, word in enumerate(words) if word.startswith("launch/")]
    before = [word.removeprefix("--").partition("=") for word in words[:place] if "=" in word]
    arguments = words[place + 1 :]
    arguments = arguments[1:] if arguments[0] == "train" else arguments
    return words[place], {name: value for name, _, value in before}, arguments


def _devices(given: dict[str, str]) -> int:
    if "TOPOLOGY" in given:
        return math.prod(map(int, given["TOPOLOGY"].split("x")))
    if "TYPE" in given:
        kind, cores = given["TYPE"].rsplit("-", 1)
        return int(cores) // CORES[kind]
    tasks = int(given.get("ntasks", 0)) or int(given.get("nodes", 1)) * int(given.get("ntasks-per-node", 1))
    gpus = int(given.get("nodes", 0)) * int(given.get("gpus-per-node", 0))
    return gpus or tasks * int(given.get("PROCESSES", 1)) * int(given.get("CPU_DEVICES", 1))


@pytest.mark.parametrize("command", _examples())
def test_each_device_has_its_part(command, tmp_path, monkeypatch):
    script, given, (config, *arguments) = _taken_apart(command)
    assert (ROOT / script).is_file()
    named = dict(zip(arguments[::2], arguments[1::2], strict=True))
    # What the parser takes for itself.
    assert named.pop("--out")
    assert named.pop("--model", "qwen3_vl_2b") in PRESETS
    if config.startswith("configs/pretrain/"):  # at random weights they would begin as well
        assert named["--init"].endswith("/s0/model")
    monkeypatch.chdir(tmp_path)  # configs of the demo write a tokenizer into the working directory
    written, _ = load_config_file(ROOT / config)
    settings = apply_overrides(written, [word for pair in named.items() for word in pair])
    # Nothing runs on them: a device may stand for many.
    count = _devices(given)
    mesh, _ = mesh_of(settings, [jax.devices()[0]] * count)
    assert mesh.size == count


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_in_two_processes(tmp_path, monkeypatch):
    """As the README has it, over less data and for two steps."""
    [command] = [found for found in _examples() if found.startswith("PROCESSES=2") and found in README]
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    curriculum.write_data(curriculum.DATA, make_clips(tmp_path / "clips", "train", 16, 0), 0, text_steps=2)
    done = subprocess.run(
        ["bash", "-c", f"{command} --steps 2"],
        env=environment(QWENVL_JAX_PYTHON=sys.executable, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "runs/s1/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "runs/s1/model/config.json").is_file()
