"""Every generation learns: two steps lower the loss of their batch, and only what may move does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.checkpoint.hf_config import config_to_json
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.train.config import OptimizerConfig, StageConfig
from qwenvl_jax.train.optimizer import make_optimizer
from qwenvl_jax.train.state import GuardState, ModelParts, TrainState
from qwenvl_jax.train.step import make_loss, make_step
from tests.checkpoint.shape import GENERATIONS
from tests.support import MODEL_TYPES, generations
from tests.tiny import tiny_processor_folder

IMAGE = np.random.default_rng(3).integers(0, 256, (24, 40, 3), dtype=np.uint8)
CONVERSATIONS = [
    [
        {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a red square and a blue circle"},
    ],
    [{"role": "user", "content": "describe"}, {"role": "assistant", "content": "the disc moves to the right"}],
]

UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # programs that run twice


@pytest.fixture(scope="module", params=generations(MODEL_TYPES))
def learner(request, tmp_path_factory):
    """(parts, weights, batch) of a generation: an answer about an image, and one about nothing but text."""
    config, folder = GENERATIONS[request.param], tmp_path_factory.mktemp(request.param)
    ids = tiny_processor_folder(
        folder, model_type=request.param, patch_size=config.vision.patch_size, image_pixels=(64, 4096)
    )
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_size=ids["vocab_size"]),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    (folder / "config.json").write_text(json.dumps(config_to_json(config, "float32")))
    batch = Processor.from_pretrained(folder)(CONVERSATIONS)
    assert (batch.vision_index >= 0).any() and all((row > 0).sum() > 5 for row in batch.loss_weights)
    parts = ModelParts(config, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    return parts, parts.random(0), batch


@pytest.mark.support("trains")
@pytest.mark.parametrize("trainable", ["all", pytest.param("mergers", marks=pytest.mark.slow)])
def test_two_steps_lower_the_loss(learner, trainable, optax_promotes):
    parts, params, batch = learner
    optimizer_config = OptimizerConfig(learning_rate=3e-3, schedule="constant")
    stage = StageConfig(name="s", steps=2, trainable=trainable, optimizer=optimizer_config)
    names = parts.select(trainable)
    learning = {name: params[name] for name in names}
    frozen = {name: value for name, value in params.items() if name not in learning}
    optimizer = make_optimizer(stage.optimizer, {name: parts.weights[name] for name in names})
    state = TrainState(
        jnp.zeros((), jnp.int32), learning, optimizer.init(learning), jnp.zeros(2, jnp.uint32), GuardState.begun()
    )
    step, losses = jax.jit(make_step(parts, stage, optimizer), compiler_options=UNOPTIMIZED), []
    for _ in range(stage.steps):
        state, output = step(state, frozen, batch)
        losses.append(float(output.loss))
    loss = jax.jit(make_loss(parts, stage), compiler_options=UNOPTIMIZED)
    losses.append(float(loss(state.params | frozen, batch)))
    assert losses[2] < losses[1] < losses[0]
    assert set(state.params) == set(names)
    for name, value in state.params.items():
        assert np.isfinite(np.asarray(value)).all(), name
        assert not np.array_equal(value, params[name]), f"{name} did not move"
    if trainable == "mergers":
        assert {name.split(".")[0] for name in names} <= {"merger", "deepstack"}
        assert {name.split(".")[0] for name in frozen} == {"vision", "text"}
