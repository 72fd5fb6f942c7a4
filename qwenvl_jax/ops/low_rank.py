"""A kernel and the low-rank update learnt for it as one kernel."""

import jax
import jax.numpy as jnp


def merged(kernel, a, b, scale: float):
    """`kernel + scale * a @ b`, summed in f32 and rounded once, a layer at a time.

    Args:
      kernel: [*layers, *I, *O].
      a: [*layers, prod(I), R].
      b: [*layers, R, prod(O)].
      scale: alpha / R.

    Returns:
      The sum, of the shape and dtype of `kernel`.
    """

    def one(layer):
        kernel, a, b = layer
        # Products of TPUs are bf16 unless told otherwise.
        update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        update = (update * jnp.float32(scale)).reshape(kernel.shape)
        return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)

    layers = (kernel, a, b)
    return jax.lax.map(one, layers) if a.ndim == 3 else one(layers)
