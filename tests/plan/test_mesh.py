"""The mesh that a slice gets by the rule, and one given by hand."""

import dataclasses
import functools
import importlib.util
import math

import pytest
from jax.sharding import AbstractMesh

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import AXES, make_mesh, single_device_mesh
from qwenvl_jax.parallel.placement import row_shares
from qwenvl_jax.parallel.rules import make_rules, partition_spec
from qwenvl_jax.plan.mesh import check, chosen, estimate, layouts
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train import recipes
from qwenvl_jax.train.config import MeshConfig
from qwenvl_jax.train.state import ModelParts, WeightInfo
from tests.parallel.compiled import apart, tpu_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)

STAGES = [recipes.s0(), recipes.s1(), recipes.s2(), recipes.s3()]
SLICES = ["v5e:16x16", "v6e:16x16", "v5p:8x8x8", "tpu7x:4x4x8"]
SIZES = [name for name in PRESETS if name.startswith("qwen3")]


@pytest.mark.parametrize("topology", SLICES)
@pytest.mark.parametrize("name", SIZES)
def test_the_rule_finds_a_mesh_that_divides(name, topology):
    for stage in STAGES:
        slice_ = Topology.named(topology)
        layout = chosen(stage, PRESETS[name], slice_)
        assert check(layout.mesh, layout.of_stage(stage), slice_) == layout.mesh
        assert layout.mesh.expert <= (8 if PRESETS[name].text.moe else 1)
        check_weights(PRESETS[name], layout.mesh)


def check_weights(model: QwenVLConfig, mesh: MeshConfig) -> None:
    """Refuses a mesh that some weight of the model cannot be split over."""
    sizes = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
    rules = make_rules(mesh.rules, mesh.override)
    for name, weight in weights_of(model).items():
        partition_spec(name, weight.shape, weight.axes, sizes, rules)


@functools.cache
def weights_of(model: QwenVLConfig) -> dict[str, WeightInfo]:
    return ModelParts(model, dtype="bfloat16", param_dtype="float32", mesh=single_device_mesh()).weights


def test_every_layout_that_is_tried_splits_every_weight():
    for name in SIZES:
        for topology in ("v5e:16x16", "v5p:8x8x8", "v5p:4x4x8"):
            for layout in layouts(recipes.s2(), PRESETS[name], Topology.named(topology)):
                check_weights(PRESETS[name], layout.mesh)


def test_text_alone_needs_no_groups():
    stage = dataclasses.replace(recipes.s1(), batch=BatchShape(rows=512, length=8192))
    slice_ = Topology.named("v5e:16x16")
    assert check(MeshConfig(fsdp=256), stage, slice_).fsdp == 256
    assert chosen(stage, PRESETS["qwen3_vl_2b"], slice_).mesh.context == 1
    with pytest.raises(ConfigError, match=r"= 512 does not divide batch.rows=256; these do: 1, 2, 4, .*, 256\."):
        small = dataclasses.replace(stage, microbatches=2, batch=BatchShape(rows=256, length=8192))
        check(MeshConfig(fsdp=256), small, slice_)


@needs_libtpu
@pytest.mark.slow
def test_processes_can_feed_every_mesh_that_the_rule_chooses():
    """Those of a slice have blocks of its devices, and not runs of a mesh axis that goes through several rows of it."""
    found = apart(refused_shares, SLICES)
    assert found == [], found[:3]


def refused_shares(topologies: list[str]) -> list[str]:
    """What `row_shares` says of the meshes that it refuses."""
    found = []
    for topology in topologies:
        devices, slice_ = tpu_devices(topology), Topology.named(topology)
        assert len({device.process_index for device in devices}) in (len(devices) // 4, len(devices) // 8)
        for model in (PRESETS[name] for name in SIZES):
            for mesh in {chosen(stage, model, slice_).mesh for stage in STAGES}:
                try:
                    made = make_mesh(devices, **{axis: getattr(mesh, axis) for axis in AXES})
                    row_shares(made, make_rules(mesh.rules, mesh.override))
                except ConfigError as error:
                    found.append(f"{topology} {mesh}: {error}")
    return found


def test_the_rule_takes_the_fewest_microbatches_that_are_estimated_to_fit():
    stage, model, slice_ = recipes.s1(), PRESETS["qwen3_vl_8b"], Topology.named("v5e:16x16")
    layout = chosen(stage, model, slice_)
    room = 0.7 * slice_.hardware.hbm
    assert estimate(layout, stage, model, slice_) <= room
    fewer = [one for one in layouts(stage, model, slice_) if one.microbatches < layout.microbatches]
    assert fewer and all(estimate(one, stage, model, slice_) > room for one in fewer)
    large = chosen(stage, model, Topology.named("v5p:8x8x8"))
    assert large.microbatches == 1
    # The tower is 1,152 wide, which 128 is the largest power of two to divide.
    assert large.mesh == MeshConfig(data=4, fsdp=64, context=2, rules="zero")


def test_short_rows_have_layouts():
    """Those too short for `context` are not split over it; the obvious way to a cell that compiles fast."""
    stage = dataclasses.replace(recipes.s1(), batch=BatchShape(rows=8, length=256, groups=8, vision=((4, 1024),)))
    for topology in ("v5e:1x1", "v5e:2x2"):
        mesh = chosen(stage, PRESETS["qwen3_vl_2b"], slice_ := Topology.named(topology)).mesh
        assert (mesh.context, mesh.data * mesh.fsdp * mesh.tensor) == (1, slice_.devices)


def test_microbatches_that_are_asked_for_are_the_fewest():
    stage, model, slice_ = recipes.s1(), PRESETS["qwen3_vl_2b"], Topology.named("v6e:16x16")
    assert chosen(stage, model, slice_).mesh.context == 1
    layout = chosen(dataclasses.replace(stage, microbatches=4), model, slice_)
    assert (layout.microbatches, layout.mesh.context) == (4, 4)
    check(layout.mesh, layout.of_stage(stage), slice_)
    odd = dataclasses.replace(stage, microbatches=3)
    with pytest.raises(ConfigError, match=r"no mesh divides .* with microbatches=3; give one"):
        chosen(odd, model, slice_)


def test_adapters_are_estimated_to_need_no_moments_of_the_weights():
    stage, model, slice_ = recipes.s1(), PRESETS["qwen3_vl_8b"], Topology.named("v6e:2x4")
    layout = chosen(stage, model, slice_)
    sizes = [estimate(layout, stage, model, slice_, adapters=adapters) for adapters in (False, True)]
    assert sizes[0] - sizes[1] > 11 * 8_700_000_000 // 8  # 12 bytes of each weight, in eight parts


def test_more_kept_is_estimated_as_more():
    stage, model, slice_ = recipes.s1(), PRESETS["qwen3_vl_8b"], Topology.named("v5p:8x8x8")
    layout = chosen(stage, model, slice_)
    remats = ["offload", "full", "attention", "products", "products_attention", "none"]
    sizes = [estimate(dataclasses.replace(layout, remat=remat), stage, model, slice_) for remat in remats]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_arguments_for_the_command_line():
    layout = chosen(recipes.s1(), PRESETS["qwen3_vl_30b_a3b"], Topology.named("v5p:8x8x8"))
    assert layout.arguments() == (
        "--mesh.data 4 --mesh.fsdp 8 --mesh.expert 8 --mesh.context 2 --mesh.rules zero --microbatches 1 --remat full"
    )


def test_a_model_too_large_for_copies_splits_its_tower_over_fewer_axes():
    model, slice_ = PRESETS["qwen3_vl_235b_a22b"], Topology.named("tpu7x:4x4x8")
    layout = chosen(recipes.s1(), model, slice_)
    assert (layout.mesh.data, layout.mesh.override) == (1, ("vision_embed=fsdp",))
    assert "--mesh.rules zero --mesh.override vision_embed=fsdp --microbatches" in layout.arguments()
    split = {axis: getattr(layout.mesh, axis) for axis in ("fsdp", "expert", "context")}
    assert model.vision.hidden_size % split["fsdp"] == 0 and model.vision.hidden_size % math.prod(split.values())


def test_a_batch_that_no_mesh_divides():
    stage = dataclasses.replace(recipes.s1(), batch=BatchShape(rows=3, length=8192, groups=3))
    with pytest.raises(ConfigError, match=r"no mesh divides batch.rows=3.* 256 devices of v5e:16x16"):
        chosen(stage, PRESETS["qwen3_vl_2b"], Topology.named("v5e:16x16"))


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(tensor=3), ["mesh.tensor=3", "256 devices of v5e:16x16", "1, 2, 4, 8, 16, 32, 64, 128, 256"]),
        (MeshConfig(fsdp=128, tensor=4), ["mesh.tensor=4", "the 2 devices", "these do: 1, 2."]),
        (MeshConfig(fsdp=128), ["128 devices", "has 256", "mesh.fsdp=256"]),
        (MeshConfig(data=0), ["mesh.data=0", "at least 1"]),
        (MeshConfig(context=2, fsdp=128), ["microbatches = 256", "batch.groups=128", "these do: 1, 2, 4"]),
    ],
)
def test_a_mesh_that_does_not_divide_says_what_would(mesh, words):
    stage = dataclasses.replace(recipes.s0(), microbatches=2)
    with pytest.raises(ConfigError) as error:
        check(mesh, stage, Topology.named("v5e:16x16"))
    assert all(word in str(error.value) for word in words), error.value


def test_fsdp_takes_what_is_left():
    assert check(MeshConfig(context=4), recipes.s0(), Topology.named("v5e:16x16")).fsdp == 64
