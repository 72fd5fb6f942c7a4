"""What a compiled step holds and moves, on slices of TPUs that need not be there and on eight CPU devices."""

import dataclasses
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import StageConfig
from tests.parallel.compiled import collectives, compile_step, slices_along, step_on_slice, trace_step, whole_on_slice
from tests.parallel.meshed import even_config
from tools.golden_plans import small_model

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)


def few_layers(name: str, layers: int = 2):
    """A public model with its widths and few layers."""
    config = PRESETS[name]
    taps = tuple(range(min(len(config.vision.deepstack_visual_indexes), layers)))
    full = (layers - 1,) if config.vision.fullatt_block_indexes else ()
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_hidden_layers=layers, vocab_size=4096),
        vision=dataclasses.replace(
            config.vision, depth=layers, deepstack_visual_indexes=taps, fullatt_block_indexes=full
        ),
    )


def narrow(name: str):
    """The same, an eighth as wide with heads of the public width: for what compiles to the end, code and all."""
    config = few_layers(name)
    text, vision, width = config.text, config.vision, config.vision.hidden_size // config.vision.num_heads
    moe = text.moe and dataclasses.replace(text.moe, num_experts=16, moe_intermediate_size=128)
    return dataclasses.replace(
        config,
        text=dataclasses.replace(
            text, hidden_size=512, intermediate_size=768, num_attention_heads=8, num_key_value_heads=2, moe=moe
        ),
        vision=dataclasses.replace(
            vision, hidden_size=4 * width, num_heads=4, intermediate_size=640, out_hidden_size=512
        ),
    )


def across_groups(program: str, mesh, features: set[int], tokens=frozenset(), widths=frozenset()):
    """Collectives that join devices of different vision groups and hold something with one of the sizes of features,
    or add up something with a size of tokens beside a width: each device what it has for the tokens of all.

    Sums of no more than a row of a group are gradients of weights on their way: they tell no group from another.
    """
    coordinates = np.arange(mesh.size).reshape(mesh.devices.shape)
    shares = np.empty(mesh.size, int)
    parts = int(np.prod(mesh.devices.shape[:3]))
    shares[coordinates.reshape(parts, -1)] = np.arange(parts)[:, None]
    for one in collectives(program):
        shapes = [shape for shape in one.shapes if features & set(shape)]
        held = any(one.kind != "all-reduce" or len(shape) > 2 for shape in shapes)
        added = one.kind in ("all-reduce", "reduce-scatter")
        added = added and any(tokens & set(shape) and widths & set(shape) for shape in one.shapes)
        if (held or added) and any(len({shares[device] for device in group}) > 1 for group in one.groups):
            yield one


# 502 merged tokens, from two rows of 1004 patches: no weight has such a size.
VISION, FEATURES = ((2, 1004),), {502, 251, 1004, 2 * 502, 4 * 502, 8 * 502}
# Rows of 520 tokens, on one device, on two, or those of all; parts of the width of `even_config`.
LENGTH, TOKENS, WIDTHS = 520, {520, 260, 4 * 260, 4 * 520, 8 * 520}, {32, 16, 8, 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "rules"),
    [
        ("qwen3_vl", {"fsdp": 8}, "fsdp_tensor"),
        ("qwen3_vl", {"fsdp": 4, "tensor": 2}, "fsdp_tensor"),
        ("qwen3_vl", {"data": 2, "fsdp": 2, "context": 2}, "fsdp_tensor"),
        ("qwen3_vl", {"fsdp": 4, "context": 2}, "zero"),
        ("qwen3_vl_moe", {"fsdp": 2, "expert": 2, "tensor": 2}, "fsdp_tensor"),
        ("qwen3_vl_moe", {"fsdp": 2, "expert": 2, "context": 2}, "zero"),
    ],
)
def test_no_device_sees_the_features_of_another_group(name, sizes, rules):
    mesh = make_mesh(jax.devices()[:8], **sizes)
    program = compile_step(even_config(name), mesh, rules=rules, dtype="float32", length=LENGTH, vision=VISION)
    text = program.as_text()
    assert len(collectives(text)) > 10
    assert list(across_groups(text, mesh, FEATURES, TOKENS, WIDTHS)) == []


@pytest.mark.parametrize("masked", [False, True])
def test_a_look_at_the_features_of_other_groups_is_seen(masked):
    """Features gathered from every group, and each device's own at the tokens of all, added up."""
    mesh = make_mesh(jax.devices()[:8], fsdp=8)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def read(features_GMH, index_BT):
        features = features_GMH.reshape(-1, features_GMH.shape[-1])
        if not masked:
            return jnp.take(features, index_BT, axis=0)

        def own(part, index):
            index = jax.lax.all_gather(index, "fsdp", tiled=True) - jax.lax.axis_index("fsdp") * len(part)
            there = (index >= 0) & (index < len(part))
            found = jnp.where(there[..., None], jnp.take(part, jnp.where(there, index, 0), axis=0), 0.0)
            return jax.lax.psum_scatter(found, "fsdp", tiled=True)

        spec = PartitionSpec("fsdp")
        return jax.shard_map(own, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(features, index_BT)

    shapes = ((8, 502, 32), jnp.float32), ((8, LENGTH), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=rows) for shape in shapes]
    text = jax.jit(read, out_shardings=rows).lower(*arguments).compile().as_text()
    assert list(across_groups(text, mesh, FEATURES, TOKENS, WIDTHS))
    if masked:
        assert list(across_groups(text, mesh, FEATURES)) == []


@needs_libtpu
@pytest.mark.slow
def test_no_device_of_a_tpu_slice_sees_the_features_of_another_group():
    sizes = {"fsdp": 4, "tensor": 2}
    mesh = make_mesh(jax.devices()[:8], **sizes)
    text = whole_on_slice(narrow("qwen3_vl_2b"), "v5e:2x4", sizes, read=True, length=512, vision=VISION).text
    assert len(collectives(text)) > 10
    assert list(across_groups(text, mesh, FEATURES)) == []


@needs_libtpu
@pytest.mark.slow
def test_temporaries_do_not_grow_with_the_slice():
    """The same work on each of 8 and of 256 devices, with 32 copies of the weights and with one."""

    model = few_layers("qwen3_vl_2b")
    small = step_on_slice(model, "v5e:2x4", fsdp=8).temporaries
    assert step_on_slice(model, "v5e:16x16", data=32, fsdp=8).temporaries <= 1.05 * small
    assert step_on_slice(model, "v5e:16x16", fsdp=256).temporaries <= 1.05 * small


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "settings"),
    [
        ("qwen2_vl_2b", {"fsdp": 8}, {}),
        ("qwen2_5_vl_3b", {"fsdp": 4, "tensor": 2}, {}),
        ("qwen3_vl_4b", {"fsdp": 2, "context": 2, "tensor": 2}, {"length": 4096, "vision": ((4, 512),)}),
    ],
)
def test_every_generation_compiles_for_tpus(name, sizes, settings):
    """With the Pallas kernel, which CPU programs do not have."""
    found = whole_on_slice(narrow(name), "v5p:2x2x2", sizes, **settings)
    assert 0 < found.temporaries < 2 * 2**30 and found.code > 0


@needs_libtpu
@pytest.mark.slow
def test_experts_compile_for_tpus():
    """With the experts' ragged exchange; tests/plan/test_golden.py compiles a smaller model with experts to the end."""
    found = step_on_slice(narrow("qwen3_vl_30b_a3b"), "v5p:2x2x2", fsdp=2, expert=4)
    assert 0 < found.temporaries < 2 * 2**30


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}])
def test_attention_by_cudnn_is_lowered_for_gpus(monkeypatch, sizes):
    """The tower's and the decoder's, forward, again for the backward pass, and backward; no device need be there."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    stage = StageConfig(name="s", steps=10, remat="full", attention="cudnn")
    traced = trace_step(even_config("qwen3_vl"), make_mesh(jax.devices()[:4], **sizes), stage=stage, length=128)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (program.count(f"@__cudnn$fmhaScaleBiasSoftmax{kind}(") for kind in ("", "Backward"))
    # Two blocks for each half of a row over `context`.
    assert backward >= 2 and forward == 2 * backward


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_microbatches_compile_for_tpus(experts):
    """Twice the rows in two parts take little more memory than one of them: the sums of gradients, in eight parts."""
    one, two = (
        step_on_slice(small_model(experts), "v5p:2x2x2", stage=StageConfig(name="s", steps=10, microbatches=n), fsdp=8)
        for n in (1, 2)
    )
    assert two.temporaries <= 1.2 * one.temporaries


@needs_libtpu
@pytest.mark.slow
def test_activations_are_kept_in_the_host_s_memory():
    def host_bytes(remat):
        stage = StageConfig(name="s", steps=10, remat=remat)
        return step_on_slice(few_layers("qwen3_vl_2b", 4), "v5e:2x4", stage=stage, length=4096, fsdp=8).host

    # The input of each of four layers: 4096 tokens of 2048 values in two bytes.
    assert host_bytes("offload") >= 4 * 4096 * 2048 * 2 > host_bytes("full") == 0


@needs_libtpu
@pytest.mark.slow
def test_slices_are_laid_out_with_the_slow_network_outermost():
    assert slices_along("v5e:2x4", 2, 0, {"data": 2, "fsdp": 4, "tensor": 2}) == [1, 1]
    assert slices_along("v5e:2x4", 2, 1, {"fsdp": 8, "tensor": 2}) == [1, 1]


@needs_libtpu
@pytest.mark.slow
def test_a_row_of_262144_tokens_compiles_for_a_slice():
    """Four layers of the 8B, sixteen devices along `context`, with videos of 65,536 patches."""
    model = few_layers("qwen3_vl_8b", 4)
    found = step_on_slice(model, "v5p:4x4x4", length=262_144, vision=((16, 4096),), fsdp=4, context=16)
    assert found.temporaries + found.arguments < 30 * 2**30
