"""Laying samples into rows and their frames into vision rows: the inner loop of the plan, compiled."""

from collections.abc import Mapping, Sequence

import numpy as np


def frames_fit(counts: Mapping[int, int], vision: Sequence[tuple[int, int]]) -> bool:
    """Whether frames can be laid whole into the vision rows of one group by the rule of `collate.place_frames`.

    That is: longest first, each into the fullest row that still holds it, of the shortest rows that can. So the answer
    depends on how many frames of each size there are and not on their order, and equal frames fill row after row.

    Args:
      counts: how many frames there are of each number of patches.
      vision: the buckets (R, L) of a group.
    """
    from qwenvl_jax.data import laying_loops  # imports numba

    sizes = np.asarray(sorted(counts, reverse=True), np.int64)
    numbers = np.asarray([counts[int(size)] for size in sizes], np.int64)
    slots, ends = _slots(vision)
    return bool(laying_loops.lay_frames(sizes, numbers, slots, ends))


class Frames:
    """How many frames of each size samples have, as arrays.

    Attributes:
      sizes: i64[s], the sizes that there are, in patches, largest first.
      which, numbers: i64[m], for the samples one after the other, the sizes of a sample's frames, as indices into
        `sizes`, and how many frames of each it has.
      begin: i64[samples + 1], where those of each sample begin.
    """

    def __init__(self, frames: Sequence[Sequence[int]]):
        lengths = [len(one) for one in frames]
        flat = np.fromiter((patches for one in frames for patches in one), np.int64, sum(lengths))
        self.sizes = np.unique(flat)[::-1].copy()
        sample = np.repeat(np.arange(len(frames)), lengths)
        size = len(self.sizes) - 1 - np.searchsorted(self.sizes[::-1], flat)
        pairs, self.numbers = np.unique(sample * max(1, len(self.sizes)) + size, return_counts=True)
        owner, self.which = np.divmod(pairs, max(1, len(self.sizes)))
        self.begin = np.searchsorted(owner, np.arange(len(frames) + 1))


def lay_samples(
    order: np.ndarray,
    tokens: np.ndarray,
    patches: np.ndarray,
    frames: Frames,
    *,
    most: int,
    exempt: int,
    rows: int,
    length: int,
    groups: int,
    vision: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Lays samples, one after the other, each into the row that it fills best.

    One with images or videos goes to the vision group that has the fewest patches of those where it fits; text goes to
    any.

    Args:
      order: i64[n], the samples.
      tokens, patches: i64[samples], of each sample that there is.
      frames: of each sample.
      most: patches that are laid at most, all groups together.
      exempt: how many samples at the head of `order` are laid even so.
      rows, length: of the batch.
      groups: that the rows are divided among.
      vision: the buckets (R, L) of a group.

    Returns:
      i64[n], the row of each, or -1 where it fits nowhere.
    """
    from qwenvl_jax.data import laying_loops  # imports numba

    slots, ends = _slots(vision)
    return laying_loops.lay_samples(
        order,
        tokens,
        patches,
        frames.sizes,
        frames.which,
        frames.numbers,
        frames.begin,
        most,
        exempt,
        np.full(rows, length, np.int64),
        groups,
        slots,
        ends,
    )


def _slots(vision: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """i64[rows], patches of each vision row, shortest bucket first; i64[buckets], where each bucket ends in it."""
    buckets = sorted((length, rows) for rows, length in vision)
    slots = np.asarray([length for length, rows in buckets for _ in range(rows)], np.int64)
    return slots, np.cumsum([rows for _, rows in buckets], dtype=np.int64)
