"""Checkpoints in eight-bit floating point: what `quantization_config` may say, and the numbers behind the bytes.

A matrix is stored as float8 e4m3 beside a matrix of scales, one for each block of 128 by 128, ragged at the edges.
In spite of its name, `weight_scale_inv` multiplies: W = fp8 * scale. Weights are read into bfloat16: the product in
float32, rounded once. Whoever reads one so computes in bfloat16, not in eight bits.

Source: the releases of Qwen3-VL in FP8 and the reference's `integrations/finegrained_fp8.py`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qwenvl_jax.errors import CheckpointError

SCALE = "_scale_inv"  # what the name of a scale adds to that of its tensor
STORED = "F8_E4M3"
SCALES = ("F32", "BF16")
_NEUTRAL = {"activation_scheme", "modules_to_not_convert", "ignored_layers", "quant_method", "fmt", "weight_block_size"}
_NEUTRAL |= {"dequantize", "scale_fmt"}
_OTHERS = {"qweight": "AWQ or GPTQ", "qzeros": "AWQ or GPTQ", "g_idx": "GPTQ"}
_REMEDY = "use the model's release in bfloat16 or in FP8"
_ROWS = 128  # of a matrix, turned into numbers at a time


@dataclasses.dataclass(frozen=True)
class Fp8:
    """How weights are quantized.

    Attributes:
      block: rows and columns that share a scale.
    """

    block: tuple[int, int] = (128, 128)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor (..., rows, columns)."""
        rows, columns = self.block
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


def read_quantization(values: Mapping[str, Any], where: str = "config.json") -> Fp8 | None:
    """What a config.json says of quantization; None if its weights are not quantized.

    Args:
      values: the contents of the file.
      where: names it in errors.

    Raises:
      CheckpointError: a method that is not read here, such as AWQ or GPTQ, or FP8 of another kind.
    """
    section = values.get("quantization_config")
    if section is None and isinstance(values.get("text_config"), Mapping):
        section = values["text_config"].get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where}: quantization_config must be an object, but is {json.dumps(section)}.")
    method = str(section.get("quant_method", section.get("load_in_4bit") and "bitsandbytes"))
    if method != "fp8":
        raise CheckpointError(f"{where}: weights quantized by {method.upper()} are not read; {_REMEDY}.")
    block = section.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise _only(where, "weight_block_size", "two counts such as [128, 128]", block)
    if section.get("fmt", "e4m3") != "e4m3":
        raise _only(where, "fmt", "e4m3", section["fmt"])
    if section.get("activation_scheme", "dynamic") != "dynamic":
        raise _only(where, "activation_scheme", "dynamic", section["activation_scheme"])
    odd = sorted(set(section) - _NEUTRAL)
    if odd:
        raise CheckpointError(
            f"{where}: quantization_config.{odd[0]} is not a key that is known here; {_REMEDY}, or remove it if it "
            "does not change what the weights mean."
        )
    return Fp8((block[0], block[1]))


def _only(where: str, key: str, expected: str, got: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: quantization_config.{key} must be {expected}, but is {json.dumps(got)}; {_REMEDY}."
    )


def without_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a config.json as those of the same model in bfloat16."""
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    for key, value in plain.items():
        if key in ("text_config", "vision_config") and isinstance(value, Mapping):
            plain[key] = without_quantization(value)
        elif key in ("dtype", "torch_dtype"):
            plain[key] = "bfloat16"
    return plain


def refuse_other_kinds(names: Mapping[str, Any], where: object) -> None:
    """Refuses tensors whose names tell of a quantization that is not read here.

    Raises:
      CheckpointError: names the kind and the remedy.
    """
    for name in names:
        kind = _OTHERS.get(name.rpartition(".")[2])
        if kind:
            raise CheckpointError(f"{where} holds {name}: weights quantized by {kind} are not read; {_REMEDY}.")


def dequantize(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int], first_row: int = 0) -> np.ndarray:
    """The numbers that quantized weights stand for.

    Args:
      weight: float8_e4m3fn[..., rows, columns].
      scale: f32 or bf16[..., ceil(rows / block[0]), ceil(columns / block[1])], the multiplier of each block.
      block: rows and columns that share a scale.
      first_row: where in the whole tensor the weights begin; the scales begin with the block of that row.

    Returns:
      bfloat16[..., rows, columns], each product rounded once from float32.
    """
    rows, columns = weight.shape[-2:]
    out = np.empty(weight.shape, ml_dtypes.bfloat16)
    count = math.prod(weight.shape[:-2])
    codes = weight.view(np.uint8).reshape(count, rows, columns)
    scales = scale.astype(np.float32).reshape(count, *scale.shape[-2:])
    for matrix, one_scale, to in zip(codes, scales, out.reshape(count, rows, columns), strict=True):
        begin = 0
        while begin < rows:
            row = first_row + begin
            factors = np.repeat(one_scale[row // block[0] - first_row // block[0]], block[1])[:columns]
            stop = min(rows, begin + min(block[0] - row % block[0], _ROWS))
            to[begin:stop] = (_VALUES[matrix[begin:stop]] * factors).astype(ml_dtypes.bfloat16)
            begin = stop
    return out


_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
