"""The checkpoints of a training run, through Orbax: each is whole or not there.

A checkpoint holds a tree of arrays (weights, optimizer, random key) and a small record of JSON (the step, the place in
the data, and the run's fingerprint). A run continues only from a checkpoint of its own settings.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qwenvl_jax.errors import CheckpointError


class CheckpointStore:
    """Checkpoints under one folder, by step.

    Args:
      folder: made if missing.
      fingerprint: settings by name, as text; every checkpoint written carries it and every one read must equal it.
      keep: how many of the latest stay.
    """

    def __init__(self, folder: str | os.PathLike, *, fingerprint: Mapping[str, str], keep: int = 2):
        self.folder, self._fingerprint = Path(folder), dict(fingerprint)
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
            # What a killed process left half written is removed.
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the state may be donated as soon as this returns.

        Args:
          step: steps done.
          state: tree of arrays.
          progress: JSON values, such as the place in the data.
        """
        record = {"fingerprint": self._fingerprint, **progress}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record))
        # Twice the same step: stopped by a signal right after a checkpoint of that step.
        if self._manager.latest_step() != step:
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when what `save` began is on disk."""
        self._manager.wait_until_finished()

    def progress(self) -> dict[str, Any] | None:
        """What the latest checkpoint says of its place, with "step" added; None if there is no checkpoint.

        Raises:
          CheckpointError: it was made with other settings, or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            args = ocp.args.Composite(progress=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=args)["progress"]
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(step, error) from error
        self._check(step, record.get("fingerprint", {}))
        return {**record, "step": step}

    def restore(self, abstract: Any) -> Any:
        """The arrays of the latest checkpoint, placed as `abstract` (shapes, dtypes, shardings) says.

        Raises:
          CheckpointError: they are not there or have other shapes.
        """
        step = self._manager.latest_step()
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args)["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, error) from error

    def _check(self, step: int, found: Mapping[str, str]) -> None:
        ours = self._fingerprint
        different = [name for name in {**ours, **found} if ours.get(name) != found.get(name)]
        if different:
            name = different[0]
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} is of another run: it was made with {name}="
                f"{found.get(name)}, this run has {ours.get(name)}; use another output folder, or the old setting."
            )

    def _unreadable(self, step: int | None, error: Exception) -> CheckpointError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CheckpointError(
            f"the checkpoint {self.folder / str(step)} cannot be read ({reason}); remove that folder to continue from "
            "the one before."
        )


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree with the given shardings: what `restore` asks for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
