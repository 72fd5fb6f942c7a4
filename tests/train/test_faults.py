"""What goes wrong around a run: full and closed disks, data that vanishes, checkpoints of others. Each is told in a
line, leaves the last checkpoint whole, and once it is mended the same command goes on as if nothing had been.
"""

import contextlib
import dataclasses
import errno
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.data.sources import JsonlSource
from qwenvl_jax.errors import SourceError
from qwenvl_jax.train import run_folder
from qwenvl_jax.train.config import TrainConfig
from qwenvl_jax.train.metrics import StepFile, read_metrics
from qwenvl_jax.train.refusals import naming, refusal
from tests.train.tiny_run import ROOT, environment, tiny_config, write_tiny_run

STEPS, EVERY = 43, 8
CONFIG = """\
from tests.train.test_faults import longer_config


def get_config():
    return longer_config({folder!r})
"""


def longer_config(folder: str | Path) -> TrainConfig:
    """Of the tiny run: 43 steps, with checkpoints after 3, 8, 16, ... steps; no sample may fail."""
    config = tiny_config(folder)
    stages = (config.stages[0], dataclasses.replace(config.stages[1], steps=STEPS - 3))
    return dataclasses.replace(config, stages=stages, checkpoint_every=EVERY)


class Runs:
    """Runs of one config."""

    def __init__(self, folder: Path):
        self.folder = folder

    def train(self, out: Path, *more: object, at: int | None = None, command: str = "") -> list[str]:
        """The arguments of a run, with a command that disturbs it at a step."""
        module = ["qwenvl_jax", "train"] if at is None else ["tests.train.disturbed", at, command]
        return [str(word) for word in (sys.executable, "-m", *module, self.folder / "config.py", "--out", out, *more)]

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, clip)
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    return Runs(folder)


@pytest.fixture(scope="module")
def whole(runs):
    """A run that nothing disturbed."""
    done = runs(runs.train(runs.folder / "whole"))
    assert done.returncode == 0, done.stderr
    return runs.folder / "whole"


def told(stderr: str) -> str:
    """The one line that says what is wrong; there is no traceback through our code."""
    assert "qwenvl_jax/train/" not in stderr, stderr  # what a store's own threads print is not ours
    (line,) = (line for line in stderr.splitlines() if line.startswith("qwenvl-jax: error:"))
    return line


def check_equal(out: Path, whole: Path) -> None:
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    for name in ("metrics.jsonl", "model/model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_full_and_closed_disks(runs, whole, tmp_path):
    """Real ones, in a namespace of mounts that ends with the test: the small files and the checkpoints on a disk each.

    The run meets a full disk as it saves; a closed one; then a full one as it writes its metrics, whose file has room
    up to the end of a page.
    """
    small, out = tmp_path / "disk", tmp_path / "disk" / "out"
    checkpoints, kept = out / "checkpoints", tmp_path / "kept"
    small.mkdir()
    fill = "cat /dev/zero > {}/filler 2> /dev/null || true"
    commands = [
        f"mount -t tmpfs -o size=1m none {small}; mkdir -p {checkpoints}",
        f"mount -t tmpfs -o size=64m none {checkpoints}",
    ]
    disturbances = [
        (5, fill.format(checkpoints), f"rm {checkpoints}/filler"),
        (5, f"mount -o remount,ro {checkpoints}", f"mount -o remount,rw {checkpoints}"),
        (5, fill.format(small), f"rm {small}/filler"),
    ]
    for at, command, mended in disturbances:
        commands.append(shlex.join(runs.train(out, at=at, command=command)))
        commands.append(f"echo STATUS $?; ls {checkpoints}; {mended}")
    commands.append(f"{shlex.join(runs.train(out))}; echo STATUS $?; cp -r {out} {kept}")
    script = "\n".join(commands).replace(f"\n{sys.executable}", f"\necho NEXT >&2; {sys.executable}")
    done = runs(["unshare", "--map-root-user", "--mount", "sh", "-c", script])
    first, second, third, last = done.stderr.split("NEXT\n")[1:]
    listed = [part.split() for part in done.stdout.split("STATUS")[1:]]
    assert [words[0] for words in listed] == ["2", "2", "2", "0"], done.stderr
    assert "No space left on device" in told(first) and f"a checkpoint in {checkpoints}" in told(first)
    assert "that of step 3 is whole. Make room or give leave, and start the same command again" in told(first)
    assert "Read-only file system" in told(second) and "that of step 3 is whole" in told(second)
    assert f"{out}/metrics.jsonl cannot be written (No space left on device); make room" in told(third)
    assert "3" in listed[0] and "8" not in listed[0]
    assert "continuing after step 3 of" in second and "continuing after step 3 of" in third
    assert "continuing after step " in last
    check_equal(kept, whole)


@pytest.mark.slow
def test_data_that_vanishes(runs, whole, tmp_path):
    """A file of records ends the run at once; a medium is a failed sample, of which none is allowed here."""
    out = tmp_path / "out"
    reason = r"clip\.mp4.* of 4 samples cannot be used, data\.max_failed=0\.02 allows 0; mend the data"
    for name, at, while_it_runs, before_it_begins in (
        (
            "data.jsonl",
            5,
            r"data\.jsonl cannot be read any more \(No such file or directory\); put it back",
            "data.jsonl",
        ),
        ("clip.mp4", 17, r"stage s1, step \d+: .*" + reason, reason),
    ):
        here, away = runs.folder / name, tmp_path / name
        # Nothing that was read is kept, so that each step reads its samples.
        command = shlex.join(["mv", str(here), str(away)])
        done = runs(runs.train(out, "--data.cache_bytes", 0, at=at, command=command))
        assert done.returncode == 2 and re.search(while_it_runs, told(done.stderr)), done.stderr
        left = sorted(os.listdir(out / "checkpoints"))
        assert left
        done = runs(runs.train(out))
        assert done.returncode == 2 and re.search(before_it_begins, told(done.stderr)), done.stderr
        assert sorted(os.listdir(out / "checkpoints")) == left
        away.rename(here)
    done = runs(runs.train(out))
    assert done.returncode == 0, done.stderr
    check_equal(out, whole)


@pytest.mark.slow
def test_a_checkpoint_of_another_model(runs, whole, tmp_path):
    """Alone in the folder, without the settings that it was made with: it is refused, and left to its own run."""
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoints", out / "checkpoints")
    done = runs(runs.train(out, "--model.text.intermediate_size", 64))
    assert done.returncode == 2, done.stderr
    line = told(done.stderr)
    assert f"the checkpoint {out}/checkpoints/{STEPS} is of another run: it was made with" in line
    assert "model.text.intermediate_size=48, this run has 64; use another output folder, or the old setting" in line
    done = runs(runs.train(out))
    assert done.returncode == 0, done.stderr
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Has the system refuse to write more into a file, part of a write included, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_finds_no_room(tmp_path):
    """The file is named, closing tries nothing more, and the half of a line is gone when the run goes on."""
    path = tmp_path / "metrics.jsonl"
    file = StepFile(path, 0)
    file.write({"step": 1, "loss": 0.5})
    whole = path.read_bytes()
    with files_of_at_most(len(whole) + 9):
        with pytest.raises(OSError) as caught:
            file.write({"step": 2, "loss": 0.25})
        file.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert refusal(caught.value) == (
        f"{path} cannot be written (File too large); make room or give leave, and start the same command again: the "
        "run continues from its latest checkpoint."
    )
    assert path.stat().st_size == len(whole) + 9
    file = StepFile(path, 1)
    file.close()
    assert path.read_bytes() == whole


def test_what_is_replaced_stays_if_there_is_no_room(tmp_path):
    path = tmp_path / "config.json"
    run_folder.write_atomically(path, "old")
    with files_of_at_most(9), pytest.raises(OSError) as caught:
        run_folder.write_atomically(path, "new" * 9)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


def test_only_what_can_be_mended_is_told_in_a_line():
    with pytest.raises(OSError) as caught, naming("other"):
        raise OSError(errno.ENOSPC, "No space left on device", "first")
    told_of = refusal(caught.value, "out")
    assert told_of is not None and told_of.startswith("first cannot be written")
    assert refusal(OSError(errno.ENOSPC, "full"), "out") is not None
    assert refusal(OSError(errno.EBADF, "a defect"), "out") is None
    assert refusal(ValueError("a defect"), "out") is None


def test_records_that_vanish(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": "a", "messages": [{"role": "user", "content": "hello"}]}\n')
    source = JsonlSource(path)
    assert source[0].id == "a"
    path.unlink()
    with pytest.raises(SourceError, match=r"data\.jsonl cannot be read any more .*; put it back as it was"):
        source[0]
