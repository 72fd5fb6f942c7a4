"""Muon over stacked layers against each layer alone, what it leaves to AdamW, decay, clipping, rates and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.config import AdapterConfig, OptimizerConfig, StageConfig, TrainConfig
from qwenvl_jax.train.optimizer import global_norm, learning_rate, make_optimizer, muon_dimensions, optimizer_notes
from qwenvl_jax.train.state import WeightInfo
from qwenvl_jax.train.step import _moved

pytestmark = pytest.mark.usefixtures("promotion_as_usual")

F32 = jnp.dtype("float32")
WEIGHTS = {
    "q.kernel": WeightInfo((3, 8, 2, 6), F32, ("layers", "embed", "heads", "head_dim"), 1),
    "o.kernel": WeightInfo((3, 2, 6, 8), F32, ("layers", "heads", "head_dim", "embed"), 2),
    "qkv.kernel": WeightInfo((2, 8, 3, 2, 4), F32, ("layers", "embed", "qkv", "heads", "head_dim"), 1),
    "gate_up": WeightInfo((2, 3, 8, 2, 5), F32, ("layers", "experts", "expert_embed", "gate_up", "expert_mlp"), 2),
    "down": WeightInfo((2, 3, 5, 8), F32, ("layers", "experts", "expert_mlp", "expert_embed"), 2),
    "fc.kernel": WeightInfo((8, 5), F32, ("embed", "mlp"), 1),
    "fc.bias": WeightInfo((5,), F32, ("mlp",), 0),
    "norm.scale": WeightInfo((3, 8), F32, ("layers", "norm"), 0),
    "embed.table": WeightInfo((16, 8), F32, ("vocab", "embed"), 0),
    "head.kernel": WeightInfo((8, 16), F32, ("embed", "vocab"), 1),
}


def some_values(seed: int) -> dict[str, jax.Array]:
    """In f32, or in f64 where JAX has it."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=info.shape), jnp.result_type(float)) for name, info in WEIGHTS.items()}


def quick(function):
    """Compiled without optimization, which would take far longer than running it."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def updates_of(config: OptimizerConfig, weights=WEIGHTS, steps: int = 2) -> dict[str, jax.Array]:
    """The updates of the last of a few steps, the weights staying as they are."""
    rule = make_optimizer(config, weights)
    update = quick(rule.update)
    params = {name: some_values(0)[name] for name in weights}
    state = rule.init(params)
    for step in range(1, steps + 1):
        updates, state = update({name: some_values(step)[name] for name in weights}, state, params)
    return updates


# Of each stacked weight: its matrices, found by indexing, and how many rows each has.
MATRICES = {
    "q.kernel": (lambda w: [w[i] for i in range(3)], 8),
    "o.kernel": (lambda w: [w[i] for i in range(3)], 12),
    "qkv.kernel": (lambda w: [w[i, :, part] for i in range(2) for part in range(3)], 8),
    "gate_up": (lambda w: [w[i, x, :, part] for i in range(2) for x in range(3) for part in range(2)], 8),
    "down": (lambda w: [w[i, x] for i in range(2) for x in range(3)], 5),
    "fc.kernel": (lambda w: [w], 8),
}


def test_muon_takes_each_layer_alone():
    """The update of a stacked weight is that of a loop over its layers, over their experts, over what is joined in one
    kernel: each is a plain matrix, which optax's rule takes alone.

    In f64: its iterations make differences between the orders of sums some hundred times as large.
    """
    with jax.enable_x64(True):
        muon_takes_each_layer_alone()


def muon_takes_each_layer_alone():
    config = OptimizerConfig(name="muon", clip_norm=0.0)
    updates = updates_of(config)
    assert {name for name, info in WEIGHTS.items() if muon_dimensions(info) is not None} == MATRICES.keys()
    rule = muon(1.0, beta=config.momentum)

    @quick
    def alone(*gradients):
        weight = {"w": jnp.zeros(gradients[0].shape)}
        state = rule.init(weight)
        for gradient in gradients:
            update, state = rule.update({"w": gradient}, state, weight)
        return update["w"]

    for name, (matrices, rows) in MATRICES.items():
        first, second, found = (matrices(np.asarray(w[name])) for w in (some_values(1), some_values(2), updates))
        for one, two, matrix in zip(first, second, found, strict=True):
            expected = alone(one.reshape(rows, -1), two.reshape(rows, -1))
            np.testing.assert_allclose(matrix.reshape(rows, -1), expected, atol=1e-9)


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
        rate = 0.0 if weight.endswith(("bias", "scale")) else 0.5
        np.testing.assert_allclose(decayed[weight], plain[weight] - rate * some_values(0)[weight], atol=1e-5)


def test_a_norm_in_16_bits_is_added_up_in_32(optax_promotes):
    """Small gradients beside large ones, which 16 bits would lose; and what is clipped has that norm."""
    gradients = {f"w{i}": jnp.full((64,), 1.0 if i else 24.0, jnp.bfloat16) for i in range(40)}
    exact = float(np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in gradients.values())))
    np.testing.assert_allclose(float(global_norm(gradients)), exact, rtol=1e-6)
    assert abs(float(optax.tree.norm(gradients)) / exact - 1) > 1e-3
    weights = {name: WeightInfo((64,), jnp.dtype("bfloat16"), ("norm",), 0) for name in gradients}
    rule = make_optimizer(OptimizerConfig(clip_norm=0.5), weights)
    clipped, _ = rule.update(gradients, rule.init(gradients), gradients)
    small = {name: (g.astype(jnp.float32) * (0.5 / exact)).astype(jnp.bfloat16) for name, g in gradients.items()}
    wanted, _ = rule.update(small, rule.init(gradients), gradients)
    for name in gradients:
        assert clipped[name].dtype == wanted[name].dtype
        np.testing.assert_allclose(*(np.asarray(x[name], np.float32) for x in (clipped, wanted)), rtol=1e-2)


def test_clipping_is_by_the_norm_of_all():
    clipped = make_optimizer(OptimizerConfig(clip_norm=0.5), WEIGHTS)
    params = some_values(0)
    gradients = some_values(1)
    norm = float(optax.tree.norm(gradients))
    small = jax.tree.map(lambda g: g * (0.5 / norm), gradients)
    update = quick(clipped.update)
    first, _ = update(gradients, clipped.init(params), params)
    second, _ = update(small, clipped.init(params), params)
    for name in WEIGHTS:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"), [("b1", 0.5), ("b2", 0.5), ("eps", 0.1), ("momentum", 0.5), ("adam_learning_rate", 1.0)]
)
def test_every_setting_of_the_rule_changes_it(field, value):
    weights = {name: WEIGHTS[name] for name in ("fc.kernel", "fc.bias")}
    changed = updates_of(OptimizerConfig(name="muon", **{field: value}), weights)
    plain = updates_of(OptimizerConfig(name="muon"), weights)
    assert any(not np.array_equal(changed[name], plain[name]) for name in weights)


PARTS_OF_A_MODEL = {
    "vision.blocks.fc.kernel": WeightInfo((8, 5), F32, ("vision_embed", "mlp"), 1),
    "merger.norm.scale": WeightInfo((8,), F32, ("norm",), 0),
    "deepstack.fc1.kernel": WeightInfo((2, 8, 5), F32, ("layers", "embed", "mlp"), 1),
    "text.layers.fc.kernel": WeightInfo((3, 8, 5), F32, ("layers", "embed", "mlp"), 1),
    "text.embed.table": WeightInfo((16, 8), F32, ("vocab", "embed"), 0),
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parts_have_rates_of_their_own(name):
    """An update is that of one rate for all, times the factor of its part, decay included."""
    config = OptimizerConfig(name=name, weight_decay=0.1, adam_learning_rate=3e-5)
    rates = (("vision", 0.25), ("mergers", 4.0))
    rule = make_optimizer(config, PARTS_OF_A_MODEL)
    with_rates = make_optimizer(dataclasses.replace(config, rates=rates), PARTS_OF_A_MODEL)
    rng = np.random.default_rng(0)
    params, gradients = (
        {name: jnp.asarray(rng.normal(size=info.shape), jnp.float32) for name, info in PARTS_OF_A_MODEL.items()}
        for _ in range(2)
    )
    plain, _ = quick(rule.update)(gradients, rule.init(params), params)
    found, _ = quick(with_rates.update)(gradients, with_rates.init(params), params)
    factors = {"vision": 0.25, "merger": 4.0, "deepstack": 4.0, "text": 1.0}
    for weight in PARTS_OF_A_MODEL:
        np.testing.assert_allclose(found[weight], factors[weight.split(".")[0]] * plain[weight], rtol=1e-6)


def test_a_rate_for_a_part_that_does_not_learn_is_refused():
    weights = {name: info for name, info in PARTS_OF_A_MODEL.items() if name.startswith(("merger", "deepstack"))}
    with pytest.raises(ConfigError, match="factor for 'vision', of which nothing learns"):
        make_optimizer(OptimizerConfig(rates=(("mergers", 2.0), ("vision", 0.5))), weights)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("name", "adam", "is not one of adamw, muon"),
        ("schedule", "linear", "is not one of constant, cosine, wsd"),
        ("decay_shape", "cosine", "is not one of linear, sqrt"),
        ("learning_rate", 0.0, "must be more than 0"),
        ("learning_rate", float("nan"), "must be more than 0"),
        ("adam_learning_rate", -1.0, "must be more than 0"),
        ("warmup_steps", -1, "must be at least 0"),
        ("final_fraction", 1.5, "must be from 0 to 1"),
        ("decay_fraction", -0.1, "must be from 0 to 1"),
        ("b1", 1.0, "must be at least 0 and less than 1"),
        ("b2", 1.0, "must be at least 0 and less than 1"),
        ("momentum", 1.0, "must be at least 0 and less than 1"),
        ("eps", 0.0, "must be more than 0"),
        ("weight_decay", -0.1, "must be at least 0"),
        ("clip_norm", float("inf"), "must be at least 0"),
        ("rates", (("tower", 0.1),), "parts being vision, mergers, text"),
        ("rates", ("ab",), "must be pairs"),
        ("rates", (("text", 0.1), ("text", 0.2)), "must name each part once"),
        ("rates", (("vision", 0.0),), "is left out of the stage's `trainable`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, value, told):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}=.*{told}"):
        OptimizerConfig(**{field: value})


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


def wsd(steps: int, **settings) -> np.ndarray:
    """Learning rates of the steps of a stage, and the one after it, with a peak of 1."""
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", **settings)
    return np.array([learning_rate(config, steps)(jnp.int32(i)) for i in range(steps + 1)])


def test_warm_up_stable_decay():
    """Written out: two steps of warm-up, then the peak, then down over the last four of twelve steps."""
    rising, stable = [1 / 3, 2 / 3], [1.0] * 7
    linear = wsd(12, warmup_steps=2, decay_fraction=1 / 3, decay_shape="linear")
    np.testing.assert_allclose(linear, [*rising, *stable, 0.75, 0.5, 0.25, 0], atol=1e-6)
    root = wsd(12, warmup_steps=2, decay_fraction=1 / 3, decay_shape="sqrt", final_fraction=0.2)
    left = [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0]
    np.testing.assert_allclose(root, [*rising, *stable, *(0.2 + 0.8 * share for share in left)], atol=1e-6)


def test_warm_up_goes_before_a_decay_that_has_no_room():
    np.testing.assert_allclose(
        wsd(6, warmup_steps=4, decay_fraction=1.0, decay_shape="linear"), [0.2, 0.4, 0.6, 0.8, 1, 0.5, 0], atol=1e-6
    )
    np.testing.assert_allclose(wsd(3, warmup_steps=4), [0.2, 0.4, 0.6, 0.8], atol=1e-6)
    np.testing.assert_allclose(wsd(3, decay_fraction=0.0), [1, 1, 1, 1], atol=1e-6)


RULE = OptimizerConfig(learning_rate=1e-5, warmup_steps=4)
STAGE = StageConfig("s1", steps=5, optimizer=RULE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"param_dtype": "bfloat16"}, ["the weights learn in 16 bits", "most changes at a learning rate of 1e-05"]),
        ({"param_dtype": "bfloat16", "adapter": AdapterConfig(rank=2)}, []),
        (
            {"param_dtype": "bfloat16", "adapter": AdapterConfig(rank=2, modules_to_save="merger")},
            ["the modules of adapter.modules_to_save learn in 16 bits"],
        ),
        (
            {"stages": (dataclasses.replace(STAGE, steps=4),)},
            ["s1: its 4 steps end within optimizer.warmup_steps=4", "comes to 8e-06 and never to its peak of 1e-05"],
        ),
    ],
)
def test_weights_that_would_not_move_as_the_settings_read_are_told(changes, told):
    config = TrainConfig(**{"model": "a/model", "stages": (STAGE,)} | changes)
    notes = list(optimizer_notes(config))
    assert len(notes) == bool(told)
    assert all(words in notes[0] for words in told)


def test_what_16_bits_round_away():
    """A change of less than about 1/256 of a weight, as the note says."""
    weight = jnp.asarray([0.02, 0.03], jnp.bfloat16)
    moved = [_moved(weight, weight, jnp.float32(share)) for share in (1 / 600, 1 / 100)]
    assert np.array_equal(moved[0], weight)
    assert not np.any(moved[1] == weight)
