"""Adapters: the mathematics against kernels written out, what is stored, meshes, runs that end and go on."""

import dataclasses
import gc
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import qwenvl_jax as qv
from qwenvl_jax.checkpoint import peft
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models import pretrained
from qwenvl_jax.ops import low_rank
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import shard_batch
from qwenvl_jax.train.adapters import AdaptedParts
from qwenvl_jax.train.config import AdapterConfig, StageConfig
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.optimizer import make_optimizer
from qwenvl_jax.train.state import HeldWeights
from qwenvl_jax.train.step import make_loss
from tests.parallel.meshed import UNOPTIMIZED, even_config, everything
from tests.train.tiny_run import command_line, killed, tiny_model, write_tiny_run

EVERYWHERE = r"attn\.\w+$|mlp\.(gate|up|down|fc1|fc2)$|merger\.fc|deepstack\.fc"
# Table of appendix E of the QLoRA paper (arXiv 2305.14314).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def adapted(config, adapter: AdapterConfig, dtype="float32", **sizes: int) -> AdaptedParts:
    """The model with adapters, on a mesh of these sizes."""
    devices = jax.devices()[: int(np.prod(list(sizes.values()) or [1]))]
    mesh = make_mesh(devices, **(sizes or {"data": 1}))
    return AdaptedParts(config, adapter, seed=0, mesh=mesh, dtype=dtype, param_dtype=dtype)


def first(parts: AdaptedParts) -> tuple[dict, dict]:
    """(kernels of the base, all weights with B moved away from 0), both as NumPy arrays."""
    single = adapted(parts.config, parts.adapter)  # drawn on one device: what is drawn depends on where it is
    drawn = single.base.random(1)
    base = {name: np.asarray(value) for name, value in drawn.items()}
    params = {name: np.asarray(value) for name, value in single.split(single.base.merge(drawn)).items()}
    rng = np.random.default_rng(0)
    for name in params:
        if name.endswith("lora_b"):
            params[name] = 0.1 * rng.standard_normal(params[name].shape).astype(np.float32)
    return base, params


def written(parts: AdaptedParts, params: dict, name: str) -> np.ndarray:
    """A weight of the exported model, its layers one after another."""
    info = parts.base.weights[name]
    if info.axes[0] != "layers":
        return np.asarray(parts.exported(params, name, None))
    return np.stack([np.asarray(parts.exported(params, name, layer)) for layer in range(info.shape[0])])


def nf4(kernel: np.ndarray, inputs: int, tile: int, stacked: bool) -> np.ndarray:
    """A kernel after it was stored in four bits: the nearest of 16 values times the largest of each tile."""
    moved = np.moveaxis(kernel, stacked + inputs - 1, -1)
    tiles = moved.reshape(*moved.shape[:-1], -1, tile)
    largest = np.abs(tiles).max(-1, keepdims=True)
    codes = np.abs((tiles / largest)[..., None] - NF4).argmin(-1)
    return np.moveaxis((NF4[codes] * largest).reshape(moved.shape), -1, stacked + inputs - 1)


@pytest.mark.parametrize(
    ("generation", "quantize", "sizes", "remat"),
    [
        ("text alone", "nf4", {}, "full"),
        pytest.param("qwen3_vl", "nf4", {}, "full", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "none", {"fsdp": 2, "tensor": 2, "data": 2}, "none", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "nf4", {"fsdp": 2, "tensor": 2, "context": 2}, "products", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", "nf4", {"fsdp": 4, "tensor": 2}, "none", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", "nf4", {"expert": 2, "fsdp": 2, "tensor": 2}, "attention", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_kernels_written_out(generation, quantize, sizes, remat):
    """A model whose kernels are W + alpha / rank * A B, layer by layer: same loss, same gradients of A and B."""
    config = even_config("qwen3_vl" if generation == "text alone" else generation)
    targets = {} if generation == "text alone" else {"targets": EVERYWHERE}
    adapter = AdapterConfig(rank=3, alpha=5.0, quantize=quantize, tile_size=8, **targets)
    parts = adapted(config, adapter, **sizes)
    base, params = first(parts)
    if quantize == "nf4":
        for name in parts.modules:
            info = parts.base.weights[f"{name}.kernel"]
            base[f"{name}.kernel"] = nf4(base[f"{name}.kernel"], info.inputs, 8, info.axes[0] == "layers")
    batch = everything(config)
    if generation == "text alone":
        batch = dataclasses.replace(batch, vision=(), vision_index=np.full_like(batch.vision_index, -1))
    stage = StageConfig(name="s", steps=1, loss_chunk=24, remat=remat)
    names = parts.select("all")
    assert len(names) == 2 * len(parts.modules) > 7
    placed = {name: jax.device_put(value, parts.shardings[name]) for name, value in params.items()}
    frozen = {name: value for name, value in placed.items() if name not in names}
    assert all(value.dtype != jnp.uint8 for value in frozen.values()) == (quantize == "none")

    def ours(learning, frozen, batch):
        return make_loss(parts, stage)(learning | frozen, batch)

    single = adapted(config, adapter)

    def written_out(learning, base, batch):
        kernels = {}
        for module in parts.modules:
            a, b = learning[f"{module}.kernel_lora_a"], learning[f"{module}.kernel_lora_b"]
            kernel = base[f"{module}.kernel"]
            kernels[f"{module}.kernel"] = kernel + 5.0 / 3.0 * (a @ b).reshape(kernel.shape)
        return make_loss(single.base, dataclasses.replace(stage, remat="none"))(base | kernels, batch)

    def run(loss, *arguments):
        return jax.jit(jax.value_and_grad(loss), compiler_options=UNOPTIMIZED)(*arguments)

    learning = {name: placed[name] for name in names}
    got = run(ours, learning, frozen, shard_batch(batch, parts.mesh))
    wanted = run(written_out, {name: params[name] for name in names}, base, batch)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for name, value in wanted[1].items():
        largest = np.abs(value).max()
        assert largest > 0, name
        np.testing.assert_allclose(got[1][name], value, rtol=0, atol=2e-5 * largest, err_msg=name)
    # What is exported is the model with the kernels written out.
    exported = {name: written(parts, placed, name) for name in base}
    for module in parts.modules:
        a, b = params[f"{module}.kernel_lora_a"], params[f"{module}.kernel_lora_b"]
        kernel = base[f"{module}.kernel"]
        np.testing.assert_allclose(
            exported[f"{module}.kernel"], kernel + 5 / 3 * (a @ b).reshape(kernel.shape), rtol=1e-5, atol=1e-6
        )
    for name in set(base) - {f"{module}.kernel" for module in parts.modules}:
        assert np.array_equal(exported[name], base[name]), name


@pytest.mark.parametrize("generation", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_activations_keep_their_dtype(generation, quantize):
    """In bfloat16, adapters in float32: every product has the dtype of its activations (JAX refuses any promotion)."""
    config = even_config(generation)
    adapter = AdapterConfig(rank=4, targets=EVERYWHERE, quantize=quantize, tile_size=8)
    parts = adapted(config, adapter, "bfloat16")
    weights = {name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in parts.weights.items()}
    assert {str(weights[name].dtype) for name in parts.select("all")} == {"float32"}
    loss = make_loss(parts, StageConfig(name="s", steps=1))
    assert jax.eval_shape(loss, weights, everything(config)).dtype == jnp.float32
    hidden = jax.eval_shape(lambda weights, batch: parts.merge(weights).hidden(batch), weights, everything(config))
    assert hidden.dtype == jnp.bfloat16


def test_halves_are_split_as_their_kernels():
    """Over `fsdp` and `tensor`; scales that are too few to be split stay whole."""
    config = even_config("qwen3_vl")
    adapter = AdapterConfig(rank=4, quantize="nf4", tile_size=8)
    specs = {name: s.spec for name, s in adapted(config, adapter, fsdp=2, tensor=2).shardings.items()}
    q, o = "text.layers.attn.q.kernel", "text.layers.attn.o.kernel"
    assert specs[f"{q}.array.qvalue"] == P(None, "fsdp", "tensor", None)
    assert specs[f"{q}.array.scale"] == P(None, "fsdp", "tensor", None)
    assert specs[f"{q}_lora_a"] == P(None, "fsdp", None)
    assert specs[f"{q}_lora_b"] == P(None, None, "tensor")
    assert specs[f"{o}_lora_a"] == P(None, "tensor", None)
    assert specs[f"{o}_lora_b"] == P(None, None, "fsdp")
    wide = AdapterConfig(rank=4, quantize="nf4", tile_size=16)
    specs = {name: s.spec for name, s in adapted(config, wide, fsdp=4).shardings.items()}
    assert specs[f"{q}.array.scale"] == P(None, None, None, None)


def test_memory_of_a_step():
    """Compiled arguments: four bits and a scale a tile in place of 32, and nothing of the optimizer for the base."""
    config = even_config("qwen3_vl")
    sizes = {}
    for quantize in ("none", "nf4"):
        adapter = AdapterConfig(rank=2, targets=EVERYWHERE, quantize=quantize, tile_size=16)
        parts = adapted(config, adapter)
        weights = {name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in parts.weights.items()}
        names = parts.select("all")
        learning = {name: weights[name] for name in names}
        frozen = {name: weight for name, weight in weights.items() if name not in learning}
        stage = StageConfig(name="s", steps=1)
        rule = make_optimizer(stage.optimizer, {name: parts.weights[name] for name in names})
        opt_state = jax.eval_shape(rule.init, learning)
        ours = sum(weight.size for weight in learning.values())
        assert sum(leaf.size for leaf in jax.tree.leaves(opt_state)) <= 2 * ours + 2  # Adam's two moments, its counts
        touch = jax.jit(lambda frozen: jax.tree.map(lambda x: x[:1], frozen), compiler_options=UNOPTIMIZED)
        sizes[quantize] = touch.lower(frozen).compile().memory_analysis().argument_size_in_bytes
    kernels = sum(int(np.prod(parts.base.weights[f"{module}.kernel"].shape)) for module in parts.modules)
    saved = sizes["none"] - sizes["nf4"]
    assert saved == kernels * 4 - kernels // 2 - kernels // 16 * 4, (saved, kernels)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": "mlp"}, r"picks text\.layers\.mlp\.experts: experts get no adapters"),
        ({"targets": r"router"}, "PEFT has no adapters for routers"),
        ({"targets": r"head$"}, "the loss reads its weight in chunks"),
        ({"targets": r"norm"}, r"picks no projection; they are .*text\.layers\.attn\.q"),
        ({"rank": 32, "targets": r"merger\.fc2"}, r"rank=32 is the whole width of merger\.fc2"),
        ({"quantize": "nf4", "tile_size": 5}, r"tile_size=5 does not divide the \d+ inputs of text\.layers\.attn\.k"),
        ({"modules_to_save": "nothing"}, "modules_to_save='nothing' picks no module"),
        ({"modules_to_save": r"attn\.q$"}, r"picks text\.layers\.attn\.q, which has an adapter"),
        ({"modules_to_save": r"experts"}, "experts are not saved beside adapters"),
    ],
)
def test_what_cannot_be_adapted(settings, told):
    with pytest.raises(ConfigError, match=told):
        adapted(even_config("qwen3_vl_moe"), AdapterConfig(**{"rank": 4, "targets": r"text.layers.attn"} | settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": -1}, "rank=-1 must be at least 1"),
        ({"rank": 2, "alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"rank": 2, "tile_size": 0}, "tile_size=0 must be at least 1"),
        ({"rank": 2, "targets": "("}, r"targets='\(' is no regular expression"),
        ({"quantize": "nf4"}, "rank=0 has no adapters, but other settings"),
        ({"rank": 2, "quantize": "nf5"}, "quantize='nf5' is not one of none, nf4"),
    ],
)
def test_settings_that_mean_nothing(settings, told):
    with pytest.raises(ConfigError, match=told):
        AdapterConfig(**settings)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(shape of a model most of which is the kernels of sixteen layers, its folder)."""
    config = even_config("qwen3_vl")
    text = dataclasses.replace(config.text, num_hidden_layers=16, intermediate_size=128, vocab_size=64)
    config = dataclasses.replace(config, text=text)
    folder = tmp_path_factory.mktemp("deep")
    qv.QwenVL(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    return config, folder


def live_bytes() -> int:
    """Of all arrays on all devices."""
    return sum(array.nbytes for array in jax.live_arrays())


class Watched(pretrained.Reader):
    """Notes how much is held whenever a weight, or a layer of one, was read."""

    peak = 0

    def read(self, name):
        return self._noted(super().read(name))

    def read_layer(self, name, layer):
        return self._noted(super().read_layer(name, layer))

    def _noted(self, value):
        self.peak = max(self.peak, live_bytes())
        return value


def largest_layer(parts: AdaptedParts) -> int:
    """Bytes of one layer of the largest kernel that has an adapter, in float32."""
    return max(4 * int(np.prod(parts.base.weights[f"{module}.kernel"].shape[1:])) for module in parts.modules)


QLORA = AdapterConfig(rank=2, alpha=3.0, targets=r"text\.layers\.mlp\.(up|down)$", quantize="nf4", tile_size=16)


def test_quantizing_holds_one_layer_beside_what_stays(deep):
    """When a run begins and when it goes on: never the whole base, nor a whole kernel. The codes are the same."""
    config, folder = deep
    parts = adapted(config, QLORA)
    layer = largest_layer(parts)
    base = sum(4 * int(np.prod(info.shape)) for info in parts.base.weights.values())

    def peak(make):
        before = live_bytes()
        reader = Watched(folder, dtype="float32", mesh=parts.mesh)
        made = jax.block_until_ready(make(reader))
        final = sum(value.nbytes for value in made.values())
        assert final + layer < 0.8 * base
        assert final <= reader.peak - before <= final + layer
        return made

    begun = peak(parts.begun)
    origin = parts.origin({name: value for name, value in begun.items() if name not in parts.select("all")})
    again = peak(lambda reader: adapted(config, QLORA).made_again(lambda: reader, origin))
    assert again.keys() == set(begun) - set(parts.select("all"))
    spread = adapted(config, QLORA, fsdp=2, tensor=2)
    reader = pretrained.Reader(folder, dtype="float32", mesh=spread.mesh)
    elsewhere = spread.begun(reader)
    for name, value in again.items():
        assert np.array_equal(value, begun[name]) and np.array_equal(elsewhere[name], begun[name]), name
        assert elsewhere[name].sharding == spread.shardings[name]


def test_exporting_holds_one_layer_beside_what_is_there(deep, tmp_path, monkeypatch):
    """The merged kernels are made one layer at a time; the folder is that of the model that is merged whole."""
    config, folder = deep
    parts = adapted(config, QLORA)
    params = parts.begun(pretrained.Reader(folder, dtype="float32", mesh=parts.mesh))
    rng = np.random.default_rng(0)
    for name in [name for name in params if name.endswith("lora_b")]:
        params[name] = jnp.asarray(rng.standard_normal(params[name].shape).astype(np.float32))
    whole = {name: params[name] for name in parts.base.names if name in params}
    for module in parts.modules:
        info = parts.base.weights[f"{module}.kernel"]
        codes, scales = params[f"{module}.kernel.array.qvalue"], params[f"{module}.kernel.array.scale"]
        numbers = NF4[np.stack([codes & 15, codes >> 4], -1).reshape(info.shape)]
        kernel = numbers * np.repeat(scales, 16, axis=info.inputs)
        halves = params[f"{module}.kernel_lora_a"], params[f"{module}.kernel_lora_b"]
        whole[f"{module}.kernel"] = low_rank.merged(jnp.asarray(kernel), *halves, parts.scale)
    parts.base.merge(whole).save_pretrained(tmp_path / "whole")
    del whole, halves, codes, scales
    gc.collect()

    before, peaks, fetched = live_bytes(), [], pretrained._fetched

    def noted(value):
        peaks.append(live_bytes())
        return fetched(value)

    monkeypatch.setattr(pretrained, "_fetched", noted)
    parts.save(params, tmp_path / "out")
    # One layer, or what one is made of and the merged kernel; no whole stack of merged kernels.
    layers = {name: info.shape[1:] for name, info in parts.base.weights.items() if info.axes[0] == "layers"}
    most = 4 * max(int(np.prod(shape)) for shape in layers.values())
    assert before < max(peaks) <= before + 2 * most < before + 16 * largest_layer(parts)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_what_learns():
    """Adapters and the modules saved whole; of these what a stage picks."""
    config = even_config("qwen3_vl")
    parts = adapted(config, AdapterConfig(rank=4, modules_to_save=r"^merger\.fc"))
    saved = ("merger.fc1.bias", "merger.fc1.kernel", "merger.fc2.bias", "merger.fc2.kernel")
    assert parts.saved == saved
    projections = [f"text.layers.{name}" for name in ("attn.k", "attn.o", "attn.q", "attn.v")]
    projections += [f"text.layers.mlp.{name}" for name in ("down", "gate", "up")]
    assert list(parts.modules) == projections
    halves = [f"{name}.kernel_lora_{half}" for name in projections for half in "ab"]
    assert parts.select("all") == (*saved, *halves)
    assert parts.select("mergers") == saved
    with pytest.raises(ConfigError, match=r"trainable='norm' picks no adapter; adapters are on text\.layers\.attn\.k"):
        parts.select("norm")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(folder of an adapter on two projections, the model's shape, the adapter)."""
    config, rng = even_config("qwen3_vl"), np.random.default_rng(0)
    layers, width = config.text.num_hidden_layers, config.text.hidden_size
    pairs = {
        "text.layers.mlp.up": (rng.random((layers, width, 4)), rng.random((layers, 4, config.text.intermediate_size))),
        "merger.fc2": (rng.random((4 * config.vision.hidden_size, 4)), rng.random((4, width))),
    }
    pairs = {name: tuple(half.astype(np.float32) for half in pair) for name, pair in pairs.items()}
    adapter = peft.Adapter(4, 8.0, pairs, {"text.norm.scale": rng.random(width).astype(np.float32)}, "owner/model")
    folder = tmp_path_factory.mktemp("stored")
    peft.write(adapter, folder, config)
    return folder, config, adapter


def test_an_adapter_comes_back(stored):
    """The same numbers; and the names are PEFT's."""
    folder, config, adapter = stored
    again = peft.read(folder, config)
    assert (again.rank, again.alpha, again.base) == (4, 8.0, "owner/model")
    assert again.pairs.keys() == adapter.pairs.keys()
    for name, pair in adapter.pairs.items():
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(again.pairs[name], pair, strict=True))
    assert np.array_equal(again.saved["text.norm.scale"], adapter.saved["text.norm.scale"])
    names = load_file(folder / peft.WEIGHTS).keys()
    up = "base_model.model.model.language_model.layers.{}.mlp.up_proj.lora_{}.weight"
    merger = "base_model.model.model.visual.merger.linear_fc2.lora_{}.weight"
    wanted = {up.format(layer, half) for layer in range(config.text.num_hidden_layers) for half in "AB"}
    wanted |= {merger.format(half) for half in "AB"} | {"base_model.model.model.language_model.norm.weight"}
    assert names == wanted
    settings = json.loads((folder / peft.CONFIG).read_text())
    assert settings["modules_to_save"] == ["model.language_model.norm"]
    assert re.fullmatch(settings["target_modules"], "model.language_model.layers.1.mlp.up_proj")
    assert not re.fullmatch(settings["target_modules"], "model.visual.blocks.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; give a LoRA adapter"),
        ({"r": "4"}, "r='4' must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha=None must be a number"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.* is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the model's own weights"),
        ({"r": 5}, r"has shape \(4, 32\), expected \(5, 32\)"),
    ],
)
def test_settings_of_adapters_that_are_not_read(stored, tmp_path, change, told):
    folder, config, _ = stored
    (tmp_path / peft.WEIGHTS).write_bytes((folder / peft.WEIGHTS).read_bytes())
    (tmp_path / peft.CONFIG).write_text(json.dumps(json.loads((folder / peft.CONFIG).read_text()) | change))
    with pytest.raises(CheckpointError, match=told):
        peft.read(tmp_path, config)


UP = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("drop", "add", "told"),
    [
        (UP.format("A"), {}, r"text\.layers\.mlp\.up of layer 1 has one of lora_A and lora_B"),
        (
            "",
            {UP.format("A").replace("up_proj", "experts"): (4, 32)},
            "belongs to no projection of this qwen3_vl model",
        ),
        ("", {UP.format("A").replace("layers.1", "layers.99"): (4, 32)}, "belongs to no projection"),
        ("", {"base_model.model.model.norm.biased": (4,)}, "belongs to no parameter"),
        (
            "",
            {"base_model.model.model.language_model.layers.0.input_layernorm.weight": (32,)},
            "of layer 1 is not among",
        ),
    ],
)
def test_tensors_of_adapters_that_are_not_read(stored, tmp_path, drop, add, told):
    folder, config, _ = stored
    (tmp_path / peft.CONFIG).write_bytes((folder / peft.CONFIG).read_bytes())
    tensors = {name: value for name, value in load_file(folder / peft.WEIGHTS).items() if name != drop}
    save_file(tensors | {name: np.zeros(shape, np.float32) for name, shape in add.items()}, tmp_path / peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=told):
        peft.read(tmp_path, config)
    (tmp_path / peft.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        peft.read(tmp_path, config)


def test_a_tied_model_has_one_embedding(tmp_path):
    """Saved as the head too, and asked of PEFT; an adapter that leaves the model another head is not read."""
    config = even_config("qwen3_vl")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=True))
    table = np.random.default_rng(0).random((config.text.vocab_size, config.text.hidden_size)).astype(np.float32)
    peft.write(peft.Adapter(4, 8.0, {}, {"text.embed.table": table}), tmp_path, config)
    settings, tensors = json.loads((tmp_path / peft.CONFIG).read_text()), load_file(tmp_path / peft.WEIGHTS)
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.language_model.embed_tokens"))
    assert settings["ensure_weight_tying"] is True and tensors.keys() == {head, embedding}
    read = peft.read(tmp_path, config)
    assert read.saved.keys() == {"text.embed.table"} and np.array_equal(read.saved["text.embed.table"], table)

    save_file(tensors | {head: table[::-1].copy()}, tmp_path / peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from .*, but the model is tied"):
        peft.read(tmp_path, config)
    save_file({embedding: table}, tmp_path / peft.WEIGHTS)
    assert np.array_equal(peft.read(tmp_path, config).saved["text.embed.table"], table)
    (tmp_path / peft.CONFIG).write_text(json.dumps(settings | {"ensure_weight_tying": False}))
    with pytest.raises(CheckpointError, match="saved whole without ensure_weight_tying"):
        peft.read(tmp_path, config)
    # Where the head is a weight of its own, the embedding is one too.
    untied = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False))
    assert peft.read(tmp_path, untied).saved.keys() == {"text.embed.table"}


def test_layers_without_an_adapter_get_none(stored, tmp_path):
    """Both halves of a layer absent: zeros, which add nothing."""
    folder, config, adapter = stored
    (tmp_path / peft.CONFIG).write_bytes((folder / peft.CONFIG).read_bytes())
    tensors = load_file(folder / peft.WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "layers.1." not in name}, tmp_path / peft.WEIGHTS)
    a, b = peft.read(tmp_path, config).pairs["text.layers.mlp.up"]
    assert np.array_equal(a[0], adapter.pairs["text.layers.mlp.up"][0][0])
    assert not a[1].any() and not b[1].any() and a[0].any()


def test_begins_with_an_adapter(stored):
    """Its numbers, where the run has the same modules, rank and alpha; else the difference is told."""
    folder, config, adapter = stored
    settings = {"targets": r"layers\.mlp\.up$|merger\.fc2$", "modules_to_save": r"^text\.norm$", "start": str(folder)}
    made = AdapterConfig(rank=4, alpha=8.0, **settings)
    params = adapted(config, made).random(0)
    for name, (a, b) in adapter.pairs.items():
        assert np.array_equal(params[f"{name}.kernel_lora_a"], a)
        assert np.array_equal(params[f"{name}.kernel_lora_b"], b)
    assert np.array_equal(params["text.norm.scale"], adapter.saved["text.norm.scale"])
    for change, told in (
        ({"alpha": 4.0}, r"r=4 and lora_alpha=8, the run adapter\.rank=4 and adapter\.alpha=4"),
        ({"targets": r"mlp\.up$"}, r"it has merger\.fc2, the run has not; set adapter\.targets"),
        ({"modules_to_save": ""}, r"it has text\.norm\.scale, the run has not; set adapter\.modules_to_save"),
    ):
        with pytest.raises(CheckpointError, match=told):
            adapted(config, dataclasses.replace(made, **change)).check_start()


def test_a_run_that_goes_on_needs_no_adapter_to_begin_with(stored):
    """What it learnt is in its checkpoint; the folder may have gone."""
    _, config, _ = stored
    parts = adapted(config, AdapterConfig(rank=4, targets=r"layers\.mlp\.up$", start="/gone"))
    base = parts.base.random(0)
    assert parts.made_again(lambda: HeldWeights(base), parts.origin(base)).keys() == base.keys()
    with pytest.raises(CheckpointError, match="/gone"):
        parts.check_start()


@pytest.fixture(scope="module")
def run(tmp_path_factory, clip):
    """(config file of a tiny run, a base to train on, the command line's settings for adapters on it)."""
    folder = tmp_path_factory.mktemp("run")
    config = write_tiny_run(folder, clip)
    base = folder / "base"
    shutil.copytree(folder / "processor", base)
    qv.QwenVL(tiny_model(Processor.from_pretrained(folder / "processor")), rngs=nnx.Rngs(3)).save_pretrained(base)
    settings = ("--model", base, "--adapter.rank", 4, "--adapter.modules_to_save", "^merger")
    return config, base, settings


def assert_same_files(folder, other):
    """Same names and bytes."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_a_run_that_is_killed_and_continued(run, storage, tmp_path):
    """The first stage trains the mergers, the second all that may learn; bit for bit the run that was not killed.

    The adapter on the base is the model that was exported, where the base was not quantized.
    """
    config, base, settings = run
    settings += ("--adapter.quantize", storage, "--adapter.tile_size", 16)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = command_line("train", config, "--out", whole, *settings)
    assert done.returncode == 0, done.stderr
    assert killed("SIGKILL:step:6", config, out, *settings).returncode == -signal.SIGKILL
    done = command_line("train", config, "--out", out, *settings)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stderr
    assert [line["loss"] for line in read_metrics(out / "metrics.jsonl")] == [
        line["loss"] for line in read_metrics(whole / "metrics.jsonl")
    ]
    for name in ("adapter", "model"):
        assert_same_files(out / name, whole / name)

    # The last checkpoint gives the same, its base read and quantized again.
    done = command_line("export", whole, tmp_path / "exported", "--step", "8")
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "exported" / "adapter", whole / "adapter")
    shutil.rmtree(tmp_path / "exported" / "adapter")
    assert_same_files(tmp_path / "exported", whole / "model")

    written = json.loads((whole / "adapter" / peft.CONFIG).read_text())
    assert (written["r"], written["base_model_name_or_path"]) == (4, str(base))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, whole / "model"))
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert moved and all(re.search(r"_proj\.weight$|visual\.merger\.", name) for name in moved)
    if storage == "none":
        joined = qv.QwenVL.from_pretrained(base, dtype="float32", adapter=whole / "adapter")
        joined.save_pretrained(tmp_path / "joined")
        for name, value in load_file(tmp_path / "joined" / "model.safetensors").items():
            np.testing.assert_allclose(value, after[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_a_base_that_changed_is_told(run, tmp_path):
    """A checkpoint holds what learns; continued beside other weights, its adapters would mean nothing."""
    config, base, settings = run
    mine = shutil.copytree(base, tmp_path / "base")
    settings = (settings[0], mine, *settings[2:])
    out = tmp_path / "out"
    assert killed("SIGKILL:step:6", config, out, *settings).returncode == -signal.SIGKILL
    tensors = load_file(mine / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: np.ascontiguousarray(tensors[name][::-1])}, mine / "model.safetensors")
    refused = command_line("train", config, "--out", out, *settings)
    assert refused.returncode == 2
    assert "not those that the run began with" in refused.stderr
    save_file(tensors, mine / "model.safetensors")
    assert command_line("train", config, "--out", out, *settings).returncode == 0
