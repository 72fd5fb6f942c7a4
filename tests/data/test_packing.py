"""The plan of the batches, and that standing packed changes nothing for a sample."""

import collections
import pickle

import jax
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.data.collate import collate, place_frames
from qwenvl_jax.data.laying import frames_fit
from qwenvl_jax.data.packing import PATIENCE, BatchShape, Plan, SampleFacts, check_fits
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.models.qwenvl import QwenVL

SHAPE = BatchShape(rows=4, length=100, groups=2, vision=((4, 24), (1, 48)))


def some_facts(count: int) -> list[SampleFacts]:
    rng = np.random.default_rng(0)
    sizes = ((), (12,) * 3, (24, 24), (48,), (12, 48), (4,) * 9)
    return [SampleFacts(f"s{i}", int(rng.integers(10, 60)), sizes[int(rng.integers(len(sizes)))]) for i in range(count)]


def test_step_is_a_function_of_its_number():
    """Asked in order, alone, out of order or after travelling to another process, a step has the same rows."""
    facts = some_facts(40)
    plan = Plan(facts, SHAPE, seed=3)
    steps = [plan[n] for n in range(60)]
    assert Plan(facts, SHAPE, seed=3)[59] == steps[59]
    again = pickle.loads(pickle.dumps(plan))
    assert [again[n] for n in (17, 3, 58)] == [steps[n] for n in (17, 3, 58)]
    assert Plan(facts, SHAPE, seed=4)[0] != steps[0]


def test_rows_fit_and_no_sample_is_lost():
    """Every epoch has every sample; rows and vision groups hold what is laid into them."""
    facts = some_facts(40)
    plan = Plan(facts, SHAPE, seed=0)
    counts = collections.Counter()
    for n in range(200):
        rows = plan[n]
        assert len(rows) == SHAPE.rows
        counts.update(sample for row in rows for sample in row)
        for row in rows:
            assert sum(facts[i].tokens for i in row) <= SHAPE.length
        for group in (rows[:2], rows[2:]):
            assert place_frames([f for row in group for i in row for f in facts[i].frames], SHAPE.vision) is not None
    # A sample may wait for its turn, PATIENCE steps and then until those before it had theirs, one a step or more:
    # here are more frames of 48 patches than rows for them.
    waiting = plan.state(200)["waiting"]
    counts.update(waiting)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert max(200 - since for since in plan.state(200)["since"]) <= PATIENCE + len(waiting)


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    facts = [SampleFacts(f"s{i}", int(rng.integers(5, 60))) for i in range(200)]
    plan = Plan(facts, BatchShape(rows=4, length=100), seed=0)
    tokens = sum(facts[i].tokens for n in range(100) for row in plan[n] for i in row)
    assert tokens / (100 * 4 * 100) > 0.93


def test_unshuffled_order_and_one_sample():
    facts = [SampleFacts(f"s{i}", 50) for i in range(3)]
    shape = BatchShape(rows=2, length=100)
    assert Plan(facts, shape, seed=0, shuffle=False)[0] == ((0, 1), (2, 0))
    assert Plan(facts[:1], shape, seed=0)[7] == ((0, 0), (0, 0))


def test_window_limits_the_choice():
    """With a window of one, a step ends at the first sample that does not fit; a longer one fills the hole."""
    facts = [SampleFacts("long", 80), SampleFacts("long too", 80), SampleFacts("short", 20)]
    shape = BatchShape(rows=1, length=100)
    assert Plan(facts, shape, seed=0, shuffle=False, window=1)[0] == ((0,),)
    assert Plan(facts, shape, seed=0, shuffle=False, window=3)[0] == ((0, 2),)


def test_planned_frames_are_those_that_collate_can_place():
    rng = np.random.default_rng(1)
    seen = collections.Counter()
    for _ in range(2000):
        vision = tuple((int(rng.integers(1, 5)), int(rng.choice([16, 24, 32, 64]))) for _ in range(rng.integers(1, 4)))
        frames = rng.choice([4, 8, 12, 20, 24, 28], int(rng.integers(1, 16))).tolist()
        fits = frames_fit(collections.Counter(frames), vision)
        assert fits == (place_frames(frames, vision) is not None)
        seen[fits] += 1
    assert min(seen.values()) > 500


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (SampleFacts("data.jsonl:7 (x)", 101), "data.jsonl:7 .x. has 101 tokens.*batch.length=100"),
        (SampleFacts("x", 10, (52,)), "x has a frame of 52 patches.*has 48"),
        (SampleFacts("x", 10, (24,) * 7), "x has 7 frames of 168 patches together"),
        (SampleFacts("x", 10, loss_tokens=0), "x teaches nothing"),
    ],
)
def test_samples_that_never_fit_are_refused_by_name(facts, told):
    with pytest.raises(DataError, match=told):
        Plan([SampleFacts("fits", 10), facts], SHAPE, seed=0)


def test_refusal_counts_the_others():
    with pytest.raises(DataError, match=r"a has 200 tokens.*1 more"):
        check_fits([SampleFacts("a", 200), SampleFacts("b", 5), SampleFacts("c", 300)], SHAPE)
    with pytest.raises(DataError, match=r"batch\.vision is empty"):
        check_fits([SampleFacts("a", 20, (4,))], BatchShape(rows=1, length=100))
    with pytest.raises(DataError, match="no samples"):
        Plan([], SHAPE, seed=0)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"batch\.rows=3 must be a multiple of batch\.groups=2"):
        BatchShape(rows=3, groups=2)
    with pytest.raises(ConfigError, match=r"batch\.length=0"):
        BatchShape(length=0)
    with pytest.raises(ConfigError, match=r"batch\.vision"):
        BatchShape(vision=((0, 4),))


def test_a_packed_sample_has_the_logits_it_has_alone(tiny_checkpoint, clip):
    """Text, images of two sizes and a video, laid in two groups of rows by the plan, against one by one."""
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype="float32")
    processor = Processor.from_pretrained(tiny_checkpoint)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((64, 96), (96, 64))]
    asked = [
        [],
        [{"type": "image", "image": images[0]}],
        [{"type": "video", "video": str(clip), "fps": 2.0}, {"type": "image", "image": images[1]}],
        [{"type": "image", "image": images[1]}, {"type": "image", "image": images[0]}],
        [{"type": "video", "video": str(clip), "fps": 1.0}],
    ]
    conversations = [
        [
            {"role": "user", "content": [*media, {"type": "text", "text": "what happens?"}]},
            {"role": "assistant", "content": "a red circle leaves " * (i + 1)},
        ]
        for i, media in enumerate(asked)
    ]
    samples = [processor.sample(conversation) for conversation in conversations]
    facts = [
        SampleFacts(str(i), len(s.tokens), tuple(h * w for m in s.media for t, h, w in [m.grid] for _ in range(t)))
        for i, s in enumerate(samples)
    ]
    shape = BatchShape(rows=4, length=128, groups=2, vision=((8, 48),))
    rows = Plan(facts, shape, seed=1, window=5)[0]
    assert max(len(row) for row in rows) > 1
    assert {i for row in rows for i in row} == set(range(5))
    batch = collate(
        [[samples[i] for i in row] for row in rows],
        length=shape.length,
        groups=shape.groups,
        vision_shape=shape.vision,
        pixel_table=processor.pixel_table,
        pad_token_id=processor.pad_token_id,
        patch_dim=processor.patch_dim,
    )
    graph, state = nnx.split(model)
    logits_of = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))
    packed = np.asarray(logits_of(state, batch))
    for i, conversation in enumerate(conversations):
        alone = np.asarray(logits_of(state, processor([conversation])))[0, : facts[i].tokens]
        for b, row in enumerate(rows):
            start = 0
            for number in row:
                end = start + facts[number].tokens
                if number == i:
                    np.testing.assert_allclose(packed[b, start:end], alone, atol=1e-4)
                start = end
