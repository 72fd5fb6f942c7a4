"""The reference implementation, transformers 5.23.0, and makers of tiny random checkpoints in its layout.

Importing this module imports torch and transformers. Some torch builds cannot load torchvision's compiled operators;
the two that torchvision registers shapes for are then declared here without kernels, since nothing in Qwen-VL calls
them.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch

from qwenvl_jax.data.sample import Sample


def _import_torchvision() -> "torch.library.Library | None":
    """Imports torchvision, declaring its two operators first where its compiled library does not load."""
    try:
        import torchvision

        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return library  # the declarations live as long as this object


TORCHVISION_OPS = _import_torchvision()

import transformers

REFERENCE_VERSION = "5.23.0"
assert transformers.__version__ == REFERENCE_VERSION, (
    f"The parity tests compare with transformers {REFERENCE_VERSION}; {transformers.__version__} is installed."
)
transformers.utils.logging.disable_progress_bar()

CLASSES = {
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
}

# Small shapes that share no number where a mistaken transpose or reshape could hide: odd head counts, head_dim that is
# not hidden_size / heads where a generation allows it, grouped key/value heads, a position table smaller and larger
# than a frame, DeepStack taps that are not the first layers, windows that frames do and do not fill.
_WIDE_TEXT = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 50_000.0,
        "mrope_section": [3, 2, 1],
        "mrope_interleaved": True,
    },
}
_NARROW_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
_WIDE_TOWER = {
    "depth": 5,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_heads": 3,
    "out_hidden_size": 40,
    "deepstack_visual_indexes": [1, 3],
    "num_position_embeddings": 25,
    "patch_size": 16,
}
_NARROW_TOWER = {
    "depth": 4,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_heads": 5,
    "out_hidden_size": 24,
    "deepstack_visual_indexes": [0, 1, 2],
    "num_position_embeddings": 49,
    "patch_size": 16,
}
_OLDER_TEXT = {
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 70_000.0, "mrope_section": [1, 3, 1]},
}
_QWEN2_TOWER = {"depth": 3, "embed_dim": 36, "hidden_size": 60, "mlp_ratio": 2, "num_heads": 3}
_QWEN2_5_TOWER = {
    "depth": 5,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_heads": 3,
    "out_hidden_size": 60,
    "window_size": 56,
    "fullatt_block_indexes": [1, 4],
    "tokens_per_second": 2,
}
_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 18}


def _yarn(text: dict) -> dict:
    """The same decoder, its frequencies stretched for four times a length shorter than the conversations."""
    rope = text["rope_parameters"] | {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
    }
    return text | {"rope_parameters": rope, "max_position_embeddings": 128}


# (model_type, tied, text_config, vision_config)
SHAPES = {
    "qwen3 untied": ("qwen3_vl", False, _WIDE_TEXT, _WIDE_TOWER),
    "qwen3 tied": ("qwen3_vl", True, _NARROW_TEXT, _NARROW_TOWER),
    "qwen3 untied yarn": ("qwen3_vl", False, _yarn(_WIDE_TEXT), _WIDE_TOWER),
    "qwen3 tied yarn": ("qwen3_vl", True, _yarn(_NARROW_TEXT), _NARROW_TOWER),
    "qwen2 untied": ("qwen2_vl", False, _OLDER_TEXT, _QWEN2_TOWER),
    "qwen2 tied": ("qwen2_vl", True, _OLDER_TEXT, _QWEN2_TOWER),
    "qwen2 untied yarn": ("qwen2_vl", False, _yarn(_OLDER_TEXT), _QWEN2_TOWER),
    "qwen2 tied yarn": ("qwen2_vl", True, _yarn(_OLDER_TEXT), _QWEN2_TOWER),
    "qwen2.5 untied": ("qwen2_5_vl", False, _OLDER_TEXT, _QWEN2_5_TOWER),
    "qwen2.5 tied": ("qwen2_5_vl", True, _OLDER_TEXT, _QWEN2_5_TOWER | {"window_size": 112}),
    "qwen2.5 untied yarn": ("qwen2_5_vl", False, _yarn(_OLDER_TEXT), _QWEN2_5_TOWER),
    "qwen2.5 tied yarn": ("qwen2_5_vl", True, _yarn(_OLDER_TEXT), _QWEN2_5_TOWER),
    "qwen3 moe untied": ("qwen3_vl_moe", False, _WIDE_TEXT | _EXPERTS, _WIDE_TOWER),
    "qwen3 moe tied": ("qwen3_vl_moe", True, _NARROW_TEXT | _EXPERTS, _NARROW_TOWER),
    "qwen3 moe untied yarn": ("qwen3_vl_moe", False, _yarn(_WIDE_TEXT | _EXPERTS), _WIDE_TOWER),
    "qwen3 moe tied yarn": ("qwen3_vl_moe", True, _yarn(_NARROW_TEXT | _EXPERTS), _NARROW_TOWER),
}
# Where seed 0 makes answers that are nearly a tie, or end at once, or a model so badly conditioned that the reference's
# own logits in float32 are further than 3e-5 from those in float64.
SEEDS = {
    "qwen2 untied": 2,
    "qwen2 tied": 3,
    "qwen2 untied yarn": 2,
    "qwen2 tied yarn": 3,
    "qwen2.5 tied": 2,
    "qwen2.5 untied yarn": 1,
    "qwen2.5 tied yarn": 10,
    "qwen3 moe untied": 1,
    "qwen3 moe tied": 1,
    "qwen3 moe untied yarn": 1,
    "qwen3 moe tied yarn": 1,
}
# Left to the longer suite: what remains to be combined once each generation, each head and YaRN were seen.
SLOW_SHAPES = frozenset(
    {
        "qwen3 untied yarn",
        "qwen2 tied",
        "qwen2 untied yarn",
        "qwen2.5 tied",
        "qwen2.5 tied yarn",
        "qwen3 moe untied",
        "qwen3 moe tied",
        "qwen3 moe untied yarn",
    }
)


def tiny_config(shape: str, vocab_size: int = 97, ids: dict[str, int] | None = None):
    """The reference's configuration of one of `SHAPES`.

    Args:
      shape: a key of `SHAPES`.
      vocab_size: rows of the embedding.
      ids: image_token_id, video_token_id, vision_start_token_id, vision_end_token_id, eos_token_id, as wanted.
    """
    model_type, tied, text, vision = SHAPES[shape]
    ends = {} if model_type.startswith("qwen3") else {"bos_token_id": None, "eos_token_id": None}
    # Copies: the reference's configurations keep and change what they are given.
    text, vision = copy.deepcopy(text | ends | {"vocab_size": vocab_size}), copy.deepcopy(vision)
    make = CLASSES[model_type][0]
    return make(text_config=text, vision_config=vision, tie_word_embeddings=tied, **(ids or {}))


def random_model(config, seed: int = 0):
    """A float32 model whose every tensor is random, norms and biases too, and large enough to matter.

    None is larger: an embedding that is the output projection too is scaled as one, or else logits of 18 have float32
    errors, the reference's own, above the tolerance of 1e-4 that is meant for logits of 5.
    """
    generator = torch.Generator().manual_seed(seed)
    model = CLASSES[config.model_type][1](config).to(torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("embed_tokens.weight") and config.tie_word_embeddings:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.2 / tensor.shape[1] ** 0.5)
            elif "embed" in name and "patch" not in name:
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
            else:
                # (Experts stand as [experts, out, in].)
                fan_in = tensor.shape[2] if ".experts." in name else tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.2 / fan_in**0.5)
    return model


def write_checkpoint(
    folder: str | Path,
    shape: str,
    *,
    vocab_size: int = 97,
    ids: dict[str, int] | None = None,
    eos_token_ids: tuple[int, ...] = (),
    seed: int | None = None,
    **save,
):
    """Writes a tiny random checkpoint with the reference's own `save_pretrained` and returns the model written.

    Args:
      folder: where to write; made if missing.
      shape, vocab_size, ids: see `tiny_config`.
      eos_token_ids: ids that end an answer, for generation_config.json.
      seed: of the random tensors; that of the shape without it.
      **save: passed to `save_pretrained`, such as `max_shard_size="20KB"`.
    """
    seed = SEEDS.get(shape, 0) if seed is None else seed
    model = random_model(tiny_config(shape, vocab_size, ids), seed)
    if eos_token_ids:
        model.generation_config.eos_token_id = list(eos_token_ids)
    model.save_pretrained(folder, **save)
    return model


def load_checkpoint(folder: str | Path):
    """Loads a folder with the reference, in float32, refusing any missing, unexpected or misshaped tensor."""
    config = transformers.AutoConfig.from_pretrained(folder)
    # (The other implementation of experts wants widths that are multiples of four.)
    experts = {"experts_implementation": "eager"} if config.model_type == "qwen3_vl_moe" else {}
    model, report = CLASSES[config.model_type][1].from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager", **experts
    )
    problems = {key: found for key, found in report.items() if found}
    assert not problems, f"The reference does not load {folder} cleanly: {problems}"
    return model.eval()


def reference_inputs(sample: Sample, conversation: list[dict], config, pixel_table: np.ndarray):
    """What the reference's `forward` takes for one conversation, unpadded, from the same token ids and bytes.

    Args:
      sample: of the conversation.
      conversation: its videos are `VideoFrames`; the seconds between their temporal patches are taken from here.
      config: the reference's.
      pixel_table: f32[3, 256], the normalised values of bytes.

    Positions are left to the reference.
    """
    tokens = torch.from_numpy(sample.tokens).long()[None]
    kinds = torch.zeros_like(tokens)
    kinds[tokens == config.image_token_id] = 1
    kinds[tokens == config.video_token_id] = 2
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": kinds}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [medium for medium in sample.media if medium.kind == kind]
        if media:
            patches = np.concatenate([medium.patches for medium in media])
            patches = patches.reshape(len(patches), 3, -1)
            values = np.stack([pixel_table[c][patches[:, c]] for c in range(3)], axis=1).reshape(len(patches), -1)
            inputs[pixels] = torch.from_numpy(values)
            inputs[grids] = torch.tensor([medium.grid for medium in media])
    if config.model_type == "qwen2_5_vl" and "video_grid_thw" in inputs:
        parts = [
            p for m in conversation if isinstance(m["content"], list) for p in m["content"] if p["type"] == "video"
        ]
        tau = config.vision_config.temporal_patch_size
        seconds = [tau * p["video"].duration / len(p["video"].timestamps) for p in parts]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs
