"""The training step: a pure loss over the weights by name, its gradient, and the update.

A batch may be taken in microbatches, whose gradients are summed: memory holds the activations of one of them. Every
normaliser is that of the whole batch, whatever microbatch, group or device its parts lie on. One thing is of each
microbatch: the balance of the experts, which multiplies means (see `qwenvl_jax.ops.router`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qwenvl_jax.batch import Batch
from qwenvl_jax.ops.losses import token_losses
from qwenvl_jax.ops.router import balance_loss, z_loss
from qwenvl_jax.parallel.context import balanced_batch
from qwenvl_jax.parallel.placement import Execution, leaf_axes
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.optimizer import global_norm, learning_rate
from qwenvl_jax.train.state import ModelParts, Params, TrainState

Sums = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step tells of itself.

    Attributes:
      loss: f32[], of the whole batch, before the update; without the router's terms.
      grad_norm: f32[], global norm of the gradients, before they are clipped.
      skipped: i32[], 0 if the step was taken, else how many steps of the stage have been left out with it.
      sums: "experts" f32[Y, X], tokens sent to each expert of each layer; "router_balance" and "router_z" f32[], the
        router's losses before their weights (of microbatches the mean of their balances, weighed by their tokens); for
        a batch with `classes` "loss" and "weight" f32[classes], the weighted losses and the weights of each class. Only
        what there is.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    sums: Sums


def normalised_weights(batch: Batch, kind: str):
    """Loss weights f32[B, T] whose weighted mean is the loss of this kind.

    With N the summed weights of a sample (its supervised tokens): "token" keeps the weights, "sample" divides by
    N, so that samples count alike, "sqrt" by the square root of N, so that a sample counts as the square root of N.
    The normaliser is the sum over the whole batch, whatever devices or groups it lies on.
    """
    if kind == "token":
        return batch.loss_weights
    T = batch.tokens.shape[1]

    def sums_of(weights_T, segments_T):
        return jax.ops.segment_sum(weights_T, segments_T, num_segments=T + 1)[segments_T]

    sums_BT = jax.vmap(sums_of)(batch.loss_weights, batch.segment_ids)
    sums_BT = jnp.where(sums_BT > 0, sums_BT, 1.0)
    return batch.loss_weights / (jnp.sqrt(sums_BT) if kind == "sqrt" else sums_BT)


def make_execution(parts: ModelParts, stage: StageConfig) -> Execution:
    """How a stage runs the model on the mesh of its weights."""
    execution = Execution(parts.mesh, parts.rules, remat=stage.remat, unroll=stage.unroll, attention=stage.attention)
    return dataclasses.replace(execution, balanced=execution.split("tokens") > 1)


def make_loss(parts: ModelParts, stage: StageConfig) -> Callable[[Params, Batch], jax.Array]:
    """Returns `loss(params, batch) -> f32[]`, pure; never holds [tokens, V] in f32."""
    summed = _make_objective(parts, stage)

    def loss(params: Params, batch: Batch):
        batch = _weighed(batch, stage.loss)
        return summed(params, batch, _weight_a_token(batch))[1]["total"] / _positive(jnp.sum(batch.loss_weights))

    return loss


def make_step(parts: ModelParts, stage: StageConfig, optimizer: optax.GradientTransformation, classes: int = 0):
    """Returns `step(state, frozen, batch) -> (state, StepOutput)`, to be compiled with the state donated.

    Args:
      classes: how many classes the samples are of (`Batch.classes`), whose losses are told apart.

    Frozen weights are an argument apart: no gradient is taken of them and the optimizer keeps nothing for them. A step
    whose loss or gradient is not finite, or beyond the bounds of `stage.guard`, leaves weights and optimizer as they
    were.
    """
    gradients_of = make_gradients(parts, stage, classes)
    schedule = learning_rate(stage.optimizer, stage.steps)

    def step(state: TrainState, frozen: Params, batch: Batch):
        loss, gradients, sums = gradients_of(state.params, frozen, batch)
        norm = global_norm(gradients)
        healthy, guard = _guarded(stage, state.guard, loss, norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = schedule(state.step)
        params = {name: _moved(value, updates[name], rate) for name, value in state.params.items()}
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(healthy, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = jnp.where(healthy, 0, guard.skipped)
        rng = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step))
        return TrainState(state.step + 1, params, opt_state, rng, guard), StepOutput(loss, norm, skipped, sums)

    return step


def _make_objective(parts: ModelParts, stage: StageConfig, classes: int = 0):
    """Returns `summed(params, batch, weight_a_token) -> (f32[], sums)` of a batch whose weights are those of the loss.

    The first is what is differentiated, to be divided by the weights of the whole batch: the weighted losses, and the
    router's losses as if each token had them and the mean weight of one, so that microbatches add up.
    """
    execution = make_execution(parts, stage)

    def summed(params: Params, batch: Batch, weight_a_token):
        if execution.balanced:
            batch = balanced_batch(batch, execution.split("tokens"))
        model = parts.merge(params)
        hidden_BTH, load = model.hidden_and_load(batch, execution)
        losses_BT = token_losses(
            hidden_BTH, model.text.head_weight(), batch.targets, chunk=stage.loss_chunk, execution=execution
        )
        weighted_BT = losses_BT * batch.loss_weights
        total = jnp.sum(weighted_BT)
        sums = {"total": total}
        if classes and batch.classes is not None:
            of_classes = (batch.classes.reshape(-1), classes + 1)
            sums["loss"] = jax.ops.segment_sum(weighted_BT.reshape(-1), *of_classes)[1:]
            sums["weight"] = jax.ops.segment_sum(batch.loss_weights.reshape(-1), *of_classes)[1:]
        objective = total
        if load:
            weight = weight_a_token * jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
            balance, z = balance_loss(load), z_loss(load)
            objective = objective + weight * (stage.router_balance * balance + stage.router_z * z)
            sums |= {"experts": load["choices"], "router_balance": weight * balance, "router_z": weight * z}
        return objective, sums

    return summed


def make_gradients(parts: ModelParts, stage: StageConfig, classes: int = 0):
    """Returns `gradients(params, frozen, batch) -> (loss, gradients, sums)` of a whole batch."""
    summed = _make_objective(parts, stage, classes)
    execution = make_execution(parts, stage)

    def one(params: Params, frozen: Params, batch: Batch, weight_a_token):
        objective = jax.value_and_grad(lambda p: summed(p | frozen, batch, weight_a_token), has_aux=True)
        (_, sums), gradients = objective(params)
        return gradients, sums

    def gradients_of(params: Params, frozen: Params, batch: Batch):
        batch = _weighed(batch, stage.loss)
        weight, weight_a_token = _positive(jnp.sum(batch.loss_weights)), _weight_a_token(batch)
        if stage.microbatches == 1:
            gradients, sums = one(params, frozen, batch, weight_a_token)
        else:
            parts_of_batch = microbatches(batch, stage.microbatches, execution)
            first = jax.tree.map(lambda x: x[0], parts_of_batch)
            shapes = jax.eval_shape(one, params, frozen, first, weight_a_token)
            begun = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

            def add(total, part):
                # Without the barrier libtpu 0.0.52 would move sums over devices out of this loop, and fails at those of
                # experts.
                found = jax.lax.optimization_barrier(one(params, frozen, part, weight_a_token))
                return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, found), None

            (gradients, sums), _ = jax.lax.scan(add, begun, parts_of_batch)
        gradients = {
            name: (value.astype(jnp.float32) / weight).astype(params[name].dtype) for name, value in gradients.items()
        }
        loss = sums.pop("total") / weight
        for name in ("router_balance", "router_z"):
            if name in sums:
                sums[name] = sums[name] / weight
        return loss, gradients, sums

    return gradients_of


def microbatches(batch: Batch, count: int, execution: Execution) -> Batch:
    """A batch in `count` parts, along a new leading axis of every leaf.

    Each device's rows and groups are divided, so that nothing changes its device: the parts are split as the whole.
    """
    devices = execution.split("batch")

    def divided(path, leaf):
        each = leaf.shape[0] // (devices * count)
        parts = leaf.reshape(devices, count, each, *leaf.shape[1:]).swapaxes(0, 1)
        parts = parts.reshape(count, devices * each, *leaf.shape[1:])
        return execution.constrain(parts, None, *leaf_axes(path), *(None,) * (leaf.ndim - 2))

    return jax.tree_util.tree_map_with_path(divided, batch)


def _weighed(batch: Batch, kind: str) -> Batch:
    return dataclasses.replace(batch, loss_weights=normalised_weights(batch, kind))


def _weight_a_token(batch: Batch):
    """The weight of the loss that a token of a batch has in the mean, padding left out: f32[]."""
    return jnp.sum(batch.loss_weights) / _positive(jnp.sum(batch.segment_ids > 0).astype(jnp.float32))


def _positive(weight):
    return jnp.where(weight > 0, weight, jnp.ones((), weight.dtype))


def _guarded(stage: StageConfig, guard, loss, norm):
    """Whether a step may change the weights, and the guard's state after it."""
    bounds = stage.guard
    healthy = jnp.isfinite(loss) & jnp.isfinite(norm)
    if bounds.max_loss:
        healthy &= loss <= bounds.max_loss
    if bounds.max_grad_norm:
        healthy &= norm <= bounds.max_grad_norm
    if bounds.spike:
        # The mean is worth something once it has seen some steps.
        healthy &= (guard.seen < bounds.spike_after) | (norm <= bounds.spike * guard.mean_norm)
    return healthy, guard.after(healthy, norm)


def _moved(weight, update, rate):
    """Adds in f32 and rounds once, so that a bf16 weight loses no more than it must."""
    return (weight.astype(jnp.float32) + rate * update.astype(jnp.float32)).astype(weight.dtype)
