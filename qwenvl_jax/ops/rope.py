"""Rotary position embeddings: the decoder's multimodal one (MRoPE) and the tower's two-dimensional one.

Angles are products of a position and a frequency, taken elementwise in f32: as a matrix product they would lose bits on
hardware that multiplies f32 in lower precision. Rotations are of the half-split kind,
`x * cos + concat(-x2, x1) * sin` with `x = concat(x1, x2)`.
"""

import math

import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import RopeConfig, YarnConfig

VISION_THETA = 10_000.0


def inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    """Returns f32[dim // 2]: theta ** (-2j / dim) for j = 0, 1, ..."""
    return np.float32(1) / _powers(theta, dim)


def _powers(theta: float, dim: int) -> np.ndarray:
    """f32[dim // 2]: theta ** (2j / dim), rounded once.

    At position 1,000,000 the last bit of a frequency turns the fastest pairs by a twentieth of a radian, so it has to
    be the reference's: the exponent is rounded to f32 as there, the power correctly, as there in all but a few.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def yarn_frequencies(theta: float, dim: int, yarn: YarnConfig) -> np.ndarray:
    """Returns f32[dim // 2]: the frequencies of YaRN, each a blend of the original and of its `factor`-th part.

    Frequency j turns `original / (2 pi theta ** (2j / dim))` times within the original length; solved for j,
    `beta_fast` and `beta_slow` turns bound the blend. Source: arXiv 2309.00071, section 3.2.
    """

    def index_of(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = index_of(yarn.beta_fast), index_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    j = np.arange(dim // 2, dtype=np.float32)
    kept = 1 - np.clip((j - np.float32(low)) / np.float32(high - low), 0, 1)
    powers = _powers(theta, dim)
    original, stretched = 1 / powers, 1 / (np.float32(yarn.factor) * powers)
    return (stretched * (1 - kept) + original * kept).astype(np.float32)


def yarn_attention_factor(yarn: YarnConfig) -> float:
    """What cosines and sines are multiplied by: 0.1 log(factor) + 1 unless the configuration says otherwise."""

    def scaled(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return scaled(yarn.mscale) / scaled(yarn.mscale_all_dim)
    return scaled(1.0)


def mrope_axes(rope: RopeConfig) -> np.ndarray:
    """Returns i32[E // 2]: which position axis (0 time, 1 height, 2 width) turns each frequency.

    With sections (s_t, s_h, s_w), interleaved: height takes 1, 4, 7, ..., width takes 2, 5, 8, ..., each while below
    three times its section, and time takes the rest (Qwen3-VL). Chunked: s_t times time, then height, then width
    (Qwen2-VL, section 2.1 of its report).
    """
    time, height, width = rope.mrope_section
    if not rope.mrope_interleaved:
        return np.repeat(np.arange(3, dtype=np.int32), (time, height, width))
    axes = np.zeros(time + height + width, np.int32)
    axes[1 : 3 * height : 3] = 1
    axes[2 : 3 * width : 3] = 2
    return axes


def mrope_cos_sin(positions_BTA, rope: RopeConfig, head_dim: int, dtype):
    """Cosines and sines of the decoder's angles.

    Args:
      positions_BTA: [B, T, 3] positions on the time, height and width axes.
      rope: frequencies and their division among the axes.
      head_dim: E.
      dtype: of the result; the reference rounds the tables to the activations' dtype before rotating.

    Returns:
      (cos, sin), each [B, T, E // 2]; with YaRN, times its attention factor.
    """
    if rope.yarn is None:
        frequencies, scale = inverse_frequencies(rope.theta, head_dim), 1.0
    else:
        frequencies, scale = yarn_frequencies(rope.theta, head_dim, rope.yarn), yarn_attention_factor(rope.yarn)
    frequencies_E, factor = jnp.asarray(frequencies), jnp.float32(scale)
    picked_BTE = jnp.take(positions_BTA.astype(jnp.float32), jnp.asarray(mrope_axes(rope)), axis=-1)
    angles_BTE = picked_BTE * frequencies_E[None, None, :]
    return (jnp.cos(angles_BTE) * factor).astype(dtype), (jnp.sin(angles_BTE) * factor).astype(dtype)


def vision_cos_sin(coords, head_dim: int):
    """Cosines and sines of the tower's angles: rows turn the first quarter of a head, columns the second.

    Args:
      coords: i32[..., 2], row and column of each patch in its own frame.
      head_dim: E.

    Returns:
      (cos, sin), each f32[..., E // 2].
    """
    frequencies = jnp.asarray(inverse_frequencies(VISION_THETA, head_dim // 2))
    angles = coords.astype(jnp.float32)[..., :, None] * frequencies[(None,) * coords.ndim]
    angles = angles.reshape(*coords.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNE, cos_BTE, sin_BTE):
    """Turns each head of `x_BTNE` [..., T, N, E] by the angles of [..., T, E // 2], in the dtype of `x_BTNE`."""
    first, second = jnp.split(x_BTNE, 2, axis=-1)
    cos, sin = cos_BTE[..., None, :], sin_BTE[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
