"""`config.json` of the public layout, read into a `QwenVLConfig` and written from one.

Every key of the file falls in one of three kinds: it is read, it must hold the one value that this code computes, or it
is known not to change what a model computes. Anything else is refused by name, so that no setting is ever ignored that
would have mattered.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.errors import CheckpointError, ConfigError

MODEL_TYPES = ("qwen3_vl",)

# Keys that must hold one of these values, because nothing else is computed here.
_ONLY_TOP = {"quantization_config": (None,), "is_encoder_decoder": (False,), "per_layer_config": (None,)}
_ONLY_TEXT = {
    "model_type": ("qwen3_vl_text", "qwen3_vl"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "partial_rotary_factor": (None, 1),
    "mlp_only_layers": (None, []),
    "num_experts": (None, 0),
    "is_encoder_decoder": (False,),
}
_ONLY_VISION = {
    "model_type": ("qwen3_vl_vision", "qwen3_vl"),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "attention_dropout": (0,),
    "is_encoder_decoder": (False,),
}
_ONLY_ROPE = {
    "rope_type": ("default", "mrope"),
    "type": ("default", "mrope"),
    "mrope_interleaved": (True,),  # the reference's Qwen3-VL interleaves whatever this key says
    "partial_rotary_factor": (None, 1),
    "attention_factor": (None, 1),
}
_ONLY_VISION_ROPE = {"rope_type": ("axial", "default"), "type": ("axial", "default"), "rope_theta": (10000,)}

# Keys of the whole ecosystem that change no number a model computes: provenance, training and sampling defaults.
_NEUTRAL = {
    "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "name_or_path", "_name_or_path",
    "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "initializer_range",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "torchscript",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "id2label", "label2id",
    "num_labels", "problem_type", "chunk_size_feed_forward", "tie_encoder_decoder", "cross_attention_hidden_size",
    "is_decoder", "add_cross_attention", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "pruned_heads", "prune_heads", "use_bfloat16", "tf_legacy_loss", "remove_invalid_values",
    "exponential_decay_length_penalty",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "sliding_window",
    "max_window_layers", "vision_token_id", "base_model_tp_plan",
}  # fmt: skip
# (`sliding_window` and `max_window_layers` act only through `use_sliding_window` and `layer_types`, which are checked.)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: the file is missing, is no JSON, or holds something else than an object.
    """
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}; give a folder in the public Hugging Face layout.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{file} holds a JSON {type(values).__name__} where an object is expected; fetch it again."
        )
    return values


def read_config(folder: Path) -> QwenVLConfig:
    """The shape of the model in `folder`, with the ids that end an answer from generation_config.json.

    Raises:
      CheckpointError: config.json is missing, is of an unknown model type, or asks for what is not computed here.
    """
    config = config_from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    if not (folder / "generation_config.json").is_file():
        return config
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    if ends is None:
        return config
    ends = ends if isinstance(ends, list) else [ends]
    if not all(_is_int(i) for i in ends):
        raise CheckpointError(f"{folder / 'generation_config.json'}: eos_token_id must hold token ids, got {ends}.")
    return dataclasses.replace(config, eos_token_ids=tuple(ends))


def config_from_json(values: Mapping[str, Any], where: str = "config.json") -> QwenVLConfig:
    """Reads the contents of a config.json. `where` names the file in errors.

    Raises:
      CheckpointError: an unknown model type, a key missing or of the wrong kind, or one that asks for something else
        than what is computed here.
    """
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}."
        )
    top = _Section(values, where, "")
    text = top.section("text_config")
    try:
        config = QwenVLConfig(
            text=_text(text, tied=top.get("tie_word_embeddings", bool, text.get("tie_word_embeddings", bool, False))),
            vision=_vision(top.section("vision_config")),
            model_type=model_type,
            **{key: top.get(key, int, default) for key, default in _TOKEN_IDS.items()},
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    top.finish({"model_type": MODEL_TYPES, **_ONLY_TOP})
    return config


_TOKEN_IDS = {
    field.name: field.default for field in dataclasses.fields(QwenVLConfig) if field.name.endswith("_token_id")
}


def _text(section: "_Section", tied: bool) -> TextConfig:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers = {key: section.get(key, int) for key in (*required, "num_key_value_heads")}
    optional = ("head_dim", "max_position_embeddings")
    numbers |= {key: section.get(key, int, _defaults(TextConfig)[key]) for key in optional}
    section.check_positive(numbers)
    if numbers["head_dim"] % 2:
        raise section.error("head_dim", "even", numbers["head_dim"])
    config = TextConfig(
        **numbers,
        rms_norm_eps=section.get("rms_norm_eps", float, 1e-6),
        rope=_rope(section, numbers["head_dim"]),
        tie_word_embeddings=tied,
    )
    layer_types = section.get("layer_types", list, [])
    if set(map(str, layer_types)) - {"full_attention"}:
        raise section.error("layer_types", "full_attention throughout", layer_types)
    section.finish(_ONLY_TEXT)
    return config


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _rope(section: "_Section", head_dim: int) -> RopeConfig:
    """The decoder's rotary settings from any of the three spellings.

    `rope_theta` beside `rope_scaling` (as released), both folded into `rope_parameters` (transformers 5), or mixtures;
    a value inside one of the two objects goes before one beside them.
    """
    outer = section.get("rope_theta", float, None)
    merged = {}
    for key in ("rope_scaling", "rope_parameters"):
        for name, value in section.get(key, dict, {}).items():
            if merged.setdefault(name, value) != value:
                raise section.error(f"{key}.{name}", f"{merged[name]} as in rope_scaling", value)
    rope = _Section(merged, section.where, f"{section.name}rope_parameters.")
    theta = rope.get("rope_theta", float, outer)
    if theta is None or theta <= 0:
        raise section.error("rope_theta", "a positive number, here or in rope_parameters or rope_scaling", theta)
    sizes = rope.get("mrope_section", list, [24, 20, 20])
    if len(sizes) != 3 or not all(_is_int(size) and size >= 0 for size in sizes):
        raise rope.error("mrope_section", "three counts (time, height, width)", sizes)
    rope.finish(_ONLY_ROPE)
    # Interleaved, height takes frequencies 1, 4, ... and width 2, 5, ... below three times their section and within
    # half a head; time takes the rest. A file may name larger sections; this is what they come to.
    half = head_dim // 2
    height, width = (len(range(axis, min(3 * sizes[axis], half), 3)) for axis in (1, 2))
    return RopeConfig(theta=theta, mrope_section=(half - height - width, height, width), mrope_interleaved=True)


def _vision(section: "_Section") -> VisionConfig:
    indexes = section.get("deepstack_visual_indexes", list)
    if not all(_is_int(i) for i in indexes) or indexes != sorted(set(indexes)):
        raise section.error("deepstack_visual_indexes", "increasing layer numbers", indexes)
    required = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
    optional = ("num_position_embeddings", "temporal_patch_size", "spatial_merge_size", "in_channels")
    defaults = _defaults(VisionConfig)
    numbers = {key: section.get(key, int) for key in required}
    numbers |= {key: section.get(key, int, defaults[key]) for key in optional}
    numbers["patch_size"] = section.square("patch_size", defaults["patch_size"])
    section.check_positive(numbers)
    act = section.get("hidden_act", str, defaults["hidden_act"])
    acts = ("gelu_pytorch_tanh", "gelu", "silu")
    if act not in acts:
        raise section.error("hidden_act", f"one of {', '.join(acts)}", act)
    head_dim = section.get("head_dim", int, None)
    if head_dim is not None and head_dim * numbers["num_heads"] != numbers["hidden_size"]:
        raise section.error("head_dim", "hidden_size / num_heads", head_dim)
    theta = section.get("rope_theta", float, 10000.0)
    if theta != 10000:
        raise section.error("rope_theta", "10000", theta)
    _Section(section.get("rope_parameters", dict, {}), section.where, f"{section.name}rope_parameters.").finish(
        _ONLY_VISION_ROPE
    )
    config = VisionConfig(**numbers, deepstack_visual_indexes=tuple(indexes), hidden_act=act)
    section.finish(_ONLY_VISION)
    return config


class _Section:
    """An object of the file whose keys are ticked off as they are read, so that the rest can be judged at the end."""

    def __init__(self, values: Mapping[str, Any], where: str, name: str):
        self.values, self.where, self.name, self.read = values, where, name, set()

    def get(self, key: str, kind: type, *default):
        """The value of a key as a `kind`; without a default it must be there. null counts as absent."""
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            if not default:
                raise CheckpointError(f"{self.where}: {self.name}{key} is missing; fetch the file again.")
            return default[0]
        if kind is float and _is_int(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and not _is_int(value)):
            kinds = {int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
            raise self.error(key, kinds.get(kind, "a string"), value)
        return value

    def square(self, key: str, default: int) -> int:
        """A number that may be spelled as a list of two equal ones."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1] and _is_int(value[0]):
            self.read.add(key)
            return value[0]
        return self.get(key, int, default)

    def check_positive(self, numbers: Mapping[str, int]) -> None:
        """Refuses the first number below 1."""
        for key, value in numbers.items():
            if value < 1:
                raise self.error(key, "a positive integer", value)

    def section(self, key: str) -> "_Section":
        """The object under a key."""
        return _Section(self.get(key, dict), self.where, f"{self.name}{key}.")

    def error(self, key: str, expected: str, got: Any) -> CheckpointError:
        """The error of a value that cannot be used."""
        return CheckpointError(f"{self.where}: {self.name}{key} must be {expected}, but is {json.dumps(got)}.")

    def finish(self, only: Mapping[str, tuple]) -> None:
        """Refuses keys that hold another value than `only` allows, and keys that nothing is known about."""
        for key, value in self.values.items():
            if key in only:
                if value is not None and value not in only[key]:
                    allowed = " or ".join(json.dumps(v) for v in only[key])
                    raise CheckpointError(
                        f"{self.where}: {self.name}{key} = {json.dumps(value)} is not supported, only {allowed}; "
                        "use a checkpoint without it."
                    )
            elif key not in self.read | _NEUTRAL and value is not None:
                near = difflib.get_close_matches(key, self.read | set(only), n=1)
                hint = (
                    f"did you mean {near[0]}?" if near else "remove it if it does not change what the model computes."
                )
                raise CheckpointError(f"{self.where}: {self.name}{key} is not a key that is known here; {hint}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def config_to_json(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers 5 would write for this model; `dtype` is that of the stored tensors.

    Raises:
      CheckpointError: a shape that the public layout cannot say.
    """
    if config.model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"model_type {config.model_type!r} cannot be written; supported: {', '.join(MODEL_TYPES)}."
        )
    rope = config.text.rope
    if not rope.mrope_interleaved:
        raise CheckpointError(
            f"text.rope.mrope_interleaved=False cannot be written: {config.model_type} is interleaved in the public "
            "layout."
        )
    text = {field.name: getattr(config.text, field.name) for field in dataclasses.fields(TextConfig)}
    tied = text.pop("tie_word_embeddings")
    text |= {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope.theta,
        "mrope_section": list(rope.mrope_section),
        "mrope_interleaved": True,
    }
    del text["rope"]
    vision = dataclasses.asdict(config.vision) | {"model_type": "qwen3_vl_vision"}
    vision["deepstack_visual_indexes"] = list(config.vision.deepstack_visual_indexes)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": config.model_type,
        "dtype": dtype,
        "tie_word_embeddings": tied,
        **{key: getattr(config, key) for key in _TOKEN_IDS},
        "text_config": dict(sorted(text.items())),
        "vision_config": dict(sorted(vision.items())),
    }
