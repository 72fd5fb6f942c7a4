"""A whole public folder, and its conversion that nothing disturbed."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwenvl_jax.convert.to_native import convert
from qwenvl_jax.models import pretrained
from tests.checkpoint.shape import random_model
from tests.tiny import tiny_processor_folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder by its name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def bit_equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    """The same names, dtypes, shapes and bytes."""
    return one.keys() == two.keys() and all(
        (one[k].dtype, one[k].shape, one[k].tobytes()) == (two[k].dtype, two[k].shape, two[k].tobytes()) for k in one
    )


@pytest.fixture(scope="session")
def public(tmp_path_factory) -> Path:
    """A model with its processor's files, in several shards."""
    folder = tmp_path_factory.mktemp("convert") / "public"
    pretrained.save(random_model(), folder, max_shard_bytes=60_000)
    tiny_processor_folder(folder)
    (folder / "qwenvl_jax.json").write_text('{"dialect": "transformers"}\n')
    return folder


@pytest.fixture(scope="session")
def undisturbed(public, tmp_path_factory) -> Path:
    """The native form of `public`, made in one go."""
    return convert(public, tmp_path_factory.mktemp("native") / "native")
