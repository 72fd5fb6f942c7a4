"""The floors hold, every module has its place on them, and what is imported is what is declared."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwenvl_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _imports(file: Path):
    """(module, line) of every absolute import in a file; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_floors_hold():
    result = _lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("models/text.py", "import qwenvl_jax.data.sample\n"),
        ("data/sample.py", "from qwenvl_jax.models import text\n"),
        ("ops/rope.py", "from qwenvl_jax import generate\n"),
        ("errors.py", "def f():\n    import qwenvl_jax.config.x\n    from qwenvl_jax.batch import Batch\n"),
        ("unplaced.py", ""),
    ],
)
def test_floors_are_enforced(tmp_path, module, text):
    """Import-linter, with our settings, refuses each of these in a package of the same outline."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for file in _files():
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    (tmp_path / "qwenvl_jax/__init__.py").write_text("from qwenvl_jax import batch\n")
    assert _lint_imports(tmp_path).returncode == 0
    (tmp_path / "qwenvl_jax" / module).write_text(text)
    result = _lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    assert Path(module).stem in result.stdout


def test_inside_modules_import_each_other_directly():
    """`qwenvl_jax.Name` is for users: inside, it would tie a module to floors above its own, unseen by the contract."""
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {
        folder.name for folder in PACKAGE.iterdir() if folder.is_dir()
    }
    allowed = {f"qwenvl_jax.{name}" for name in modules - {"__init__"}} | {"qwenvl_jax.__version__"}
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in _files()
        for name, line in _imports(file)
        if name.split(".")[0] == "qwenvl_jax" and ".".join(name.split(".")[:2]) not in allowed
    ]
    assert wrong == []


def test_every_module_says_what_it_is():
    bare = [
        str(file.relative_to(ROOT))
        for file in _files()
        if (text := file.read_text()) and not ast.get_docstring(ast.parse(text))
    ]
    assert bare == []


def test_jax_for_gpus_is_the_same_jax():
    (plain,) = (text for text in PROJECT["dependencies"] if re.match(r"jax\b", text))
    assert PROJECT["optional-dependencies"]["cuda"] == [plain.replace("jax", "jax[cuda12]", 1)]


def test_declared_dependencies_are_those_imported():
    owners = importlib.metadata.packages_distributions()
    imported = {name.split(".")[0] for file in _files() for name, _ in _imports(file)}
    outside = imported - set(sys.stdlib_module_names) - {"qwenvl_jax"}
    needed = {_canonical(owners.get(name, [name])[0]) for name in outside}
    extras = PROJECT["optional-dependencies"]
    listed = {
        _canonical(re.match(r"[\w.-]+", text)[0])
        for text in PROJECT["dependencies"]
        + [text for name in ("tfds", "beam", "tensorboard", "wandb") for text in extras[name]]
    }
    assert needed == listed - {"qwenvl-jax"}
