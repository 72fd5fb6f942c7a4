"""The decoder: grouped-query attention, MRoPE, SwiGLU or experts, scanned layers; `TextConfig` tells the generations.

DeepStack features enter inside the scan: after decoder layer k (both residuals added) the k-th features are added to
the hidden states of the vision tokens. Sources: Qwen3-VL technical report, section 2; the reference's
`Qwen2VLTextModel`, `Qwen2_5_VLTextModel`, `Qwen3VLTextModel`, `Qwen3VLMoeTextModel`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qwenvl_jax.config import TextConfig
from qwenvl_jax.models.layers import RESIDUAL_GAIN, Embed, Linear, RMSNorm
from qwenvl_jax.models.moe import SparseMoe
from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.rope import rotate
from qwenvl_jax.ops.router import router_load
from qwenvl_jax.ops.row_attention import text_attention
from qwenvl_jax.parallel.placement import LAYER_INPUT, Execution


class TextAttention(nnx.Module):
    """Queries, keys and values; the first two are turned, after a norm per head where the generation has one."""

    def __init__(self, config: TextConfig, *, stack, rngs, dtype):
        embed = {"embed": config.hidden_size}
        heads = {"heads": config.num_attention_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        make = {"use_bias": False, "stack": stack, "rngs": rngs, "dtype": dtype}
        biased = make | {"use_bias": config.attention_bias}
        self.q = Linear(embed, heads, **biased)
        self.k = Linear(embed, kv_heads, **biased)
        self.v = Linear(embed, kv_heads, **biased)
        self.o = Linear(heads, embed, gain=RESIDUAL_GAIN, **make)
        norm = {"eps": config.rms_norm_eps, "stack": stack, "dtype": dtype}
        self.q_norm = RMSNorm(config.head_dim, **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, **norm) if config.qk_norm else None

    def project(self, x_BTH, cos, sin, execution: Execution):
        """Returns (q [B, T, N, E], k [B, T, K, E], v [B, T, K, E]), the first two turned to their positions."""

        def placed(x, heads):
            return execution.constrain(x, "batch", "tokens", heads, None)

        q, k, v = placed(self.q(x_BTH), "heads"), placed(self.k(x_BTH), "kv_heads"), placed(self.v(x_BTH), "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class TextMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: TextConfig, *, stack, rngs, dtype):
        embed, mlp = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        make = {"use_bias": False, "stack": stack, "rngs": rngs, "dtype": dtype}
        self.gate = Linear(embed, mlp, **make)
        self.up = Linear(embed, mlp, **make)
        self.down = Linear(mlp, embed, gain=RESIDUAL_GAIN, **make)

    def __call__(self, x_BTH, execution: Execution):
        hidden = jax.nn.silu(self.gate(x_BTH)) * self.up(x_BTH)
        return self.down(execution.constrain(hidden, "batch", "tokens", "mlp")), None


class TextLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: TextConfig, *, stack, rngs, dtype):
        norm = {"eps": config.rms_norm_eps, "stack": stack, "dtype": dtype}
        self.input_norm = RMSNorm(config.hidden_size, **norm)
        self.attn = TextAttention(config, stack=stack, rngs=rngs, dtype=dtype)
        self.post_attention_norm = RMSNorm(config.hidden_size, **norm)
        mlp = TextMLP if config.moe is None else SparseMoe
        self.mlp = mlp(config, stack=stack, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTH, cos, sin, attend, execution: Execution):
        """One layer. `attend(q, k, v) -> (y, aux)` decides what the queries see; `aux` is handed back.

        Returns:
          ([B, T, H], aux, (logits, experts) of the router or None without one).
        """
        y, aux = attend(*self.attn.project(self.input_norm(x_BTH), cos, sin, execution))
        x_BTH = execution.constrain(x_BTH + self.attn.o(y), "batch", "tokens", None)
        mlp, routed = self.mlp(self.post_attention_norm(x_BTH), execution)
        return execution.constrain(x_BTH + mlp, "batch", "tokens", None), aux, routed


class Decoder(nnx.Module):
    """Embedding, the scanned layers, the last norm and the output projection (the embedding's own where tied)."""

    def __init__(self, config: TextConfig, *, rngs, dtype):
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, axes=("vocab", "embed"), rngs=rngs, dtype=dtype)
        self.layers = TextLayer(config, stack=config.num_hidden_layers, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(
                {"embed": config.hidden_size}, {"vocab": config.vocab_size}, use_bias=False, rngs=rngs, dtype=dtype
            )
        )

    def head_weight(self):
        """Returns the output projection, [H, V]."""
        return self.embed.table[...].T if self.head is None else self.head.kernel[...]

    def logits(self, x):
        """Maps hidden states [..., H] to logits f32[..., V]."""
        weight = self.head_weight().astype(x.dtype)
        return jnp.einsum("...h,hv->...v", x, weight).astype(jnp.float32)

    def __call__(self, x_BTH, cos, sin, segments_BT, deepstack, execution: Execution):
        """Runs the layers over whole rows.

        Args:
          x_BTH: embeddings, vision tokens in place.
          cos, sin: [B, T, E // 2], from `mrope_cos_sin`.
          segments_BT: i32[B, T], the samples of each row; 0 is padding.
          deepstack: (count, add): `add(x, k)` adds the k-th DeepStack features to x; count may be 0.
          execution: how; its `balanced` says in which order the slots stand.

        Returns:
          ([B, T, H] after the last norm, (keys, values) each [Y, B, K, T, E], the experts' load by `router_load`, each
          [Y, ...], or None without experts).
        """

        def attend(q, k, v):
            return text_attention(q, k, v, segments_BT, execution), (k.swapaxes(1, 2), v.swapaxes(1, 2))

        def body(x, layer):
            layer, index = layer
            x = checkpoint_name(x, LAYER_INPUT)
            x, keys_values, routed = layer(x, cos, sin, attend, execution)
            load = None if routed is None else router_load(routed[0], routed[1], segments_BT)
            return _add_deepstack(x, index, deepstack), (keys_values, load)

        indices = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        x_BTH, (keys_values, load) = execution.scan(body, x_BTH, (self.layers, indices))
        return self.norm(x_BTH), keys_values, load

    def step(self, x_B1H, cos, sin, keys, values, lengths_B, execution: Execution):
        """Runs the layers over one new token a row, reading and extending the cache in place.

        The cache is carried through the scan, not scanned over: as scanned input and output it would be copied whole.

        Args:
          x_B1H: embeddings of the new tokens.
          cos, sin: [B, 1, E // 2].
          keys, values: [Y, B, K, S, E].
          lengths_B: i32[B], the slot of the new token in each row.

        Returns:
          ([B, 1, H] after the last norm, keys, values).
        """
        cached = execution.fitting_spec(keys.shape, None, "batch", "kv_heads", None, None)
        token = PartitionSpec(cached[1], None, cached[2], None)
        write = execution.map(_written, (cached, token, PartitionSpec(), PartitionSpec(cached[1])), cached)
        filled_BS = (jnp.arange(keys.shape[3])[None, :] <= lengths_B[:, None]).astype(jnp.int32)
        ones_B1 = jnp.ones((x_B1H.shape[0], 1), jnp.int32)

        def body(carry, layer):
            x, keys, values = carry
            layer, index = layer

            def attend(q, k, v):
                new_keys, new_values = write(keys, k, index, lengths_B), write(values, v, index, lengths_B)
                mine = (
                    jax.lax.dynamic_index_in_dim(c, index, 0, keepdims=False).swapaxes(1, 2)
                    for c in (new_keys, new_values)
                )
                y = attention(q, *mine, q_segments_BT=ones_B1, kv_segments_BS=filled_BS, causal=False)
                return y, (new_keys, new_values)

            x, (keys, values), _ = layer(x, cos, sin, attend, execution)
            return (x, keys, values), None

        indices = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        (x_B1H, keys, values), _ = jax.lax.scan(body, (x_B1H, keys, values), (self.layers, indices))
        return self.norm(x_B1H), keys, values


def _written(cache, new_B1KE, layer, lengths_B):
    """A layer's keys or values [Y, B, K, S, E] with one more token, at the slot `lengths_B` of each row, in place.

    There must be such a slot: of a row that is full the last one would be written over.

    Row by row: of a scatter over rows and slots compilers for TPUs make a copy of the cache where heads are several.
    """
    for row in range(cache.shape[1]):
        new = new_B1KE[row, 0][None, None, :, None, :]
        cache = jax.lax.dynamic_update_slice(cache, new, (layer, row, 0, lengths_B[row], 0))
    return cache


def _add_deepstack(x, index, deepstack):
    """Adds the features of decoder layer `index`, where it has any; the other layers skip even the gather."""
    count, add = deepstack
    if not count:
        return x
    return jax.lax.cond(index < count, lambda x: add(x, jnp.minimum(index, count - 1)), lambda x: x, x)
