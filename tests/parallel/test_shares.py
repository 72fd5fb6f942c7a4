"""Which rows of a batch a process feeds, by where its devices stand in the mesh."""

import types

import jax
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import AXES
from qwenvl_jax.parallel.placement import row_share, row_shares
from qwenvl_jax.parallel.rules import make_rules


def mesh_of(owners, **sizes: int):
    """What a mesh is to `row_shares`, of devices of these processes."""
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    devices = np.empty(list(shape.values()), object)
    for place, process in zip(np.ndindex(devices.shape), np.ravel(owners), strict=True):
        devices[place] = types.SimpleNamespace(process_index=int(process))
    return types.SimpleNamespace(shape=shape, axis_names=AXES, devices=devices)


def blocks(rows: int, columns: int) -> np.ndarray:
    """The processes of a slice of rows x columns devices, each with 2 x 2 of them."""
    return (np.arange(rows)[:, None] // 2) * (columns // 2) + np.arange(columns)[None, :] // 2


def test_blocks_of_a_slice():
    assert row_shares(mesh_of(blocks(4, 4), fsdp=16)) == [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
    # Columns are `context`: two processes have the same two rows.
    assert row_shares(mesh_of(blocks(4, 4), fsdp=4, context=4)) == [(0, 1), (2, 3)]
    assert row_shares(mesh_of(blocks(4, 8), data=4, fsdp=4, tensor=2)) == [
        (0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)
    ]  # fmt: skip
    assert row_shares(mesh_of(np.zeros(8), fsdp=8)) == [tuple(range(8))]


def test_where_rows_lie_along_fewer_axes():
    """By a rule of their own: the devices along `data` hold the same rows."""
    rules = make_rules("fsdp_tensor", ("batch=fsdp",))
    assert row_shares(mesh_of([[0, 1], [2, 3]], data=2, fsdp=2), rules) == [(0,), (1,)]


def test_parts_in_common_with_some_are_refused():
    """Of three devices a process, two hold parts of the next."""
    with pytest.raises(ConfigError, match=r"of the 3 parts of a batch process 0 has \[0, 1\]; process 1 has \[1, 2\]"):
        row_shares(mesh_of([0, 0, 0, 1, 1, 1], fsdp=3, tensor=2))


def test_a_process_without_a_device_is_refused(monkeypatch):
    mesh = mesh_of([0, 0], fsdp=2)
    assert row_share(mesh) == (0, 1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ConfigError, match=r"process 1 has no device of it; .*mesh.fsdp=0"):
        row_share(mesh)
