"""The loops of `laying`, compiled; numba is imported with this module, by the first plan.

They are functions of the module and not of another function: what one of those calls is part of what it is kept under,
and is another in each process.
"""

import numpy as np

from qwenvl_jax.data.compiled import kept

# A vision group is full once as many samples, one after the other, were tried there in vain.
_ENOUGH_TRIES = 64


@kept
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


@kept
def lay_samples(order, tokens, patches, sizes, which, numbers, begin, most, exempt, left, groups, slots, ends):
    """See `laying.lay_samples`; `left` are the free token slots of each row."""
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
