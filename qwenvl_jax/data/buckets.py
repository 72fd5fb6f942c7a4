"""Vision rows for a mixture: how many of which length a group needs, found by planning some steps with each choice.

Wanted are few slots that stay empty, of tokens and of patches; then short rows, since a row's attention costs its
length squared, whatever stands in it; and that every sample finds room.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from qwenvl_jax.data.laying import frames_fit
from qwenvl_jax.data.packing import AUTO, BatchShape, Plan, SampleFacts, VisionShape, fill
from qwenvl_jax.data.stream import Part, Stream, WeighBy

# Lengths that are tried beside that of the longest frame: a half of it, a quarter and so on; how many of them at once.
_HALVINGS = 6
_SHORTER = 2
# Groups of a step that are laid to try lengths.
_TRIALS = 8
# A patch costs as much in a row's attention as in the rest of a layer where the row is as long (a tower of width 1152).
_COSTLY_LENGTH = 6900
# Rows for this much of the mean demand are tried: those beyond it would mostly stand empty, and what finds none waits.
_SHARES = (0.9, 0.95, 1.05)
_BEST = 6  # lengths for which other shares than 1 are tried
# Steps that are planned to try vision rows, of which the first are not counted: nothing waits yet; and groups in them.
_STEPS, _FIRST, _GROUPS = 16, 4, 4
# Of the choices that fill this share of the slots, or nearly as much as the best, the cheapest is taken.
_GOOD, _AS_GOOD = 0.94, 0.01


def with_buckets(
    shape: BatchShape,
    facts: Sequence[SampleFacts],
    parts: Sequence[Part],
    *,
    seed: int,
    merge: int,
    rate_weights: Sequence[float] = (1.0,),
    weigh_by: WeighBy = "samples",
) -> BatchShape:
    """A batch shape with vision rows for these samples where it leaves them open (`vision="auto"`); else as it is.

    Args:
      facts, parts, seed, rate_weights, weigh_by: see `qwenvl_jax.data.packing.Plan`.
      merge: patches in a merged token; rows hold whole ones.

    Returns:
      A shape whose vision rows hold what the mixture has, on average, for the tokens of a group, and each sample alone.
    """
    if shape.vision != AUTO:
        return shape
    if not any(one.frames for one in facts):
        return dataclasses.replace(shape, vision=())
    tokens = np.asarray([one.tokens for one in facts], np.int64)
    stream = Stream(parts, tokens, seed=seed, rate_weights=rate_weights, weigh_by=weigh_by)
    demands = list(_demands(stream, facts, shape.rows // shape.groups * shape.length))
    demand = float(np.mean([sum(size * count for size, count in pile.items()) for pile in demands]))
    longest = max(max(one.frames) for one in facts if one.frames)
    groups = min(shape.groups, _GROUPS)
    small = dataclasses.replace(shape, groups=groups, rows=shape.rows // shape.groups * groups)
    whole = dataclasses.replace(
        small, vision=_with_room(_rows_for(next(_lengths(longest, merge)), demands, 1.0), facts)
    )
    plan = Plan(facts, whole, seed=seed, parts=parts, rate_weights=rate_weights, weigh_by=weigh_by)
    tried: dict[VisionShape, float] = {}

    def trial(lengths: tuple[int, ...], share: float) -> float:
        vision = _with_room(_rows_for(lengths, demands, share), facts)
        if vision not in tried:
            of_tokens, of_patches = fill(
                plan.reshaped(dataclasses.replace(small, vision=vision)), range(_FIRST, _STEPS)
            )
            # Where steps take less of what has frames than comes, that piles up until little else waits, and then
            # tokens are as few as the vision rows allow.
            slots = sum(rows * length for rows, length in vision)
            tried[vision] = float(min(of_tokens, of_patches, of_patches * slots / demand))
        return tried[vision]

    likely = sorted(_lengths(longest, merge), key=lambda lengths: -trial(lengths, 1.0))[:_BEST]
    for lengths, share in itertools.product(likely, _SHARES):
        trial(lengths, share)
    wanted = min(_GOOD, max(tried.values()) - _AS_GOOD)
    cheapest = min((vision for vision, filled in tried.items() if filled >= wanted), key=_cost)
    return dataclasses.replace(shape, vision=cheapest)


def _cost(vision: VisionShape) -> float:
    """Of the tower, in patches of its layers without attention."""
    return sum(rows * length * (1 + length / _COSTLY_LENGTH) for rows, length in vision)


def _demands(stream: Stream, facts: Sequence[SampleFacts], slots: int) -> Iterator[collections.Counter[int]]:
    """Frames by size that go with as many tokens as a group has, several times."""
    # Frames are dealt out like cards, so that each trial has about the share of all sizes that the mixture has.
    frames, tokens = collections.Counter[int](), 0
    while tokens < _TRIALS * slots and (taken := stream.take()) is not None:
        frames.update(facts[taken[1]].frames)
        tokens += facts[taken[1]].tokens
    trials = max(1, round(tokens / slots))
    dealt = itertools.cycle(range(trials))
    piles = [collections.Counter[int]() for _ in range(trials)]
    for size in sorted(frames, reverse=True):
        for _ in range(frames[size]):
            piles[next(dealt)][size] += 1
    yield from piles


def _lengths(longest: int, merge: int) -> Iterator[tuple[int, ...]]:
    """Lengths of rows to try together."""
    step = merge * max(1, min(128, longest // 8) // merge)

    def whole(length: float) -> int:
        return int(-(-length // step) * step)

    shorter = sorted({whole(longest / 2**n) for n in range(1, _HALVINGS)} - {whole(longest)})
    for count in range(_SHORTER + 1):
        for some in itertools.combinations(shorter, count):
            yield (*some, whole(longest))


def _rows_for(lengths: tuple[int, ...], demands: Sequence[collections.Counter[int]], share: float) -> VisionShape:
    """How many rows of each length a share of the demands needs on average."""
    needed = np.mean([_lay(lengths, demand) for demand in demands], axis=0)
    rows = [max(1, round(share * count)) for count in needed]
    return tuple((count, length) for count, length in zip(rows, lengths, strict=True))


def _lay(lengths: tuple[int, ...], demand: collections.Counter[int]) -> list[int]:
    """Rows of each length that frames take, longest first, each into the fullest row that holds it, or a new one."""
    free: list[list[int]] = [[] for _ in lengths]
    for size in sorted(demand, reverse=True):
        left = demand[size]
        for rows in free:
            for row in sorted((row for row in range(len(rows)) if rows[row] >= size), key=rows.__getitem__):
                here = min(left, rows[row] // size)
                rows[row] -= here * size
                left -= here
        own = next(n for n, length in enumerate(lengths) if length >= size)
        while left:
            here = min(left, lengths[own] // size)
            free[own].append(lengths[own] - here * size)
            left -= here
    return [len(rows) for rows in free]


def _with_room(vision: VisionShape, facts: Sequence[SampleFacts]) -> VisionShape:
    """Vision rows, and as many more of the longest as the largest sample needs."""
    *shorter, (count, length) = vision
    for frames in sorted({one.frames for one in facts if one.frames}, key=sum, reverse=True):
        counted = collections.Counter(frames)
        while not frames_fit(counted, (*shorter, (count, length))):
            count += 1
    return (*shorter, (count, length))
