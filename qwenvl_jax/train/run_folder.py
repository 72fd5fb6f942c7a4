"""The folder of a run: one process at a time writes it, and what stands there is whole.

config.json      the settings that the numbers follow from
metrics.jsonl    one line a step
timings.jsonl    one line a step: seconds, waits for data, tokens a second, MFU; see `qwenvl_jax.train.timings`
validation.jsonl one line for each time the model was judged; see `qwenvl_jax.train.validation`
started          when the run was first started, in seconds since 1970
train.log        what the run said
quarantine.jsonl samples that could not be used, and why; see `qwenvl_jax.train.quarantine`
tensorboard/     what TensorBoard shows, and wandb/ likewise, where `track` asks for it
checkpoints/     by step, see `qwenvl_jax.checkpoint.store`
report.html      the course of a run that is done, with plots
profile/         a trace, where `--profile` asks for one
model/           the trained model in the public layout, when the run is done
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwenvl_jax.errors import ConfigError, QwenVLError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder (made if missing) against other processes; the system frees it when this one dies.

    Raises:
      ConfigError: the folder cannot be made, or another process holds it.

    A folder that was made here is removed again if a mistake of the user ends the run before it began.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"output folder {folder} cannot be written ({error.strerror}); choose another.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"output folder {folder} is in use by another process; wait for it, or choose another folder."
            ) from error
        try:
            yield
        except QwenVLError:
            if made and not (folder / "config.json").exists():
                shutil.rmtree(folder)
            raise


def check(folder: Path, fingerprint: Mapping[str, str]) -> None:
    """Checks that the run that began in `folder`, if one did, has these settings.

    The digests of its data may be missing from `fingerprint`, so that settings can be checked before data is read.

    Raises:
      ConfigError: it has other settings; names the first that differs.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); choose another output folder, or remove this one.") from error
    for name in {**fingerprint, **found}:
        unread = name.endswith(".digest") and name not in fingerprint
        if fingerprint.get(name) != found.get(name) and not unread:
            raise ConfigError(
                f"{folder} holds a run with {name}={found.get(name)}, this one has {fingerprint.get(name)}; choose "
                "another output folder, or the old setting."
            )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `target` when all went well; what a killed run left of one is removed."""
    making = target.with_name(f".{target.name}.new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    yield making
    os.replace(making, target)
