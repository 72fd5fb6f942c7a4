"""A tiny model folder that tests copy and damage."""

import shutil

import pytest

from qwenvl_jax.models import pretrained
from tests.checkpoint.shape import random_model


@pytest.fixture(scope="session")
def tiny_model():
    """A random model of the shape `TINY`."""
    return random_model()


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tiny_model):
    """Folders of `tiny_model`, written once: (one file, several shards)."""
    root = tmp_path_factory.mktemp("saved")
    pretrained.save(tiny_model, root / "single")
    pretrained.save(tiny_model, root / "sharded", max_shard_bytes=20_000)
    return root / "single", root / "sharded"


@pytest.fixture
def single(saved, tmp_path):
    """A copy of the one-file folder, free to damage."""
    return shutil.copytree(saved[0], tmp_path / "single")


@pytest.fixture
def sharded(saved, tmp_path):
    """A copy of the folder of several shards, free to damage."""
    return shutil.copytree(saved[1], tmp_path / "sharded")
