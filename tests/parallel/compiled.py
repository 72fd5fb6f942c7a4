"""A training step compiled for devices that need not be there, and what its program moves between them."""

import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.batch import Batch, VisionRows
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.parallel.placement import Execution, batch_sharding
from qwenvl_jax.parallel.rules import make_rules
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.optimizer import make_optimizer
from qwenvl_jax.train.state import GuardState, ModelParts, TrainState
from qwenvl_jax.train.step import make_step

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{_KINDS})(-start)?\((?P<rest>.*)$")
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


def tpu_devices(topology: str):
    """The devices of a TPU slice, for compiling."""
    from jax.experimental import topologies

    # libtpu looks for a TPU that it runs on unless it is told about one.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="x")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def abstract_batch(config: QwenVLConfig, execution: Execution, *, rows: int, length: int, vision) -> Batch:
    """Shapes of a batch with so many rows, and one group, on each share of the batch axes."""
    count, v = execution.split("batch"), config.vision
    B, T = rows * count, length

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def vision_rows(R, L):
        G = count
        i32 = {"coords": (G, R, L, 2), "sizes": (G, R, L, 2), "segment_ids": (G, R, L), "items": (G, R, L)}
        return VisionRows(
            patches=spec((G, R, L, v.patch_dim), jnp.uint8),
            pixel_table=spec((G, 3, 256), jnp.float32),
            windows=spec((G, R, L), jnp.int32) if v.window_size else None,
            **{name: spec(shape, jnp.int32) for name, shape in i32.items()},
        )

    i32 = {name: spec((B, T), jnp.int32) for name in ("tokens", "segment_ids", "targets", "vision_index")}
    batch = Batch(
        positions=spec((B, T, 3), jnp.int32),
        loss_weights=spec((B, T), jnp.float32),
        vision=tuple(vision_rows(*bucket) for bucket in vision),
        **i32,
    )

    def placed(path, leaf):
        sharding = batch_sharding(path, execution.mesh, execution.rules)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, batch)


def compile_step(config: QwenVLConfig, mesh: Mesh, **settings):
    """The compiled step of a stage on a mesh, from shapes alone; settings as of `trace_step`."""
    return trace_step(config, mesh, **settings).lower().compile()


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
    """The traced step of a stage on a mesh, from shapes alone."""
    stage = stage or StageConfig(name="s", steps=10, remat="full")
    parts = ModelParts(config, dtype=dtype, param_dtype="float32", mesh=mesh, rules=make_rules(rules))
    batch = abstract_batch(config, Execution(mesh, parts.rules), rows=rows, length=length, vision=vision)
    optimizer = make_optimizer(stage.optimizer, {name: parts.weights[name] for name in parts.select(stage.trainable)})
    weights = {
        name: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=parts.shardings[name])
        for name, info in parts.weights.items()
    }
    learning = {name: weights[name] for name in parts.select(stage.trainable)}
    frozen = {name: value for name, value in weights.items() if name not in learning}

    def begin(params):
        rng = jnp.zeros(2, jnp.uint32)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng, GuardState.begun())

    whole = NamedSharding(mesh, PartitionSpec())

    def placed(path, leaf):
        name = getattr(path[-1], "key", None)
        mine = name in weights and leaf.shape == weights[name].shape
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parts.shardings[name] if mine else whole)

    with jax.numpy_dtype_promotion("standard"):
        state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(begin, learning))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(make_step(parts, stage, optimizer), donate_argnums=0, out_shardings=(shardings, whole))
        return step.trace(state, frozen, batch)


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
        found.append(Collective(match["kind"], shapes, tuple(_groups(match["rest"]))))
    return found


def _groups(text: str) -> list[tuple[int, ...]]:
    """Replica groups: as axes of a mesh, as an iota, listed, or as pairs of a permutation."""
    ordered = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({ordered}\))? \{{([^}}]*)\}}", text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        sizes = [int(size) for size in axes.values()]
        devices = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(sizes))
        places = [list(axes).index(axis) for axis in re.findall(r"'(\w+)'", named[4])]
        groups = np.moveaxis(devices.reshape(sizes), places, range(-len(places), 0))
        return [tuple(group) for group in groups.reshape(-1, math.prod(sizes[place] for place in places)).tolist()]
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={ordered}", text):
        return [tuple(group) for group in _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()]
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
        return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    raise AssertionError(f"replica groups of an unknown form: {text[:300]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """The devices in order, in this shape, its axes then in another order."""
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
