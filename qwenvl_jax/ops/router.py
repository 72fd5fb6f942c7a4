"""What keeps a router of experts in balance, and how balanced it is.

Padding counts nowhere. Means are over all devices: the global-batch balance of Qwen3 (arXiv 2505.09388, section 2),
which lets a device's few samples be as one-sided as they are. A batch that is taken in microbatches has the mean of
their balances, weighed by their tokens: to weigh one by what the whole batch chose, all would have to be run twice.
"""

import jax
import jax.numpy as jnp


def router_load(logits_BTX, experts_BTk, segments_BT) -> dict[str, jax.Array]:
    """What a layer's router did, summed over the tokens of a batch.

    Args:
      logits_BTX: of the router.
      experts_BTk: i32, the experts that each token was sent to.
      segments_BT: i32[B, T]; 0 is padding.

    Returns:
      "choices" f32[X], tokens sent to each expert; "probabilities" f32[X], summed; "z" f32[], the squared logarithms of
      the normalisers, summed; "tokens" f32[].
    """
    real_BT = (segments_BT > 0).astype(jnp.float32)
    logits_BTX = logits_BTX.astype(jnp.float32)
    chosen_BTX = sum(
        jax.nn.one_hot(experts_BTk[..., choice], logits_BTX.shape[-1], dtype=jnp.float32)
        for choice in range(experts_BTk.shape[-1])
    )
    return {
        "choices": jnp.einsum("btx,bt->x", chosen_BTX, real_BT),
        "probabilities": jnp.einsum("btx,bt->x", jax.nn.softmax(logits_BTX, axis=-1), real_BT),
        "z": jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTX, axis=-1)) * real_BT),
        "tokens": jnp.sum(real_BT),
    }


def balance_loss(load: dict[str, jax.Array]):
    """X * sum over experts of (share of the choices) * (mean probability), averaged over layers: f32[].

    1 where all experts are chosen alike, X where one takes everything. Source: Switch Transformers (arXiv 2101.03961,
    section 2.2), for several choices a token. The reference's `load_balancing_loss_func` is as many times larger as a
    token has choices, and takes the two means over all layers at once, by which one layer may make up for another.

    Args:
      load: of `router_load`, stacked along a leading layer axis.
    """
    share_YX = load["choices"] / _positive(jnp.sum(load["choices"], axis=-1, keepdims=True))
    mean_YX = load["probabilities"] / _positive(load["tokens"][:, None])
    return share_YX.shape[-1] * jnp.mean(jnp.sum(share_YX * mean_YX, axis=-1))


def z_loss(load: dict[str, jax.Array]):
    """Mean square of the logarithm of the routers' normalisers, f32[]; keeps their logits small.

    Source: ST-MoE (arXiv 2202.08906, section 2).
    """
    return jnp.mean(load["z"] / _positive(load["tokens"]))


def _positive(x):
    return jnp.maximum(x, jnp.ones((), x.dtype))
