"""The one split of a model into plain trees, and what a training step carries.

From here on weights are a flat dictionary, dotted name to array, and everything is a pure function of it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models import pretrained
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


class Weights(Protocol):
    """The first weights of a run, each given once, so that no more of them need be held than the run keeps."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the weights, by name."""
        ...

    def read(self, name: str) -> jax.Array:
        """A whole weight."""
        ...

    def read_layer(self, name: str, layer: int) -> jax.Array:
        """One layer of a stacked weight; they are asked for in order."""
        ...


class HeldWeights:
    """Weights that are there already; each is let go once it was given."""

    def __init__(self, params: Mapping[str, jax.Array]):
        self._params = dict(params)
        self.shapes = {name: value.shape for name, value in params.items()}

    def read(self, name: str) -> jax.Array:
        """A whole weight."""
        return self._params.pop(name)

    def read_layer(self, name: str, layer: int) -> jax.Array:
        """One layer of a stacked weight, which goes with its last."""
        last = layer + 1 == self.shapes[name][0]
        return pretrained.layer_of(self._params.pop(name) if last else self._params[name], layer)


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
        return self.begun(self.drawn(seed))

    def drawn(self, seed: int) -> Weights:
        """Random first weights of the model, for `begun`."""

        def make(key):
            return dict(zip(self.names, jax.tree.leaves(nnx.state(self._make(key))), strict=True))

        # Compiled once and run once: optimizing this program takes far longer than running it.
        unoptimized = {"xla_backend_optimization_level": 0}
        make = jax.jit(make, out_shardings=self.shardings, compiler_options=unoptimized)
        return HeldWeights(make(jax.random.key(seed)))

    def split(self, model: QwenVL) -> Params:
        """The weights of a model of this shape, by name, put where they live.

        Raises:
          CheckpointError: a model of another shape.
        """
        variables = nnx.to_flat_state(nnx.state(model))
        return self.begun(HeldWeights({".".join(map(str, path)): variable.get_value() for path, variable in variables}))

    def begun(self, weights: Weights) -> Params:
        """The weights that a run begins with, put where they live; `weights` are those of the model, used up.

        Raises:
          CheckpointError: weights of another shape.
        """
        self.check_shapes(weights.shapes)
        return {name: self.placed(name, weights.read(name)) for name in self.names}

    def check_start(self) -> None:
        """Refuses, before any data is read, what a new run could not begin with.

        Raises:
          CheckpointError: an adapter to begin with that cannot be read or is of other modules.
        """

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses first weights that are not this model's.

        Raises:
          CheckpointError: names one whose shape differs.
        """
        for name in self.names:
            if name in shapes and shapes[name] != self.weights[name].shape:
                raise CheckpointError(
                    f"{name} of the initial weights has shape {shapes[name]}, but the run's model has "
                    f"{self.weights[name].shape}; give weights of a model of the same shape."
                )
        if set(shapes) != set(self.names):
            raise CheckpointError("the initial weights are those of another model; give weights of the same shape.")

    def placed(self, name: str, value: jax.Array) -> jax.Array:
        """A weight in its dtype, where it lives."""
        return jax.device_put(value.astype(self.weights[name].dtype), self.shardings[name])

    def merge(self, params: Mapping[str, jax.Array]) -> QwenVL:
        """The model with these weights, all of them."""
        model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, [params[name] for name in self.names]))
        model.execution = Execution(self.mesh, self.rules)
        return model

    def save(self, params: Mapping[str, jax.Array], out_dir: Path) -> None:
        """Writes the model in the public layout; all processes call it. See `qwenvl_jax.models.pretrained.save`.

        Raises:
          CheckpointError: see there.
        """
        exported = self.exported_weights()
        pretrained.write(
            self.config,
            out_dir,
            {name: info.dtype for name, info in exported.items()},
            lambda name, layer: self.exported(params, name, layer),
            spread=not all(value.is_fully_addressable for value in params.values()),
        )

    def exported(self, params: Mapping[str, jax.Array], name: str, layer: int | None) -> jax.Array:
        """A weight of the exported model, or one layer of it."""
        return params[name] if layer is None else pretrained.layer_of(params[name], layer)

    def exported_weights(self) -> Mapping[str, WeightInfo]:
        """Those of the model that is exported."""
        return self.weights

    def save_adapter(self, params: Mapping[str, jax.Array], folder: Any, base: str | None) -> None:
        """Writes what was learnt apart from the model into a run's folder: nothing."""

    def stored(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Of the weights that do not learn in a stage, those that a checkpoint has to hold."""
        return dict(frozen)

    def origin(self, frozen: Params) -> dict[str, Any]:
        """What a checkpoint says of the others, in JSON values, so that they are known when they are made again."""
        return {}

    def made_again(self, initial: Callable[[], Weights], origin: Mapping[str, Any]) -> Params:
        """The weights that a checkpoint does not hold; `initial` gives those that the run began with."""
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
