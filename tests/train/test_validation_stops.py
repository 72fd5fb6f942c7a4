"""Validation in runs that are asked to stop in its midst, and in runs of several processes: real ones, real signals."""

import numpy as np
import pytest

from qwenvl_jax.train.metrics import read_metrics
from tests.train.judged import write_judged_run
from tests.train.several import finish, said, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("run")
    write_judged_run(folder, clip)
    return folder


def run(config, out, count=1, moment=None):
    """Carries out the run in so many processes: (statuses, what they said)."""
    logs = config.parent / "logs" / f"{out.name}-{moment}"
    program = ["-m", "tests.train.killed", moment] if moment else ["train"]
    statuses = finish(start(count, *program, config, "--out", out, logs=logs))
    return statuses, said(logs)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing disturbed."""
    statuses, told = run(folder / "judged.py", folder / "whole")
    assert statuses == [0], told
    return folder / "whole"


@pytest.mark.parametrize(
    ("moment", "step", "judged"),
    [("batch:3", 4, [2]), ("token:8", 4, [2]), ("token:14", 5, [2, 4])],
    ids=["between batches", "between tokens", "at the end of the run"],
)
def test_a_signal_in_its_midst(folder, whole, moment, step, judged):
    """The checkpoint is written at once; the same command judges that step, and the files are as if nothing was."""
    out = folder / moment.replace(":", "-")
    statuses, told = run(folder / "judged.py", out, moment=f"SIGTERM:{moment}")
    assert statuses == [130], told
    assert f"s1 step {step}: asked to stop; validation is left to the run that goes on" in told
    assert f"stopped after step {step} of 5; the same command continues" in told
    assert [line["step"] for line in read_metrics(out / "validation.jsonl")] == judged
    assert len(read_metrics(out / "metrics.jsonl")) == step
    assert (out / "checkpoints" / str(step)).is_dir() and not (out / "model").exists()
    statuses, told = run(folder / "judged.py", out)
    assert statuses == [0], told
    for file in ("validation.jsonl", "metrics.jsonl", "model/model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


def test_several_processes(folder):
    """They answer as one does; a signal to either of two stops both in the midst of an answer."""
    config = folder / "several.py"

    def check_alike(out):
        found = read_metrics(out / "validation.jsonl")
        assert [line["step"] for line in found] == [2, 4, 5]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(*(list(line["losses"].values()) for line in (ours, theirs)), rtol=1e-5)
            assert ours["answers"] == theirs["answers"]

    statuses, told = run(config, folder / "one")
    assert statuses == [0], told
    expected = read_metrics(folder / "one" / "validation.jsonl")
    assert [answer["id"] for answer in expected[0]["answers"]] == ["clip-0", "clip-1", "w0", "w1"]

    statuses, told = run(config, folder / "two", 2)
    assert statuses == [0, 0], told
    check_alike(folder / "two")

    for process in (0, 1):
        out = folder / f"two-stopped-{process}"
        statuses, told = run(config, out, 2, f"SIGTERM:token:8:{process}")
        assert statuses == [130, 130], told
        assert "s1 step 4: asked to stop" in told
        assert [line["step"] for line in read_metrics(out / "validation.jsonl")] == [2]
        assert (out / "checkpoints" / "4").is_dir()
        statuses, told = run(config, out, 2)
        assert statuses == [0, 0], told
        check_alike(out)
