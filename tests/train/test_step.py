"""The loss and its normalisations, what is frozen, the update, and that a run compiles a step once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.train.config import GuardConfig, OptimizerConfig, StageConfig
from qwenvl_jax.train.optimizer import make_optimizer
from qwenvl_jax.train.state import GuardState, ModelParts, TrainState
from qwenvl_jax.train.step import make_loss, make_step, normalised_weights
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import tiny_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    tiny_processor_folder(folder)
    shape = tiny_model(Processor.from_pretrained(folder))
    return ModelParts(shape, dtype="float32", param_dtype="float32", mesh=single_device_mesh())


@pytest.fixture(scope="module")
def params(parts):
    return parts.random(0)


@pytest.fixture(scope="module")
def losses(parts, params):
    """f64[B, T], the loss of each token of `text_batch`, from the model's logits."""
    batch = text_batch()
    logits = np.asarray(parts.merge(params)(batch), np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]


def text_batch() -> Batch:
    """Two rows: samples of 3 and 5 tokens, of which 1 and 3 are learnt, and one of 8 of which 4 are."""
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 3 + [2] * 5 + [0] * 2, [1] * 8 + [0] * 2], np.int32)
    weights = np.array([[0, 1, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]], np.float32)
    starts = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0], [*range(8), 0, 0]], np.int32)
    tokens = rng.integers(0, 200, (2, 10)).astype(np.int32)
    return Batch(
        tokens=tokens,
        positions=np.repeat(starts[..., None], 3, axis=-1),
        segment_ids=segments,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=weights,
        vision_index=np.full((2, 10), -1, np.int32),
    )


@pytest.mark.parametrize(
    ("kind", "factors"),
    [("token", (1, 1, 1)), ("sample", (1, 1 / 3, 1 / 4)), ("sqrt", (1, 3**-0.5, 4**-0.5))],
)
def test_normalisations(parts, params, losses, kind, factors):
    """Against the sums written out: each token's loss, weighted by its sample's size."""
    batch = text_batch()
    weights = np.asarray(normalised_weights(batch, kind))
    of_sample = np.where(batch.segment_ids == 2, factors[1], factors[0])
    of_sample[1] = factors[2]
    np.testing.assert_allclose(weights, batch.loss_weights * of_sample, rtol=1e-6)

    stage = StageConfig(name="s", steps=1, loss=kind, loss_chunk=7)
    expected = (losses * weights).sum() / weights.sum()
    np.testing.assert_allclose(make_loss(parts, stage)(params, batch), expected, rtol=1e-5)


def test_batch_that_teaches_nothing_has_no_loss(parts, params):
    batch = dataclasses.replace(text_batch(), loss_weights=np.zeros((2, 10), np.float32))
    assert make_loss(parts, StageConfig(name="s", steps=1))(params, batch) == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_weights_have_no_gradient_and_no_state(parts, params, name):
    """One step with the mergers alone: the others are neither changed nor known to the optimizer."""
    stage = StageConfig(name="s", steps=4, trainable="mergers", optimizer=OptimizerConfig(name=name, weight_decay=0.1))
    names = parts.select(stage.trainable)
    assert {weight.split(".")[0] for weight in names} == {"merger", "deepstack"}
    learning = {weight: params[weight] for weight in names}
    frozen = {weight: value for weight, value in params.items() if weight not in learning}
    optimizer = make_optimizer(stage.optimizer, {weight: parts.weights[weight] for weight in names})
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(
            jnp.zeros((), jnp.int32), learning, optimizer.init(learning), jnp.zeros(2, jnp.uint32), GuardState.begun()
        )
        kept = {getattr(path[-1], "key", None) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
        assert kept - {None} <= set(names)
        after, _ = jax.jit(make_step(parts, stage, optimizer))(state, frozen, text_batch())
    assert set(after.params) == set(names)
    assert int(after.step) == 1


def test_trainable_patterns(parts):
    assert parts.select("all") == parts.names
    assert parts.select(r"layers.*mlp") == tuple(name for name in parts.names if "text.layers.mlp" in name)
    with pytest.raises(ConfigError, match="picks no weight; names look like deepstack"):
        parts.select("nothing")
    with pytest.raises(ConfigError, match="no regular expression"):
        parts.select("(")


def test_splitting_and_merging_are_inverse(parts, params):
    model = parts.merge(params)
    again = parts.split(model)
    assert list(again) == list(params)
    assert all(np.array_equal(again[name], params[name]) for name in params)
    assert {name: value.shape for name, value in params.items()} == {n: i.shape for n, i in parts.weights.items()}


def guarded(parts, params, **bounds):
    """A stage with these bounds, its compiled step, and the state before it."""
    optimizer_config = OptimizerConfig(learning_rate=1e-2, schedule="constant", clip_norm=1.0)
    stage = StageConfig(name="s", steps=9, optimizer=optimizer_config, guard=GuardConfig(**bounds))
    optimizer = make_optimizer(stage.optimizer, parts.weights)
    rng, guard = jnp.zeros(2, jnp.uint32), GuardState.begun()
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng, guard)
    return jax.jit(make_step(parts, stage, optimizer)), state


def assert_left_out(before: TrainState, after: TrainState, output) -> None:
    assert int(output.skipped) == int(before.guard.skipped) + 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert int(after.step) == int(before.step) + 1 and not np.array_equal(after.rng, before.rng)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(parts, params, bad, optax_promotes):
    step, state = guarded(parts, params)
    state, output = step(state, {}, text_batch())
    assert int(output.skipped) == 0 and not np.array_equal(state.params["text.norm.scale"], params["text.norm.scale"])
    if bad == "loss":
        batch = dataclasses.replace(text_batch(), loss_weights=np.full((2, 10), np.nan, np.float32))
        after, output = step(state, {}, batch)
        assert not np.isfinite(output.loss)
    else:
        # So small that its square root is finite and the slope there is not.
        name = "text.layers.input_norm.scale"
        broken = dataclasses.replace(state, params=state.params | {name: state.params[name].at[0, 0].set(jnp.nan)})
        after, output = step(broken, {}, text_batch())
        state = broken
    assert_left_out(state, after, output)
    again, output = step(dataclasses.replace(after, params=params), {}, text_batch())
    assert int(output.skipped) == 0 and int(again.guard.skipped) == 1


@pytest.mark.parametrize("bounds", [{"max_loss": 0.1}, {"max_grad_norm": 1e-3}])
def test_a_step_beyond_a_bound_changes_nothing(parts, params, bounds, optax_promotes):
    step, state = guarded(parts, params, **bounds)
    after, output = step(state, {}, text_batch())
    assert np.isfinite(output.loss)
    assert_left_out(state, after, output)


def test_a_spike_is_told_from_the_running_mean(parts, params, optax_promotes):
    """Two quiet steps, then one whose gradient is larger."""
    step, state = guarded(parts, params, spike=1.1, spike_after=2)
    loud = {name: value * 5.0 if name == "text.embed.table" else value for name, value in params.items()}
    norms = []
    for _ in range(2):
        state, output = step(dataclasses.replace(state, params=params), {}, text_batch())
        norms.append(float(output.grad_norm))
        assert int(output.skipped) == 0
    np.testing.assert_allclose(state.guard.mean_norm, np.mean(norms), rtol=1e-6)
    state = dataclasses.replace(state, params=loud)
    after, output = step(state, {}, text_batch())
    assert float(output.grad_norm) > 1.1 * np.mean(norms)
    assert_left_out(state, after, output)
    assert float(after.guard.mean_norm) == float(state.guard.mean_norm)


@pytest.mark.parametrize("bounds", [{"max_loss": -1.0}, {"spike": 0.5}, {"abort_after": -1}])
def test_bounds_that_mean_nothing_are_refused(bounds):
    with pytest.raises(ConfigError, match=f"guard.{next(iter(bounds))}="):
        GuardConfig(**bounds)
