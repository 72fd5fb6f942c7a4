"""The shape of a model, as nested frozen dataclasses. Every field changes what the model computes.

Names are those of the public `config.json` where one exists; `qwenvl_jax.checkpoint.hf` reads and writes that file.
"""

import dataclasses

from qwenvl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies of the decoder.

    Attributes:
      theta: base of the geometric series of frequencies.
      mrope_section: how many frequencies each of (time, height, width) turns; their sum is half a head.
      mrope_interleaved: True for THWTHW...TT (Qwen3-VL), False for T...TH...HW...W (Qwen2-VL, Qwen2.5-VL).
    """

    theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    mrope_interleaved: bool = True


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. `head_dim` is free of `hidden_size / num_attention_heads`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 262144
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; change one of them."
            )
        if sum(self.rope.mrope_section) != self.head_dim // 2:
            raise ConfigError(
                f"text.rope.mrope_section={self.rope.mrope_section} must sum to half of head_dim={self.head_dim}, "
                f"that is {self.head_dim // 2}; it sums to {sum(self.rope.mrope_section)}."
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its mergers.

    Attributes:
      num_position_embeddings: entries of the learned, square position table that is interpolated to each frame.
      out_hidden_size: width of the merged tokens, the decoder's `hidden_size`.
      deepstack_visual_indexes: tower layers (from 0) whose outputs go through a DeepStack merger and are added to the
        decoder's hidden states after its layers 0, 1, ...
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    num_position_embeddings: int = 2304
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"vision.hidden_size={self.hidden_size} must be a multiple of 4 * num_heads={4 * self.num_heads}: "
                "the 2-D rotary embedding turns a quarter of each head per axis and half."
            )
        bad = [i for i in self.deepstack_visual_indexes if not 0 <= i < self.depth]
        if bad:
            raise ConfigError(
                f"vision.deepstack_visual_indexes names layers {bad}, but the tower has depth={self.depth} "
                f"(layers 0 to {self.depth - 1})."
            )
        side = round(self.num_position_embeddings**0.5)
        if side * side != self.num_position_embeddings:
            raise ConfigError(
                f"vision.num_position_embeddings={self.num_position_embeddings} must be a square (a square table of "
                "positions); 2304 = 48 * 48 is the public one."
            )

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels * temporal patch * patch side squared."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A whole model: tower, decoder, and the token ids that mark vision in the text.

    Attributes:
      eos_token_ids: ids that end an answer, from generation_config.json; empty where it names none, and generation then
        stops at the tokenizer's.
    """

    text: TextConfig
    vision: VisionConfig
    model_type: str = "qwen3_vl"
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision.out_hidden_size={self.vision.out_hidden_size} must equal "
                f"text.hidden_size={self.text.hidden_size}: merged vision tokens take the place of word embeddings."
            )
        if len(self.vision.deepstack_visual_indexes) > self.text.num_hidden_layers:
            raise ConfigError(
                f"{len(self.vision.deepstack_visual_indexes)} DeepStack features need as many decoder layers, but "
                f"text.num_hidden_layers={self.text.num_hidden_layers}."
            )
