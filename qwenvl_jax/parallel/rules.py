"""Where weights and activations live: logical axes to axes of the mesh, as data.

A weight names its axes once, where it is declared ("embed", "heads", ...), and so does an activation where it is held
in place. A table below says over which mesh axes each is split. What does not fit raises, naming the weight: nothing
is replicated in silence.
"""

import math
from collections.abc import Iterable, Mapping

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import AXES

Rules = Mapping[str, str | tuple[str, ...] | None]

# Mesh axes that share the rows of a batch and its vision groups.
BATCH_AXES = ("data", "fsdp", "expert")

# Activations, and what is too small to split, alike in every table. A group's vision rows are spread over the axes
# along which its text rows are split some other way, so that no device does the tower's work twice.
_COMMON: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "groups": BATCH_AXES,
    "tokens": "context",
    "vision_rows": ("context", "tensor"),
    "layers": None,
    "head_dim": None,
    "gate_up": None,
    "qkv": None,
    "norm": None,
    "patch": None,
    "position": None,
    "router": None,
    "vision_heads": None,
    "vision_mlp": None,
    "merged": None,
    "adapter": None,
}
_TENSOR: dict[str, str | tuple[str, ...] | None] = {
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
}

# Weights. "fsdp_tensor": over `fsdp` along the model width, over `tensor` along heads, feed-forward and vocabulary.
# "zero": the same, and the width also over the axes that otherwise hold copies, for the largest models and the longest
# rows. "replicated": every device has all weights (but experts, and what `tensor` splits), as adapters on a small model
# like it.
TABLES: Mapping[str, Rules] = {
    "fsdp_tensor": _COMMON | _TENSOR | {"embed": "fsdp", "vision_embed": "fsdp", "expert_embed": "fsdp"},
    "zero": _COMMON
    | _TENSOR
    | {
        "embed": ("fsdp", "expert", "context"),
        "vision_embed": ("fsdp", "expert", "context"),
        "expert_embed": ("fsdp", "context"),
    },
    "replicated": _COMMON | _TENSOR | {"embed": None, "vision_embed": None, "expert_embed": None},
}
DEFAULT_RULES = TABLES["fsdp_tensor"]

# Logical axes that no mesh axis splits both of: those of one activation, and those of weights whose parts are summed
# over devices (`vocab`, `expert_mlp`), which must hold the same tokens then: sums of different ones would mean nothing.
_APART = (
    ("batch", "tokens"),
    ("groups", "tokens"),
    ("groups", "vision_rows"),
    *((axis, rows) for axis in ("vocab", "heads", "kv_heads", "mlp", "expert_mlp") for rows in ("batch", "tokens")),
)


def make_rules(table: str, overrides: Iterable[str] = ()) -> Rules:
    """A named table with some of its rules replaced.

    Args:
      table: a name in `TABLES`.
      overrides: rules such as "embed=fsdp+context", or "kv_heads=" to hold an axis whole.

    Raises:
      ConfigError: an unknown table, logical axis or mesh axis.
    """
    if table not in TABLES:
        raise ConfigError(f"unknown sharding rules {table!r}; the tables are {', '.join(TABLES)}.")
    rules = dict(TABLES[table])
    for rule in overrides:
        axis, equals, target = rule.partition("=")
        if axis not in rules or not equals:
            raise ConfigError(
                f"sharding rule {rule!r}: expected axis=mesh axes, such as embed=fsdp+context, the axis one of "
                f"{', '.join(rules)}."
            )
        names = tuple(target.split("+")) if target else ()
        unknown = [name for name in names if name not in AXES]
        if unknown:
            raise ConfigError(f"sharding rule {rule!r}: unknown mesh axis {unknown[0]!r}; they are {', '.join(AXES)}.")
        rules[axis] = names
    return rules


def mesh_axes(axis: str | None, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over; those of size 1 split nothing and are left out."""
    target = None if axis is None else rules[axis]
    names = (target,) if isinstance(target, str) else tuple(target or ())
    return tuple(name for name in names if mesh.shape[name] > 1)


def check_rules(mesh: Mesh, rules: Rules) -> None:
    """Checks that rules split no mesh axis in two ways where activations need one.

    Raises:
      ConfigError: a mesh axis along which, say, both the vocabulary and the tokens would be split.
    """
    for axis, other in _APART:
        for shared in mesh_axes(axis, mesh, rules):
            if shared in mesh_axes(other, mesh, rules):
                told = (f"{name}={'+'.join(mesh_axes(name, mesh, rules))}" for name in (axis, other))
                raise ConfigError(
                    f"sharding rules {' and '.join(told)} both split over mesh axis {shared!r}, but devices along it "
                    f"can share only one of them; leave {shared!r} out of one rule."
                )


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
        names = mesh_axes(axis, mesh, rules)
        for mesh_axis in names:
            if mesh_axis in used:
                raise ConfigError(
                    f"{name}: axes {used[mesh_axis]!r} and {axis!r} are both to be split over mesh axis {mesh_axis!r}; "
                    "map one of them to another axis or to None."
                )
            used[mesh_axis] = axis
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in names)
        if size % parts:
            fitting = ", ".join(str(n) for n in range(1, parts + 1) if size % n == 0)
            raise ConfigError(
                f"{name}: axis {axis!r} of size {size} cannot be split {parts} ways over mesh axis {'*'.join(names)}; "
                f"use a size that divides it ({fitting}), or hold the axis whole: --mesh.override {axis}= for a run, "
                f"rules that map it to None from Python."
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
