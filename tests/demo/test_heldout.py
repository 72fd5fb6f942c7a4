"""The loss on held-out clips, and the models between the stages of a run."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.demo import heldout, records, warmup
from qwenvl_jax.demo.clips import make_clips
from qwenvl_jax.demo.vocabulary import write_processor_folder
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.train.config import DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig
from qwenvl_jax.train.loop import train


def tiny_config(processor: Processor) -> QwenVLConfig:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return QwenVLConfig(
        TextConfig(
            vocab_size=processor.tokenizer.get_vocab_size(),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            rope=RopeConfig(mrope_section=(2, 1, 1)),
        ),
        VisionConfig(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=2,
            out_hidden_size=16,
            deepstack_visual_indexes=(0,),
            num_position_embeddings=16,
        ),
        **{name: getattr(processor, name) for name in names},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(write_processor_folder(folder / "processor"))


@pytest.mark.slow
def test_the_held_out_loss_is_that_of_the_answers(folder, processor):
    batch = heldout.held_out_batch(processor, make_clips(folder, "validation", 2, 0))
    model = QwenVL(tiny_config(processor), rngs=nnx.Rngs(0))
    graph, weights = nnx.split(model)
    likelihoods = np.asarray(jax.jit(lambda weights: jax.nn.log_softmax(nnx.merge(graph, weights)(batch)))(weights))
    picked = np.take_along_axis(likelihoods, batch.targets[..., None], axis=-1)[..., 0]
    expected = -(picked * batch.loss_weights).sum() / batch.loss_weights.sum()
    assert heldout.held_out_loss(model, batch) == pytest.approx(expected, rel=1e-5)
    answers = sum(len(clip.events) for _, clip in make_clips(folder, "validation", 2, 0))
    # Three keys, two words of the name, two times, the closing brace, and the end of the turn with its line break.
    assert batch.tokens.shape[0] == 2 and batch.loss_weights.sum() == 10 * answers


@pytest.mark.slow
def test_the_model_at_the_end_of_each_stage_is_found_again(folder, processor, optax_promotes):
    texts = [(str(i), warmup.text_conversation(0, i)) for i in range(8)]
    data = DataConfig(source=str(records.write_records(folder / "data" / "text.jsonl", texts)), threads=0)
    shape, optimizer = BatchShape(rows=2, length=448), OptimizerConfig(learning_rate=1e-2)
    stages = tuple(StageConfig(name, 2, data, shape, optimizer) for name in ("first", "second"))
    config = TrainConfig(
        tiny_config(processor),
        stages,
        processor=str(folder / "processor"),
        checkpoint_every=100,
        keep_checkpoints=3,
        mesh=MeshConfig(fsdp=1),
    )
    result = train(config, folder / "run")
    models = [jax.tree.leaves(nnx.state(m)) for m in heldout.models_between_stages(config, folder / "run")]
    assert len(models) == 3
    for before, after in itertools.pairwise(models):
        assert any(np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-4 for a, b in zip(before, after, strict=True))
    written = jax.tree.leaves(nnx.state(QwenVL.from_pretrained(result.model, dtype="float32")))
    for a, b in zip(models[-1], written, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    (folder / "run" / "checkpoints" / "2").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint was kept there"):
        list(heldout.models_between_stages(config, folder / "run"))
