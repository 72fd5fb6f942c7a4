"""A pytest plugin that records which tests are evidence that a generation of models is supported, and how they ended.

    python -m pytest -p tests.support --support-results docs/support.json

runs those tests alone. A test is evidence if its marks together name a column of the table and a model type:

    @pytest.mark.support("exact", model_type="qwen3_vl")

The two may stand apart, such as the column on a module and the model type on a parameter (see `generations`). A model
type marked with `yarn=True` is one with YaRN: what would show the column "exact" shows "YaRN" of it. The results are
written by the process that collects the others' reports, so that the tests may be spread over several.
"""

import datetime
import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

COLUMNS = ("loads", "exact", "exports", "trains", "YaRN", "FP8")
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
VERSIONS = ("jax", "jaxlib", "flax", "numpy", "transformers", "torch")
_PROPERTY = "support"


def generations(names: Iterable[str]) -> list:
    """Parameters of a test, each marked with its model type: names such as "qwen3_vl" or "qwen3_vl_yarn"."""
    marks = {
        name: pytest.mark.support(model_type=name.removesuffix("_yarn"), yarn=name.endswith("_yarn")) for name in names
    }
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


def shown_by(marks: Iterable[pytest.Mark]) -> Iterator[tuple[str, str]]:
    """(model type, column) that a test with these `support` marks is evidence for.

    Raises:
      pytest.UsageError: a column or a model type that does not exist, or one without the other.
    """
    marks = list(marks)
    columns = list(dict.fromkeys(column for mark in marks for column in mark.args))
    types = {}
    for mark in marks:
        named = mark.kwargs.get("model_type", ())
        for model_type in (named,) if isinstance(named, str) else named:
            types[model_type] = types.get(model_type, False) or mark.kwargs.get("yarn", False)
    odd = [name for name in columns if name not in COLUMNS] + [name for name in types if name not in MODEL_TYPES]
    if odd:
        raise pytest.UsageError(f"support: {odd[0]!r} is neither of {', '.join(COLUMNS)} nor of {MODEL_TYPES}.")
    if not columns:
        return  # a parameter marked for tests of which some are evidence
    if not types:
        raise pytest.UsageError("support: a test is marked with a column but with no model type; add model_type=...")
    for model_type, yarn in types.items():
        yield from ((model_type, "YaRN" if yarn and column == "exact" else column) for column in columns)


def pytest_addoption(parser):
    parser.addoption(
        "--support-results",
        metavar="FILE",
        type=Path,
        help="run the tests that are evidence, and write how they ended to FILE",
    )


def pytest_configure(config):
    if config.getoption("--support-results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "support-recorder")


def pytest_collection_modifyitems(config, items):
    evidence, others = [], []
    for item in items:
        cells = sorted(set(shown_by(item.iter_markers("support"))))
        (evidence if cells else others).append(item)
        item.user_properties += [(_PROPERTY, cells)] if cells else []
    if config.getoption("--support-results"):
        items[:] = evidence
        config.hook.pytest_deselected(items=others)


class Recorder:
    """Gathers the outcome of every test that is evidence, and writes them at the end."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.outcomes: dict[str, str] = {}
        self.cells: dict[str, list[tuple[str, str]]] = {}

    def pytest_runtest_logreport(self, report):
        cells = dict(report.user_properties).get(_PROPERTY)
        if not cells:
            return
        nodeid = re.sub(r"@[^\]]*$", "", report.nodeid)  # xdist adds the group
        self.cells[nodeid] = [tuple(cell) for cell in cells]
        before = self.outcomes.get(nodeid)
        # Set up, called and torn down: a failure of any is one, and a skip is no success.
        if report.outcome != "passed":
            self.outcomes[nodeid] = "failed" if "failed" in (before, report.outcome) else report.outcome
        elif before is None:
            self.outcomes[nodeid] = "passed"

    def pytest_sessionfinish(self):
        results = {model_type: {column: {} for column in COLUMNS} for model_type in MODEL_TYPES}
        for nodeid in sorted(self.outcomes):
            for model_type, column in self.cells[nodeid]:
                results[model_type][column][nodeid] = self.outcomes[nodeid]
        command = shlex.join(["python", "-m", "pytest", *map(str, self.config.invocation_params.args)])
        values = {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "machine": f"{platform.system()} {platform.machine()}, CPU",
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
            "results": results,
        }
        self.config.getoption("--support-results").write_text(json.dumps(values, indent=1) + "\n")


def _version(name: str) -> str:
    """The installed version of a package; the reference's may not be there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
