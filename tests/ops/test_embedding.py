"""Looking up tokens in a table that is split over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from qwenvl_jax.ops.embedding import embed_tokens
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import make_rules

B, T, V, H = 8, 36, 40, 24


@pytest.mark.parametrize("rows", [B, 3])  # 3 rows are whole on every device
@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        ("fsdp_tensor", {"fsdp": 2, "context": 2, "tensor": 2}),
        ("zero", {"fsdp": 2, "expert": 2, "context": 2}),
        ("replicated", {"data": 4, "tensor": 2}),
    ],
)
def test_equals_the_table_s_rows_and_holds_nobody_else_s(table, sizes, rows):
    execution = Execution(make_mesh(jax.devices(), **sizes), make_rules(table, ()))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(V, H)).astype(np.float32)
    tokens = rng.integers(0, V, (rows, T)).astype(np.int32)
    weights = rng.normal(size=(rows, T, H)).astype(np.float32)

    def loss(vectors, tokens, weights):
        x_BTH = embed_tokens(vectors, tokens, jnp.bfloat16, execution)
        return jnp.sum(x_BTH.astype(jnp.float32) * weights), x_BTH

    placed = [
        jax.device_put(x, NamedSharding(execution.mesh, execution.fitting_spec(x.shape, *axes)))
        for x, axes in (
            (vectors, ("vocab", "embed")),
            (tokens, ("batch", "tokens")),
            (weights, ("batch", "tokens", None)),
        )
    ]
    run = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*placed).compile()
    (_, x_BTH), gradient = run(*placed)
    np.testing.assert_array_equal(x_BTH, jnp.asarray(vectors, jnp.bfloat16)[tokens])
    wanted = np.zeros_like(vectors)
    np.add.at(wanted, tokens, np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float32))
    np.testing.assert_allclose(gradient, wanted, atol=0.02)
    if rows == B:
        shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"bf16\[([\d,]+)\]", run.as_text())}
        assert shapes and max(np.prod(shape) for shape in shapes) <= B * T * H // execution.split("batch", "tokens")
