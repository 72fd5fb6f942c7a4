"""Mixture of experts: who goes where, and products of tokens with the weights of their own expert.

Dropless: every token goes through all of its experts, however unevenly they are loaded. Tokens are sorted by expert, so
that each expert's are one run of rows, multiplied by its own matrix:

    tokens of   expert 0 | expert 1      | (none) | expert 3
    rows        a  c     | a  b  d       |        | b  c  d
    times       W0       | W1            | W2     | W3
"""

import jax
import jax.numpy as jnp

# Rows that the CPU multiplies at a time, all with one expert's matrix.
_BLOCKS = (8, 128)


def route(logits_NX, k: int):
    """The `k` likeliest experts of each token and their shares.

    Args:
      logits_NX: [N, X] of the router, in the dtype of the activations.
      k: experts a token.

    Returns:
      (shares [N, k] in the dtype of the logits, each row summing to 1; experts i32[N, k]). The softmax, over all
      experts, is f32. Source: the reference's `Qwen3VLMoeTextTopKRouter`.
    """
    probabilities_NX = jax.nn.softmax(logits_NX.astype(jnp.float32), axis=-1)
    shares_Nk, experts_Nk = jax.lax.top_k(probabilities_NX, k)
    shares_Nk = shares_Nk / jnp.sum(shares_Nk, axis=-1, keepdims=True)
    return shares_Nk.astype(logits_NX.dtype), experts_Nk.astype(jnp.int32)


def experts_mlp(x_NH, shares_Nk, experts_Nk, gate_up_XH2F, down_XFH):
    """down(silu(gate x) * up x) of each token's experts, weighted by their shares and summed.

    Args:
      x_NH: [N, H] tokens.
      shares_Nk, experts_Nk: from `route`.
      gate_up_XH2F: [X, H, 2, F], gate first; in the dtype of the tokens.
      down_XFH: [X, F, H].

    Returns:
      [N, H] in the dtype of the tokens; summed over a token's experts in f32.
    """
    (N, H), k, X = x_NH.shape, experts_Nk.shape[1], gate_up_XH2F.shape[0]
    flat = experts_Nk.reshape(-1)
    order = jnp.argsort(flat)
    sizes_X = jnp.bincount(flat, length=X).astype(jnp.int32)
    rows = jnp.take(x_NH, order // k, axis=0)
    out = grouped_mlp(rows, gate_up_XH2F, down_XFH, sizes_X)
    out = out * jnp.take(shares_Nk.reshape(-1), order)[:, None]
    back = jnp.take(out, jnp.argsort(order), axis=0).reshape(N, k, H)
    return jnp.sum(back.astype(jnp.float32), axis=1).astype(x_NH.dtype)


def grouped_mlp(rows_PH, gate_up_XH2F, down_XFH, sizes_X):
    """down(silu(gate x) * up x) of each run of rows with the weights of its expert: [P, H]; see `grouped_product`."""
    X, H, _, F = gate_up_XH2F.shape
    gate_up = grouped_product(rows_PH, gate_up_XH2F.reshape(X, H, 2 * F), sizes_X)
    hidden = jax.nn.silu(gate_up[:, :F]) * gate_up[:, F:]
    return grouped_product(hidden, down_XFH, sizes_X)


def grouped_product(rows_PH, kernels_XHF, sizes_X):
    """Each run of rows times the matrix of its group.

    Args:
      rows_PH: [P, H], sorted by group.
      kernels_XHF: [X, H, F].
      sizes_X: i32[X], rows of each group; their sum is at most P.

    Returns:
      [P, F]; what stands in rows of no group means nothing, and they get no gradient.
    """
    # XLA's CPU backend multiplies all rows with every group's matrix in a ragged product.
    return jax.lax.platform_dependent(
        rows_PH, kernels_XHF, sizes_X, cpu=_in_blocks, default=lambda *args: jax.lax.ragged_dot(*args)
    )


def _in_blocks(rows_PH, kernels_XHF, sizes_X):
    """The product in blocks of rows of one group, each group filled up to whole blocks."""
    P, X = rows_PH.shape[0], kernels_XHF.shape[0]
    # An eighth of a group's share, so that what fills up the groups' last blocks stays an eighth of the work.
    block = min(max(_BLOCKS[0], 1 << (P // X // 8).bit_length() - 1 if P >= 8 * X else 0), _BLOCKS[1])
    # A group of n rows takes at most n // block + 1 blocks, and at most P groups have rows at all.
    count = P // block + min(P, X)
    blocks_X = -(-sizes_X // block)
    ends_X = jnp.cumsum(blocks_X)
    group_P = jnp.repeat(jnp.arange(X), sizes_X, total_repeat_length=P)
    within_P = jnp.arange(P) - jnp.take(jnp.cumsum(sizes_X) - sizes_X, group_P)
    place_P = jnp.take(ends_X - blocks_X, group_P) * block + within_P
    filled = jnp.zeros((count * block, rows_PH.shape[1]), rows_PH.dtype).at[place_P].set(rows_PH, unique_indices=True)
    group_of_block = jnp.minimum(jnp.searchsorted(ends_X, jnp.arange(count), side="right"), X - 1)
    kernels = jnp.take(kernels_XHF, group_of_block, axis=0)
    out = jnp.einsum("bph,bhf->bpf", filled.reshape(count, block, -1), kernels)
    return jnp.take(out.reshape(count * block, -1), place_P, axis=0)
