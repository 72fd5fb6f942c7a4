"""Looking up tokens in a table of vectors that is split over devices.

Left to the compiler, a table whose width is split where rows of tokens are split too has every device hold the vectors
of all tokens. Here only ids go to all of those devices; each looks them up in its part of the width, and sends each
device the vectors of its own tokens. That is less than the table wherever a device has fewer tokens than it entries.
"""

import jax
import jax.numpy as jnp

from qwenvl_jax.parallel.placement import Execution


def embed_tokens(table_VH, tokens_BT, dtype, execution: Execution | None = None):
    """The vectors of tokens: [B, T, H] in `dtype`; gradients are summed in the dtype of the table.

    Args:
      table_VH: [V, H].
      tokens_BT: i32[B, T].
      execution: where they lie; one device without it.
    """
    if execution is None or execution.mesh.size == 1:
        return jnp.take(table_VH, tokens_BT, axis=0).astype(dtype)
    tokens = execution.fitting_spec(tokens_BT.shape, "batch", "tokens")
    table = execution.fitting_spec(table_VH.shape, "vocab", "embed")
    entries, width = table

    def local(part_VH, own_BT):
        ids_n = own_BT.reshape(-1)
        if width is not None:
            ids_n = jax.lax.all_gather(ids_n, width, tiled=True)
        x_nH = _looked_up(part_VH, ids_n, entries).astype(dtype)
        if width is not None:
            x_nH = jax.lax.all_to_all(x_nH, width, split_axis=0, concat_axis=1, tiled=True)
        if entries is not None:
            x_nH = jax.lax.psum(x_nH, entries)
        return x_nH.reshape(*own_BT.shape, -1)

    return execution.map(local, (table, tokens), tokens)(table_VH, tokens_BT)


def _looked_up(part_VH, ids_n, axis):
    """Rows of this device's part of a table that is split along the mesh axes `axis`; nothing for those of others."""
    if axis is None:
        return jnp.take(part_VH, ids_n, axis=0)
    place_n = ids_n - jax.lax.axis_index(axis) * part_VH.shape[0]
    own_n = (place_n >= 0) & (place_n < part_VH.shape[0])
    x_nH = jnp.take(part_VH, jnp.where(own_n, place_n, 0), axis=0)
    return x_nH * own_n[:, None].astype(x_nH.dtype)
