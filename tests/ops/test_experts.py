"""Experts: routing, and products of tokens with their own expert's weights, against loops written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.ops.experts import experts_mlp, grouped_product, route


def rows_and_kernels(sizes, H=5, F=7, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((sum(sizes), H)).astype(np.float32)
    kernels = rng.standard_normal((len(sizes), H, F)).astype(np.float32)
    return jnp.asarray(rows), jnp.asarray(kernels), jnp.asarray(sizes, jnp.int32)


SIZES = {
    "even": [8, 8, 8],
    "uneven": [1, 30, 0, 2],
    "all to one": [0, 0, 41, 0, 0],
    "first and last empty": [0, 9, 1, 0],
    "one row": [0, 1, 0],
    "more groups than rows": [0, 1, 0, 0, 2, 0, 0, 0, 1],
    "blocks of 128": [300, 5, 700],
}


@pytest.mark.parametrize("name", SIZES)
def test_each_run_is_multiplied_by_its_own_kernel(name):
    rows, kernels, sizes = rows_and_kernels(SIZES[name])
    got = jax.jit(grouped_product)(rows, kernels, sizes)
    start = 0
    for x, size in enumerate(SIZES[name]):
        expected = np.asarray(rows)[start : start + size] @ np.asarray(kernels)[x]
        np.testing.assert_allclose(np.asarray(got)[start : start + size], expected, atol=1e-5)
        start += size


@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_the_ragged_product(name):
    rows, kernels, sizes = rows_and_kernels(SIZES[name])
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((rows.shape[0], kernels.shape[2])), jnp.float32)
    mine, theirs = (
        jax.jit(jax.grad(lambda r, k, f=f: jnp.sum(f(r, k, sizes) * weights), argnums=(0, 1)))(rows, kernels)
        for f in (grouped_product, jax.lax.ragged_dot)
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)


def test_routing_is_a_softmax_over_all_experts_renormalised():
    logits = jnp.asarray([[0.0, 2.0, 1.0, -1.0], [3.0, 3.5, -2.0, 0.0]], jnp.float32)
    shares, experts = route(logits, 2)
    np.testing.assert_array_equal(np.asarray(experts), [[1, 2], [1, 0]])
    e = np.exp(1.0)
    np.testing.assert_allclose(
        np.asarray(shares), [[e / (1 + e), 1 / (1 + e)], [e**0.5 / (1 + e**0.5), 1 / (1 + e**0.5)]], atol=1e-6
    )
    assert route(logits.astype(jnp.bfloat16), 2)[0].dtype == jnp.bfloat16


def test_experts_of_each_token_are_weighted_and_summed():
    rng = np.random.default_rng(2)
    N, H, X, F, k = 23, 6, 5, 4, 3
    x = rng.standard_normal((N, H)).astype(np.float32)
    gate_up = rng.standard_normal((X, H, 2, F)).astype(np.float32)
    down = rng.standard_normal((X, F, H)).astype(np.float32)
    shares, experts = route(jnp.asarray(rng.standard_normal((N, X)), jnp.float32), k)
    got = np.asarray(jax.jit(experts_mlp)(x, shares, experts, gate_up, down))
    for n in range(N):
        expected = np.zeros(H)
        for share, expert in zip(np.asarray(shares)[n], np.asarray(experts)[n], strict=True):
            gate, up = x[n] @ gate_up[expert, :, 0], x[n] @ gate_up[expert, :, 1]
            expected += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
        np.testing.assert_allclose(got[n], expected, atol=1e-5)


def test_work_grows_with_the_experts_chosen_not_with_those_there_are():
    """Compiled FLOPs of a layer: at most 1.2 * k / X of a dense layer X times as wide."""
    N, H, X, F, k = 1024, 128, 16, 64, 2

    def flops(f, *shapes):
        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]

    f32, i32 = jnp.float32, jnp.int32
    sparse = flops(experts_mlp, ((N, H), f32), ((N, k), f32), ((N, k), i32), ((X, H, 2, F), f32), ((X, F, H), f32))

    def dense(x, gate_up, down):
        gate, up = jnp.split(x @ gate_up, 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ down

    whole = flops(dense, ((N, H), f32), ((H, 2 * X * F), f32), ((X * F, H), f32))
    assert sparse / whole < 1.2 * k / X
