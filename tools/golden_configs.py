"""Writes every shipped config as text, a setting a line: `tests/golden/configs/*.txt`.

    .venv/bin/python -m tools.golden_configs

A change of a config, or of a default that one relies on, is then a change of lines that a reviewer reads. The test
`tests/test_configs.py` says which lines moved.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from qwenvl_jax.train.config import flat
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.recipes import DATA_VARIABLE

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/configs"


def shipped() -> dict[str, Path]:
    """Every config file by the name of its text: "pretrain-s0" for configs/pretrain/s0.py."""
    files = sorted((ROOT / "configs").glob("*/*.py"))
    return {f"{file.parent.name}-{file.stem}": file for file in files}


def dump(path: Path) -> str:
    """The settings of a config file as `name = value`, one a line, as they are without any variable set."""
    # Those of the demo write a tokenizer into the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        before = os.environ.pop(DATA_VARIABLE, None)
        try:
            config, _ = load_config_file(path)
        finally:
            if before is not None:
                os.environ[DATA_VARIABLE] = before
    return "".join(f"{name} = {value!r}\n" for name, value in flat(config))


def main() -> None:
    """Writes the texts of all configs, and removes those of configs that are gone."""
    GOLDEN.mkdir(exist_ok=True)
    for name, path in shipped().items():
        (GOLDEN / f"{name}.txt").write_text(dump(path))
    for file in GOLDEN.glob("*.txt"):
        if file.stem not in shipped():
            file.unlink()


if __name__ == "__main__":
    main()
