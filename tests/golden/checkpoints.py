"""Tiny checkpoints and conversations that anyone can make again, bit for bit, with NumPy alone.

A tensor is a function of its public name, its shape and the checkpoint's seed: the raw output of PCG64, which NumPy
promises not to change, scaled by operations that IEEE 754 rounds in one way. (NumPy does not promise the distributions
of `default_rng`.) config.json stands here as the releases spell it, with rotary settings beside `rope_theta`.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qwenvl_jax.checkpoint import hf, hf_config
from qwenvl_jax.data.video import VideoFrames
from tests.tiny import tiny_processor_folder

_TEXT = {
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
}
_QWEN2_TEXT = _TEXT | {"hidden_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "use_sliding_window": False}
_QWEN3_TEXT = _TEXT | {"head_dim": 12, "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 5_000_000}
_QWEN3_ROPE = {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"}
_QWEN3_TOWER = {
    "depth": 4,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_heads": 3,
    "out_hidden_size": 40,
    "deepstack_visual_indexes": [0, 2],
    "num_position_embeddings": 36,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
}
# Stretched four times from a length shorter than the conversations.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_YARN_LENGTH = {"max_position_embeddings": 128}

CONFIGS = {
    "qwen2_vl": {
        **_QWEN2_TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]},
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 3,
            "embed_dim": 24,
            "hidden_size": 48,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl": {
        **_QWEN2_TEXT,
        **_YARN_LENGTH,
        "rope_scaling": {"mrope_section": [1, 3, 2], **_YARN},
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 34,
            "num_heads": 2,
            "out_hidden_size": 48,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "hidden_act": "silu",
        },
    },
    "qwen3_vl": {
        "text_config": _QWEN3_TEXT
        | _YARN_LENGTH
        | {"model_type": "qwen3_vl_text", "rope_scaling": _QWEN3_ROPE | _YARN},
        "vision_config": _QWEN3_TOWER | {"model_type": "qwen3_vl"},
        "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "text_config": _QWEN3_TEXT
        | {
            "model_type": "qwen3_vl_moe_text",
            "rope_scaling": _QWEN3_ROPE,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "vision_config": _QWEN3_TOWER | {"model_type": "qwen3_vl_moe"},
        "tie_word_embeddings": False,
    },
}
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
# Those whose greedy answers neither end early nor hang on a near tie; `tools.make_golden` refuses others.
SEEDS = {"qwen2_vl": 0, "qwen2_5_vl": 0, "qwen3_vl": 0, "qwen3_vl_moe": 1}
_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _raw(name: str, seed: int, count: int) -> np.ndarray:
    """u64[count], a function of its arguments."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4").tolist()
    return np.random.PCG64(np.random.SeedSequence([seed, *words])).random_raw(count)


def tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """f32[shape], uniform; norms around 1, everything large enough to matter. `name` is the public one."""
    unit = (_raw(name, seed, math.prod(shape)) >> np.uint64(40)).astype(np.float64) / 2**23 - 1  # [-1, 1)
    if len(shape) == 1:
        norm = name.endswith("weight")
        values = (1.0 if norm else 0.0) + (0.3 if norm else 0.2) * unit
    elif "embed" in name and "patch" not in name:
        values = 0.9 * unit
    else:
        # (Experts stand as [experts, in, out], everything else as [out, in, ...].)
        fan_in = shape[1] if ".experts." in name else math.prod(shape[1:])
        values = 2.0 / math.sqrt(fan_in) * unit
    return values.astype(np.float32).reshape(shape)


def write_checkpoint(folder: Path, model_type: str) -> None:
    """Writes model, tokenizer and processor of a generation into `folder`, in the public layout, in float32.

    Args:
      folder: made if missing.
      model_type: a key of `CONFIGS`.
    """
    ids = tiny_processor_folder(folder, model_type=model_type)
    vocabulary = {"vocab_size": ids["vocab_size"] + 3}  # rows that no token uses, as the public checkpoints have
    config = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "torch_dtype": "float32"}
    config |= CONFIGS[model_type] | {key: ids[token] for key, token in _IDS.items()}
    if "text_config" in config:
        config["text_config"] = config["text_config"] | vocabulary
    else:
        config |= vocabulary
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    for name, values in (("config.json", config), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    table = hf.tensor_table(hf_config.config_from_json(config))
    tensors = {name: tensor(name, entry.written_shape, SEEDS[model_type]) for entry in table for name in entry.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def conversations(model_type: str) -> dict[str, list[dict]]:
    """The conversations that the frozen answers are to, by name. Some of the pictures have to be resized.

    Args:
      model_type: Qwen2-VL and Qwen2.5-VL are shown frames that lie evenly; their reference knows no other.
    """
    even = not model_type.startswith("qwen3")

    def pixels(name: str, *shape: int) -> np.ndarray:
        return (_raw(name, 0, math.prod(shape)) >> np.uint64(56)).astype(np.uint8).reshape(shape)

    def image(height: int, width: int) -> dict:
        return {"type": "image", "image": pixels(f"image {height} {width}", height, width, 3)}

    def video(times: tuple[float, ...], duration: float, height: int, width: int) -> dict:
        at = np.arange(len(times)) * duration / len(times) if even else np.asarray(times)
        frames = pixels(f"video {height} {width}", len(times), height, width, 3)
        return {"type": "video", "video": VideoFrames(frames, at, duration)}

    def user(*parts) -> dict:
        return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}

    return {
        "text": [{"role": "user", "content": "when does the blue circle leave, and what is left at 12.5 seconds?"}],
        "images": [user(image(64, 96), "and", image(131, 97), "which is larger?")],
        "video": [user(video((0.0, 0.4, 1.7, 1.9, 5.3), 6.0, 84, 64), "what happens in the video?")],
        "mixed": [
            {"role": "system", "content": "you see"},
            user("here is a disc", image(96, 64), "remember it"),
            {"role": "assistant", "content": "a yellow disc"},
            user(video((0.3, 0.9, 2.0), 3.0, 64, 112), image(80, 80), "when does it appear?"),
        ],
    }
