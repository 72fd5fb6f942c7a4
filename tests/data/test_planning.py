"""Planning, whatever the data: what holds for every mixture, shape, seed and window."""

import collections
import json
import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.data.collate import place_frames
from qwenvl_jax.data.packing import BatchShape, Plan, SampleFacts
from qwenvl_jax.data.stream import Part

STEPS = 12


@st.composite
def plans(draw) -> Plan:
    """A plan of up to three parts of text, pictures and videos, some of them at several frame rates."""
    groups = draw(st.integers(1, 3))
    longest = draw(st.sampled_from([16, 48, 96]))
    vision = ((draw(st.integers(1, 4)), longest // 2), (draw(st.integers(1, 3)), longest))
    shape = BatchShape(groups * draw(st.integers(1, 3)), draw(st.integers(40, 300)), groups, vision)
    rates = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    facts: list[SampleFacts] = []
    parts = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        rows = []
        for _ in range(draw(st.integers(1, 9))):
            rows.append([])
            for _ in range(rates):
                frames = (4 * int(rng.integers(1, longest // 4 + 1)),) * int(rng.integers(0, 4))
                if place_frames(frames, vision) is None:
                    frames = ()
                rows[-1].append(len(facts))
                facts.append(SampleFacts(f"{name}{len(facts)}", int(rng.integers(1, shape.length + 1)), frames))
        weights = st.floats(0.1, 5)
        parts.append(Part(np.asarray(rows), name, draw(weights), draw(st.none() | weights)))
    return Plan(
        facts,
        shape,
        seed=draw(st.integers(0, 2**63)),
        window=draw(st.sampled_from([0, 0, 1, 5, 40])),
        shuffle=draw(st.booleans()),
        parts=parts,
        rate_weights=[1.0] * rates,
        weigh_by=draw(st.sampled_from(["samples", "tokens"])),
        steps=draw(st.sampled_from([0, STEPS])),
    )


@settings(max_examples=40, deadline=None)
@given(plans())
def test_what_is_planned_fits_and_nothing_is_lost(plan):
    """Rows and vision rows hold what is laid into them, and what was drawn of each part is laid or waits, once."""
    placed: collections.Counter[int] = collections.Counter()
    per_group = plan.shape.rows // plan.shape.groups
    for n in range(STEPS):
        rows = plan[n]
        assert len(rows) == plan.shape.rows and any(rows)
        assert all(sum(plan.facts[i].tokens for i in row) <= plan.shape.length for row in rows)
        for g in range(plan.shape.groups):
            group = rows[g * per_group : (g + 1) * per_group]
            frames = [patches for row in group for i in row for patches in plan.facts[i].frames]
            assert place_frames(frames, plan.shape.buckets) is not None
        placed.update(i for row in rows for i in row)
    state = plan.state(STEPS)
    placed.update(state["waiting"])
    for part, taken in zip(plan.parts, state["stream"]["taken"], strict=True):
        of_records = [sum(placed[i] for i in row) for row in part.entries.tolist()]
        assert sum(of_records) == taken
        assert max(of_records) - min(of_records) <= 1  # each epoch has each record once, at one rate


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(1, STEPS - 1), st.randoms(use_true_random=False))
def test_a_step_is_a_function_of_its_number(plan, stop, random):
    """Asked in any order, in another process, or from a state as a checkpoint keeps it."""
    steps = [plan[n] for n in range(STEPS)]
    again = pickle.loads(pickle.dumps(plan))
    order = list(range(STEPS))
    random.shuffle(order)
    assert [again[n] for n in order] == [steps[n] for n in order]
    resumed = pickle.loads(pickle.dumps(again))
    resumed.resume(json.loads(json.dumps(plan.state(stop))))
    assert [resumed[n] for n in range(stop, STEPS)] == steps[stop:]
    assert resumed.state(STEPS) == plan.state(STEPS)


@settings(max_examples=20, deadline=None)
@given(plans(), st.integers(1, STEPS - 1))
def test_a_step_alone_from_the_state_before_it(plan, number):
    """Nothing before it is planned, and what the plan does next is what it would have done."""
    states = [json.loads(json.dumps(plan.state(n))) for n in range(STEPS)]
    steps = [plan[n] for n in range(STEPS)]
    fresh = plan.reshaped(plan.shape)
    planned, plan_one = [], fresh._plan
    fresh._plan = lambda place: planned.append(place.step) or plan_one(place)
    assert fresh.rows_after(states[number]) == steps[number] and planned == [number]
    assert [fresh[n] for n in range(STEPS)] == steps and planned == [number, *range(STEPS)]
    assert fresh.rows_after(states[number]) == steps[number] and len(planned) == 1 + STEPS
