"""Tries meshes and remat policies for a cell and ranks those that fit."""

import dataclasses
from collections.abc import Callable

from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.parallel.placement import Remat
from qwenvl_jax.plan import mesh as meshes
from qwenvl_jax.plan.mesh import Layout
from qwenvl_jax.plan.plan import Cell, Plan, make_plan
from qwenvl_jax.train.config import MeshConfig

# Policies, the fastest first.
_REMATS: tuple[Remat, ...] = ("none", "products_attention", "products", "attention", "full", "offload")


def search(cell: Cell, first: Layout, tries: int, *, quick: bool, say: Callable[[str], None]) -> list[Plan]:
    """Compiles some layouts of a cell, and returns their plans: those that fit, the smallest bound first, then others.

    Args:
      first: the layout that is tried first; the others are those whose estimate is nearest to what fits, with little
        made again and few microbatches.
      tries: how many at most, at least 1.
      quick: as of `qwenvl_jax.plan.compiling.compile_step`.
      say: told what is tried.
    """
    plans, refused, given = [], None, cell.config.mesh
    for number, layout in enumerate(candidates(cell, first)[:tries], 1):
        try:
            plan = make_plan(cell, layout, by_rule=True, quick=quick)
        except QwenVLError as error:  # one that cannot be compiled does not lose the others
            refused = error
            say(f"{number} of {tries}: {layout.arguments(given)}: {error}")
            continue
        held = plan.memory
        said = f"{(held.total or 0) / 2**30:.2f} GiB" if held.fits else f"{held.excess / 2**30:.2f} GiB too many"
        say(f"{number} of {tries}: {layout.arguments(given)}: {said}, bound {plan.ranked_seconds:.3g} s")
        plans.append(plan)
    if refused is not None and not plans:
        raise refused
    return sorted(plans, key=rank)


def rank(plan: Plan) -> tuple[bool, float, bool]:
    """What plans of a cell are sorted by: what fits by its bounds, what does not by how much it is too large.

    What goes to the host and back is in no bound: of two alike the one without comes first.
    """
    fits = plan.memory.fits
    return not fits, plan.ranked_seconds if fits else plan.memory.excess, plan.layout.remat == "offload"


def candidates(cell: Cell, first: Layout) -> list[Layout]:
    """Layouts to try, in this order."""
    stage, limit = cell.stage, cell.topology.hardware.hbm
    found = [
        dataclasses.replace(layout, mesh=_with_overrides(layout.mesh, cell.config.mesh), remat=remat)
        for layout in meshes.layouts(stage, cell.model, cell.topology)
        for remat in _REMATS
    ]
    sizes = {
        layout: meshes.estimate(layout, stage, cell.model, cell.topology, cell.param_bytes, adapters=cell.adapters)
        / limit
        for layout in found
    }

    def preference(layout: Layout):
        # What is estimated to fit goes before what is not, and of that what moves least and makes least again.
        mesh = layout.mesh
        cost = layout.microbatches * (1 + 0.1 * (mesh.context - 1) ** 0.5 + 0.3 * (mesh.tensor - 1) ** 0.5)
        cost *= 2 if layout.remat == "offload" else 1  # once fewer microbatches do not fit otherwise
        return sizes[layout] > 1, cost if sizes[layout] <= 1 else sizes[layout], _REMATS.index(layout.remat)

    return [first, *(layout for layout in sorted(found, key=preference) if layout != first)]


def _with_overrides(mesh: MeshConfig, given: MeshConfig) -> MeshConfig:
    """A mesh with the overrides of the config's, where it has none of its own for an axis."""
    rules = dict(rule.split("=", 1) for rule in (*given.override, *mesh.override))
    return dataclasses.replace(mesh, override=tuple(f"{axis}={target}" for axis, target in rules.items()))
