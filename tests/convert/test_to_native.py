"""Conversions: equal to the source bit for bit, whatever interrupts them, and never half a model that looks whole."""

import dataclasses
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qwenvl_jax import cli
from qwenvl_jax.checkpoint import hf, native
from qwenvl_jax.convert import places
from qwenvl_jax.convert.progress import Progress
from qwenvl_jax.convert.to_native import convert
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models import pretrained
from qwenvl_jax.models.qwenvl import QwenVL
from tests.checkpoint.shape import TINY, random_model
from tests.checkpoint.test_tensors import SPREAD
from tests.convert.conftest import contents

ROOT = Path(__file__).parents[2]


def calls(process: subprocess.Popen) -> tuple[int, int]:
    """Waits for a process of `tests.convert.signalled`; the changes of the disk that it made, and the bytes written."""
    out, err = process.communicate()
    assert out, err
    count, size = out.splitlines()[-1].split()
    return int(count), int(size)


def _start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.convert.signalled", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _refused(match, *arguments, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_files_of_a_conversion(public, undisturbed):
    """One file a layer under native names and axes, the small files as they were, nothing left over."""
    files = contents(undisturbed)
    weights = {name for name in files if name.endswith(".safetensors")}
    layers = [f"native/text.layers.{i:05}.safetensors" for i in range(3)]
    layers += [f"native/vision.blocks.{i:05}.safetensors" for i in range(4)]
    layers += [f"native/deepstack.{i:05}.safetensors" for i in range(2)]
    assert weights == {*layers, "native/rest.safetensors"}
    small = {path.name: path.read_bytes() for path in public.iterdir() if "safetensors" not in path.name}
    assert {name: files[name] for name in small} == small
    assert set(files) == {*small, *weights, "native/index.json"}
    layer = load_file(undisturbed / layers[1])
    stored = {}
    for path in public.glob("*.safetensors"):
        stored |= load_file(path)
    q = stored["model.language_model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(layer["text.layers.1.attn.q.kernel"], q.reshape(6, 10, 20).transpose(2, 0, 1))
    index = json.loads(files["native/index.json"])
    assert len(index["tensors"]) == len(stored)
    digest = index["tensors"]["text.layers.1.attn.q.kernel"]["sha256"]
    assert digest == hashlib.sha256(q.tobytes()).hexdigest()


def test_loads_like_its_source(public, undisturbed):
    one, two = (pretrained.load(folder, dtype="bfloat16") for folder in (public, undisturbed))
    assert one.config == two.config == TINY
    one, two = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (one, two))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key].get_value(), two[key].get_value()) for key in one)


def test_no_model_is_saved_beside_native_weights(tiny_checkpoint, tmp_path):
    """They are what the folder would be loaded from."""
    convert(tiny_checkpoint, tmp_path / "native")
    model = QwenVL.from_pretrained(tmp_path / "native", dtype="float32")
    before = sorted(path.name for path in (tmp_path / "native").rglob("*"))
    with pytest.raises(CheckpointError, match=r"native is in the native layout, .*save into another folder"):
        model.save_pretrained(tmp_path / "native")
    assert sorted(path.name for path in (tmp_path / "native").rglob("*")) == before
    model.save_pretrained(tmp_path / "other")


def test_the_processor_is_read_from_a_native_folder(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "public")
    (tmp_path / "public" / "qwenvl_jax.json").write_text('{"dialect": "transformers"}')
    convert(tmp_path / "public", tmp_path / "native")
    conversation = [{"role": "user", "content": "what happens"}]
    one, two = (Processor.from_pretrained(tmp_path / form) for form in ("public", "native"))
    assert one._settings.dialect == two._settings.dialect == "transformers"
    assert np.array_equal(one.sample(conversation).tokens, two.sample(conversation).tokens)


def test_spread_over_devices(undisturbed):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run(
        [sys.executable, "-c", SPREAD, str(undisturbed)], env=os.environ | flags, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([(3, 10, 3, 10)] * 4)


def test_killed_and_run_again(public, undisturbed, tmp_path):
    """At moments drawn at random, and at the first and last, SIGKILL ends a real process; what it leaves is refused as
    half a model, what it had finished stays as it is, and the second run's folder is the undisturbed one."""
    total, _ = calls(_start("COUNT", 0, "convert", public, tmp_path / "counted"))
    assert contents(tmp_path / "counted") == contents(undisturbed)
    moments = [2, *random.Random(0).sample(range(3, total), 6), total]
    for moment in moments:
        dst = tmp_path / f"killed-{moment}"
        process = _start("SIGKILL", moment, "convert", public, dst)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        whole = (dst / "native" / "index.json").exists()
        if dst.exists() and not whole:
            with pytest.raises(CheckpointError, match=r"half conversion.*run `qwenvl-jax convert` again"):
                pretrained.load(dst)
        before = {path.name: path.stat() for path in (dst / "native").glob("*.safetensors")} if dst.exists() else {}
        convert(public, dst, verify=True)
        assert contents(dst) == contents(undisturbed), moment
        after = {path.name: path.stat() for path in (dst / "native").glob("*.safetensors")}
        for name, stat in before.items():  # not written again
            assert (stat.st_ino, stat.st_mtime_ns) == (after[name].st_ino, after[name].st_mtime_ns)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_what_was_written_is_not_written_again(command, tmp_path):
    """The embedding and the head outweigh ten layers each. Killed anywhere in between, at most one slice and the
    headers are written twice."""
    text = dataclasses.replace(TINY.text, vocab_size=60_000, tie_word_embeddings=False)
    pretrained.save(random_model(dataclasses.replace(TINY, text=text)), tmp_path / "src", max_shard_bytes=3_000_000)
    if command == "export":
        convert(tmp_path / "src", tmp_path / "native")
        shutil.move(tmp_path / "native", tmp_path / "src2")
        shutil.rmtree(tmp_path / "src")
        shutil.move(tmp_path / "src2", tmp_path / "src")
    total, size = calls(_start("COUNT", 0, command, tmp_path / "src", tmp_path / "whole"))
    layer = 4 * sum(
        math.prod(e.shape) for e in hf.tensor_table(TINY) if e.public.startswith("model.language_model.layers")
    )
    assert size > 20 * layer
    for moment in random.Random(2).sample(range(total // 4, total), 4):
        first = _start("SIGKILL", moment, command, tmp_path / "src", tmp_path / "out")
        _, before = calls(first)
        assert first.returncode == -signal.SIGKILL
        after = 0
        if not (tmp_path / "out").exists() or command == "convert" or (tmp_path / "out" / ".export.json").exists():
            _, after = calls(_start("COUNT", 0, command, tmp_path / "src", tmp_path / "out"))
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert before + after < size + layer
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_two_processes_share_the_files(public, undisturbed, tmp_path, end):
    """One process is stopped in the middle of a file: the other converts the rest and waits for that file, which comes
    from the first when it goes on, or from the second when the first dies."""
    dst = tmp_path / "shared"
    first = _start("SIGSTOP", 40, "convert", public, dst)
    deadline = time.monotonic() + 120
    while _state(first.pid) != "T":
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    done = {path.name for path in (dst / "native").glob("*.safetensors")}
    held = [path.name[1:-8] for path in (dst / "native").glob(".*.safetensors.partial")]
    assert len(done) < 10 and len(held) == 1
    second = _start("COUNT", 0, "convert", public, dst)
    while len(list((dst / "native").glob("*.safetensors"))) < 9:
        assert time.monotonic() < deadline and second.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    assert second.poll() is None and not (dst / "native" / held[0]).exists()
    first.send_signal(end)
    assert second.wait(60) == 0, second.communicate()
    assert first.wait(60) == (0 if end == signal.SIGCONT else -signal.SIGKILL)
    for process in (first, second):
        process.communicate()
    assert contents(dst) == contents(undisturbed)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_processes_of_one_command(public, undisturbed, tmp_path):
    command = [sys.executable, "-m", "qwenvl_jax", "convert", str(public), str(tmp_path / "out"), "--processes", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("is complete\n"), run.stderr
    assert contents(tmp_path / "out") == contents(undisturbed)
    with pytest.raises(ConfigError, match="--processes must be at least 1"):
        convert(public, tmp_path / "other", processes=0)


def test_done_twice_is_done(public, undisturbed, tmp_path):
    dst = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in dst.rglob("*") if path.is_file()}
    convert(public, dst, verify=True)
    assert {path: path.stat().st_mtime_ns for path in dst.rglob("*") if path.is_file()} == before


def test_what_was_damaged_is_written_again(public, undisturbed, tmp_path):
    dst = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    cut, gone = (dst / "native" / f"text.layers.0000{i}.safetensors" for i in (0, 1))
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    convert(public, dst, verify=True)
    assert contents(dst) == contents(undisturbed)


def test_places_that_are_refused(public, undisturbed, tmp_path, monkeypatch):
    other = tmp_path / "other"
    pretrained.save(random_model(seed=1), other)
    before = contents(undisturbed)
    _refused("holds the conversion of another model", other, undisturbed)
    half = Path(shutil.copytree(undisturbed, tmp_path / "half"))
    (half / "native" / "index.json").unlink()
    _refused("holds the conversion of another model", other, half)
    for path in (half / "native").glob("*"):
        path.unlink()
    (half / "native" / "plan.json").write_text('{"plan": "x"}')
    _refused("holds the conversion of another model", other, half)
    _refused("is the source itself", public, public)
    _refused("holds something else already", public, other)
    (tmp_path / "file").touch()
    _refused("is a file; give a new folder", public, tmp_path / "file")
    _refused("is in the native layout already; `qwenvl-jax export`", undisturbed, tmp_path / "new")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    _refused("needs 0.0 GB, but only 0.0 GB are free there", public, tmp_path / "new")
    assert not (tmp_path / "new").exists() and contents(undisturbed) == before


def test_a_bad_source_writes_nothing(public, tmp_path):
    """All faults are told at once, before the destination is made."""
    src = Path(shutil.copytree(public, tmp_path / "src"))
    config = json.loads((src / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 30
    (src / "config.json").write_text(json.dumps(config))
    _refused(r"9 misshaped .*layers.2.mlp.down_proj.weight is \[20, 28\]", src, tmp_path / "dst")
    shard = sorted(src.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    _refused(f"{shard.name} is truncated or damaged", src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_verify_finds_a_changed_bit(public, undisturbed, tmp_path):
    dst = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    path = dst / "native" / "text.layers.00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    convert(public, dst)
    _refused("copy differs from .* in text.layers.2", public, dst, verify=True)


@pytest.mark.parametrize("damage", ["cut", "gone", "of another", "other table", "index"])
def test_damaged_native_folder(undisturbed, tmp_path, damage):
    dst = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    path, other = (dst / "native" / f"text.layers.0000{i}.safetensors" for i in (1, 2))
    index = dst / "native" / "index.json"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "of another":
        path.write_bytes(other.read_bytes())
    elif damage == "other table":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"table": "x"}))
    else:
        index.write_text("{")
    words = {
        "cut": "00001.safetensors is truncated or damaged",
        "gone": "00001.safetensors, named in index.json, is missing",
        "of another": "00001.safetensors is not the file that index.json tells of",
        "other table": "tells of another layout",
        "index": "cannot be read as JSON",
    }
    with pytest.raises(CheckpointError, match=words[damage]):
        pretrained.load(dst)


def test_large_parameters_have_files_of_their_own(monkeypatch):
    monkeypatch.setattr(native, "_APART", 900)
    names = [file.name for file in native.layout(hf.tensor_table(TINY))]
    assert {"text.embed.safetensors", "text.head.safetensors", "rest.safetensors"} <= set(names)
    parts = [part.name for file in native.layout(hf.tensor_table(TINY)) for part in file.parts]
    assert len(parts) == len(set(parts)) == sum(len(entry.names()) for entry in hf.tensor_table(TINY))


def test_progress_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    with Progress("converting", 7, 4_000_000, screen) as progress:
        time.sleep(0.3)
        progress.finished(3, found=1_000_000)
        progress.moved(2_000_000)
    shown = screen.getvalue()
    assert all(word in shown for word in ("converting 3/7 tensors", "3.0 MB of 4.0 MB", "/s", "left"))


def test_progress_in_plain_lines(public, tmp_path, capsys):
    assert cli.main(["convert", str(public), str(tmp_path / "out"), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert out == f"the native checkpoint in {tmp_path / 'out'} is complete, and every tensor is that of the source\n"
    assert [line.split("  ")[0] for line in err.splitlines()] == [
        "converting 105/105 tensors",
        "verifying 105/105 tensors",
    ]
    assert "268.7 kB of 268.7 kB" in err and "/s" in err and "0:00 left" in err
