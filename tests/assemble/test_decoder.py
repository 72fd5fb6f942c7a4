"""The decoder of a result against the language model it came from, run by the reference."""

import dataclasses

import numpy as np
import pytest
import torch

from qwenvl_jax.assemble import decoder
from qwenvl_jax.assemble.build import assemble
from qwenvl_jax.checkpoint import hf_config
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.presets import preset
from tests.assemble.ingredients import EXPERT_FFN, EXPERTS, LAYERS, H, load_reference, load_tensors, write_qwen3

TEXT = [{"role": "user", "content": "when does the blue circle leave the picture, and what is left then?"}]


YARN = {"rope_type": "yarn", "rope_theta": 30_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# (kind, settings): `square` experts are those whose axes cannot be told apart, gate_up's or down's.
SOURCES = {
    "untied": {},
    "tied": {"tied": True},
    "yarn": {"rope_parameters": YARN},
    "moe": {"moe": True},
    "square gate_up": {"moe": True, "moe_intermediate_size": H // 2},
    "square down": {"moe": True, "moe_intermediate_size": H},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_text_alone_has_the_language_model_s_logits(kind, ingredients, tmp_path):
    """Ours and the reference's reading of the result, both within 1e-4 of the source."""
    folder = tmp_path / "text"
    source = write_qwen3(folder, **SOURCES[kind])
    out = tmp_path / "model"
    assemble(ingredients["siglip2"][0], folder, out, dtype="float32", side=4)
    processor = Processor.from_pretrained(out)
    batch = processor([TEXT])
    tokens = torch.from_numpy(np.asarray(batch.tokens)).long()
    with torch.no_grad():
        expected = source(input_ids=tokens).logits.numpy()
        reference = load_reference(out)(input_ids=tokens).logits.numpy()
    ours = np.asarray(QwenVL.from_pretrained(out, dtype="float32")(batch))
    assert np.abs(expected).max() > 0.5 and expected.shape[1] > 16
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(reference, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def sparse(ingredients, tmp_path_factory):
    out = tmp_path_factory.mktemp("moe") / "model"
    assemble(ingredients["siglip"][0], ingredients["moe"][0], out, dtype="float32", side=4)
    return out


def test_experts_are_stacked_as_the_hub_has_them(sparse, ingredients):
    source = load_tensors(ingredients["moe"][0])
    files = load_tensors(sparse)
    for i in range(LAYERS):
        ours, theirs = f"model.language_model.layers.{i}.mlp.", f"model.layers.{i}.mlp."
        assert np.array_equal(files[f"{ours}gate.weight"], source[f"{theirs}gate.weight"])
        gate_up, down = files[f"{ours}experts.gate_up_proj"], files[f"{ours}experts.down_proj"]
        assert gate_up.shape == (EXPERTS, H, 2 * EXPERT_FFN) and down.shape == (EXPERTS, EXPERT_FFN, H)
        for e in range(EXPERTS):
            one = {name: source[f"{theirs}experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")}
            assert np.array_equal(gate_up[e, :, :EXPERT_FFN], one["gate"].T)
            assert np.array_equal(gate_up[e, :, EXPERT_FFN:], one["up"].T)
            assert np.array_equal(down[e], one["down"].T)


@pytest.mark.parametrize(
    ("head_dim", "section"), [(128, [24, 20, 20]), (64, [12, 10, 10]), (12, [4, 1, 1]), (16, [4, 2, 2])]
)
def test_sections(head_dim, section):
    assert decoder.mrope_section(head_dim) == section


def test_public_sizes_have_the_public_configs():
    """Qwen3-4B, as its public config.json says it, gives the preset's decoder but for base and reach of positions."""

    class Folder:
        where = "config.json"
        config = {  # noqa: RUF012
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
            "initializer_range": 0.02, "intermediate_size": 9728, "max_position_embeddings": 40960,
            "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        }  # fmt: skip

    wanted = preset("qwen3_vl_4b")
    text = decoder.text_config(Folder())
    tied = text.pop("tie_word_embeddings")
    values = hf_config.config_to_json(wanted, "bfloat16") | {"text_config": text, "tie_word_embeddings": tied}
    found = hf_config.config_from_json(values).text
    rope = dataclasses.replace(wanted.text.rope, theta=1e6)
    assert found == dataclasses.replace(wanted.text, rope=rope, max_position_embeddings=40960)
