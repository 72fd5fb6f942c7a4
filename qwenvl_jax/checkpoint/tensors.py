"""Tensors in files: reading a folder of safetensors with every fault named, writing one all or nothing.

Only safetensors are opened. Files of pickled objects run code when they are read, and are refused.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from qwenvl_jax.checkpoint import hf
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LISTED = 12  # names spelled out in an error for each kind of fault


class TensorFiles:
    """The tensors of a folder, their headers checked and their contents left on disk until `read`.

    Attributes:
      folder: where they are.
      headers: file, type and shape of each tensor by its stored name.
    """

    def __init__(self, folder: Path):
        """Opens `folder`.

        Raises:
          CheckpointError: no safetensors, an index that is wrong or leads outside, a missing or damaged file.
        """
        self.folder = folder
        self.headers: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        self._open = {}
        for file in _weight_files(folder):
            self._read_header(file)
        self._check_index()

    def read(self, name: str) -> np.ndarray:
        """The tensor of that stored name."""
        file = self.headers[name][0]
        try:
            return self._open[file].get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(self.folder / file, error) from error

    def _read_header(self, file: str) -> None:
        path = self.folder / file
        try:
            handle = safetensors.safe_open(path, framework="numpy")
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                view = handle.get_slice(name)
                if name in self.headers:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name} is stored twice, in {self.headers[name][0]} and in {file}; "
                        "fetch the folder again."
                    )
                self.headers[name] = (file, view.get_dtype(), tuple(view.get_shape()))
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        self._open[file] = handle

    def _check_index(self) -> None:
        """Every tensor must be where the index says: a shard of another save must not slip in."""
        if SINGLE in self._open:
            return
        for name, file in _weight_map(self.folder).items():
            if name not in self.headers or self.headers[name][0] != file:
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
                f"{folder} lacks {_some(missing)}, named in {INDEX}; fetch the missing files, or the folder again."
            )
        return files
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{folder} has {_some(shards)}, but neither {SINGLE} nor {INDEX}; fetch the index, or rename a single file "
            f"to {SINGLE}."
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights as {_some(pickled)}, pickled files that can run code and are not opened; use "
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


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again.")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def match(
    headers: Mapping[str, tuple[str, str, tuple[int, ...]]], config: QwenVLConfig, folder: Path
) -> dict[str, str]:
    """Finds every tensor of the table among the stored ones.

    Args:
      headers: as `TensorFiles` has them.
      config: the shape that they should have.
      folder: named in errors.

    Returns:
      The stored name by the name in the table. A tied model may store its embedding as the head, alone or too.

    Raises:
      CheckpointError: tensors are missing, unexpected, misshaped or not of floating point; all of them in one line.
    """
    layers = max(config.text.num_hidden_layers, config.vision.depth)
    if layers > len(headers):  # said before the names of that many layers are spelled out
        raise CheckpointError(
            f"{folder}: config.json asks for {layers} layers, but the files hold only {len(headers)} tensors; use the "
            "config.json that belongs to the weights."
        )
    wanted = {name: entry for entry in hf.tensor_table(config) for name in entry.names()}
    stored: dict[str, str] = {}
    unexpected, faulty = [], []
    for name, (_, dtype, shape) in sorted(headers.items()):
        current = hf.current_name(name, config.model_type)
        if current is None:
            continue
        if current == hf.HEAD and config.text.tie_word_embeddings:
            current = hf.PREFIXES[config.model_type].embedding
            if any(hf.current_name(other, config.model_type) == current for other in headers):
                continue
        if current not in wanted or current in stored:
            unexpected.append(name)
            continue
        stored[current] = name
        if dtype not in DTYPES:
            faulty.append(f"{name} is {dtype}, not one of {'/'.join(DTYPES)}")
        elif shape != wanted[current].shape and not wanted[current].is_swapped(shape):
            faulty.append(f"{name} is {list(shape)}, config.json asks for {list(wanted[current].shape)}")
    missing = [name for name in wanted if name not in stored]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshaped", faulty))
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]
    if found:
        raise CheckpointError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(found)}; fetch the folder again, or use the "
            "config.json that belongs to the weights."
        )
    return stored


def write(
    out_dir: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    files: Mapping[str, Mapping],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors and JSON files into a folder, all or nothing.

    Everything is written beside its place first and renamed when complete. Files of other names in an existing folder
    stay, except weights that the new ones replace.

    Args:
      out_dir: made if missing.
      sizes: bytes of each tensor by its public name, in the order to store them.
      read: gives the tensor of a name; called once for each, in order.
      files: contents of JSON files by name, such as {"config.json": {...}}.
      max_shard_bytes: above this, tensors go to several files with an index.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    shards = _plan(sizes, max_shard_bytes)
    names = (
        [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _from_one(shards)]
    )
    files = dict(files)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        files[INDEX] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    made = not out_dir.exists()
    temporary = None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=out_dir))
        for file, shard in zip(names, shards, strict=True):
            tensors = {name: np.ascontiguousarray(read(name)) for name in shard}
            safetensors_numpy.save_file(tensors, temporary / file, metadata={"format": "pt"})
        for file, values in files.items():
            (temporary / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _move_in(temporary, out_dir, [*names, *files])
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{out_dir} cannot be written ({error}); nothing was saved, choose another place."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if made and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()


def _plan(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Divides tensors, in order, among shards of at most `max_shard_bytes`; a larger tensor has one to itself."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _from_one(items: Sequence) -> range:
    return range(1, len(items) + 1)


def _move_in(temporary: Path, out_dir: Path, names: Sequence[str]) -> None:
    """Renames complete files into place and then removes the weights of an earlier save that they replace."""
    for name in names:
        os.chmod(temporary / name, 0o644)
        os.replace(temporary / name, out_dir / name)
    for path in [*out_dir.glob("*.safetensors"), out_dir / INDEX]:
        if path.name not in names:
            path.unlink(missing_ok=True)
