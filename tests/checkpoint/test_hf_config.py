"""config.json: every key that matters is read, every key that would matter is refused."""

import copy
import dataclasses
import json

import pytest

from qwenvl_jax.checkpoint.hf_config import config_from_json, config_to_json, read_config
from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.errors import CheckpointError
from tests.checkpoint.shape import GENERATIONS, TINY, TINY_MOE, TINY_QWEN2, TINY_QWEN2_5, YARN, with_yarn
from tests.support import generations


@pytest.fixture
def values():
    """The contents of a config.json, as JSON gives them back."""
    return json.loads(json.dumps(config_to_json(TINY, "float32")))


def read(values):
    return dataclasses.replace(config_from_json(values), eos_token_ids=TINY.eos_token_ids)


@pytest.mark.support("loads")
@pytest.mark.parametrize("name", generations(GENERATIONS))
def test_written_and_read_back(name):
    values = json.loads(json.dumps(config_to_json(GENERATIONS[name], "float32")))
    assert read(values) == GENERATIONS[name]


def test_every_field_has_its_key(values):
    """Changing any number of the file changes the configuration, and every field is reached by some key.

    The fields left out follow from the generation; `test_written_and_read_back` has them.
    """
    text = {f.name for f in dataclasses.fields(TextConfig)} - {"rope", "attention_bias", "qk_norm", "moe"}
    vision = {f.name for f in dataclasses.fields(VisionConfig)}
    vision -= {"norm", "gated_mlp", "patch_bias", "window_size", "fullatt_block_indexes"}
    numbers = {
        **{("text_config", name): name for name in text},
        **{("vision_config", name): name for name in vision},
        **{(f.name,): f.name for f in dataclasses.fields(QwenVLConfig) if f.name.endswith("_token_id")},
    }
    other = {
        "text_config.num_key_value_heads": 3,
        "vision_config.hidden_size": 48,
        "vision_config.num_heads": 3,
        "vision_config.num_position_embeddings": 16,
        "vision_config.deepstack_visual_indexes": [0, 3],
        "vision_config.hidden_act": "gelu",
        "tie_word_embeddings": True,
        "text_config.num_attention_heads": 4,
    }
    del numbers["text_config", "tie_word_embeddings"]
    numbers["tie_word_embeddings",] = "tie_word_embeddings"
    for path in numbers:
        changed = copy.deepcopy(values)
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = other.get(".".join(path)) or place[path[-1]] + 2
        if path[-1] in ("out_hidden_size", "hidden_size") and path != ("vision_config", "hidden_size"):
            changed["text_config"]["hidden_size"] = changed["vision_config"]["out_hidden_size"] = 22
        if path[-1] == "head_dim":
            changed["text_config"]["rope_parameters"]["mrope_section"] = [2, 2, 2]
        assert read(changed) != TINY, path


OLDER_KEYS = {
    "qwen2_vl": {
        "vision_config.embed_dim": 48,
        "vision_config.mlp_ratio": 3,
        "vision_config.depth": 5,
        "vision_config.num_heads": 3,
        "vision_config.patch_size": 7,
    },
    "qwen2_5_vl": {
        "vision_config.intermediate_size": 20,
        "vision_config.window_size": 24,
        "vision_config.fullatt_block_indexes": [0],
        "vision_config.tokens_per_second": 25,
    },
    "qwen3_vl_moe": {
        "text_config.num_experts": 7,
        "text_config.num_experts_per_tok": 3,
        "text_config.moe_intermediate_size": 20,
    },
}


@pytest.mark.parametrize(("model_type", "path"), [(m, path) for m, keys in OLDER_KEYS.items() for path in keys])
def test_keys_of_the_other_generations(model_type, path):
    before = GENERATIONS[model_type]
    values = config_to_json(before, "float32")
    section, key = path.split(".")
    assert values[section][key] != OLDER_KEYS[model_type][path]
    values[section][key] = OLDER_KEYS[model_type][path]
    values[section].pop("num_local_experts", None)
    assert read(values) != before


def hub_file(config):
    """A config.json as the older generations were released: the decoder's keys at the top level."""
    values = config_to_json(config, "bfloat16")
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"], values["dtype"], text["use_sliding_window"]
    values |= text
    values |= {"rope_theta": rope["rope_theta"], "vision_token_id": 151654, "torch_dtype": "bfloat16"}
    values |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "use_sliding_window": False}
    values["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 4, "model_type": values["model_type"]}
    return values


@pytest.mark.parametrize("config", [TINY_QWEN2, TINY_QWEN2_5], ids=["qwen2_vl", "qwen2_5_vl"])
def test_older_files_as_released(config):
    values = hub_file(config)
    assert read(values) == config
    assert read(values | {"rope_scaling": {**values["rope_scaling"], "rope_type": "default"}}) == config
    # Files saved by transformers 4.5 repeat the decoder's keys in a section of their own.
    assert read(values | {"text_config": config_to_json(config, "bfloat16")["text_config"]}) == config
    with pytest.raises(CheckpointError, match="at the top level and those in text_config differ"):
        read(values | {"rope_theta": 7.0, "text_config": config_to_json(config, "bfloat16")["text_config"]})
    with pytest.raises(CheckpointError, match="hiden_size is not a key that is known here; did you mean hidden_size"):
        read(values | {"hiden_size": 3})
    with pytest.raises(CheckpointError, match="head_dim must be hidden_size / num_attention_heads, but is 16"):
        read(values | {"head_dim": 16})


def test_defaults_of_older_files_are_the_reference_s():
    """What hub files leave out is what the reference's classes have."""
    values = hub_file(TINY_QWEN2) | {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    values["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    values["vision_config"] = {"model_type": "qwen2_vl"}
    for key in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "rope_theta"):
        del values[key]
    config = read(values)
    v = config.vision
    assert (v.depth, v.hidden_size, v.num_heads, v.intermediate_size, v.out_hidden_size) == (32, 1280, 16, 5120, 3584)
    assert (v.patch_size, v.hidden_act) == (14, "quick_gelu")
    assert (config.text.rms_norm_eps, config.text.max_position_embeddings) == (1e-5, 32768)
    assert (config.text.rope.theta, config.text.tie_word_embeddings) == (1e6, False)


YARN_SPELLINGS = {
    "rope_parameters": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 12_345.0,
            "mrope_section": [2, 2, 1],
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "rope_scaling": {
        "rope_theta": 12_345.0,
        "rope_scaling": {
            "type": "yarn",
            "mrope_section": [2, 2, 1],
            "factor": 4,
            "original_max_position_embeddings": 128,
        },
    },
    "original beside": {
        "rope_theta": 12_345.0,
        "original_max_position_embeddings": 128,
        "rope_scaling": {"rope_type": "yarn", "mrope_section": [2, 2, 1], "factor": 4.0},
    },
    "factor from the lengths": {
        "rope_theta": 12_345.0,
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "yarn", "mrope_section": [2, 2, 1], "original_max_position_embeddings": 128},
    },
}


@pytest.mark.parametrize("spelling", YARN_SPELLINGS)
@pytest.mark.parametrize("base", [TINY, TINY_QWEN2_5, TINY_MOE], ids=["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_spellings_of_yarn(base, spelling):
    values = config_to_json(base, "float32")
    del values["text_config"]["rope_parameters"]
    values["text_config"] |= YARN_SPELLINGS[spelling]
    assert read(values) == with_yarn(base)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_fast", 16.0),
        ("beta_slow", 2.0),
        ("truncate", False),
        ("attention_factor", 1.5),
        ("mscale", 0.7),
        ("mscale_all_dim", 0.5),
    ],
)
def test_every_setting_of_yarn_is_read_and_written(key, value):
    config = with_yarn(TINY, dataclasses.replace(YARN, **{key: value}))
    values = config_to_json(config, "float32")
    assert values["text_config"]["rope_parameters"][key] == value
    assert read(values) == config


def test_without_an_original_length_it_is_the_model_s():
    values = config_to_json(with_yarn(TINY), "float32")
    del values["text_config"]["rope_parameters"]["original_max_position_embeddings"]
    assert read(values).text.rope.yarn.original_max_position_embeddings == TINY.text.max_position_embeddings


SECTION = {"mrope_section": [2, 2, 1]}
SPELLINGS = {
    "released": {"rope_theta": 9.0, "rope_scaling": {**SECTION, "rope_type": "default", "mrope_interleaved": True}},
    "type mrope": {"rope_theta": 9, "rope_scaling": {**SECTION, "type": "mrope", "mrope_interleaved": True}},
    "folded": {"rope_parameters": {**SECTION, "rope_theta": 9.0, "rope_type": "default", "mrope_interleaved": True}},
    "theta within rope_scaling": {"rope_scaling": {**SECTION, "rope_theta": 9.0}},
    "both objects": {"rope_scaling": SECTION, "rope_parameters": {"rope_theta": 9.0}},
    "inner theta goes first": {"rope_theta": 7.0, "rope_parameters": {**SECTION, "rope_theta": 9.0}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_rope(values, spelling):
    del values["text_config"]["rope_parameters"]
    values["text_config"] |= SPELLINGS[spelling]
    assert read(values).text.rope == RopeConfig(theta=9.0, mrope_section=(2, 2, 1), mrope_interleaved=True)


def test_sections_larger_than_a_head_are_what_they_come_to(values):
    """The reference takes heights 1, 4 and widths 2 of 5 frequencies from [24, 20, 20]; time has the rest."""
    values["text_config"]["rope_parameters"]["mrope_section"] = [24, 20, 20]
    assert read(values).text.rope.mrope_section == (2, 2, 1)


def test_patch_size_as_a_pair(values):
    values["vision_config"]["patch_size"] = [4, 4]
    assert read(values) == TINY


def test_neutral_keys_change_nothing(values):
    values |= {"torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": 5, "sliding_window": None}
    values["text_config"] |= {"initializer_range": 1.0, "bos_token_id": 3, "sliding_window": 4096}
    values["vision_config"] |= {
        "model_type": "qwen3_vl",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    }
    assert read(values) == TINY


REFUSED = {
    "unknown model type": ({"model_type": "llava"}, "model_type 'llava' is not supported; supported: qwen2_vl, "),
    "no model type": ({"model_type": None}, "model_type None is not supported"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "longrope": ({"text_config.rope_parameters.rope_type": "longrope"}, 'rope_type must be one of "default", "mrope"'),
    "yarn shrinks": (
        {"text_config.rope_parameters.rope_type": "yarn", "text_config.rope_parameters.factor": 0.5},
        "factor must be a number of at least 1",
    ),
    "yarn's factor": ({"text_config.rope_parameters.factor": 3.0}, "rope_parameters.factor is not a key that is known"),
    "chunked": ({"text_config.rope_parameters.mrope_interleaved": False}, "mrope_interleaved = false is not supported"),
    "partial": ({"text_config.partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "theta": ({"text_config.rope_parameters.rope_theta": None}, "rope_theta must be a positive number"),
    "sections": ({"text_config.rope_parameters.mrope_section": [1, 2]}, "mrope_section must be three counts"),
    "two thetas": ({"text_config.rope_scaling": {"rope_theta": 5.0}}, "rope_parameters.rope_theta must be 5.0"),
    "activation": ({"text_config.hidden_act": "gelu"}, 'text_config.hidden_act = "gelu" is not supported, only "silu"'),
    "tower's activation": ({"vision_config.hidden_act": "relu"}, "vision_config.hidden_act must be one of"),
    "bias": ({"text_config.attention_bias": True}, "text_config.attention_bias must be false for qwen3_vl"),
    "window": ({"text_config.use_sliding_window": True}, "use_sliding_window"),
    "layer types": ({"text_config.layer_types": ["sliding_attention"]}, "layer_types must be full_attention"),
    "dropout": ({"text_config.attention_dropout": 0.1}, "attention_dropout"),
    "experts": ({"text_config.num_experts": 8}, "num_experts"),
    "tower's rope": ({"vision_config.rope_parameters": {"rope_theta": 500.0}}, "rope_theta = 500.0 is not supported"),
    "tower's head": ({"vision_config.head_dim": 16}, "vision_config.head_dim must be hidden_size / num_heads"),
    "order of taps": ({"vision_config.deepstack_visual_indexes": [3, 1]}, "must be increasing"),
    "tap beyond": ({"vision_config.deepstack_visual_indexes": [9]}, r"names layers \[9\]"),
    "missing": ({"text_config.hidden_size": None}, "text_config.hidden_size is missing"),
    "no tower": ({"vision_config": None}, "vision_config is missing"),
    "not a number": ({"text_config.hidden_size": "20"}, 'text_config.hidden_size must be an integer, but is "20"'),
    "no bool": ({"text_config.num_hidden_layers": True}, "must be an integer, but is true"),
    "zero heads": ({"text_config.num_key_value_heads": 0}, "must be a positive integer, but is 0"),
    "no layers": ({"text_config.num_hidden_layers": -2}, "num_hidden_layers must be a positive integer, but is -2"),
    "odd head": ({"text_config.head_dim": 11}, "head_dim must be even, but is 11"),
    "widths": ({"vision_config.out_hidden_size": 24}, "vision.out_hidden_size=24 must equal"),
    "unknown key": (
        {"text_config.hiden_size": 3},
        "hiden_size is not a key that is known here; did you mean hidden_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(values, case):
    changes, message = REFUSED[case]
    for path, value in changes.items():
        *place, key = path.split(".")
        target = values
        for part in place:
            target = target[part]
        target[key] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        config_from_json(values, "here/config.json")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here/config.json")


def test_what_the_layout_cannot_say_is_not_written():
    rope = dataclasses.replace(TINY.text.rope, mrope_interleaved=False)
    chunked = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, rope=rope))
    with pytest.raises(CheckpointError, match="mrope_interleaved=False cannot be written"):
        config_to_json(chunked, "float32")
    with pytest.raises(CheckpointError, match="model_type 'other' cannot be written"):
        config_to_json(dataclasses.replace(TINY, model_type="other"), "float32")


def test_files(single):
    assert read_config(single) == TINY
    generation = single / "generation_config.json"
    generation.write_text('{"eos_token_id": 7}')
    assert read_config(single).eos_token_ids == (7,)
    generation.write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match="eos_token_id must hold token ids"):
        read_config(single)
    generation.unlink()
    assert read_config(single).eos_token_ids == ()
    (single / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(single)
    (single / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        read_config(single)
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(single)
