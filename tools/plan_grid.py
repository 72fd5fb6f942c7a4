"""Plans every size of Qwen3-VL in every stage on four slices, one file a cell in docs/plan, and writes docs/plan.md.

    .venv/bin/python -m tools.plan_grid [--only TEXT] [--limit N] [--full] [--smallest GENERATION]

A cell that has its file is left alone, so a run that was stopped goes on where it was. Without `--limit`, all cells;
with `--limit 0` the page alone. One cell at a time, the smallest first. Code is not generated unless `--full` is given:
figures are the same, and a cell takes minutes less. `--smallest v5p` looks for the smallest slice of v5p that holds S3
of the 235B.
"""

import argparse
import datetime
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.plan.bounds import USABLE
from qwenvl_jax.plan.mesh import estimate
from qwenvl_jax.plan.plan import layout_of, make_plan, read_cells
from qwenvl_jax.plan.show import advice, command
from qwenvl_jax.plan.topology import known_shapes
from tools import plan_flags

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "docs" / "plan", ROOT / "docs" / "plan.md"
SIZES = ("2b", "4b", "8b", "30b_a3b", "32b", "235b_a22b")
LARGEST = ("235b_a22b", "s3")  # what `--smallest` is about
STAGES = ("s0", "s1", "s2", "s3")
SLICES = ("v5e:16x16", "v6e:16x16", "tpu7x:4x4x8", "v5p:8x8x8")
_LARGEST_OF = ("v5p", "tpu7x")
_GIB = 2**30
_HEAD = """\
# What fits where

Each stage of Qwen3-VL's pre-training (`configs/pretrain`), compiled for TPU slices on a machine without one. A cell
says the HBM of a device that the step takes, of what a program may use, and the days that the stage takes at least: the
largest of the bounds of compute, HBM and ICI. They are bounds, each as if nothing else cost time, and no prediction: no
step on such batches is that fast. The batches are assumed, with the largest frames that the stage allows (see below),
which take the most memory and FLOPs: smaller frames take fewer. The mesh is the rule's; `qwenvl-jax plan ... --search
8` may find a better one. On tpu7x, what the two devices of a chip exchange counts as if it went over ICI.
"""


def cells() -> Iterator[tuple[str, str, str]]:
    """(size, stage, slice), the smallest first."""
    return ((size, stage, slice_) for size in SIZES for slice_ in SLICES for stage in STAGES)


def path_of(size: str, stage: str, topology: str) -> Path:
    """The file of a cell."""
    return FOLDER / f"{size}-{stage}-{topology.replace(':', '-')}.json"


def planned(size: str, stage: str, topology: str, *, quick: bool) -> dict[str, Any]:
    """What stands in the file of a cell."""
    config = f"configs/pretrain/{stage}.py"
    (cell,) = read_cells(config, [], topology=topology, model=f"qwen3_vl_{size}")
    layout, by_rule = layout_of(cell)
    plan = make_plan(cell, layout, by_rule=by_rule, quick=quick)
    return {
        "plan": plan.facts(),
        "command": command(plan),
        "advice": None if plan.memory.fits else advice(plan),
        "assumed": plan.assumed.notes,
        "code_generated": not quick,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "date": datetime.date.today().isoformat(),
    }


def smallest(generation: str, *, quick: bool) -> dict[str, Any]:
    """The smallest slice of a generation that holds the largest cell: what stands in its file."""
    size, stage = LARGEST
    tried = []
    for shape in known_shapes(generation):
        name = f"{generation}:{shape}"
        (cell,) = read_cells(f"configs/pretrain/{stage}.py", [], topology=name, model=f"qwen3_vl_{size}")
        try:
            layout, _ = layout_of(cell)
        except ConfigError:  # its devices are no divisor of the batch
            continue
        estimated = estimate(layout, cell.stage, cell.model, cell.topology, cell.param_bytes, adapters=cell.adapters)
        if estimated > USABLE * cell.topology.hardware.hbm:
            continue
        print(f"{name}: estimated at {estimated / _GIB:.1f} GiB, compiling ...", flush=True)
        result = planned(size, stage, name, quick=quick)
        if result["plan"]["fits"]:
            return {"smallest": result, "tried": tried}
        tried.append({name: result["plan"][name] for name in ("topology", "mesh", "hbm")})
    raise QwenVLError(f"no slice of {generation} holds {size} {stage}")


def page(found: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """docs/plan.md."""
    total = len(list(cells()))
    lines = [_HEAD, f"Made by `.venv/bin/python -m tools.plan_grid`: {len(found)} of {total} cells are in docs/plan."]
    if len(found) < total:
        lines += [
            "",
            "**The grid is not complete**: a cell with a dash was not compiled yet, and nothing is said of it.",
        ]
    lines += ["", f"| | {' | '.join(SLICES)} |", "| --- " * (len(SLICES) + 1) + "|"]
    for size in SIZES:
        for stage in STAGES:
            row = (_cell(found.get((size, stage, slice_))) for slice_ in SLICES)
            lines.append(f"| {size.upper().replace('_', '-')} {stage.upper()} | {' | '.join(row)} |")
    lines += [*_smallest(), *_assumed(found), *_recipes(found), *_flags()]
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    plan = found["plan"]
    memory, limit = plan["hbm"]["total"], plan["hbm"]["limit"]
    taken = (
        f"{memory / _GIB:.1f} of {limit / _GIB:.1f} GiB" if memory is not None else f"more than {limit / _GIB:.1f} GiB"
    )
    days = f"{plan['days']:.1f}" if plan["days"] >= 0.1 else f"{plan['days']:.2f}"
    return f"{taken}, {days} days" if plan["fits"] else f"does not fit: {taken}"


def smallest_path(generation: str) -> Path:
    """The file of the smallest slice of a generation."""
    return FOLDER / "smallest" / f"{'-'.join(LARGEST)}-{generation}.json"


def _smallest() -> Iterator[str]:
    """The smallest slices that hold the largest cell."""
    size, stage = (word.upper().replace("_", "-") for word in LARGEST)
    for path in sorted(smallest_path("any").parent.glob("*.json")):
        found = json.loads(path.read_text())
        held, plan = found["smallest"], found["smallest"]["plan"]
        tried = "".join(f"; {one['topology']} does not hold it with the rule's mesh" for one in found["tried"])
        yield ""
        name = f"{plan['topology']}**, {plan['devices']} devices"
        yield f"**{size} {stage} fits on {name}: {_cell(held)}{tried}. Smaller slices"
        yield f"are estimated to be too small, or do not divide its batch. `{held['command']}`"


def _assumed(found: dict[tuple[str, str, str], dict[str, Any]]) -> Iterator[str]:
    """What was assumed of the batches of each stage."""
    yield from ("", "## What is assumed", "")
    for stage in STAGES:
        notes = {tuple(one["assumed"]) for (_, name, _), one in found.items() if name == stage}
        for note in sorted(notes)[:1]:
            yield f"- **{stage.upper()}**: {'; '.join(note)} (rows rounded up for the mesh)."
    generated = sum(one["code_generated"] for one in found.values())
    yield f"- Code was generated for {generated} of the {len(found)} cells; for the others the compiler was stopped"
    yield "  once all buffers had their memory, which changes none of the figures."
    versions = sorted({f"jax {v['jax']}, libtpu {v['libtpu']}" for v in (one["versions"] for one in found.values())})
    dates = sorted({one["date"] for one in found.values()})
    if dates:
        yield f"- {'; '.join(versions)}; {dates[0]} to {dates[-1]}."


def _recipes(found: dict[tuple[str, str, str], dict[str, Any]]) -> Iterator[str]:
    """Commands of the cells that fit, and what is said of the others."""
    yield from ("", "## Recipes", "")
    yield "A command goes to every host of the slice, as `launch/` has it, with the flags of these numbers in the"
    yield "variable `LIBTPU_INIT_ARGS`; what each does, and why, stands below."
    yield from ("", "| size | stage | slice | command | flags |", "| --- | --- | --- | --- | --- |")
    for size, stage, slice_ in cells():
        if one := found.get((size, stage, slice_)):
            text = f"`{one['command']}`" if one["plan"]["fits"] else f"does not fit: {one['advice']}"
            flags = _flags_for(slice_)
            yield f"| {size.upper().replace('_', '-')} | {stage.upper()} | {slice_} | {text} | {flags} |"


def _flags_for(slice_: str) -> str:
    """Numbers of the flags that take less memory or send less in the trials of a slice; how many of them were tried."""
    trials, numbers, tried, known = plan_flags.read(), [], 0, 0
    for number, (flags, _, generation) in enumerate(plan_flags.FLAGS, 1):
        for cell in plan_flags.CELLS:
            without, with_ = (trials.get(plan_flags.key_of(given, cell)) for given in ("", flags))
            known += cell[2] == slice_ and slice_.startswith(generation)
            if cell[2] == slice_ and slice_.startswith(generation) and without and with_:
                tried += 1
                # A flag with which the compiler came to no program has no figures.
                pairs = [(with_[name], without[name]) for name in ("hbm", "ici")]
                if any(None in pair for pair in pairs):
                    continue
                less = [one < 0.99 * other for one, other in pairs]
                more = [one > 1.01 * other for one, other in pairs]
                if any(less) and not any(more):
                    numbers.append(number)
    if not tried:
        return "not tried"
    return (", ".join(map(str, numbers)) or "none") + ("" if tried == known else f" ({tried} of {known} tried)")


def _flags() -> Iterator[str]:
    """What each flag does to compiled programs."""
    yield from ("", "## Flags", "")
    yield "Compiled by `.venv/bin/python -m tools.plan_flags` with each flag and without: HBM of a device, and the"
    yield "bound of what it sends. A flag stands beside a recipe if it lowers one by more than 1 % and raises neither,"
    yield "on that slice. None was timed on hardware, where what overlaps is seen too: try the others as well."
    yield from ("", "| | flag | why | cell | HBM without, with it | ICI bound without, with it |")
    yield "| --- | --- | --- | --- | --- | --- |"
    trials = plan_flags.read()
    for number, (flags, why, generation) in enumerate(plan_flags.FLAGS, 1):
        for size, stage, slice_ in plan_flags.CELLS:
            if not slice_.startswith(generation):
                continue
            pair = [trials.get(plan_flags.key_of(given, (size, stage, slice_))) for given in ("", flags)]
            found = [one for one in pair if one]
            hbm = f"{', '.join(_figure(one['hbm'], 2, _GIB) for one in found)} GiB" if len(found) == 2 else "not tried"
            ici = f"{', '.join(_figure(one['ici'], 3) for one in found)} s" if len(found) == 2 else "not tried"
            yield f"| {number} | `{flags}` | {why} | {size.upper()} {stage.upper()} {slice_} | {hbm} | {ici} |"


def _figure(value: float | None, digits: int, unit: int = 1) -> str:
    return "unknown" if value is None else f"{value / unit:.{digits}f}"


def read() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The cells that have their files."""
    return {cell: json.loads(path_of(*cell).read_text()) for cell in cells() if path_of(*cell).exists()}


def main() -> None:
    """Compiles the cells that are missing, and writes the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="cells whose file's name holds this")
    parser.add_argument("--limit", metavar="N", type=int, help="cells at most")
    parser.add_argument(
        "--smallest", metavar="GENERATION", choices=_LARGEST_OF, help="look for the smallest slice alone"
    )
    parser.add_argument("--full", action="store_true", help="generate code too")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if options.smallest:
        path = smallest_path(options.smallest)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(smallest(options.smallest, quick=not options.full), indent=2) + "\n")
        PAGE.write_text(page(read()))
        return
    missing = [cell for cell in cells() if not path_of(*cell).exists() and options.only in path_of(*cell).name]
    for cell in missing[: options.limit]:
        try:
            result = planned(*cell, quick=not options.full)
        except QwenVLError as error:
            print(f"{' '.join(cell)}: {error}", flush=True)
            continue
        path = path_of(*cell)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(path)
        print(f"{' '.join(cell)}: {_cell(result)}, {result['plan']['compile_seconds']:.0f} s", flush=True)
        PAGE.write_text(page(read()))
    PAGE.write_text(page(read()))


if __name__ == "__main__":
    main()
