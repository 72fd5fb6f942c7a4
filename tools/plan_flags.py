"""Compiles cells of the grid with flags of libtpu, one by one, into docs/plan/flags.json; docs/plan.md shows it.

    .venv/bin/python -m tools.plan_flags [--limit N]

What is there is left alone, so a run that was stopped goes on where it was; `python -m tools.plan_grid --limit 0` then
shows it. The compiler tells what a flag does to memory and to what devices exchange; how it changes a step's time, only
hardware can.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.plan.plan import layout_of, make_plan, read_cells

PATH = Path(__file__).parents[1] / "docs" / "plan" / "flags.json"
ARGUMENTS = "LIBTPU_INIT_ARGS"
# Flags that are set together, why, and the generations that they are for ("" for all).
FLAGS: tuple[tuple[str, str, str], ...] = (
    (
        "--xla_tpu_prefer_async_allgather_to_allreduce=true",
        "weights in pieces narrower than a tile are gathered as such; by default they are summed with zeros, at twice "
        "the bytes",
        "",
    ),
    (
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "a gather may run beside several products in place of one",
        "",
    ),
    (
        "--xla_tpu_scoped_vmem_limit_kib=98304",
        "v6e has 128 MiB of fast memory: larger fusions, fewer ways to HBM",
        "v6e",
    ),
    (
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
        "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true "
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
        "SparseCores see to exchanges while TensorCores compute",
        "tpu7x",
    ),
)
CELLS = (("2b", "s1", "v5e:16x16"), ("8b", "s1", "v6e:16x16"), ("8b", "s1", "v5p:8x8x8"), ("8b", "s1", "tpu7x:4x4x8"))


def trials() -> Iterator[tuple[str, tuple[str, str, str]]]:
    """(flags, cell) of all that is compiled; no flags first."""
    for cell in CELLS:
        for flags, _, generation in (("", "", ""), *FLAGS):
            if cell[2].startswith(generation):
                yield flags, cell


def key_of(flags: str, cell: tuple[str, str, str]) -> str:
    """What a trial has its figures under."""
    return f"{' '.join(cell)} {flags}".strip()


@contextlib.contextmanager
def _given(flags: str) -> Iterator[None]:
    """libtpu reads its flags from the environment; those that are there already stay."""
    before = os.environ.get(ARGUMENTS)
    os.environ[ARGUMENTS] = " ".join(part for part in (before, flags) if part)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ARGUMENTS]
        else:
            os.environ[ARGUMENTS] = before


def measured(flags: str, size: str, stage: str, topology: str) -> dict[str, Any]:
    """What the compiler says of a cell with these flags: bytes of a device."""
    (cell,) = read_cells(f"configs/pretrain/{stage}.py", [], topology=topology, model=f"qwen3_vl_{size}")
    layout, by_rule = layout_of(cell)
    with _given(flags):
        try:
            plan = make_plan(cell, layout, by_rule=by_rule, quick=True)
        except QwenVLError as error:  # flags that this libtpu does not know, say; the other trials go on
            return {"hbm": None, "sent": None, "ici": None, "error": str(error)}
    return {"hbm": plan.memory.total, "sent": plan.compiled.sent, "ici": plan.bounds["ici"]}


def read() -> dict[str, Any]:
    """The trials that have their figures."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def main() -> None:
    """Compiles what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", metavar="N", type=int, help="trials at most")
    options = parser.parse_args()
    found = read()
    # One that failed is tried again: this machine may have been short of memory.
    missing = [trial for trial in trials() if "error" in found.get(key_of(*trial), {"error": "not tried"})]
    for flags, cell in missing[: options.limit]:
        found[key_of(flags, cell)] = measured(flags, *cell)
        partial = PATH.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=2) + "\n")
        partial.replace(PATH)
        print(key_of(flags, cell), json.dumps(found[key_of(flags, cell)]), flush=True)


if __name__ == "__main__":
    main()
