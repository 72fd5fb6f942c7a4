"""Plans for reading, and the `plan` command."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from qwenvl_jax.parallel.mesh import AXES
from qwenvl_jax.plan.bounds import DAY, USABLE
from qwenvl_jax.plan.compiling import check_libtpu
from qwenvl_jax.plan.mesh import RULE
from qwenvl_jax.plan.plan import Plan, layout_of, make_plan, read_cells
from qwenvl_jax.plan.search import search

_GIB = 2**30
BOUNDS = {
    "compute": "compute",
    "hbm": "HBM (each byte once)",
    "ici": "ICI (within the slice)",
    "dcn": "DCN (between slices)",
}


def plan_command(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    topology: str,
    slices: int = 1,
    model: str | None = None,
    stage: str | None = None,
    as_json: bool = False,
    tries: int = 0,
    quick: bool = False,
) -> int:
    """Compiles the stages of a config for a slice and prints what they take: the `plan` command.

    Args:
      config_path, overrides, model, topology, slices, stage: see `qwenvl_jax.plan.plan.read_cells`.
      as_json: print `Plan.facts` of the stage, of several stages an object by their names; with `tries` a list, the
        best first.
      quick: see `qwenvl_jax.plan.compiling.compile_step`.
      tries: how many meshes and remat policies to try for a stage; 0 plans the one of the run, or of the rule.

    Returns:
      0, or 1 if a stage does not fit.

    Raises:
      QwenVLError: what is wrong with the config, a setting or the surroundings.
    """
    check_libtpu()
    cells = read_cells(config_path, overrides, topology=topology, slices=slices, model=model, stage=stage)
    layouts = [layout_of(cell) for cell in cells]  # mistakes are told before anything is compiled
    facts, fit = dict[str, Any](), True
    for cell, (layout, by_rule) in zip(cells, layouts, strict=True):
        say(f"{cell.stage.name}: compiling for {cell.topology.title}, which takes minutes ...")
        if tries:
            found = search(cell, layout, tries, quick=quick, say=say)
            facts[cell.stage.name] = [one.facts() for one in found]
            text = ranking(found)
        else:
            found = [make_plan(cell, layout, by_rule=by_rule, quick=quick)]
            facts[cell.stage.name] = found[0].facts()
            text = table(found[0])
        fit &= found[0].memory.fits
        if not as_json:
            print(text + "\n", flush=True)
    if as_json:
        print(json.dumps(next(iter(facts.values())) if len(facts) == 1 else facts, indent=2))
    elif len(cells[0].config.stages) > 1 and layouts[0][1]:
        print(
            "Each stage is planned with a mesh of its own, and a run of several stages has one, which each of their "
            "batches has to divide by: give it with --mesh to plan them so."
        )
    return 0 if fit else 1


def say(text: str) -> None:
    """Tells how far the work is, beside what it prints."""
    print(text, file=sys.stderr, flush=True)


def table(plan: Plan) -> str:
    """A plan, for reading."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    cell, compiled = plan.cell, plan.compiled
    yield f"{cell.stage.name}: {cell.name} on {cell.topology.title}, {cell.topology.devices} devices"
    yield line("mesh", _mesh(plan) + ("" if not plan.by_rule else f"; by the rule: {RULE}"))
    for note in plan.assumed.notes:
        yield line("assumed", note)
    for note in compiled.notes:
        yield line("beware", note)
    learn = "all learn" if compiled.learning == compiled.parameters else f"{compiled.learning:,} learn"
    yield line("parameters", f"{compiled.parameters:,}, {learn}")
    yield from _memory_lines(plan)
    yield line(
        "FLOPs", f"{compiled.flops:.3e} a step, {compiled.flops / plan.assumed.work.tokens:.3e} a token, by formula"
    )
    if compiled.again:
        yield line("", f"{compiled.again / compiled.flops:.0%} more for what --remat {plan.layout.remat} makes again")
    yield from _exchange_lines(plan)
    tokens, steps = plan.assumed.work.tokens, cell.stage.steps
    yield line("bounds", f"{'a step':>22} {'tokens a day':>14} {'days for ' + format(steps, ',') + ' steps':>26}")
    for name, seconds in plan.bounds.items():
        if seconds is None:
            why = (
                "one slice: nothing leaves it"
                if name == "dcn" and cell.topology.slices == 1
                else "not known, since nothing was compiled"
            )
            yield line("", f"{BOUNDS[name]:<23}{why}")
        elif not seconds:
            yield line("", f"{BOUNDS[name]:<23}nothing is sent")
        else:
            days = steps * seconds / DAY
            yield line("", f"{BOUNDS[name]:<23}{seconds:>7.3g} s {tokens * DAY / seconds:>14.3e} {days:>25.1f}")
    yield line("", "a step takes longer than the largest of them: they are bounds, no prediction")
    yield line("compiled in", f"{compiled.seconds:.0f} s" + (", no code generated" if plan.quick else ""))
    yield line("train it with", command(plan))


def line(title: str, text: str) -> str:
    """A line of a table."""
    return f"  {title:<15}{text}"


def gib(count: int) -> str:
    """Bytes for reading."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.2f} MiB"


def _mesh(plan: Plan) -> str:
    mesh = plan.layout.mesh
    sizes = [f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1]
    return ", ".join(
        [*sizes, f"rules {mesh.rules}", f"{plan.layout.microbatches} microbatches", f"remat {plan.layout.remat}"]
    )


def _memory_lines(plan: Plan) -> Iterator[str]:
    held, compiled = plan.memory, plan.compiled
    kinds = ", ".join(f"{kind} {gib(count)}" for kind, count in compiled.state.items())
    yield line("HBM, a device", f"{gib(held.limit)}, of which a step may take {USABLE:.0%}")
    if held.arguments is not None:
        yield line("  arguments", f"{gib(held.arguments):>11}   {kinds}")
    if held.temporaries is not None:
        aliased = f"outputs lie where arguments lay, but for {gib((compiled.outputs or 0) - (compiled.aliased or 0))}"
        yield line("  temporaries", f"{gib(held.temporaries):>11}   {aliased}")
    if held.total is not None:
        yield line("  total", f"{gib(held.total):>11}   {held.total / held.limit:.0%} of the limit")
    if compiled.host is not None and compiled.host > 2**20:  # less is the compiler's own
        yield line("  host", f"{gib(compiled.host):>11}   of the host's memory, for each device")
    yield line("  fits", "yes" if held.fits else f"NO, by {gib(held.excess)} too many: {advice(plan)}")


def advice(plan: Plan, *, searched: bool = False) -> str:
    """What to change about a plan that does not fit; `searched` if it is one of many that were tried."""
    layout, groups = plan.layout, plan.cell.stage.batch.groups
    state, half = plan.compiled.state, USABLE * plan.memory.limit / 2
    share = plan.cell.topology.devices // (layout.mesh.context * layout.mesh.tensor)
    tips = []
    if state["batch"] > half:
        tips.append("fewer batch.rows: the batch alone takes more than half of it")
    if sum(state.values()) - state["batch"] > half:
        # Along `data` are copies, whatever the slice; of several slices each has one. The rule takes as few as it can.
        copies = layout.mesh.data > plan.cell.topology.slices and not plan.by_rule
        what = "weights and optimizer alone take more than half of it"
        tips.append(f"less of mesh.data, more of mesh.fsdp: {what}" if copies else f"a larger slice: {what}")
        if layout.mesh.rules != "zero" and layout.mesh.expert * layout.mesh.context > 1:
            tips.append("--mesh.rules zero, which splits weights over expert and context too")
    if layout.remat not in ("full", "offload"):
        tips.append("--remat full")
    if groups % (2 * share * layout.microbatches) == 0:
        tips.append(f"--microbatches {2 * layout.microbatches}")
    elif layout.mesh.fsdp % 2 == 0:
        tips.append(f"half of mesh.fsdp, twice of mesh.context, and --microbatches {2 * layout.microbatches}")
    if layout.remat == "full":
        tips.append("--remat offload")
    last = "a larger slice" if searched or len(tips) < 2 else "--search 8, which tries others"
    return "; or ".join(tips if any(tip.startswith(last) for tip in tips) else [*tips, last])


def _exchange_lines(plan: Plan) -> Iterator[str]:
    sent = plan.compiled.sent
    if sent is None:
        yield line("sent, a device", "not counted: the compiler wrote no program")
        return
    if not sent:
        yield line("sent, a device", "nothing")
    for number, (key, count) in enumerate(sent.items()):
        axes, kind = key.split(" ")
        if count >= sum(sent.values()) / 1000:
            yield line("" if number else "sent, a device", f"{gib(count):>11}   {kind} over {axes}")
    if plan.compiled.unknown_loops:
        yield line("", f"{plan.compiled.unknown_loops} loops of unknown length are counted once")


def command(plan: Plan) -> str:
    """The command that trains as planned."""
    cell = plan.cell
    layout = _arguments(plan) if plan.by_rule else ""
    model = f"--model {cell.name}" if cell.named else ""
    given = shlex.join(map(str, (cell.config_path, *cell.overrides)))
    return " ".join(part for part in ("qwenvl-jax train", given, model, layout) if part)


def _arguments(plan: Plan) -> str:
    """The layout, for the command line; of a curriculum, of this stage alone but for the mesh."""
    cell = plan.cell
    return plan.layout.arguments(cell.config.mesh, stage=cell.stage.name if len(cell.config.stages) > 1 else "")


def ranking(plans: Sequence[Plan]) -> str:
    """Plans of one cell, the best first, for reading."""
    best = plans[0]
    lines = [
        f"{best.cell.stage.name}: {best.cell.name} on {best.cell.topology.title}, {len(plans)} tried",
        f"  {'bound on a step':>16} {'HBM':>12} {'fits':<23} layout",
    ]
    for plan in plans:
        total = gib(plan.memory.total) if plan.memory.total is not None else "unknown"
        fits = "yes" if plan.memory.fits else f"no, {gib(plan.memory.excess)} too many"
        layout = _arguments(plan)
        lines.append(f"  {plan.ranked_seconds:>14.3g} s {total:>12} {fits:<23} {layout}")
    if not best.memory.fits:
        lines.append(f"  none fits; of the one that is the least too large: {advice(best, searched=True)}")
    dcn = " and DCN" if best.cell.topology.slices > 1 else ""
    lines.append(f"  bounds are those of compute, HBM, ICI{dcn}, with what rematerialization makes again")
    return "\n".join(lines)
