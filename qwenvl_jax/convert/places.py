"""The folders that a conversion reads from and writes to."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint import fp8, native, source, tensors
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.errors import CheckpointError

_LARGEST_SMALL_FILE = 256 << 20


def model_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of the model that a name means: a model's folder, a hub id, or a training run's folder.

    Raises:
      CheckpointError: there is none, or the run is not done.
    """
    folder = folders.resolve(name, weights=weights)
    if native.is_native(folder) or any(folder.glob("*.safetensors")):
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "checkpoints").is_dir() and (folder / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"{folder} is a training run that is not done: it has no model/ yet; continue it with `qwenvl-jax train`, "
            f"or write the model of a checkpoint with `qwenvl-jax export {folder} DST --step latest`."
        )
    return folder


def check_new(out: Path, src: Path) -> None:
    """Refuses a place for a new model that is a file, the source, or a folder with something else in it.

    Raises:
      CheckpointError: says which.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a new folder.")
    if out.resolve() == src.resolve():
        raise CheckpointError(f"{out} is the source itself; give a new folder.")
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} holds something else already; give a new folder, or empty this one.")


def check_room(out: Path, needed: int) -> None:
    """Refuses a disk without room for `needed` bytes.

    Raises:
      CheckpointError: names both figures.
    """
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{out} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there; make room, or choose "
            "another place."
        )


def allocated(path: Path) -> int:
    """Bytes of the disk that a file takes; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def cannot_write(out: Path, error: OSError, remedy: str) -> CheckpointError:
    """The error of a place that refuses to be written."""
    return CheckpointError(f"{out} cannot be written ({error.strerror or error}); {remedy}.")


def small_files(src: Path) -> Iterable[tuple[str, bytes]]:
    """What belongs beside the weights, by name: configuration, tokenizer, processor and template.

    config.json says no longer how the source's weights were quantized, for what is written is not.
    """
    values = read_json(src / "config.json")
    if fp8.read_quantization(values) is not None:
        values = fp8.without_quantization(values)
        yield "config.json", (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    else:
        yield "config.json", (src / "config.json").read_bytes()
    for path in sorted(path for pattern in folders.SMALL_FILES for path in src.glob(pattern)):
        if path.name in ("config.json", tensors.INDEX) or not path.is_file():
            continue
        if path.stat().st_size <= _LARGEST_SMALL_FILE:
            yield path.name, path.read_bytes()


def content_fingerprint(src: source.PublicSource) -> str:
    """Tells one source from another: its configuration, its headers, and samples of every tensor's bytes.

    A model that differs in a few numbers only may share it.
    """
    samples = []
    for name, stored in sorted(src.files.headers.items()):
        size = stored.nbytes
        fd = os.open(stored.path, os.O_RDONLY)
        try:
            for at in sorted({0, size // 2, max(0, size - _SAMPLE)}):
                samples.append((name, at, os.pread(fd, min(_SAMPLE, size - at), stored.offset + at).hex()))
        finally:
            os.close(fd)
    headers = [(name, stored.dtype, stored.shape) for name, stored in sorted(src.files.headers.items())]
    return native.fingerprint((src.folder / "config.json").read_text(encoding="utf-8"), headers, samples)


_SAMPLE = 512


def sync(folder: Path) -> None:
    """Returns when the names in a folder are on disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
