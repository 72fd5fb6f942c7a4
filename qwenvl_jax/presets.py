"""The shapes of the public checkpoints, by name."""

import difflib

from qwenvl_jax.config import MoeConfig, QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.errors import ConfigError

# (pad is the tokenizer's <|endoftext|>, end of an answer its <|im_end|>: generation_config.json of every release)
_EOS_TOKEN_IDS = (151645, 151643)

_SMALL_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": (5, 11, 17),
}
_BIG_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": (8, 16, 24),
}


def _older(model_type: str, vision: dict, *, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool):
    """A Qwen2-VL or Qwen2.5-VL: chunked MRoPE, biases on queries, keys and values, a tower without positions."""
    newer = model_type == "qwen2_5_vl"
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=151936 if tied else 152064,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope=RopeConfig(theta=1_000_000.0, mrope_section=(16, 24, 24), mrope_interleaved=False),
            max_position_embeddings=128000 if newer else 32768,
            tie_word_embeddings=tied,
            attention_bias=True,
            qk_norm=False,
        ),
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            num_heads=16,
            out_hidden_size=hidden,
            num_position_embeddings=0,
            patch_size=14,
            patch_bias=False,
            **vision,
        ),
        model_type=model_type,
        eos_token_ids=_EOS_TOKEN_IDS,
        tokens_per_second=2.0 if newer else None,
    )


def _qwen2_vl(**text) -> QwenVLConfig:
    return _older("qwen2_vl", {"intermediate_size": 5120, "hidden_act": "quick_gelu"}, **text)


def _qwen2_5_vl(*, tower_ffn: int, **text) -> QwenVLConfig:
    vision = {
        "intermediate_size": tower_ffn,
        "hidden_act": "silu",
        "norm": "rms_norm",
        "gated_mlp": True,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    }
    return _older("qwen2_5_vl", vision, **text)


def _qwen3_vl(
    tower: dict,
    *,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    tied: bool = False,
    kv_heads: int = 8,
    expert_ffn: int | None = None,
) -> QwenVLConfig:
    """A Qwen3-VL; what its sizes have in common is the default of the configuration classes."""
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            moe=MoeConfig(128, 8, expert_ffn) if expert_ffn else None,
        ),
        vision=VisionConfig(out_hidden_size=hidden, **tower),
        model_type="qwen3_vl_moe" if expert_ffn else "qwen3_vl",
        eos_token_ids=_EOS_TOKEN_IDS,
    )


PRESETS: dict[str, QwenVLConfig] = {
    "qwen2_vl_2b": _qwen2_vl(hidden=1536, layers=28, heads=12, kv_heads=2, ffn=8960, tied=True),
    "qwen2_vl_7b": _qwen2_vl(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, tied=False),
    "qwen2_vl_72b": _qwen2_vl(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=29568, tied=False),
    "qwen2_5_vl_3b": _qwen2_5_vl(tower_ffn=3420, hidden=2048, layers=36, heads=16, kv_heads=2, ffn=11008, tied=True),
    "qwen2_5_vl_7b": _qwen2_5_vl(tower_ffn=3420, hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, tied=False),
    "qwen2_5_vl_32b": _qwen2_5_vl(tower_ffn=3456, hidden=5120, layers=64, heads=40, kv_heads=8, ffn=27648, tied=False),
    "qwen2_5_vl_72b": _qwen2_5_vl(tower_ffn=3456, hidden=8192, layers=80, heads=64, kv_heads=8, ffn=29568, tied=False),
    "qwen3_vl_2b": _qwen3_vl(_SMALL_TOWER, hidden=2048, layers=28, heads=16, ffn=6144, tied=True),
    "qwen3_vl_4b": _qwen3_vl(_SMALL_TOWER, hidden=2560, layers=36, heads=32, ffn=9728, tied=True),
    "qwen3_vl_8b": _qwen3_vl(_BIG_TOWER, hidden=4096, layers=36, heads=32, ffn=12288),
    "qwen3_vl_32b": _qwen3_vl(_BIG_TOWER, hidden=5120, layers=64, heads=64, ffn=25600),
    "qwen3_vl_30b_a3b": _qwen3_vl(_BIG_TOWER, hidden=2048, layers=48, heads=32, kv_heads=4, ffn=6144, expert_ffn=768),
    "qwen3_vl_235b_a22b": _qwen3_vl(
        _BIG_TOWER, hidden=4096, layers=94, heads=64, kv_heads=4, ffn=12288, expert_ffn=1536
    ),
}


def preset(name: str) -> QwenVLConfig:
    """The configuration of a public checkpoint, such as "qwen3_vl_4b".

    Raises:
      ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no preset is called {name!r}; {hint}The presets are {', '.join(PRESETS)}.")
    return PRESETS[name]
