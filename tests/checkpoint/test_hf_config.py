"""config.json: every key that matters is read, every key that would matter is refused."""

import copy
import dataclasses
import json

import pytest

from qwenvl_jax.checkpoint.hf_config import config_from_json, config_to_json, read_config
from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.errors import CheckpointError
from tests.checkpoint.shape import TINY


@pytest.fixture
def values():
    """The contents of a config.json, as JSON gives them back."""
    return json.loads(json.dumps(config_to_json(TINY, "float32")))


def read(values):
    return dataclasses.replace(config_from_json(values), eos_token_ids=TINY.eos_token_ids)


def test_written_and_read_back(values):
    assert read(values) == TINY


def test_every_field_has_its_key(values):
    """Changing any number of the file changes the configuration, and every field is reached by some key."""
    numbers = {
        **{("text_config", f.name): f.name for f in dataclasses.fields(TextConfig) if f.name != "rope"},
        **{("vision_config", f.name): f.name for f in dataclasses.fields(VisionConfig)},
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
    "unknown model type": ({"model_type": "llava"}, "model_type 'llava' is not supported; supported: qwen3_vl"),
    "no model type": ({"model_type": None}, "model_type None is not supported"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "yarn": ({"text_config.rope_parameters.rope_type": "yarn"}, 'rope_parameters.rope_type = "yarn" is not supported'),
    "yarn's factor": ({"text_config.rope_parameters.factor": 3.0}, "rope_parameters.factor is not a key that is known"),
    "chunked": ({"text_config.rope_parameters.mrope_interleaved": False}, "mrope_interleaved = false is not supported"),
    "partial": ({"text_config.partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "theta": ({"text_config.rope_parameters.rope_theta": None}, "rope_theta must be a positive number"),
    "sections": ({"text_config.rope_parameters.mrope_section": [1, 2]}, "mrope_section must be three counts"),
    "two thetas": ({"text_config.rope_scaling": {"rope_theta": 5.0}}, "rope_parameters.rope_theta must be 5.0"),
    "activation": ({"text_config.hidden_act": "gelu"}, 'text_config.hidden_act = "gelu" is not supported, only "silu"'),
    "tower's activation": ({"vision_config.hidden_act": "relu"}, "vision_config.hidden_act must be one of"),
    "bias": ({"text_config.attention_bias": True}, "text_config.attention_bias = true"),
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
