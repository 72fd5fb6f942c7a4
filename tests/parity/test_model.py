"""Logits against the reference, in float32, on every kind of input."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from qwenvl_jax.data.collate import collate
from tests.parity.conversations import CONVERSATIONS

pytestmark = pytest.mark.support("exact")

TOLERANCE = 1e-4


@jax.jit
def logits(model, batch):
    return model(batch)


@pytest.fixture(scope="module")
def samples(pair):
    return {name: pair.sample(name) for name in CONVERSATIONS}


@pytest.fixture(scope="module")
def expected(pair, samples):
    """The reference's logits of each conversation, alone and unpadded."""
    found = {}
    for name in samples:
        with torch.no_grad():
            found[name] = pair.reference(**pair.inputs(name)).logits[0].numpy()
    return found


@pytest.fixture(scope="module")
def padded(pair):
    """The logits of all conversations as one batch, padded to the longest."""
    batch = pair.processor(list(pair.conversations.values()))
    assert len({int(n) for n in (batch.segment_ids > 0).sum(axis=1)}) == len(CONVERSATIONS)
    return dict(zip(CONVERSATIONS, np.asarray(logits(pair.model, batch)), strict=True))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_batch_padded_to_different_lengths(padded, expected, samples, name):
    n = len(samples[name].tokens)
    assert padded[name].dtype == np.float32 and padded[name].shape[1] == expected[name].shape[1]
    np.testing.assert_allclose(padded[name][:n], expected[name], rtol=0, atol=TOLERANCE)


def test_alone(pair, expected):
    batch = pair.processor([pair.conversations["mixed"]])
    got = np.asarray(logits(pair.model, batch))[0]
    np.testing.assert_allclose(got, expected["mixed"], rtol=0, atol=TOLERANCE)


def test_packed_rows_equal_alone(pair, expected, samples):
    """Samples side by side in a row, in two vision groups, give the logits that each has alone."""
    rows = [["video", "text", "image"], ["images", "mixed"]]
    batch = collate(
        [[samples[name] for name in row] for row in rows],
        pixel_table=pair.processor.pixel_table,
        pad_token_id=pair.processor.pad_token_id,
        window=pair.processor.window,
        groups=2,
    )
    got = np.asarray(logits(pair.model, batch))
    for row, names in enumerate(rows):
        start = 0
        for name in names:
            n = len(samples[name].tokens)
            np.testing.assert_allclose(got[row, start : start + n], expected[name], rtol=0, atol=TOLERANCE)
            start += n


def test_the_comparison_can_fail(pair, expected, samples):
    """A part of the model that is off by a hundredth is told: the inputs reach every part of the model."""
    batch = pair.processor([pair.conversations["mixed"]])
    graph, state = nnx.split(pair.model)
    parts = {key[:2] for key, _ in nnx.to_flat_state(state)}
    for part in sorted(parts, key=str):
        moved = nnx.map_state(
            lambda key, v, part=part: v.replace(v.get_value() * 1.01) if key[:2] == part else v, state
        )
        got = np.asarray(logits(nnx.merge(graph, moved), batch))[0]
        assert np.abs(got - expected["mixed"]).max() > TOLERANCE, part
