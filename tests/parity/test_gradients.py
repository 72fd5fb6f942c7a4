"""Gradients of the mean loss against the reference, for every tensor, on one mixed input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.checkpoint import hf
from qwenvl_jax.ops.losses import chunked_cross_entropy
from qwenvl_jax.parallel.placement import Execution

pytestmark = pytest.mark.support("exact")

TOLERANCE = 1e-4  # of each tensor's largest absolute gradient


@pytest.fixture(scope="module")
def expected(pair):
    """The reference's loss, the mean over all tokens but the first, and its gradients by tensor name."""
    inputs = pair.inputs("mixed")
    pair.reference.zero_grad()
    loss = pair.reference(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {
        hf.current_name(name, pair.model.config.model_type): tensor.grad.numpy().copy()
        for name, tensor in pair.reference.named_parameters()
    }
    pair.reference.zero_grad()
    return float(loss.detach()), gradients


def test_loss_and_gradients(pair, expected):
    """Untied models keep their activations and tied ones make them again; the mathematics is the same."""
    remat = "full" if pair.model.config.text.tie_word_embeddings else "none"
    batch = pair.processor([pair.conversations["mixed"]])
    graph, state = nnx.split(pair.model)
    weights = np.asarray(batch.segment_ids > 0, np.float32)
    weights[:, -1] = 0  # nothing follows the last token

    @jax.jit
    @jax.value_and_grad
    def loss_of(state):
        model = nnx.merge(graph, state)
        hidden = model.hidden(batch, Execution(remat=remat))
        total = chunked_cross_entropy(hidden, model.text.head_weight(), batch.targets, jnp.asarray(weights), chunk=64)
        return total / weights.sum()

    loss, gradients = loss_of(state)
    expected_loss, expected_gradients = expected
    assert abs(float(loss) - expected_loss) < TOLERANCE
    found = {".".join(map(str, key)): np.asarray(v.get_value()) for key, v in nnx.to_flat_state(gradients)}
    compared = set()
    for entry in hf.tensor_table(pair.model.config):
        for layer, name in enumerate(entry.names()):
            gradient = found[entry.path] if entry.layers is None else found[entry.path][layer]
            reference = expected_gradients[name]
            largest = np.abs(reference).max()
            assert largest > 0, name
            ours = entry.to_public(gradient)
            if ours.shape != reference.shape:  # the reference holds experts the other way round
                ours = ours.swapaxes(-1, -2)
            np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * largest, err_msg=name)
            compared.add(name)
    assert compared == set(expected_gradients)
