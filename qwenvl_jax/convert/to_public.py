"""From a checkpoint of ours to the public layout, which other tools read.

What is written stands in a hidden folder beside its place until it is whole: a plan, which says of what it is an
export, the shards that are complete, and the one that is not. A process that is killed or interrupted, or that finds
the disk full, leaves that behind; the same export started again completes it, and another one to that place clears it.
The plan goes last, when the folder has its name.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwenvl_jax.checkpoint import hf, native, reorder, source, tensors
from qwenvl_jax.checkpoint.safetensors_file import Writer
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.convert import places
from qwenvl_jax.convert.progress import Progress
from qwenvl_jax.convert.stream import Streamer
from qwenvl_jax.convert.to_native import compare
from qwenvl_jax.errors import CheckpointError

_PLAN = ".export.json"


def export(
    src: str | Path, dst: str | Path, *, verify: bool = False, max_shard_bytes: int = tensors.MAX_SHARD_BYTES
) -> Path:
    """Writes a model in the public layout: all of it or nothing.

    Names are those of transformers 5, and experts stand in the order that the source had them in, so that what was
    converted comes back bit for bit. `dst` appears when all of it is there (and, if asked, verified). A killed export
    leaves a hidden folder beside `dst`; the same one started again continues from it.

    Args:
      src: a folder in the native layout, a training run's folder, or one in the public layout.
      dst: a new or empty folder.
      verify: whether to read both sides again and compare every tensor, before `dst` appears.
      max_shard_bytes: above this the weights go to several files with an index.

    Returns:
      `dst`.

    Raises:
      CheckpointError: the source is not whole, or `dst` holds something or cannot be written, or the two differ.
    """
    folder, dst = places.model_folder(src), Path(dst)
    job = _Export(native.open_source(folder), max_shard_bytes)
    making = dst.with_name(f".{dst.name}.partial")
    whole = _plan_in(dst) == job.plan
    if not whole:
        places.check_new(dst, folder)
        places.check_room(dst, max(0, job.size - sum(map(places.allocated, making.glob("*")))))
    try:
        if not whole:
            with _new_folder(dst, making, job.plan):
                job.write(making)
                if verify:
                    job.verify(making)
        elif verify:
            job.verify(dst)
        (dst / _PLAN).unlink()
        places.sync(dst)
    except OSError as error:
        remedy = "nothing was exported, choose another place"
        if making.is_dir():
            remedy = f"run the same command again to continue, or remove what is written so far, {making}"
        raise places.cannot_write(dst, error, remedy) from error
    return dst


class _Export:
    """What is to be written.

    Attributes:
      names: entry and layer of every tensor by its public name.
      size: bytes of all tensors.
      plan: tells this export from any other.
    """

    def __init__(self, model: "source.PublicSource | native.NativeSource", max_shard_bytes: int):
        self._model = model
        self.names = {name: (entry, layer) for entry in model.table for name, layer in _named(entry)}
        self._specs = {name: self._spec(name) for name in self.names}
        self._sizes = {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in self._specs.values()}
        self.size = sum(self._sizes.values())
        self._shards = tensors.plan_shards(self._sizes, max_shard_bytes)
        self._files = tensors.shard_names(len(self._shards))
        if isinstance(model, native.NativeSource):
            content = native.fingerprint(model.index["tensors"])
        else:
            content = places.content_fingerprint(model)
        specs = [(name, dtype.name, shape) for name, dtype, shape in self._specs.values()]
        self.plan = native.fingerprint("export 1", content, specs, self._shards)

    def _spec(self, name: str) -> tuple[str, np.dtype, tuple[int, ...]]:
        entry, layer = self.names[name]
        shape = entry.swapped_shape if _is_exchanged(self._model, entry) else entry.shape
        return name, self._model.tensor(entry, layer).dtype, shape

    def write(self, making: Path) -> None:
        """Writes what is not in the folder yet."""
        with Progress("exporting", len(self.names), self.size) as progress, Streamer(progress) as streamer:
            for file, shard in zip(self._files, self._shards, strict=True):
                if (making / file).is_file():
                    progress.finished(len(shard), found=sum(self._sizes[name] for name in shard))
                else:
                    self._write_shard(making, file, shard, streamer, progress)
        if len(self._shards) > 1:
            index = tensors.shard_index(self._files, self._shards, self._sizes)
            native.write_atomically(making / tensors.INDEX, (json.dumps(index, indent=2) + "\n").encode())
        for name, content in places.small_files(self._model.folder):
            native.write_atomically(making / name, content)

    def verify(self, written: Path) -> None:
        """Compares every tensor of what was written with the source's.

        Raises:
          CheckpointError: names those that differ.
        """
        with Progress("verifying", len(self.names), 2 * self.size) as progress:
            parts = {name: (entry, layer, None) for name, (entry, layer) in self.names.items()}
            compare(self._model, source.PublicSource(written), parts, progress)

    def _write_shard(self, making: Path, file: str, shard, streamer: Streamer, progress: Progress) -> None:
        partial = making / f".{file}.partial"
        with Writer(partial, [self._specs[name] for name in shard], {"format": "pt"}) as writer:
            for name in shard:
                entry, layer = self.names[name]
                exchange = _is_exchanged(self._model, entry)

                def write(start, rows, name=name, exchange=exchange):
                    rows = reorder.contiguous(rows.swapaxes(-1, -2)) if exchange else rows
                    writer.write(name, rows, start)

                streamer.move(self._model.tensor(entry, layer), entry, write)
                progress.finished(1)
            writer.finish({"format": "pt"})
        os.replace(partial, making / file)
        places.sync(making)


def _named(entry: hf.Entry) -> Iterator[tuple[str, int | None]]:
    """The public names of an entry and the layers that they are of."""
    return zip(entry.names(), [None] if entry.layers is None else range(entry.layers), strict=True)


def _is_exchanged(model, entry: hf.Entry) -> bool:
    """Whether the tensors of an entry are written with their last two axes exchanged; see `hf.Entry.is_swapped`."""
    return entry.public in model.exchanged or entry.is_swapped(entry.shape)


@contextlib.contextmanager
def _new_folder(dst: Path, making: Path, plan: str) -> Iterator[None]:
    """A folder to fill, which becomes `dst` when all went well, its plan still in it.

    It stays for another try where the system or the user broke off, and goes when its content is wrong.
    """
    making.mkdir(parents=True, exist_ok=True)
    fd = os.open(making, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process exports to {dst}; wait for it, or choose another folder."
            ) from error
        try:
            _begin(making, plan)
            yield
            places.sync(making)
            os.replace(making, dst)
            places.sync(dst.absolute().parent)
        except (OSError, KeyboardInterrupt):
            raise
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    finally:
        os.close(fd)


def _begin(making: Path, plan: str) -> None:
    """Clears what another export left in the folder, and says whose it is now."""
    if _plan_in(making) != plan:
        for left in making.iterdir():
            left.unlink()
        native.write_atomically(making / _PLAN, (json.dumps({"plan": plan}) + "\n").encode())


def _plan_in(folder: Path) -> str | None:
    """Of which export a folder is; None if it does not say, or says it no longer."""
    try:
        return read_json(folder / _PLAN).get("plan")
    except CheckpointError:
        return None
