"""Mixture of experts: who goes where, and products of tokens with the weights of their own expert.

Dropless: every token goes through all of its experts, however unevenly they are loaded. Tokens are sorted by expert, so
that each expert's are one run of rows, multiplied by its own matrix:

    tokens of   expert 0 | expert 1      | (none) | expert 3
    rows        a  c     | a  b  d       |        | b  c  d
    times       W0       | W1            | W2     | W3
"""

import functools

import jax
import jax.numpy as jnp

# Rows that are multiplied at a time, all with one expert's matrix: the least, the most, and which part of an expert's
# mean share they are. Each block has a copy of its matrix, which costs a GPU more than products with rows of zeros.
# These copies, and the gradients of each block's matrix, are at most so many values at a time.
_COPIES = 2**28
_CPU_BLOCKS, _GPU_BLOCKS = (8, 128, 8), (8, 2**16, 1)


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
      [P, F]; what stands in rows of no group means nothing. Such rows of `rows_PH` and of the gradient have to be zero
      where gradients are taken.
    """
    # XLA's CPU and CUDA backends multiply all rows with every group's matrix in a ragged product, the latter after it
    # has made as many copies of the rows as there are groups (JAX 0.11.2; with cuDNN's product, for the gradients).
    return jax.lax.platform_dependent(
        rows_PH,
        kernels_XHF,
        sizes_X,
        cpu=functools.partial(_in_blocks, _CPU_BLOCKS),
        cuda=functools.partial(_in_blocks, _GPU_BLOCKS),
        default=lambda *args: jax.lax.ragged_dot(*args),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(blocks: tuple[int, int, int], rows_PH, kernels_XHF, sizes_X):
    """The product in blocks of rows of one group, each group filled up to whole blocks.

    Args:
      blocks: see `_CPU_BLOCKS`.
    """
    return _Blocks(blocks, rows_PH.shape[0], sizes_X).product(rows_PH, kernels_XHF)


def _kept(blocks, rows_PH, kernels_XHF, sizes_X):
    return _in_blocks(blocks, rows_PH, kernels_XHF, sizes_X), (rows_PH, kernels_XHF, sizes_X)


def _gradients(blocks, kept, gradient_PF):
    # Written out, so that no copies of matrices are kept for it, and sums over blocks are f32.
    rows_PH, kernels_XHF, sizes_X = kept
    laid = _Blocks(blocks, rows_PH.shape[0], sizes_X)
    rows_gradient_PH = laid.product(gradient_PF, kernels_XHF.swapaxes(1, 2))
    return rows_gradient_PH, laid.summed(rows_PH, gradient_PF).astype(kernels_XHF.dtype), None


_in_blocks.defvjp(_kept, _gradients)


class _Blocks:
    """Where rows stand that are sorted by group, once each group begins with a block of its own.

    Args:
      blocks: see `_CPU_BLOCKS`.
      P: rows.
      sizes_X: rows of each group.
    """

    def __init__(self, blocks: tuple[int, int, int], P: int, sizes_X):
        (least, most, part), X = blocks, len(sizes_X)
        # A power of two; what fills up the groups' last blocks is then at most such a part of the work again.
        self._rows = min(max(least, 1 << (P // X // part).bit_length() - 1 if part * X <= P else 0), most)
        # A group of n rows takes at most n // rows + 1 blocks, and at most P groups have rows at all.
        self._count = P // self._rows + min(P, X)
        blocks_X = -(-sizes_X // self._rows)
        ends_X = jnp.cumsum(blocks_X)
        group_P = jnp.repeat(jnp.arange(X), sizes_X, total_repeat_length=P)
        within_P = jnp.arange(P) - jnp.take(jnp.cumsum(sizes_X) - sizes_X, group_P)
        self._place_P = jnp.take(ends_X - blocks_X, group_P) * self._rows + within_P
        self._groups = X
        self._group = jnp.minimum(jnp.searchsorted(ends_X, jnp.arange(self._count), side="right"), X - 1)

    def product(self, rows_PH, kernels_XHF):
        """Each row times the matrix of its group: [P, F]."""
        filled, (_, H, F) = self._filled(rows_PH), kernels_XHF.shape

        def columns(kernels_XHf):
            return jnp.einsum("bph,bhf->bpf", filled, jnp.take(kernels_XHf, self._group, axis=0))

        out = _in_parts(columns, kernels_XHF, self._count * H * F, out=2)
        return jnp.take(out.reshape(-1, F), self._place_P, axis=0)

    def summed(self, rows_PH, others_PF):
        """The outer products of rows with their others, summed over each group: f32[X, H, F]."""
        others = self._filled(others_PF)

        def of_columns(rows_bph):
            outer = jnp.einsum("bph,bpf->bhf", rows_bph, others, preferred_element_type=jnp.float32)
            return jax.ops.segment_sum(outer, self._group, self._groups, indices_are_sorted=True)

        size = self._count * rows_PH.shape[1] * others_PF.shape[1]
        return _in_parts(of_columns, self._filled(rows_PH), size, out=1)

    def _filled(self, rows_PH):
        """In blocks, with zeros between the groups: [blocks, rows of a block, H]."""
        filled = jnp.zeros((self._count * self._rows, rows_PH.shape[1]), rows_PH.dtype)
        filled = filled.at[self._place_P].set(rows_PH, unique_indices=True)
        return filled.reshape(self._count, self._rows, -1)


def _in_parts(function, x, size: int, out: int):
    """`function(x)` of equal parts of x along its last axis, one after another; side by side along the axis `out`.

    Args:
      size: values that the function holds if it is given all of x; of a part no more than `_COPIES`.
    """
    length = x.shape[-1]
    parts = next(n for n in range(1, length + 1) if length % n == 0 and (size <= n * _COPIES or n == length))
    if parts == 1:
        return function(x)
    each = length // parts
    starts = jnp.arange(parts, dtype=jnp.int32) * each
    found = jax.lax.map(lambda start: function(jax.lax.dynamic_slice_in_dim(x, start, each, axis=-1)), starts)
    found = jnp.moveaxis(found, 0, out)
    return found.reshape(*found.shape[:out], length, *found.shape[out + 2 :])
