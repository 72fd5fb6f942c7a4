"""The stream of a mixture: shares, caps, schedules and frame rates, and that it is a function of seed and place."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.data.stream import Part, Stream
from qwenvl_jax.errors import ConfigError


def part(count: int, begin: int = 0, **options) -> Part:
    return Part(np.arange(begin, begin + count)[:, None], **options)


def stream_of(*parts: Part, tokens=None, seed: int = 0, **options) -> Stream:
    entries = 1 + max(int(one.entries.max()) for one in parts)
    return Stream(parts, np.ones(entries, np.int64) if tokens is None else np.asarray(tokens), seed=seed, **options)


def take(stream: Stream, count: int, progress: float = 0.0) -> list[tuple[int, int]]:
    return [taken for _ in range(count) if (taken := stream.take(progress)) is not None]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_shares_hold_over_every_stretch(weights, seed):
    """From any place to any other, a part gives its share within two samples for each other part."""
    parts = [part(7, 7 * n, name=str(n), weight=weight) for n, weight in enumerate(weights)]
    taken = np.asarray([number for number, _ in take(stream_of(*parts, seed=seed), 200)])
    for n, weight in enumerate(weights):
        given_so_far = np.concatenate([[0], np.cumsum(taken == n)])
        ahead = given_so_far - np.arange(201) * weight / sum(weights)
        assert ahead.max() - ahead.min() <= 2 * len(weights)


def test_weights_by_tokens():
    """A part of samples ten times as long gives a tenth as many for the same share of the tokens."""
    parts = (part(10, 0, name="long"), part(10, 10, name="short"))
    tokens = [100] * 10 + [10] * 10
    by_tokens = collections.Counter(
        number for number, _ in take(stream_of(*parts, tokens=tokens, weigh_by="tokens"), 1100)
    )
    by_samples = collections.Counter(number for number, _ in take(stream_of(*parts, tokens=tokens), 1100))
    assert abs(by_tokens[0] - 100) <= 2 and by_samples[0] == 550


def test_each_epoch_has_every_sample_once():
    stream = stream_of(part(5, 0, name="a", weight=2), part(3, 5, name="b"))
    taken = take(stream, 45)
    a = [entry for number, entry in taken if number == 0]
    assert len(a) == 30
    epochs = [a[n : n + 5] for n in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    unshuffled = take(stream_of(part(3), shuffle=False), 6)
    assert [entry for _, entry in unshuffled] == [0, 1, 2, 0, 1, 2]


def test_a_part_is_shuffled_alike_in_any_company():
    alone = [entry for _, entry in take(stream_of(part(9, name="a")), 27)]
    mixed = take(stream_of(part(4, 9, name="b"), part(9, name="a", weight=3)), 36)
    assert [entry for number, entry in mixed if number == 1] == alone
    assert [entry for _, entry in take(stream_of(part(9, name="other")), 27)] != alone
    assert [entry for _, entry in take(stream_of(part(9, name="a"), seed=1), 27)] != alone


def test_parts_come_to_their_end():
    """What a part that has given all leaves goes to the others; after the last the stream ends."""
    parts = (part(4, 0, name="a", max_epochs=2.5), part(4, 4, name="b", max_epochs=5))
    stream = stream_of(*parts)
    counts = collections.Counter(number for number, _ in take(stream, 100))
    assert counts == {0: 10, 1: 20}
    assert stream.take() is None


def test_weights_change_along_the_stage():
    parts = (part(4, 0, name="a", weight=1, final_weight=0), part(4, 4, name="b", weight=0, final_weight=3))
    stream = stream_of(*parts)
    taken = [stream.take(n / 1000) for n in range(1001)]
    thirds = [collections.Counter(number for number, _ in taken[n : n + 250]) for n in (0, 750)]
    assert thirds[0][0] > 0.6 * 250 and thirds[1][1] > 0.85 * 250
    assert taken[0][0] == 0 and taken[-1][0] == 1


def test_frame_rates_are_drawn_for_each_sample_in_each_epoch():
    """By their weights; which one follows from seed, part and epoch."""
    entries = np.arange(3000).reshape(1000, 3)
    tokens = np.ones(3000, np.int64)
    stream = Stream((Part(entries, "clips"),), tokens, seed=0, rate_weights=(1, 2, 5))
    first, second = ([entry for _, entry in take(stream, 1000)] for _ in range(2))
    assert sorted(entry // 3 for entry in first) == list(range(1000))
    shares = np.bincount([entry % 3 for entry in first]) / 1000
    np.testing.assert_allclose(shares, [0.125, 0.25, 0.625], atol=0.05)
    rate = [{entry // 3: entry % 3 for entry in epoch} for epoch in (first, second)]
    same = np.mean([rate[0][n] == rate[1][n] for n in range(1000)])
    assert abs(same - (0.125**2 + 0.25**2 + 0.625**2)) < 0.06
    again = Stream((Part(entries, "clips"),), tokens, seed=0, rate_weights=(1, 2, 5))
    assert [entry for _, entry in take(again, 1000)] == first
    never = Stream((Part(entries, "clips"),), tokens, seed=0, rate_weights=(1, 0, 0))
    assert {entry % 3 for _, entry in take(never, 100)} == {0}


@pytest.mark.parametrize("weigh_by", ["samples", "tokens"])
def test_goes_on_from_any_place(weigh_by):
    rng = np.random.default_rng(0)
    parts = (
        Part(np.arange(30).reshape(10, 3), "a", 0.3),
        Part(np.arange(30, 60).reshape(10, 3), "b", 0.7, final_weight=0.1, max_epochs=9),
    )
    tokens = rng.integers(1, 100, 60)

    def make():
        return Stream(parts, tokens, seed=5, rate_weights=(1, 1, 1), weigh_by=weigh_by)

    whole = [make_step.take(n / 300) for make_step in [make()] for n in range(300)]
    for stop in (1, 17, 150, 299):
        stream = make()
        begun = [stream.take(n / 300) for n in range(stop)]
        other = make()
        other.restore(stream.state)
        assert begun + [other.take(n / 300) for n in range(stop, 300)] == whole
    assert all(a != b for a, b in itertools.pairwise([make().state, stream.state]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight": -1.0}, "weight=-1"),
        ({"final_weight": float("nan")}, "final_weight=nan"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"weight": 0.0}, "all weights"),
    ],
)
def test_shares_that_are_none_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        stream_of(part(3, name="a", **options))
