"""Attention against the sums written out, head by head and slot by slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
