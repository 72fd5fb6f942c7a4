"""`QwenVL`: tower, mergers and decoder, joined by the vision index of a `Batch`.

Calls change nothing: caches go in and come out. Training splits the module once and works on the plain tree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.batch import Batch, KVCache
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.models.merger import Merger
from qwenvl_jax.models.text import Decoder
from qwenvl_jax.models.vision import VisionTower
from qwenvl_jax.ops.rope import mrope_cos_sin
from qwenvl_jax.parallel.placement import Execution


class QwenVL(nnx.Module):
    """A Qwen-VL model.

    Attributes:
      config: the shape; see `QwenVLConfig`.
      dtype: of the activations. Norms, softmax, rotary angles and logits are f32 whatever it is.
      execution: how it is run where a call does not say; on its mesh, when it was loaded onto one.
      vision, merger, deepstack, text: the parts. `deepstack` holds the DeepStack mergers stacked, or None.
    """

    def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        self.config, self.dtype, self.execution = config, jnp.dtype(dtype), Execution()
        taps = len(config.vision.deepstack_visual_indexes)
        make = {"rngs": rngs, "dtype": param_dtype}
        self.vision = VisionTower(config.vision, **make)
        self.merger = Merger(config.vision, norm_after_join=False, **make)
        self.deepstack = Merger(config.vision, norm_after_join=True, stack=taps, **make) if taps else None
        self.text = Decoder(config.text, **make)

    @classmethod
    def from_pretrained(cls, path, dtype="bfloat16", mesh=None, adapter=None) -> "QwenVL":
        """Loads a folder in the public or the native layout, or a hub id; see `qwenvl_jax.models.pretrained.load`."""
        from qwenvl_jax.models import pretrained

        return pretrained.load(path, dtype=dtype, mesh=mesh, adapter=adapter)

    def save_pretrained(self, out_dir) -> None:
        """Writes the public layout; see `qwenvl_jax.models.pretrained.save`."""
        from qwenvl_jax.models import pretrained

        pretrained.save(self, out_dir)

    def __call__(self, batch: Batch):
        """Logits of every token slot: f32[B, T, V]. Those of padding mean nothing."""
        return self.text.logits(self.hidden(batch))

    def hidden(self, batch: Batch, execution: Execution | None = None):
        """The decoder's output after its last norm, [B, T, H]: what a chunked loss reads."""
        return self.hidden_and_load(batch, execution)[0]

    def hidden_and_load(self, batch: Batch, execution: Execution | None = None):
        """Returns (`hidden`, the load of the experts by layer, see `qwenvl_jax.ops.router`; None without)."""
        x_BTH, _, load = self._decode_rows(batch, execution or self.execution)
        return x_BTH, load

    def encode(self, batch: Batch, execution: Execution | None = None):
        """Runs the tower and the mergers.

        Returns:
          (merged [G, M, H], deepstack [Kd, G, M, H]), the merged tokens of each group, bucket after bucket.
        """
        merged, deep = [], []
        execution = execution or self.execution
        for rows in batch.vision:
            last, taps = self.vision(rows, self.dtype, execution)
            merged.append(self._joined(self.merger(last, execution), execution))
            if self.deepstack is not None:
                features = jax.vmap(lambda merger, tap: merger(tap, execution))(self.deepstack, taps)
                deep.append(self._joined(features, execution))
        return jnp.concatenate(merged, axis=-2), jnp.concatenate(deep, axis=-2) if deep else None

    def _joined(self, features, execution: Execution):
        """Vision rows of a group [..., G, R, L / 4, H] after one another, [..., G, M, H]: whatever text needs them."""
        lead = (None,) * (features.ndim - 4)
        features = execution.constrain(features, *lead, "groups", "vision_rows", None, None)
        features = features.reshape(*features.shape[:-3], -1, features.shape[-1])
        return execution.constrain(features, *lead, "groups", None, None)

    def prefill(self, batch: Batch, cache_size: int):
        """Reads one prompt a row and fills a cache with it.

        Args:
          batch: one sample a row, padding on the right.
          cache_size: S, slots of the cache; at least T.

        Returns:
          (logits f32[B, V] of each row's next token, the cache).
        """
        x_BTH, (keys, values), _ = self._decode_rows(batch, self.execution)
        lengths_B = jnp.sum(batch.segment_ids > 0, axis=1).astype(jnp.int32)
        room = ((0, 0), (0, 0), (0, 0), (0, cache_size - x_BTH.shape[1]), (0, 0))
        last_B11 = (lengths_B - 1)[:, None, None]
        last_BH = jnp.take_along_axis(x_BTH, last_B11, axis=1)[:, 0]
        # What follows counts on from the last token, as in the reference's `generate`: the times of a video of
        # Qwen2.5-VL may lie beyond the text after it (dialect "transformers").
        positions_BA = jnp.take_along_axis(batch.positions, last_B11, axis=1)[:, 0]
        cache = KVCache(
            keys=jnp.pad(keys, room),
            values=jnp.pad(values, room),
            lengths=lengths_B,
            next_positions=jnp.max(positions_BA, axis=1) + 1,
        )
        return self.text.logits(last_BH), cache

    def decode(self, tokens_B, cache: KVCache):
        """Reads one more token a row. Donate the cache: it is extended in place.

        Args:
          tokens_B: i32[B].
          cache: as `prefill` or `decode` left it, with a free slot in every row.

        Returns:
          (logits f32[B, V] of the token after it, the cache).
        """
        B = tokens_B.shape[0]
        positions_B1A = jnp.broadcast_to(cache.next_positions[:, None, None], (B, 1, 3))
        cos, sin = self._cos_sin(positions_B1A)
        x_B1H = self.text.embed(tokens_B[:, None], self.dtype, self.execution)
        x_B1H, keys, values = self.text.step(x_B1H, cos, sin, cache.keys, cache.values, cache.lengths, self.execution)
        cache = KVCache(keys, values, cache.lengths + 1, cache.next_positions + 1)
        return self.text.logits(x_B1H[:, 0]), cache

    def _cos_sin(self, positions_BTA):
        text = self.config.text
        return mrope_cos_sin(positions_BTA, text.rope, text.head_dim, self.dtype)

    def _decode_rows(self, batch: Batch, execution: Execution):
        x_BTH = self.text.embed(batch.tokens, self.dtype, execution)
        x_BTH = execution.constrain(x_BTH, "batch", "tokens", None)
        deepstack: tuple[int, Callable | None] = (0, None)
        if batch.vision:
            merged, deep = self.encode(batch, execution)
            x_BTH = _at_vision(x_BTH, merged, batch, execution, otherwise=x_BTH)
            if deep is not None:

                def add(x, k):
                    features = jax.lax.dynamic_index_in_dim(deep, k, 0, keepdims=False)
                    return x + _at_vision(x, features, batch, execution, otherwise=jnp.zeros_like(x))

                deepstack = (deep.shape[0], add)
        cos, sin = self._cos_sin(batch.positions)
        return self.text(x_BTH, cos, sin, batch.segment_ids, deepstack, execution)


def _at_vision(x_BTH, features_GMH, batch: Batch, execution: Execution, otherwise):
    """Returns [B, T, H]: at each vision token the feature of its own group, elsewhere `otherwise`.

    A pooled token has the weighted sum of several, in f32.
    """
    if batch.pool_index is None or batch.pool_weights is None:
        picked_BTH = _gather(features_GMH, batch.vision_index, execution)
    else:

        def add(sum_BTH, tap):
            index_BT, weights_BT = tap
            return sum_BTH + weights_BT[..., None] * _gather(features_GMH, index_BT, execution).astype(
                jnp.float32
            ), None

        # One at a time, since all of them together would take Q times the memory of the hidden states.
        taps_QBT = (jnp.moveaxis(batch.pool_index, -1, 0), jnp.moveaxis(batch.pool_weights, -1, 0))
        picked_BTH, _ = jax.lax.scan(add, jnp.zeros(x_BTH.shape, jnp.float32), taps_QBT)
    return jnp.where((batch.vision_index >= 0)[..., None], picked_BTH.astype(x_BTH.dtype), otherwise)


def _gather(features_GMH, index_BT, execution: Execution):
    """Returns [B, T, H], the features at these indices, the first where they are negative.

    The gather stays within a group, so that under sharding no device reads another group's features.
    """
    (B, T), (G, _, H) = index_BT.shape, features_GMH.shape
    index_GbT = jnp.maximum(index_BT, 0).reshape(G, B // G, T)
    picked = jax.vmap(lambda features, index: jnp.take(features, index, axis=0))(features_GMH, index_GbT)
    picked = execution.constrain(picked, "groups", None, "tokens", None)
    return execution.constrain(picked.reshape(B, T, H), "batch", "tokens", None)
