"""The reference implementation, transformers 5.23.0, and makers of tiny random checkpoints in its layout.

Importing this module imports torch and transformers. Some torch builds cannot load torchvision's compiled operators;
the two that torchvision registers shapes for are then declared here without kernels, since nothing in Qwen-VL calls
them.
"""

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
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

REFERENCE_VERSION = "5.23.0"
assert transformers.__version__ == REFERENCE_VERSION, (
    f"The parity tests compare with transformers {REFERENCE_VERSION}; {transformers.__version__} is installed."
)
transformers.utils.logging.disable_progress_bar()

# Two small shapes that share no number where a mistaken transpose or reshape could hide: odd head counts, head_dim that
# is not hidden_size / heads, grouped key/value heads, a position table smaller and larger than a frame, DeepStack taps
# that are not the first layers.
SHAPES = {
    "untied": {
        "tie_word_embeddings": False,
        "text_config": {
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
        },
        "vision_config": {
            "depth": 5,
            "hidden_size": 24,
            "intermediate_size": 44,
            "num_heads": 3,
            "out_hidden_size": 40,
            "deepstack_visual_indexes": [1, 3],
            "num_position_embeddings": 25,
            "patch_size": 16,
        },
    },
    "tied": {
        "tie_word_embeddings": True,
        "text_config": {
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
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_heads": 5,
            "out_hidden_size": 24,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 49,
            "patch_size": 16,
        },
    },
}


def tiny_config(shape: str, vocab_size: int = 97, ids: dict[str, int] | None = None) -> Qwen3VLConfig:
    """The reference's configuration of one of `SHAPES`.

    Args:
      shape: a key of `SHAPES`.
      vocab_size: rows of the embedding.
      ids: image_token_id, video_token_id, vision_start_token_id, vision_end_token_id, eos_token_id, as wanted.
    """
    values = {**SHAPES[shape], "text_config": {**SHAPES[shape]["text_config"], "vocab_size": vocab_size}}
    return Qwen3VLConfig(**values, **(ids or {}))


def random_model(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A float32 model whose every tensor is random, norms and biases too, and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif "embed" in name and "patch" not in name:
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
            else:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.2 / fan_in**0.5)
    return model


def write_checkpoint(
    folder: str | Path,
    shape: str,
    *,
    vocab_size: int = 97,
    ids: dict[str, int] | None = None,
    eos_token_ids: tuple[int, ...] = (),
    seed: int = 0,
    **save,
) -> Qwen3VLForConditionalGeneration:
    """Writes a tiny random checkpoint with the reference's own `save_pretrained` and returns the model written.

    Args:
      folder: where to write; made if missing.
      shape, vocab_size, ids: see `tiny_config`.
      eos_token_ids: ids that end an answer, for generation_config.json.
      seed: of the random tensors.
      **save: passed to `save_pretrained`, such as `max_shard_size="20KB"`.
    """
    model = random_model(tiny_config(shape, vocab_size, ids), seed)
    if eos_token_ids:
        model.generation_config.eos_token_id = list(eos_token_ids)
    model.save_pretrained(folder, **save)
    return model


def load_checkpoint(folder: str | Path) -> Qwen3VLForConditionalGeneration:
    """Loads a folder with the reference, in float32, refusing any missing, unexpected or misshaped tensor."""
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    problems = {key: found for key, found in report.items() if found}
    assert not problems, f"The reference does not load {folder} cleanly: {problems}"
    return model.eval()


def reference_inputs(sample: Sample, config: Qwen3VLConfig) -> dict[str, torch.Tensor]:
    """What the reference's `forward` takes for one conversation, unpadded, from the same token ids and bytes.

    Pixels are normalised by the public means and deviations of one half. Positions are left to the reference.
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
            patches = np.concatenate([medium.patches for medium in media]).astype(np.float32)
            inputs[pixels] = torch.from_numpy((patches - 127.5) / 127.5)
            inputs[grids] = torch.tensor([medium.grid for medium in media])
    return inputs
