"""Copies of transposed arrays are copies, whatever the axes."""

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.checkpoint import reorder


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_order_of_axes(data):
    ndim = data.draw(st.integers(0, 5))
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 7, 300]), min_size=ndim, max_size=ndim)))
    if np.prod(shape) > 1_000_000:
        shape = tuple(min(n, 7) for n in shape)
    dtype = data.draw(st.sampled_from([ml_dtypes.bfloat16, np.float32, np.uint8, ml_dtypes.float8_e4m3fn]))
    order = data.draw(st.permutations(range(ndim)))
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.random.default_rng(0).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)
    turned = array.transpose(order)
    out = reorder.contiguous(turned)
    assert out.flags.c_contiguous and out.shape == turned.shape and out.dtype == array.dtype
    assert out.tobytes() == turned.tobytes()


def test_into_a_part_of_an_array():
    to = np.zeros((600, 5, 900), np.uint16)
    array = np.arange(700 * 600, dtype=np.uint16).reshape(700, 600)
    reorder.copy(to[:, 2, 100:800], array.T)
    assert np.array_equal(to[:, 2, 100:800], array.T)
    to[:, 2, 100:800] = 0
    assert not to.any()


def test_nothing_is_copied_without_need():
    array = np.ones((3, 4))
    assert reorder.contiguous(array) is array
