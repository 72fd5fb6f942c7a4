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
    "qwen2_vl_2b": (2_208_985_600, 665_271_296),
    "qwen2_vl_7b": (8_291_375_616, 675_759_104),
    "qwen2_vl_72b": (73_405_560_320, 699_356_672),
    "qwen2_5_vl_3b": (3_754_622_976, 668_684_288),
    "qwen2_5_vl_7b": (8_292_166_656, 676_550_144),
    "qwen2_5_vl_32b": (33_452_718_336, 688_841_984),
    "qwen2_5_vl_72b": (73_410_777_344, 704_573_696),
    "qwen3_vl_2b": (2_127_532_032, 406_957_056),
    "qwen3_vl_4b": (4_437_815_808, 415_347_712),
    "qwen3_vl_8b": (8_767_123_696, 576_388_336),
    "qwen3_vl_32b": (33_357_390_064, 595_266_800),
    "qwen3_vl_30b_a3b": (31_070_754_032, 538_631_408),
    "qwen3_vl_235b_a22b": (235_670_022_896, 576_388_336),
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
    vision = sizes["vision"] + sizes["merger"] + sizes.get("deepstack", 0)
    assert (sum(sizes.values()), vision) == PUBLIC[name]


def test_unknown_preset_suggests():
    with pytest.raises(ConfigError, match="did you mean 'qwen3_vl_4b'"):
        preset("qwen3_vl_4B")
