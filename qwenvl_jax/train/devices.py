"""The devices of a run: its mesh, and whether the batches of its stages can be shared among them."""

import math

import jax
from jax.sharding import Mesh

from qwenvl_jax.data.packing import AUTO
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.ops.row_attention import splash_multiple
from qwenvl_jax.ops.splash import LANES
from qwenvl_jax.parallel.mesh import AXES, make_mesh
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import BATCH_AXES, Rules, make_rules
from qwenvl_jax.train.config import StageConfig, TrainConfig


def mesh_of(config: TrainConfig, devices: list[jax.Device] | None = None) -> tuple[Mesh, Rules]:
    """The mesh of a run and its sharding rules.

    Args:
      devices: those to use; all by default.

    Raises:
      ConfigError: sizes that the devices do not have, unknown rules, rules that split a mesh axis in two ways, batches
        that the mesh does not divide, or an attention of other devices or other lengths.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    if sizes["fsdp"]:
        devices = devices[: math.prod(sizes.values())]
    else:
        others = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
        sizes["fsdp"] = max(len(devices) // others, 1)
    mesh, rules = make_mesh(devices, **sizes), make_rules(config.mesh.rules, config.mesh.override)
    execution = Execution(mesh, rules)
    for stage in config.stages:
        _check_batch(stage, execution)
        if stage.attention == "splash" and (missed := _splash_misses(stage, execution)):
            raise ConfigError(f"stage {stage.name}: attention=splash: {missed}; change one of them.")
        if stage.attention == "cudnn" and (execution.platform != "gpu" or config.dtype == "float32"):
            raise ConfigError(
                f"stage {stage.name}: attention=cudnn wants an NVIDIA GPU and dtype=bfloat16, and this run has "
                f"{execution.platform} and dtype={config.dtype}; set attention=auto."
            )
    return mesh, rules


def attention_notes(config: TrainConfig, mesh: Mesh, rules: Rules) -> list[str]:
    """What a run should say of its stages' attention: where a TPU does without its kernel."""
    execution = Execution(mesh, rules)
    return [
        f"stage {stage.name}: plain attention, which takes far more memory than the TPU's kernel: {missed}"
        for stage in config.stages
        if stage.attention == "auto" and execution.backend == "splash" and (missed := _splash_misses(stage, execution))
    ]


def _splash_misses(stage: StageConfig, execution: Execution) -> str:
    """Why the kernel for TPUs does not take a stage's rows of text; nothing where it does."""
    multiple = splash_multiple(execution)
    if stage.batch.length % multiple == 0:
        return ""
    return (
        f"batch.length={stage.batch.length} is no multiple of {multiple}, two chunks of {LANES} for each device of "
        "mesh.context"
    )


def _check_batch(stage: StageConfig, execution: Execution) -> None:
    shape, parts = stage.batch, execution.split("batch") * stage.microbatches
    if shape.rows % parts or (shape.vision and shape.groups % parts):
        raise ConfigError(
            f"stage {stage.name}: batch.rows={shape.rows} and batch.groups={shape.groups} must be multiples of "
            f"{parts}, the devices that share a batch ({' * '.join(f'mesh.{axis}' for axis in BATCH_AXES)}) times "
            f"microbatches={stage.microbatches}; change one of them."
        )
    chunks = 2 * execution.split("tokens") if execution.split("tokens") > 1 else 1
    if shape.length % chunks:
        raise ConfigError(
            f"stage {stage.name}: batch.length={shape.length} must be a multiple of {chunks}, two chunks for each "
            "device of mesh.context; change one of them."
        )
    spread = execution.split("vision_rows")
    if shape.vision != AUTO and any(rows % spread for rows, _ in shape.buckets):
        raise ConfigError(
            f"stage {stage.name}: batch.vision={shape.vision} must have multiples of {spread} rows, since so many "
            'devices (mesh.context * mesh.tensor) share those of a group; change them, or write "auto".'
        )
