"""Checkpoints of the reference, through the native layout and back."""

import json

import pytest

from qwenvl_jax.convert.to_native import convert
from qwenvl_jax.convert.to_public import export
from tests.convert.conftest import bit_equal, stored_tensors
from tests.parity import reference


@pytest.mark.parametrize("shape", list(reference.SHAPES))
@pytest.mark.parametrize("half", [False, True])
def test_there_and_back(shape, half, tmp_path):
    """A checkpoint that the reference wrote, through the native layout and back: every tensor is bit-equal, and the
    reference loads it without a complaint. Experts, which it writes in an order of its own, come back in that."""
    model = reference.write_checkpoint(tmp_path / "public", shape, max_shard_size="20KB")
    if half:
        model.bfloat16().save_pretrained(tmp_path / "public", max_shard_size="20KB")
    convert(tmp_path / "public", tmp_path / "native", verify=True)
    export(tmp_path / "native", tmp_path / "back", verify=True, max_shard_bytes=30_000)
    assert bit_equal(stored_tensors(tmp_path / "public"), stored_tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "public" / "config.json").read_text()
    )
    found = reference.load_checkpoint(tmp_path / "back").state_dict()
    assert all((found[name] == tensor.float()).all() for name, tensor in model.state_dict().items())
