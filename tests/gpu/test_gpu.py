"""What runs on a GPU computes what the CPU does: `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`."""

import functools

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
ROW = 1501
# Where samples of two rows stop, the first with padding after the last.
STOPS = ((17, 18, 500, 1130, 1401), (ROW,))


def segments_of(stops, length: int) -> np.ndarray:
    """i32[B, T]."""
    slots = np.arange(length)
    numbers = [np.searchsorted(one, slots, side="right") + 1 for one in stops]
    return np.stack([np.where(slots < one[-1], n, 0) for n, one in zip(numbers, stops, strict=True)]).astype(np.int32)


def differences(segments, heads: tuple[int, int], width: int, causal: bool) -> list[float]:
    """How far cuDNN's values and gradients are from plain attention in f32, each relative to the whole of them."""
    B, T = segments.shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    q, k, v, g = (jax.random.normal(key, (B, T, n, width), jnp.bfloat16) for key, n in zip(keys, sizes, strict=True))

    def by_cudnn(q, k, v, s):
        return cudnn_attention(q, k, v, s, causal=causal, packed=Execution().packs)

    def plainly(q, k, v, s):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return attention(q, k, v, q_segments_BT=s, kv_segments_BS=s, causal=causal)

    @functools.partial(jax.jit, static_argnums=0)
    def result(attend, q, k, v, s):
        def summed(q, k, v):
            there = (s > 0)[:, :, None, None].astype(jnp.float32)
            y = attend(q, k, v, s).astype(jnp.float32) * there
            return jnp.sum(y * g.astype(jnp.float32)), y

        (_, y), gradients = jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return y, *gradients

    with jax.default_matmul_precision("highest"):
        found, wanted = (result(attend, q, k, v, jnp.asarray(segments)) for attend in (by_cudnn, plainly))
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
    """Attention is cuDNN's then, as near to the plain one as rounding lets it be: experts apart, which rounding changes."""
    config = even_config(generation)
    parts, batch = parts_on(config, dtype="bfloat16"), everything(config)
    assert Execution(parts.mesh).backend(jnp.bfloat16) == "cudnn"
    got, wanted = outcome(parts, batch, remat=remat), outcome(parts, batch, attention="plain")
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-3)
    for name, gradient in wanted.gradients.items():
        far = np.linalg.norm(got.gradients[name] - gradient) / np.linalg.norm(gradient)
        assert far < 0.05, f"{name}: {far:.3f}"
