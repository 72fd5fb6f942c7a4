"""The committed answers of the reference, where neither torch nor transformers is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import compiling
from tests.golden.answers import FOLDER, STEPS, differences, frozen, our_answers, verdict
from tests.golden.checkpoints import CONFIGS, conversations, tensor, write_checkpoint

ROOT = Path(__file__).parents[2]
WEIGHTS = [0.754845380783081, 1.2401678562164307, 0.9921521544456482]


def generations() -> list:
    """Each generation, marked with itself."""
    yarn = {
        model_type: "yarn" in json.dumps(config.get("text_config", config)) for model_type, config in CONFIGS.items()
    }
    return [
        pytest.param(model_type, marks=pytest.mark.support(model_type=model_type, yarn=yarn[model_type]))
        for model_type in CONFIGS
    ]


@pytest.mark.support("loads", "exact")
@pytest.mark.parametrize("model_type", generations())
def test_ours_equal_the_frozen(model_type, tmp_path):
    """Ids, positions, grids, patches and greedy tokens exactly; logits, merged tokens and DeepStack within 1e-4."""
    expected, _ = frozen(model_type)
    write_checkpoint(tmp_path, model_type)
    assert not differences(our_answers(tmp_path, model_type), expected)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_is_frozen(model_type):
    """Each file says what made it, and holds enough to mean something."""
    answers, metadata = frozen(model_type)
    assert metadata["reference"].startswith("transformers ") and metadata["tool"] == "tools/make_golden.py"
    assert {"torch", "numpy", "tokenizers", "date", "margins"} <= metadata.keys()
    assert (FOLDER / f"{model_type}.npz").stat().st_size < 150_000
    names = list(conversations(model_type))
    assert {name.partition("/")[0] for name in answers} == set(names)
    for name in names:
        assert answers[f"{name}/greedy"].shape == (STEPS,)
        assert answers[f"{name}/logits"].shape == (12, 40)
        assert metadata["margins"][name] > 1e-3
    assert len({tuple(grid) for grid in answers["images/grids"]}) == 2 and len(answers["mixed/grids"]) == 3


def test_weights_are_what_they_were():
    """The very values: should NumPy's generator ever give others, this says so before any answer does."""
    assert tensor("a.weight", (3,), 0).tolist() == WEIGHTS
    assert np.abs(tensor("a.proj.weight", (8, 16), 1)).max() <= 0.5
    assert not np.array_equal(tensor("a.proj.weight", (8, 16), 1), tensor("a.proj.weight", (8, 16), 2))


def test_torch_is_not_needed(tmp_path):
    """A process in which torch and transformers cannot be imported answers too."""
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from tests.golden.answers import differences, frozen, our_answers\n"
        "from tests.golden.checkpoints import write_checkpoint\n"
        "folder = Path(sys.argv[1]); write_checkpoint(folder, 'qwen3_vl')\n"
        "found = differences(our_answers(folder, 'qwen3_vl'), frozen('qwen3_vl')[0])\n"
        "assert not found, found\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('torch', 'transformers')\n"
        "            and sys.modules[name] is not None]\n"
    )
    environment = {**os.environ, "XLA_FLAGS": compiling.quickly()}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_differences_and_who_moved():
    answers = {"a/tokens": np.arange(3, dtype=np.int32), "a/logits": np.zeros((2, 2), np.float32)}
    assert differences(answers, answers) == []
    near = answers | {"a/logits": np.full((2, 2), 9e-5, np.float32)}
    assert differences(near, answers) == []
    far = answers | {"a/logits": np.array([[0, 0], [0, 2e-3]], np.float32)}
    assert differences(far, answers) == ["a/logits is off by 0.002"]
    assert differences(answers | {"a/logits": np.full((2, 2), np.nan, np.float32)}, answers)
    assert differences(answers | {"a/tokens": np.array([0, 1, 5], np.int32)}, answers) == [
        "a/tokens differs in 1 of 3 places"
    ]
    assert differences({"a/logits": answers["a/logits"]}, answers) == ["a/tokens is there on one side only"]
    assert differences(answers | {"a/tokens": np.arange(2, dtype=np.int32)}, answers) == [
        "a/tokens has shape (2,), not (3,)"
    ]
    assert verdict([], [], "transformers 1") is None
    assert verdict(["x"], [], "transformers 1").startswith("the reference moved since")
    assert verdict([], ["x"], "transformers 1").startswith("we moved since")
    assert verdict(["x"], ["y"], "transformers 1").startswith("both moved since")
