"""Mergers: four neighbouring patches become one token of the decoder's width.

The main merger normalises each patch and then joins four; a DeepStack merger joins first and normalises the long
vector. Both use the exact GELU, unlike the tower's blocks, and the tower's kind of norm.
"""

import jax
from flax import nnx

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.models.layers import Linear
from qwenvl_jax.models.vision import make_norm
from qwenvl_jax.parallel.placement import Execution


class Merger(nnx.Module):
    """Norm, join, two layers: [..., L, D] to [..., L / 4, H]."""

    def __init__(self, config: VisionConfig, *, norm_after_join: bool, stack=None, rngs, dtype):
        D, unit = config.hidden_size, config.spatial_merge_size**2
        wide = unit * D
        self.norm = make_norm(config, wide if norm_after_join else D, stack=stack, dtype=dtype)
        self.fc1 = Linear({"vision_embed": wide}, {"merged": wide}, use_bias=True, stack=stack, rngs=rngs, dtype=dtype)
        out = {"vision_embed": config.out_hidden_size}
        self.fc2 = Linear({"merged": wide}, out, use_bias=True, stack=stack, rngs=rngs, dtype=dtype)
        self.unit, self.norm_after_join = unit, norm_after_join

    def __call__(self, x_GRLD, execution: Execution):
        """Maps [G, R, L, D] to [G, R, L / 4, H]."""

        def placed(x):
            # Features stay where their patches are, whatever weights they meet.
            return execution.constrain(x, "groups", "vision_rows", None, None)

        joined = (*x_GRLD.shape[:-2], x_GRLD.shape[-2] // self.unit, self.unit * x_GRLD.shape[-1])
        x = placed(x_GRLD)
        x = placed(self.norm(x.reshape(joined)) if self.norm_after_join else self.norm(x).reshape(joined))
        return placed(self.fc2(placed(jax.nn.gelu(placed(self.fc1(x)), approximate=False))))
