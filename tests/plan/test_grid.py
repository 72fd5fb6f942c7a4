"""The page of all cells, made from the files of those that are there."""

import dataclasses
import json
import os

import pytest

from qwenvl_jax.checkpoint.hf import parameter_count
from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.plan.plan import layout_of, read_cells
from tools import plan_flags, plan_grid

GIB = 2**30


def cell(fits: bool) -> dict:
    hbm = {"limit": 16 * GIB, "arguments": GIB, "temporaries": 9 * GIB, "total": 10 * GIB}
    return {
        "plan": {"fits": fits, "hbm": hbm, "days": 6.34},
        "command": "qwenvl-jax train configs/pretrain/s1.py --model qwen3_vl_2b",
        "advice": None if fits else "--microbatches 4",
        "assumed": ["full rows", "largest frames"],
        "code_generated": False,
        "versions": {"jax": "1", "libtpu": "2"},
        "date": "2026-01-01",
    }


def test_the_page_is_made_of_the_files_that_are_there():
    assert plan_grid.PAGE.read_text() == plan_grid.page(plan_grid.read())


@pytest.mark.parametrize("found", plan_grid.read(), ids="-".join)
def test_committed_cells_are_those_of_today(found):
    """Of today's rule; and they send what they must: each weight is gathered once at least, as bf16."""
    size, stage, topology = found
    plan = plan_grid.read()[found]["plan"]
    (cell,) = read_cells(f"configs/pretrain/{stage}.py", [], topology=topology, model=f"qwen3_vl_{size}")
    layout, by_rule = layout_of(cell)
    assert by_rule and {**plan["mesh"], "override": tuple(plan["mesh"].get("override", ()))} == {
        **dataclasses.asdict(layout.mesh),
        "microbatches": layout.microbatches,
        "remat": layout.remat,
    }
    assert plan["parameters"] == parameter_count(cell.model)[0]
    mesh = layout.mesh
    split = mesh.fsdp * mesh.expert * mesh.context
    gathered = 2 * plan["parameters"] * (split - 1) // split // (mesh.tensor * mesh.expert)
    assert sum(plan["collective_bytes"].values()) > gathered


@pytest.fixture
def no_trials(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_flags, "PATH", tmp_path / "flags.json")
    return tmp_path / "flags.json"


def test_flags_stand_beside_the_slices_on_which_they_help(no_trials):
    """Less of one and more of neither."""
    first, cell_ = plan_flags.FLAGS[0][0], plan_flags.CELLS[0]
    figures = {
        plan_flags.key_of("", cell_): {"hbm": 100 * GIB, "sent": {}, "ici": 1.0},
        plan_flags.key_of(first, cell_): {"hbm": 90 * GIB, "sent": {}, "ici": 1.0},
        plan_flags.key_of(plan_flags.FLAGS[1][0], cell_): {"hbm": 90 * GIB, "sent": {}, "ici": 1.1},
    }
    no_trials.write_text(json.dumps(figures))
    text = plan_grid.page(dict.fromkeys(plan_grid.cells(), cell(True)))
    command = "`qwenvl-jax train configs/pretrain/s1.py --model qwen3_vl_2b`"
    assert f"| 8B | S2 | v5e:16x16 | {command} | 1 |" in text
    assert f"| 8B | S2 | v5p:8x8x8 | {command} | not tried |" in text
    assert f"| 1 | `{first}` | " in text and "| 2B S1 v5e:16x16 | 100.00, 90.00 GiB | 1.000, 1.000 s |" in text


def test_a_trial_that_failed_is_tried_again(no_trials, monkeypatch, capsys):
    """And loses none of the others: the machine may have been short of memory."""
    first, cell_ = plan_flags.FLAGS[0][0], plan_flags.CELLS[0]
    figures = {"hbm": GIB, "sent": {}, "ici": 1.0}
    no_trials.write_text(json.dumps({plan_flags.key_of("", cell_): figures}))
    answers = iter([QwenVLError("out of memory on this machine?"), QwenVLError("again")])

    def make_plan(*given, **named):
        raise next(answers)

    monkeypatch.setattr(plan_flags, "make_plan", make_plan)
    monkeypatch.setattr("sys.argv", ["plan_flags", "--limit", "1"])
    for reason in ("out of memory on this machine?", "again"):
        plan_flags.main()
        found = plan_flags.read()
        assert found[plan_flags.key_of(first, cell_)]["error"] == reason
        assert found[plan_flags.key_of("", cell_)] == figures


def test_flags_are_given_to_libtpu_and_taken_back(monkeypatch):
    monkeypatch.setenv(plan_flags.ARGUMENTS, "--mine=1")
    with plan_flags._given("--yours=2"):
        assert os.environ[plan_flags.ARGUMENTS] == "--mine=1 --yours=2"
    assert os.environ[plan_flags.ARGUMENTS] == "--mine=1"


def test_a_partial_grid_says_so(no_trials):
    first, second = ("2b", "s1", "v5e:16x16"), ("2b", "s2", "v6e:16x16")
    text = plan_grid.page({first: cell(True), second: cell(False)})
    assert "2 of 96 cells" in text and "The grid is not complete" in text
    assert "| 2B S1 | 10.0 of 16.0 GiB, 6.3 days | - | - | - |" in text
    assert "| 2B S2 | - | does not fit: 10.0 of 16.0 GiB | - | - |" in text
    assert "| 2B | S1 | v5e:16x16 | `qwenvl-jax train configs/pretrain/s1.py --model qwen3_vl_2b` | not tried |" in text
    assert "| 2B | S2 | v6e:16x16 | does not fit: --microbatches 4 | not tried |" in text
    whole = plan_grid.page(dict.fromkeys(plan_grid.cells(), cell(True)))
    assert "96 of 96 cells" in whole and "not complete" not in whole


def test_every_cell_has_a_file_of_its_own():
    paths = {plan_grid.path_of(*one) for one in plan_grid.cells()}
    assert len(paths) == 96
    assert {path.parent for path in paths} == {plan_grid.FOLDER}


def test_the_smallest_slice_is_the_first_that_holds_it(monkeypatch, tmp_path):
    """Those that are estimated to be too small are not compiled, those that divide no batch neither."""
    asked = []

    def planned(size, stage, topology, *, quick):
        asked.append(topology)
        found = cell(len(asked) == 2)
        found["plan"] |= {"topology": topology, "devices": 64, "mesh": {"fsdp": 64}}
        return found

    monkeypatch.setattr(plan_grid, "planned", planned)
    monkeypatch.setattr(plan_grid, "FOLDER", tmp_path)
    found = plan_grid.smallest("v5p", quick=True)
    assert asked[0] == "v5p:4x4x4" and found["smallest"]["plan"]["topology"] == asked[1]
    assert [one["topology"] for one in found["tried"]] == asked[:1]
    path = plan_grid.smallest_path("v5p")
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    text = plan_grid.page({})
    assert (
        f"**235B-A22B S3 fits on {asked[1]}**" in text
        and f"; {asked[0]} does not hold it with the rule's mesh. " in text
    )
