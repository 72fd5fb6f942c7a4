"""Where weights live, and that a model split over eight devices computes what one device computes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.parallel.mesh import make_mesh, single_device_mesh, with_all_axes
from qwenvl_jax.parallel.placement import Execution, shard_batch
from qwenvl_jax.parallel.rules import DEFAULT_RULES, make_rules, param_shardings, partition_spec
from qwenvl_jax.train.config import MeshConfig, StageConfig, TrainConfig
from qwenvl_jax.train.devices import attention_notes, mesh_of
from qwenvl_jax.train.loop import train
from tests.checkpoint.shape import GENERATIONS


def test_a_collision_names_the_weight_and_both_axes():
    mesh = make_mesh(fsdp=4, tensor=2)
    with pytest.raises(ConfigError, match=r"layers\.q\.kernel.*'embed'.*'heads'.*'tensor'"):
        partition_spec("layers.q.kernel", (8, 8), ("embed", "heads"), mesh, DEFAULT_RULES | {"embed": "tensor"})


def test_a_size_that_does_not_divide_names_the_weight_and_the_axis():
    with pytest.raises(ConfigError, match=r"head\.kernel.*'vocab' of size 9.*2 ways.*tensor"):
        partition_spec("head.kernel", (8, 9), ("embed", "vocab"), make_mesh(fsdp=4, tensor=2), DEFAULT_RULES)


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match="no sharding rule for its axis 'colour'"):
        partition_spec("x", (8,), ("colour",), single_device_mesh(), DEFAULT_RULES)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ConfigError, match="needs 6 devices, but there are 8"):
        make_mesh(fsdp=3, tensor=2)
    with pytest.raises(ConfigError, match="unknown mesh axis 'model'"):
        make_mesh(model=8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_some_axes_is_one_of_all(kind):
    """Its axes in any order, and of any kind; what lies along each stays."""
    devices = np.asarray(jax.devices()[:6])
    wanted = make_mesh(list(devices), fsdp=2, tensor=3)
    assert with_all_axes(wanted) is wanted
    assert with_all_axes(Mesh(devices.reshape(2, 3), ("fsdp", "tensor"), axis_types=(kind,) * 2)) == wanted
    assert with_all_axes(Mesh(devices.reshape(2, 3).T, ("tensor", "fsdp"), axis_types=(kind,) * 2)) == wanted
    with pytest.raises(ConfigError, match=r"mesh \{'fsdp': 2, 'model': 3\}: unknown axis 'model'; the axes are data, "):
        with_all_axes(Mesh(devices.reshape(2, 3), ("fsdp", "model"), axis_types=(kind,) * 2))


def test_a_model_is_loaded_onto_a_mesh_of_one_axis(tiny_checkpoint):
    """As `jax.make_mesh` makes one."""
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("fsdp",), devices=devices)
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype="float32", mesh=mesh)
    assert model.execution.mesh == make_mesh(devices, fsdp=2)
    kernels = [kernel for kernel in jax.tree.leaves(nnx.state(model)) if not kernel.sharding.is_fully_replicated]
    assert kernels and all(kernel.sharding.mesh == model.execution.mesh for kernel in kernels)
    with pytest.raises(ConfigError, match="unknown axis 'model'"):
        QwenVL.from_pretrained(tiny_checkpoint, mesh=jax.make_mesh((2,), ("model",), devices=devices))


def test_a_batch_that_the_data_axes_do_not_divide_is_refused(mixed_batch):
    with pytest.raises(ConfigError, match="which data \\* fsdp \\* expert = 4 devices do not divide"):
        shard_batch(jax.tree.map(lambda x: x[:1], mixed_batch), make_mesh(fsdp=4, tensor=2))


@pytest.mark.slow
def test_split_over_eight_devices_it_computes_the_same(even_config, mixed_batch):
    model = QwenVL(even_config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def loss(state, batch):
        logits = nnx.merge(graph, state)(batch)
        return jax.numpy.mean(jax.nn.logsumexp(logits, axis=-1)), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, wanted), wanted_gradients = run(state, mixed_batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(state, param_shardings(state, mesh))
    kernel = placed["text"]["layers"]["mlp"]["gate"]["kernel"].get_value()
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 2, kernel.shape[2] // 2)
    (_, got), gradients = run(placed, shard_batch(mixed_batch, mesh))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()) + 1e-9)


@pytest.fixture
def even_config():
    """A shape that every mesh axis divides."""
    from tests.checkpoint.shape import TINY

    text = dataclasses.replace(
        TINY.text, vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    vision = dataclasses.replace(TINY.vision, hidden_size=32, intermediate_size=40, num_heads=2, out_hidden_size=32)
    return dataclasses.replace(TINY, text=text, vision=vision)


@pytest.fixture
def mixed_batch(even_config):
    """Four rows in four groups: each has one picture of another size, two samples, and padding."""
    from qwenvl_jax.data.collate import collate
    from qwenvl_jax.data.sample import Media, Sample

    rng, vision = np.random.default_rng(0), even_config.vision
    unit = vision.spatial_merge_size**2

    def sample(n, grid):
        count = grid[0] * grid[1] * grid[2]
        index = np.full(n, -1, np.int32)
        index[2 : 2 + count // unit] = np.arange(count // unit)
        tokens = rng.integers(0, 60, n, dtype=np.int32)
        positions = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
        patches = rng.integers(0, 256, (count, vision.patch_dim), dtype=np.uint8)
        return Sample(tokens, positions, tokens, np.ones(n, np.float32), index, (Media("image", patches, grid),))

    rows = [[sample(12, (1, 2, 2 * r + 2)), sample(9 + r, (1, 4, 2))] for r in range(4)]
    table = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(3, 0)
    return collate(rows, length=32, pixel_table=table, groups=4, vision_shape=((2, 16),), pad_token_id=0)


def test_a_table_is_chosen_by_name_and_changed_by_rule():
    assert make_rules("fsdp_tensor") == DEFAULT_RULES
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    weight = ("layers.k.kernel", (8, 4), ("embed", "kv_heads"), mesh)
    assert partition_spec(*weight, make_rules("fsdp_tensor")) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(*weight, make_rules("zero")) == PartitionSpec(("fsdp", "context"), "tensor")
    assert partition_spec(*weight, make_rules("replicated")) == PartitionSpec(None, "tensor")
    changed = make_rules("zero", ("kv_heads=", "embed=context"))
    assert partition_spec(*weight, changed) == PartitionSpec("context", None)


@pytest.mark.parametrize(
    ("table", "rules", "told"),
    [
        ("zerro", (), "unknown sharding rules 'zerro'; the tables are fsdp_tensor, zero, replicated"),
        ("zero", ("colour=fsdp",), "'colour=fsdp': expected axis=mesh axes"),
        ("zero", ("embed",), "'embed': expected axis=mesh axes"),
        ("zero", ("embed=fsdp+model",), "unknown mesh axis 'model'"),
    ],
)
def test_rules_that_name_nothing_are_refused(table, rules, told):
    with pytest.raises(ConfigError, match=told):
        make_rules(table, rules)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("vocab=tensor+context", "vocab=tensor\\+context and tokens=context .* mesh axis 'context'"),
        ("vocab=fsdp", "vocab=fsdp and batch=fsdp .* mesh axis 'fsdp'"),
        ("expert_mlp=tensor+context", "expert_mlp=tensor\\+context and tokens=context .* mesh axis 'context'"),
        ("heads=context", "heads=context and tokens=context"),
        ("vision_rows=fsdp", "groups=fsdp and vision_rows=fsdp"),
    ],
)
def test_a_mesh_axis_that_would_split_tokens_and_something_else_is_refused(rule, told):
    """Sums over the vocabulary or over an expert's width would add up what devices have of different tokens."""
    rules = make_rules("fsdp_tensor", (rule,))
    with pytest.raises(ConfigError, match=told):
        Execution(make_mesh(fsdp=2, context=2, tensor=2), rules)
    mesh = make_mesh(data=4, tensor=2)  # where the axis splits nothing, so does the rule
    assert Execution(mesh, rules).split("tokens") == 1


def test_the_mesh_of_a_run_takes_rules_and_checks_every_stage(tmp_path):
    """Rows, groups, tokens and vision rows that the mesh does not divide, before anything is read."""

    def config(mesh: MeshConfig, **batch) -> TrainConfig:
        shape = BatchShape(**({"rows": 8, "groups": 8, "length": 64, "vision": ((4, 16),)} | batch))
        stage = StageConfig(name="s", steps=1, batch=shape)
        return TrainConfig(model="m", stages=(stage,), processor="p", mesh=mesh)

    mesh, rules = mesh_of(config(MeshConfig(fsdp=2, context=2, tensor=2, rules="zero", override=("vocab=",))))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "context": 2, "tensor": 2}
    assert rules["vocab"] == () and rules["embed"] == ("fsdp", "expert", "context")
    for mesh_config, batch, told in (
        (MeshConfig(), {"rows": 4, "groups": 4}, r"batch.rows=4 and batch.groups=4 must be multiples of 8"),
        (MeshConfig(fsdp=2, context=4), {"length": 60}, r"batch.length=60 must be a multiple of 8, two chunks"),
        (MeshConfig(fsdp=2, tensor=4), {"vision": ((6, 16),)}, r"must have multiples of 4 rows"),
    ):
        with pytest.raises(ConfigError, match=f"stage s: .*{told}"):
            mesh_of(config(mesh_config, **batch))
    stages = tuple(dataclasses.replace(stage, attention="cudnn") for stage in config(MeshConfig()).stages)
    with pytest.raises(ConfigError, match="cudnn wants an NVIDIA GPU and dtype=bfloat16, and this run has cpu"):
        mesh_of(dataclasses.replace(config(MeshConfig()), stages=stages))


def test_rows_that_the_kernel_for_tpus_does_not_take_are_refused_or_told(monkeypatch):
    """Split over `context` it wants two chunks of 128 for each device; whole rows it fills up by itself."""
    monkeypatch.setattr(Execution, "platform", "tpu")

    def config(attention: str, length: int, **sizes: int) -> TrainConfig:
        batch = BatchShape(rows=8, groups=8, length=length, vision=((4, 16),))
        stage = StageConfig(name="s", steps=1, batch=batch, attention=attention)
        return TrainConfig(model="m", stages=(stage,), processor="p", mesh=MeshConfig(**sizes))

    told = "batch.length=1280 is no multiple of 1024, two chunks of 128 for each device of mesh.context"
    with pytest.raises(ConfigError, match=f"stage s: attention=splash: {told}; change one of them"):
        mesh_of(config("splash", 1280, fsdp=2, context=4))
    for attention, length, sizes, notes in (
        ("auto", 1280, {"fsdp": 2, "context": 4}, 1),
        ("auto", 1024, {"fsdp": 2, "context": 4}, 0),
        ("splash", 1024, {"fsdp": 2, "context": 4}, 0),
        ("plain", 1280, {"fsdp": 2, "context": 4}, 0),
        ("auto", 1000, {"fsdp": 8}, 0),
    ):
        run = config(attention, length, **sizes)
        found = attention_notes(run, *mesh_of(run))
        assert len(found) == notes and all(told in note for note in found)


def test_a_run_says_so_before_it_reads_anything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Execution, "platform", "tpu")
    stage = StageConfig(name="s", steps=1, batch=BatchShape(rows=4, groups=4, length=320, vision=((4, 16),)))
    mesh, missing = MeshConfig(fsdp=4, context=2), str(tmp_path / "missing")
    config = TrainConfig(model=GENERATIONS["qwen3_vl"], stages=(stage,), processor=missing, mesh=mesh)
    with pytest.raises(QwenVLError, match=missing):
        train(config, tmp_path / "run")
    told = (
        "stage s: plain attention, which takes far more memory than the TPU's kernel: batch.length=320 is no multiple"
    )
    assert told in capsys.readouterr().err
