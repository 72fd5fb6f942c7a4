"""A stage on a slice, compiled: whether it fits, and what bounds it. The work behind `qwenvl-jax plan`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint.source import read_config
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.mesh import AXES
from qwenvl_jax.plan import mesh as meshes
from qwenvl_jax.plan.assumed import Assumed, assume
from qwenvl_jax.plan.bounds import DAY, Memory, bounds, by_axis, memory
from qwenvl_jax.plan.compiling import Compiled, Request, compile_step
from qwenvl_jax.plan.mesh import Layout
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import DataConfig, MeshConfig, StageConfig, TrainConfig, ValidationConfig
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.overrides import apply_overrides


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is planned: a stage of a run, on a slice.

    Attributes:
      config_path, overrides: as given on the command line.
      config: the run.
      stage: one of its stages.
      name: of the model.
      named: whether that was given on the command line.
      model: its shape.
      topology: the slice.
    """

    config_path: str
    overrides: tuple[str, ...]
    config: TrainConfig
    stage: StageConfig
    name: str
    named: bool
    model: QwenVLConfig
    topology: Topology

    @property
    def param_bytes(self) -> int:
        """Of a weight."""
        return 4 if self.config.param_dtype == "float32" else 2

    @property
    def adapters(self) -> bool:
        """Whether adapters learn in place of the weights."""
        return self.config.adapter.rank > 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A cell, compiled.

    Attributes:
      cell: what was planned.
      layout: how it was laid out.
      by_rule: whether `qwenvl_jax.plan.mesh.RULE` chose that.
      quick: whether no code was generated.
      assumed: the batch.
      compiled: what the compiler says.
      memory: of a device.
      bounds: seconds of a step, see `qwenvl_jax.plan.bounds`.
    """

    cell: Cell
    layout: Layout
    by_rule: bool
    quick: bool
    assumed: Assumed
    compiled: Compiled
    memory: Memory
    bounds: dict[str, float | None]

    @property
    def seconds(self) -> float:
        """The largest bound on a step."""
        return max(bound for bound in self.bounds.values() if bound is not None)

    @property
    def ranked_seconds(self) -> float:
        """The same, with what rematerialization makes again: what plans of a cell are ranked by."""
        again = self.compiled.again / (self.cell.topology.devices * self.cell.topology.hardware.flops)
        return max(self.seconds, (self.bounds["compute"] or 0) + again)

    @property
    def days(self) -> float:
        """Of the stage, at the largest bound."""
        return self.cell.stage.steps * self.seconds / DAY

    def facts(self) -> dict[str, Any]:
        """The object that `--json` prints; bytes are those of a device, bounds seconds of a step."""
        mesh = {axis: getattr(self.layout.mesh, axis) for axis in AXES}
        slices = self.cell.topology.slices
        mesh |= {"slices": slices} if slices > 1 else {}
        settings = {"rules": self.layout.mesh.rules, "microbatches": self.layout.microbatches}
        override = {"override": list(self.layout.mesh.override)} if self.layout.mesh.override else {}
        held = self.memory
        return {
            "config": self.cell.config_path,
            "model": self.cell.name,
            "topology": self.cell.topology.name,
            "devices": self.cell.topology.devices,
            "mesh": mesh | settings | {"remat": self.layout.remat} | override,
            "fits": held.fits,
            "hbm": {
                "limit": held.limit,
                "arguments": held.arguments,
                "temporaries": held.temporaries,
                "total": held.total,
            },
            "parameters": self.compiled.parameters,
            "flops_per_step": self.compiled.flops,
            "flops_per_token": self.compiled.flops / self.assumed.work.tokens,
            "collective_bytes": by_axis(self.compiled.sent),
            "bounds": self.bounds,
            "days": self.days,
            "compile_seconds": self.compiled.seconds,
        }


def read_cells(
    config_path: str,
    overrides: Sequence[str],
    *,
    topology: str,
    slices: int = 1,
    model: str | None = None,
    stage: str | None = None,
) -> list[Cell]:
    """The cells of a config's stages, or of one of them, on a slice.

    Args:
      config_path, overrides, model: as of `qwenvl_jax.train.loop.train_command`.
      topology, slices: name of the slice, and how many of them.
      stage: name of a stage; all without.

    Raises:
      ConfigError: what is wrong with the config file, a setting, or a name.
    """
    slice_ = Topology.named(topology, slices)
    config = apply_overrides(load_config_file(config_path)[0], overrides)
    names = [one.name for one in config.stages]
    if stage is not None and stage not in names:
        raise ConfigError(f"{config_path} has no stage {stage!r}; its stages are {', '.join(names)}.")
    shape, name = model_of(config, model)
    return [
        Cell(config_path, tuple(overrides), config, one, name, model is not None, shape, slice_)
        for one in config.stages
        if stage in (None, one.name)
    ]


def model_of(config: TrainConfig, given: str | None) -> tuple[QwenVLConfig, str]:
    """The shape and the name of a run's model, or of the one that is given in its place: a preset, folder or hub id.

    Raises:
      CheckpointError: a folder that is none of a model.
    """
    model = given if given is not None else config.model
    if isinstance(model, QwenVLConfig):
        return model, next((name for name, shape in PRESETS.items() if shape == model), model.model_type)
    return (PRESETS[model] if model in PRESETS else read_config(folders.resolve(model, weights=False))[0]), model


def layout_of(cell: Cell) -> tuple[Layout, bool]:
    """The layout of a cell, and whether the rule chose it: it does where the run's mesh is the default one.

    Raises:
      ConfigError: a mesh that the slice or the batch does not divide by.
    """
    stage = cell.stage
    if cell.config.mesh == MeshConfig():
        return meshes.chosen(stage, cell.model, cell.topology, cell.param_bytes, adapters=cell.adapters), True
    mesh = meshes.check(cell.config.mesh, stage, cell.topology)
    return Layout(mesh, stage.microbatches, stage.remat), False


def make_plan(cell: Cell, layout: Layout, *, by_rule: bool = False, quick: bool = False) -> Plan:
    """Compiles a cell in another process; `quick` as of `qwenvl_jax.plan.compiling.compile_step`.

    Raises:
      QwenVLError: settings that cannot be used, or a compiler that fails for another reason than memory.
    """
    assumed = assume(cell.stage, cell.model, multiple=layout.mesh.context * layout.mesh.tensor)
    compiled = compile_step(request_of(cell, layout, assumed), quick=quick)
    held, found = memory(compiled, cell.topology), bounds(compiled, cell.topology)
    return Plan(cell, layout, by_rule, quick, assumed, compiled, held, found)


def request_of(cell: Cell, layout: Layout, assumed: Assumed) -> Request:
    """What the compiling process is asked for: the stage alone, without its data."""
    stage = dataclasses.replace(
        layout.of_stage(cell.stage),
        batch=assumed.shape,
        data=DataConfig(),
        validation=ValidationConfig(),
        carry_optimizer=False,
    )
    config = dataclasses.replace(
        cell.config, model=cell.model, processor="unread", stages=(stage,), mesh=layout.mesh, track=()
    )
    return Request(config, assumed, cell.topology.name, cell.topology.slices)
