"""Experts: routing, and products of tokens with their own expert's weights, against loops written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.ops import experts
from qwenvl_jax.ops.experts import _CPU_BLOCKS, _GPU_BLOCKS, _in_blocks, experts_mlp, grouped_product, route


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


LOWERED = ("cuda", "cpu", "tpu")
# The first is what runs here.
PRODUCTS = {"here": grouped_product, "cpu": partial(_in_blocks, _CPU_BLOCKS), "gpu": partial(_in_blocks, _GPU_BLOCKS)}


@pytest.mark.parametrize("kind", ["here", "gpu"])
@pytest.mark.parametrize("name", SIZES)
def test_each_run_is_multiplied_by_its_own_kernel(name, kind):
    rows, kernels, sizes = rows_and_kernels(SIZES[name])
    got = jax.jit(PRODUCTS[kind])(rows, kernels, sizes)
    start = 0
    for x, size in enumerate(SIZES[name]):
        expected = np.asarray(rows)[start : start + size] @ np.asarray(kernels)[x]
        np.testing.assert_allclose(np.asarray(got)[start : start + size], expected, atol=1e-5)
        start += size


@pytest.mark.parametrize("name", ["uneven", "all to one", "blocks of 128"])
def test_copies_of_matrices_are_made_in_parts(monkeypatch, name):
    """All of them would be more values than are held at a time: values and gradients are the same."""
    rows, kernels, sizes = rows_and_kernels(SIZES[name], H=6, F=8)

    def run():
        loss = jax.jit(jax.value_and_grad(lambda r, k: jnp.sum(jnp.square(PRODUCTS["gpu"](r, k, sizes))), (0, 1)))
        lowered = loss.lower(rows, kernels)
        return lowered.as_text().count("stablehlo.while"), loss(rows, kernels)

    (loops, wanted), _ = run(), monkeypatch.setattr(experts, "_COPIES", 64)
    in_parts, got = run()
    assert in_parts >= loops + 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, wanted)


@pytest.mark.parametrize("kind", ["here", "gpu"])
@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_the_ragged_product(name, kind):
    rows, kernels, sizes = rows_and_kernels(SIZES[name])
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((rows.shape[0], kernels.shape[2])), jnp.float32)
    mine, theirs = (
        jax.jit(jax.grad(lambda r, k, f=f: jnp.sum(f(r, k, sizes) * weights), argnums=(0, 1)))(rows, kernels)
        for f in (PRODUCTS[kind], jax.lax.ragged_dot)
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


def test_a_gpu_is_given_blocks_and_a_tpu_the_ragged_product():
    """What XLA makes of the latter for CUDA takes as many times the rows as there are experts."""
    traced = jax.jit(jax.grad(lambda r, k, s: jnp.sum(grouped_product(r, k, s)), (0, 1))).trace(
        *rows_and_kernels(SIZES["even"])
    )
    ragged = {platform: "ragged_dot" in traced.lower(lowering_platforms=(platform,)).as_text() for platform in LOWERED}
    assert ragged == {"cuda": False, "cpu": False, "tpu": True}


@pytest.mark.parametrize(("kind", "most"), [("cpu", 1.2), ("gpu", 2)])
def test_what_fills_up_blocks_is_little_of_the_work(kind, most):
    """Of the forward and the backward pass, by compiled FLOPs, and the copies of matrices by their bytes."""
    P, X, H, F = 4096, 16, 64, 96
    shapes = [
        jax.ShapeDtypeStruct(*one) for one in (((P, H), jnp.float32), ((X, H, F), jnp.float32), ((X,), jnp.int32))
    ]
    run = jax.jit(jax.grad(lambda r, k, s: jnp.sum(jnp.square(PRODUCTS[kind](r, k, s))), (0, 1)))
    compiled = run.lower(*shapes).compile()
    assert compiled.cost_analysis()["flops"] <= 1.05 * most * 3 * 2 * P * H * F
    if kind == "gpu":
        assert compiled.memory_analysis().temp_size_in_bytes <= 4 * (8 * P * F + 2 * 3 * X * H * F)
