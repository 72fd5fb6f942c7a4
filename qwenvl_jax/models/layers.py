"""Modules that own one weight each (a kernel may bring its bias) and call the product themselves.

Adapters and quantizers look for modules of this kind, so nothing bigger owns a weight. A stack of layers is one module
whose weights have a leading layer axis (`stack`); scanning over it hands the body one layer's weights.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.ops.embedding import embed_tokens
from qwenvl_jax.ops.products import project


def _like(weight, x):
    """The weight in the dtype and, by leading axes of size 1, the rank of x: no rank is promoted in silence."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape).astype(x.dtype)


def _stacked(shape: tuple[int, ...], axes: tuple[str, ...], stack: int | None):
    return (shape, axes) if stack is None else ((stack, *shape), ("layers", *axes))


# Gain of the projections that add to the residual stream. A model trained from nothing then begins as little more than
# its embedding, and what a token is reaches every layer; with a gain of 1 it drowns in what random layers add.
RESIDUAL_GAIN = 0.1


class Linear(nnx.Module):
    """`y = x @ kernel + bias` over the trailing axes of x, which may be several (heads and width of a head, say).

    Attributes:
      kernel: [*stack, *inputs, *outputs]; begins normal with deviation `gain` / sqrt(fan-in).
      bias: [*stack, *outputs], or None; begins 0.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        use_bias: bool,
        gain: float = 1.0,
        stack=None,
        rngs,
        dtype,
    ):
        """`inputs` and `outputs` map each logical axis name to its size, in order."""
        sizes, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        shape, names = _stacked(sizes, axes, stack)
        scale = gain / math.sqrt(math.prod(inputs.values()))
        kernel = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype)
        # `inputs` tells an optimizer that works on matrices which axes, after the layers', are summed over.
        self.kernel = nnx.Param(kernel, axes=names, inputs=len(inputs))
        self.bias: nnx.Param | None
        if use_bias:
            shape, names = _stacked(tuple(outputs.values()), tuple(outputs), stack)
            self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=names)
        else:
            self.bias = None
        self.inputs = len(inputs)

    def __call__(self, x):
        """Maps [..., *inputs] to [..., *outputs] in the dtype of x."""
        y = project(x, self.kernel[...], self.inputs)
        return y if self.bias is None else y + _like(self.bias[...], y)


class Embed(nnx.Module):
    """A table of vectors, looked up by row. `table`: [entries, width]; begins normal with deviation 1 / sqrt(width)."""

    def __init__(self, entries: int, width: int, *, axes: tuple[str, str], rngs, dtype):
        table = jax.random.normal(rngs.params(), (entries, width), dtype) * jnp.asarray(1.0 / math.sqrt(width), dtype)
        self.table = nnx.Param(table, axes=axes)

    def __call__(self, ids_BT, dtype, execution):
        """Maps i32[B, T] to [B, T, width] in `dtype`."""
        return embed_tokens(self.table[...], ids_BT, dtype, execution)


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis; statistics in f32, cast, then scaled (in this order)."""

    def __init__(self, width: int, *, eps: float, axis: str = "norm", stack=None, dtype):
        shape, names = _stacked((width,), (axis,), stack)
        self.scale = nnx.Param(jnp.ones(shape, dtype), axes=names)
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.float32(self.eps))
        return x32.astype(x.dtype) * _like(self.scale[...], x)


class LayerNorm(nnx.Module):
    """Standardises over the last axis, in f32, by the two-pass variance; then scale and bias, then the cast."""

    def __init__(self, width: int, *, eps: float = 1e-6, stack=None, dtype):
        shape, names = _stacked((width,), ("norm",), stack)
        self.scale = nnx.Param(jnp.ones(shape, dtype), axes=names)
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=names)
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + jnp.float32(self.eps))
        return (x32 * _like(self.scale[...], x32) + _like(self.bias[...], x32)).astype(x.dtype)
