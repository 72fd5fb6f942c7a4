"""Tensors in files: reading a folder of safetensors with every fault named, writing one all or nothing.

Only safetensors are opened. Files of pickled objects run code when they are read, and are refused.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from qwenvl_jax.checkpoint import reorder
from qwenvl_jax.checkpoint.safetensors_file import StoredTensor, Writer, read_header
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LISTED = 12  # names spelled out in an error for each kind of fault


class TensorFiles:
    """The tensors of a folder, their headers checked and their contents left on disk.

    Attributes:
      folder: where they are.
      headers: where each tensor lies, by its stored name.
    """

    def __init__(self, folder: Path):
        """Reads the headers in `folder`.

        Raises:
          CheckpointError: no safetensors, an index that is wrong or leads outside, a missing or damaged file.
        """
        self.folder = folder
        self.headers: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            self._read_header(file)
        self._check_index()

    def _read_header(self, file: str) -> None:
        tensors, _ = read_header(self.folder / file)
        for name, tensor in tensors.items():
            if name in self.headers:
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is stored twice, in {self.headers[name].path.name} and in {file}; "
                    "fetch the folder again."
                )
            self.headers[name] = tensor

    def _check_index(self) -> None:
        """Every tensor must be where the index says: a shard of another save must not slip in."""
        if (self.folder / SINGLE).is_file():
            return
        for name, file in _weight_map(self.folder).items():
            if name not in self.headers or self.headers[name].path != self.folder / file:
                raise CheckpointError(
                    f"{self.folder / INDEX} says that {file} holds {name}, but it does not; fetch the folder again."
                )


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the tensors: the single one if it is there, else those of the index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        files = sorted(set(_weight_map(folder).values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {some(missing)}, named in {INDEX}; fetch the missing files, or the folder again."
            )
        return files
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{folder} has {some(shards)}, but neither {SINGLE} nor {INDEX}; fetch the index, or rename a single file "
            f"to {SINGLE}."
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights as {some(pickled)}, pickled files that can run code and are not opened; use "
            "the safetensors of that model, or convert them."
        )
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; give a folder that holds one.")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files; fetch it again.")
    for file in weight_map.values():
        # Lexically: the files of Hugging Face's cache are links out of the folder, and rightly so.
        path = PurePosixPath(str(file))
        if not isinstance(file, str) or path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{folder / INDEX} names {file!r}, which is outside its folder; do not use this model."
            )
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{folder / INDEX} names {file}, which is no safetensors file; only those are opened."
            )
    return weight_map


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def write(
    out_dir: Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    files: Mapping[str, Mapping],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors and JSON files into a folder, all or nothing.

    Everything is written beside its place first and renamed when complete. Files of other names in an existing folder
    stay, except weights that the new ones replace. One tensor is in memory at a time.

    Args:
      out_dir: made if missing.
      specs: type and shape of each tensor by its public name, in the order to store them.
      read: gives the tensor of a name, of that type and shape; called once for each, in order.
      files: contents of JSON files by name, such as {"config.json": {...}}.
      max_shard_bytes: above this, tensors go to several files with an index.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    names = shard_names(len(shards))
    files = dict(files)
    if len(shards) > 1:
        files[INDEX] = shard_index(names, shards, sizes)
    made = not out_dir.exists()
    temporary = None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=out_dir))
        for file, shard in zip(names, shards, strict=True):
            with Writer(temporary / file, [(name, *specs[name]) for name in shard], {"format": "pt"}) as writer:
                for name in shard:
                    tensor = reorder.contiguous(read(name))
                    assert (tensor.dtype, tensor.shape) == specs[name], name
                    writer.write(name, tensor)
                writer.finish({"format": "pt"})
        for file, values in files.items():
            (temporary / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _move_in(temporary, out_dir, [*names, *files])
    except OSError as error:
        raise CheckpointError(
            f"{out_dir} cannot be written ({error}); nothing was saved, choose another place."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if made and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Divides tensors, in order, among shards of at most `max_shard_bytes`; a larger tensor has one to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """File names of that many shards."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def shard_index(names: Sequence[str], shards: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> dict:
    """The contents of the index of shards: which file holds which tensor."""
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}


def _move_in(temporary: Path, out_dir: Path, names: Sequence[str]) -> None:
    """Renames complete files into place and then removes the weights of an earlier save that they replace."""
    for name in names:
        os.chmod(temporary / name, 0o644)
        os.replace(temporary / name, out_dir / name)
    for path in [*out_dir.glob("*.safetensors"), out_dir / INDEX]:
        if path.name not in names:
            path.unlink(missing_ok=True)
