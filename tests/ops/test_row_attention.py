"""Attention of rows whose heads and slots lie on several devices, against all of it on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.row_attention import text_attention
from qwenvl_jax.parallel.context import from_balanced, to_balanced
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import make_rules

B, E = 2, 4


@pytest.mark.parametrize(
    ("queries", "keys", "sizes", "override", "backend"),
    [
        (4, 2, {"context": 2, "tensor": 2}, (), "plain"),
        (4, 2, {"context": 2, "tensor": 2}, ("heads=",), "plain"),  # heads of keys lie apart, those of queries do not
        (8, 2, {"context": 2, "tensor": 4}, ("kv_heads=",), "plain"),
        (12, 2, {"context": 2, "tensor": 3}, ("kv_heads=",), "plain"),  # the second device reads both heads
        (10, 5, {"context": 2, "tensor": 2}, ("kv_heads=",), "plain"),  # both read the third
        (4, 2, {"tensor": 2}, ("heads=",), "splash"),
        (12, 2, {"tensor": 3}, ("kv_heads=",), "splash"),
    ],
)
def test_every_query_reads_its_own_head_of_keys(queries, keys, sizes, override, backend):
    T = 128 if backend == "splash" else 16
    rng = np.random.default_rng(0)
    q, k, v, direction = (rng.standard_normal((B, T, n, E), np.float32) for n in (queries, keys, keys, queries))
    segments = np.repeat(np.asarray([[1, 2], [1, 0]], np.int32), T // 2, axis=1)
    mesh = make_mesh(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    balanced = sizes.get("context", 1) > 1
    execution = Execution(mesh, make_rules("fsdp_tensor", override), attention=backend, balanced=balanced)

    def whole(q, k, v):
        y = attention(q, k, v, q_segments_BT=segments, kv_segments_BS=segments, causal=True)
        return jnp.sum(y * direction)

    def shared(q, k, v):
        if not execution.balanced:
            return jnp.sum(text_attention(q, k, v, segments, execution) * direction)
        parts = execution.split("tokens")
        y = text_attention(*(to_balanced(x, parts) for x in (q, k, v, segments)), execution)
        return jnp.sum(from_balanced(y, parts) * direction)

    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (shared, whole))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
