"""`config.json` of the public layout, read into a `QwenVLConfig` and written from one.

Every key of the file falls in one of three kinds: it is read, it must hold the one value that this code computes, or it
is known not to change what a model computes. Anything else is refused by name, so that no setting is ever ignored that
would have mattered.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwenvl_jax.checkpoint.sections import Section, is_int, read_json
from qwenvl_jax.config import MoeConfig, QwenVLConfig, RopeConfig, TextConfig, VisionConfig, YarnConfig
from qwenvl_jax.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class _Generation:
    """What the public layout of one generation fixes, whatever a file says.

    Attributes:
      architecture: the reference's class, as a config.json names it.
      older: whether this is Qwen2-VL or Qwen2.5-VL: biases on queries, keys and values and no norms on them, chunked
        MRoPE, heads that divide the width, no bias and no position table in the tower; hub files that hold the
        decoder's keys at the top level.
      mrope_section: where a file does not say.
      norm, gated_mlp: of the tower.
    """

    architecture: str
    older: bool = False
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    gated_mlp: bool = False


_OLDER: dict[str, Any] = {"older": True, "mrope_section": (16, 24, 24)}
_GENERATIONS = {
    "qwen2_vl": _Generation("Qwen2VLForConditionalGeneration", **_OLDER),
    "qwen2_5_vl": _Generation("Qwen2_5_VLForConditionalGeneration", norm="rms_norm", gated_mlp=True, **_OLDER),
    "qwen3_vl": _Generation("Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": _Generation("Qwen3VLMoeForConditionalGeneration"),
}
MODEL_TYPES = tuple(_GENERATIONS)

# Keys that must hold one of these values, because nothing else is computed here.
_ONLY_TOP = {"quantization_config": (None,), "is_encoder_decoder": (False,), "per_layer_config": (None,)}
_ONLY_TEXT = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "partial_rotary_factor": (None, 1),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "norm_topk_prob": (None, True),
    "is_encoder_decoder": (False,),
}
_ONLY_VISION = {
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "attention_dropout": (0,),
    "is_encoder_decoder": (False,),
}
_ONLY_ROPE = {
    # "type" is the old name of "rope_type", which goes before it.
    "type": ("default", "mrope", "yarn"),
    "partial_rotary_factor": (None, 1),
}
_ONLY_VISION_ROPE = {"rope_type": ("axial", "default"), "type": ("axial", "default"), "rope_theta": (10000,)}


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
    if not all(is_int(i) for i in ends):
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
    top = Section(values, where, "")
    flat = _GENERATIONS[model_type].older and values.get("text_config") is None
    # Hub files of the older generations hold the decoder's keys at the top level.
    text = Section(values, where, "") if flat else top.section("text_config")
    vision = top.section("vision_config")
    outer, inner = (section.get("tie_word_embeddings", bool, None) for section in (top, text))
    # The older generations look at both; the newer ones, whose decoder's section may hold a default, at the top first.
    tied = bool(outer or inner) if _GENERATIONS[model_type].older or outer is None else outer
    try:
        config = QwenVLConfig(
            text=_text(text, model_type, tied),
            vision=_vision(vision, model_type),
            model_type=model_type,
            tokens_per_second=vision.get("tokens_per_second", float, 4.0) if model_type == "qwen2_5_vl" else None,
            **{key: top.get(key, int, default) for key, default in _TOKEN_IDS.items()},
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    vision.finish(_ONLY_VISION | {"model_type": (f"{model_type}_vision", model_type, model_type.removesuffix("_moe"))})
    only_text = _ONLY_TEXT | {"model_type": (f"{model_type}_text", model_type)}
    if flat:
        top.read |= text.read
        top.finish(_ONLY_TOP | only_text)
        return config
    text.finish(only_text)
    if _GENERATIONS[model_type].older and "hidden_size" in values:
        # Files saved by transformers 4.5 repeat the decoder's keys beside its section.
        repeated = Section(values, where, "")
        if _text(repeated, model_type, tied) != config.text:
            raise CheckpointError(
                f"{where}: the decoder's settings at the top level and those in text_config differ; remove the former, "
                "which transformers does not read."
            )
        top.read |= repeated.read | set(only_text)
    top.finish({"model_type": MODEL_TYPES, **_ONLY_TOP})
    return config


_TOKEN_IDS = {
    field.name: field.default for field in dataclasses.fields(QwenVLConfig) if field.name.endswith("_token_id")
}


def _text(section: "Section", model_type: str, tied: bool) -> TextConfig:
    generation = _GENERATIONS[model_type]
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers = {key: section.get(key, int) for key in required}
    kv_heads = (numbers["num_attention_heads"],) if generation.older else ()
    numbers["num_key_value_heads"] = section.get("num_key_value_heads", int, *kv_heads)
    section.check_positive(numbers)
    head_dim = numbers["hidden_size"] // numbers["num_attention_heads"] if generation.older else 128
    numbers["head_dim"] = section.get("head_dim", int, head_dim)
    numbers["max_position_embeddings"] = section.get(
        "max_position_embeddings", int, 32768 if generation.older else 262144
    )
    section.check_positive(numbers)
    if numbers["head_dim"] % 2:
        raise section.error("head_dim", "even", numbers["head_dim"])
    if generation.older and numbers["head_dim"] * numbers["num_attention_heads"] != numbers["hidden_size"]:
        raise section.error("head_dim", "hidden_size / num_attention_heads", numbers["head_dim"])
    biased = section.get("attention_bias", bool, generation.older)
    if biased is not generation.older:
        raise section.error("attention_bias", f"{json.dumps(generation.older)} for {model_type}", biased)
    layer_types = section.get("layer_types", list, [])
    if set(map(str, layer_types)) - {"full_attention"}:
        raise section.error("layer_types", "full_attention throughout", layer_types)
    return TextConfig(
        **numbers,
        rms_norm_eps=section.get("rms_norm_eps", float, 1e-5 if generation.older else 1e-6),
        rope=_rope(section, numbers["head_dim"], generation, numbers["max_position_embeddings"]),
        tie_word_embeddings=tied,
        attention_bias=generation.older,
        qk_norm=not generation.older,
        moe=_moe(section, model_type),
    )


def _moe(section: "Section", model_type: str) -> MoeConfig | None:
    experts = section.get("num_experts", int, section.get("num_local_experts", int, None))
    if model_type != "qwen3_vl_moe":
        if experts:
            raise section.error("num_experts", f"absent or 0 for {model_type}", experts)
        return None
    if experts is None:
        raise CheckpointError(f"{section.where}: {section.name}num_experts is missing; fetch the file again.")
    numbers = {key: section.get(key, int) for key in ("num_experts_per_tok", "moe_intermediate_size")}
    section.check_positive(numbers | {"num_experts": experts})
    return MoeConfig(num_experts=experts, **numbers)


def _rope(section: "Section", head_dim: int, generation: _Generation, context: int) -> RopeConfig:
    """The decoder's rotary settings from any of the three spellings.

    `rope_theta` beside `rope_scaling` (as released), both folded into `rope_parameters` (transformers 5), or mixtures;
    a value inside one of the two objects goes before one beside them.
    """
    outer = section.get("rope_theta", float, 1e6 if generation.older else None)
    original = section.get("original_max_position_embeddings", int, None)
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        for name, value in section.get(key, dict, {}).items():
            if merged.setdefault(name, value) != value:
                raise section.error(f"{key}.{name}", f"{merged[name]} as in rope_scaling", value)
    rope = Section(merged, section.where, f"{section.name}rope_parameters.")
    theta = rope.get("rope_theta", float, outer)
    if theta is None or theta <= 0:
        raise section.error("rope_theta", "a positive number, here or in rope_parameters or rope_scaling", theta)
    sizes = rope.get("mrope_section", list, list(generation.mrope_section))
    if len(sizes) != 3 or not all(is_int(size) and size >= 0 for size in sizes):
        raise rope.error("mrope_section", "three counts (time, height, width)", sizes)
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind not in ("default", "mrope", "yarn"):
        raise rope.error("rope_type", 'one of "default", "mrope", "yarn"', kind)
    yarn = _yarn(rope, context, original) if kind == "yarn" else None
    if original is not None and yarn is None:
        raise section.error("original_max_position_embeddings", "absent where rope_type is not yarn", original)
    # The reference interleaves by generation, whatever this key says.
    only: dict[str, tuple] = {"mrope_interleaved": (None, not generation.older)}
    if yarn is None:
        only["attention_factor"] = (None, 1)
    rope.finish(_ONLY_ROPE | only)
    if generation.older:
        return RopeConfig(theta=theta, mrope_section=tuple(sizes), mrope_interleaved=False, yarn=yarn)
    # Interleaved, height takes frequencies 1, 4, ... and width 2, 5, ... below three times their section and within
    # half a head; time takes the rest. A file may name larger sections; this is what they come to.
    half = head_dim // 2
    height, width = (len(range(axis, min(3 * sizes[axis], half), 3)) for axis in (1, 2))
    return RopeConfig(
        theta=theta, mrope_section=(half - height - width, height, width), mrope_interleaved=True, yarn=yarn
    )


def _yarn(rope: "Section", context: int, original: int | None) -> YarnConfig:
    """YaRN's settings; `context` is the model's length, `original` what stands beside them, which goes first."""
    inner = rope.get("original_max_position_embeddings", int, context)
    original = inner if original is None else original
    factor = rope.get("factor", float, context / original if original > 0 else None)
    if factor is None or factor < 1:
        raise rope.error("factor", "a number of at least 1", factor)
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        truncate=rope.get("truncate", bool, True),
        **{key: rope.get(key, float, None) for key in ("attention_factor", "mscale", "mscale_all_dim")},
    )


def _vision(section: "Section", model_type: str) -> VisionConfig:
    generation = _GENERATIONS[model_type]
    numbers = _vision_numbers(section, model_type)
    section.check_positive(numbers)
    lists = {}
    for key in ("fullatt_block_indexes",) if model_type == "qwen2_5_vl" else ("deepstack_visual_indexes",):
        if model_type == "qwen2_vl":
            break
        indexes = section.get(key, list, *([[7, 15, 23, 31]] if generation.older else []))
        if not all(is_int(i) for i in indexes) or indexes != sorted(set(indexes)):
            raise section.error(key, "increasing layer numbers", indexes)
        lists[key] = tuple(indexes)
    usual = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu"}.get(model_type, "gelu_pytorch_tanh")
    act = section.get("hidden_act", str, usual)
    acts = ("gelu_pytorch_tanh", "gelu", "silu", "quick_gelu")
    if act not in acts:
        raise section.error("hidden_act", f"one of {', '.join(acts)}", act)
    head_dim = section.get("head_dim", int, None)
    if head_dim is not None and head_dim * numbers["num_heads"] != numbers["hidden_size"]:
        raise section.error("head_dim", "hidden_size / num_heads", head_dim)
    theta = section.get("rope_theta", float, 10000.0)
    if theta != 10000:
        raise section.error("rope_theta", "10000", theta)
    Section(section.get("rope_parameters", dict, {}), section.where, f"{section.name}rope_parameters.").finish(
        _ONLY_VISION_ROPE
    )
    sizes: dict[str, Any] = {"num_position_embeddings": 0} | numbers | lists
    return VisionConfig(
        **sizes,
        hidden_act=act,
        norm=generation.norm,
        gated_mlp=generation.gated_mlp,
        patch_bias=not generation.older,
    )


def _vision_numbers(section: "Section", model_type: str) -> dict[str, int]:
    """Sizes of the tower, by their names in `VisionConfig`; hub files of the older generations leave defaults out."""
    older = _GENERATIONS[model_type].older
    defaults = _defaults(VisionConfig)
    numbers = {key: section.get(key, int, *default) for key, default in _VISION_SIZES[model_type].items()}
    optional = ("temporal_patch_size", "spatial_merge_size", "in_channels")
    numbers |= {key: section.get(key, int, defaults[key]) for key in optional}
    numbers["patch_size"] = section.square("patch_size", 14 if older else defaults["patch_size"])
    if model_type == "qwen2_vl":
        # Here `hidden_size` is the decoder's width, and the tower's is `embed_dim`.
        numbers["out_hidden_size"], numbers["hidden_size"] = numbers["hidden_size"], numbers.pop("embed_dim")
        numbers["intermediate_size"] = numbers["hidden_size"] * numbers.pop("mlp_ratio")
    return numbers


_QWEN3_SIZES: dict[str, tuple[int, ...]] = {
    "depth": (),
    "hidden_size": (),
    "intermediate_size": (),
    "num_heads": (),
    "out_hidden_size": (),
    "num_position_embeddings": (2304,),
}
# Keys of vision_config that hold sizes, each with its default where the reference has one that files rely on.
_VISION_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen2_vl": {
        "depth": (32,),
        "embed_dim": (1280,),
        "hidden_size": (3584,),
        "mlp_ratio": (4,),
        "num_heads": (16,),
    },
    "qwen2_5_vl": {
        "depth": (32,),
        "hidden_size": (3584,),
        "intermediate_size": (3420,),
        "num_heads": (16,),
        "out_hidden_size": (3584,),
        "window_size": (112,),
    },
    "qwen3_vl": _QWEN3_SIZES,
    "qwen3_vl_moe": _QWEN3_SIZES,
}


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def config_to_json(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers 5 would write for this model; `dtype` is that of the stored tensors.

    Raises:
      CheckpointError: a shape that the public layout cannot say.
    """
    if config.model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"model_type {config.model_type!r} cannot be written; supported: {', '.join(MODEL_TYPES)}."
        )
    values = {
        "architectures": [_GENERATIONS[config.model_type].architecture],
        "model_type": config.model_type,
        "dtype": dtype,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **{key: getattr(config, key) for key in _TOKEN_IDS},
        "text_config": dict(sorted(_text_to_json(config).items())),
        "vision_config": dict(sorted(_vision_to_json(config).items())),
    }
    # What comes back must be what was given: a field that this layout has no key for would be lost in silence.
    for (name, mine), (_, read) in zip(_flat(config), _flat(config_from_json(values)), strict=True):
        if mine != read and name != "eos_token_ids":
            raise CheckpointError(
                f"{name}={mine} cannot be written: {config.model_type} has {read} in the public layout; keep such a "
                "model in native checkpoints."
            )
    return values


def _flat(config, prefix: str = "") -> list[tuple[str, Any]]:
    """Every field by its dotted name; sections that may be absent as they are."""
    fields = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        nested = name in ("text", "vision", "text.rope")
        fields += _flat(value, f"{name}.") if nested else [(name, value)]
    return fields


def _text_to_json(config: QwenVLConfig) -> dict[str, Any]:
    t, older = config.text, _GENERATIONS[config.model_type].older
    left_out = {"tie_word_embeddings", "rope", "moe", "qk_norm", "attention_bias"} | ({"head_dim"} if older else set())
    text = {field.name: getattr(t, field.name) for field in dataclasses.fields(t) if field.name not in left_out}
    text |= {"model_type": f"{config.model_type}_text", "hidden_act": "silu", "attention_dropout": 0.0}
    rope = {
        "rope_type": "default" if t.rope.yarn is None else "yarn",
        "rope_theta": t.rope.theta,
        "mrope_section": list(t.rope.mrope_section),
    }
    if t.rope.yarn is not None:
        usual = _defaults(YarnConfig)
        rope |= {key: value for key, value in dataclasses.asdict(t.rope.yarn).items() if value != usual[key]}
    if older:
        # The reference would put the public ids for missing ones; generation_config.json holds those of this model.
        text |= {"use_sliding_window": False, "bos_token_id": None, "eos_token_id": None}
    else:
        text["attention_bias"] = False
        rope["mrope_interleaved"] = True
    if t.moe is not None:
        # The number of experts under both its names: released files have the first, transformers 5 writes the second.
        # (`norm_topk_prob` is in released files too, and other tools read it.)
        text |= dataclasses.asdict(t.moe) | {"num_local_experts": t.moe.num_experts}
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return text | {"rope_parameters": rope}


def _vision_to_json(config: QwenVLConfig) -> dict[str, Any]:
    v, model_type = config.vision, config.model_type
    left_out = {"norm", "gated_mlp", "patch_bias", "window_size", "fullatt_block_indexes", "deepstack_visual_indexes"}
    vision = {field.name: getattr(v, field.name) for field in dataclasses.fields(v) if field.name not in left_out}
    vision["model_type"] = f"{model_type}_vision"
    if not _GENERATIONS[model_type].older:
        return vision | {"deepstack_visual_indexes": list(v.deepstack_visual_indexes)}
    del vision["num_position_embeddings"]
    if model_type == "qwen2_5_vl":
        seconds = config.tokens_per_second
        if seconds is None:
            raise CheckpointError("tokens_per_second is not set, which a Qwen2.5-VL needs; the public models have 2.")
        return vision | {
            "window_size": v.window_size,
            "fullatt_block_indexes": list(v.fullatt_block_indexes),
            "tokens_per_second": int(seconds) if seconds == int(seconds) else seconds,
        }
    width, inner = v.hidden_size, vision.pop("intermediate_size")
    if inner % width:
        raise CheckpointError(
            f"vision.intermediate_size={inner} cannot be written: {model_type} says it as a whole multiple of "
            f"hidden_size={width}."
        )
    return vision | {"embed_dim": width, "hidden_size": vision.pop("out_hidden_size"), "mlp_ratio": inner // width}
