"""The one split of a model into plain trees, and what a training step carries.

From here on weights are a flat dictionary, dotted name to array, and everything is a pure function of it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import DEFAULT_RULES, Rules, param_shardings

Params = dict[str, jax.Array]

# Names that `StageConfig.trainable` may use in place of a regular expression.
TRAINABLE = {"all": "", "mergers": r"^(merger|deepstack)\."}


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """A weight without its values: shape, dtype, logical axes, number of input axes (0 if it is no projection)."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    inputs: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the guard of a stage remembers of its steps.

    Attributes:
      mean_norm: f32[], running mean of the gradient's norm over the steps that were taken.
      seen: i32[], how many those are.
      skipped: i32[], steps that were left out.
    """

    mean_norm: jax.Array
    seen: jax.Array
    skipped: jax.Array

    @classmethod
    def begun(cls) -> "GuardState":
        """Before the first step."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def after(self, healthy, norm) -> "GuardState":
        """After a step with this norm, which was taken if `healthy`."""
        # A mean of all at first, then mostly of the last hundred.
        share = jnp.float32(1) / (jnp.minimum(self.seen, 99) + 1).astype(jnp.float32)
        mean = self.mean_norm + share * (norm - self.mean_norm)
        one = healthy.astype(jnp.int32)
        return GuardState(jnp.where(healthy, mean, self.mean_norm), self.seen + one, self.skipped + 1 - one)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step takes and gives, donated.

    Attributes:
      step: i32[], steps done in the stage.
      params: the weights that learn.
      opt_state: the optimizer's.
      rng: u32[2], the run's random key, advanced by every step for whatever draws in it.
      guard: what decides on spikes.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    rng: jax.Array
    guard: GuardState


class ModelParts:
    """A model as its structure and its weights by name; the only place where it is taken apart and put together.

    Args:
      config: the shape.
      dtype, param_dtype: of activations and weights.
      mesh, rules: where weights live; see `qwenvl_jax.parallel.rules`.
      change: makes of the abstract model the one whose weights are meant; see `qwenvl_jax.train.adapters`.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        dtype,
        param_dtype,
        mesh,
        rules: Rules = DEFAULT_RULES,
        change: Callable[[QwenVL], QwenVL] = lambda model: model,
    ):
        self.config, self.mesh, self.rules = config, mesh, rules
        self._make = lambda key: QwenVL(config, rngs=nnx.Rngs(params=key), dtype=dtype, param_dtype=param_dtype)
        self._graph, template = nnx.split(change(nnx.eval_shape(lambda: self._make(jax.random.key(0)))))
        leaves, self._tree = jax.tree.flatten(template)
        variables = nnx.to_flat_state(template)
        self.names = tuple(".".join(str(part) for part in path) for path, _ in variables)
        assert len(leaves) == len(self.names), "each variable of the model is one array"
        self.weights = {
            name: WeightInfo(
                leaf.shape, leaf.dtype, tuple(variable.get_metadata("axes")), variable.get_metadata().get("inputs", 0)
            )
            for name, leaf, (_, variable) in zip(self.names, leaves, variables, strict=True)
        }
        shardings = jax.tree.leaves(param_shardings(template, mesh, rules))
        self.shardings = dict(zip(self.names, shardings, strict=True))

    def random(self, seed: int) -> Params:
        """Weights drawn from `seed`, made where they live."""

        def make(key):
            return dict(zip(self.names, jax.tree.leaves(nnx.state(self._make(key))), strict=True))

        # Compiled once and run once: optimizing this program takes far longer than running it.
        unoptimized = {"xla_backend_optimization_level": 0}
        return jax.jit(make, out_shardings=self.shardings, compiler_options=unoptimized)(jax.random.key(seed))

    def split(self, model: QwenVL) -> Params:
        """The weights of a model of this shape, by name, put where they live.

        Raises:
          CheckpointError: a model of another shape.
        """
        leaves = jax.tree.leaves(nnx.state(model))
        for name, leaf in zip(self.names, leaves, strict=False):
            if leaf.shape != self.weights[name].shape:
                raise CheckpointError(
                    f"{name} of the initial weights has shape {leaf.shape}, but the run's model has "
                    f"{self.weights[name].shape}; give weights of a model of the same shape."
                )
        if len(leaves) != len(self.names):
            raise CheckpointError("the initial weights are those of another model; give weights of the same shape.")
        params = dict(zip(self.names, leaves, strict=True))
        return {
            name: jax.device_put(leaf.astype(self.weights[name].dtype), self.shardings[name])
            for name, leaf in params.items()
        }

    def merge(self, params: Mapping[str, jax.Array]) -> QwenVL:
        """The model with these weights, all of them."""
        model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, [params[name] for name in self.names]))
        model.execution = Execution(self.mesh, self.rules)
        return model

    def merged(self, params: Mapping[str, jax.Array]) -> QwenVL:
        """The model as it is exported."""
        return self.merge(params)

    def save_adapter(self, params: Mapping[str, jax.Array], folder: Any, base: str | None) -> None:
        """Writes what was learnt apart from the model into a run's folder: nothing."""

    def stored(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Of the weights that do not learn in a stage, those that a checkpoint has to hold."""
        return dict(frozen)

    def origin(self, frozen: Params) -> dict[str, Any]:
        """What a checkpoint says of the others, in JSON values, so that they are known when they are made again."""
        return {}

    def made_again(self, initial: Callable[[], Params], origin: Mapping[str, Any]) -> Params:
        """The weights that a checkpoint does not hold; `initial` makes all those that the run began with."""
        return {}

    def select(self, trainable: str) -> tuple[str, ...]:
        """Names of the weights that `trainable` picks: "all", "mergers", or a regular expression found in the name.

        Raises:
          ConfigError: it picks none, or is no regular expression.
        """
        try:
            pattern = re.compile(TRAINABLE.get(trainable, trainable))
        except re.error as error:
            raise ConfigError(f"trainable={trainable!r} is no regular expression ({error}); correct it.") from error
        names = tuple(name for name in self.names if pattern.search(name))
        if not names:
            raise ConfigError(
                f"trainable={trainable!r} picks no weight; names look like {self.names[0]} and {self.names[-1]}."
            )
        return names
