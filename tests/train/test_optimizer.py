"""Muon over stacked layers against each layer alone, what it leaves to AdamW, decay, clipping and the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from qwenvl_jax.train.config import OptimizerConfig
from qwenvl_jax.train.optimizer import learning_rate, make_optimizer, muon_dimensions
from qwenvl_jax.train.state import WeightInfo

pytestmark = pytest.mark.usefixtures("promotion_as_usual")

F32 = jnp.dtype("float32")
WEIGHTS = {
    "q.kernel": WeightInfo((3, 8, 2, 6), F32, ("layers", "embed", "heads", "head_dim"), 1),
    "o.kernel": WeightInfo((3, 2, 6, 8), F32, ("layers", "heads", "head_dim", "embed"), 2),
    "qkv.kernel": WeightInfo((2, 8, 3, 2, 4), F32, ("layers", "embed", "qkv", "heads", "head_dim"), 1),
    "fc.kernel": WeightInfo((8, 5), F32, ("embed", "mlp"), 1),
    "fc.bias": WeightInfo((5,), F32, ("mlp",), 0),
    "norm.scale": WeightInfo((3, 8), F32, ("layers", "norm"), 0),
    "embed.table": WeightInfo((16, 8), F32, ("vocab", "embed"), 0),
    "head.kernel": WeightInfo((8, 16), F32, ("embed", "vocab"), 1),
}


def some_values(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=info.shape), jnp.float32) for name, info in WEIGHTS.items()}


def updates_of(config: OptimizerConfig, weights=WEIGHTS, steps: int = 2) -> dict[str, jax.Array]:
    """The updates of the last of a few steps, the weights staying as they are."""
    rule = make_optimizer(config, weights)
    params = {name: some_values(0)[name] for name in weights}
    state = rule.init(params)
    for step in range(1, steps + 1):
        updates, state = rule.update({name: some_values(step)[name] for name in weights}, state, params)
    return updates


@pytest.mark.slow
def test_muon_takes_each_layer_alone():
    """A stacked weight's update is that of a loop over its layers (and over q, k and v), each a plain matrix."""
    config = OptimizerConfig(name="muon", clip_norm=0.0)
    updates = updates_of(config)
    rule = muon(1.0, beta=config.momentum)

    def alone(gradients: list[np.ndarray]) -> np.ndarray:
        weight = {"w": jnp.zeros(gradients[0].shape)}
        state = rule.init(weight)
        for gradient in gradients:
            update, state = rule.update({"w": jnp.asarray(gradient)}, state, weight)
        return np.asarray(update["w"])

    for name, rows in (("q.kernel", 8), ("o.kernel", 12)):
        gradients = [np.asarray(some_values(step)[name]) for step in (1, 2)]
        for layer in range(3):
            expected = alone([gradient[layer].reshape(rows, -1) for gradient in gradients])
            np.testing.assert_allclose(np.asarray(updates[name])[layer].reshape(rows, -1), expected, atol=1e-5)
    gradients = [np.asarray(some_values(step)["qkv.kernel"]) for step in (1, 2)]
    for layer in range(2):
        for part in range(3):
            expected = alone([gradient[layer, :, part].reshape(8, 8) for gradient in gradients])
            found = np.asarray(updates["qkv.kernel"])[layer, :, part].reshape(8, 8)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_muon_leaves_tables_norms_biases_and_head_to_adamw():
    left = {name for name, info in WEIGHTS.items() if muon_dimensions(info) is None}
    assert left == {"fc.bias", "norm.scale", "embed.table", "head.kernel"}
    config = OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=0.005, clip_norm=0.0)
    updates = updates_of(config)
    adam = updates_of(OptimizerConfig(clip_norm=0.0))
    for name in left:
        np.testing.assert_allclose(updates[name], 0.25 * adam[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_touches_matrices_and_tables_alone(name):
    decayed = updates_of(OptimizerConfig(name=name, weight_decay=0.5))
    plain = updates_of(OptimizerConfig(name=name))
    for weight in WEIGHTS:
        rate = 0.5 if weight.endswith(("kernel", "table")) else 0.0
        np.testing.assert_allclose(decayed[weight], plain[weight] - rate * some_values(0)[weight], atol=1e-5)


def test_clipping_is_by_the_norm_of_all():
    clipped = make_optimizer(OptimizerConfig(clip_norm=0.5), WEIGHTS)
    params = some_values(0)
    gradients = some_values(1)
    norm = float(optax.tree.norm(gradients))
    small = jax.tree.map(lambda g: g * (0.5 / norm), gradients)
    first, _ = clipped.update(gradients, clipped.init(params), params)
    second, _ = clipped.update(small, clipped.init(params), params)
    for name in WEIGHTS:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"), [("b1", 0.5), ("b2", 0.5), ("eps", 0.1), ("momentum", 0.5), ("adam_learning_rate", 1.0)]
)
def test_every_setting_of_the_rule_changes_it(field, value):
    changed = updates_of(OptimizerConfig(name="muon", **{field: value}))
    plain = updates_of(OptimizerConfig(name="muon"))
    assert any(not np.array_equal(changed[name], plain[name]) for name in WEIGHTS)


def test_schedules():
    """Warm-up to the peak; then constant, or half a cosine to the final fraction at the last step."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(
        [learning_rate(config, 10)(i) for i in range(7)], [0.2, 0.4, 0.6, 0.8, 1, 1, 1], rtol=1e-5
    )
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine", final_fraction=0.1)
    rates = np.array([learning_rate(config, 12)(jnp.int32(i)) for i in range(13)])
    assert rates[2] == 1.0
    np.testing.assert_allclose(rates[7], 0.55, rtol=1e-5)
    np.testing.assert_allclose(rates[12], 0.1, rtol=1e-5)
    assert (np.diff(rates[2:]) < 0).all()
    assert learning_rate(OptimizerConfig(learning_rate=1.0), 10)(0) == 1.0
