"""What is compiled for a GPU that is not there (`tools/absent_gpu.py`), and what the compiler does not tell of it."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.presets import PRESETS
from tools.absent_gpu import GPUS, absent_gpu
from tools.bench_train import kernel_bytes

CUDA = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@pytest.mark.parametrize("kind", GPUS)
def test_a_program_is_compiled_or_what_is_missing_is_told(monkeypatch, kind):
    for name in ("check_compute_capability", "is_cuda_compute_capability_equal"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # put back afterwards
    if not CUDA:
        with pytest.raises(SystemExit, match=r"cannot compile for CUDA here .*: pip install 'jax\[cuda12\]=="):
            absent_gpu(kind)
        return
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(absent_gpu(kind)))
    held = jax.jit(lambda x: (x @ x).sum()).lower(shape).compile().memory_analysis()
    assert held.argument_size_in_bytes == 64 * 64 * 4


def test_what_the_kernel_works_in():
    """4 bytes for each value of the queries and each segment that a row has room for, bounded by 16 GiB."""
    model = PRESETS["qwen3_vl_2b"]
    assert kernel_bytes(model, BatchShape(rows=1, length=262_144, vision=((64, 4096),)), rows=1) == 2**34
    assert kernel_bytes(model, BatchShape(rows=2, length=8192), rows=2) == 17 * 2 * 8192 * 16 * 128 * 4
    # Of rows too long for it nothing is handed to it.
    assert kernel_bytes(PRESETS["qwen3_vl_32b"], BatchShape(rows=1, length=262_144), rows=1) == 0
