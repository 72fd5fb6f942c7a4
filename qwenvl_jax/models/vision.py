"""The vision tower: patches of space and time, to features, with the outputs of chosen layers kept for DeepStack.

A frame (an image, or one temporal patch of a video) attends to itself alone, in every layer; time is the decoder's
business. Source: Qwen3-VL technical report, section 2; the reference's `Qwen3VLVisionModel`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.batch import VisionRows
from qwenvl_jax.config import VisionConfig
from qwenvl_jax.models.layers import RESIDUAL_GAIN, Embed, LayerNorm, Linear, scan_layers
from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.rope import rotate, vision_cos_sin

ACTIVATIONS = {
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


class VisionAttention(nnx.Module):
    """Bidirectional attention among the patches of a frame, with two-dimensional rotary positions."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        D, N = config.hidden_size, config.num_heads
        heads = {"heads": N, "head_dim": D // N}
        self.qkv = Linear({"embed": D}, {"qkv": 3, **heads}, use_bias=True, stack=stack, rngs=rngs, dtype=dtype)
        self.proj = Linear(heads, {"embed": D}, use_bias=True, gain=RESIDUAL_GAIN, stack=stack, rngs=rngs, dtype=dtype)

    def __call__(self, x_BLD, cos, sin, segments_BL):
        qkv = self.qkv(x_BLD)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        # The tower turns queries and keys in f32 whatever the activations are; the decoder does not.
        q = rotate(q.astype(jnp.float32), cos, sin).astype(v.dtype)
        k = rotate(k.astype(jnp.float32), cos, sin).astype(v.dtype)
        y = attention(q, k, v, q_segments_BT=segments_BL, kv_segments_BS=segments_BL, causal=False)
        return self.proj(y)


class VisionMLP(nnx.Module):
    """Two layers with the tower's activation between them."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        D, F = config.hidden_size, config.intermediate_size
        self.fc1 = Linear({"embed": D}, {"mlp": F}, use_bias=True, stack=stack, rngs=rngs, dtype=dtype)
        self.fc2 = Linear(
            {"mlp": F}, {"embed": D}, use_bias=True, gain=RESIDUAL_GAIN, stack=stack, rngs=rngs, dtype=dtype
        )
        self.act = config.hidden_act

    def __call__(self, x):
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class VisionBlock(nnx.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        self.norm1 = LayerNorm(config.hidden_size, stack=stack, dtype=dtype)
        self.attn = VisionAttention(config, stack=stack, rngs=rngs, dtype=dtype)
        self.norm2 = LayerNorm(config.hidden_size, stack=stack, dtype=dtype)
        self.mlp = VisionMLP(config, stack=stack, rngs=rngs, dtype=dtype)

    def __call__(self, x, cos, sin, segments):
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class VisionTower(nnx.Module):
    """Patch embedding, interpolated absolute positions, and the scanned blocks."""

    def __init__(self, config: VisionConfig, *, rngs, dtype):
        D = config.hidden_size
        self.config = config
        self.patch_embed = Linear({"patch": config.patch_dim}, {"embed": D}, use_bias=True, rngs=rngs, dtype=dtype)
        self.pos_embed = Embed(config.num_position_embeddings, D, axes=("position", "embed"), rngs=rngs, dtype=dtype)
        self.blocks = VisionBlock(config, stack=config.depth, rngs=rngs, dtype=dtype)

    def __call__(self, rows: VisionRows, dtype, **scan):
        """Runs the tower over the rows of one length bucket.

        Args:
          rows: the patches; see `VisionRows`.
          dtype: of the activations.
          **scan: see `scan_layers`.

        Returns:
          (last [G, R, L, D], taps [Kd, G, R, L, D]): the last block's output, and those of the DeepStack layers.
        """
        G, R, L, _ = rows.patches.shape
        x = self.patch_embed(normalise(rows, self.config).astype(dtype))
        x = x + self._positions(rows).astype(dtype)
        D, taps = x.shape[-1], self.config.deepstack_visual_indexes
        x = x.reshape(G * R, L, D)
        segments = rows.segment_ids.reshape(G * R, L)
        cos, sin = vision_cos_sin(rows.coords.reshape(G * R, L, 2), D // self.config.num_heads)

        # Where each layer leaves its output: slot k for the k-th DeepStack layer, a spare last slot for the others.
        slots = [taps.index(i) if i in taps else len(taps) for i in range(self.config.depth)]

        def body(carry, layer):
            x, kept = carry
            block, slot = layer
            x = block(x, cos, sin, segments)
            if taps:
                kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
            return (x, kept), None

        kept = jnp.zeros((len(taps) + 1 if taps else 0, *x.shape), dtype)
        (x, kept), _ = scan_layers(body, (x, kept), (self.blocks, jnp.asarray(slots, jnp.int32)), **scan)
        return x.reshape(G, R, L, D), kept[: len(taps)].reshape(-1, G, R, L, D)

    def _positions(self, rows: VisionRows):
        """The learned square table, resized bilinearly (corners aligned) to each frame: f32[G, R, L, D]."""
        side = round(self.config.num_position_embeddings**0.5)
        table = self.pos_embed.table[...].astype(jnp.float32)
        steps = jnp.maximum(rows.sizes - 1, 1).astype(jnp.float32)
        at = rows.coords.astype(jnp.float32) * jnp.float32(side - 1) / steps
        low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, side - 1)
        high = jnp.minimum(low + 1, side - 1)
        part = at - low.astype(jnp.float32)

        def corner(row, column, weight):
            return jnp.take(table, row * side + column, axis=0) * weight[..., None]

        (r0, c0), (r1, c1) = (low[..., 0], low[..., 1]), (high[..., 0], high[..., 1])
        pr, pc = part[..., 0], part[..., 1]
        upper = corner(r0, c0, (1 - pr) * (1 - pc)) + corner(r0, c1, (1 - pr) * pc)
        return upper + corner(r1, c0, pr * (1 - pc)) + corner(r1, c1, pr * pc)


def normalise(rows: VisionRows, config: VisionConfig):
    """Bytes to the normalised values of the reference, bit for bit, by a table for each channel: f32[G, R, L, D]."""
    G, R, L, D = rows.patches.shape
    channels = config.in_channels
    patches = rows.patches.reshape(G, R, L, channels, D // channels)
    offsets = (jnp.arange(channels, dtype=jnp.int32) * 256).reshape(1, 1, 1, channels, 1)
    tables = rows.pixel_table.reshape(G, channels * 256)
    values = jax.vmap(lambda table, index: jnp.take(table, index))(tables, patches.astype(jnp.int32) + offsets)
    return values.reshape(G, R, L, D)
