"""Rows of tokens split over the `context` axis, so that each device has as much of causal attention to do.

A token attends to those before it: the last of C equal parts of a row would have twice the mean to do, the first hardly
anything. So a row is cut into 2C chunks and device i takes chunks i and 2C-1-i:

    C = 2     chunk      0 1 2 3        device 0 has 0 and 3, device 1 has 1 and 2
    balanced  chunks     0 3 1 2        each attends to five chunks: (1 + 4) and (2 + 3)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.batch import Batch

_TOKEN_LEAVES = (
    "tokens",
    "positions",
    "segment_ids",
    "targets",
    "loss_weights",
    "vision_index",
    "pool_index",
    "pool_weights",
    "classes",
)


def balanced_chunks(devices: int) -> list[int]:
    """The chunks of a row in balanced order: those of device 0, of device 1, ..."""
    return [chunk for device in range(devices) for chunk in (device, 2 * devices - 1 - device)]


def balanced_slots(length: int, devices: int) -> np.ndarray:
    """i32[T]: which slot of the row stands at each place of the balanced order; T is a multiple of 2 * devices."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return chunks[balanced_chunks(devices)].reshape(-1)


def to_balanced(x_BT: jax.Array, devices: int) -> jax.Array:
    """Reorders the slots of rows [B, T, ...]."""
    return _chunks_taken(x_BT, balanced_chunks(devices))


def from_balanced(x_BT: jax.Array, devices: int) -> jax.Array:
    """Undoes `to_balanced`."""
    return _chunks_taken(x_BT, np.argsort(balanced_chunks(devices)).tolist())


def _chunks_taken(x_BT: jax.Array, order: list[int]) -> jax.Array:
    B, T, *rest = x_BT.shape
    chunks = x_BT.reshape(B, len(order), T // len(order), *rest)
    return jnp.concatenate([chunks[:, chunk : chunk + 1] for chunk in order], axis=1).reshape(x_BT.shape)


def balanced_batch(batch: Batch, devices: int) -> Batch:
    """The batch with the slots of its rows in balanced order; its vision inputs stay as they are."""
    leaves: dict[str, Any] = {name: getattr(batch, name) for name in _TOKEN_LEAVES}
    moved: dict[str, Any] = {name: to_balanced(leaf, devices) for name, leaf in leaves.items() if leaf is not None}
    return dataclasses.replace(batch, **moved)
