"""The script for released weights, on a tiny checkpoint in a folder, and without a network."""

import json

import pytest

from tests.golden.checkpoints import write_checkpoint
from tools import compare_released, support


def test_a_folder(tmp_path, capsys):
    write_checkpoint(tmp_path / "tiny", "qwen3_vl")
    assert compare_released.main([str(tmp_path / "tiny"), "--dtype", "float32", "--tokens", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    figures = [line for line in printed if line.startswith("float32, ")]
    assert [line.split(":")[0] for line in figures] == ["float32, text", "float32, image", "float32, video"]
    row = json.loads(printed[-1])
    assert (row["name"], row["revision"], row["dtype"]) == ("tiny", "a local folder", "float32")
    assert float(row["largest difference"]) < 1e-4
    same, _, total = row["greedy tokens agree"].split()
    assert same == total and int(total) >= 4
    assert "| tiny | a local folder |" in support.page(None, [row])


def test_both_dtypes_where_they_fit(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, "qwen3_vl")
    assert compare_released._fitting(tmp_path) == ["bfloat16", "float32"]
    monkeypatch.setattr(compare_released, "_free_bytes", lambda: 1000)
    with pytest.raises(compare_released.CheckpointError, match="compare it on a larger machine"):
        compare_released._fitting(tmp_path)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-2B-Instruct", "no-such-folder"])
def test_without_a_network(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert compare_released.main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_released: ") and error.count("\n") == 1
