"""Attention by the Pallas kernel of JAX for TPUs, which skips the blocks that a mask leaves empty.

It skips by its mask alone, which is causal or full here; segments are compared within blocks. On other platforms the
kernel runs in Pallas's interpreter, for tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from qwenvl_jax.parallel.placement import ATTENTION

LANES = 128  # of a TPU's vector unit: the kernel's blocks are multiples
_BLOCK = 512  # queries and keys of a block, at most: larger ones do not fit the fast memory of every generation


class _Causal(masks.CausalMask):
    """A causal mask of queries in any order, told block by block at little cost.

    The kernel asks of every block whether all and whether any of it is seen: rows of 262,144 have a quarter of a
    million of them. One value answers for those that the diagonal does not cross.
    """

    def __init__(self, shape: tuple[int, int], slots):
        super().__init__(shape)
        self.q_sequence = np.asarray(slots, np.int32)

    def __getitem__(self, index) -> np.ndarray:
        slots, keys = self.q_sequence[index[0]], index[1]
        if slots.min() >= keys.stop - 1:
            return np.ones((1, 1), bool)
        if slots.max() < keys.start:
            return np.zeros((1, 1), bool)
        return slots[:, None] >= np.arange(keys.start, keys.stop, dtype=np.int32)[None, :]


class _Full(masks.FullMask):
    """A mask that hides nothing, of which every block is one value."""

    def __getitem__(self, index) -> np.ndarray:
        return np.ones((1, 1), bool)


def make_kernel(queries: int, keys: int, heads: int, *, slots=None, shards: int = 1, interpret: bool = False):
    """The kernel for rows of these lengths.

    Args:
      queries, keys: T and S; multiples of `LANES` (of `LANES * shards`).
      heads: query heads that one call sees.
      slots: i32[T], the slot of each query among the keys, for a causal mask; None for a full one.
      shards: devices that the queries are split over; see `SplashAttentionKernel.manual_sharding_spec`.
    """
    mask: masks.Mask = _Full((queries, keys)) if slots is None else _Causal((queries, keys), slots)
    of_queries, of_keys = _block(queries // shards), _block(keys)
    blocks = kernels.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_kv_compute=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_kv_dkv_compute=of_keys,
        block_q_dq=of_queries,
        block_kv_dq=of_keys,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def _block(length: int) -> int:
    """The largest multiple of `LANES` that divides a length, up to `_BLOCK`."""
    return max(n for n in range(LANES, _BLOCK + 1, LANES) if length % n == 0)


def run_kernel(kernel, q_BTNE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS):
    """Attention of rows: [B, T, N, E] in the dtype of the queries; scores and softmax are f32."""
    E = q_BTNE.shape[-1]
    # The kernel takes queries that are scaled. f32 first: the scale is no power of two for every width.
    q = (q_BTNE.astype(jnp.float32) * jnp.float32(E**-0.5)).astype(q_BTNE.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k_BSKE, v_BSKE))
    segments = kernels.SegmentIds(q_segments_BT, kv_segments_BS)
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, s))(q, k, v, segments).transpose(0, 2, 1, 3)


def splash_attention(q_BTNE, k_BTKE, v_BTKE, segments_BT, *, causal: bool, interpret: bool = False):
    """Self-attention within segments of whole rows of any length; see `qwenvl_jax.ops.attention.attention`."""
    T, N = q_BTNE.shape[1:3]
    missing = -T % LANES

    def filled(x, value=0):
        return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=value)

    q, k, v = (filled(x) for x in (q_BTNE, k_BTKE, v_BTKE))
    # What fills up a row is of no segment, not even of padding.
    segments = filled(segments_BT, -1)
    slots = np.arange(T + missing) if causal else None
    kernel = make_kernel(T + missing, T + missing, N, slots=slots, interpret=interpret)
    return run_kernel(kernel, q, k, v, segments, segments)[:, :T]
