"""Shapes of tiny models of every generation, all of whose sizes differ, and random weights for them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.config import MoeConfig, QwenVLConfig, RopeConfig, TextConfig, VisionConfig, YarnConfig
from qwenvl_jax.models.pretrained import abstract
from qwenvl_jax.models.qwenvl import QwenVL

TINY = QwenVLConfig(
    text=TextConfig(
        vocab_size=50,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=12_345.0, mrope_section=(2, 2, 1)),
        max_position_embeddings=512,
    ),
    vision=VisionConfig(
        depth=4,
        hidden_size=24,
        intermediate_size=18,
        num_heads=2,
        out_hidden_size=20,
        deepstack_visual_indexes=(1, 3),
        num_position_embeddings=9,
        patch_size=4,
    ),
    image_token_id=41,
    video_token_id=42,
    vision_start_token_id=43,
    vision_end_token_id=44,
    eos_token_ids=(45, 46),
)
_OLDER_TEXT = dataclasses.replace(
    TINY.text,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope=RopeConfig(theta=12_345.0, mrope_section=(2, 2, 1), mrope_interleaved=False),
    attention_bias=True,
    qk_norm=False,
)
_OLDER_TOWER = dataclasses.replace(
    TINY.vision,
    intermediate_size=48,
    deepstack_visual_indexes=(),
    num_position_embeddings=0,
    patch_bias=False,
    hidden_act="quick_gelu",
)
TINY_QWEN2 = dataclasses.replace(TINY, model_type="qwen2_vl", text=_OLDER_TEXT, vision=_OLDER_TOWER)
TINY_QWEN2_5 = dataclasses.replace(
    TINY,
    model_type="qwen2_5_vl",
    tokens_per_second=2.0,
    text=dataclasses.replace(_OLDER_TEXT, tie_word_embeddings=True),
    vision=dataclasses.replace(
        _OLDER_TOWER,
        intermediate_size=18,
        hidden_act="silu",
        norm="rms_norm",
        gated_mlp=True,
        window_size=16,
        fullatt_block_indexes=(1, 3),
    ),
)
TINY_MOE = dataclasses.replace(
    TINY,
    model_type="qwen3_vl_moe",
    text=dataclasses.replace(TINY.text, moe=MoeConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=14)),
)
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=128)


def with_yarn(config: QwenVLConfig, yarn: YarnConfig = YARN) -> QwenVLConfig:
    """The same model with stretched frequencies."""
    rope = dataclasses.replace(config.text.rope, yarn=yarn)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, rope=rope))


# One of each generation, and one of each form of rotary positions with YaRN.
GENERATIONS = {
    "qwen2_vl": TINY_QWEN2,
    "qwen2_5_vl": TINY_QWEN2_5,
    "qwen3_vl": TINY,
    "qwen3_vl_moe": TINY_MOE,
    "qwen2_5_vl_yarn": with_yarn(TINY_QWEN2_5),
    "qwen3_vl_yarn": with_yarn(TINY),
}


def random_model(config: QwenVLConfig = TINY, dtype=jnp.float32, seed: int = 0) -> QwenVL:
    """A model whose every weight is random, biases and norms too."""
    rng = np.random.default_rng(seed)
    graph, state = abstract(config, dtype)

    def fill(_path, variable):
        value = rng.standard_normal(variable.get_value().shape, np.float32)
        return variable.replace(jnp.asarray(value, dtype))

    return nnx.merge(graph, nnx.map_state(fill, state))
