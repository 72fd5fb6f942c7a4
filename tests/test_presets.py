"""Presets against the parameter counts of the public checkpoints."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qwenvl_jax.checkpoint import hf
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.models.pretrained import abstract
from qwenvl_jax.presets import PRESETS, preset

# Parameters in all, and of the tower with its mergers, counted with the reference; a tied head counts once.
PUBLIC = {
    "qwen3_vl_2b": (2_127_532_032, 406_957_056),
    "qwen3_vl_4b": (4_437_815_808, 415_347_712),
    "qwen3_vl_8b": (8_767_123_696, 576_388_336),
    "qwen3_vl_32b": (33_357_390_064, 595_266_800),
}


def test_every_preset_has_a_known_count():
    assert set(PRESETS) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_counts_of_table_and_model(name):
    config = preset(name)
    assert hf.parameter_count(config) == PUBLIC[name]
    _, state = abstract(config, jnp.bfloat16)
    sizes = {key[0]: 0 for key, _ in nnx.to_flat_state(state)}
    for key, variable in nnx.to_flat_state(state):
        assert isinstance(variable.get_value(), jax.ShapeDtypeStruct)
        sizes[key[0]] += variable.get_value().size
    vision = sizes["vision"] + sizes["merger"] + sizes["deepstack"]
    assert (sum(sizes.values()), vision) == PUBLIC[name]


def test_unknown_preset_suggests():
    with pytest.raises(ConfigError, match="did you mean 'qwen3_vl_4b'"):
        preset("qwen3_vl_4B")
