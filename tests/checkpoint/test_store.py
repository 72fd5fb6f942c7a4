"""Checkpoints of a run: whole or not there, and only of the run that wrote them."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.checkpoint.store import CheckpointStore, _no_array_of_a_save, _without_traceback, abstract_like
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.parallel.mesh import make_mesh

# Of arrays that are split along either axis, along both, or not, and their types.
SPECS = {
    "rows": PartitionSpec("fsdp"),
    "columns": PartitionSpec(None, "fsdp"),
    "both": PartitionSpec("data", "fsdp"),
    "whole": PartitionSpec(),
}
SPEC_DTYPES = {"rows": np.float32, "columns": ml_dtypes.bfloat16, "both": np.uint32, "whole": np.float32}
SETTINGS = {"seed": "0", "model.depth": "2"}


def state(value: float) -> dict:
    return {"weights": {"a.b": jnp.full((3, 2), value), "a": jnp.full(4, value, jnp.bfloat16)}, "count": jnp.int32(7)}


def shapes(tree: dict) -> dict:
    return abstract_like(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def test_latest_is_restored_and_the_last_are_kept(tmp_path):
    with CheckpointStore(tmp_path / "c", fingerprint=SETTINGS, keep=2) as store:
        assert store.progress() is None
        for step in (1, 2, 5):
            store.save(step, state(step), {"iterator": {"next_index": step}})
        store.save(5, state(-1.0), {"iterator": {}})  # the step is there already
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "5"]
    with CheckpointStore(tmp_path / "c", fingerprint=SETTINGS) as store:
        place = store.progress()
        assert (place["step"], place["iterator"]) == (5, {"next_index": 5})
        found = store.restore(shapes(state(0.0)))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state(5)))
    assert found["weights"]["a"].dtype == jnp.bfloat16


def test_state_may_be_donated_while_it_is_written(tmp_path):
    """What is saved is the state at the call, even where the next step overwrites its buffers."""
    advance = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    value = jnp.zeros(1 << 20)
    with CheckpointStore(tmp_path, fingerprint={}, keep=4) as store:
        for step in range(4):
            store.save(step, {"x": value}, {})
            value = advance(value)
        store.wait()
        assert float(store.restore(shapes({"x": jnp.zeros(1 << 20)}))["x"].max()) == 3.0


def test_every_n_stays(tmp_path):
    """Beside the latest two, those of steps that are multiples of four."""
    with CheckpointStore(tmp_path, fingerprint={}, keep=2, keep_every=4) as store:
        for step in range(1, 12):
            store.save(step, state(step), {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 10, 11]


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_another_mesh_gets_the_same_bits(tmp_path, data, fsdp):
    """Written over eight devices, restored over others, split differently."""

    def tree(mesh):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        bits = {
            name: np.random.default_rng(0).integers(0, 256, (8, 64), np.uint8).view(SPEC_DTYPES[name]) for name in SPECS
        }
        return {name: jax.device_put(bits[name], shardings[name]) for name in SPECS}

    written = tree(make_mesh())
    with CheckpointStore(tmp_path, fingerprint={}) as store:
        store.save(1, written, {})
    asked = tree(make_mesh(jax.devices()[: data * fsdp], data=data, fsdp=fsdp))
    with CheckpointStore(tmp_path, fingerprint={}) as store:
        found = store.restore(shapes(asked))
    for name, value in written.items():
        assert found[name].sharding == asked[name].sharding
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes()


def in_small_disk(folder: Path, kilobytes: int, *commands: list) -> subprocess.CompletedProcess:
    """Runs commands, one after the other, that see a disk of this size at `folder`/disk; anybody may do so."""
    (folder / "disk").mkdir()
    lines = [f"mount -t tmpfs -o size={kilobytes}k none {folder}/disk"]
    lines += [shlex.join(map(str, command)) + f"; echo STATUS $?; ls {folder}/disk/*" for command in commands]
    # A mount of its own, seen by nobody else and gone with the last of these processes.
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", "\n".join(lines)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


SAVES = """
import sys
import jax.numpy as jnp
from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.errors import CheckpointError
try:
    with CheckpointStore(sys.argv[1], fingerprint={}, keep=9) as store:
        print("found", store.progress())
        for step in range(int(sys.argv[2]), 6):
            # Bits that do not compress.
            bits = jnp.asarray(__import__("numpy").random.default_rng(step).random(1 << 17), jnp.float32)
            store.save(step, {"x": bits}, {})
        store.wait()
except CheckpointError as error:
    print("told", error)
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_what_was_whole_stays(tmp_path):
    """512 KiB each on a disk of 1,500: the third finds no room. Then the disk is closed, then there is room again."""
    disk = tmp_path / "disk"
    save = [sys.executable, "-c", SAVES, disk / "c", 1]
    remount = ["mount", "-o", "remount,ro", disk]
    grow = ["mount", "-o", "remount,rw,size=9m", disk]
    done = in_small_disk(tmp_path, 1500, save, remount, save, grow, [*save[:-1], 3])
    told = [line for line in done.stdout.splitlines() if line.startswith("told")]
    assert len(told) == 2, done.stdout + done.stderr
    assert "No space left on device" in told[0] and "that of step 2 is whole. Make room" in told[0]
    assert "Read-only file system" in told[1] and "that of step 2 is whole" in told[1]
    lives = done.stdout.split("found")
    assert "'step': 2" in lives[-1]
    assert lives[-1].split()[-5:] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({**SETTINGS, "seed": "1"}, "made with seed=0, this run has 1"),
        ({"seed": "0"}, r"model\.depth=2, this run has None"),
        ({**SETTINGS, "new": "x"}, "new=None, this run has x"),
    ],
)
def test_another_run_is_refused(tmp_path, settings, told):
    with CheckpointStore(tmp_path, fingerprint=SETTINGS) as store:
        store.save(3, state(0), {})
    with CheckpointStore(tmp_path, fingerprint=settings) as store, pytest.raises(CheckpointError, match=told):
        store.progress()


def test_damage_is_told_and_half_written_ones_are_passed_over(tmp_path):
    with CheckpointStore(tmp_path, fingerprint=SETTINGS) as store:
        store.save(3, state(0), {})
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    with CheckpointStore(tmp_path, fingerprint=SETTINGS) as store:
        assert store.progress()["step"] == 3
        with pytest.raises(CheckpointError, match="3 cannot be read"):
            store.restore(shapes({"other": jnp.zeros(3)}))
    (tmp_path / "3" / "progress" / "metadata").write_text("{")
    with (
        CheckpointStore(tmp_path, fingerprint=SETTINGS) as store,
        pytest.raises(CheckpointError, match="remove that folder to continue from the one before"),
    ):
        store.progress()


def record(name: str, text: str, error: Exception) -> logging.LogRecord:
    """What is logged of an error that another raised."""
    try:
        raise RuntimeError("one array of several") from error
    except RuntimeError as raised:
        found = (RuntimeError, raised, raised.__traceback__)
    return logging.LogRecord(name, logging.ERROR, "file.py", 1, text, (), found)


@pytest.mark.parametrize(
    ("error", "refused"), [(OSError("[Errno 28] No space left on device"), True), (ValueError("a mistake"), False)]
)
def test_of_logs_only_what_tells_of_a_refused_save_is_cut(error, refused):
    """What else the process logs, through absl or of futures, keeps its traceback."""
    one = record("absl", "a thread failed", error)
    assert _without_traceback(one) and (one.exc_info is None) == refused
    one = record("asyncio", "Future exception was never retrieved", error)
    assert _no_array_of_a_save(one) == (not refused)
    assert _no_array_of_a_save(record("asyncio", "another message", error))


def test_settings_that_make_no_difference_any_more_are_ignored(tmp_path):
    """Earlier versions wrote them; those of the run are compared all the same."""
    with CheckpointStore(tmp_path, fingerprint={**SETTINGS, "remat": "'full'"}) as store:
        store.save(1, {"x": jnp.zeros(1)}, {})
    with CheckpointStore(tmp_path, fingerprint=SETTINGS, ignored=lambda name: name == "remat") as store:
        assert store.progress()["step"] == 1
    other = {**SETTINGS, "remat": "'none'"}
    for ignored in (lambda name: False, lambda name: name == "remat"):
        with (
            CheckpointStore(tmp_path, fingerprint=other, ignored=ignored) as store,
            pytest.raises(CheckpointError, match="made with remat='full', this run has 'none'"),
        ):
            store.progress()
