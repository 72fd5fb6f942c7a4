"""Update rules: AdamW, and Muon with AdamW beside it; learning rates of the model's parts; schedules.

The rules here have a learning rate of 1 inside, times the factor of the weight's part; `train.step` multiplies their
updates by the schedule's value. So the schedule belongs to the stage, not to the optimizer's state, and a carried state
brings no old schedule with it.
"""

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.config import PARTS, OptimizerConfig, TrainConfig
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
    """The update rule for the weights that learn, at learning rate 1 times the factor of each weight's part.

    Weight decay touches matrices and tables only. Under "muon" what AdamW updates has
    `adam_learning_rate / learning_rate` in place of 1, so that one schedule serves both. The factors of `config.rates`
    multiply whole updates, decay included.

    Raises:
      ConfigError: a factor for a part of which nothing learns.
    """
    clip = _clipping(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, _rule(config, weights), _times(_factors(config, weights)))


def global_norm(gradients: Mapping[str, jax.Array]) -> jax.Array:
    """The norm of all gradients together, f32[]; added up in f32 whatever they are, since 16 bits lose small ones."""
    return optax.tree.norm({name: value.astype(jnp.float32) for name, value in gradients.items()})


def _clipping(bound: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by `global_norm`, so that it clips by what is told."""

    def update(updates, state, params=None):
        norm = global_norm(updates)

        def clipped(value):
            return jnp.where(norm < bound, value, (value / norm * bound).astype(value.dtype))

        return {name: clipped(value) for name, value in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rule(config: OptimizerConfig, weights: Mapping[str, WeightInfo]) -> optax.GradientTransformation:
    if config.name == "adamw":
        return _adamw(config, 1.0, weights)
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
    return _by_name({"muon": (matrices, dimensions), "adamw": (adamw, others)})


def _factors(config: OptimizerConfig, weights: Mapping[str, WeightInfo]) -> dict[str, float]:
    """The factor of each weight that has another than 1."""
    found: dict[str, float] = {}
    for part, factor in config.rates:
        names = [name for name in weights if name.split(".")[0] in PARTS[part]]
        if not names:
            raise ConfigError(
                f"optimizer.rates={config.rates} has a factor for {part!r}, of which nothing learns; leave it out, or "
                "let the stage's `trainable` pick some of its weights."
            )
        found |= dict.fromkeys(names, factor)
    return {name: factor for name, factor in found.items() if factor != 1}


def _times(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of some weights."""
    return optax.stateless(
        lambda updates, _: {
            name: value * factors[name] if name in factors else value for name, value in updates.items()
        }
    )


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
    """The schedule of a stage of `steps` steps: a function of the number of steps done in it, i32[] to f32[].

    "wsd" is the schedule of MiniCPM (Hu et al. 2024, arXiv:2404.06395), with the decays of Hägele et al. (2024,
    arXiv:2405.18392), who find 1 - sqrt(t) over the last 10 to 20 % of the steps as good as a cosine. A stage that is
    too short for warm-up and decay together has the warm-up whole and decays over what is left.
    """
    warm, peak = config.warmup_steps, config.learning_rate
    # Step 0 of a warm-up already moves: it has 1 / (warm + 1) of the peak.
    schedules, ends = [optax.linear_schedule(peak / (warm + 1), peak, max(warm, 1))], [warm]
    if config.schedule == "cosine":
        schedules.append(optax.cosine_decay_schedule(peak, max(steps - warm, 1), config.final_fraction))
    else:
        schedules.append(optax.constant_schedule(peak))
    if config.schedule == "wsd":
        begin = max(warm, steps - round(config.decay_fraction * steps))
        schedules.append(_decay(config, max(steps - begin, 1)))
        ends.append(begin)
    schedule = optax.join_schedules(schedules, ends)
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def _decay(config: OptimizerConfig, steps: int):
    """From the peak to its final fraction over `steps` steps."""

    def schedule(step):
        done = jnp.clip(step / steps, 0, 1)
        left = 1 - (jnp.sqrt(done) if config.decay_shape == "sqrt" else done)
        return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * left)

    return schedule


def optimizer_notes(config: TrainConfig) -> Iterator[str]:
    """What a run should say of its update rules, a line each: where weights do not move as the settings read."""
    if config.param_dtype == "bfloat16" and (not config.adapter.rank or config.adapter.modules_to_save):
        what, instead = "the weights", "or adapters (adapter.rank)"
        if config.adapter.rank:
            what, instead = "the modules of adapter.modules_to_save", "or leave them out"
        rates = sorted({stage.optimizer.learning_rate for stage in config.stages})
        yield (
            f"param_dtype=bfloat16: {what} learn in 16 bits, which round away a change of less than about 1/256 of a "
            f"weight, so most changes at a learning rate of {' or '.join(f'{rate:g}' for rate in rates)}; take "
            f"param_dtype=float32 with dtype=bfloat16, {instead}"
        )
    for stage in config.stages:
        rule = stage.optimizer
        if rule.warmup_steps >= stage.steps:
            reached = float(learning_rate(rule, stage.steps)(stage.steps - 1))
            yield (
                f"{stage.name}: its {stage.steps} steps end within optimizer.warmup_steps={rule.warmup_steps}: the "
                f"learning rate comes to {reached:.3g} and never to its peak of {rule.learning_rate:g}; lower "
                "optimizer.warmup_steps with the steps"
            )
