"""A training step on every mesh of eight devices gives what one device gives, for every generation."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.ops.router import balance_loss
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.program import abstract_batch
from qwenvl_jax.train.step import make_execution, microbatches
from tests.checkpoint.shape import GENERATIONS
from tests.parallel.meshed import ROWS, assert_same, drawn, even_config, everything, outcome, parts_on
from tests.support import MODEL_TYPES

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "context": {"fsdp": 2, "context": 4},
    "expert": {"data": 2, "expert": 4},
    "fsdp+tensor": {"fsdp": 4, "tensor": 2},
    "context+tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "fsdp+expert": {"fsdp": 2, "expert": 4},
    "expert+tensor": {"data": 2, "expert": 2, "tensor": 2},
    "expert+context": {"fsdp": 2, "expert": 2, "context": 2},
    "data+fsdp+tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
HALVES = (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
FAST = {("qwen3_vl", "context+tensor"), ("qwen3_vl_moe", "expert+tensor")}


@functools.cache
def alone(generation: str, **settings):
    """What one device computes."""
    config = even_config(generation)
    return outcome(parts_on(config), everything(config), **settings)


@pytest.fixture(autouse=True)
def _promotes(optax_promotes):
    pass


@pytest.mark.parametrize(
    ("generation", "sizes"),
    [
        pytest.param(g, sizes, id=f"{g}-{name}", marks=[] if (g, name) in FAST else [pytest.mark.slow])
        for g in MODEL_TYPES
        for name, sizes in MESHES.items()
    ],
)
def test_every_mesh_computes_what_one_device_does(generation, sizes):
    config = even_config(generation)
    moe = {"router_balance": 0.1, "router_z": 0.01} if config.text.moe else {}
    assert_same(outcome(parts_on(config, **sizes), everything(config), **moe), alone(generation, **moe))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["zero", "replicated"])
@pytest.mark.parametrize("generation", ["qwen3_vl", "qwen3_vl_moe"])
def test_every_table_of_rules_computes_the_same(generation, table):
    config = even_config(generation)
    parts = parts_on(config, table, fsdp=2, expert=2, context=2)
    assert_same(outcome(parts, everything(config)), alone(generation))
    kernel = parts.shardings["text.layers.attn.q.kernel"].spec
    assert kernel[1] == {"zero": ("fsdp", "expert", "context"), "replicated": None}[table]


@pytest.mark.slow
def test_stretched_positions_a_tied_table_and_windows_in_long_rows_compute_the_same():
    """YaRN where rows are split over `context`; a table in eight parts that is looked up and projects; rows of 64
    patches, whose windows of 16 are compared with their neighbours alone."""
    config, long = even_config("qwen2_5_vl_yarn"), ((2, 64),)
    span = (config.vision.window_cells * config.vision.spatial_merge_size) ** 2
    assert config.text.rope.yarn and config.text.tie_word_embeddings and 3 * span < 64
    parts = parts_on(config, "zero", ("vision_rows=context",), fsdp=2, context=2, tensor=2)
    batch = everything(config, vision_shape=long)
    assert parts.shardings["text.embed.table"].spec == PartitionSpec("tensor", ("fsdp", "context"))
    assert_same(outcome(parts, batch), outcome(parts_on(config), batch))


@pytest.mark.slow
def test_heads_of_keys_may_be_fewer_than_devices_of_tensor():
    config = even_config("qwen3_vl")
    for sizes in ({"data": 2, "tensor": 4}, {"context": 2, "tensor": 4}):
        parts = parts_on(config, override=("kv_heads=", "vision_rows="), **sizes)
        assert_same(outcome(parts, everything(config)), alone("qwen3_vl"))


def test_rows_that_a_rule_leaves_whole_stay_in_their_order():
    """Slots are reordered for the devices that they are split over, which along `context` a rule may make none."""
    config, stage = even_config("qwen3_vl"), StageConfig(name="s", steps=1)
    assert make_execution(parts_on(config, context=2), stage).balanced
    assert not make_execution(parts_on(config, override=("tokens=",), context=2), stage).balanced


@pytest.mark.slow
def test_rows_whole_along_context_compute_the_same():
    config = even_config("qwen3_vl")
    parts = parts_on(config, override=("tokens=",), fsdp=2, context=2)
    assert_same(outcome(parts, everything(config)), alone("qwen3_vl"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}])
def test_eight_rows_at_once_and_four_times_two_agree(sizes):
    config = even_config("qwen3_vl")
    assert_same(outcome(parts_on(config, **sizes), everything(config), microbatches=4), alone("qwen3_vl"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "expert": 2}])
def test_with_experts_microbatches_agree_but_for_the_balance(sizes):
    """The z-loss is a mean over all tokens of the batch, whatever weights they have in the loss."""

    def but_balance(found):
        return dataclasses.replace(found, sums={k: v for k, v in found.sums.items() if k != "router_balance"})

    config, z = even_config("qwen3_vl_moe"), {"router_z": 0.5}
    got = outcome(parts_on(config, **sizes), everything(config), microbatches=2, **z)
    assert_same(but_balance(got), but_balance(alone("qwen3_vl_moe", **z)))


@pytest.mark.slow
def test_the_balance_of_microbatches_is_the_mean_of_theirs_by_tokens():
    config = even_config("qwen3_vl_moe")
    parts, batch = parts_on(config), everything(config)
    load_of = jax.jit(lambda params, batch: parts.merge(params).hidden_and_load(batch)[1])
    loads = [load_of(drawn(config), jax.tree.map(lambda x, half=half: x[half], batch)) for half in HALVES]
    tokens, balances = (np.asarray(list(map(f, loads))) for f in (lambda load: load["tokens"][0], balance_loss))
    wanted, whole = tokens @ balances / tokens.sum(), balance_loss(jax.tree.map(np.add, *loads))
    assert tokens[0] != tokens[1] and whole < wanted - 5e-3
    got = outcome(parts, batch, microbatches=2, router_balance=0.1).sums["router_balance"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "products", "products_attention", "offload"])
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_what_is_kept_for_the_backward_pass_changes_nothing(remat, sizes):
    config = even_config("qwen3_vl")
    assert_same(outcome(parts_on(config, **sizes), everything(config), remat=remat), alone("qwen3_vl"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}])
def test_the_kernel_for_tpus_computes_the_same(sizes):
    """In Pallas's interpreter; rows of 512, two chunks of 128 for each of two devices."""
    config = even_config("qwen3_vl")
    batch = everything(config, rows=4, groups=4, length=512)
    wanted = outcome(parts_on(config), batch)
    assert_same(outcome(parts_on(config, **sizes), batch, attention="splash"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_first_weights_are_the_same_on_every_mesh(generation, sizes):
    config = even_config(generation)
    made, wanted = parts_on(config, **sizes).random(1), drawn(config)
    for name, value in made.items():
        np.testing.assert_allclose(np.asarray(value), wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_generations_are_all_there():
    assert set(MODEL_TYPES) <= set(GENERATIONS) and len(jax.devices()) >= 8
    assert np.prod(list(MESHES["context+tensor"].values())) == 8


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_devices_have_threads_to_spare():
    """See tests/conftest.py: all devices of this process could wait for one another otherwise."""
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    assert sum(name.startswith("tf_XLAEigen") for name in names) >= 8 * len(jax.devices())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "sizes"),
    [
        ("qwen3_vl", {"fsdp": 2, "tensor": 2}),
        ("qwen3_vl_moe", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("qwen2_5_vl", {"data": 2, "fsdp": 4}),
    ],
)
def test_one_prompt_on_a_mesh_is_answered_alike(generation, sizes):
    """Prefill and decoding of a single row, which no batch axis divides."""
    config = even_config(generation)
    prompt = jax.tree.map(lambda x: x[:1], everything(config, rows=4, groups=4))
    prompt = dataclasses.replace(prompt, segment_ids=np.minimum(prompt.segment_ids, 1))

    def answer(parts):
        model = parts.merge(
            {n: jax.device_put(np.asarray(v), parts.shardings[n]) for n, v in parts_on(config).random(1).items()}
        )
        model.execution = Execution(parts.mesh, parts.rules)
        graph, state = nnx.split(model)
        read = jax.jit(lambda state: nnx.merge(graph, state).prefill(prompt, prompt.tokens.shape[1] + 4))
        step = jax.jit(lambda state, tokens, cache: nnx.merge(graph, state).decode(tokens, cache))
        logits, cache = read(state)
        found = [np.asarray(logits)]
        for _ in range(3):
            logits, cache = step(state, jax.numpy.argmax(logits, axis=-1).astype(np.int32), cache)
            found.append(np.asarray(logits))
        return np.stack(found)

    wanted = answer(parts_on(config))
    np.testing.assert_allclose(answer(parts_on(config, **sizes)), wanted, atol=1e-5 * np.abs(wanted).max())


def test_microbatches_stay_where_the_batch_lies():
    """Patches too, which are split over `context` and `tensor`: of all parts together a device holds what it held."""
    config = even_config("qwen3_vl")
    execution = make_execution(parts_on(config, fsdp=2, context=2, tensor=2), StageConfig(name="s", steps=1))
    shape = BatchShape(rows=8, length=64, groups=8, vision=((4, 1024),))
    batch = abstract_batch(config, shape, execution)
    held = jax.jit(lambda batch: microbatches(batch, 2, execution)).lower(batch).compile().memory_analysis()
    assert held.output_size_in_bytes <= 1.01 * held.argument_size_in_bytes
    assert held.temp_size_in_bytes <= held.argument_size_in_bytes
