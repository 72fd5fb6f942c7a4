"""Models whose sizes every mesh divides, and a batch of everything: packed rows, pictures, text alone, padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwenvl_jax.batch import Batch
from qwenvl_jax.config import MoeConfig, QwenVLConfig, RopeConfig
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import shard_batch
from qwenvl_jax.parallel.rules import make_rules
from qwenvl_jax.train.config import OptimizerConfig, StageConfig
from qwenvl_jax.train.state import GuardState, ModelParts, TrainState
from qwenvl_jax.train.step import make_step
from tests.checkpoint.shape import GENERATIONS

ROWS, LENGTH, VISION = 8, 64, ((4, 16),)
UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # programs that run once


def even_config(generation: str) -> QwenVLConfig:
    """A tiny model of a generation with sizes of many divisors."""
    config = GENERATIONS[generation]
    rope = dataclasses.replace(config.text.rope, mrope_section=(4, 2, 2))
    text = dataclasses.replace(
        config.text,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope=RopeConfig(**{field.name: getattr(rope, field.name) for field in dataclasses.fields(rope)}),
        moe=config.text.moe and MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
    )
    vision = dataclasses.replace(
        config.vision, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=text.hidden_size
    )
    return dataclasses.replace(config, text=text, vision=vision)


def everything(
    config: QwenVLConfig, *, rows: int = ROWS, groups: int = ROWS, length: int = LENGTH, vision_shape=VISION
) -> Batch:
    """Rows of two or three samples of different lengths; most show a picture of a size of its own, one shows none."""
    rng, vision = np.random.default_rng(0), config.vision
    unit = vision.spatial_merge_size**2

    def sample(n, grid=None):
        tokens = rng.integers(0, 60, n, dtype=np.int32)
        positions = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
        positions[:, 1:] += rng.integers(0, 3, (n, 2), dtype=np.int32)
        weights = (rng.random(n) < 0.7).astype(np.float32)
        index, media = np.full(n, -1, np.int32), ()
        if grid:
            count = grid[0] * grid[1] * grid[2]
            index[2 : 2 + count // unit] = np.arange(count // unit)
            patches = rng.integers(0, 256, (count, vision.patch_dim), dtype=np.uint8)
            media = (Media("image", patches, grid),)
        return Sample(tokens, positions, np.roll(tokens, -1), weights, index, media)

    made = [
        [sample(17 + r % 5, (1, 2, 2 + 2 * (r % 3))), sample(9 + r % 7, (1, 4, 4)), sample(5 + r % 3)]
        if r % 4 != 2
        else [sample(30 + r), sample(11)]
        for r in range(rows)
    ]
    table = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(3, 0)
    return collate(
        made,
        length=length,
        pixel_table=table,
        groups=groups,
        vision_shape=vision_shape,
        pad_token_id=0,
        merge_size=vision.spatial_merge_size,
        patch_dim=vision.patch_dim,
        window=vision.window_cells,
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step makes, as NumPy arrays by name."""

    loss: float
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]


def parts_on(
    config: QwenVLConfig, rules: str = "fsdp_tensor", override=(), *, dtype="float32", devices=None, **sizes: int
) -> ModelParts:
    """The model on a mesh of these sizes, of the first devices; its activations in `dtype`."""
    count = int(np.prod(list(sizes.values()) or [1]))
    mesh = make_mesh((devices or jax.devices())[:count], **(sizes or {"data": 1}))
    return ModelParts(config, dtype=dtype, param_dtype="float32", mesh=mesh, rules=make_rules(rules, override))


@functools.cache
def drawn(config: QwenVLConfig) -> dict[str, np.ndarray]:
    """Random weights, drawn on one device."""
    single = ModelParts(config, dtype="float32", param_dtype="float32", mesh=make_mesh(jax.devices()[:1], data=1))
    return {name: np.asarray(value) for name, value in single.random(1).items()}


def outcome(parts: ModelParts, batch: Batch, **settings) -> Outcome:
    """The gradients of a batch, and the weights after a step of SGD at rate 1."""
    optimizer = OptimizerConfig(learning_rate=1.0, schedule="constant", clip_norm=0.0)
    stage = StageConfig(name="s", steps=1, loss="sqrt", loss_chunk=24, optimizer=optimizer, **settings)
    params = jax.device_put(drawn(parts.config), parts.shardings)
    placed = shard_batch(batch, parts.mesh, parts.rules)
    # SGD, whose state is the gradients that it was given; before the first step it is anything of their shapes.
    rule = optax.GradientTransformation(lambda params: params, lambda g, _, __: (jax.tree.map(jnp.negative, g), g))
    state = TrainState(
        jnp.zeros((), jnp.int32), params, rule.init(params), jnp.zeros(2, jnp.uint32), GuardState.begun()
    )
    after, output = jax.jit(make_step(parts, stage, rule), compiler_options=UNOPTIMIZED)(state, {}, placed)
    arrays = jax.tree.map(np.asarray, (after.opt_state, after.params, output.sums))
    return Outcome(float(output.loss), *arrays)


def assert_same(got: Outcome, wanted: Outcome) -> None:
    """Loss to 1e-5 of itself; gradients and weights after the step to 1e-5 of the largest of their tensor."""
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-5)
    for kind in ("gradients", "params", "sums"):
        ours, theirs = getattr(got, kind), getattr(wanted, kind)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            np.testing.assert_allclose(
                ours[name], value, rtol=0, atol=1e-5 * np.abs(value).max() + 1e-12, err_msg=f"{kind} {name}"
            )
