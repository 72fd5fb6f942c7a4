"""Attention of packed rows by cuDNN, which is told where segments start and compares nothing across them.

JAX has this for itself alone (`jax._src.cudnn`); its public call knows masks only, which cuDNN reads as biases, whose
gradients it then makes too: [B, T, T] values each, whatever stands in the row. For Hopper GPUs and later.
"""

import jax
import jax.numpy as jnp

from qwenvl_jax.ops.attention import attention

# What the kernel keeps of each head, and adds up, grows with the segments that a row may have, there or not: on an H200
# room for 64 in rows of 8,192 took longer than the gradients themselves. So rows have room for segments of this many
# slots on average (of the decoder; of the tower, whose frames are smaller), or for 16.
_SAMPLE_SLOTS, _FRAME_SLOTS, _FEW = 512, 256, 16
_SUMS_BYTES = 2**30  # and at most these bytes

# For the gradients the kernel takes 4 bytes for each value of the queries and each segment that a row may have, as if
# all were as long as the row; programs compiled without a GPU tell nothing of it. On an H200 rows [2, 8192, 16, 128]
# took 8 GiB less with room for 17 than for 65, and of the 195 GiB that a step of 262,144 tokens wanted 128 were this,
# with room for 64. So it is bounded, and rows are handed over in parts.
_WORK_BYTES = 2**34
_PLACES = 2**31 - 1  # what is told of values' places is 32 bits wide


def cudnn_attention(q_BTNE, k_BTKE, v_BTKE, segments_BT, *, causal: bool, packed: bool, span: int | None = None):
    """Self-attention within segments by cuDNN; see `qwenvl_jax.ops.attention.attention`.

    Args:
      segments_BT: i32[B, T]; the slots of a segment lie side by side.
      packed: whether the GPU has the kernel of packed rows. It takes rows with no more than `most_segments`; what the
        rows of a batch are is seen by the device, and others go by masks.
    """
    B, T, N, E = q_BTNE.shape
    most = most_segments(B, T, N, E, causal=causal)

    def by_masks(q, k, v):
        own = {"q_segments_BT": segments_BT, "kv_segments_BS": segments_BT}
        return attention(q, k, v, **own, causal=causal, span=span, cudnn=True)

    if not packed or most < 2 or (span is not None and 3 * span < T):
        return by_masks(q_BTNE, k_BTKE, v_BTKE)
    starts_BT = starts_of(segments_BT)
    return jax.lax.cond(
        jnp.max(jnp.sum(starts_BT, axis=1)) <= most,
        lambda q, k, v: packed_attention(q, k, v, starts_BT, causal=causal, most=most),
        # What it needs for gradients is made again: seldom run, it takes no room from what the other branch keeps.
        jax.checkpoint(by_masks),
        *(q_BTNE, k_BTKE, v_BTKE),
    )


def most_segments(B: int, T: int, N: int, E: int, *, causal: bool) -> int:
    """How many segments a row may have, its padding included, for the kernel to take it; fewer than 2: none."""
    if (T + 1) * N * E > _PLACES:
        return 0
    slots = _SAMPLE_SLOTS if causal else _FRAME_SLOTS
    return min(
        max(-(-T // slots), _FEW) + 1, _SUMS_BYTES // (4 * B * N * T), _WORK_BYTES // work_bytes(1, T, N, E, most=1)
    )


def rows_at_once(B: int, T: int, N: int, E: int, *, most: int) -> int:
    """How many rows the kernel is handed at a time: the most that divide B and leave it little enough to work on."""
    fitting = min(_WORK_BYTES // work_bytes(1, T, N, E, most=most), _PLACES // ((T + 1) * N * E))
    return max(rows for rows in range(1, B + 1) if B % rows == 0 and rows <= max(1, fitting))


def work_bytes(B: int, T: int, N: int, E: int, *, most: int) -> int:
    """Bytes that the kernel works in, to make the gradients of rows that it is handed at once."""
    return 4 * B * most * T * N * E


def starts_of(segments_BT):
    """bool[B, T], whether a run of slots of one segment starts here."""
    first = jnp.ones_like(segments_BT[:, :1], bool)
    return jnp.concatenate([first, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)


def packed_attention(q_BTNE, k_BTKE, v_BTKE, starts_BT, *, causal: bool, most: int):
    """Self-attention within runs of slots: [B, T, N, E] in the dtype of the queries.

    Args:
      q_BTNE, k_BTKE, v_BTKE: 16-bit; K divides N.
      starts_BT: bool[B, T], where runs start; the first slot of a row does.
      causal: whether a query sees the keys up to its own slot only.
      most: M, at least 2. No row has more runs than that: the kernel would leave out those beyond it.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    B, T, N, E = q_BTNE.shape
    if T % 2:
        # JAX wants even numbers for gradients. What fills up a row is a run of its own.
        more = [(0, 0), (0, 1), (0, 0), (0, 0)]
        q, k, v = (jnp.pad(x, more) for x in (q_BTNE, k_BTKE, v_BTKE))
        starts_BT = jnp.pad(starts_BT, more[:2], constant_values=True)
        return packed_attention(q, k, v, starts_BT, causal=causal, most=most + 1)[:, :-1]
    if (rows := rows_at_once(B, T, N, E, most=most)) < B:
        parts = (x.reshape(B // rows, rows, *x.shape[1:]) for x in (q_BTNE, k_BTKE, v_BTKE, starts_BT))
        found = jax.lax.map(lambda part: packed_attention(*part, causal=causal, most=most), tuple(parts))
        return found.reshape(q_BTNE.shape)
    # The kernel is told the same places of queries and keys, in values and not in slots: both have as many heads then.
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTKE, v_BTKE))

    def places(starts_T):
        """i32[M + 1] where runs start, then the row's end; i32[M] their lengths."""
        (found,) = jnp.nonzero(starts_T, size=most + 1, fill_value=T)
        found = found.astype(jnp.int32)
        return found, jnp.diff(found)

    starts, lengths = jax.vmap(places)(starts_BT)
    # What is not there is told by -1.
    there = lengths > 0
    lengths = jnp.where(there, lengths, -1)
    starts = jnp.where(starts < T, starts, -1)
    mask = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
    with jax.numpy_dtype_promotion("standard"):  # as JAX's own code wants
        return cudnn.dot_product_attention(
            q_BTNE,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=E**-0.5,
            mask_type=mask,
        )
