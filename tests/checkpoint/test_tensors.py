"""Folders of safetensors: what is wrong with one is said in one line, and a failed save leaves nothing behind."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qwenvl_jax.checkpoint import hf, tensors
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models import pretrained
from tests.checkpoint.shape import TINY

EMBEDDING = hf.PREFIXES[TINY.model_type].embedding

Q0 = "model.language_model.layers.0.self_attn.q_proj.weight"


def weights(model):
    return {key: np.asarray(value.get_value()) for key, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def refused(folder, match, **load):
    with pytest.raises(CheckpointError, match=match) as caught:
        pretrained.load(folder, **{"dtype": "float32", **load})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_table_and_model_agree(tiny_model):
    """Every parameter has one line of the table, of its very shape; each line is undone by its inverse."""
    table = hf.tensor_table(TINY)
    assert {entry.path: entry.native_shape for entry in table} == {
        ".".join(map(str, key)): value.shape for key, value in weights(tiny_model).items()
    }
    for entry in table:
        tensor = np.arange(np.prod(entry.shape)).reshape(entry.shape)
        assert np.array_equal(entry.to_public(entry.to_native(tensor)), tensor)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_saved_and_loaded_back(kind, tiny_model, request):
    folder = request.getfixturevalue(kind)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (kind == "single") and len(files) >= 1
    loaded = pretrained.load(folder, dtype="float32")
    assert loaded.config == TINY
    before, after = weights(tiny_model), weights(loaded)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_dtypes(single, tmp_path):
    loaded = pretrained.load(single, dtype="bfloat16")
    assert loaded.dtype == ml_dtypes.bfloat16
    pretrained.save(loaded, tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    full = load_file(single / "model.safetensors")
    assert all(np.array_equal(stored[name], full[name].astype(ml_dtypes.bfloat16)) for name in full)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert weights(pretrained.load(tmp_path / "half", dtype="float32"))[("text", "norm", "scale")].dtype == np.float32
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of"):
        pretrained.load(single, dtype="int8")
    with pytest.raises(ConfigError, match="dtype 'double precision'"):
        pretrained.load(single, dtype="double precision")


SPREAD = """
import sys, jax, numpy as np
from qwenvl_jax.models import pretrained
from qwenvl_jax.parallel.mesh import make_mesh
one = pretrained.load(sys.argv[1], dtype="float32")
two = pretrained.load(sys.argv[1], dtype="float32", mesh=make_mesh(fsdp=2, tensor=2))
jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(two))
q = two.text.layers.attn.q.kernel.get_value()
print([shard.data.shape for shard in q.addressable_shards])
"""


def test_spread_over_devices(single):
    """Each device gets its part of a weight and no more: width over 2, heads over 2."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run(
        [sys.executable, "-c", SPREAD, str(single)], env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([(3, 10, 3, 10)] * 4)


def test_earlier_prefixes_and_buffers(single, tiny_model):
    stored = load_file(single / "model.safetensors")
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in stored.items()
    }
    old["model.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    save_file(old, single / "model.safetensors")
    after = weights(pretrained.load(single, dtype="float32"))
    assert all(np.array_equal(value, after[key]) for key, value in weights(tiny_model).items())


def test_all_faults_at_once(single):
    stored = load_file(single / "model.safetensors")
    del stored["model.visual.merger.norm.bias"]
    stored["model.extra.weight"] = np.zeros(2, np.float32)
    stored[Q0] = stored[Q0].T
    stored["model.language_model.norm.weight"] = np.zeros(20, np.int32)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}, single / "model.safetensors")
    line = refused(single, "1 missing .model.visual.merger.norm.bias.")
    assert "1 unexpected (model.extra.weight, did you mean model.language_model.norm.weight?)" in line
    assert f"{Q0} is [20, 60], config.json asks for [60, 20]" in line
    assert "model.language_model.norm.weight is I32" in line


def test_config_of_another_model(single):
    config = json.loads((single / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 40
    (single / "config.json").write_text(json.dumps(config))
    assert "and 395 more" in refused(single, "407 missing")
    config["text_config"]["num_hidden_layers"] = 10**12
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "asks for 1000000000000 layers, but the files hold only")


@pytest.mark.parametrize("damage", ["cut", "cut in header", "empty", "random", "lying offsets", "huge header"])
def test_damaged_file(single, damage):
    path = single / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if damage == "lying offsets":
        header[Q0]["data_offsets"][1] += 4
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + size :]
    path.write_bytes(
        {
            "cut": content[:-5],
            "cut in header": content[:100],
            "empty": b"",
            "random": bytes(range(256)) * 20,
            "lying offsets": content,
            "huge header": struct.pack("<Q", 2**60) + content[8:],
        }[damage]
    )
    refused(single, r"model.safetensors is truncated or damaged")


def test_damaged_shard_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, f"{path.name} is truncated or damaged")


def test_incomplete_shards(sharded):
    index = sharded / "model.safetensors.index.json"
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refused(sharded, f"lacks {shard.name}, named in model.safetensors.index.json")
    shard.write_bytes(sorted(sharded.glob("*.safetensors"))[0].read_bytes())
    refused(sharded, "is stored twice")
    shard.write_bytes(content)
    values = json.loads(index.read_text())
    first = sorted(values["weight_map"])[0]
    values["weight_map"]["model.ghost"] = values["weight_map"][first]
    index.write_text(json.dumps(values))
    refused(sharded, "holds model.ghost, but it does not")
    index.write_text('{"weight_map": {}}')
    refused(sharded, "has no weight_map")
    index.unlink()
    refused(sharded, "but neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "weights.bin", 3])
def test_index_leads_only_to_safetensors_within(sharded, name):
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][sorted(values["weight_map"])[0]] = name
    index.write_text(json.dumps(values))
    refused(sharded, "outside its folder|no safetensors file")


def test_pickles_are_not_opened(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "pytorch_model.bin, pickled files that can run code and are not opened")
    (single / "pytorch_model.bin").unlink()
    refused(single, "has no weights")


def test_save_replaces_an_earlier_one(sharded, tiny_model):
    (sharded / "tokenizer.json").write_text("{}")
    pretrained.save(tiny_model, sharded)
    names = sorted(path.name for path in sharded.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


def test_failed_save_leaves_nothing(tiny_model, tmp_path, sharded, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        pretrained.save(tiny_model, tmp_path / "file")
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    calls, finish = [], tensors.Writer.finish

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        finish(*args)

    monkeypatch.setattr(tensors.Writer, "finish", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        pretrained.save(tiny_model, sharded, max_shard_bytes=50_000)
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
    calls.clear()
    with pytest.raises(CheckpointError, match="No space left on device"):
        pretrained.save(tiny_model, tmp_path / "new", max_shard_bytes=50_000)
    assert not (tmp_path / "new").exists()


def test_tied_head(tmp_path, single):
    """A tied checkpoint may store the head too, or alone; it must be the embedding's copy."""
    config = json.loads((single / "config.json").read_text()) | {"tie_word_embeddings": True}
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "lm_head.weight differs from model.language_model.embed_tokens.weight")
    stored = load_file(single / "model.safetensors")
    stored["lm_head.weight"] = stored[EMBEDDING]
    save_file(stored, single / "model.safetensors")
    both = pretrained.load(single, dtype="float32")
    assert both.text.head is None
    pretrained.save(both, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    del stored[EMBEDDING]
    save_file(stored, single / "model.safetensors")
    alone = pretrained.load(single, dtype="float32")
    assert np.array_equal(alone.text.embed.table[...], both.text.embed.table[...])


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    specs = {f"w{i}": (np.dtype(np.float32), (1000, 1000)) for i in range(12)}
    tracemalloc.start()
    try:
        tensors.write(tmp_path / "out", specs, lambda name: np.full((1000, 1000), int(name[1:]), np.float32), {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.1 * 4_000_000, peak  # the one that is written, and the next being made
    assert {name: int(t[0, 0]) for name, t in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        f"w{i}": i for i in range(12)
    }
