"""From a checkpoint of ours to the public layout, which other tools read."""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwenvl_jax.checkpoint import hf, native, reorder, source, tensors
from qwenvl_jax.checkpoint.safetensors_file import Writer
from qwenvl_jax.convert import places
from qwenvl_jax.convert.progress import Progress
from qwenvl_jax.convert.stream import Streamer
from qwenvl_jax.convert.to_native import compare
from qwenvl_jax.errors import CheckpointError


def export(
    src: str | Path, dst: str | Path, *, verify: bool = False, max_shard_bytes: int = tensors.MAX_SHARD_BYTES
) -> Path:
    """Writes a model in the public layout: all of it or nothing.

    Names are those of transformers 5, and experts stand in the order that the source had them in, so that what was
    converted comes back bit for bit. What is written stands under a hidden name beside `dst` until it is whole (and,
    if asked, verified); a killed export leaves that behind, and the next one to the same place removes it.

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
    model = native.open_source(folder)
    places.check_new(dst, folder)
    names = {name: (entry, layer) for entry in model.table for name, layer in _named(entry)}
    sizes = {name: math.prod(e.shape) * model.tensor(e, layer).dtype.itemsize for name, (e, layer) in names.items()}
    places.check_room(dst, sum(sizes.values()))
    try:
        with _new_folder(dst) as making:
            _write(model, names, sizes, making, max_shard_bytes)
            if verify:
                with Progress("verifying", len(names), 2 * sum(sizes.values())) as progress:
                    parts = {name: (entry, layer, None) for name, (entry, layer) in names.items()}
                    compare(model, source.PublicSource(making), parts, progress)
    except OSError as error:
        raise places.cannot_write(dst, error, "nothing was exported, choose another place") from error
    return dst


def _named(entry: hf.Entry) -> Iterator[tuple[str, int | None]]:
    """The public names of an entry and the layers that they are of."""
    return zip(entry.names(), [None] if entry.layers is None else range(entry.layers), strict=True)


def _is_exchanged(model, entry: hf.Entry) -> bool:
    """Whether the tensors of an entry are written with their last two axes exchanged; see `hf.Entry.is_swapped`."""
    return entry.public in model.exchanged or entry.is_swapped(entry.shape)


def _shape(model, entry: hf.Entry) -> tuple[int, ...]:
    return entry.swapped_shape if _is_exchanged(model, entry) else entry.shape


def _write(model, names, sizes, making: Path, max_shard_bytes: int) -> None:
    shards = tensors.plan_shards(sizes, max_shard_bytes)
    files = tensors.shard_names(len(shards))
    with Progress("exporting", len(names), sum(sizes.values())) as progress, Streamer(progress) as streamer:
        for file, shard in zip(files, shards, strict=True):
            specs = [(name, model.tensor(*names[name]).dtype, _shape(model, names[name][0])) for name in shard]
            with Writer(making / file, specs, {"format": "pt"}) as writer:
                for name in shard:
                    entry, layer = names[name]
                    exchange = _is_exchanged(model, entry)

                    def write(start, rows, name=name, writer=writer, exchange=exchange):
                        rows = reorder.contiguous(rows.swapaxes(-1, -2)) if exchange else rows
                        writer.write(name, rows, start)

                    streamer.move(model.tensor(entry, layer), entry, write)
                    progress.finished(1)
                writer.finish({"format": "pt"})
    if len(shards) > 1:
        index = tensors.shard_index(files, shards, sizes)
        native.write_atomically(making / tensors.INDEX, (json.dumps(index, indent=2) + "\n").encode())
    for name, content in places.small_files(model.folder):
        native.write_atomically(making / name, content)


@contextlib.contextmanager
def _new_folder(dst: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `dst` when all went well and goes when not."""
    making = dst.with_name(f".{dst.name}.partial")
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
            for left in making.iterdir():
                left.unlink()
            yield making
            places.sync(making)
            os.replace(making, dst)
            places.sync(dst.absolute().parent)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    finally:
        os.close(fd)
