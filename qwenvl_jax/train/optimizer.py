"""Update rules: AdamW, and Muon with AdamW beside it.

The rules here have a learning rate of 1 inside; `train.step` multiplies their updates by the schedule's value. So the
schedule belongs to the stage, not to the optimizer's state, and a carried state brings no old schedule with it.
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from qwenvl_jax.train.config import OptimizerConfig
from qwenvl_jax.train.state import WeightInfo

# Axes along which a weight is many matrices: layers of a stack, experts of a layer, and what is joined in one kernel
# (queries, keys and values; gate and up).
_BATCH_AXES = frozenset({"layers", "experts", "qkv", "gate_up"})
# Rows of these are looked up or scored one by one: no matrix in the sense of Muon.
_TABLE_AXES = frozenset({"vocab", "position"})


def muon_dimensions(info: WeightInfo) -> MuonDimensionNumbers | None:
    """The axes that Muon takes as rows and as columns of a weight's matrices; None for what AdamW updates.

    A stacked weight [Y, inputs..., outputs...] is Y matrices, each orthogonalised on its own.
    """
    if not info.inputs or _TABLE_AXES & set(info.axes):
        return None
    start = int(info.axes[0] == "layers")
    numbered = list(enumerate(info.axes))[start:]
    reduction = tuple(i for i, axis in numbered[: info.inputs] if axis not in _BATCH_AXES)
    output = tuple(i for i, axis in numbered[info.inputs :] if axis not in _BATCH_AXES)
    return MuonDimensionNumbers(reduction, output)


def make_optimizer(config: OptimizerConfig, weights: Mapping[str, WeightInfo]) -> optax.GradientTransformation:
    """The update rule for the weights that learn, at learning rate 1.

    Weight decay touches matrices and tables only. Under "muon" what AdamW updates has
    `adam_learning_rate / learning_rate` in place of 1, so that one schedule serves both.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, _adamw(config, 1.0, weights))
    dimensions = {name: muon_dimensions(info) for name, info in weights.items()}
    dimensions = {name: numbers for name, numbers in dimensions.items() if numbers is not None}
    matrices = muon(
        learning_rate=1.0,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimensions,
    )
    others = {name: info for name, info in weights.items() if name not in dimensions}
    # Muon of optax would take the others too, but with Nesterov's momentum and with decay of norms and biases.
    adamw = _adamw(config, config.adam_learning_rate / config.learning_rate, others)
    return optax.chain(clip, _by_name({"muon": (matrices, dimensions), "adamw": (adamw, others)}))


def _adamw(config: OptimizerConfig, rate: float, weights: Mapping[str, WeightInfo]) -> optax.GradientTransformation:
    def is_decayed(name: str, info: WeightInfo) -> bool:
        return len(info.axes) - ("layers" in info.axes) > 1 and not name.endswith("bias")

    mask = {name: is_decayed(name, info) for name, info in weights.items()}
    return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask)


def _by_name(rules: Mapping[str, tuple[optax.GradientTransformation, Iterable[str]]]) -> optax.GradientTransformation:
    """One rule for some weights of a flat dictionary, another for others: label to (rule, names)."""

    def pick(tree, names):
        return {name: tree[name] for name in names}

    def init(params):
        return {label: rule.init(pick(params, names)) for label, (rule, names) in rules.items()}

    def update(updates, state, params):
        moved: dict = {}
        after: dict = {}
        for label, (rule, names) in rules.items():
            found, after[label] = rule.update(pick(updates, names), state[label], pick(params, names))
            moved |= found
        return moved, after

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimizerConfig, steps: int):
    """The schedule of a stage of `steps` steps: a function of the number of steps done in it, i32[] to f32[]."""
    warm = max(config.warmup_steps, 0)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - warm, 1), config.final_fraction)
    # Step 0 of a warm-up already moves: it has 1 / (warm + 1) of the peak.
    growth = optax.linear_schedule(config.learning_rate / (warm + 1), config.learning_rate, max(warm, 1))
    schedule = optax.join_schedules([growth, after], [warm])
    return lambda step: jnp.asarray(schedule(step), jnp.float32)
