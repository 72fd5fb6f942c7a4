"""The shapes of the public checkpoints, by name."""

import difflib

from qwenvl_jax.config import QwenVLConfig, TextConfig, VisionConfig
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


def _qwen3_vl(tower: dict, *, hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> QwenVLConfig:
    """A dense Qwen3-VL; what its sizes have in common is the default of the configuration classes."""
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            tie_word_embeddings=tied,
        ),
        vision=VisionConfig(out_hidden_size=hidden, **tower),
        eos_token_ids=_EOS_TOKEN_IDS,
    )


PRESETS: dict[str, QwenVLConfig] = {
    "qwen3_vl_2b": _qwen3_vl(_SMALL_TOWER, hidden=2048, layers=28, heads=16, ffn=6144, tied=True),
    "qwen3_vl_4b": _qwen3_vl(_SMALL_TOWER, hidden=2560, layers=36, heads=32, ffn=9728, tied=True),
    "qwen3_vl_8b": _qwen3_vl(_BIG_TOWER, hidden=4096, layers=36, heads=32, ffn=12288, tied=False),
    "qwen3_vl_32b": _qwen3_vl(_BIG_TOWER, hidden=5120, layers=64, heads=64, ffn=25600, tied=False),
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
