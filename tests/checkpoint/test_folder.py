"""Names of models: folders, hub ids, and everything else."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from qwenvl_jax.checkpoint.folder import resolve
from qwenvl_jax.errors import CheckpointError


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").resolve() == tmp_path / "owner" / "name"


@pytest.mark.parametrize(
    "name", ["", "nosuchmodel", "/no/such/folder", "a/b/c", "./models/x", "owner/", "no such folder"]
)
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(CheckpointError, match="neither a folder that exists nor a hub id"):
        resolve(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, not a model folder"):
        resolve(tmp_path / "model.safetensors")


def test_hub_id_out_of_reach(tmp_path):
    """Nothing listens on port 9 of this machine, and the cache is empty: an error in seconds, not a hang."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    code = "from qwenvl_jax.checkpoint.folder import resolve; resolve('owner/name')"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("qwenvl_jax.errors.CheckpointError: 'owner/name' is not a folder, was not downloaded before")


def test_what_is_downloaded(monkeypatch, tmp_path):
    asked = []

    def download(hub_id, *, allow_patterns, **_):
        asked.append((hub_id, allow_patterns))
        if hub_id == "owner/gone":
            raise LocalEntryNotFoundError("no connection")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name") == tmp_path
    assert resolve("owner/name", weights=False) == tmp_path
    assert asked[0][1] == ["*.json", "*.jinja", "*.txt", "*.safetensors"]
    assert asked[1][1] == ["*.json", "*.jinja", "*.txt"]
    with pytest.raises(CheckpointError, match="'owner/gone' is not a folder, was not downloaded before"):
        resolve("owner/gone")
