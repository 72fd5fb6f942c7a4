"""Losses over a vocabulary that never hold [tokens, vocabulary] in f32 at once."""

import jax
import jax.numpy as jnp


def chunked_cross_entropy(hidden_BTH, head_HV, targets_BT, weights_BT, chunk: int = 1024):
    """Weighted sum of the negative log likelihoods of `targets_BT`, computed `chunk` tokens at a time.

    The logits of a chunk are made, used and dropped, and made again in the backward pass, so that memory holds
    [chunk, V] in place of [B * T, V].

    Args:
      hidden_BTH: [B, T, H], the decoder's output after its last norm.
      head_HV: [H, V], the output projection.
      targets_BT: i32[B, T].
      weights_BT: f32[B, T]; 0 leaves a token out.
      chunk: tokens at a time.

    Returns:
      f32[], the sum over tokens of weight * -log p(target).
    """
    B, T, H = hidden_BTH.shape
    count = B * T
    chunk = min(chunk, count)
    padding = -count % chunk
    hidden = jnp.pad(hidden_BTH.reshape(count, H), ((0, padding), (0, 0))).reshape(-1, chunk, H)
    targets = jnp.pad(targets_BT.reshape(count), (0, padding)).reshape(-1, chunk)
    weights = jnp.pad(weights_BT.reshape(count), (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one_chunk(total, inputs):
        hidden_CH, targets_C, weights_C = inputs
        logits_CV = jnp.einsum("ch,hv->cv", hidden_CH, head_HV.astype(hidden_CH.dtype)).astype(jnp.float32)
        normaliser_C = jax.nn.logsumexp(logits_CV, axis=-1)
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        return total + jnp.sum((normaliser_C - target_C) * weights_C), None

    total, _ = jax.lax.scan(one_chunk, jnp.float32(0), (hidden, targets, weights))
    return total
