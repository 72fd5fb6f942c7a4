"""`import qwenvl_jax` is light, and gives the names it promises."""

import importlib
import json
import statistics
import subprocess
import sys
import time
import types

import pytest

import qwenvl_jax

HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "tensorflow",
    "tensorflow_datasets",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "http.server",
    "numba",
    "matplotlib",
    "grain",
    "orbax",
)


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_pulls_in_nothing_heavy():
    baseline = "import json, sys, jax, flax.nnx; before = set(sys.modules)"
    loaded = json.loads(_python(f"{baseline}; import qwenvl_jax; print(json.dumps(sorted(set(sys.modules) - before)))"))
    found = [name for name in loaded if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)]
    assert found == []


@pytest.mark.parametrize(
    "command", ["--version", "--help", "demo --help", "train --help", "convert --help", "chat --help"]
)
def test_help_needs_no_jax(command):
    code = "import sys, qwenvl_jax.cli\ntry: qwenvl_jax.cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *command.split()], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_import_takes_under_two_seconds_beyond_jax_and_flax():
    def seconds(modules: str) -> float:
        start = time.perf_counter()
        _python(f"import {modules}")
        return time.perf_counter() - start

    alone, together = [], []
    for _ in range(3):  # in turn, so that other load falls on both
        alone.append(seconds("jax, flax.nnx"))
        together.append(seconds("jax, flax.nnx, qwenvl_jax"))
    assert statistics.median(together) - statistics.median(alone) < 2.0


@pytest.mark.parametrize("name", qwenvl_jax.__all__)
def test_every_name_is_there(name):
    home = importlib.import_module(qwenvl_jax._MODULE_OF[name])
    assert getattr(qwenvl_jax, name) is getattr(home, name)
    assert name in dir(qwenvl_jax)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'QwenLV'"):
        qwenvl_jax.QwenLV  # noqa: B018


@pytest.mark.parametrize(
    "first", ["import qwenvl_jax.generate", "from qwenvl_jax.generate import chat", "import qwenvl_jax"]
)
def test_generate_is_the_function_whoever_imports_first(first):
    code = f"{first}; import qwenvl_jax as qv; print(type(qv.generate).__name__, qv.generate.__module__)"
    assert _python(code).split() == [types.FunctionType.__name__, "qwenvl_jax.generate"]
