"""Experts on several devices give what they give on one, whatever the router does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.ops import expert_exchange
from qwenvl_jax.ops.expert_exchange import placed_experts
from qwenvl_jax.ops.experts import experts_mlp, grouped_mlp
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import Execution

B, T, H, X, F, k = 4, 8, 6, 8, 10, 3


def inputs(rng, rows=B, length=T, choices=None):
    x = rng.standard_normal((rows, length, H), np.float32)
    shares = rng.random((rows, length, k), np.float32)
    experts = choices if choices is not None else np.argsort(rng.random((rows, length, X)))[..., :k].astype(np.int32)
    weights = rng.standard_normal((X, H, 2, F), np.float32), rng.standard_normal((X, F, H), np.float32)
    return x, shares, experts, *weights


def gradients(function):
    """Value, and gradients with respect to tokens, shares and weights, of a random projection."""

    def projected(x, shares, experts, gate_up, down, direction):
        return (function(x, shares, experts, gate_up, down) * direction).sum()

    return jax.jit(jax.value_and_grad(projected, (0, 1, 3, 4)))


def one_device(x, shares, experts, gate_up, down):
    flat = (part.reshape(-1, part.shape[-1]) for part in (x, shares, experts))
    return experts_mlp(*flat, gate_up, down).reshape(x.shape)


@pytest.mark.parametrize(
    ("sizes", "routing"),
    [
        ({"expert": 4}, "drawn"),
        ({"expert": 4}, "one device takes all"),
        ({"expert": 2, "tensor": 2}, "drawn"),
        ({"fsdp": 2, "expert": 2, "context": 2}, "drawn"),
        ({"data": 4}, "drawn"),
    ],
)
def test_exchanged_tokens_come_back(sizes, routing):
    rng = np.random.default_rng(0)
    choices = None
    if routing == "one device takes all":
        choices = np.broadcast_to(np.arange(2, dtype=np.int32), (B, T, 2))
        choices = np.concatenate([choices, np.full((B, T, 1), 7, np.int32)], axis=-1)
    values = inputs(rng, choices=choices)
    direction = rng.standard_normal((B, T, H), np.float32)
    mesh = make_mesh(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    execution = Execution(mesh)
    got = gradients(lambda *args: placed_experts(*args, execution))(*values, direction)
    wanted = gradients(one_device)(*values, direction)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_many_tokens_are_exchanged_in_chunks():
    """2,048 tokens a device, in chunks of 512 among four."""
    rng = np.random.default_rng(1)
    values = inputs(rng, length=2048)
    direction = rng.standard_normal((B, 2048, H), np.float32)
    execution = Execution(make_mesh(jax.devices()[:4], expert=4))
    run = gradients(lambda *args: placed_experts(*args, execution))
    text = run.lower(*values, direction).as_text()
    assert f"4x512x{H}xf32" in text
    got, wanted = run(*values, direction), gradients(one_device)(*values, direction)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def imitated_exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which XLA's CPU backend has not: every device sees all rows and takes its own.

    From device p our rows are those from its `input_offsets[here]` on, `send_sizes[here]` of them, and they stand here
    from its `output_offsets[here]` on; elsewhere stays what stood in `output`. Rows that are sent nowhere are NaN.
    """
    place = jnp.arange(len(operand), dtype=jnp.int32)[:, None]
    begins, ends = input_offsets[None], (input_offsets + send_sizes)[None]
    sent = jnp.any((place >= begins) & (place < ends), axis=1)
    operand = jnp.where(sent[:, None], operand, jnp.nan)
    here = jax.lax.axis_index(axis_name)
    everyone = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    slots = jnp.arange(len(output), dtype=jnp.int32)
    for p in range(jax.lax.axis_size(axis_name)):
        rows, begins, sizes, starts = (part[p] for part in everyone)
        # What the sender says and what the receiver expects is the same; else nothing is right.
        size = jnp.where(sizes[here] == recv_sizes[p], sizes[here], 0)
        within = slots - starts[here]
        came = (within >= 0) & (within < size)
        found = jnp.take(rows, jnp.clip(begins[here] + within, 0, len(rows) - 1), axis=0)
        output = jnp.where(came[:, None], found, output)
    return output


def nothing_else_is_used(rows, gate_up, down, sizes):
    """The product, as backends may give it: of rows of no expert comes what it will."""
    real = jnp.arange(len(rows)) < jnp.sum(sizes)
    return jnp.where(real[:, None], grouped_mlp(rows, gate_up, down, sizes), jnp.nan)


@pytest.mark.parametrize(
    ("chosen", "length"),
    [
        pytest.param(None, T, id="drawn"),
        pytest.param((0, 1), T, id="the first device takes all"),
        pytest.param((1, 7, 0), T, id="two of four take none"),
        pytest.param((7, 6), 2048, id="the last device takes all, in chunks"),
    ],
)
def test_ragged_runs_are_exchanged_as_on_tpus(monkeypatch, chosen, length):
    """With the exchange imitated, against one device."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", imitated_exchange)
    monkeypatch.setattr(expert_exchange, "grouped_mlp", nothing_else_is_used)
    monkeypatch.setattr(Execution, "platform", "tpu")
    rng = np.random.default_rng(2)
    choices = None if chosen is None else np.broadcast_to(np.asarray(chosen, np.int32), (B, length, len(chosen)))
    x, shares, experts, *weights = inputs(rng, length=length, choices=choices)
    values = (x, shares[..., : experts.shape[-1]], experts, *weights)
    direction = rng.standard_normal((B, length, H), np.float32)
    execution = Execution(make_mesh(jax.devices()[:4], expert=4))
    got = gradients(lambda *args: placed_experts(*args, execution))(*values, direction)
    wanted = gradients(one_device)(*values, direction)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
