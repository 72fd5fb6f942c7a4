"""Experts in place of a feed-forward layer: a router, and as many feed-forward layers as there are experts.

Source: Qwen3 technical report (arXiv 2505.09388), section 2; the reference's `Qwen3VLMoeTextSparseMoeBlock`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.config import TextConfig
from qwenvl_jax.models.layers import RESIDUAL_GAIN, Linear
from qwenvl_jax.ops.expert_exchange import placed_experts
from qwenvl_jax.ops.experts import route
from qwenvl_jax.parallel.placement import Execution


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

        self.gate_up = make((X, H, 2, F), ("experts", "expert_embed", "gate_up", "expert_mlp"), 1 / math.sqrt(H))
        self.down = make((X, F, H), ("experts", "expert_mlp", "expert_embed"), RESIDUAL_GAIN / math.sqrt(F))

    def __call__(self, x_BTH, shares_BTk, experts_BTk, execution: Execution):
        gate_up, down = self.gate_up[...].astype(x_BTH.dtype), self.down[...].astype(x_BTH.dtype)
        return placed_experts(x_BTH, shares_BTk, experts_BTk, gate_up, down, execution)


class SparseMoe(nnx.Module):
    """Sends each token through its likeliest experts: [B, T, H] to [B, T, H], and what the router did."""

    def __init__(self, config: TextConfig, *, stack, rngs, dtype):
        assert config.moe is not None  # made only where the decoder has experts
        embed, experts = {"embed": config.hidden_size}, {"router": config.moe.num_experts}
        self.router = Linear(embed, experts, use_bias=False, stack=stack, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, stack=stack, rngs=rngs, dtype=dtype)
        self.k = config.moe.num_experts_per_tok

    def __call__(self, x_BTH, execution: Execution):
        """Returns ([B, T, H], (the router's logits [B, T, X], the experts chosen i32[B, T, k]))."""
        logits_BTX = execution.constrain(self.router(x_BTH), "batch", "tokens", None)
        shares_BTk, experts_BTk = route(logits_BTX, self.k)
        y_BTH = self.experts(x_BTH, shares_BTk, experts_BTk, execution)
        return y_BTH, (logits_BTX, experts_BTk)
