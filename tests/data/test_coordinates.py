"""Boxes and points between pictures and what models of each generation say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_jax.data.coordinates import (
    BELOW_THOUSAND,
    RESIZED_PIXELS,
    THOUSANDTHS,
    convert,
    from_shares,
    said_to_shares,
    to_shares,
)
from qwenvl_jax.data.generations import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from qwenvl_jax.errors import DataError

SIZES = st.tuples(st.integers(28, 4000), st.integers(28, 4000))
SHARES = st.lists(st.floats(0, 1), min_size=4, max_size=4)


def test_by_hand():
    """A box of a picture of 200 x 400 (height x width), seen by the model as 224 x 392."""
    shares = to_shares([100, 50, 400, 199.9], (200, 400))
    np.testing.assert_allclose(shares, [0.25, 0.25, 1, 0.9995])
    for convention, expected in (
        (THOUSANDTHS, [250, 250, 1000, 1000]),
        (BELOW_THOUSAND, [250, 250, 999, 999]),
        (RESIZED_PIXELS, [98, 56, 392, 224]),
    ):
        said = from_shares(shares, convention, (224, 392))
        assert said.tolist() == expected and said.dtype == np.int64
    assert from_shares(to_shares([[0.1, 0.5], [1, 0]], (1, 1)), RESIZED_PIXELS, (10, 20)).tolist() == [[2, 5], [20, 0]]


def test_each_generation_counts_its_way():
    found = [g.coordinates for g in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)]
    assert found == [BELOW_THOUSAND, RESIZED_PIXELS, THOUSANDTHS]


@given(SHARES, SIZES, st.sampled_from([THOUSANDTHS, BELOW_THOUSAND, RESIZED_PIXELS]))
def test_what_is_said_comes_back_exactly(shares, resized, convention):
    said = from_shares(np.array(shares), convention, resized)
    back = said_to_shares(said, convention, resized)
    np.testing.assert_array_equal(from_shares(back, convention, resized), said)
    unit = 1 / np.tile(resized[::-1] if convention is RESIZED_PIXELS else (1000, 1000), 2)
    assert (np.abs(back - shares) <= (1 if convention is BELOW_THOUSAND else 0.5) * unit + 1e-12).all()


@given(st.data(), SIZES)
def test_between_conventions_within_the_coarser_unit(data, resized):
    """Exactly where the other side counts as finely, else within half of its unit, rounding of one's own included."""
    sides = np.tile(resized[::-1], 2)
    pixels = np.array([data.draw(st.integers(0, int(side))) for side in sides])
    thousandths = convert(pixels, RESIZED_PIXELS, THOUSANDTHS, resized)
    back = convert(thousandths, THOUSANDTHS, RESIZED_PIXELS, resized)
    assert (np.abs(back - pixels) <= sides / 2000 + 0.5).all()
    np.testing.assert_array_equal(back[sides < 1000], pixels[sides < 1000])
    there = convert(back, RESIZED_PIXELS, THOUSANDTHS, resized)
    np.testing.assert_array_equal(there[sides >= 1000], thousandths[sides >= 1000])


@given(SHARES, SIZES, SIZES)
def test_the_size_of_the_picture_does_not_matter_to_thousandths(shares, one, two):
    boxes = [np.array(shares) * np.tile(size[::-1], 2) for size in (one, two)]
    said = [from_shares(to_shares(b, s), THOUSANDTHS) for b, s in zip(boxes, (one, two), strict=True)]
    assert (np.abs(said[0] - said[1]) <= 1).all()  # floats may fall to either side of a half


def test_outside_of_the_picture():
    for values in ([0, 0, 401, 10], [0, -1, 4, 10], [0, 0, np.nan, 1]):
        with pytest.raises(DataError, match="leave the picture"):
            from_shares(to_shares(values, (200, 400)), THOUSANDTHS)
    with pytest.raises(DataError, match="need its size"):
        from_shares([0.5, 0.5], RESIZED_PIXELS)
