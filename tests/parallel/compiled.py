"""A training step compiled for devices that need not be there, and what its program moves between them."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import re

import jax
import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.flops import Work
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import BATCH_AXES, make_rules
from qwenvl_jax.plan.assumed import Assumed
from qwenvl_jax.plan.compiling import Compiled, Request
from qwenvl_jax.plan.compiling import compile_step as compile_step_for
from qwenvl_jax.plan.hlo import device_groups
from qwenvl_jax.train.config import MeshConfig, StageConfig, TrainConfig
from qwenvl_jax.train.program import abstract_batch, abstract_state
from qwenvl_jax.train.program import trace_step as trace
from qwenvl_jax.train.state import ModelParts

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{_KINDS})(-start)?\((?P<rest>.*)$")
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Whole:
    """A step that was compiled to the end: its program, if it can be read, and bytes of a device."""

    text: str
    temporaries: int
    code: int


def whole_on_slice(
    config: QwenVLConfig, topology: str, sizes: dict[str, int], *, read: bool = False, **settings
) -> Whole:
    """The step of a stage, code and all, for a mesh of these sizes on a TPU slice; settings as of `trace_step`."""
    return apart(_whole, config, topology, sizes, read, settings)


def _whole(config: QwenVLConfig, topology: str, sizes: dict[str, int], read: bool, settings: dict) -> Whole:
    program = compile_step(config, make_mesh(tpu_devices(topology), **sizes), **settings)
    held = program.memory_analysis()
    text = program.as_text() if read else ""
    return Whole(text, held.temp_size_in_bytes, held.generated_code_size_in_bytes)


def slices_along(topology: str, count: int, axis: int, sizes: dict[str, int]) -> list[int]:
    """Of how many of `count` slices the devices in each `count`-th part of a mesh along an axis are."""
    return apart(_slices_along, topology, count, axis, sizes)


def _slices_along(topology: str, count: int, axis: int, sizes: dict[str, int]) -> list[int]:
    mesh = make_mesh(tpu_devices(topology, num_slices=count), **sizes)
    parts = np.split(mesh.devices, count, axis=axis)
    return [len({device.slice_index for device in part.flat}) for part in parts]


def apart(function, *arguments):
    """What a function gives in a process of its own: where libtpu was loaded, JAX's profiler ends a process of CPUs."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def tpu_devices(topology: str, **settings):
    """The devices of a TPU slice, for compiling."""
    from jax.experimental import topologies

    # libtpu looks for a TPU that it runs on unless it is told about one.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="x")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices


def compile_step(config: QwenVLConfig, mesh: Mesh, **settings):
    """The compiled step of a stage on a mesh, from shapes alone; settings as of `trace_step`."""
    return trace_step(config, mesh, **settings).lower().compile()


def step_on_slice(
    config: QwenVLConfig,
    topology: str,
    *,
    stage: StageConfig | None = None,
    length: int = 1024,
    vision=((2, 512),),
    quick: bool = True,
    **sizes: int,
) -> Compiled:
    """What the step of a stage takes on a TPU slice, compiled in another process; a row and a group on each share,
    and in each microbatch.

    Args:
      quick: as of `qwenvl_jax.plan.compiling.compile_step`; that takes seconds instead of minutes.
      sizes: of the mesh.
    """
    stage = stage or StageConfig(name="s", steps=10, remat="full")
    shares = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES) * stage.microbatches
    shape = BatchShape(rows=shares, length=length, groups=shares, vision=vision)
    stage = dataclasses.replace(stage, batch=shape)
    run = TrainConfig(model=config, processor="unread", stages=(stage,), mesh=MeshConfig(**sizes), dtype="bfloat16")
    assumed = Assumed(shape, Work(tokens=shares * length), classes=0, notes=())
    return compile_step_for(Request(run, assumed, topology), quick=quick)


def trace_step(
    config: QwenVLConfig,
    mesh: Mesh,
    *,
    stage: StageConfig | None = None,
    rules: str = "fsdp_tensor",
    dtype: str = "bfloat16",
    rows: int = 1,
    length: int = 1024,
    vision=((2, 512),),
):
    """The traced step of a stage on a mesh, from shapes alone; `rows`, and one group, on each share of the batch."""
    stage = stage or StageConfig(name="s", steps=10, remat="full")
    parts = ModelParts(config, dtype=dtype, param_dtype="float32", mesh=mesh, rules=make_rules(rules))
    execution = Execution(mesh, parts.rules)
    shares = execution.split("batch")
    shape = BatchShape(rows=rows * shares, length=length, groups=shares, vision=vision)
    with jax.numpy_dtype_promotion("standard"):
        batch = abstract_batch(config, shape, execution, classes=False)
        return trace(parts, stage, *abstract_state(parts, stage, seed=0), batch)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that devices exchange.

    Attributes:
      kind: of HLO.
      shapes: of what comes out, one or several.
      groups: the devices, by place in the mesh, that exchange among themselves.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program."""
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        shapes = tuple(_numbers(dims) for dims in _SHAPE.findall(match["shapes"]))
        found.append(Collective(match["kind"], shapes, device_groups(match["rest"])))
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
