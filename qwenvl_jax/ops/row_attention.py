"""Self-attention of the rows of a batch, as an `Execution` lays them out: the one place where a backend is chosen.

Rows of text may be split over the `context` axis, in the order of `qwenvl_jax.parallel.context`. Each device then
gathers the keys and values of its rows, which grouped queries make small beside the queries, and compares them with the
queries it has. A ring would move the same bytes one device at a time; the kernels give no partial softmax to join.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.packed_attention import cudnn_attention
from qwenvl_jax.ops.splash import LANES, make_kernel, run_kernel, splash_attention
from qwenvl_jax.parallel.context import balanced_slots, from_balanced
from qwenvl_jax.parallel.placement import ATTENTION, Execution


def text_attention(q_BTNE, k_BTKE, v_BTKE, segments_BT, execution: Execution):
    """Causal attention of the decoder: [B, T, N, E]; see `qwenvl_jax.ops.attention.attention`.

    Args:
      q_BTNE, k_BTKE, v_BTKE: queries, keys and values, in balanced order if `execution.balanced`.
      segments_BT: i32[B, T], in the same order.
      execution: where they lie.
    """
    if execution.balanced:
        return _over_context(q_BTNE, k_BTKE, v_BTKE, segments_BT, execution)
    if execution.backend != "plain":
        queries = execution.fitting_spec(q_BTNE.shape, "batch", None, "heads", None)
        keys = execution.fitting_spec(k_BTKE.shape, "batch", None, "kv_heads", None)
        segments = execution.fitting_spec(segments_BT.shape, "batch", None)

        def rows(q, k, v, s):
            k, v = _own_heads(k, v, q.shape[2], queries[2], keys[2])
            if execution.backend == "cudnn":
                return cudnn_attention(q, k, v, s, causal=True, packed=execution.packs)
            return splash_attention(q, k, v, s, causal=True, interpret=execution.platform != "tpu")

        run = execution.map(rows, (queries, keys, keys, segments), queries)
        return run(q_BTNE, k_BTKE, v_BTKE, segments_BT)
    y = attention(q_BTNE, k_BTKE, v_BTKE, q_segments_BT=segments_BT, kv_segments_BS=segments_BT, causal=True)
    return checkpoint_name(y, ATTENTION)


def splash_multiple(execution: Execution) -> int:
    """What the kernel for TPUs wants the length of a row of text to be a multiple of.

    It fills up whole rows; of rows split over `context` each device has two chunks, which go block by block. Rows of
    other lengths go by plain attention, whose scores take far more memory.
    """
    return 2 * execution.split("tokens") * LANES if execution.split("tokens") > 1 else 1


def vision_attention(q_GRLNE, k_GRLNE, v_GRLNE, segments_GRL, execution: Execution, *, span: int | None = None):
    """Attention among the patches of a segment: [G, R, L, N, E].

    Args:
      segments_GRL: i32[G, R, L], frames or windows.
      span: see `qwenvl_jax.ops.attention.attention`.
    """

    cudnn = execution.backend == "cudnn"

    def plain(q, k, v, s):
        return attention(q, k, v, q_segments_BT=s, kv_segments_BS=s, causal=False, span=span)

    def flat(q, k, v, s):
        """Kernels take the rows of a device's groups as one batch."""
        rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, s))
        if cudnn:
            return cudnn_attention(*rows, causal=False, packed=execution.packs, span=span).reshape(q.shape)
        return splash_attention(*rows, causal=False, interpret=execution.platform != "tpu").reshape(q.shape)

    # Splash knows no spans; windows are far shorter than its blocks.
    if cudnn or (execution.backend == "splash" and (span is None or 3 * span >= q_GRLNE.shape[2])):
        spec = execution.fitting_spec(q_GRLNE.shape, "groups", "vision_rows")
        return execution.map(flat, (spec,) * 4, spec)(q_GRLNE, k_GRLNE, v_GRLNE, segments_GRL)
    return checkpoint_name(jax.vmap(plain)(q_GRLNE, k_GRLNE, v_GRLNE, segments_GRL), ATTENTION)


def _own_heads(k, v, here: int, of_queries, of_keys):
    """The heads of keys and values that this device's queries read, each by as many of those.

        12 queries over 3 devices, 2 heads of keys, each read by 6:

        queries  0 1 2 3 | 4 5 6 7 | 8 9 10 11
        read     0       | 0   1   | 1

    Args:
      k, v: [B, S, K, E], this device's part along the mesh axes `of_keys`.
      here: query heads of this device.
      of_queries, of_keys: the mesh axes that heads of queries and of keys are split over; None where they are whole.
    """
    if of_queries == of_keys:
        return k, v
    if of_keys is not None:
        k, v = (jax.lax.all_gather(x, of_keys, axis=2, tiled=True) for x in (k, v))
    if of_queries is None:
        return k, v
    K, N = k.shape[2], here * jax.lax.axis_size(of_queries)
    each = N // K  # queries that share a head of keys
    together = math.gcd(here, each)  # of them on this device, wherever it is
    first, count = jax.lax.axis_index(of_queries) * here, here // together
    if here % each and each % here:  # heads that devices share: some stand here more than once
        heads = (first + jnp.arange(count, dtype=jnp.int32) * together) // each
        return tuple(jnp.take(x, heads, axis=2) for x in (k, v))
    return tuple(jax.lax.dynamic_slice_in_dim(x, first // each, count, axis=2) for x in (k, v))


def _over_context(q_BTNE, k_BTKE, v_BTKE, segments_BT, execution: Execution):
    """Causal attention of rows split over `context`, in balanced order."""
    devices, T = execution.split("tokens"), q_BTNE.shape[1]
    (axis,) = execution.spec("tokens")
    queries = execution.spec("batch", "tokens", "heads", None)
    keys = execution.spec("batch", "tokens", "kv_heads", None)
    segments = execution.spec("batch", "tokens")

    def whole(x):
        return from_balanced(jax.lax.all_gather(x, axis, axis=1, tiled=True), devices)

    def plain(q, k, v, s):
        k, v = _own_heads(whole(k), whole(v), q.shape[2], queries[2], keys[2])
        all_s = whole(s)
        device, chunk = jax.lax.axis_index(axis), T // (2 * devices)
        parts = []
        for half, place in enumerate((device, 2 * devices - 1 - device)):
            mine = slice(half * chunk, (half + 1) * chunk)
            own = {"q_segments_BT": s[:, mine], "kv_segments_BS": all_s, "cudnn": execution.backend == "cudnn"}
            parts.append(attention(q[:, mine], k, v, **own, causal=True, first=place * chunk))
        y = jnp.concatenate(parts, axis=1)
        # What cuDNN gives is kept by itself where attention is.
        return y if execution.backend == "cudnn" else checkpoint_name(y, ATTENTION)

    if execution.backend != "splash" or T % splash_multiple(execution):
        return execution.map(plain, (queries, keys, keys, segments), queries)(q_BTNE, k_BTKE, v_BTKE, segments_BT)

    heads = q_BTNE.shape[2] // execution.split("heads")
    interpret = execution.platform != "tpu"
    kernel = make_kernel(T, T, heads, slots=balanced_slots(T, devices), shards=devices, interpret=interpret)
    spec = kernel.manual_sharding_spec(NamedSharding(execution.mesh, PartitionSpec(None, axis)))

    def blocks(kernel, q, k, v, s):
        k, v = _own_heads(whole(k), whole(v), q.shape[2], queries[2], keys[2])
        return run_kernel(kernel, q, k, v, s, whole(s))

    run = execution.map(blocks, (spec, queries, keys, keys, segments), queries)
    return run(kernel, q_BTNE, k_BTKE, v_BTKE, segments_BT)
