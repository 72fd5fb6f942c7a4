"""Compiled memory, and what devices exchange, stay what they were; `tools.golden_plans` writes them anew."""

import json

import pytest

from tests.parallel.test_compiled import needs_libtpu
from tools.golden_plans import CELLS, FOLDER, measured

DRIFT = 0.02
# Sums of a few numbers differ by how the compiler joins them.
LITTLE = 0.001


def moved(before: dict, after: dict) -> list[str]:
    """What differs by more than `DRIFT`, a line each."""
    pairs = {name: (before[name], after[name]) for name in ("arguments", "temporaries", "flops")}
    total = sum(before["sent"].values())
    for key in sorted(before["sent"] | after["sent"]):
        pairs[f"sent {key}"] = before["sent"].get(key, 0), after["sent"].get(key, 0)
    return [
        f"{name}: {was:,} -> {now:,} ({now / was - 1:+.1%})" if was else f"{name}: {was:,} -> {now:,}"
        for name, (was, now) in pairs.items()
        if abs(now - was) > DRIFT * was and not (name.startswith("sent") and abs(now - was) < LITTLE * total)
    ]


def test_what_moved_is_told():
    before = {
        "arguments": 1000,
        "temporaries": 1000,
        "flops": 7,
        "sent": {"fsdp all-gather": 10_000, "fsdp all-reduce": 5},
    }
    assert moved(before, before) == []
    after = before | {
        "temporaries": 1021,
        "arguments": 1019,
        "sent": {"fsdp all-gather": 9_700, "tensor all-reduce": 11},
    }
    assert moved(before, after) == [
        "temporaries: 1,000 -> 1,021 (+2.1%)",
        "sent fsdp all-gather: 10,000 -> 9,700 (-3.0%)",
        "sent tensor all-reduce: 0 -> 11",
    ]


def test_every_cell_has_its_figures():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CELLS)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_a_small_cell_is_what_it_was(name):
    lines = moved(json.loads((FOLDER / f"{name}.json").read_text()), measured(name))
    assert not lines, f"{name} moved: {'; '.join(lines)}; if that is meant: python -m tools.golden_plans {name}"


@needs_libtpu
@pytest.mark.slow
def test_figures_are_those_of_a_program_compiled_to_the_end():
    """Temporaries differ by what the compiler itself is given."""
    quick, whole = measured("experts"), measured("experts", quick=False)
    assert whole.pop("temporaries") == pytest.approx(quick.pop("temporaries"), abs=64 * 2**10)
    assert quick == whole
