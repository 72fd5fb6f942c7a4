"""Where weights live: logical axes of a weight to axes of the mesh, as data.

A weight names its axes once, where it is declared ("embed", "heads", ...). The table below says which mesh axis each
is split over. What does not fit raises, naming the weight: nothing is replicated in silence.
"""

import functools
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import ConfigError

Rules = Mapping[str, str | tuple[str, ...] | None]

# Fully sharded over `fsdp` along the model width, over `tensor` along heads, feed-forward and vocabulary.
# Small per-head vectors and the layer axis of a stack stay whole.
DEFAULT_RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "gate_up": None,
    "experts": "expert",
    "vocab": "tensor",
    "norm": None,
    "patch": None,
    "position": None,
    "qkv": None,
    "merged": "tensor",
}


def partition_spec(name: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """Returns how the weight `name` of `shape` with logical `axes` is split over `mesh`.

    Raises:
      ConfigError: a logical axis without a rule, a mesh axis used twice in one weight, or a size that does not divide.
    """
    spec: list[str | tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for size, axis in zip(shape, axes, strict=True):
        if axis not in rules:
            raise ConfigError(f"{name}: no sharding rule for its axis {axis!r}; the rules know {', '.join(rules)}.")
        target = rules[axis]
        names = (target,) if isinstance(target, str) else tuple(target or ())
        # A mesh axis of size 1 splits nothing, so it can neither collide nor fail to divide.
        names = tuple(n for n in names if mesh.shape[n] > 1)
        for mesh_axis in names:
            if mesh_axis in used:
                raise ConfigError(
                    f"{name}: axes {used[mesh_axis]!r} and {axis!r} are both to be split over mesh axis {mesh_axis!r}; "
                    "map one of them to another axis or to None."
                )
            used[mesh_axis] = axis
        parts = 1
        for mesh_axis in names:
            parts *= mesh.shape[mesh_axis]
        if size % parts:
            raise ConfigError(
                f"{name}: axis {axis!r} of size {size} cannot be split {parts} ways over mesh axis {'*'.join(names)}; "
                "use a size that divides it, or map the axis to None."
            )
        spec.append(names if len(names) > 1 else (names[0] if names else None))
    return PartitionSpec(*spec)


def param_shardings(state: nnx.State, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> nnx.State:
    """Returns, for an abstract or real state of Params, the same tree with a `NamedSharding` for each weight."""

    def one(path, variable):
        name = ".".join(str(part) for part in path)
        axes = variable.get_metadata("axes")
        spec = partition_spec(name, variable.get_value().shape, axes, mesh, rules)
        return variable.replace(NamedSharding(mesh, spec))

    return nnx.map_state(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every leaf of a `Batch` is placed: the leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_batch(batch, mesh: Mesh):
    """Puts a `Batch` on `mesh`, split along its leading axes.

    Args:
      batch: the whole, or where the mesh spans several processes, each one's part: the rows and groups that follow
        those of the process before.

    Raises:
      ConfigError: rows or groups that the mesh's data axes do not divide.
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[0] * processes % parts:
            raise ConfigError(
                f"batch{jax.tree_util.keystr(path)} has {leaf.shape[0] * processes} rows or groups, which data * fsdp "
                f"= {parts} devices do not divide; use a multiple."
            )
    if processes == 1:
        return jax.device_put(batch, batch_sharding(mesh))
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(put, batch)
