"""Mergers: four neighbouring patches become one token of the decoder's width.

The main merger normalises each patch and then joins four; a DeepStack merger joins first and normalises the long
vector. Both use the exact GELU, unlike the tower's blocks, and the tower's kind of norm.
"""

import jax
from flax import nnx

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.models.layers import Linear
from qwenvl_jax.models.vision import make_norm


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

    def __call__(self, x):
        joined = (*x.shape[:-2], x.shape[-2] // self.unit, self.unit * x.shape[-1])
        x = self.norm(x.reshape(joined)) if self.norm_after_join else self.norm(x).reshape(joined)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
