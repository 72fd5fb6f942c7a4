"""Experts in place of a feed-forward layer: a router, and as many feed-forward layers as there are experts.

Source: Qwen3 technical report (arXiv 2505.09388), section 2; the reference's `Qwen3VLMoeTextSparseMoeBlock`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.config import TextConfig
from qwenvl_jax.models.layers import RESIDUAL_GAIN, Linear
from qwenvl_jax.ops.experts import experts_mlp, route


class Experts(nnx.Module):
    """The weights of a layer's experts; the one module that owns two, since they are used in one operation.

    Attributes:
      gate_up: [*stack, X, H, 2, F], gate first; begins normal with deviation 1 / sqrt(H).
      down: [*stack, X, F, H]; begins normal with a tenth of 1 / sqrt(F), as what adds to the residual stream does.
    """

    def __init__(self, config: TextConfig, *, stack, rngs, dtype):
        assert config.moe is not None  # made only where the decoder has experts
        X, H, F = config.moe.num_experts, config.hidden_size, config.moe.moe_intermediate_size
        lead, names = ((), ()) if stack is None else ((stack,), ("layers",))

        def make(shape, axes, scale):
            kernel = jax.random.normal(rngs.params(), (*lead, *shape), dtype) * jnp.asarray(scale, dtype)
            # Each expert is a matrix of its own: its number counts among the axes before those of the output.
            return nnx.Param(kernel, axes=(*names, *axes), inputs=2)

        self.gate_up = make((X, H, 2, F), ("experts", "embed", "gate_up", "mlp"), 1 / math.sqrt(H))
        self.down = make((X, F, H), ("experts", "mlp", "embed"), RESIDUAL_GAIN / math.sqrt(F))

    def __call__(self, x_NH, shares_Nk, experts_Nk):
        gate_up, down = self.gate_up[...].astype(x_NH.dtype), self.down[...].astype(x_NH.dtype)
        return experts_mlp(x_NH, shares_Nk, experts_Nk, gate_up, down)


class SparseMoe(nnx.Module):
    """Sends each token through its likeliest experts: [B, T, H] to [B, T, H]."""

    def __init__(self, config: TextConfig, *, stack, rngs, dtype):
        assert config.moe is not None  # made only where the decoder has experts
        embed, experts = {"embed": config.hidden_size}, {"experts": config.moe.num_experts}
        self.router = Linear(embed, experts, use_bias=False, stack=stack, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, stack=stack, rngs=rngs, dtype=dtype)
        self.k = config.moe.num_experts_per_tok

    def __call__(self, x_BTH):
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        shares_Nk, experts_Nk = route(self.router(x_NH), self.k)
        return self.experts(x_NH, shares_Nk, experts_Nk).reshape(x_BTH.shape)
