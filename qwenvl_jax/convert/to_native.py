"""From the public layout to the native one; see `qwenvl_jax.checkpoint.native` for what it is.

A file is the unit of work. A process that takes one holds a lock on its unfinished form, which the system frees when
the process dies. So any number of processes, started together or later, on one machine or on several that share a file
system with locks, divide the files among themselves. Of a process that is killed the unfinished file stays, and whoever
takes it reads what is there and writes what is not (`checkpoint.safetensors_file.Writer`): a slice at most is written
twice. Whoever finds all files complete writes the index.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.checkpoint import native, reorder, source
from qwenvl_jax.checkpoint.safetensors_file import Writer, read_header
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.convert import places
from qwenvl_jax.convert.progress import Progress
from qwenvl_jax.convert.stream import Streamer
from qwenvl_jax.errors import CheckpointError, ConfigError, QwenVLError

_SECONDS_BETWEEN_LOOKS = 0.2  # at files that other processes hold
_AGAIN = "run the same command again to continue"


def convert(src: str | Path, dst: str | Path, *, processes: int = 1, verify: bool = False) -> Path:
    """Converts a model to the native layout, or completes a conversion that was begun.

    Args:
      src: a folder in the public layout, a training run's folder, or a hub id.
      dst: a new or empty folder, or that of the same conversion begun before.
      processes: how many share the work.
      verify: whether to read both sides again afterwards and compare every tensor.

    Returns:
      `dst`.

    Raises:
      CheckpointError: the source is not whole or not supported, `dst` holds something else or cannot be written, or the
        two differ.
      ConfigError: fewer than one process.
    """
    if processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {processes}.")
    folder, dst = places.model_folder(src), Path(dst)
    if native.is_native(folder):
        raise CheckpointError(
            f"{folder} is in the native layout already; `qwenvl-jax export` makes a public one of it."
        )
    conversion = Conversion(folder, dst)
    conversion.check()
    helpers = []
    if processes > 1 and not conversion.is_done():
        spawn = multiprocessing.get_context("spawn")
        arguments = (str(folder), str(dst))
        helpers = [spawn.Process(target=_help, args=arguments, daemon=True) for _ in range(processes - 1)]
    try:
        for helper in helpers:
            helper.start()
        with Progress("converting", conversion.tensors, conversion.size) as progress:
            conversion.run(progress)
    finally:
        for helper in helpers:
            helper.join()
    if verify:
        conversion.verify()
    return dst


def _help(folder: str, dst: str) -> None:
    """What a process beside the first does; the first one tells of what goes wrong, for it meets the same."""
    try:
        Conversion(Path(folder), Path(dst)).run(None)
    except (QwenVLError, KeyboardInterrupt):
        sys.exit(2)


class Conversion:
    """One source and one destination.

    Attributes:
      tensors, size: how many tensors there are, and their bytes.
    """

    def __init__(self, folder: Path, dst: Path):
        self._source, self._dst = source.PublicSource(folder), dst
        self._root = dst / native.FOLDER
        self._files = native.layout(self._source.table)
        parts = [part for file in self._files for part in file.parts]
        self._dtypes = {part.name: self._source.tensor(part.entry, part.layer).dtype for part in parts}
        self._bytes = {f.name: sum(int(np.prod(s)) * d.itemsize for _, d, s in self._specs(f)) for f in self._files}
        self.tensors, self.size = len(parts), sum(self._bytes.values())
        self._table = native.table_fingerprint(self._source.table)
        types = sorted((name, dtype.name) for name, dtype in self._dtypes.items())
        self._plan = native.fingerprint(native.FORMAT, self._table, places.content_fingerprint(self._source), types)

    def _specs(self, file: native.NativeFile):
        return file.specs(self._dtypes)

    def is_done(self) -> bool:
        """Whether the index is written."""
        return (self._root / native.INDEX).is_file()

    def check(self) -> None:
        """Refuses a destination that this conversion cannot go to; writes nothing.

        Raises:
          CheckpointError: another model is there, or something else, or too little room.
        """
        if not native.is_native(self._dst):
            places.check_new(self._dst, self._source.folder)
        for name in (native.INDEX, native.PLAN):
            if (self._root / name).is_file():
                self._check_plan(read_json(self._root / name).get("plan", ""))
        left = self.size
        for file in self._files:
            path = self._root / file.name
            if native.is_complete(path, file, self._dtypes, self._plan):
                left -= self._bytes[file.name]
                continue
            if path.is_file():
                self._check_plan(_plan_of(path))
            left -= min(places.allocated(self._partial(file)), self._bytes[file.name])
        places.check_room(self._dst, left)

    def _check_plan(self, plan: str | None) -> None:
        if plan is not None and plan != self._plan:
            raise CheckpointError(
                f"{self._dst} holds the conversion of another model, or one by another version; give a new folder, or "
                "remove this one."
            )

    def run(self, progress: Progress | None) -> None:
        """Converts what no other process converts, waits for the others, and completes the folder.

        Raises:
          CheckpointError: the destination cannot be written, or is being written by the conversion of another model.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._begin()
            self._convert_files(progress)
            self._complete()
        except OSError as error:
            raise places.cannot_write(self._dst, error, _AGAIN) from error

    def _begin(self) -> None:
        """Says whose conversion this is, unless somebody else has said so."""
        with _locked(self._root):
            plan = self._root / native.PLAN
            if plan.is_file():
                self._check_plan(read_json(plan).get("plan", ""))
            elif not self.is_done():
                text = json.dumps({"plan": self._plan, "source": str(self._source.folder)}) + "\n"
                native.write_atomically(plan, text.encode())

    def _convert_files(self, progress: Progress | None) -> None:
        """Goes over the files, the largest first, until all are complete, whoever completes them."""
        waiting = sorted(self._files, key=lambda file: -self._bytes[file.name])
        with Streamer(progress) as streamer:
            while waiting:
                held = []
                for file in waiting:
                    wrote = self._convert_file(file, streamer)
                    if wrote is None:
                        held.append(file)
                    elif progress is not None:
                        progress.finished(len(file.parts), found=0 if wrote else self._bytes[file.name])
                waiting = held
                if waiting:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _convert_file(self, file: native.NativeFile, streamer: Streamer) -> bool | None:
        """True if the file was written here, False if it was there, None if another process is at it."""
        path = self._root / file.name
        if native.is_complete(path, file, self._dtypes, self._plan):
            return False
        partial = self._partial(file)
        with _claimed(partial) as claimed:
            if not claimed:
                return None
            if native.is_complete(path, file, self._dtypes, self._plan):
                partial.unlink()
                return False
            self._write(partial, file, streamer)
            os.replace(partial, path)
            places.sync(self._root)
        return True

    def _partial(self, file: native.NativeFile) -> Path:
        """Where a file stands until it is complete."""
        return self._root / f".{file.name}.partial"

    def _write(self, partial: Path, file: native.NativeFile, streamer: Streamer) -> None:
        found = {part.name: native.PENDING for part in file.parts}
        with Writer(partial, self._specs(file), native.metadata_of(self._plan, found)) as writer:
            for part in file.parts:
                entry, axis, step = part.entry, source.native_axis(part.entry), source.unit(part.entry)

                def write(start, rows, part=part, entry=entry, axis=axis, step=step):
                    block = reorder.contiguous(source.to_native(entry, rows))
                    writer.write(part.name, block, start // step, axis)

                found[part.name] = streamer.move(self._source.tensor(entry, part.layer), entry, write)
            writer.finish(native.metadata_of(self._plan, found))

    def _complete(self) -> None:
        """Writes the small files and then the index, which makes the conversion whole."""
        with _locked(self._root):
            if not self.is_done():
                for name, content in places.small_files(self._source.folder):
                    native.write_atomically(self._dst / name, content)
                places.sync(self._dst)
                index = json.dumps(self._index(), indent=1) + "\n"
                native.write_atomically(self._root / native.INDEX, index.encode())
            (self._root / native.PLAN).unlink(missing_ok=True)
            places.sync(self._root)

    def _index(self) -> dict[str, Any]:
        files, found = {}, {}
        for file in self._files:
            path = self._root / file.name
            stored, metadata = read_header(path)
            digests = native.digests(metadata)
            files[file.name] = {"bytes": path.stat().st_size, "sha256": native.file_digest(digests)}
            for name, tensor in stored.items():
                place = {"file": file.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                found[name] = {**place, "sha256": digests[name]}
        about: dict[str, Any] = {"format": native.FORMAT, "plan": self._plan, "table": self._table}
        about["exchanged"] = sorted(self._source.exchanged)
        return {**about, "source": str(self._source.folder), "bytes": self.size, "files": files, "tensors": found}

    def verify(self) -> None:
        """Reads source and destination again and compares every tensor with the other and with the index.

        Raises:
          CheckpointError: names the tensors that differ.
        """
        written = native.NativeSource(self._dst)
        with Progress("verifying", self.tensors, 2 * self.size) as progress:
            compare(
                self._source,
                written,
                {p.name: (p.entry, p.layer, written.digest(p)) for p in written.parts()},
                progress,
            )


def compare(ours, theirs, parts, progress: Progress) -> None:
    """Compares the contents of two sources.

    Args:
      ours, theirs: `PublicSource` or `NativeSource`.
      parts: entry, layer and, where one was recorded, digest of each tensor, by the name to use in errors.
      progress: told of both.

    Raises:
      CheckpointError: names the tensors that differ.
    """
    different = []
    with Streamer(progress) as streamer:
        for name, (entry, layer, recorded) in parts.items():
            found = {streamer.move(one.tensor(entry, layer), entry) for one in (ours, theirs)}
            if len(found | ({recorded} if recorded else set())) > 1:
                different.append(name)
            progress.finished(1)
    if different:
        rest = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise CheckpointError(
            f"{theirs.folder} differs from {ours.folder} in {', '.join(different[:3])}{rest}; the copy is damaged or "
            "the source has changed, remove the copy and make it again."
        )


def _plan_of(path: Path) -> str | None:
    """The conversion that wrote a file; None if it is damaged, and then to be written anew."""
    try:
        return read_header(path)[1].get("plan", "")
    except CheckpointError:
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes, for the moments in which one may write what is common to all."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[bool]:
    """Holds the unfinished form of a file against other processes; False if another has it."""
    fd = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # Between opening and locking the file may have been completed: this is then a lock on its finished form.
        try:
            same = os.path.samestat(os.fstat(fd), os.stat(partial))
        except FileNotFoundError:
            same = False
        yield same
    finally:
        os.close(fd)
