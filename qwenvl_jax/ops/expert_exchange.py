"""Experts split over the mesh: tokens travel over the `expert` axis to the devices of their experts, and back.

Dropless: a device takes whatever the router sends it. With P devices along `expert`, each holding X / P experts:

    own tokens, k times, sorted by expert  ->  exchange  ->  sorted by own expert  ->  product  ->  the same way back

XLA exchanges ragged runs of rows on TPU and GPU, and on TPU multiplies no more of them than arrived; elsewhere all
that there is room for is multiplied, block by block. Its CPU backend exchanges no runs either: there each is filled up
to the largest that there can be.
"""

import functools

import jax
import jax.numpy as jnp

from qwenvl_jax.ops.experts import experts_mlp, grouped_mlp
from qwenvl_jax.parallel.placement import Execution

_LEAST_CHUNK = 512  # tokens: products of fewer rows an expert would be small


def placed_experts(x_BTH, shares_BTk, experts_BTk, gate_up_XH2F, down_XFH, execution: Execution):
    """down(silu(gate x) * up x) of each token's experts, weighted by their shares and summed.

    Args:
      x_BTH: tokens, rows over the batch axes and slots over `context`.
      shares_BTk, experts_BTk: from `route`.
      gate_up_XH2F, down_XFH: see `qwenvl_jax.ops.experts.experts_mlp`; experts over `expert`, F over `tensor`.

    Returns:
      [B, T, H] in the dtype of the tokens.
    """
    if execution.mesh.size == 1:
        x_NH, shares_Nk, experts_Nk = _flat(x_BTH, shares_BTk, experts_BTk)
        return experts_mlp(x_NH, shares_Nk, experts_Nk, gate_up_XH2F, down_XFH).reshape(x_BTH.shape)

    tokens = execution.fitting_spec(x_BTH.shape, "batch", "tokens", None)
    gate_up_spec = execution.spec("experts", "expert_embed", None, "expert_mlp")
    down_spec = execution.spec("experts", "expert_mlp", "expert_embed")
    devices, ragged = execution.split("experts"), execution.platform != "cpu"

    def local(x, shares, experts, gate_up, down):
        gate_up, down = _gathered(gate_up, gate_up_spec[1], 1), _gathered(down, down_spec[2], 2)
        x_NH, shares_Nk, experts_Nk = _flat(x, shares, experts)
        if devices == 1:
            y = experts_mlp(x_NH, shares_Nk, experts_Nk, gate_up, down)
        else:
            fixed = {"gate_up": gate_up, "down": down, "axis": gate_up_spec[0], "devices": devices, "ragged": ragged}
            y = _in_chunks(x_NH, shares_Nk, experts_Nk, functools.partial(_exchanged, **fixed))
        # Each device of `tensor` has part of the width of an expert, and so part of the sum.
        if gate_up_spec[3] is not None:
            y = jax.lax.psum(y, gate_up_spec[3])
        return y.reshape(x.shape)

    specs = (tokens, tokens, tokens, gate_up_spec, down_spec)
    return execution.map(local, specs, tokens)(x_BTH, shares_BTk, experts_BTk, gate_up_XH2F, down_XFH)


def _flat(x_BTH, shares_BTk, experts_BTk):
    """Tokens of all rows after one another."""
    return tuple(x.reshape(-1, x.shape[-1]) for x in (x_BTH, shares_BTk, experts_BTk))


def _gathered(weight, names, axis: int):
    """The whole of a weight along an axis that is split over these mesh axes; its gradient is scattered again."""
    return weight if names is None else jax.lax.all_gather(weight, names, axis=axis, tiled=True)


def _in_chunks(x_NH, shares_Nk, experts_Nk, exchanged):
    """`exchanged(x, shares, experts)` of chunks of the tokens, one after another.

    There must be room for all tokens of all devices, should one device have all experts that they choose. In as many
    chunks as there are devices, that is the room for what each has in the mean.
    """
    N, chunks = x_NH.shape[0], exchanged.keywords["devices"]
    while N % chunks or N // chunks < min(_LEAST_CHUNK, N):
        chunks -= 1
    if chunks == 1:
        return exchanged(x_NH, shares_Nk, experts_Nk)
    parts = jax.tree.map(lambda x: x.reshape(chunks, N // chunks, *x.shape[1:]), (x_NH, shares_Nk, experts_Nk))
    # Made again in the backward pass: what it keeps of each chunk would take the room of all at once.
    one = jax.checkpoint(lambda _, part: (None, exchanged(*part)))
    return jax.lax.scan(one, None, parts)[1].reshape(x_NH.shape)


def _exchanged(x_NH, shares_Nk, experts_Nk, *, gate_up, down, axis: str, devices: int, ragged: bool):
    """What this device's tokens get from experts anywhere: [N, H]."""
    (N, H), k = x_NH.shape, experts_Nk.shape[1]
    here = gate_up.shape[0]  # experts on this device
    flat = experts_Nk.reshape(-1)
    order = jnp.argsort(flat)
    rows = jnp.take(x_NH, order // k, axis=0)
    # sent[p, e]: rows for the e-th expert of device p; received[p, e]: rows from device p for our e-th expert.
    sent_Pe = jnp.bincount(flat, length=devices * here).astype(jnp.int32).reshape(devices, here)
    received_Pe = jax.lax.all_to_all(sent_Pe, axis, 0, 0, tiled=True)
    # At most all tokens of all devices, each as often as it can choose an expert of ours.
    largest = N * min(k, here)
    exchange = _Exchange(axis, sent_Pe.sum(1), received_Pe.sum(1), devices * largest, largest, ragged)

    # Arrived rows stand device by device, in each expert by expert; the product wants them expert by expert.
    arrived = exchange.there(rows)
    place = _places_by_expert(received_Pe, exchange.starts, len(arrived))
    by_expert = jnp.zeros_like(arrived).at[place].set(arrived, mode="drop", unique_indices=True)
    out = grouped_mlp(by_expert, gate_up, down, received_Pe.sum(0))
    returned = exchange.back(jnp.take(out, place, axis=0, mode="clip"), N * k)

    weighted = returned * jnp.take(shares_Nk.reshape(-1), order)[:, None]
    own = jnp.zeros_like(weighted).at[order].set(weighted, unique_indices=True).reshape(N, k, H)
    return jnp.sum(own.astype(jnp.float32), axis=1).astype(x_NH.dtype)


def _places_by_expert(received_Pe, starts_P, room: int):
    """i32[room]: where a row that arrived stands once they are sorted by expert; beyond all for room that is empty."""
    ends_Pe = starts_P[:, None] + jnp.cumsum(received_Pe, axis=1)
    begins_Pe = ends_Pe - received_Pe
    sorted_eP = jnp.cumsum(received_Pe.T.reshape(-1)).reshape(received_Pe.T.shape)
    shift_Pe = (sorted_eP.T - received_Pe) - begins_Pe
    # Number of the run that a row is in, from 1: each adds its number where it begins and takes it away where it ends.
    numbers = jnp.arange(1, received_Pe.size + 1, dtype=jnp.int32)
    marks = jnp.zeros(room + 1, jnp.int32)
    marks = marks.at[begins_Pe.reshape(-1)].add(numbers).at[ends_Pe.reshape(-1)].add(-numbers)
    run = jnp.cumsum(marks)[:room]
    place = jnp.arange(room, dtype=jnp.int32)
    return jnp.where(run > 0, place + jnp.take(shift_Pe.reshape(-1), jnp.maximum(run - 1, 0)), room + place)


class _Exchange:
    """Rows to the devices of an axis, and back. Runs for device 0 come first, then those for device 1, ...

    Args:
      axis: of the mesh.
      sizes, arriving: i32[P], rows for and from each device.
      room: rows that can arrive.
      largest: rows that can arrive from one device.
      ragged: whether the backend exchanges runs of any size; else each takes the room of the largest.
    """

    def __init__(self, axis: str, sizes, arriving, room: int, largest: int, ragged: bool):
        self._axis, self._sizes, self._arriving = axis, sizes, arriving
        self._room, self._largest, self._ragged = room, largest, ragged
        self._offsets = jnp.cumsum(sizes) - sizes
        # Where the rows from each device begin here.
        self.starts = jnp.cumsum(arriving) - arriving if ragged else jnp.arange(len(sizes), dtype=jnp.int32) * largest

    def there(self, rows):
        """[N * k, H] to [room, H], zero where nothing arrived."""
        if self._ragged:
            out = jnp.zeros((self._room, rows.shape[1]), rows.dtype)
            remote = jax.lax.all_to_all(self.starts, self._axis, 0, 0, tiled=True)
            return self._ragged_exchange(rows, out, self._offsets, self._sizes, remote, self._arriving)
        return self._blocks_exchanged(self._as_blocks(rows, self._offsets, self._sizes))

    def back(self, rows, count: int):
        """[room, H] to [count, H], in the order in which `there` took them."""
        if self._ragged:
            out = jnp.zeros((count, rows.shape[1]), rows.dtype)
            remote = jax.lax.all_to_all(self._offsets, self._axis, 0, 0, tiled=True)
            return self._ragged_exchange(rows, out, self.starts, self._arriving, remote, self._sizes)
        blocks = self._blocks_exchanged(rows)
        place = jnp.arange(count, dtype=jnp.int32)
        device = jnp.searchsorted(jnp.cumsum(self._sizes), place, side="right").astype(jnp.int32)
        return jnp.take(blocks, device * self._largest + place - jnp.take(self._offsets, device), axis=0)

    def _ragged_exchange(self, rows, out, offsets, sizes, remote, arriving):
        return jax.lax.ragged_all_to_all(rows, out, offsets, sizes, remote, arriving, axis_name=self._axis)

    def _as_blocks(self, rows, offsets, sizes):
        """Each run in a block of its own, filled up with zeros: [P * largest, H]."""
        place = jnp.arange(self._largest, dtype=jnp.int32)[None, :]
        index = jnp.minimum(offsets[:, None] + place, rows.shape[0] - 1)
        blocks = jnp.take(rows, index.reshape(-1), axis=0)
        return jnp.where((place < sizes[:, None]).reshape(-1, 1), blocks, jnp.zeros((), rows.dtype))

    def _blocks_exchanged(self, blocks):
        return jax.lax.all_to_all(blocks, self._axis, 0, 0, tiled=True)
