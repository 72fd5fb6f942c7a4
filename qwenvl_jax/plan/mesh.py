"""Which mesh a slice gets where nobody says: a rule, and what it estimates of memory.

Weights are split over all devices (rules "zero"), since gathering them costs least: with 16,384 tokens on a device a
layer's product takes longer than its weights do. Of `context` and `tensor`, which both split the tokens of a row,
`context` moves less: keys and values, which grouped queries make small, against activations of the whole width.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from qwenvl_jax.checkpoint.hf import parameter_count
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import AXES, axis_across
from qwenvl_jax.parallel.placement import Remat
from qwenvl_jax.plan.assumed import assume
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.train.config import MeshConfig, StageConfig

RULE = (
    "slices over data, rows over fsdp (8 of it expert, if there are experts), and over data again where widths of "
    "weights do not divide, or else the tower over fewer axes; the rest over context and tensor; the fewest "
    "microbatches, then the smallest context * tensor, then the smallest tensor with which a step is estimated to take "
    "70 % of HBM"
)
_ROOM = 0.7  # of HBM; what the compiler adds is not estimated
_EXPERTS = 8  # devices along `expert`: with more, the experts of a layer are hardly smaller than the rest of it
_LEAST_CHUNK = 256  # tokens of one of the two parts of a row that a device of `context` has


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a stage is laid out on a slice.

    Attributes:
      mesh: the axes, all of them given, and the rules.
      microbatches, remat: of the stage.
    """

    mesh: MeshConfig
    microbatches: int
    remat: Remat

    def of_stage(self, stage: StageConfig) -> StageConfig:
        """The stage with these settings."""
        return dataclasses.replace(stage, microbatches=self.microbatches, remat=self.remat)

    def arguments(self, given: MeshConfig | None = None, *, stage: str = "") -> str:
        """The same for the command line.

        Args:
          given: the mesh of the config that they change.
          stage: of a config of several, the one whose microbatches and remat are meant.
        """
        given = given or MeshConfig()
        sizes = [
            f"--mesh.{axis} {size}"
            for axis in AXES
            if (size := getattr(self.mesh, axis)) > 1 or axis == "fsdp" or getattr(given, axis) > 1
        ]
        rules = [f"--mesh.rules {self.mesh.rules}"] if self.mesh.rules != given.rules else []
        override = [f"--mesh.override {' '.join(self.mesh.override)}"] if self.mesh.override != given.override else []
        of = f"stages.{stage}." if stage else ""
        own = [f"--{of}microbatches {self.microbatches}", f"--{of}remat {self.remat}"]
        return " ".join([*sizes, *rules, *override, *own])


def chosen(
    stage: StageConfig, model: QwenVLConfig, topology: Topology, param_bytes: int = 4, *, adapters: bool = False
) -> Layout:
    """The layout of a stage by `RULE`.

    Args:
      stage: whose microbatches are the fewest that are taken.
      param_bytes, adapters: see `estimate`.

    Raises:
      ConfigError: no mesh of this kind divides the stage's batch.
    """
    found = sorted(layouts(stage, model, topology), key=_preference)
    if not found:
        raise ConfigError(
            f"stage {stage.name}: no mesh divides batch.rows={stage.batch.rows}, batch.groups={stage.batch.groups} and "
            f"batch.length={stage.batch.length} among the {topology.devices} devices of {topology.title}"
            + (f" with microbatches={stage.microbatches}" if stage.microbatches > 1 else "")
            + "; give one "
            "with --mesh.fsdp, --mesh.context and so on, or change the batch."
        )
    sizes = [estimate(layout, stage, model, topology, param_bytes, adapters=adapters) for layout in found]
    fitting = [layout for layout, size in zip(found, sizes, strict=True) if size <= _ROOM * topology.hardware.hbm]
    return fitting[0] if fitting else found[sizes.index(min(sizes))]


def _preference(layout: Layout) -> tuple[int, int, int, bool]:
    mesh = layout.mesh
    return layout.microbatches, mesh.context * mesh.tensor, mesh.tensor, bool(mesh.override)


def layouts(stage: StageConfig, model: QwenVLConfig, topology: Topology) -> Iterator[Layout]:
    """Layouts that divide the stage's batch, `context` and `tensor` being powers of two.

    They have its remat, and its microbatches times a power of two.
    """
    shape, n = stage.batch, topology.devices
    experts = model.text.moe.num_experts if model.text.moe else 1
    for tensor in _powers(model.text.num_key_value_heads):
        for context in _powers(max(1, shape.length // (2 * _LEAST_CHUNK))):
            if n % (tensor * context * topology.slices) or (context > 1 and shape.length % (2 * context)):
                continue
            # Each slice has all weights: what crosses between slices is gradients, once a step.
            share = n // (tensor * context * topology.slices)
            for times in _powers(shape.groups if shape.vision else shape.rows):
                microbatches = stage.microbatches * times
                parts = share * topology.slices * microbatches
                if (shape.vision and shape.groups % parts) or shape.rows % parts:
                    break
                for mesh in _splits(model, share, context, experts):
                    mesh = dataclasses.replace(mesh, data=mesh.data * topology.slices, tensor=tensor)
                    yield Layout(mesh, microbatches, stage.remat)


def _splits(model: QwenVLConfig, share: int, context: int, experts: int) -> Iterator[MeshConfig]:
    """Ways to split weights among so many devices along the batch's axes and `context`, whose widths divide by them.

    The tower is narrower than the decoder, 1,152 wide in most models: either both have copies along `data`, or the
    tower alone is split over fewer axes.
    """
    both = math.gcd(model.text.hidden_size, model.vision.hidden_size)
    for copies in _powers(share):
        if share % copies:
            return
        expert = max(size for size in _powers(_EXPERTS) if share // copies % size == 0 and experts % size == 0)
        sizes = {"fsdp": share // copies // expert, "expert": expert, "context": context}
        mesh = MeshConfig(data=copies, fsdp=sizes["fsdp"], expert=expert, context=context, rules="zero")
        split = math.prod(sizes.values())
        if both % split == 0:
            yield mesh
            return
        if copies == 1 and model.text.hidden_size % split == 0:
            yield dataclasses.replace(mesh, override=(f"vision_embed={'+'.join(_tower_axes(model, sizes))}",))


def _tower_axes(model: QwenVLConfig, sizes: dict[str, int]) -> tuple[str, ...]:
    """Of these axes of a mesh those whose devices together are the most that the tower's width divides by."""
    chosen = itertools.chain.from_iterable(itertools.combinations(sizes, count) for count in range(len(sizes) + 1))
    fitting = [axes for axes in chosen if model.vision.hidden_size % math.prod(sizes[axis] for axis in axes) == 0]
    return max(fitting, key=lambda axes: (math.prod(sizes[axis] for axis in axes), -len(axes)))


def _powers(largest: int) -> Iterator[int]:
    power = 1
    while power <= largest:
        yield power
        power *= 2


def estimate(
    layout: Layout,
    stage: StageConfig,
    model: QwenVLConfig,
    topology: Topology,
    param_bytes: int = 4,
    *,
    adapters: bool = False,
) -> int:
    """Bytes of HBM that a step takes on a device, roughly: what the rule orders meshes by, not what is printed.

    Weights, moments and gradients; the input of each layer; three times the largest layer's activations, weights and
    logits.

    Args:
      param_bytes: of a weight.
      adapters: whether adapters learn in place of the weights; quantized ones count as if they were not.
    """
    mesh, text, vision = layout.mesh, model.text, model.vision
    split = mesh.tensor * mesh.context
    shares = topology.devices // split
    total, tower = parameter_count(model)
    learning = total // 50 if adapters or stage.trainable == "mergers" else total
    state = (param_bytes * total + (2 * param_bytes + 4) * learning) // (topology.devices // mesh.data)
    if mesh.override:  # the tower is split over fewer devices
        sizes = {axis: getattr(mesh, axis) for axis in ("fsdp", "expert", "context")}
        parts = math.prod(sizes[axis] for axis in _tower_axes(model, sizes))
        state += (param_bytes * tower + (2 * param_bytes + 4) * min(learning, tower)) // parts
    assumed = assume(stage, model, multiple=split)
    tokens = stage.batch.rows * stage.batch.length // (shares * layout.microbatches * mesh.context)
    patches = assumed.work.patches // (shares * layout.microbatches * split)
    width = text.intermediate_size if not text.moe else text.moe.moe_intermediate_size * text.moe.num_experts_per_tok
    heads = text.num_attention_heads * text.head_dim
    made = 2 * heads + 2 * text.num_key_value_heads * text.head_dim + text.hidden_size + 2 * width
    kept = 2 * tokens * text.num_hidden_layers * _kept(layout.remat, text.hidden_size, heads, made, mesh.tensor)
    if stage.trainable != "mergers":
        made = 5 * vision.hidden_size + vision.intermediate_size
        kept += 2 * patches * vision.depth * _kept(layout.remat, vision.hidden_size, vision.hidden_size, made, 1)
    working = 2 * 3 * (tokens * (4 * text.hidden_size + 2 * width // mesh.tensor))
    seen = 2 * 3 * patches * (4 * vision.hidden_size + vision.intermediate_size)
    keys = 2 * text.num_key_value_heads * text.head_dim // mesh.tensor
    if mesh.context > 1:  # of whole rows, with their gradients
        working += 2 * 3 * tokens * mesh.context * keys
    layer = 2 * 2 * (total - tower) // (text.num_hidden_layers * mesh.tensor * mesh.expert)
    head = (2 + 2 + 4) * text.vocab_size * text.hidden_size // mesh.tensor
    logits = 8 * stage.loss_chunk * text.vocab_size // mesh.tensor
    return state + kept + max(working, seen) + layer + head + logits


def _kept(remat: str, width: int, heads: int, made: int, tensor: int) -> int:
    """Values that a layer keeps of a token for its backward pass."""
    more = {"offload": -width, "full": 0, "attention": heads // tensor, "products": made // tensor}
    more["products_attention"] = more["products"] + more["attention"]
    return width + more.get(remat, 2 * made // tensor)


def divided(mesh: MeshConfig, topology: Topology) -> MeshConfig:
    """A mesh given by hand, `fsdp` made out.

    Raises:
      ConfigError: sizes that the slice does not divide by; says which would do.
    """
    n, sizes = topology.devices, {axis: getattr(mesh, axis) for axis in AXES}
    used = 1
    for axis, size in sizes.items():
        if size < (0 if axis == "fsdp" else 1):
            raise ConfigError(f"mesh.{axis}={size} must be at least 1.")
        if size and n % (used * size):
            fitting = ", ".join(str(d) for d in range(1, n // used + 1) if n % (used * d) == 0)
            raise ConfigError(
                f"mesh.{axis}={size} does not divide the {n // used} devices of {topology.title} that the axes before "
                f"it leave; these do: {fitting}."
            )
        used *= size or 1
    if not sizes["fsdp"]:
        sizes["fsdp"], used = n // used, n
    if used != n:
        raise ConfigError(
            f"the mesh has {used} devices, but {topology.title} has {n}; set mesh.fsdp={sizes['fsdp'] * n // used}, or "
            "leave it at 0 for all that the other axes leave."
        )
    return dataclasses.replace(mesh, **sizes)


def check(mesh: MeshConfig, stage: StageConfig, topology: Topology) -> MeshConfig:
    """The same, checked against the batch of a stage.

    Raises:
      ConfigError: sizes that the slice or the stage's batch does not divide by; says which would do.
    """
    mesh, n = divided(mesh, topology), topology.devices
    axis_across([getattr(mesh, axis) for axis in AXES], topology.slices)  # refuses a mesh that slices do not divide
    share, rows, groups = n // (mesh.context * mesh.tensor), stage.batch.rows, stage.batch.groups
    both = math.gcd(rows, groups) if stage.batch.vision else rows
    if both % (share * stage.microbatches):
        fitting = ", ".join(str(d) for d in range(1, both + 1) if both % d == 0)
        named = f"batch.rows={rows}" + (f" and batch.groups={groups}" if stage.batch.vision else "")
        raise ConfigError(
            f"stage {stage.name}: mesh.data * mesh.fsdp * mesh.expert * microbatches = {share * stage.microbatches} "
            f"does not divide {named}; these do: {fitting}. What is left of {n} devices goes to mesh.context or "
            "mesh.tensor."
        )
    return mesh
