"""Losses over a vocabulary that never hold [tokens, vocabulary] in f32 at once."""

import functools
import math

import jax
import jax.numpy as jnp

from qwenvl_jax.parallel.placement import Execution


def token_losses(hidden_BTH, head_HV, targets_BT, *, chunk: int = 1024, execution: Execution | None = None):
    """The negative log likelihood of each target.

    The logits of a chunk are made, used and dropped, and made again in the backward pass, so that memory holds
    [chunk, V] in place of [B * T, V], on each device of its own tokens and its part of the vocabulary. The gradient of
    the projection is summed over chunks in f32.

    Args:
      hidden_BTH: [B, T, H], the decoder's output after its last norm.
      head_HV: [H, V], the output projection.
      targets_BT: i32[B, T].
      chunk: tokens at a time on each device.
      execution: where they lie; one device without it.

    Returns:
      f32[B, T].
    """
    head_HV = head_HV.astype(hidden_BTH.dtype)
    if execution is None or execution.mesh.size == 1:
        return _local_losses(hidden_BTH, head_HV, targets_BT, chunk, None)
    tokens = execution.fitting_spec(targets_BT.shape, "batch", "tokens")
    weight = execution.fitting_spec(head_HV.shape, "embed", "vocab")

    def local(hidden, head, targets):
        if weight[0] is not None:
            head = jax.lax.all_gather(head, weight[0], axis=0, tiled=True)
        return _local_losses(hidden, head, targets, chunk, weight[1])

    return execution.map(local, (tokens, weight, tokens), tokens)(hidden_BTH, head_HV, targets_BT)


def chunked_cross_entropy(hidden_BTH, head_HV, targets_BT, weights_BT, chunk: int = 1024):
    """Weighted sum of the negative log likelihoods of `targets_BT`, f32[]; see `token_losses`."""
    return jnp.sum(token_losses(hidden_BTH, head_HV, targets_BT, chunk=chunk) * weights_BT)


def _local_losses(hidden, head_HV, targets, chunk: int, axis):
    """`token_losses` of one device, whose part of the vocabulary is one of those along the mesh axes `axis`."""
    count = math.prod(targets.shape)
    chunk = min(chunk, count)
    padding = -count % chunk
    hidden_nCH = jnp.pad(hidden.reshape(count, -1), ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    targets_nC = jnp.pad(targets.reshape(count), (0, padding)).reshape(-1, chunk)
    losses_nC = _chunk_losses(hidden_nCH, head_HV, targets_nC, axis)
    return losses_nC.reshape(-1)[:count].reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunk_losses(hidden_nCH, head_HV, targets_nC, axis):
    return _forward(hidden_nCH, head_HV, targets_nC, axis)[0]


def _forward(hidden_nCH, head_HV, targets_nC, axis):
    def one_chunk(_, inputs):
        hidden_CH, targets_C = inputs
        logits_CV = _logits(hidden_CH, head_HV)
        largest_C = jnp.max(logits_CV, axis=-1)
        if axis is not None:
            largest_C = jax.lax.pmax(largest_C, axis)
        sums_C = jnp.sum(jnp.exp(logits_CV - largest_C[:, None]), axis=-1)
        own_C, place_C = _own(targets_C, head_HV, axis)
        target_C = jnp.take_along_axis(logits_CV, place_C[:, None], axis=-1)[:, 0] * own_C
        if axis is not None:
            sums_C, target_C = jax.lax.psum((sums_C, target_C), axis)
        normaliser_C = jnp.log(sums_C) + largest_C
        return None, (normaliser_C - target_C, normaliser_C)

    _, (losses_nC, normalisers_nC) = jax.lax.scan(one_chunk, None, (hidden_nCH, targets_nC))
    return losses_nC, (hidden_nCH, head_HV, targets_nC, normalisers_nC)


def _backward(axis, kept, gradients_nC):
    hidden_nCH, head_HV, targets_nC, normalisers_nC = kept
    if axis is not None:
        # Each device has its share of the gradient of a loss that all of them gave.
        gradients_nC = jax.lax.psum(gradients_nC, axis)

    def one_chunk(head_gradient_HV, inputs):
        hidden_CH, targets_C, normaliser_C, gradient_C = inputs
        probabilities_CV = jnp.exp(_logits(hidden_CH, head_HV) - normaliser_C[:, None])
        own_C, place_C = _own(targets_C, head_HV, axis)
        hit_CV = jax.nn.one_hot(place_C, head_HV.shape[1], dtype=jnp.float32) * own_C[:, None]
        logits_gradient_CV = ((probabilities_CV - hit_CV) * gradient_C[:, None]).astype(hidden_CH.dtype)
        hidden_gradient_CH = jnp.einsum("cv,hv->ch", logits_gradient_CV, head_HV)
        more_HV = jnp.einsum("ch,cv->hv", hidden_CH, logits_gradient_CV, preferred_element_type=jnp.float32)
        return head_gradient_HV + more_HV, hidden_gradient_CH

    begun_HV = jnp.zeros(head_HV.shape, jnp.float32)
    inputs = (hidden_nCH, targets_nC, normalisers_nC, gradients_nC)
    head_gradient_HV, hidden_gradient_nCH = jax.lax.scan(one_chunk, begun_HV, inputs)
    return hidden_gradient_nCH, head_gradient_HV.astype(head_HV.dtype), None


_chunk_losses.defvjp(_forward, _backward)


def _logits(hidden_CH, head_HV):
    return jnp.einsum("ch,hv->cv", hidden_CH, head_HV).astype(jnp.float32)


def _own(targets_C, head_HV, axis):
    """Whether each target is in this device's part of the vocabulary, f32[C], and at which place, i32[C]."""
    part = head_HV.shape[1]
    first = 0 if axis is None else jax.lax.axis_index(axis) * part
    place_C = targets_C - first
    own_C = (place_C >= 0) & (place_C < part)
    return own_C.astype(jnp.float32), jnp.clip(place_C, 0, part - 1)
