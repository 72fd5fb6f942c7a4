"""Attention, behind one entry point: grouped queries, segments, causal or not."""

import jax
import jax.numpy as jnp

from qwenvl_jax.errors import ConfigError

# Queries are taken in at most this many blocks, each against the keys it can see: a causal row then costs little more
# than the half that counts, and scores are never held for all queries at once.
_MAX_BLOCKS = 8
_MIN_BLOCK = 128

# cuDNN is handed a mask for each block: as many blocks as keep one below this. Where all of a row take more together,
# none is kept for the gradients.
_MASK_BYTES = 2**30


def attention(
    q_BTNE,
    k_BSKE,
    v_BSKE,
    *,
    q_segments_BT,
    kv_segments_BS,
    causal: bool,
    span: int | None = None,
    first=None,
    cudnn: bool = False,
):
    """Scaled dot-product attention within segments.

    Query head n reads key/value head n // (N // K). A query sees the keys of its own segment; where `causal`, only
    those at or before its own slot (queries and keys then share their slots, T == S, unless `first` is given). Scores
    and softmax are f32. Queries of padding (segment 0) see the padding of their row, so that every row of the softmax
    is finite.

        segments 1 1 2 2, causal:   x . . .
                                    x x . .
                                    . . x .
                                    . . x x

    Args:
      q_BTNE: [B, T, N, E] queries.
      k_BSKE, v_BSKE: [B, S, K, E] keys and values; K divides N.
      q_segments_BT: i32[B, T].
      kv_segments_BS: i32[B, S].
      causal: whether a query is limited to earlier slots.
      span: a promise that every segment (but padding) is at most so many consecutive slots; each query is then compared
        with the keys near it alone, so that cost grows with T and not with its square. Not with `causal`; T == S.
      first: i32[], the slot of the first query among the keys; 0 without it. Only with `causal`. Keys after the last
        query are then compared and masked, since where it stands is known to the device alone.
      cudnn: whether cuDNN's kernel compares each block of queries with its keys; for an NVIDIA GPU and 16-bit values.

    Returns:
      [B, T, N, E] in the dtype of the queries.

    Raises:
      ConfigError: cuDNN's kernel does not take values of this dtype.
    """
    B, T, N, E = q_BTNE.shape
    S, K = k_BSKE.shape[1:3]
    if cudnn and q_BTNE.dtype.itemsize != 2:
        raise ConfigError(
            f"attention='cudnn' takes 16-bit values and got {q_BTNE.dtype}; set dtype=bfloat16 or attention=plain."
        )
    if span is not None and 3 * span < T:
        return _near(q_BTNE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS, span, cudnn)
    block = max(_MIN_BLOCK, -(-T // _MAX_BLOCKS))
    if cudnn:
        block = max(_MIN_BLOCK, min(block, _MASK_BYTES // (2 * B * S)))
        if block * _MAX_BLOCKS < T and first is None:
            return _by_cudnn_in_a_loop(q_BTNE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS, causal, block)
        attend = _attend_by_cudnn if 2 * B * T * S <= _MASK_BYTES else jax.checkpoint(_attend_by_cudnn)
    # Heads lead, so that both products are plain batched matrix products: [queries, E] x [E, keys] for each head.
    q_BKNTE = q_BTNE.reshape(B, T, K, N // K, E).transpose(0, 2, 3, 1, 4)
    k_BKES, v_BKSE = k_BSKE.transpose(0, 2, 3, 1), v_BSKE.transpose(0, 2, 1, 3)
    outputs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = stop if causal and first is None else S
        allowed_BTS = q_segments_BT[:, start:stop, None] == kv_segments_BS[:, None, :seen]
        if causal:
            slots_T, slots_S = jnp.arange(start, stop)[:, None], jnp.arange(seen)[None, :]
            allowed_BTS &= (slots_T + (0 if first is None else first) >= slots_S)[None]
        if cudnn:
            outputs.append(attend(q_BTNE[:, start:stop], k_BSKE[:, :seen], v_BSKE[:, :seen], allowed_BTS))
        else:
            q, k, v = q_BKNTE[:, :, :, start:stop], k_BKES[..., :seen], v_BKSE[:, :, :seen]
            outputs.append(_attend(q, k, v, allowed_BTS[:, None, None]))
    if cudnn:
        return jnp.concatenate(outputs, axis=1)
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, E)


def _attend(q_BKNTE, k_BKES, v_BKSE, allowed_B11TS):
    """Every query against every key: [B, K, N/K, T, E]."""
    B, K, N, T, E = q_BKNTE.shape
    heads = ((0, 1), (0, 1))
    q = q_BKNTE.reshape(B, K, N * T, E)
    scores = jax.lax.dot_general(q, k_BKES, (((3,), (2,)), heads), preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, N, T, -1) * jnp.float32(E**-0.5)
    scores = jnp.where(allowed_B11TS, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSE.dtype).reshape(B, K, N * T, -1)
    return jax.lax.dot_general(weights, v_BKSE, (((3,), (2,)), heads)).reshape(B, K, N, T, E)


def _attend_by_cudnn(q_BTNE, k_BSKE, v_BSKE, allowed_BTS):
    """Every query against every key, by JAX's own call of cuDNN: [B, T, N, E].

    The kernel knows no segments, but for offsets that JAX has for itself alone, and is told by masks what to hide.
    """
    T = q_BTNE.shape[1]

    def even(x, *axes: int):
        """Training wants even numbers of queries and keys; what fills them up is hidden."""
        return jnp.pad(x, [(0, x.shape[axis] % 2 if axis in axes else 0) for axis in range(x.ndim)])

    q, k, v = even(q_BTNE, 1), even(k_BSKE, 1), even(v_BSKE, 1)
    mask = even(allowed_BTS, 1, 2)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")[:, :T]


def _by_cudnn_in_a_loop(q_BTNE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS, causal: bool, block: int):
    """Blocks of queries against all keys, one after another: one program for any number of them, each with its mask."""
    B, T = q_segments_BT.shape
    count = -(-T // block)

    def blocks(x, fill=0):
        """[B, T, ...] to [count, B, block, ...]."""
        x = jnp.pad(x, ((0, 0), (0, count * block - T), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(B, count, block, *x.shape[2:]).swapaxes(0, 1)

    def one(_, inputs):
        q, segments, start = inputs
        allowed = segments[:, :, None] == kv_segments_BS[:, None, :]
        if causal:
            slots = start + jnp.arange(block, dtype=jnp.int32)
            allowed &= (slots[:, None] >= jnp.arange(k_BSKE.shape[1], dtype=jnp.int32)[None, :])[None]
        return None, _attend_by_cudnn(q, k_BSKE, v_BSKE, allowed)

    starts = jnp.arange(count, dtype=jnp.int32) * block
    # Queries that fill up the last block belong to no segment.
    inputs = (blocks(q_BTNE), blocks(q_segments_BT, -1), starts)
    _, y = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, inputs)
    return y.swapaxes(0, 1).reshape(B, count * block, *y.shape[3:])[:, :T]


def _near(q_BTNE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS, span: int, cudnn: bool):
    """Attention where segments are at most `span` slots long: blocks of `span` queries, each against three of keys.

    keys     0 1 2 3 4       a segment that has a slot in block i lies within blocks i - 1 to i + 1
    block 0  x x . . .
    block 1  x x x . .
    block 2  . x x x .
    """
    B, T, N, E = q_BTNE.shape
    count = -(-T // span)

    def blocks(x, fill):
        """[B, T, ...] to [B, count, span, ...], what is missing in the last block filled."""
        x = jnp.pad(x, ((0, 0), (0, count * span - T), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(B, count, span, *x.shape[2:])

    def with_neighbours(x, fill):
        """[B, T, ...] to [B * count, 3 * span, ...]: each block between the one before it and the one after it."""
        x = jnp.pad(blocks(x, fill), ((0, 0), (1, 1), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
        near = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return near.reshape(B * count, 3 * span, *near.shape[3:])

    y = attention(
        blocks(q_BTNE, 0).reshape(B * count, span, N, E),
        with_neighbours(k_BSKE, 0),
        with_neighbours(v_BSKE, 0),
        q_segments_BT=blocks(q_segments_BT, 0).reshape(B * count, span),
        # Blocks that are not there belong to no segment, not even to padding.
        kv_segments_BS=with_neighbours(kv_segments_BS, -1),
        causal=False,
        cudnn=cudnn,
    )
    return y.reshape(B, count * span, N, E)[:, :T]
