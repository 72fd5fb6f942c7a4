"""The guide docs/own-data.md, followed word for word: its files written, its commands run, in order."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/own-data.md").read_text()


def blocks(language: str) -> list[tuple[str, str]]:
    """Name of the file that the text before a block ends with, and the block."""
    found = re.findall(rf"(?:`(\S+)`:\n\n)?^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [(name, body) for name, body in found]


@pytest.mark.slow
def test_the_guide_as_it_stands(tiny_checkpoint, clip, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "qwen3-vl")
    (tmp_path / "videos").mkdir()
    whole = clip.read_bytes()
    for name, content in (("a", whole), ("b", whole), ("c", whole[: len(whole) // 2])):
        (tmp_path / f"videos/{name}.mp4").write_bytes(content)
    files = [*blocks("json"), *blocks("python")]
    assert [name for name, _ in files] == ["clips.jsonl", "text.jsonl", "doors.py"]
    for name, content in files:
        (tmp_path / name).write_text(content)

    folder = Path(sys.executable).parent
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PATH": f"{folder}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    output = ""
    for name, block in blocks("bash"):
        assert not name
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, block + done.stdout + done.stderr
        output += done.stdout

    # What the guide says one will see.
    assert "truncated" in output and "videos/c.mp4" in output
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("stats.png", "sheet.png", "steps.png"))
    (left_out,) = [json.loads(line) for line in (tmp_path / "runs/doors/quarantine.jsonl").read_text().splitlines()]
    assert "c.mp4" in left_out["reason"]
    assert len(read_metrics(tmp_path / "runs/doors/metrics.jsonl")) == 12
    assert len(read_metrics(tmp_path / "runs/built/metrics.jsonl")) == 4
    assert re.search(r"clips +\d+ .* [67]\d\.\d%", output), output
