"""The page of all cells, made from the files of those that are there."""

from tools import plan_grid

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


def test_a_partial_grid_says_so():
    first, second = ("2b", "s1", "v5e:16x16"), ("2b", "s2", "v6e:16x16")
    text = plan_grid.page({first: cell(True), second: cell(False)})
    assert "2 of 96 cells" in text and "The grid is not complete" in text
    assert "| 2B S1 | 10.0 of 16.0 GiB, 6.3 days | - | - | - |" in text
    assert "| 2B S2 | - | does not fit: 10.0 of 16.0 GiB | - | - |" in text
    assert "| 2B | S1 | v5e:16x16 | `qwenvl-jax train configs/pretrain/s1.py --model qwen3_vl_2b` |" in text
    assert "| 2B | S2 | v6e:16x16 | does not fit: --microbatches 4 |" in text
    whole = plan_grid.page(dict.fromkeys(plan_grid.cells(), cell(True)))
    assert "96 of 96 cells" in whole and "not complete" not in whole


def test_every_cell_has_a_file_of_its_own():
    paths = {plan_grid.path_of(*one) for one in plan_grid.cells()}
    assert len(paths) == 96
    assert {path.parent for path in paths} == {plan_grid.FOLDER}
