"""What `qwenvl-jax info` says, without loading a weight."""

import dataclasses
import json
import shutil

import pytest

from qwenvl_jax import cli
from qwenvl_jax.checkpoint import hf, hf_config
from qwenvl_jax.convert.to_native import convert
from qwenvl_jax.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, capsys):
    assert cli.main(["info", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    parameters, vision = hf.parameter_count(PRESETS[name])
    assert facts["name"] == name and facts["model_type"] == PRESETS[name].model_type
    assert (facts["parameters"], facts["vision_parameters"]) == (parameters, vision)
    assert facts["checkpoint_bytes"] == 2 * parameters
    assert facts["context"] == PRESETS[name].text.max_position_embeddings
    assert facts["config"] == json.loads(json.dumps(dataclasses.asdict(PRESETS[name])))


def test_folders(tiny_checkpoint, tmp_path, capsys):
    convert(tiny_checkpoint, tmp_path / "native")
    (tmp_path / "run").mkdir()
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "model")
    capsys.readouterr()
    parameters, _ = hf.parameter_count(hf_config.read_config(tiny_checkpoint))
    for folder in (tiny_checkpoint, tmp_path / "native", tmp_path / "run"):
        assert cli.main(["info", str(folder), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["parameters"] == parameters and facts["name"] == str(folder)
        assert 4 * parameters < facts["checkpoint_bytes"] < 8 * parameters  # float32, and headers
    (tiny := shutil.copytree(tiny_checkpoint, tmp_path / "config only")).joinpath("model.safetensors").unlink()
    assert cli.main(["info", str(tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint_bytes"] is None
    (tmp_path / "native" / "native" / "index.json").unlink()
    assert cli.main(["info", str(tmp_path / "native")]) == 2
    assert "is a half conversion" in capsys.readouterr().err


def test_table(tiny_checkpoint, capsys):
    assert cli.main(["info", "qwen3_vl_2b"]) == 0
    out = capsys.readouterr().out
    assert "2,127,532,032" in out and "262,144 tokens" in out and "4.26 GB" in out and "hidden_size" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3_vl_5b", "'qwen3_vl_5b' is no folder, and no preset is called"),
        ("no/such", "'no/such' is not a folder"),
        (".", "has no config.json"),
    ],
)
def test_what_is_nowhere(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
