"""Every field of the model's configuration changes what comes out: a field that nothing reads fails here."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.checkpoint.hf_config import config_to_json
from qwenvl_jax.config import MoeConfig, QwenVLConfig, RopeConfig, TextConfig, VisionConfig, YarnConfig
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.models.pretrained import abstract
from qwenvl_jax.models.qwenvl import QwenVL
from tests.checkpoint.shape import TINY, TINY_MOE, YARN, random_model, with_yarn

# Fields that change the shape of some weight, and what to change them to.
SHAPES = {
    "text.vocab_size": 51,
    "text.hidden_size": 22,
    "text.intermediate_size": 30,
    "text.num_hidden_layers": 4,
    "text.num_attention_heads": 4,
    "text.num_key_value_heads": 3,
    "text.head_dim": 12,
    "text.tie_word_embeddings": True,
    "text.attention_bias": True,
    "text.qk_norm": False,
    "text.moe": MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12),
    "vision.depth": 5,
    "vision.hidden_size": 48,
    "vision.intermediate_size": 20,
    "vision.num_heads": 3,
    "vision.out_hidden_size": 22,
    "vision.deepstack_visual_indexes": (1,),
    "vision.num_position_embeddings": 16,
    "vision.patch_size": 5,
    "vision.temporal_patch_size": 1,
    "vision.spatial_merge_size": 1,
    "vision.in_channels": 1,
    "vision.norm": "rms_norm",
    "vision.gated_mlp": True,
    "vision.patch_bias": False,
}
# Fields of the experts, on a model that has some.
MOE_SHAPES = {"text.moe.num_experts": 6, "text.moe.moe_intermediate_size": 16}
# Fields that change the logits of the same weights.
VALUES = {
    "text.rms_norm_eps": 1e-2,
    "text.rope.theta": 10.0,
    "text.rope.mrope_section": (4, 0, 1),
    "text.rope.mrope_interleaved": False,
    "vision.deepstack_visual_indexes": (0, 3),
    "vision.hidden_act": "silu",
    "text.rope.yarn": YARN,
    "vision.window_size": 16,
}
# Fields of YaRN and of experts, and of windows: they change the logits of a model that has these.
WITH = {
    "text.rope.yarn.factor": (with_yarn(TINY), 8.0),
    "text.rope.yarn.original_max_position_embeddings": (with_yarn(TINY), 16),
    "text.rope.yarn.beta_fast": (with_yarn(TINY), 3.0),
    "text.rope.yarn.beta_slow": (with_yarn(TINY), 20.0),
    "text.rope.yarn.truncate": (with_yarn(TINY), False),
    "text.rope.yarn.attention_factor": (with_yarn(TINY), 1.5),
    "text.rope.yarn.mscale": (with_yarn(TINY, dataclasses.replace(YARN, mscale_all_dim=1.0)), 3.0),
    "text.rope.yarn.mscale_all_dim": (with_yarn(TINY, dataclasses.replace(YARN, mscale=1.0)), 3.0),
    "text.moe.num_experts_per_tok": (TINY_MOE, 3),
    "vision.fullatt_block_indexes": (
        dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, window_size=16)),
        (0, 2),
    ),
}
# Fields whose effect is shown by these tests.
ELSEWHERE = {
    "image_token_id": "test_token_ids",
    "video_token_id": "test_token_ids",
    "vision_start_token_id": "test_token_ids",
    "vision_end_token_id": "test_token_ids",
    "model_type": "test_model_type",
    "eos_token_ids": "tests/test_generate.py: test_answers_end",
    "tokens_per_second": "tests/data: positions of Qwen2.5-VL",
    "text.max_position_embeddings": "tests/test_generate.py: test_positions_beyond_training_are_told",
}


def changed(config, field: str, value):
    """The configuration with one field, named by its path, set to another value."""
    name, _, rest = field.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def test_every_field_is_here():
    fields = {f.name for f in dataclasses.fields(QwenVLConfig)} - {"text", "vision"}
    fields |= {f"text.{f.name}" for f in dataclasses.fields(TextConfig) if f.name != "rope"}
    fields |= {f"text.rope.{f.name}" for f in dataclasses.fields(RopeConfig)}
    fields |= {f"text.rope.yarn.{f.name}" for f in dataclasses.fields(YarnConfig)}
    fields |= {f"text.moe.{f.name}" for f in dataclasses.fields(MoeConfig)}
    fields |= {f"vision.{f.name}" for f in dataclasses.fields(VisionConfig)}
    assert fields == {*SHAPES, *MOE_SHAPES, *VALUES, *WITH, *ELSEWHERE}


def shapes(config):
    """Of every weight, by its path."""
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0)))
    return {key: v.get_value().shape for key, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("field", MOE_SHAPES)
def test_shapes_of_experts(field):
    assert shapes(changed(TINY_MOE, field, MOE_SHAPES[field])) != shapes(TINY_MOE)


@pytest.mark.parametrize("field", SHAPES)
def test_shapes(field):
    config = TINY
    if field in ("text.hidden_size", "vision.out_hidden_size"):  # must be equal, so each is moved against the other
        with pytest.raises(Exception, match="must equal"):
            changed(TINY, field, SHAPES[field])
        vision = dataclasses.replace(TINY.vision, out_hidden_size=22)
        config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, hidden_size=22), vision=vision)
    elif field == "text.head_dim":
        rope = dataclasses.replace(TINY.text.rope, mrope_section=(2, 2, 2))
        config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, head_dim=12, rope=rope))
    else:
        config = changed(TINY, field, SHAPES[field])
    assert shapes(config) != shapes(TINY)


@pytest.fixture(scope="module")
def batch():
    """Text around one image of 4 x 6 patches."""
    image, text = TINY.image_token_id, [3, 4, 5, TINY.vision_start_token_id]
    tokens = np.asarray([*text, *[image] * 6, TINY.vision_end_token_id, 7, 8], np.int32)
    grid = [(4, 4 + row, 4 + column) for row in range(2) for column in range(3)]
    positions = np.asarray([(i,) * 3 for i in range(4)] + grid + [(i,) * 3 for i in (7, 8, 9)], np.int32)
    patches = np.random.default_rng(0).integers(0, 256, (24, TINY.vision.patch_dim), dtype=np.uint8)
    sample = Sample(
        tokens=tokens,
        positions=positions,
        targets=tokens,
        loss_weights=np.ones(len(tokens), np.float32),
        vision_index=np.where(tokens == image, np.cumsum(tokens == image) - 1, -1).astype(np.int32),
        media=(Media("image", patches, (1, 4, 6)),),
    )
    table = np.broadcast_to(np.linspace(-1, 1, 256, dtype=np.float32), (3, 256))
    return collate([[sample]], pixel_table=table, pad_token_id=0)


def logits(config, batch, weights_of=TINY):
    """Of the weights of one configuration, under another."""
    if config.vision.window_size:
        # Windows of 2 x 2 merged tokens: the image's first two columns, and its third.
        rows = batch.vision[0]
        windows = np.where(rows.segment_ids > 0, 1 + (rows.coords[..., 1] >= 4), 0).astype(np.int32)
        batch = dataclasses.replace(batch, vision=(dataclasses.replace(rows, windows=windows),))
    graph, _ = abstract(config, jnp.float32)
    _, weights = nnx.split(random_model(weights_of))
    return np.asarray(jax.jit(lambda weights: nnx.merge(graph, weights)(batch))(weights))


@pytest.fixture(scope="module")
def before(batch):
    return logits(TINY, batch)


@pytest.mark.parametrize("field", VALUES)
def test_values(field, batch, before):
    assert np.abs(logits(changed(TINY, field, VALUES[field]), batch) - before).max() > 1e-2


@pytest.mark.parametrize("field", WITH)
def test_values_of_models_that_have_them(field, batch):
    config, value = WITH[field]
    difference = np.abs(logits(changed(config, field, value), batch, config) - logits(config, batch, config)).max()
    assert difference > 1e-2


@pytest.mark.parametrize("key", [key for key, test in ELSEWHERE.items() if test == "test_token_ids"])
def test_token_ids(key, tiny_checkpoint, tmp_path):
    """They must be the tokenizer's, so a model never meets the tokens of another."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: config[key] - 20}))
    with pytest.raises(CheckpointError, match=key):
        Processor.from_pretrained(folder)


def test_model_type():
    assert config_to_json(TINY, "float32")["model_type"] == TINY.model_type == "qwen3_vl"
    with pytest.raises(CheckpointError, match="'qwen9_vl' cannot be written"):
        config_to_json(changed(TINY, "model_type", "qwen9_vl"), "float32")
