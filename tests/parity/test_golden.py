"""The reference still gives the frozen answers; if it does not, the failure says which side moved."""

import pytest

from tests.golden.answers import differences, frozen, our_answers, verdict
from tests.golden.checkpoints import CONFIGS, write_checkpoint
from tests.parity.reference import REFERENCE_VERSION
from tools.make_golden import reference_answers


@pytest.mark.parametrize("model_type", CONFIGS)
def test_nobody_moved(model_type, tmp_path):
    expected, metadata = frozen(model_type)
    write_checkpoint(tmp_path, model_type)
    live, _ = reference_answers(tmp_path, model_type)
    moved = verdict(
        differences(live, expected),
        differences(our_answers(tmp_path, model_type), expected),
        f"{metadata['reference']}, torch {metadata['torch']} (here: transformers {REFERENCE_VERSION})",
    )
    assert moved is None, moved
