"""The folder of a run: one process at a time writes it, and what stands there is whole.

It lies on a disk that all processes of the run see, or in a bucket (gs://...). Files cannot grow in a bucket, so there
the run writes them on its own disk and uploads those that changed with each checkpoint, before the checkpoint is whole,
and at its end. What a bucket does not take with one checkpoint it gets with the next; a run that is killed in between
lacks it there. Processes other than the first read the folder once, and what they note goes nowhere.

config.json      the settings that the numbers follow from
metrics.jsonl    one line a step
timings.jsonl    one line a step: seconds, waits for data, tokens a second, MFU; see `qwenvl_jax.train.timings`
validation.jsonl one line for each time the model was judged; see `qwenvl_jax.train.validation`
started          when the run was first started, in seconds since 1970
train.log        what the run said
quarantine.jsonl samples that could not be used, and why; see `qwenvl_jax.train.quarantine`
tensorboard/     what TensorBoard shows, and wandb/ likewise, where `track` asks for it
checkpoints/     by step, see `qwenvl_jax.checkpoint.store`
processor/       the model's shape, tokenizer and preprocessor settings: see `qwenvl_jax.train.export`
report.html      the course of a run that is done, with plots
profile/         a trace, where `--profile` asks for one
model/           the trained model in the public layout, when the run is done
adapter/         what a run with adapters learnt, in PEFT's format
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from qwenvl_jax.errors import ConfigError, QwenVLError, StoreError
from qwenvl_jax.train.config import changes_nothing
from qwenvl_jax.train.processes import Processes
from qwenvl_jax.train.refusals import naming, refusal

# Stores that both Orbax and etils write to.
_STORES = ("gs", "s3")
# Files whose presence says that a folder is whole.
_LAST = ("config.json", "adapter_config.json")
# How systems answer when a file is locked already; otherwise it is not locks by others that are in the way.
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
# What has a folder of its own for each kind and is never looked at again.
_KEPT_THERE = ("checkpoints", "model", "adapter")
# What a process that ends at once, others waiting for it, may take to leave its files.
_LEAVING_SECONDS = 20.0


@dataclasses.dataclass
class RunFolder:
    """Where a process finds and leaves the files of a run.

    Attributes:
      out: the folder, as a `Path`, or as an `epath.Path` for a bucket.
      local: a folder on this machine for the small files: `out` itself, or one whose content is uploaded or dropped.
      writes: whether this process writes the run's folder.
      begun: whether the run may write here: one that is refused leaves what it found.
      published: size and time, by name, of what `out` has of `local`.
    """

    out: Any
    local: Path
    writes: bool
    begun: bool = False
    published: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the run is called where it is shown."""
        return self.out.name or str(self.out)

    @property
    def checkpoints(self):
        """Where the checkpoints lie."""
        return self.out / "checkpoints"

    def begin(self, fingerprint: Mapping[str, str]) -> None:
        """Makes the folder that of the run with these settings, which `check` has found to be its own or nobody's.

        Raises:
          ConfigError: the bucket does not take files.
        """
        write_atomically(self.local / "config.json", json.dumps(fingerprint, indent=2) + "\n")
        self.begun = True
        with _told(self.out, "cannot be written"):
            self._upload()

    def publish(self, say: Callable[[str], None] | None = None) -> None:
        """Makes the small files as they are now the ones in `out`.

        Args:
          say: told if the bucket does not take them, which is then no error: it may take them the next time.

        Raises:
          StoreError: the bucket does not take them, and there is no `say`.
        """
        try:
            with _failing(self.out, "cannot be written"):
                self._upload()
        except StoreError as error:
            if say is None:
                raise
            reason = _reason(error.__cause__ or error, self.out)
            say(f"{self.out} does not take files ({reason}); it gets them with the next checkpoint")

    def leave(self) -> None:
        """Publishes what there is, as far as it goes, and removes `local`: of a process that nothing else clears up."""

        def publish() -> None:
            with contextlib.suppress(Exception):
                self._upload()

        # It may be a bucket that ends the process, and the others wait.
        thread = threading.Thread(target=publish, daemon=True, name="leave")
        thread.start()
        thread.join(_LEAVING_SECONDS)
        shutil.rmtree(self.local, ignore_errors=True)

    def _upload(self) -> None:
        if self.begun and self.writes and self.local != self.out:
            for name in _small_files(self.local):
                state = self._state(name)
                if self.published.get(name) != state:
                    _copy(self.local / name, self.out / name)
                    self.published[name] = state

    def fetch(self) -> None:
        """Copies the small files to `local`, as far as this process goes on with them.

        Raises:
          ConfigError: they cannot be read.
        """
        with _told(self.out, "cannot be read"):
            for name in _small_files(self.out):
                # What stands in folders only the process that writes goes on with; traces, nobody.
                if "/" not in name or (self.writes and not name.startswith("profile/")):
                    _copy(self.out / name, self.local / name)
                    self.published[name] = self._state(name)

    def _state(self, name: str) -> tuple[int, int]:
        status = (self.local / name).stat()
        return status.st_size, status.st_mtime_ns

    @contextlib.contextmanager
    def new_model(self, name: str = "model") -> Iterator[Path]:
        """Gives a folder to fill, whose content becomes `name` when all went well.

        In a bucket, where no folder is renamed at once, the file that says that it is whole comes last.

        Raises:
          StoreError: the bucket does not take it.
        """
        if self.local == self.out:
            with new_folder(self.local / name) as folder:
                yield folder
            return
        with tempfile.TemporaryDirectory(dir=self.local, prefix=".") as making:  # no small file of the run
            folder = Path(making)
            yield folder
            if self.writes:
                with _failing(self.out, "cannot be written"):
                    for path in sorted(folder.iterdir(), key=lambda path: path.name in _LAST):
                        _copy(path, self.out / name / path.name)


@contextlib.contextmanager
def opened(out, processes: Processes) -> Iterator[RunFolder]:
    """The folder of a run, held by its first process; see `locked`.

    Args:
      out: a path, or the address of a folder in a bucket, which nothing holds against other runs.
      processes: of the run.

    Raises:
      ConfigError: the folder cannot be made or written, is in use, or is not the same in all processes.
      StoreError: a bucket does not take the last of the run's files.
    """
    remote = _is_address(str(out))
    out = epath.Path(out) if remote else Path(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_refusals_told(out))
        if processes.index == 0:
            if remote:
                _check_writable(out)
            else:
                stack.enter_context(locked(out))
        processes.gather("locked", "")
        if processes.index == 0 and not remote:
            folder = RunFolder(out, out, True)
        else:
            if not (remote or (out / ".lock").exists()):
                raise ConfigError(
                    f"process {processes.index} does not see the output folder {out} that process 0 made; choose "
                    "one on a disk that all processes share, or in a bucket."
                )
            local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwenvl-jax-run-")))
            folder = RunFolder(out, local, processes.index == 0)
            folder.fetch()
            stack.enter_context(processes.leaving(folder.leave))
        # Nothing changes before each has its copy.
        processes.gather("opened", "")
        try:
            yield folder
        except BaseException:  # which is what is to be told
            with contextlib.suppress(Exception):
                folder.publish()
            raise
        folder.publish()


def _small_files(folder, above: str = "") -> Iterator[str]:
    """Names of the files of a run, those in folders (of a tracker, say) too, but for checkpoints and weights."""
    try:
        # The file that says that a folder is whole comes last.
        paths = sorted(folder.iterdir(), key=lambda path: path.name in _LAST)
    except FileNotFoundError:  # a bucket has no empty folders
        return
    for path in paths:
        if path.name.startswith(".") or path.name in _KEPT_THERE:
            continue
        if path.is_dir():
            yield from _small_files(path, f"{above}{path.name}/")
        elif path.is_file():  # the mark of a folder that was made in a browser is listed too, and is none
            yield f"{above}{path.name}"


def _copy(source, target) -> None:
    """Copies a file between this machine and a bucket, a part at a time."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(source).copy(target, overwrite=True)


def _is_address(out: str) -> bool:
    """Whether a run's folder is in a bucket.

    Raises:
      ConfigError: neither a path nor the address of a folder in a bucket of a known kind.
    """
    found = re.match(r"(\w\w+):(/+)([^/]*)", out)
    if found is None:
        return False
    scheme, slashes, bucket = found.groups()
    if scheme not in _STORES or slashes != "//" or not bucket:
        raise ConfigError(
            f"output folder {out} is neither a path nor the address of a folder in a bucket; give a path, or "
            "gs://BUCKET/RUN (as text: pathlib makes one slash of two)."
        )
    return True


def _check_writable(out) -> None:
    """Refuses a bucket that does not take files, before anything is computed."""
    with _told(out, "cannot be written"):
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()


@contextlib.contextmanager
def _told(out, what: str) -> Iterator[None]:
    """Turns what a store says, where `out` is in one, into one line."""
    try:
        yield
    except Exception as error:  # each store has its own
        if isinstance(out, Path) or isinstance(error, QwenVLError):
            raise
        raise ConfigError(
            f"output folder {out} {what} ({_reason(error, out)}); check its address, your credentials and, for gs://, "
            "that gcsfs is installed, then start the same command again: a run continues from its latest checkpoint."
        ) from error


@contextlib.contextmanager
def _failing(out, what: str) -> Iterator[None]:
    """The same for a store that was found in order before: no mistake of the user."""
    try:
        yield
    except Exception as error:
        if isinstance(out, Path):
            raise
        raise StoreError(
            f"output folder {out} {what} any more ({_reason(error, out)}); start the same command again: a run "
            "continues from its latest checkpoint."
        ) from error


def _reason(error: BaseException, out) -> str:
    """What a store says, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, FileNotFoundError):
        return f"is there a bucket {out.parts[2]}? not found: {reason}"
    return reason


@contextlib.contextmanager
def _refusals_told(out) -> Iterator[None]:
    """Turns a full disk, or one that may not be written, into one line."""
    try:
        yield
    except OSError as error:
        line = refusal(error, out)
        if line is None:
            raise
        raise ConfigError(line) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder (made if missing) against other processes; the system frees it when this one dies.

    Raises:
      ConfigError: the folder cannot be made, another process holds it, or its file system has no locks.

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
            if error.errno in _HELD:
                raise ConfigError(
                    f"output folder {folder} is in use by another process; wait for it, or choose another folder."
                ) from error
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(
                f"output folder {folder} cannot be locked against other processes: its file system says "
                f"{error.strerror}; have it mounted with locks (Lustre: -o flock; NFS: with its lock service running), "
                "or choose a folder on another file system."
            ) from error
        try:
            yield
        except QwenVLError:
            if made and not (folder / "config.json").exists():
                shutil.rmtree(folder)
            raise


def check(folder: RunFolder, fingerprint: Mapping[str, str]) -> None:
    """Checks that the run that began in `folder`, if one did, has these settings.

    The digests of its data may be missing from `fingerprint`, so that settings can be checked before data is read.

    Raises:
      ConfigError: it has other settings; names the first that differs.
    """
    path = folder.out / "config.json"
    try:
        found = json.loads((folder.local / "config.json").read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); choose another output folder, or remove this one.") from error
    for name in {**fingerprint, **found}:
        unread = name not in fingerprint and (name.endswith(".digest") or changes_nothing(name))
        if fingerprint.get(name) == found.get(name) or unread:
            continue
        if name.endswith(".digest") and name in found:
            raise ConfigError(
                f"{folder.out} holds a run over other data: {name} differs, so records or media of that stage were "
                "changed, added or have gone since it began; put them back as they were, or choose another output "
                "folder."
            )
        raise ConfigError(
            f"{folder.out} holds a run with {name}={found.get(name)}, this one has {fingerprint.get(name)}; choose "
            "another output folder, or the old setting."
        )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with naming(path), temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `target` when all went well; what a killed run left of one is removed."""
    making = target.with_name(f".{target.name}.new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    os.replace(making, target)
