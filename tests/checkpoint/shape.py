"""The shape of the tiny model of these tests, all of whose sizes differ, and random weights for it."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
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


def random_model(config: QwenVLConfig = TINY, dtype=jnp.float32, seed: int = 0) -> QwenVL:
    """A model whose every weight is random, biases and norms too."""
    rng = np.random.default_rng(seed)
    graph, state = abstract(config, dtype)

    def fill(_path, variable):
        value = rng.standard_normal(variable.get_value().shape, np.float32)
        return variable.replace(jnp.asarray(value, dtype))

    return nnx.merge(graph, nnx.map_state(fill, state))
