"""The router's balance against the reference's, and its z-loss against the sum written out."""

import jax
import numpy as np
import torch

from qwenvl_jax.ops.experts import route
from qwenvl_jax.ops.router import balance_loss, router_load, z_loss
from tests.parity import reference  # noqa: F401  declares what transformers needs

B, T, X, k = 2, 9, 6, 2


def load_of(logits_BTX, segments_BT):
    _, experts = route(logits_BTX.reshape(-1, X), k)
    return router_load(logits_BTX, experts.reshape(B, T, k), segments_BT)


def inputs(seed: int):
    rng = np.random.default_rng(seed)
    segments = np.ones((B, T), np.int32)
    segments[0, 6:] = 0
    return rng.normal(size=(B, T, X)).astype(np.float32) * 2, segments


def stacked(*loads):
    return {name: np.stack([load[name] for load in loads]) for name in loads[0]}


def test_one_layer_is_balanced_as_the_reference_has_it():
    """Padding left out; the reference counts each of a token's choices as a whole."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    logits, segments = inputs(0)
    flat = torch.tensor(logits.reshape(-1, X))
    wanted = load_balancing_loss_func((flat,), X, k, torch.tensor(segments > 0).long())
    np.testing.assert_allclose(balance_loss(stacked(load_of(logits, segments))) * k, wanted.item(), rtol=1e-6)


def test_layers_do_not_make_up_for_one_another():
    """Two layers, each sending everything to other experts than the other: as bad as one alone."""
    logits, segments = inputs(1)
    one, other = logits.copy(), logits.copy()
    one[..., :2] += 50
    other[..., 2:4] += 50
    alone = float(balance_loss(stacked(load_of(one, segments))))
    assert alone > 0.9 * X / k
    both = stacked(load_of(one, segments), load_of(other, segments))
    other_alone = float(balance_loss(stacked(load_of(other, segments))))
    np.testing.assert_allclose(balance_loss(both), (alone + other_alone) / 2, rtol=1e-6)


def test_z_loss():
    logits, segments = inputs(2)
    real = logits[segments > 0].astype(np.float64)
    wanted = np.mean(np.log(np.exp(real).sum(-1)) ** 2)
    np.testing.assert_allclose(z_loss(stacked(load_of(logits, segments))), wanted, rtol=1e-5)


def test_gradients_reach_the_router_and_balance_it():
    """Steps down the balance loss lower it."""
    logits, segments = inputs(3)
    logits[..., 0] += 2

    def loss(logits):
        load = jax.tree.map(lambda x: x[None], load_of(logits, segments))
        return balance_loss(load)

    first, gradient = jax.value_and_grad(loss)(logits)
    assert loss(logits - 5 * gradient) < first
