"""Eight-bit checkpoints: the numbers behind the bytes, which kinds are read, and which are refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qwenvl_jax.checkpoint import fp8
from qwenvl_jax.checkpoint.safetensors_file import read_header
from qwenvl_jax.checkpoint.source import PublicSource
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.models import pretrained
from tests.checkpoint.shape import TINY_MOE, random_model

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
KERNELS = ("_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def quantize(weight: np.ndarray, block: tuple[int, int], scale_dtype=np.float32):
    """(codes, scales): every block scaled so that its largest value is the largest of e4m3, 448."""
    rows, columns = weight.shape
    scales = np.empty((-(-rows // block[0]), -(-columns // block[1])), scale_dtype)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(weight[part]).max() / 448
            codes[part] = (weight[part] / np.float32(scales[i, j])).astype(codes.dtype)
    return codes, scales


def numbers(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """What they stand for, each number by itself."""
    out = np.empty(codes.shape, np.float32)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = np.float32(codes[i, j]) * np.float32(scales[i // block[0], j // block[1]])
    return out.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(8, 16), (24, 48), (21, 35), (3, 5)])
def test_numbers(shape, scale_dtype):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, scales = quantize(weight, (8, 16), scale_dtype)
    found = fp8.dequantize(codes, scales, (8, 16))
    assert found.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found, numbers(codes, scales, (8, 16)))
    assert np.allclose(found.astype(np.float32), weight, atol=0.01, rtol=0.07)
    for start, stop in ((0, 2), (1, shape[0]), (5, 5), (7, 19)):
        stop = min(stop, shape[0])
        if start <= stop:
            some = scales[start // 8 : -(-stop // 8)]
            assert np.array_equal(fp8.dequantize(codes[start:stop], some, (8, 16), first_row=start), found[start:stop])


def test_every_code():
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    found = fp8.dequantize(codes.view(ml_dtypes.float8_e4m3fn), np.full((1, 2), 3, np.float32), (128, 128))
    with np.errstate(invalid="ignore"):
        expected = (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 3).astype(ml_dtypes.bfloat16)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.reference
def test_the_reference_gives_the_same_numbers():
    """transformers 5.23.0, on a tensor that its blocks divide and on stacked experts."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(1)
    codes = rng.integers(0, 127, (3, 256, 384), np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 2, 3), np.float32)
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), torch.from_numpy(scales), torch.bfloat16
    )
    ours = fp8.dequantize(codes, scales, (128, 128))
    assert np.array_equal(ours.view(np.uint16), theirs.view(torch.uint16).numpy())
    assert np.array_equal(fp8.dequantize(codes[1], scales[1], (128, 128)), ours[1])


@pytest.fixture
def quantized(single):
    """The tiny model in FP8, and the numbers that its kernels stand for."""
    stored, expected = load_file(single / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith(KERNELS) and ".layers." in name]:
        codes, scales = quantize(stored[name], (8, 16))
        stored |= {name: codes, f"{name}_scale_inv": scales}
        expected[name] = numbers(codes, scales, (8, 16))
    save_file(stored, single / "model.safetensors")
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return single, expected


@pytest.mark.support("FP8", model_type="qwen3_vl")
def test_read_into_bfloat16(quantized, tmp_path):
    folder, expected = quantized
    model = pretrained.load(folder, dtype="bfloat16")
    assert model.config.eos_token_ids == (45, 46)
    pretrained.save(model, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(expected) == 21
    assert all(np.array_equal(plain[name], value) for name, value in expected.items())
    wide = pretrained.load(folder, dtype="float32")
    for key, value in nnx.to_flat_state(nnx.state(wide, nnx.Param)):
        half = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))[key].get_value()
        assert np.array_equal(np.asarray(value.get_value()).astype(ml_dtypes.bfloat16), half)


@pytest.mark.support("FP8", model_type="qwen3_vl_moe")
def test_experts_read_into_bfloat16(tmp_path):
    """Stacked as the releases have them, each with a table of scales; routers are not quantized."""
    folder, expected = tmp_path / "quantized", {}
    pretrained.save(random_model(TINY_MOE), folder)
    stored = load_file(folder / "model.safetensors")
    for name in [n for n in stored if ".layers." in n and n.endswith(("_proj", "_proj.weight"))]:
        stacked = stored[name].reshape(-1, *stored[name].shape[-2:])
        parts = [quantize(one, (8, 16)) for one in stacked]
        lead = stored[name].shape[:-2]
        codes, scales = (np.stack(side).reshape(*lead, *side[0].shape) for side in zip(*parts, strict=True))
        expected[name] = np.stack([numbers(*one, (8, 16)) for one in parts]).reshape(stored[name].shape)
        stored |= {name: codes, f"{name}_scale_inv": scales}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    assert len(expected) == TINY_MOE.text.num_hidden_layers * 6
    pretrained.save(pretrained.load(folder, dtype="bfloat16"), tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(np.array_equal(plain[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"quant_method": "awq"},
            "weights quantized by AWQ are not read; use the model's release in bfloat16 or in FP8",
        ),
        ({"quant_method": "gptq"}, "weights quantized by GPTQ are not read"),
        ({"quant_method": None, "load_in_4bit": True}, "are not read; use the model's release"),
        ({"weight_block_size": None}, "weight_block_size must be two counts"),
        ({"weight_block_size": [128]}, "weight_block_size must be two counts"),
        ({"weight_block_size": [0, 128]}, "weight_block_size must be two counts"),
        ({"fmt": "e5m2"}, "fmt must be e4m3"),
        ({"activation_scheme": "static"}, "activation_scheme must be dynamic"),
        ({"wbits": 3}, "quantization_config.wbits is not a key that is known here"),
    ],
)
def test_other_kinds_are_refused_by_config(quantized, change, words):
    folder, _ = quantized
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        pretrained.load(folder)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_a_section_that_is_no_object():
    with pytest.raises(CheckpointError, match="must be an object"):
        fp8.read_quantization({"quantization_config": "fp8"})
    assert fp8.read_quantization({"quantization_config": None}) is None
    assert fp8.read_quantization({"text_config": {"quantization_config": CONFIG}}) == fp8.Fp8((8, 16))


@pytest.mark.parametrize(("end", "kind"), [("qweight", "AWQ or GPTQ"), ("qzeros", "AWQ or GPTQ"), ("g_idx", "GPTQ")])
def test_other_kinds_are_refused_by_name(single, end, kind):
    stored = load_file(single / "model.safetensors")
    stored[f"model.language_model.layers.0.mlp.up_proj.{end}"] = np.zeros((2, 2), np.int32)
    save_file(stored, single / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"up_proj.{end}: weights quantized by {kind} are not read; use the model"
    ):
        pretrained.load(single)


def test_faults_of_scales(quantized):
    folder, _ = quantized
    stem = "model.language_model.layers.0.self_attn."
    # (The library's NumPy form does not know the type.)
    good = {name: tensor.read() for name, tensor in read_header(folder / "model.safetensors")[0].items()}

    def refused(changes, *words):
        stored = {name: value for name, value in (good | changes).items() if value is not None}
        save_file(stored, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            PublicSource(folder)
        assert all(word in str(caught.value) for word in words), caught.value

    scale = f"{stem}q_proj.weight_scale_inv"
    refused({scale: None}, f"{stem}q_proj.weight is F8_E4M3 without scale_inv")
    refused({scale: good[scale][1:]}, f"{scale} is F32 [7, 2], not F32/BF16 [8, 2]")
    refused({scale: good[scale].astype(np.float64)}, f"{scale} is F64 [8, 2]")
    refused({f"{stem}k_norm.weight_scale_inv": np.ones((1, 1), np.float32)}, "k_norm.weight_scale_inv")
    codes = good[f"{stem}v_proj.weight"]
    refused({f"{stem}v_proj.weight": codes.astype(ml_dtypes.float8_e5m2)}, "v_proj.weight is F8_E5M2, not one of")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused({}, "q_proj.weight is F8_E4M3, not one of F64/F32/F16/BF16")
