"""The product of activations with a kernel, as one einsum, on this platform and lowered for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.ops.products import project

CASES = [((2, 5, 6), (6, 4), 1), ((2, 5, 6), (6, 3, 4), 1), ((5, 2, 3), (2, 3, 7), 2), ((6,), (6, 3, 2, 4), 1)]


@pytest.mark.parametrize(("x_shape", "kernel_shape", "inputs"), CASES)
def test_equals_tensordot(x_shape, kernel_shape, inputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=x_shape).astype(np.float32), rng.normal(size=kernel_shape).astype(np.float32)
    np.testing.assert_allclose(project(x, kernel, inputs), np.tensordot(x, kernel, inputs), rtol=1e-5, atol=1e-5)
    assert jax.jit(project, static_argnums=2)(x, kernel, inputs).shape == np.tensordot(x, kernel, inputs).shape


def test_leading_axes_stay_apart_where_they_may_be_sharded():
    x, kernel = jnp.zeros((2, 5, 6)), jnp.zeros((6, 4))
    run = jax.jit(lambda x, kernel: project(x, kernel, 1))
    for_tpu = run.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<2x5x6xf32>, tensor<6x4xf32>" in for_tpu
    assert "tensor<10x6xf32>" not in for_tpu
    assert "tensor<10x6xf32>" in run.lower(x, kernel).as_text()
