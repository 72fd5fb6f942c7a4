"""The vision tower: patches of space and time, to features, with the outputs of chosen layers kept for DeepStack.

A frame (an image, or one temporal patch of a video) attends to itself alone, in every layer; time is the decoder's
business. With windows, most layers attend within squares of a frame, whose patches the host lays side by side. One
tower serves all generations; `VisionConfig` says what each has.

Sources: the technical reports of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923, section 2.1: windows) and
Qwen3-VL; the reference's `Qwen2VisionTransformerPretrainedModel`, `Qwen2_5_VisionTransformerPretrainedModel` and
`Qwen3VLVisionModel`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qwenvl_jax.batch import VisionRows
from qwenvl_jax.config import VisionConfig
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.models.layers import RESIDUAL_GAIN, Embed, LayerNorm, Linear, RMSNorm
from qwenvl_jax.ops.rope import rotate, vision_cos_sin
from qwenvl_jax.ops.row_attention import vision_attention
from qwenvl_jax.parallel.placement import LAYER_INPUT, Execution

ACTIVATIONS: dict[str, Callable] = {
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
}


def make_norm(config: VisionConfig, width: int, *, stack=None, dtype):
    """The norm of the tower's kind over `width` values; statistics in f32, epsilon 1e-6."""
    kind = RMSNorm if config.norm == "rms_norm" else LayerNorm
    return kind(width, eps=1e-6, stack=stack, dtype=dtype)


class VisionAttention(nnx.Module):
    """Bidirectional attention among patches, with two-dimensional rotary positions."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        D, N = config.hidden_size, config.num_heads
        embed, heads = {"vision_embed": D}, {"vision_heads": N, "head_dim": D // N}
        make = {"use_bias": True, "stack": stack, "rngs": rngs, "dtype": dtype}
        self.qkv = Linear(embed, {"qkv": 3, **heads}, **make)
        self.proj = Linear(heads, embed, gain=RESIDUAL_GAIN, **make)

    def __call__(self, x_GRLD, cos, sin, attend):
        """`attend(q, k, v) -> [G, R, L, N, E]` decides which patches see each other."""
        qkv = self.qkv(x_GRLD)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        # The tower turns queries and keys in f32 whatever the activations are; the decoder does not.
        q = rotate(q.astype(jnp.float32), cos, sin).astype(v.dtype)
        k = rotate(k.astype(jnp.float32), cos, sin).astype(v.dtype)
        return self.proj(attend(q, k, v))


class VisionMLP(nnx.Module):
    """Two layers with the tower's activation between them."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        embed, mlp = {"vision_embed": config.hidden_size}, {"vision_mlp": config.intermediate_size}
        make = {"use_bias": True, "stack": stack, "rngs": rngs, "dtype": dtype}
        self.fc1 = Linear(embed, mlp, **make)
        self.fc2 = Linear(mlp, embed, gain=RESIDUAL_GAIN, **make)
        self.act = config.hidden_act

    def __call__(self, x):
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class VisionGatedMLP(nnx.Module):
    """down(act(gate x) * up x), with biases."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        embed, mlp = {"vision_embed": config.hidden_size}, {"vision_mlp": config.intermediate_size}
        make = {"use_bias": True, "stack": stack, "rngs": rngs, "dtype": dtype}
        self.gate = Linear(embed, mlp, **make)
        self.up = Linear(embed, mlp, **make)
        self.down = Linear(mlp, embed, gain=RESIDUAL_GAIN, **make)
        self.act = config.hidden_act

    def __call__(self, x):
        return self.down(ACTIVATIONS[self.act](self.gate(x)) * self.up(x))


class VisionBlock(nnx.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: VisionConfig, *, stack, rngs, dtype):
        self.norm1 = make_norm(config, config.hidden_size, stack=stack, dtype=dtype)
        self.attn = VisionAttention(config, stack=stack, rngs=rngs, dtype=dtype)
        self.norm2 = make_norm(config, config.hidden_size, stack=stack, dtype=dtype)
        mlp = VisionGatedMLP if config.gated_mlp else VisionMLP
        self.mlp = mlp(config, stack=stack, rngs=rngs, dtype=dtype)

    def __call__(self, x_GRLD, cos, sin, attend, execution: Execution):
        def placed(x):
            return execution.constrain(x, "groups", "vision_rows", None, None)

        x_GRLD = placed(x_GRLD + self.attn(self.norm1(x_GRLD), cos, sin, attend))
        return placed(x_GRLD + self.mlp(self.norm2(x_GRLD)))


class VisionTower(nnx.Module):
    """Patch embedding, interpolated absolute positions where the tower has them, and the scanned blocks."""

    def __init__(self, config: VisionConfig, *, rngs, dtype):
        D = config.hidden_size
        self.config = config
        self.patch_embed = Linear(
            {"patch": config.patch_dim}, {"vision_embed": D}, use_bias=config.patch_bias, rngs=rngs, dtype=dtype
        )
        entries = config.num_position_embeddings
        self.pos_embed = (
            Embed(entries, D, axes=("position", "vision_embed"), rngs=rngs, dtype=dtype) if entries else None
        )
        self.blocks = VisionBlock(config, stack=config.depth, rngs=rngs, dtype=dtype)

    def __call__(self, rows: VisionRows, dtype, execution: Execution):
        """Runs the tower over the rows of one length bucket.

        Args:
          rows: the patches; see `VisionRows`.
          dtype: of the activations.
          execution: how.

        Returns:
          (last [G, R, L, D], taps [Kd, G, R, L, D]): the last block's output, and those of the DeepStack layers.
        """
        x = self.patch_embed(normalise(rows, self.config).astype(dtype))
        if self.pos_embed is not None:
            x = x + self._positions(rows, execution).astype(dtype)
        x = execution.constrain(x, "groups", "vision_rows", None, None)
        D, taps = x.shape[-1], self.config.deepstack_visual_indexes
        attend_in = self._attention(rows, execution)
        cos, sin = vision_cos_sin(rows.coords, D // self.config.num_heads)

        # Where each layer leaves its output: slot k for the k-th DeepStack layer, a spare last slot for the others.
        slots = [taps.index(i) if i in taps else len(taps) for i in range(self.config.depth)]
        full = [i in self.config.fullatt_block_indexes for i in range(self.config.depth)]

        def body(carry, layer):
            x, kept = carry
            block, slot, full = layer
            x = block(checkpoint_name(x, LAYER_INPUT), cos, sin, attend_in(full), execution)
            if taps:
                kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
            return (x, kept), None

        kept = jnp.zeros((len(taps) + 1 if taps else 0, *x.shape), dtype)
        kept = execution.constrain(kept, None, "groups", "vision_rows", None, None)
        layers = (self.blocks, jnp.asarray(slots, jnp.int32), jnp.asarray(full))
        (x, kept), _ = execution.scan(body, (x, kept), layers)
        return x, kept[: len(taps)]

    def _attention(self, rows: VisionRows, execution: Execution):
        """Returns `attend_in(full)`, a layer's `attend(q, k, v)`: over frames if `full`, else over windows."""

        def over_frames(q, k, v):
            return vision_attention(q, k, v, rows.segment_ids, execution)

        if not self.config.window_size:
            return lambda full: over_frames
        windows_GRL = rows.windows
        if windows_GRL is None:
            raise ConfigError(
                "the batch has no attention windows, but vision.window_size="
                f"{self.config.window_size}; make it with the processor of this model."
            )
        span = (self.config.window_cells * self.config.spatial_merge_size) ** 2

        def over_windows(q, k, v):
            return vision_attention(q, k, v, windows_GRL, execution, span=span)

        return lambda full: lambda q, k, v: jax.lax.cond(full, over_frames, over_windows, q, k, v)

    def _positions(self, rows: VisionRows, execution: Execution):
        """The learned square table, resized bilinearly (corners aligned) to each frame: f32[G, R, L, D]."""
        assert self.pos_embed is not None  # asked for only where there is a table
        side = round(self.config.num_position_embeddings**0.5)
        # Whole on every device before it is read at four places.
        table = execution.constrain(self.pos_embed.table[...], None, None).astype(jnp.float32)
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
