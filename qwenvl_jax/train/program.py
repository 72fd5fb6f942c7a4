"""The program of a stage: its training step as it is jitted, and the state that the step carries.

The one place where a step meets `jax.jit`, so that a run, which calls it with arrays, and a plan, which compiles it
from shapes alone, have the same program.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.batch import Batch, VisionRows
from qwenvl_jax.checkpoint.store import abstract_like
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.parallel.placement import Execution, batch_sharding
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.optimizer import make_optimizer
from qwenvl_jax.train.state import GuardState, ModelParts, Params, TrainState
from qwenvl_jax.train.step import make_step


def trace_step(
    parts: ModelParts, stage: StageConfig, state: TrainState, frozen: Params, batch: Batch, *, classes: int = 0
) -> jax.stages.Traced:
    """The step of a stage, `step(state, frozen, batch) -> (state, StepOutput)`, traced; the state is donated.

    Args:
      state, frozen, batch: arrays, or `jax.ShapeDtypeStruct` with shardings; see `qwenvl_jax.train.step.make_step`.
      classes: of the samples, as there.
    """
    step = make_step(parts, stage, optimizer_of(parts, stage), classes)
    whole = NamedSharding(parts.mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(parts, state), whole))
    return jitted.trace(state, frozen, batch)


def optimizer_of(parts: ModelParts, stage: StageConfig) -> optax.GradientTransformation:
    """The update rule of what learns in a stage.

    Raises:
      ConfigError: nothing learns, or a learning rate is that of something that does not.
    """
    return make_optimizer(stage.optimizer, {name: parts.weights[name] for name in parts.select(stage.trainable)})


def begun_state(parts: ModelParts, stage: StageConfig, seed: int, learning: Params) -> TrainState:
    """The state at the first step of a stage, nothing carried; traceable.

    Args:
      learning: the weights that learn.
    """
    rng = jax.random.key_data(jax.random.key(seed))
    opt_state = optimizer_of(parts, stage).init(learning)
    return TrainState(jnp.zeros((), jnp.int32), learning, opt_state, rng, GuardState.begun())


def state_shardings(parts: ModelParts, state: TrainState) -> TrainState:
    """Where a state lives: what belongs to a weight (moments, say) as the weight, the rest everywhere."""
    whole = NamedSharding(parts.mesh, PartitionSpec())

    def one(path, leaf):
        name = getattr(path[-1], "key", None)
        if name not in parts.weights or leaf.shape != parts.weights[name].shape:
            return whole
        return parts.shardings[name]

    return jax.tree_util.tree_map_with_path(one, state)


def abstract_state(parts: ModelParts, stage: StageConfig, seed: int) -> tuple[TrainState, dict[str, Any]]:
    """The state of a stage and its frozen weights as shapes, dtypes and shardings."""
    weights = {
        name: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=parts.shardings[name])
        for name, info in parts.weights.items()
    }
    learning = {name: weights[name] for name in parts.select(stage.trainable)}
    state = jax.eval_shape(lambda learning: begun_state(parts, stage, seed, learning), learning)
    frozen = {name: weight for name, weight in weights.items() if name not in learning}
    return abstract_like(state, state_shardings(parts, state)), frozen


def abstract_batch(config: QwenVLConfig, shape: BatchShape, execution: Execution, *, classes: bool = True) -> Batch:
    """A batch of a stage as shapes, dtypes and shardings.

    Args:
      config: of the model.
      shape: with its vision rows chosen.
      classes: whether samples are told apart by class, as they are in a run.
    """
    B, T, G, Q = shape.rows, shape.length, shape.groups, shape.pool_taps
    vision = config.vision

    def i32(*sizes: int):
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    def f32(*sizes: int):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def vision_rows(R: int, L: int) -> VisionRows:
        patches: Any = jax.ShapeDtypeStruct((G, R, L, vision.patch_dim), jnp.uint8)
        return VisionRows(
            patches=patches,
            coords=i32(G, R, L, 2),
            sizes=i32(G, R, L, 2),
            segment_ids=i32(G, R, L),
            items=i32(G, R, L),
            pixel_table=f32(G, 3, 256),
            windows=i32(G, R, L) if vision.window_size else None,
        )

    batch = Batch(
        tokens=i32(B, T),
        positions=i32(B, T, 3),
        segment_ids=i32(B, T),
        targets=i32(B, T),
        loss_weights=f32(B, T),
        vision_index=i32(B, T),
        vision=tuple(vision_rows(*bucket) for bucket in shape.buckets),
        pool_index=i32(B, T, Q) if Q else None,
        pool_weights=f32(B, T, Q) if Q else None,
        classes=i32(B, T) if classes else None,
    )

    def placed(path, leaf):
        sharding = batch_sharding(path, execution.mesh, execution.rules)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, batch)
