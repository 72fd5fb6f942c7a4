"""Compiling for an NVIDIA GPU that is not there: `jax[cuda12]` brings a compiler that needs a description of it alone.

What it gives says how much memory a program takes; nothing can be run, and no kernels are timed, of which XLA would
choose the fastest on the GPU itself.
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know, from NVIDIA's data sheets and CUDA's list of compute capabilities.

    Attributes:
      name: as the driver calls it.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      cores: streaming multiprocessors.
    """

    name: str
    memory: int
    bandwidth: int
    cores: int = 132


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=85_000_000_000, bandwidth=3_350_000_000_000),
    "h200": Gpu("NVIDIA H200", memory=150_000_000_000, bandwidth=4_800_000_000_000),
}

# Both are Hopper GPUs: compute capability 9.0.
_DESCRIPTION = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_address_bits: 64
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def absent_gpu(kind: str) -> Any:
    """A device of `GPUS` to compile for.

    Raises:
      SystemExit: no compiler for CUDA.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    gpu = GPUS[kind]
    described = _DESCRIPTION.format(**dataclasses.asdict(gpu))
    try:
        found = topologies.get_topology_desc(gpu.name, "cuda", topology="1x1x1", target_config=described)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise SystemExit(
            f"cannot compile for CUDA here ({str(error).splitlines()[0]}): pip install 'jax[cuda12]=={jax.__version__}'"
        ) from error
    # JAX asks the GPU that is here what cuDNN can do on it.
    cudnn.check_compute_capability = lambda capability: tuple(map(int, capability.split("."))) <= (9, 0)
    cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    return found.devices[0]
