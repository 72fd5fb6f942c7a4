"""What cuDNN's kernel of packed rows is told, and which rows it is given."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from qwenvl_jax.ops import packed_attention as module
from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.packed_attention import cudnn_attention, most_segments, rows_at_once, starts_of, work_bytes
from tests.ops.test_attention import through_xla


def random(shape, seed: int):
    """Standard normal values, in 16 bits."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


@pytest.fixture
def told(monkeypatch, optax_promotes):
    """Has the kernel do by XLA what it is told: attend within the segments whose places and lengths it gets."""
    through_xla(monkeypatch)
    calls = []

    def as_told(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        B, T, _, E = q.shape
        assert k.shape == v.shape == q.shape and T % 2 == 0 and scale == E**-0.5
        assert q_seqlen.shape == (B, q_offsets.shape[1] - 1)
        assert {x.dtype for x in (q_seqlen, kv_seqlen, q_offsets, kv_offsets)} == {np.dtype(np.int32)}
        calls.append(types.SimpleNamespace(q=q, starts=q_offsets, lengths=q_seqlen))
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
        there = q_seqlen >= 0
        # [B, M, T]: whether a slot lies in a segment.
        starts, stops = q_offsets[:, :-1, None], q_offsets[:, :-1, None] + q_seqlen[:, :, None]
        slots = jnp.arange(T, dtype=jnp.int32)[None, None, :]
        within = (slots >= starts) & (slots < stops) & there[:, :, None]
        numbers = jnp.sum(within * (1 + jnp.arange(there.shape[1], dtype=jnp.int32))[None, :, None], axis=1)
        y = attention(
            *(x.astype(jnp.float32) for x in (q, k, v)),
            q_segments_BT=numbers,
            kv_segments_BS=numbers,
            causal=mask_type == cudnn.MaskType.PADDING_CAUSAL,
        )
        # Of slots in no segment it writes nothing.
        return jnp.where(numbers[:, :, None, None] > 0, y, jnp.nan).astype(q.dtype)

    monkeypatch.setattr(cudnn, "dot_product_attention", as_told)
    return calls


def outcome(q, k, v, segments, causal: bool, attend):
    """Values and gradients, in f32."""

    def summed(q, k, v):
        y = attend(q, k, v).astype(jnp.float32)
        return jnp.sum(jnp.where((segments > 0)[:, :, None, None], y, 0.0) ** 2), y

    (_, y), gradients = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]


SEGMENTS = {
    "packed": [[1] * 5 + [2] * 1 + [3] * 20 + [0] * 7, [1] * 33],
    "padding between": [[0] * 3 + [1] * 10 + [0] * 5 + [2] * 15, [1] * 16 + [2] * 17],
    "many": [list(np.arange(1, 34)), [1] * 33],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_packed_rows_give_what_plain_attention_gives(told, kind, causal):
    """Two rows, an odd number of slots, grouped queries; with more runs than there is room for, by masks."""
    segments = jnp.asarray(SEGMENTS[kind], jnp.int32)
    B, T = segments.shape
    q, k, v = (random((B, T, n, 8), n) for n in (6, 3, 3))
    found = outcome(q, k, v, segments, causal, lambda *x: cudnn_attention(*x, segments, causal=causal, packed=True))
    assert told, "the kernel was not asked"

    def plainly(*x):
        own = {"q_segments_BT": segments, "kv_segments_BS": segments}
        return attention(*(one.astype(jnp.float32) for one in x), **own, causal=causal)

    there = np.asarray(segments)[:, :, None, None] > 0
    for got, wanted in zip(found, outcome(q, k, v, segments, causal, plainly), strict=True):
        assert np.isfinite(got).all(), "what stands at padding must be finite"
        np.testing.assert_allclose(got * there, wanted * there, atol=0.02 * np.abs(wanted).max())


def test_which_rows_have_room():
    assert most_segments(1, 8192, 32, 128, causal=True) == 17
    assert most_segments(1, 32_768, 16, 128, causal=True) == 64
    assert most_segments(64, 4096, 16, 72, causal=False) == 17
    # Sums of each segment would take more than a GiB.
    assert most_segments(512, 4096, 16, 72, causal=False) == 8
    # Rows so long that 2 GiB are taken for each segment.
    assert most_segments(1, 262_144, 16, 128, causal=True) == 8
    # More values than 32 bits tell apart.
    assert most_segments(1, 262_144, 64, 128, causal=True) == 0


def test_how_many_rows_are_handed_over_at_a_time():
    for B, T, N, E, most, wanted in (
        (2, 8192, 32, 128, 17, 2),
        (1, 262_144, 16, 128, 8, 1),
        (64, 4096, 16, 72, 17, 32),
        (7, 262_144, 16, 128, 3, 1),  # nothing but 1 divides 7
        (8, 131_072, 32, 128, 2, 2),  # 32 bits tell the places of 3 rows
    ):
        assert rows_at_once(B, T, N, E, most=most) == wanted
        assert work_bytes(wanted, T, N, E, most=most) <= 2**34 and wanted * (T + 1) * N * E < 2**31


@pytest.mark.parametrize("causal", [True, False])
def test_rows_handed_over_in_parts_give_the_same(told, monkeypatch, causal):
    segments = jnp.asarray([[1] * n + [2] * (32 - n) for n in (1, 7, 12, 20, 25, 32)], jnp.int32)
    q, k, v = (random((6, 32, n, 8), n) for n in (4, 2, 2))

    def found():
        told.clear()
        attend = lambda *x: cudnn_attention(*x, segments, causal=causal, packed=True)  # noqa: E731
        return outcome(q, k, v, segments, causal, attend), told[0].q.shape[0]

    whole, rows = found()
    assert rows == 6
    monkeypatch.setattr(module, "_WORK_BYTES", 2 * 4 * 17 * 32 * 4 * 8)
    parts, rows = found()
    assert rows == 2
    for got, wanted in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_the_device_chooses_by_what_is_in_the_rows(told):
    """One program for rows of few segments and of many."""
    run = jax.jit(lambda q, k, v, s: cudnn_attention(q, k, v, s, causal=True, packed=True))
    q, k, v = (random((1, 64, n, 8), n) for n in (2, 2, 2))
    for count in (1, 16, 17, 18, 64):
        s = jnp.asarray(np.arange(64)[None] * count // 64 + 1, jnp.int32)
        assert int(starts_of(s).sum()) == count
        wanted = attention(q, k, v, q_segments_BT=s, kv_segments_BS=s, causal=True)
        got = run(q, k, v, s)
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=0.05)
    assert run._cache_size() == 1 and len(told) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_the_kernel_is_lowered_for_gpus(monkeypatch, packed):
    """Without a GPU, but for JAX's knowing of cuDNN and of a Hopper."""
    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    shapes = [jax.ShapeDtypeStruct((2, 64, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def summed(q, k, v, s):
        return cudnn_attention(q, k, v, s, causal=True, packed=packed).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).trace(*shapes, segments)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @__cudnn$fmhaSoftmax(") == packed
    assert program.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == packed
    assert ("fmhaScaleBiasSoftmax(" in program and "tensor<2x17xi32>" in program) or not packed


def test_what_it_gives_is_kept_where_attention_is(monkeypatch):
    """By the policies that keep attention it runs once in place of twice: its sums are kept with its values."""
    from qwenvl_jax.parallel.placement import Execution

    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(module, "most_segments", lambda *_, **__: 4)
    s = jnp.ones((1, 64), jnp.int32)

    def calls(remat):
        def body(x, _):
            return cudnn_attention(x, x, x, s, causal=True, packed=True) + x, None

        def summed(x):
            y, _ = Execution(remat=remat).scan(body, x, jnp.arange(3))
            return y.astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(summed)).trace(jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16))
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @__cudnn$fmhaSoftmax(")

    assert {remat: calls(remat) for remat in ("full", "products", "attention", "products_attention")} == {
        "full": 2,
        "products": 2,
        "attention": 1,
        "products_attention": 1,
    }
