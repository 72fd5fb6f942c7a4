"""Tiny random SigLIP towers and Qwen3 decoders, written by the reference's own `save_pretrained`."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from tests.parity.reference import transformers
from tests.tiny import tiny_tokenizer

WIDTH, DEPTH, HEADS, FFN, PATCH, SIDE = 24, 4, 3, 44, 16, 5
H, LAYERS, EXPERTS = 40, 4, 5
EXPERT_FFN = 12  # the kernels of the reference want multiples of 16 bytes
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": H,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0},
}
# Kinds of SigLIP folders: (config class, model class) and the settings that give the table its side.
_SIGLIP = {
    "siglip": ("Siglip", {"image_size": SIDE * PATCH + 3}),  # the odd pixels are cut, as in so400m-patch14-384
    "siglip2": ("Siglip2", {"num_patches": SIDE * SIDE}),
}
SIGLIP_KINDS = ("siglip", "siglip2", "siglip_vision_model", "siglip2_vision_model")


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = 0.2 if tensor.ndim < 2 else 1.2 / tensor[0].numel() ** 0.5
            tensor.copy_(noise * scale + float("norm" in name and name.endswith("weight")))
    return model.eval()


def write_siglip(folder: Path, kind: str, **changes):
    """Writes a SigLIP of a kind out of `SIGLIP_KINDS`, and returns its image tower."""
    family = kind.partition("_")[0]
    name, size = _SIGLIP[family]
    vision = {**VISION, **size, **changes}
    config = getattr(transformers, f"{name}VisionConfig")(**vision)
    if kind != family:
        model = tower = randomize(getattr(transformers, f"{name}VisionModel")(config))
    else:
        text = {"vocab_size": 10, "hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
        whole = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
        model = randomize(getattr(transformers, f"{name}Model")(whole))
        tower = model.vision_model
    model.save_pretrained(folder)
    return tower


def write_qwen3(folder: Path, *, tied: bool = False, moe: bool = False, **changes):
    """Writes a Qwen3 or Qwen3-MoE with a tokenizer of the tiny kind, and returns the model."""
    tokenizer = tiny_tokenizer()
    settings = {**TEXT, "vocab_size": tokenizer.get_vocab_size() + 3, "tie_word_embeddings": tied}
    if moe:
        settings |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_FFN}
        settings |= {"norm_topk_prob": True}
    name = "Qwen3Moe" if moe else "Qwen3"
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    model = randomize(getattr(transformers, f"{name}ForCausalLM")(config), seed=1)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": "{{ 'that of the language model' }}",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return model


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder by its name, read by the format's own library."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load_reference(folder: Path) -> torch.nn.Module:
    """Loads a result, dense or sparse, with the reference in float32; no tensor may be missing or unexpected."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    problems = {key: found for key, found in report.items() if found}
    assert not problems, f"The reference does not load {folder} cleanly: {problems}"
    return model.eval()


def edit_json(file: Path, **changes) -> None:
    """Changes keys of a JSON object; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
