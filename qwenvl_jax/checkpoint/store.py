"""The checkpoints of a training run, through Orbax: each is whole or not there.

A checkpoint holds a tree of arrays (weights, optimizer, random key) and a small record of JSON (the step, the place in
the data, and the run's fingerprint). A run continues only from a checkpoint of its own settings.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from qwenvl_jax.errors import CheckpointError


class CheckpointStore:
    """Checkpoints under one folder, by step.

    Args:
      folder: made if missing.
      fingerprint: settings by name, as text; every checkpoint written carries it and every one read must equal it.
      ignored: whether a setting of this name that a checkpoint has and the run has not makes no difference.
      keep: how many of the latest stay.
      keep_every: checkpoints of steps that are multiples of this stay too; 0 keeps none of them.

    Raises:
      CheckpointError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        fingerprint: Mapping[str, str],
        keep: int = 2,
        keep_every: int = 0,
        ignored: Callable[[str], bool] = lambda name: False,
    ):
        # A bucket's address is no path of this machine.
        path = epath.Path(folder)
        self.folder = path if "://" in str(folder) else path.absolute()
        self._fingerprint, self._ignored = dict(fingerprint), ignored
        # What stops a save is told here, by what raises; the threads that it stopped need not print where each was.
        logging.getLogger("absl").addFilter(_without_traceback)
        preserved = [LatestN(keep), *([EveryNSteps(keep_every)] if keep_every else [])]
        with self._told("the checkpoints"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(preserved),
                    create=True,
                    # What a killed process left half written is removed.
                    cleanup_tmp_directories=True,
                ),
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self._manager.close()
        except Exception:
            # A save that failed was told already by what raised; otherwise nobody knows yet.
            if kind is None:
                raise

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the state may be donated as soon as this returns.

        Args:
          step: steps done.
          state: tree of arrays.
          progress: JSON values, such as the place in the data.

        Raises:
          CheckpointError: this one, or the one before, could not be written; those that are whole stay.
        """
        record = {"fingerprint": self._fingerprint, **progress}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record))
        # Twice the same step: stopped by a signal right after a checkpoint of that step.
        if self._manager.latest_step() != step:
            with self._told("a checkpoint"):
                self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when what `save` began is on disk.

        Raises:
          CheckpointError: it could not be written; those that are whole stay.
        """
        with self._told("a checkpoint"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if not _is_refusal(error):
                raise
            steps = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())
            whole = f"that of step {steps[-1]} is whole" if steps else "there is none yet"
            # Each array of that checkpoint would say the same once more as the process ends.
            logging.getLogger("asyncio").addFilter(_no_array_of_a_save)
            raise CheckpointError(
                f"{what} in {self.folder} could not be written ({_reason(error)}); {whole}. Make room or "
                "give leave, and start the same command again."
            ) from error

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
        names = [*ours, *(name for name in found if name not in ours and not self._ignored(name))]
        different = [name for name in names if ours.get(name) != found.get(name)]
        if different:
            name = different[0]
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} is of another run: it was made with {name}="
                f"{found.get(name)}, this run has {ours.get(name)}; use another output folder, or the old setting."
            )

    def _unreadable(self, step: int | None, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {self.folder / str(step)} cannot be read ({_reason(error)}); remove that folder "
            "to continue from the one before."
        )


def read_weights(
    folder: str | os.PathLike, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The weights that a training run's checkpoint holds, by name, and its record; its other arrays stay unread.

    Args:
      folder: of the checkpoints; nothing in it is changed.
      step: of the checkpoint.
      wanted: shape, dtype and sharding of the weights that it may hold.

    Raises:
      CheckpointError: they cannot be read, or have other shapes.
    """
    path = epath.Path(folder).absolute() / str(step)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        stored = handler.metadata(path / "state").tree
        abstract = {
            "state": {"params": {name: wanted[name] for name in stored["state"]["params"]}},
            "frozen": {name: wanted[name] for name in stored["frozen"]},
        }
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        found = handler.restore(path / "state", args=args)
        record = ocp.JsonCheckpointHandler().restore(path / "progress", args=ocp.args.JsonRestore())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({_reason(error)}); take another.") from error
    return found["frozen"] | found["state"]["params"], record


# How TensorStore and the C library say that a place is full or closed; the first tells it in words only.
_REFUSALS = (
    "No space left",
    "RESOURCE_EXHAUSTED",
    "Disk quota exceeded",
    "File too large",
    "Permission denied",
    "PERMISSION_DENIED",
    "Read-only file system",
)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves of what Orbax's threads log of a refused save the line; what else absl logs stays as it is."""
    if _tells_a_refusal(record):
        record.exc_info = record.exc_text = record.stack_info = None
    return True


def _no_array_of_a_save(record: logging.LogRecord) -> bool:
    forgotten = record.getMessage().startswith("Future exception was never retrieved")
    return not (forgotten and _tells_a_refusal(record))


def _tells_a_refusal(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if _is_refusal(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_refusal(error: BaseException) -> bool:
    return any(words in str(error) for words in _REFUSALS)


def _reason(error: Exception) -> str:
    """The line of an error that says why."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return next((line for line in lines if any(words in line for words in _REFUSALS)), lines[0])


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree with the given shardings: what `restore` asks for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
