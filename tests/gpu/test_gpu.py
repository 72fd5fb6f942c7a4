"""What runs on a GPU computes what the CPU does.

    XLA_FLAGS=--xla_gpu_autotune_level=0 JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu

Without the flag XLA times kernels for each of many shapes, which takes longer than the tests. One process: they share
the GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.packed_attention import cudnn_attention, most_segments
from qwenvl_jax.parallel.placement import Execution
from tests.parallel.meshed import even_config, everything, outcome, parts_on
from tests.support import MODEL_TYPES

GPU = jax.devices()[0].platform == "gpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="there is no GPU here")]
ROW = 301
# Where samples of two rows stop, the first with padding after the last.
STOPS = ((17, 18, 100, 230, 281), (ROW,))


def segments_of(stops, length: int) -> np.ndarray:
    """i32[B, T]."""
    slots = np.arange(length)
    numbers = [np.searchsorted(one, slots, side="right") + 1 for one in stops]
    return np.stack([np.where(slots < one[-1], n, 0) for n, one in zip(numbers, stops, strict=True)]).astype(np.int32)


def differences(segments, heads: tuple[int, int], width: int, causal: bool) -> list[float]:
    """How far cuDNN's values and gradients are from plain attention in f32, each relative to the whole of them."""
    B, T = segments.shape
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal((B, T, n, width)) for n in (heads[0], heads[1], heads[1], heads[0])]

    def by_cudnn(q, k, v, s):
        return cudnn_attention(q, k, v, s, causal=causal, packed=Execution().packs)

    def plainly(q, k, v, s):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return attention(q, k, v, q_segments_BT=s, kv_segments_BS=s, causal=causal)

    def result(attend, device):
        q, k, v, g = (jax.device_put(x.astype(jnp.bfloat16), device) for x in drawn)
        numbers = jax.device_put(segments, device)

        def summed(q, k, v):
            there = (numbers > 0)[:, :, None, None].astype(jnp.float32)
            y = attend(q, k, v, numbers).astype(jnp.float32) * there
            return jnp.sum(y * g.astype(jnp.float32)), y

        (_, y), gradients = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return y, *gradients

    found, wanted = result(by_cudnn, jax.devices()[0]), result(plainly, jax.devices("cpu")[0])
    pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(found, wanted, strict=True)]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 128), ((4, 4), 64), ((4, 4), 72)])
def test_packed_rows_by_cudnn(heads, width, causal):
    """Odd numbers of slots, a sample of one slot, padding, grouped queries."""
    assert max(differences(segments_of(STOPS, ROW), heads, width, causal)) < 0.01


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_more_segments_than_the_kernel_has_room_for(causal):
    stops = np.arange(8, 513, 8)
    assert len(stops) > most_segments(1, 512, 4, 64, causal=causal)
    assert max(differences(segments_of([stops], 512), (4, 2), 64, causal)) < 0.01


@pytest.mark.parametrize("generation", MODEL_TYPES)
def test_a_step_of_each_generation_in_f32(generation, optax_promotes):
    """As on the CPU; sums in another order."""
    config = even_config(generation)
    batch = everything(config)
    with jax.default_matmul_precision("highest"):
        got = outcome(parts_on(config), batch)
    wanted = outcome(parts_on(config, devices=jax.devices("cpu")), batch)
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-5)
    for name, gradient in wanted.gradients.items():
        np.testing.assert_allclose(got.gradients[name], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("remat", ["none", "products_attention"])
@pytest.mark.parametrize("generation", ["qwen2_5_vl", "qwen3_vl"])
def test_a_step_in_bfloat16(generation, remat, optax_promotes):
    """With cuDNN's attention, as near to the plain one as rounding lets it be; no experts, whose choice it changes."""
    config = even_config(generation)
    parts, batch = parts_on(config, dtype="bfloat16"), everything(config)
    got, wanted = (outcome(parts, batch, remat=remat, attention=attention) for attention in ("cudnn", "plain"))
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-3)
    for name, gradient in wanted.gradients.items():
        far = np.linalg.norm(got.gradients[name] - gradient) / np.linalg.norm(gradient)
        assert far < 0.05, f"{name}: {far:.3f}"
