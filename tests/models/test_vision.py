"""What windows save in the tower: compiled FLOPs, exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.batch import VisionRows
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.models.pretrained import abstract
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.presets import preset

# The public tower of Qwen2.5-VL, a quarter of its layers: seven of eight attend within windows.
CONFIG = preset("qwen2_5_vl_7b")
TOWER = dataclasses.replace(CONFIG.vision, depth=8, fullatt_block_indexes=(7,))
CONFIG = dataclasses.replace(CONFIG, vision=TOWER, text=dataclasses.replace(CONFIG.text, num_hidden_layers=1))


def rows_of(patches: int, windows: bool = True) -> VisionRows:
    """Shapes of one image of so many patches."""

    def shape(*rest, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((1, 1, patches, *rest), dtype)

    table = jax.ShapeDtypeStruct((1, 3, 256), jnp.float32)
    rows = VisionRows(shape(1176, dtype=jnp.uint8), shape(2), shape(2), shape(), shape(), table)
    return dataclasses.replace(rows, windows=shape()) if windows else rows


def tower_flops(config, patches: int) -> float:
    graph, state = abstract(config, jnp.bfloat16)

    def run(state, rows):
        # Written out: the cost of a loop would be counted once.
        return nnx.merge(graph, state).vision(rows, jnp.bfloat16, Execution(unroll=True))

    return jax.jit(run).lower(state, rows_of(patches)).compile().cost_analysis()["flops"]


def test_four_times_the_patches_cost_little_more_than_four_times():
    """1024 and 4096 patches are images of 448 and 896 pixels to the side."""
    ratio = tower_flops(CONFIG, 4096) / tower_flops(CONFIG, 1024)
    assert 4.0 <= ratio <= 4.2
    everywhere = dataclasses.replace(CONFIG, vision=dataclasses.replace(TOWER, fullatt_block_indexes=tuple(range(8))))
    assert tower_flops(everywhere, 4096) / tower_flops(everywhere, 1024) > 4.4


def test_a_batch_without_windows_is_refused():
    graph, state = abstract(CONFIG, jnp.float32)
    with pytest.raises(ConfigError, match=r"the batch has no attention windows, but vision\.window_size=112"):
        jax.eval_shape(
            lambda s, rows: nnx.merge(graph, s).vision(rows, jnp.float32, Execution()),
            state,
            rows_of(64, windows=False),
        )


def test_quick_gelu():
    from qwenvl_jax.models.vision import ACTIVATIONS

    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
