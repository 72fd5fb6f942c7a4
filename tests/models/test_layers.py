"""How random weights begin."""

import math

import numpy as np
from flax import nnx

from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.models.layers import RESIDUAL_GAIN
from qwenvl_jax.models.qwenvl import QwenVL

CONFIG = QwenVLConfig(
    text=TextConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope=RopeConfig(mrope_section=(6, 5, 5)),
    ),
    vision=VisionConfig(
        depth=2, hidden_size=64, intermediate_size=160, num_heads=4, out_hidden_size=96, deepstack_visual_indexes=(0,)
    ),
    image_token_id=1,
    video_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
)


def test_what_adds_to_the_residual_stream_begins_small_and_the_rest_at_unit_scale():
    model = QwenVL(CONFIG, rngs=nnx.Rngs(0))
    text, tower = model.text.layers, model.vision.blocks
    expected = {
        "embedding": (model.text.embed.table, 1 / math.sqrt(96)),
        "q": (text.attn.q.kernel, 1 / math.sqrt(96)),
        "o": (text.attn.o.kernel, RESIDUAL_GAIN / math.sqrt(4 * 32)),
        "up": (text.mlp.up.kernel, 1 / math.sqrt(96)),
        "down": (text.mlp.down.kernel, RESIDUAL_GAIN / math.sqrt(160)),
        "tower's proj": (tower.attn.proj.kernel, RESIDUAL_GAIN / math.sqrt(64)),
        "tower's fc1": (tower.mlp.fc1.kernel, 1 / math.sqrt(64)),
        "tower's fc2": (tower.mlp.fc2.kernel, RESIDUAL_GAIN / math.sqrt(160)),
    }
    for name, (weight, deviation) in expected.items():
        assert np.isclose(np.std(np.asarray(weight[...])), deviation, rtol=0.05), name
