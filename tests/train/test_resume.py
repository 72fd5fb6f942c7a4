"""A run that was killed and started again is the run that was not: real processes, real signals, one MP4 clip."""

import errno
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from qwenvl_jax import cli
from qwenvl_jax.checkpoint.hf import tensor_table
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train import run_folder
from qwenvl_jax.train.export import keep_facts
from qwenvl_jax.train.loop import train_command
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.processes import Processes
from tests.train.tiny_run import command_line, killed, tiny_config, write_tiny_run

pytestmark = pytest.mark.xdist_group("resume")  # one undisturbed run for all


@pytest.fixture(scope="module")
def config(tmp_path_factory, clip):
    return write_tiny_run(tmp_path_factory.mktemp("run"), clip)


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run that nothing disturbed."""
    out = config.parent / "whole"
    done = command_line("train", config, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "starting from random" in done.stderr
    return out


def check_equal(out, whole):
    """Same losses, batches and weights, bit for bit, and no step twice."""
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, 9))
    for file in (whole / "model").iterdir():
        assert (out / "model" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list((out / "model").parent.glob(".model*"))


def test_killed_and_continued(config, whole):
    """Ended by SIGKILL in the second stage, when metrics were written that no checkpoint holds."""
    out = config.parent / "killed"
    dead = killed("SIGKILL:step:5", config, out)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert len(read_metrics(out / "metrics.jsonl")) == 5
    # A line cut in two, as a crash of the machine leaves it.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')

    done = command_line("train", config, "--out", out)
    assert done.returncode == 0, done.stderr
    # From step 4, or from step 3 where the kill hit while the checkpoint of step 4 was being written.
    assert "continuing after step " in done.stderr
    check_equal(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step:1", "step:8", "save:1", "save:3", "export:1"])
def test_killed_at_any_moment(config, whole, moment):
    """Before the first checkpoint, after the last line, while a checkpoint or the model is being written."""
    out = config.parent / moment.replace(":", "-")
    assert killed(f"SIGKILL:{moment}", config, out).returncode == -signal.SIGKILL
    assert not (out / "model").exists()
    assert command_line("train", config, "--out", out).returncode == 0
    check_equal(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step:1", "again:1"])
def test_stopped_and_continued(config, whole, moment):
    """SIGTERM: the step is finished, a checkpoint of it written, and the same command goes on.

    A machine that shuts down sends it once more, while the checkpoint is written: it is whole all the same.
    """
    out = config.parent / f"stopped-{moment[:4]}"
    stopped = killed(f"SIGTERM:{moment}", config, out)
    assert stopped.returncode == 130, stopped.stderr
    assert "the same command continues" in stopped.stderr
    steps = len(read_metrics(out / "metrics.jsonl"))
    assert 1 <= steps < 8
    assert (out / "checkpoints" / str(steps)).is_dir()
    assert command_line("train", config, "--out", out).returncode == 0
    check_equal(out, whole)


@pytest.mark.slow
def test_worker_processes_change_nothing(config, whole):
    """Batches made by two processes, the run killed and continued with them."""
    out = config.parent / "workers"
    workers = ("--data.workers", 2)
    assert killed("SIGKILL:step:5", config, out, *workers).returncode == -signal.SIGKILL
    done = command_line("train", config, "--out", out, *workers)
    assert done.returncode == 0, done.stderr
    check_equal(out, whole)


@pytest.mark.usefixtures("promotion_as_usual")
def test_goes_on_with_what_changes_only_rounding(config, whole, tmp_path):
    """Short of memory, say: the last two steps with layers made again and smaller chunks, and that is told."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "8")
    shutil.rmtree(out / "model")
    other = ("--stages.s1.remat", "full", "--stages.s1.loss_chunk", "40", "--batch.groups", "2")
    with pytest.raises(ConfigError, match=r"batch\.groups=1, this one has 2"):
        train_command(str(config), other, out=str(out))
    assert train_command(str(config), other[:4], out=str(out)).model
    told = (out / "train.log").read_text().split("continuing after step 6")[1]
    assert "goes on with stages.1.remat='full' (was 'none'), stages.1.loss_chunk=40 (was 1024): the same but" in told
    before, after = (read_metrics(folder / "metrics.jsonl") for folder in (whole, out))
    assert [line["batch"] for line in after] == [line["batch"] for line in before]
    assert after[:6] == before[:6]
    np.testing.assert_allclose([line["loss"] for line in after], [line["loss"] for line in before], rtol=1e-5)


def test_settings_of_earlier_versions_that_make_no_difference_now(tmp_path):
    with run_folder.opened(tmp_path / "run", Processes()) as folder:
        folder.begin({"seed": "0", "stages.0.remat": "'full'", "stages.0.guard.abort_after": "9"})
        run_folder.check(folder, {"seed": "0"})
        with pytest.raises(ConfigError, match=r"stages\.0\.remat='full', this one has 'none'"):
            run_folder.check(folder, {"seed": "0", "stages.0.remat": "'none'"})
        folder.begin({"seed": "0", "stages.0.steps": "9"})
        with pytest.raises(ConfigError, match=r"stages\.0\.steps=9, this one has None"):
            run_folder.check(folder, {"seed": "0"})


def test_what_an_upload_left_that_was_cut_off_is_made_again(config, tmp_path):
    """The file that says that a folder is whole goes last, and without it nothing there counts."""
    shape, processor = tiny_config(config.parent).model, Processor.from_pretrained(config.parent / "processor")
    keep_facts(tmp_path, shape, processor, "float32")
    names = sorted(path.name for path in (tmp_path / "processor").iterdir())
    assert list(run_folder._small_files(tmp_path))[-1] == "processor/config.json"
    (tmp_path / "processor" / "config.json").unlink()
    (tmp_path / "processor" / "tokenizer.json").write_text("half")
    keep_facts(tmp_path, shape, processor, "float32")
    assert sorted(path.name for path in (tmp_path / "processor").iterdir()) == names
    assert (tmp_path / "processor" / "tokenizer.json").read_text() != "half"


def test_the_model_of_a_checkpoint(config, whole, tmp_path, capsys):
    """Its weights are those of the checkpoint; of the last one, every file is that of the run's model."""
    assert cli.main(["export", str(whole), str(tmp_path / "last"), "--step", "latest"]) == 0
    assert {path.name for path in (tmp_path / "last").iterdir()} == {path.name for path in (whole / "model").iterdir()}
    for path in (whole / "model").iterdir():
        assert (tmp_path / "last" / path.name).read_bytes() == path.read_bytes(), path.name

    assert cli.main(["export", str(whole), str(tmp_path / "six"), "--step", "6"]) == 0
    assert "vllm serve" in capsys.readouterr().out
    handler, path = ocp.PyTreeCheckpointHandler(), whole / "checkpoints" / "6" / "state"
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
    stored = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    weights = stored["frozen"] | stored["state"]["params"]
    written = load_file(tmp_path / "six" / "model.safetensors")
    last = load_file(tmp_path / "last" / "model.safetensors")
    names = 0
    for entry in tensor_table(tiny_config(config.parent).model):
        for layer, name in enumerate(entry.names()):
            value = np.asarray(weights[entry.path])
            assert np.array_equal(written[name], entry.to_public(value if entry.layers is None else value[layer])), name
            names += 1
    assert len(written) == len(last) == names
    assert any(not np.array_equal(written[name], last[name]) for name in last)


def test_a_checkpoint_that_is_not_there_is_told(whole, tmp_path, capsys):
    """With the steps that there are; a run that is not done names the way out."""
    out = str(tmp_path / "out")
    for run, more, told in (
        (whole, ("--step", "5"), "has no checkpoint of step 5; there are those of 6, 8"),
        (whole / "model", ("--step", "latest"), "holds no checkpoint of a training run"),
        (whole, ("--step", "6", "--verify"), "leave it out with --step"),
        ("gs://bucket/run", ("--step", "6"), "copy its processor/, config.json and checkpoints/6 into a folder"),
    ):
        assert cli.main(["export", str(run), out, *more]) == 2
        assert told in capsys.readouterr().err
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("model", "processor"))
    assert cli.main(["export", str(stopped), out]) == 2
    assert f"`qwenvl-jax export {stopped} DST --step latest`" in capsys.readouterr().err
    assert cli.main(["export", str(stopped), out, "--step", "8"]) == 2
    assert "has no processor/config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_finished_run_is_left_alone(config, whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "model").iterdir()}
    result = train_command(str(config), out=str(whole))
    assert (result.step, result.model) == (8, whole / "model")
    assert {path: path.stat().st_mtime_ns for path in (whole / "model").iterdir()} == before
    assert len(read_metrics(whole / "metrics.jsonl")) == 8


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (("--stages.s1.steps", "9"), "stages.1.steps=5, this one has 9"),
        (("--model.text.num_hidden_layers", "3"), "model.text.num_hidden_layers=2, this one has 3"),
    ],
)
def test_other_settings_are_refused(config, whole, override, told):
    """A run's folder takes no other run: the setting that differs is named, and nothing is changed."""
    before = (whole / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=told):
        train_command(str(config), override, out=str(whole))
    assert (whole / "config.json").read_bytes() == before


def test_other_data_is_refused(config, whole, tmp_path, clip):
    """The same settings over other records."""
    other = write_tiny_run(tmp_path, clip)
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("red circle", "red square"))
    with pytest.raises(ConfigError, match=r"other data: stages\.0\.data\.digest differs"):
        train_command(str(other), out=str(whole))


def test_two_processes_do_not_share_a_folder(config, tmp_path):
    with run_folder.locked(tmp_path), pytest.raises(ConfigError, match="in use by another process"):
        train_command(str(config), out=str(tmp_path))


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EAGAIN, "is in use by another process; wait for it"),
        (errno.EACCES, "is in use by another process; wait for it"),
        (errno.ENOSYS, "cannot be locked against other processes: its file system says Function not implemented"),
        (errno.EOPNOTSUPP, "Operation not supported; have it mounted with locks"),
        (errno.ENOLCK, "No locks available; have it mounted with locks"),
    ],
)
def test_a_file_system_without_locks_is_told_as_such(number, told, tmp_path, monkeypatch):
    """What another process holds stays; a folder that was made for nothing goes."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=told), run_folder.locked(out):
        pass
    assert out.exists() == ("in use" in told)


@pytest.mark.parametrize(
    "out", ["gs://", "gs:///run", "gs:/bucket/run", Path("gs://bucket/run"), "memory://bucket/run"]
)
def test_what_is_neither_a_path_nor_a_bucket_is_refused(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=f"{out} is neither a path nor the address of a folder in a bucket"),
        run_folder.opened(out, Processes()),
    ):
        pass
    assert not list(tmp_path.iterdir())
