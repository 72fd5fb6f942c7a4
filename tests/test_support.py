"""The page on what is supported: made of committed results, none of it by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import COLUMNS, MODEL_TYPES, shown_by
from tools import support

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_results_make():
    assert (support.DOCS / "support.md").read_text() == support.page(*support.committed()), "run `make support`"


def test_committed_results_are_those_of_the_documented_command():
    """... and each test that they name is there."""
    results, _ = support.committed()
    if results is None:
        return
    assert "python -m pytest -p tests.support --support-results docs/support.json" in results["command"]
    assert results["results"].keys() == set(MODEL_TYPES)
    for columns in results["results"].values():
        assert columns.keys() == set(COLUMNS)
        for node in {node for tests in columns.values() for node in tests}:
            file, _, name = node.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), node


def test_cells():
    results = {
        "results": {"qwen3_vl": {"exact": {"a": "passed", "b": "passed"}, "trains": {"a": "passed", "b": "failed"}}}
    }
    assert support.cell(results, "qwen3_vl", "exact") == "yes (2)"
    assert support.cell(results, "qwen3_vl", "trains") == "no (1 of 2 did not pass)"
    assert support.cell(results, "qwen3_vl", "YaRN") == "not tested"
    assert support.cell(None, "qwen3_vl", "exact") == "not tested"
    assert support.cell(None, "qwen2_vl", "FP8") == "not released"


def test_what_marks_show():
    def marks(*made):
        return [mark.mark for mark in made]

    mark = pytest.mark.support
    assert list(shown_by(marks(mark("exact"), mark(model_type="qwen2_vl")))) == [("qwen2_vl", "exact")]
    assert list(shown_by(marks(mark("exact", "loads"), mark(model_type="qwen2_vl", yarn=True)))) == [
        ("qwen2_vl", "YaRN"),
        ("qwen2_vl", "loads"),
    ]
    assert list(shown_by(marks(mark("FP8", model_type=("qwen3_vl", "qwen3_vl_moe"))))) == [
        ("qwen3_vl", "FP8"),
        ("qwen3_vl_moe", "FP8"),
    ]
    assert list(shown_by(marks(mark(model_type="qwen2_vl")))) == []
    for odd in (mark("exact"), mark("exakt", model_type="qwen2_vl"), mark("exact", model_type="qwen4")):
        with pytest.raises(pytest.UsageError, match="support: "):
            list(shown_by(marks(odd)))


TESTS = """\
import pytest

MARKS = [pytest.mark.support(model_type="qwen3_vl"), pytest.mark.xdist_group("a b")]

@pytest.fixture(params=[pytest.param(1, marks=MARKS)])
def number(request):
    return request.param

@pytest.mark.support("exact")
def test_right(number):
    pass

@pytest.mark.support("trains")
def test_wrong(number):
    raise AssertionError

@pytest.fixture
def late():
    yield
    raise AssertionError

@pytest.mark.support("FP8", model_type="qwen3_vl")
def test_wrong_in_the_end(late):
    pass

@pytest.mark.support("loads", model_type="qwen3_vl")
def test_skipped():
    pytest.skip("no")

def test_no_evidence(number):
    raise AssertionError
"""


@pytest.mark.parametrize("processes", [(), ("-n", "2", "--dist", "loadgroup")])
def test_results_are_recorded(tmp_path, processes):
    """In one process and in several, failures of any phase among them, evidence alone."""
    (tmp_path / "test_few.py").write_text(TESTS)
    out = tmp_path / "support.json"
    command = ["-m", "pytest", "-p", "tests.support", "--support-results", out, "-q", *processes, "test_few.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert {column: tests for column, tests in results["results"]["qwen3_vl"].items() if tests} == {
        "exact": {"test_few.py::test_right[1]": "passed"},
        "trains": {"test_few.py::test_wrong[1]": "failed"},
        "FP8": {"test_few.py::test_wrong_in_the_end": "failed"},
        "loads": {"test_few.py::test_skipped": "skipped"},
    }
    assert not any(tests for tests in results["results"]["qwen2_vl"].values())
    assert results["command"].startswith("python -m pytest -p tests.support --support-results")
    assert {"python", "jax", "transformers"} <= results["versions"].keys() and results["date"]


@pytest.mark.xdist_group("one")
def test_groups_of_tests_stay_together(request):
    """By the end of its name, from which pytest-xdist takes a test's group."""
    if getattr(request.config.option, "loadgroup", False):  # in a worker of `--dist loadgroup`
        assert request.node.nodeid.endswith("@one")
