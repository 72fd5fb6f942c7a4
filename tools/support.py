"""Writes docs/support.md from the results of the tests that are evidence, and from runs with released weights.

    make support                            # runs the tests, then this
    .venv/bin/python -m tools.support       # the page alone, from docs/support.json and docs/released.json

docs/support.json is written by the plugin tests/support.py, rows of docs/released.json by tools/compare_released.py.
No cell of the page is written by hand.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwenvl_jax.checkpoint.hf import parameter_count
from qwenvl_jax.presets import PRESETS
from tests.support import COLUMNS, MODEL_TYPES

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
}
# What Qwen published no weights of: the older generations were quantized by AWQ and GPTQ, never to FP8.
NOT_RELEASED = {("qwen2_vl", "FP8"), ("qwen2_5_vl", "FP8")}
MEANING = {
    "loads": "config.json in the released spelling and tensors under public names give the model that they describe",
    "exact": "ids, positions, grids and patches identical to the reference's, logits and gradients within 1e-4, greedy "
    "tokens identical",
    "exports": "the reference loads what is written, bit for bit; public to native and back is bit-equal",
    "trains": "two optimizer steps lower the loss of their batch, and only what may move does",
    "YaRN": "as exact, with stretched frequencies",
    "FP8": "eight-bit weights are read as the numbers that they stand for",
}
_HEAD = """\
# What is supported

Written by `make support`; do not edit.
"""
_RANDOM = """
## Exact on random weights of this architecture

Tiny models with every part of their generation, all weights random, computed in float32 beside the reference
implementation or against its frozen answers. A cell is *yes* if all of its tests passed, with their number; *no* if
any did not.
"""
_RELEASED = """
## Run with the released weights

This needs the weights, and so a network; `python -m tools.compare_released NAME` makes a row, on fixed inputs.
"""


def page(results: Mapping | None, released: Sequence[Mapping]) -> str:
    """The page.

    Args:
      results: what the plugin wrote; None if it never ran.
      released: rows of `tools.compare_released`.
    """
    parts = [_HEAD, _RANDOM, "\n", *_table(results), "\n", *_meanings(), "\n"]
    if results is None:
        parts.append("The tests have not been run for this page yet: run `make support`.\n")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        parts.append(f"{results['date']}, {results['machine']}; {versions}; by\n\n```bash\n{results['command']}\n```\n")
        parts.append("\nThe tests of each cell stand in [support.json](support.json).\n")
    return "".join([*parts, _RELEASED, "\n", *_released_table(released)])


def cell(results: Mapping | None, model_type: str, column: str) -> str:
    """What stands for a generation in a column."""
    if (model_type, column) in NOT_RELEASED:
        return "not released"
    outcomes = list(results["results"].get(model_type, {}).get(column, {}).values()) if results else []
    if not outcomes:
        return "not tested"
    passed = outcomes.count("passed")
    return (
        f"yes ({passed})"
        if passed == len(outcomes)
        else f"no ({len(outcomes) - passed} of {len(outcomes)} did not pass)"
    )


def _table(results: Mapping | None) -> list[str]:
    lines = [_row("generation", "public sizes", *COLUMNS), _row(*["---"] * (2 + len(COLUMNS)))]
    for model_type in MODEL_TYPES:
        cells = [cell(results, model_type, column) for column in COLUMNS]
        lines.append(_row(f"{NAMES[model_type]} (`{model_type}`)", _sizes(model_type), *cells))
    return lines


def _sizes(model_type: str) -> str:
    """The presets of a generation, with their parameters."""
    shapes = {name: config for name, config in PRESETS.items() if config.model_type == model_type}
    return ", ".join(f"`{name}` ({parameter_count(config)[0] / 1e9:.1f} B)" for name, config in shapes.items())


def _meanings() -> list[str]:
    return [f"- **{column}**: {MEANING[column]}.\n" for column in COLUMNS]


def _released_table(rows: Sequence[Mapping]) -> list[str]:
    if not rows:
        return ["No released checkpoint has been run yet: [released.json](released.json) is empty.\n"]
    keys = ("name", "revision", "date", "device", "dtype", "largest difference", "greedy tokens agree", "versions")
    return [_row(*keys), _row(*["---"] * len(keys)), *(_row(*(str(row[key]) for key in keys)) for row in rows)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def committed() -> tuple[Mapping | None, list[Mapping]]:
    """The results and the rows in docs/."""
    results = DOCS / "support.json"
    return (
        json.loads(results.read_text()) if results.exists() else None,
        json.loads((DOCS / "released.json").read_text()),
    )


def main() -> None:
    (DOCS / "support.md").write_text(page(*committed()))


if __name__ == "__main__":
    main()
