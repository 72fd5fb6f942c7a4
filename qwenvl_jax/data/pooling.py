"""Pooling: fewer tokens for each frame, made of its merged tokens by a fixed sum with weights.

The h x w merged tokens of an image, or of one temporal patch of a video, become ceil(h/p) x ceil(w/p). Frames are seen
at full resolution by the tower and cost p*p times fewer tokens in the decoder. Pooled by 2, a frame of 3 x 5:

    0  1 | 2  3 | 4        a  b  c        "mean":      each is the mean of its cell; cells at the right and lower edge
    5  6 | 7  8 | 9    ->                              are what is left
   ------+------+---       d  e  f        "bilinear":  the frame is resized as a picture would be: each is a blend of
   10 11 |12 13 |14                                    the four tokens around its centre

At p = 2 both are the same where the sides are even. From p = 3 on "bilinear" leaves out tokens that "mean" takes, and
at an odd p that divides both sides it takes the token in the middle of each cell as it is.

A pooled frame has positions of its own, as a smaller picture would: rows and columns of the pooled grid, counted one by
one. Times are those of the frames.

References: pooling of LLaVA-OneVision and LLaVA-Video; `interpolate(mode="bilinear", align_corners=False)` and
`avg_pool2d(ceil_mode=True, count_include_pad=False)` of torch.
"""

import dataclasses
import functools

import numpy as np

METHODS = ("bilinear", "mean")
# Far beyond what is of use; it bounds what a batch holds for each token (p*p places of the mean).
MAX_SIDE = 16


@dataclasses.dataclass(frozen=True)
class Pool:
    """How the merged tokens of a frame are pooled.

    Attributes:
      side: p, from 2 to `MAX_SIDE`.
      method: one of `METHODS`.
    """

    side: int
    method: str = "bilinear"

    @classmethod
    def of(cls, part: dict) -> "Pool | None":
        """What the image or video part of a checked conversation asks for; None for no pooling."""
        side = part.get("pool") or 1
        return None if side == 1 else cls(int(side), part.get("pool_method") or METHODS[0])

    @property
    def taps(self) -> int:
        """Merged tokens that a pooled token is made of, at most."""
        return 4 if self.method == "bilinear" else self.side**2

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a frame after pooling; (rows, columns) in merged tokens before."""
        return -(-rows // self.side), -(-columns // self.side)

    def mixing(self, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """What each pooled token of a frame is made of; not to be changed.

        Args:
          rows, columns: of the frame, in merged tokens.

        Returns:
          (i64[n, taps], f32[n, taps]): places in reading order of the merged tokens, and their weights, which sum to 1.
          Weights are 0 where fewer suffice; the place there is that of another of them.
        """
        return _mixing(self, rows, columns)


@functools.lru_cache(maxsize=256)
def _mixing(pool: Pool, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    # Both methods treat rows and columns alike and apart: weights are products of those along the two sides.
    along = _bilinear if pool.method == "bilinear" else _mean
    row, row_weight = along(rows, pool.side)
    column, column_weight = along(columns, pool.side)
    index = row[:, None, :, None] * columns + column[None, :, None, :]
    weights = row_weight[:, None, :, None] * column_weight[None, :, None, :]
    shape = (len(row) * len(column), pool.taps)
    index, weights = index.reshape(shape), weights.reshape(shape)
    index.flags.writeable = weights.flags.writeable = False
    return index, weights


def _bilinear(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """i64[n, 2], f32[n, 2]: along a side, the two places around the centre of each pooled place, and their weights."""
    pooled = -(-size // side)
    # As torch: the scale is a float32, and what it is multiplied with and added to is rounded once.
    scale = np.float64(np.float32(size) / np.float32(pooled))
    centre = np.maximum((scale * (np.arange(pooled) + 0.5) - 0.5).astype(np.float32), 0)
    first = np.minimum(centre.astype(np.int64), size - 1)
    share = centre - first.astype(np.float32)
    return np.stack([first, np.minimum(first + 1, size - 1)], axis=1), np.stack([1 - share, share], axis=1)


def _mean(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """i64[n, p], f32[n, p]: along one side, the places in each cell, and one divided by how many there are."""
    places = np.arange(-(-size // side))[:, None] * side + np.arange(side)
    inside = places < size
    weights = np.where(inside, 1 / inside.sum(axis=1, keepdims=True), 0).astype(np.float32)
    return np.minimum(places, size - 1), weights
