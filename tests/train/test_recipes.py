"""The shipped configs run: each as it is but for settings on the command line that make it small, over built data."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.cli import main
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.recipes import MODALITIES
from tests.train.tiny_run import command_line, write_records
from tools.golden_configs import shipped

pytestmark = pytest.mark.slow

SMALL = (
    *("--steps", "2", "--batch.rows", "2", "--batch.groups", "1", "--batch.length", "320"),
    *("--optimizer.warmup_steps", "1", "--data.workers", "0", "--data.max_image_tokens", "12", "--mesh.fsdp", "1"),
)


def asked(name: str, *parts: dict) -> dict:
    question = {"type": "text", "text": f"what leaves in {name}?"}
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": [*parts, question]},
            {"role": "assistant", "content": f"the red circle of {name}"},
        ],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_checkpoint, clip):
    """A data root: a folder of `data build` for each part of the mixtures, pictures, clips or text inside."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copy(clip, folder / "clip.mp4")
    pixels = np.random.default_rng(0).integers(0, 256, (128, 160, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    shown = {
        "image": {"type": "image", "image": "picture.png"},
        "video": {"type": "video", "video": "clip.mp4"},
        "text": None,
    }
    for kind, part in shown.items():
        records = [asked(f"{kind}-{n}", *([part] if part else [])) for n in range(5)]
        path = write_records(folder / f"{kind}.jsonl", records)
        assert main(["data", "build", str(path), str(folder / f"{kind}-built"), "--model", str(tiny_checkpoint)]) == 0
    names = MODALITIES | {"sft_image": "image", "sft_video": "video", "sft_text": "text", "sft_long_video": "video"}
    for name, modality in (names | {"sft_documents": "document", "own": "video"}).items():
        kind = modality if modality in shown else "image"
        shutil.copytree(folder / f"{kind}-built", folder / name)
    return folder


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("demo")])
def test_it_runs(name, root, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("QWENVL_DATA", raising=False)
    arguments = ["train", str(shipped()[name]), "--model", str(tiny_checkpoint), "--data.root", str(root)]
    adapters = ["--adapter.rank", "4"] if "lora" in name else []
    done = command_line(*arguments, *SMALL, *adapters, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "metrics.jsonl")
    stages = ["s0", "s1", "s2", "s3"] if name.endswith("curriculum") else [lines[0]["stage"]]
    assert [line["stage"] for line in lines] == [stage for stage in stages for _ in range(2)]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "model/config.json").exists()
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["stages.0.batch.length"] == "320" and settings["dtype"] == "'bfloat16'"
    log = (tmp_path / "train.log").read_text()
    assert f"starting from the weights of {tiny_checkpoint}" in log
    assert f"tokenizer and preprocessor settings are those of {tiny_checkpoint}" in log
