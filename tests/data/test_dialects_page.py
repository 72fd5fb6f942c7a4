"""What docs/dialects.md says is shown by tests that there are."""

import re
from pathlib import Path

from qwenvl_jax.data.settings import DIALECTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/dialects.md").read_text()


def test_every_row_names_a_test_that_exists():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not re.match(r"\| (generation|---)", line)]
    assert len(rows) >= 9 and all(re.search(r"`tests/\S+: test_\w+`", row) for row in rows)
    named = re.findall(r"`(tests/\S+\.py):\s(test_\w+)`", PAGE)
    assert len(named) == PAGE.count("`tests/")
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), test
    assert all(f"`{dialect}`" in PAGE for dialect in DIALECTS)
