"""Attention against the sums written out, head by head and slot by slot."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.ops import attention as attention_module
from qwenvl_jax.ops.attention import attention


def written_out(q, k, v, q_segments, kv_segments, causal):
    B, T, N, E = q.shape
    K = k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        sees = kv_segments[b] == q_segments[b, t]
        if causal:
            sees &= np.arange(k.shape[1]) <= t
        scores = k[b, sees, n // (N // K)] @ q[b, t, n] / np.sqrt(E)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, sees, n // (N // K)]
    return out


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# 300 slots are three blocks of queries, the last one short.
@pytest.mark.parametrize(("T", "causal"), [(7, True), (7, False), (300, True)])
def test_equals_the_sums_written_out(T, causal):
    q, k, v = random((2, T, 6, 8), 0), random((2, T, 3, 8), 1), random((2, T, 3, 8), 2)
    segments = np.sort(np.random.default_rng(3).integers(0, 4, (2, T)))[:, ::-1].astype(np.int32)
    got = attention(q, k, v, q_segments_BT=segments, kv_segments_BS=segments, causal=causal)
    np.testing.assert_allclose(got, written_out(q, k, v, segments, segments, causal), atol=2e-6)


def test_reads_a_cache_that_is_partly_filled():
    q, k, v = random((2, 1, 4, 8), 0), random((2, 9, 2, 8), 1), random((2, 9, 2, 8), 2)
    filled = (np.arange(9)[None] < np.array([[3], [9]])).astype(np.int32)
    ones = np.ones((2, 1), np.int32)
    got = attention(q, k, v, q_segments_BT=ones, kv_segments_BS=filled, causal=False)
    np.testing.assert_allclose(got, written_out(q, k, v, ones, filled, False), atol=2e-6)


def test_padding_stays_finite_and_reaches_nothing():
    q = random((1, 6, 2, 8), 0)
    segments = np.array([[1, 1, 1, 0, 0, 0]], np.int32)

    def loss(q):
        y = attention(q, q, q, q_segments_BT=segments, kv_segments_BS=segments, causal=True)
        return jnp.sum(y[:, :3] ** 2)

    gradient = jax.grad(loss)(q)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:, 3:]).max() == 0


def test_a_causal_row_costs_little_more_than_its_half():
    def flops(causal):
        x = jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32)
        s = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        run = jax.jit(lambda x, s: attention(x, x, x, q_segments_BT=s, kv_segments_BS=s, causal=causal))
        return run.lower(x, s).compile().cost_analysis()["flops"]

    assert flops(True) < 0.6 * flops(False)


@pytest.mark.parametrize("T", [40, 49, 64, 131])
def test_short_segments_are_compared_with_what_is_near_alone(T):
    """Segments of at most 8 slots, wherever they begin, and padding at the end; with the promise and without."""
    rng = np.random.default_rng(T)
    lengths = rng.integers(1, 9, 60)
    segments = np.repeat(np.arange(1, 61), lengths)[: T - 3].astype(np.int32)
    segments = np.concatenate([segments, np.zeros(T - len(segments), np.int32)])[None].repeat(2, axis=0)
    q, k, v = random((2, T, 6, 8), 0), random((2, T, 3, 8), 1), random((2, T, 3, 8), 2)

    def run(span):
        return attention(q, k, v, q_segments_BT=segments, kv_segments_BS=segments, causal=False, span=span)

    near, everything = run(8), run(None)
    assert np.isfinite(near).all()
    there = segments[0] > 0
    np.testing.assert_allclose(near[:, there], everything[:, there], atol=2e-6)


def test_short_segments_cost_in_proportion_to_the_row():
    def flops(T, span):
        x, s = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)
        run = jax.jit(lambda x, s: attention(x, x, x, q_segments_BT=s, kv_segments_BS=s, causal=False, span=span))
        return run.lower(x, s).compile().cost_analysis()["flops"]

    assert flops(4096, 64) < 4.2 * flops(1024, 64)
    assert flops(4096, None) > 12 * flops(1024, None)


def through_xla(monkeypatch):
    """Has JAX's call of cuDNN run elsewhere: the same call, given to XLA."""
    call = jax.nn.dot_product_attention

    def given_to_xla(*arguments, implementation, **keywords):
        assert implementation == "cudnn"
        return call(*arguments, implementation="xla", **keywords)

    monkeypatch.setattr(jax.nn, "dot_product_attention", given_to_xla)


# Masks that are kept for the gradients, too large ones, and ones of more blocks than are written out.
@pytest.mark.parametrize("mask_bytes", [2**30, 2**17, 2**15])
@pytest.mark.parametrize(
    ("T", "causal", "span"), [(301, True, None), (301, False, None), (131, False, 8), (7, True, None)]
)
def test_what_cudnn_is_asked_for(monkeypatch, T, causal, span, mask_bytes):
    """Odd numbers of queries and keys, several blocks, padding, grouped queries: outputs and gradients."""
    through_xla(monkeypatch)
    monkeypatch.setattr(attention_module, "_MASK_BYTES", mask_bytes)
    monkeypatch.setattr(attention_module, "_MIN_BLOCK", 16 if mask_bytes == 2**15 else 128)
    there = T - 3
    segments = np.append(1 + np.arange(there) // (span or 110), [0, 0, 0]).astype(np.int32)[None].repeat(2, axis=0)
    q, k, v = (jnp.asarray(random((2, T, n, 8), n), jnp.bfloat16) for n in (6, 3, 3))

    def outcome(dtype, cudnn):
        def summed(*qkv):
            own = {"q_segments_BT": segments, "kv_segments_BS": segments}
            y = attention(*(x.astype(dtype) for x in qkv), **own, causal=causal, span=span, cudnn=cudnn)[:, :there]
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        with jax.numpy_dtype_promotion("standard"):  # as JAX's own attention wants
            (_, y), gradients = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return y, *gradients

    for got, wanted in zip(outcome(jnp.bfloat16, True), outcome(jnp.float32, False), strict=True):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())


def test_cudnn_is_called_with_even_numbers_and_of_16_bits(monkeypatch):
    """Lowered for CUDA, which needs no GPU but JAX's knowing a version of cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))

    def run(dtype):
        q, k = (jax.ShapeDtypeStruct((2, 301, heads, 64), dtype) for heads in (4, 2))
        s = jax.ShapeDtypeStruct((2, 301), jnp.int32)

        def summed(q, k, v, s):
            return (
                attention(q, k, v, q_segments_BT=s, kv_segments_BS=s, causal=True, cudnn=True).astype(jnp.float32).sum()
            )

        traced = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).trace(q, k, k, s)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    program = run(jnp.bfloat16)
    for kind in ("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"):
        assert program.count(f"custom_call @__cudnn${kind}(") == 3
    with pytest.raises(ConfigError, match="takes 16-bit values and got float32; set dtype=bfloat16"):
        run(jnp.float32)
