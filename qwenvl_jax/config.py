"""The shape of a model, as nested frozen dataclasses. Every field changes what the model computes.

Names are those of the public `config.json` where one exists; `qwenvl_jax.checkpoint.hf` reads and writes that file.
"""

import dataclasses
from typing import Literal

from qwenvl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN: frequencies stretched for contexts longer than those of training (arXiv 2309.00071, section 3).

    Attributes:
      factor: how many times longer the context is made; at least 1.
      original_max_position_embeddings: positions that the model was trained with.
      beta_fast, beta_slow: a frequency that turns at least `beta_fast` times within the original length stays as it is,
        one that turns at most `beta_slow` times is divided by `factor`; those between are blended.
      truncate: whether the bounds of the blend are rounded outwards to whole frequencies.
      attention_factor: multiplies cosines and sines; None follows from `factor`, and from the next two where given.
      mscale, mscale_all_dim: weights of log(factor) in the attention factor's numerator and denominator.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if not self.factor >= 1:
            raise ConfigError(f"text.rope.yarn.factor={self.factor} must be at least 1; it multiplies the context.")
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"text.rope.yarn.original_max_position_embeddings={self.original_max_position_embeddings} must be a "
                "number of positions; give the length that the model was trained with."
            )
        if not self.beta_fast >= self.beta_slow > 0:
            raise ConfigError(
                f"text.rope.yarn.beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}, and that "
                "above 0; they count turns within the original length."
            )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies of the decoder.

    Attributes:
      theta: base of the geometric series of frequencies.
      mrope_section: how many frequencies each of (time, height, width) turns; their sum is half a head.
      mrope_interleaved: True for THWTHW...TT (Qwen3-VL), False for T...TH...HW...W (Qwen2-VL, Qwen2.5-VL).
      yarn: stretches the frequencies, whichever axis they turn; None leaves them.
    """

    theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    mrope_interleaved: bool = True
    yarn: YarnConfig | None = None


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts in place of one feed-forward layer, in every decoder layer.

    Attributes:
      num_experts: feed-forward layers to choose from.
      num_experts_per_tok: how many of them each token goes through; their outputs are averaged by the router's
        probabilities, made to sum to 1.
      moe_intermediate_size: width of one expert.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int

    def __post_init__(self):
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"text.moe.num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                f"num_experts={self.num_experts}."
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
      intermediate_size: width of the feed-forward layers; unused where `moe` is set, whose experts have their own.
      head_dim: free of `hidden_size / num_attention_heads`.
      attention_bias: whether the query, key and value projections have biases (Qwen2-VL, Qwen2.5-VL).
      qk_norm: whether each head's queries and keys are normalised before they are turned (Qwen3-VL).
      moe: the experts; None for a dense decoder.
    """

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
    attention_bias: bool = False
    qk_norm: bool = True
    moe: MoeConfig | None = None

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
      num_position_embeddings: entries of the learned, square position table that is interpolated to each frame; 0 for a
        tower without one.
      out_hidden_size: width of the merged tokens, the decoder's `hidden_size`.
      deepstack_visual_indexes: tower layers (from 0) whose outputs go through a DeepStack merger and are added to the
        decoder's hidden states after its layers 0, 1, ...; empty for none.
      hidden_act: of the feed-forward layers.
      norm: "layer_norm", or "rms_norm" (Qwen2.5-VL), of blocks and mergers.
      gated_mlp: whether the feed-forward layers are gated, down(act(gate x) * up x) (Qwen2.5-VL).
      patch_bias: whether the patch embedding has a bias (Qwen3-VL).
      window_size: side, in pixels, of the square windows that patches attend within; 0 for none.
      fullatt_block_indexes: layers (from 0) that attend to the whole frame in spite of `window_size`.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...] = ()
    num_position_embeddings: int = 2304
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    gated_mlp: bool = False
    patch_bias: bool = True
    window_size: int = 0
    fullatt_block_indexes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"vision.hidden_size={self.hidden_size} must be a multiple of 4 * num_heads={4 * self.num_heads}: "
                "the 2-D rotary embedding turns a quarter of each head per axis and half."
            )
        for field in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            bad = [i for i in getattr(self, field) if not 0 <= i < self.depth]
            if bad:
                raise ConfigError(
                    f"vision.{field} names layers {bad}, but the tower has depth={self.depth} (layers 0 to "
                    f"{self.depth - 1})."
                )
        if self.window_size and self.window_size // self.patch_size < self.spatial_merge_size:
            raise ConfigError(
                f"vision.window_size={self.window_size} is smaller than a merged token, {self.spatial_merge_size} "
                f"patches of {self.patch_size} pixels to the side; enlarge it, or set it to 0 for no windows."
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

    @property
    def window_cells(self) -> int:
        """Side of an attention window in merged tokens; 0 for none."""
        return self.window_size // self.patch_size // self.spatial_merge_size


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A whole model: tower, decoder, and the token ids that mark vision in the text.

    Attributes:
      eos_token_ids: ids that end an answer, from generation_config.json; empty where it names none, and generation then
        stops at the tokenizer's.
      tokens_per_second: positions on the time axis that a second of video takes (Qwen2.5-VL); None where time positions
        count temporal patches.
    """

    text: TextConfig
    vision: VisionConfig
    model_type: str = "qwen3_vl"
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_ids: tuple[int, ...] = ()
    tokens_per_second: float | None = None

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
