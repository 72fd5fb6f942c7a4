"""The product of activations with a kernel, laid out as each platform does it best."""

import math

import jax
import jax.numpy as jnp

_IN, _OUT = "abc", "xyz"


def project(x, kernel, inputs: int):
    """Sums the last `inputs` axes of x against the first `inputs` axes of `kernel`.

    XLA's CPU backend multiplies matrices well but sums over two leading axes (the gradient of a kernel) at half speed,
    so there the leading axes are joined first. Elsewhere they stay apart: joined, axes split over different mesh axes
    would have to be gathered.

    Args:
      x: [..., *I].
      kernel: [*I, *O]; used in the dtype of x.
      inputs: number of axes in I, 1 to 3.

    Returns:
      [..., *O].
    """
    outputs = kernel.ndim - inputs
    into, out = _IN[:inputs], _OUT[:outputs]

    def joined(x, kernel):
        width = math.prod(kernel.shape[:inputs])
        y = x.reshape(-1, width) @ kernel.reshape(width, -1)
        return y.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])

    def apart(x, kernel):
        return jnp.einsum(f"...{into},{into}{out}->...{out}", x, kernel)

    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=joined, default=apart)
