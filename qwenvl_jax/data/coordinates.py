"""Boxes and points between the pictures they were drawn on and the numbers that models of each generation say.

A point is (x, y), a box (x1, y1, x2, y2): from the left and from the top, x first. Between conventions they are shares
of the picture's sides, 0 at the left or the top and 1 at the right or the bottom.

    Qwen2-VL     thousandths of the sides, up to 999
    Qwen2.5-VL   pixels of the resized picture, so that the numbers depend on the size that the processor chose
    Qwen3-VL     thousandths of the sides, up to 1000

Reference: the reports of the three models; the notebooks of Qwen3-VL divide by 1000.
"""

import dataclasses

import numpy as np

from qwenvl_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Convention:
    """How a generation counts.

    Attributes:
      parts: into how many a side is divided; None counts pixels of the resized picture.
      last: the largest number it says; None is the whole side.
    """

    parts: int | None
    last: int | None = None


BELOW_THOUSAND = Convention(parts=1000, last=999)
THOUSANDTHS = Convention(parts=1000)
RESIZED_PIXELS = Convention(parts=None)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a picture.

    Attributes:
      original: (height, width) in pixels, as the file has it.
      resized: (height, width) in pixels, as the model sees it.
    """

    original: tuple[int, int]
    resized: tuple[int, int]


def to_shares(values: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Shares of the sides, f64[..., 2k], out of numbers that count the sides as `size`.

    Args:
      values: f64[..., 2k], (x, y) k times.
      size: (height, width) in the unit of the values; (1000, 1000) for thousandths.
    """
    return np.asarray(values, np.float64) / _by_axis(values, size)


def from_shares(shares: np.ndarray, convention: Convention, resized: tuple[int, int] | None = None) -> np.ndarray:
    """What a model of this convention says, i64[..., 2k]: rounded to the nearest number, half to even.

    Args:
      shares: f64[..., 2k], (x, y) k times, from 0 to 1.
      resized: (height, width) of the picture as the model sees it; needed where the convention counts its pixels.

    Raises:
      DataError: a share outside the picture, or no size where one is needed.
    """
    shares = np.asarray(shares, np.float64)
    # Shares come from a division, so one at the border may be a little beyond it.
    if not ((shares >= -1e-9) & (shares <= 1 + 1e-9)).all():
        raise DataError(
            f"coordinates {np.round(shares, 4).tolist()} (as shares of the sides) leave the picture, 0 to 1; correct "
            "them, or the size or unit that they are given in."
        )
    numbers = np.rint(shares * _by_axis(shares, _counts(convention, resized))).astype(np.int64)
    return np.clip(numbers, 0, convention.last)


def said_to_shares(numbers: np.ndarray, convention: Convention, resized: tuple[int, int] | None = None) -> np.ndarray:
    """Shares of the sides, f64[..., 2k], out of what a model of this convention said; the inverse of `from_shares`."""
    return to_shares(numbers, _counts(convention, resized))


def convert(
    numbers: np.ndarray, source: Convention, target: Convention, resized: tuple[int, int] | None = None
) -> np.ndarray:
    """The numbers of one convention as another says them, i64[..., 2k]; within half a unit of the coarser, and back.

    Args:
      numbers: i64[..., 2k], as `source` says them.
      resized: (height, width) of the picture as the model that counts its pixels sees it.
    """
    return from_shares(said_to_shares(numbers, source, resized), target, resized)


def _counts(convention: Convention, resized: tuple[int, int] | None) -> tuple[int, int]:
    """How far (height, width) count."""
    if convention.parts is not None:
        return convention.parts, convention.parts
    if resized is None:
        raise DataError(
            "coordinates in pixels of the resized picture need its size; give the model's processor, which chooses it."
        )
    return resized


def _by_axis(values: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """(width, height, width, height, ...) for the last axis of `values`."""
    return np.tile(np.asarray(size[::-1], np.float64), np.shape(values)[-1] // 2)
