"""How a model is run on a mesh: where activations lie, how rows are split, what is kept for the backward pass.

None of it changes what comes out, beyond rounding.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.parallel.rules import BATCH_AXES, DEFAULT_RULES, Rules, check_rules, mesh_axes

Remat = Literal["none", "full", "attention", "products", "products_attention", "offload"]
Backend = Literal["auto", "plain", "splash", "cudnn"]

# Names that layers give, by `jax.ad_checkpoint.checkpoint_name`, to what a policy may keep.
LAYER_INPUT, ATTENTION = "layer_input", "attention"
_CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's primitive


@dataclasses.dataclass(frozen=True, eq=False)
class Execution:
    """How a model is run.

    Attributes:
      mesh: the devices.
      rules: see `qwenvl_jax.parallel.rules`.
      remat: what the forward pass keeps for the backward pass, which makes the rest again:
        "none": everything. "full": each layer's input. "attention": also what attention gives, the dearest to make
        again in long rows. "products": the results of products of activations with weights. "products_attention":
        both.
        "offload": each layer's input, in the host's memory.
      unroll: write layers out one after another in place of looping over them. A loop copies what the backward pass
        needs into stacked buffers and back; small models on CPU train half again as fast without it, large ones compile
        for long.
      attention: "plain" (XLA), "splash" (Pallas, TPU), "cudnn" (NVIDIA, for 16-bit values), or "auto": splash on
        TPU and plain elsewhere.
      balanced: whether the token slots of the rows stand in the order of `qwenvl_jax.parallel.context`.
    """

    mesh: Mesh = dataclasses.field(default_factory=single_device_mesh)
    rules: Rules = dataclasses.field(default_factory=lambda: DEFAULT_RULES)
    remat: Remat = "none"
    unroll: bool = False
    attention: Backend = "auto"
    balanced: bool = False

    def _key(self):
        return self.mesh, frozenset(self.rules.items()), self.remat, self.unroll, self.attention, self.balanced

    def __eq__(self, other):
        return isinstance(other, Execution) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __post_init__(self):
        for field, kinds in (("remat", Remat), ("attention", Backend)):
            if getattr(self, field) not in get_args(kinds):
                raise ConfigError(f"{field}={getattr(self, field)!r} is not one of {', '.join(get_args(kinds))}.")
        check_rules(self.mesh, self.rules)

    @property
    def platform(self) -> str:
        """Of the mesh's devices: "cpu", "tpu" or "gpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def backend(self) -> str:
        """The attention that is used: "plain", "splash" or "cudnn"."""
        if self.attention != "auto":
            return self.attention
        return "splash" if self.platform == "tpu" else "plain"

    @property
    def packs(self) -> bool:
        """Whether cuDNN has its kernel of packed rows here: on NVIDIA's Hopper GPUs and later."""
        return self.platform == "gpu" and float(self.mesh.devices.flat[0].compute_capability) >= 9

    def split(self, *axes: str | None) -> int:
        """Into how many parts these logical axes are split together."""
        return math.prod(self.mesh.shape[name] for axis in axes for name in mesh_axes(axis, self.mesh, self.rules))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """How an array with these logical axes is split; None is an axis that is whole."""
        names = (mesh_axes(axis, self.mesh, self.rules) for axis in axes)
        return PartitionSpec(*(found if len(found) > 1 else (found[0] if found else None) for found in names))

    def fitting_spec(self, shape: Sequence[int], *axes: str | None) -> PartitionSpec:
        """`spec` of an array of this shape; an axis that does not divide is whole."""
        fitting = (axis if size % self.split(axis) == 0 else None for size, axis in zip(shape, axes, strict=False))
        return self.spec(*fitting)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Has the compiler lay out x by its logical axes; an axis that does not divide is left to it.

        Rows of a batch are checked at the door; what is left is prompts of any number.
        """
        if self.mesh.size == 1:
            return x
        sizes = zip(x.shape, axes, self.spec(*axes), strict=True)
        spec = (part if size % self.split(axis) == 0 else PartitionSpec.UNCONSTRAINED for size, axis, part in sizes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` on each device's part of its arguments."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def scan(self, body: Callable, carry, layers):
        """Scans `body(carry, layer) -> (carry, kept)` over anything stacked along a leading layer axis.

        Returns:
          (carry, kept stacked).
        """
        return jax.lax.scan(self.remembered(body), carry, layers, unroll=self.unroll or 1)

    def remembered(self, body: Callable) -> Callable:
        """`body(carry, layer)` that keeps for its backward pass what `remat` says."""
        if self.remat == "none":
            return body

        # prevent_cse guards against undoing this outside of a loop only.
        return jax.checkpoint(body, policy=_policy(self.remat), prevent_cse=self.unroll)


def _policy(remat: Remat):
    policies = jax.checkpoint_policies
    attention = policies.save_from_both_policies(policies.save_only_these_names(ATTENTION), _is_cudnn)
    match remat:
        case "attention":
            return attention
        case "products":
            return policies.dots_with_no_batch_dims_saveable
        case "products_attention":
            return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
    return policies.nothing_saveable


def _is_cudnn(primitive, *_, **__) -> bool:
    """What cuDNN's attention gives has no name of ours: with its values go sums, without which it would run again."""
    return primitive.name == _CUDNN


def token_shape_axes(path: tuple) -> tuple[str | None, ...]:
    """Logical axes of the leading dimensions of a leaf of a `Batch`: rows and tokens, or groups and their rows."""
    return ("groups", "vision_rows") if path[0].name == "vision" else ("batch", "tokens")


def leaf_axes(path: tuple) -> tuple[str | None, ...]:
    """Logical axes of the first two dimensions of a leaf of a `Batch`, as it is placed; the others are whole."""
    return ("groups", None) if path[-1].name == "pixel_table" else token_shape_axes(path)


def batch_sharding(path: tuple, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """How a leaf of a `Batch` is placed."""
    return NamedSharding(mesh, Execution(mesh, rules).spec(*leaf_axes(path)))


def row_share(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> tuple[int, int]:
    """Which share of a batch's rows this process feeds, from 0, and how many shares there are.

    Processes whose devices split the same rows (along `context`, say) feed the same share.

    Raises:
      ConfigError: see `row_shares`; or this process has no device of the mesh.
    """
    shares = row_shares(mesh, rules)
    return shares.index(_parts_here(mesh, rules, jax.process_index())), len(shares)


def row_shares(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> list[tuple[int, ...]]:
    """The parts of a batch that each share has, in order; the first share has the first rows of a batch.

    A part is what one place along the batch axes holds. Those of a process need not follow one another. Of a slice of
    4 x 4 TPUs whose processes have 2 x 2 each, all along `fsdp`:

        0  1 |  2  3
        4  5 |  6  7       [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
        -----+------
        8  9 | 10 11
       12 13 | 14 15

    Raises:
      ConfigError: processes that have some parts in common and some not, or unequally many.
    """
    processes = sorted({device.process_index for device in mesh.devices.flat})
    parts_of = {process: _parts_here(mesh, rules, process) for process in processes}
    shares = sorted(set(parts_of.values()))
    parts = _batch_parts(mesh, rules)
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != parts:
        told = "; ".join(f"process {process} has {list(held)}" for process, held in list(parts_of.items())[:4])
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: of the {parts} parts of a batch {told}{'; ...' if len(parts_of) > 4 else ''}. "
            "Processes must have the same parts or none in common, all equally many; choose other sizes of the mesh."
        )
    return shares


def _parts_here(mesh: Mesh, rules: Rules, process: int) -> tuple[int, ...]:
    """The parts of a batch that devices of this process hold.

    Raises:
      ConfigError: none.
    """
    split = mesh_axes("batch", mesh, rules)
    order = [*split, *(axis for axis in mesh.axis_names if axis not in split)]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in order])
    owners = np.vectorize(lambda device: device.process_index)(devices).reshape(_batch_parts(mesh, rules), -1)
    found = tuple(np.flatnonzero((owners == process).any(axis=1)).tolist())
    if not found:
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: process {process} has no device of it; make it as large as all processes' "
            "devices together (mesh.fsdp=0 takes what the other axes leave), or start fewer processes."
        )
    return found


def _batch_parts(mesh: Mesh, rules: Rules) -> int:
    return Execution(mesh, rules).split("batch")


def shard_batch(batch, mesh: Mesh, rules: Rules = DEFAULT_RULES):
    """Puts a `Batch` on `mesh`: rows and groups over the batch axes, tokens of a row over `context`, a group's vision
    rows over `context` and `tensor`.

    Args:
      batch: the whole, or where the mesh spans several processes, the share of each; see `row_share`.

    Raises:
      ConfigError: rows, groups, tokens or vision rows that the mesh does not divide.
    """
    shares = len(row_shares(mesh, rules))
    here = _parts_here(mesh, rules, jax.process_index())
    execution = Execution(mesh, rules)
    parts = execution.split("batch")

    def put(path, leaf):
        name, rows = f"batch{jax.tree_util.keystr(path)}", leaf.shape[0] * shares
        if rows % parts:
            raise ConfigError(
                f"{name} has {rows} rows or groups, which {' * '.join(BATCH_AXES)} = {parts} devices do not divide; "
                "use a multiple."
            )
        sharding = batch_sharding(path, mesh, rules)
        second = token_shape_axes(path)[1]
        if path[-1].name != "pixel_table" and leaf.shape[1] % execution.split(second):
            kind = "tokens a row" if second == "tokens" else "vision rows a group"
            raise ConfigError(
                f"{name} has {leaf.shape[1]} {kind}, which {' * '.join(mesh_axes(second, mesh, rules))} = "
                f"{execution.split(second)} devices do not divide; use a multiple."
            )
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return _from_share(leaf, sharding, here, rows, rows // parts)

    return jax.tree_util.tree_map_with_path(put, batch)


def place_batch(batch, execution: Execution):
    """Puts a `Batch` that every process has whole on the mesh: as `shard_batch` does what the mesh divides, the rest
    whole on every device."""
    if execution.mesh.size == 1:
        return batch

    def put(path, leaf):
        sharding = NamedSharding(execution.mesh, execution.fitting_spec(leaf.shape, *leaf_axes(path)))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree_util.tree_map_with_path(put, batch)


def _from_share(leaf, sharding: NamedSharding, here: tuple[int, ...], rows: int, each: int) -> jax.Array:
    """A global array of so many rows, of which this process has the parts `here`, one after the other, of `each`."""

    def part(index):
        start, _, _ = index[0].indices(rows)
        first = here.index(start // each) * each
        return leaf[(slice(first, first + each), *index[1:])]

    return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)
