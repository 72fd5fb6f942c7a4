"""Checkpoints of a run: whole or not there, and only of the run that wrote them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.checkpoint.store import CheckpointStore, abstract_like
from qwenvl_jax.errors import CheckpointError

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
