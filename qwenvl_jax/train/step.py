"""The training step: a pure loss over the weights by name, its gradient, and the update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qwenvl_jax.batch import Batch
from qwenvl_jax.ops.losses import chunked_cross_entropy
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.optimizer import learning_rate
from qwenvl_jax.train.state import ModelParts, Params, TrainState


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


def make_loss(parts: ModelParts, stage: StageConfig) -> Callable[[Params, Batch], jax.Array]:
    """Returns `loss(params, batch) -> f32[]`, pure; never holds [tokens, V] in f32."""

    def loss(params: Params, batch: Batch):
        model = parts.merge(params)
        hidden_BTH = model.hidden(batch, remat=stage.remat, unroll=stage.unroll)
        weights_BT = normalised_weights(batch, stage.loss)
        head_HV = model.text.head_weight()
        total = chunked_cross_entropy(hidden_BTH, head_HV, batch.targets, weights_BT, stage.loss_chunk)
        weight = jnp.sum(weights_BT)
        return total / jnp.where(weight > 0, weight, 1.0)

    return loss


def make_step(parts: ModelParts, stage: StageConfig, optimizer: optax.GradientTransformation):
    """Returns `step(state, frozen, batch) -> (state, loss f32[])`, to be compiled with the state donated.

    Frozen weights are an argument apart: no gradient is taken of them and the optimizer keeps nothing for them.
    """
    loss = make_loss(parts, stage)
    schedule = learning_rate(stage.optimizer, stage.steps)

    def step(state: TrainState, frozen: Params, batch: Batch):
        value, gradients = jax.value_and_grad(lambda params: loss(params | frozen, batch))(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = schedule(state.step)
        params = {name: _moved(value, updates[name], rate) for name, value in state.params.items()}
        rng = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step))
        return TrainState(state.step + 1, params, opt_state, rng), value

    return step


def _moved(weight, update, rate):
    """Adds in f32 and rounds once, so that a bf16 weight loses no more than it must."""
    return (weight.astype(jnp.float32) + rate * update.astype(jnp.float32)).astype(weight.dtype)
