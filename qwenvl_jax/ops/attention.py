"""Attention, behind one entry point: grouped queries, segments, causal or not."""

import jax
import jax.numpy as jnp


def attention(q_BTNE, k_BSKE, v_BSKE, *, q_segments_BT, kv_segments_BS, causal: bool):
    """Scaled dot-product attention within segments.

    Query head n reads key/value head n // (N // K). A query sees the keys of its own segment; where `causal`, only those
    at or before its own slot (queries and keys then share their slots, T == S). Scores and softmax are f32. Queries of
    padding (segment 0) see the padding of their row, so that every row of the softmax is finite.

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

    Returns:
      [B, T, N, E] in the dtype of the queries.
    """
    B, T, N, E = q_BTNE.shape
    S, K = k_BSKE.shape[1:3]
    q_BTKNE = q_BTNE.reshape(B, T, K, N // K, E)
    scores = jnp.einsum("btkne,bske->bknts", q_BTKNE, k_BSKE, preferred_element_type=jnp.float32)
    allowed_BTS = q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    if causal:
        allowed_BTS &= jnp.tril(jnp.ones((T, S), bool))[None]
    scores = jnp.where(allowed_BTS[:, None, None], scores * jnp.float32(E**-0.5), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKE.dtype)
    return jnp.einsum("bknts,bske->btkne", weights, v_BSKE).reshape(B, T, N, E)
