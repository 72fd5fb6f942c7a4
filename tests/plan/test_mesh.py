"""The mesh that a slice gets by the rule, and one given by hand."""

import dataclasses

import pytest

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan.mesh import check, chosen, estimate, layouts
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train import recipes
from qwenvl_jax.train.config import MeshConfig

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


def test_the_rule_takes_the_fewest_microbatches_that_are_estimated_to_fit():
    stage, model, slice_ = recipes.s1(), PRESETS["qwen3_vl_8b"], Topology.named("v5e:16x16")
    layout = chosen(stage, model, slice_)
    room = 0.7 * slice_.hardware.hbm
    assert estimate(layout, stage, model, slice_) <= room
    fewer = [one for one in layouts(stage, model, slice_) if one.microbatches < layout.microbatches]
    assert fewer and all(estimate(one, stage, model, slice_) > room for one in fewer)
    large = chosen(stage, model, Topology.named("v5p:8x8x8"))
    assert (large.microbatches, large.mesh.fsdp, large.mesh.context, large.mesh.tensor) == (1, 256, 2, 1)


def test_more_kept_is_estimated_as_more():
    stage, model, slice_ = recipes.s1(), PRESETS["qwen3_vl_8b"], Topology.named("v5p:8x8x8")
    layout = chosen(stage, model, slice_)
    remats = ["offload", "full", "attention", "products", "products_attention", "none"]
    sizes = [estimate(dataclasses.replace(layout, remat=remat), stage, model, slice_) for remat in remats]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_arguments_for_the_command_line():
    layout = chosen(recipes.s1(), PRESETS["qwen3_vl_30b_a3b"], Topology.named("v5p:8x8x8"))
    assert layout.arguments() == (
        "--mesh.fsdp 32 --mesh.expert 8 --mesh.context 2 --mesh.rules zero --microbatches 1 --remat full"
    )


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
