"""Vision rows chosen for a mixture: what steps of it fill, that every sample fits, and what they cost."""

import collections
import dataclasses

import numpy as np
import pytest

from qwenvl_jax.data.buckets import with_buckets
from qwenvl_jax.data.laying import frames_fit
from qwenvl_jax.data.packing import PATIENCE, BatchShape, Plan, SampleFacts, fill
from qwenvl_jax.data.stream import one_part
from qwenvl_jax.errors import ConfigError
from tools.bench_packing import WEIGHTS, skewed_facts

AUTO = BatchShape(rows=32, length=4096, groups=8, vision="auto")


def group_patches(plan: Plan, step: int) -> np.ndarray:
    """i64[G], patches of each vision group of a step."""
    rows = plan[step]
    per_group = plan.shape.rows // plan.shape.groups
    of_rows = [sum(sum(plan.facts[i].frames) for i in row) for row in rows]
    return np.add.reduceat(of_rows, range(0, plan.shape.rows, per_group))


def check_steps(plan: Plan, steps: int, parts) -> None:
    """Fill, balance, shares and waiting over some steps of a skewed mixture."""
    of_tokens, of_patches = fill(plan, range(steps))
    assert of_tokens >= 0.9 and of_patches >= 0.9
    patches = np.stack([group_patches(plan, n) for n in range(steps)])
    seen = patches[patches.any(axis=1)]
    assert (seen.mean(axis=1) / seen.max(axis=1)).mean() >= 0.9  # all wait for the fullest group
    kinds = np.concatenate([np.full(len(part.entries), n) for n, part in enumerate(parts)])
    counts = collections.Counter(int(kinds[i]) for n in range(steps) for row in plan[n] for i in row)
    for n, weight in enumerate(WEIGHTS.values()):
        assert abs(counts[n] / counts.total() - weight) < 0.05 + 20 / steps
    assert all(steps - since <= PATIENCE + 2 for since in plan.state(steps)["since"])


def test_a_skewed_mixture_fills_its_steps():
    facts, parts = skewed_facts(1000, length=AUTO.length)
    shape = with_buckets(AUTO, facts, parts, seed=0, merge=4)
    assert shape == with_buckets(AUTO, facts, parts, seed=0, merge=4)
    assert all(length % 4 == 0 for _, length in shape.buckets)
    assert all(frames_fit(collections.Counter(one.frames), shape.buckets) for one in facts)
    check_steps(Plan(facts, shape, seed=0, parts=parts), 100, parts)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length", "groups"), [(16, 16384, 4), (32, 8192, 8), (8, 32768, 2)])
def test_a_thousand_steps_of_a_skewed_mixture(rows, length, groups):
    facts, parts = skewed_facts(2000, length=length)
    shape = with_buckets(BatchShape(rows, length, groups, "auto"), facts, parts, seed=0, merge=4)
    check_steps(Plan(facts, shape, seed=0, parts=parts), 1000, parts)


def test_a_single_size_of_frames_wastes_little():
    facts = [SampleFacts(str(n), 300, (96,) * 8) for n in range(20)]
    shape = with_buckets(BatchShape(4, 1024, 1, "auto"), facts, one_part(20), seed=0, merge=4)
    plan = Plan(facts, shape, seed=0)
    of_tokens, of_patches = fill(plan, range(20))
    assert of_tokens == 300 * 3 / 1024 and of_patches >= 0.95


def test_no_pictures_no_rows_and_what_is_given_stays():
    text = [SampleFacts("a", 10)]
    assert with_buckets(AUTO, text, one_part(1), seed=0, merge=4).vision == ()
    given = dataclasses.replace(AUTO, vision=((2, 64),))
    assert with_buckets(given, text, one_part(1), seed=0, merge=4) is given


def test_the_largest_sample_fits_however_rare():
    facts = [SampleFacts("film", 4000, (256,) * 60), *(SampleFacts(str(n), 500, (64,)) for n in range(500))]
    shape = with_buckets(AUTO, facts, one_part(len(facts)), seed=0, merge=4)
    assert frames_fit(collections.Counter(facts[0].frames), shape.buckets)


def test_rows_that_are_not_chosen_yet_are_told():
    with pytest.raises(ConfigError, match=r'batch\.vision="auto" is not chosen yet'):
        Plan([SampleFacts("a", 10, (4,))], AUTO, seed=0)[0]
    with pytest.raises(ConfigError, match=r'or "auto"'):
        BatchShape(vision="automatic")
