"""What is frozen costs nothing: exact memory of the compiled step's arguments, and no FLOPs of a backward pass."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.train.config import OptimizerConfig, StageConfig
from qwenvl_jax.train.optimizer import make_optimizer
from qwenvl_jax.train.recipes import s0, sft
from qwenvl_jax.train.state import GuardState, ModelParts, TrainState
from qwenvl_jax.train.step import make_execution, make_gradients, make_step
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("promotion_as_usual")]

TRAINABLE = {"all": "all", "tower frozen": sft().trainable, "mergers": s0().trainable}
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def parts_and_batch(tmp_path_factory):
    """A model, and a batch (shapes alone) of text around a picture."""
    folder = tmp_path_factory.mktemp("processor")
    tiny_processor_folder(folder)
    processor = Processor.from_pretrained(folder)
    # Wide enough that products outweigh all else.
    shape = tiny_model(processor)
    vision = dataclasses.replace(shape.vision, hidden_size=64, intermediate_size=256, out_hidden_size=64)
    text = dataclasses.replace(shape.text, hidden_size=64, intermediate_size=256)
    shape = dataclasses.replace(shape, text=text, vision=vision)
    parts = ModelParts(shape, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    picture = {"type": "image", "image": np.zeros((256, 256, 3), np.uint8)}
    content = [picture, {"type": "text", "text": "describe the image"}]
    batch = processor([[{"role": "user", "content": content}, {"role": "assistant", "content": "a red square"}]])
    return parts, jax.eval_shape(lambda batch: batch, batch)


def abstract(parts: ModelParts, names) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(parts.weights[name].shape, parts.weights[name].dtype) for name in names}


def size(names, parts: ModelParts) -> int:
    """Weights, as a number of elements."""
    return sum(math.prod(parts.weights[name].shape) for name in names)


@pytest.fixture(scope="module")
def compiled(parts_and_batch):
    """The compiled step with each choice of what learns; layers written out, since a loop's body is counted once."""
    parts, batch = parts_and_batch

    def step_of(trainable: str):
        stage = StageConfig("s", 4, trainable=trainable, optimizer=OptimizerConfig(), unroll=True)
        names = parts.select(trainable)
        optimizer = make_optimizer(stage.optimizer, {name: parts.weights[name] for name in names})
        learning = abstract(parts, names)
        frozen = abstract(parts, set(parts.names) - set(names))
        assert set(jax.eval_shape(make_gradients(parts, stage), learning, frozen, batch)[1]) == set(names)
        opt_state = jax.eval_shape(optimizer.init, learning)
        scalar, key = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
        state = TrainState(scalar, learning, opt_state, key, jax.eval_shape(GuardState.begun))
        step = jax.jit(make_step(parts, stage, optimizer), donate_argnums=0)
        return step.lower(state, frozen, batch).compile(compiler_options=UNOPTIMIZED)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return {name: step_of(trainable) for name, trainable in TRAINABLE.items()}


def test_memory_holds_the_weights_once_and_two_moments_of_what_learns(compiled, parts_and_batch):
    parts, _ = parts_and_batch
    beside = {}
    for name, trainable in TRAINABLE.items():
        moments = 2 * 4 * size(parts.select(trainable), parts)
        weights = 4 * size(parts.names, parts)
        beside[name] = compiled[name].memory_analysis().argument_size_in_bytes - weights - moments
    # What else goes in (the batch, counters) is the same whatever learns, to the byte.
    assert len(set(beside.values())) == 1, beside
    assert 0 < beside["all"] < 500_000
    temporaries = {name: step.memory_analysis().temp_size_in_bytes for name, step in compiled.items()}
    assert temporaries["mergers"] < temporaries["all"] and temporaries["tower frozen"] < temporaries["all"]


def test_a_frozen_tower_has_no_backward_pass(compiled, parts_and_batch):
    """A layer's backward pass is twice its forward pass, half of it for the gradients of weights.

    Freezing the tower saves both halves; its first layer has the second alone, since nobody asks for the gradient of
    pixels. Freezing the decoder too saves the half of the decoder's that is not on the way to the mergers.
    """
    parts, batch = parts_and_batch
    execution = make_execution(parts, StageConfig("s", 1, unroll=True))

    def flops(function, *arguments) -> float:
        return jax.jit(function).lower(*arguments).compile(compiler_options=UNOPTIMIZED).cost_analysis()["flops"]

    weights = abstract(parts, parts.names)
    (rows,) = batch.vision
    tower = flops(lambda params, rows: parts.merge(params).vision(rows, "float32", execution), weights, rows)
    first = 2 * math.prod(rows.patches.shape) * parts.config.vision.hidden_size
    text = dataclasses.replace(batch, vision=())
    decoder = flops(lambda params, batch: parts.merge(params).hidden(batch, execution), weights, text)
    step = {name: one.cost_analysis()["flops"] for name, one in compiled.items()}
    assert step["all"] - step["tower frozen"] == pytest.approx(2 * tower - first, rel=0.1)
    head = 2 * math.prod(batch.tokens.shape) * math.prod(parts.weights["text.embed.table"].shape)
    assert step["tower frozen"] - step["mergers"] == pytest.approx(decoder + head, rel=0.15)
