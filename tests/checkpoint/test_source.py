"""Tensors in whatever form a folder stores them: experts in each of theirs, and slices that bound the memory."""

import dataclasses
import functools
import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qwenvl_jax.checkpoint import hf, source
from qwenvl_jax.checkpoint.source import PublicSource
from qwenvl_jax.errors import CheckpointError
from tests.checkpoint.shape import TINY
from tests.checkpoint.test_fp8 import CONFIG, numbers, quantize

LAYERS, EXPERTS, H, F = 3, 5, 24, 20
STEM = "model.language_model.layers.{}.mlp.experts."


Expert = functools.partial(hf.Entry, swapped=True)
UP = Expert(
    f"{STEM}gate_up_proj",
    "text.layers.moe.gate_up.kernel",
    (EXPERTS, H, 2 * F),
    (EXPERTS, H, 2, F),
    (0, 1, 2, 3),
    LAYERS,
)
DOWN = Expert(f"{STEM}down_proj", "text.layers.moe.down.kernel", (EXPERTS, F, H), (EXPERTS, F, H), (0, 1, 2), LAYERS)


@pytest.fixture
def experts(single, monkeypatch):
    """A folder without weights whose model has expert tensors and no other."""
    monkeypatch.setattr(hf, "tensor_table", lambda config: (UP, DOWN))
    (single / "model.safetensors").unlink()
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(entry.shape, np.float32) for entry in (UP, DOWN) for name in entry.names()}
    return single, values


def _public(values):
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()}


def _exchanged(values):
    return {name: np.ascontiguousarray(value.swapaxes(1, 2)) for name, value in _public(values).items()}


def _each(values):
    """Every expert's matrices as Linear layers store them."""
    out = {}
    for name, value in _public(values).items():
        stem = name.rpartition(".")[0]
        for e, matrix in enumerate(value):
            if name.endswith("gate_up_proj"):
                out[f"{stem}.{e}.gate_proj.weight"] = np.ascontiguousarray(matrix[:, :F].T)
                out[f"{stem}.{e}.up_proj.weight"] = np.ascontiguousarray(matrix[:, F:].T)
            else:
                out[f"{stem}.{e}.down_proj.weight"] = np.ascontiguousarray(matrix.T)
    return out


def _read(folder, max_bytes):
    """Every tensor, put together from its slices."""
    found = {}
    model = PublicSource(folder)
    for entry in model.table:
        for layer, name in enumerate(entry.names()):
            tensor = model.tensor(entry, layer)
            assert tensor.shape == entry.shape
            rows = [tensor.rows(*span) for span in source.spans(entry, tensor.dtype.itemsize, max_bytes)]
            assert all(row.flags.c_contiguous and row.dtype == tensor.dtype for row in rows)
            found[name] = np.concatenate(rows)
    return found


@pytest.mark.parametrize("form", [_public, _exchanged, _each])
@pytest.mark.parametrize("max_bytes", [1, 5_000, 1 << 20])
def test_experts(experts, form, max_bytes):
    folder, values = experts
    save_file(form(values), folder / "model.safetensors")
    found, expected = _read(folder, max_bytes), _public(values)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("form", [_public, _exchanged, _each])
@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_experts_in_fp8(experts, form, max_bytes):
    folder, values = experts
    stored, expected = {}, {}
    for name, value in form(values).items():
        matrices = value.astype(np.float32)
        pairs = [quantize(matrix, (8, 16)) for matrix in (matrices if matrices.ndim == 3 else [matrices])]
        codes, scales = (np.stack(part) for part in zip(*pairs, strict=True))
        plain = np.stack([numbers(*pair, (8, 16)) for pair in pairs])
        shape = (EXPERTS,) if matrices.ndim == 3 else ()
        stored |= {name: codes.reshape(value.shape), f"{name}_scale_inv": scales.reshape(*shape, *scales.shape[1:])}
        expected[name] = plain.reshape(value.shape)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    found = _read(folder, max_bytes)
    again = form(found)
    assert again.keys() == expected.keys()
    assert all(np.array_equal(again[name], value) for name, value in expected.items())


def test_both_orders_fit(single, monkeypatch):
    """The reference takes a tensor of its own shape as it is, and in memory its order is the exchanged one."""
    shape = (EXPERTS, 2 * F, 2 * F)
    entry = dataclasses.replace(UP, shape=shape, split=(EXPERTS, 2 * F, 2, F))
    monkeypatch.setattr(hf, "tensor_table", lambda config: (entry,))
    values = {name: np.random.default_rng(0).standard_normal(shape, np.float32) for name in entry.names()}
    save_file(values, single / "model.safetensors")
    found = _read(single, 1 << 20)
    assert all(np.array_equal(found[name], value.swapaxes(1, 2)) for name, value in values.items())


def test_faults_of_experts(experts):
    folder, values = experts
    stored = _each(values)
    stem = STEM.format(1)
    del stored[f"{stem}3.up_proj.weight"], stored[f"{stem}0.down_proj.weight"]
    stored[f"{stem}2.gate_proj.weight"] = np.zeros((H, F), np.float32)
    stored[f"{stem}5.gate_proj.weight"] = np.zeros((F, H), np.float32)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        PublicSource(folder)
    line = str(caught.value)
    assert f"2 missing ({stem}3.up_proj.weight, {stem}down_proj)" in line
    assert f"{stem}2.gate_proj.weight is [24, 20], config.json asks for [20, 24]" in line
    assert f"{stem}5.gate_proj.weight" in line and f"{stem}1.down_proj.weight" in line


@pytest.mark.parametrize("max_bytes", [1, 300, 3_000, 1 << 20])
@pytest.mark.parametrize("entry", hf.tensor_table(TINY), ids=lambda entry: entry.path)
def test_slices_make_the_parameter(entry, max_bytes):
    """Every line of the table: slices of the public tensor lie one after another along one axis of the parameter."""
    tensor = np.arange(np.prod(entry.shape), dtype=np.float32).reshape(entry.shape)
    axis = source.native_axis(entry)
    cuts = list(source.spans(entry, 4, max_bytes))
    assert cuts[0][0] == 0 and cuts[-1][1] == entry.shape[0]
    assert all(one[1] == two[0] for one, two in itertools.pairwise(cuts))
    blocks = [source.to_native(entry, tensor[start:stop]) for start, stop in cuts]
    assert np.array_equal(np.concatenate(blocks, axis), entry.to_native(tensor))
    assert np.array_equal(np.concatenate([source.to_rows(entry, block) for block in blocks]), tensor)
    smallest = source.unit(entry) * int(np.prod(entry.shape[1:])) * 4
    assert all(tensor[start:stop].nbytes <= max(max_bytes, smallest) for start, stop in cuts)


def test_the_nearest_name(single):
    from safetensors.numpy import load_file

    stored = load_file(single / "model.safetensors")
    stored["visual.blocks.1.mlp.linear_fc3.bias"] = stored.pop("model.visual.blocks.1.mlp.linear_fc2.bias")
    stored["zzz"] = np.zeros(1, np.float32)
    save_file(stored, single / "model.safetensors")
    near = "linear_fc3.bias, did you mean model.visual.blocks.1.mlp.linear_fc2.bias?, zzz)"
    with pytest.raises(CheckpointError) as caught:
        PublicSource(single)
    assert near in str(caught.value)
