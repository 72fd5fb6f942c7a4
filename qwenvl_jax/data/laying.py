"""Laying samples into rows and their frames into vision rows: the inner loop of the plan, compiled."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

# A vision group is full once as many samples, one after the other, were tried there in vain.
_ENOUGH_TRIES = 64


def frames_fit(counts: Mapping[int, int], vision: Sequence[tuple[int, int]]) -> bool:
    """Whether frames can be laid whole into the vision rows of one group by the rule of `collate.place_frames`.

    That is: longest first, each into the fullest row that still holds it, of the shortest rows that can. So the answer
    depends on how many frames of each size there are and not on their order, and equal frames fill row after row.

    Args:
      counts: how many frames there are of each number of patches.
      vision: the buckets (R, L) of a group.
    """
    sizes = np.asarray(sorted(counts, reverse=True), np.int64)
    numbers = np.asarray([counts[int(size)] for size in sizes], np.int64)
    slots, ends = _slots(vision)
    return bool(_compiled()[0](sizes, numbers, slots, ends))


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
    slots, ends = _slots(vision)
    return _compiled()[1](
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


@functools.cache
def _compiled() -> tuple[Callable, Callable]:
    """`_lay_frames` and `_lay_samples`, compiled at first use and then kept on disk; numba is imported only then."""
    import numba

    try:
        return _compile(numba.njit(cache=True, nogil=True))
    except RuntimeError:  # nowhere to keep it
        return _compile(numba.njit(nogil=True))


def _compile(njit: Callable) -> tuple[Callable, Callable]:
    @njit
    def lay_frames(sizes, numbers, slots, ends):
        """Whether all frames find a place, longest first."""
        free = slots.copy()
        for s in range(len(sizes)):
            size, left, begin = sizes[s], numbers[s], 0
            if not left:
                continue
            for end in ends:
                while left:
                    best = -1
                    for row in range(begin, end):
                        if free[row] >= size and (best < 0 or free[row] < free[best]):
                            best = row
                    if best < 0:
                        break
                    here = min(left, free[best] // size)
                    free[best] -= here * size
                    left -= here
                begin = end
            if left:
                return False
        return True

    @njit
    def lay_samples(order, tokens, patches, sizes, which, numbers, begin, most, exempt, left, groups, slots, ends):
        """See `lay_samples` of the module; `left` are the free token slots of each row."""
        found = np.full(len(order), -1, np.int64)
        counts = np.zeros((groups, len(sizes)), np.int64)
        used = np.zeros(groups, np.int64)
        tried = np.zeros(groups, np.bool_)
        in_vain = np.zeros(groups, np.int64)
        room, per_group = slots.sum(), len(left) // groups
        for n in range(len(order)):
            sample = order[n]
            first, last = begin[sample], begin[sample + 1]
            if n >= exempt and used.sum() + patches[sample] > most:
                continue
            for g in range(groups):
                tried[g] = first < last and in_vain[g] >= _ENOUGH_TRIES
            while True:
                # The best row of the group with the fewest patches, of those that were not tried in vain.
                row = -1
                for r in range(len(left)):
                    g = r // per_group
                    if left[r] < tokens[sample] or tried[g] or used[g] + patches[sample] > room:
                        continue
                    if row >= 0:
                        h = row // per_group
                        if first < last and used[g] != used[h]:
                            if used[g] > used[h]:
                                continue
                        elif left[r] >= left[row]:
                            continue
                    row = r
                if row < 0:
                    break
                g = row // per_group
                for k in range(first, last):
                    counts[g, which[k]] += numbers[k]
                if first < last and not lay_frames(sizes, counts[g], slots, ends):
                    for k in range(first, last):
                        counts[g, which[k]] -= numbers[k]
                    tried[g] = True
                    in_vain[g] += 1
                    continue
                if first < last:
                    in_vain[g] = 0
                used[g] += patches[sample]
                left[row] -= tokens[sample]
                found[n] = row
                break
        return found

    return lay_frames, lay_samples
