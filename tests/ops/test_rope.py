"""Frequencies and their axes, against the worked examples of the reference."""

import numpy as np
import pytest

from qwenvl_jax.config import RopeConfig
from qwenvl_jax.ops.rope import inverse_frequencies, mrope_axes, mrope_cos_sin, rotate, vision_cos_sin


def test_interleaved_axes_of_the_public_models():
    axes = "".join("THW"[a] for a in mrope_axes(RopeConfig(mrope_section=(24, 20, 20), mrope_interleaved=True)))
    assert axes == "THW" * 20 + "TTTT"


def test_chunked_axes_of_the_public_models():
    axes = "".join("THW"[a] for a in mrope_axes(RopeConfig(mrope_section=(16, 24, 24), mrope_interleaved=False)))
    assert axes == "T" * 16 + "H" * 24 + "W" * 24


def test_tower_frequencies():
    np.testing.assert_allclose(inverse_frequencies(10_000.0, 36)[:3], [1, 0.5995, 0.3594], atol=5e-5)


def test_tower_turns_rows_then_columns():
    cos, sin = vision_cos_sin(np.array([[3, 0], [0, 3]], np.int32), 16)
    assert cos.shape == (2, 8)
    np.testing.assert_allclose(cos[0, :4], np.cos(3 * inverse_frequencies(10_000.0, 8)), rtol=1e-6)
    np.testing.assert_array_equal(cos[0, 4:], 1)
    np.testing.assert_array_equal(sin[0, :4], sin[1, 4:])


def test_equal_positions_are_plain_rotary_embedding():
    rope = RopeConfig(theta=1000.0, mrope_section=(2, 1, 1))
    positions = np.repeat(np.array([[5, 9]], np.int32)[..., None], 3, axis=-1)
    cos, _ = mrope_cos_sin(positions, rope, 8, np.float32)
    np.testing.assert_allclose(cos[0], np.cos([[5.0], [9.0]] * inverse_frequencies(1000.0, 8)), rtol=1e-5)


@pytest.mark.parametrize("shift", [1, 17])
def test_products_depend_on_the_distance_alone(shift):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rope = RopeConfig(theta=100.0, mrope_section=(2, 1, 1))

    def product(at_q, at_k):
        turned = [
            rotate(x, *mrope_cos_sin(np.full((1, 1, 3), at, np.int32), rope, 8, np.float32))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(np.sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(7 + shift, 3 + shift), abs=1e-5)
