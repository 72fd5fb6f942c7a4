"""Models to and from folders in the public layout.

Loading never holds a second copy of the model: the shape comes first, abstractly, then where each weight is to lie, and
then one weight after another goes from the file to its devices.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint import hf, hf_config, tensors
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.parallel.rules import param_shardings

DTYPES = ("bfloat16", "float16", "float32")


def load(path: str | Path, *, dtype: str = "bfloat16", mesh: Mesh | None = None) -> QwenVL:
    """Loads a model from a folder in the public layout, or a hub id.

    Args:
      path: see `qwenvl_jax.checkpoint.folder.resolve`.
      dtype: of parameters and activations: "bfloat16", "float16" or "float32".
      mesh: the devices to spread the weights over, as `qwenvl_jax.parallel.rules` says; the first device by default.

    Raises:
      CheckpointError: the folder is incomplete, damaged, or of a kind that is not supported.
      ConfigError: an unknown dtype, or a mesh that does not divide the weights.
    """
    dtype = _dtype(dtype)
    folder = folders.resolve(path)
    config = hf_config.read_config(folder)
    files = tensors.TensorFiles(folder)
    stored = tensors.match(files.headers, config, folder)
    _check_tied(files, stored, config)
    graph, state = abstract(config, dtype)
    table = {entry.path: entry for entry in hf.tensor_table(config)}
    shardings = dict(nnx.to_flat_state(param_shardings(state, mesh or single_device_mesh())))
    weights = []
    for key, variable in nnx.to_flat_state(state):
        entry = table[_dotted(key)]
        read = [lambda name=name: files.read(stored[name]) for name in entry.names()]
        weights.append((key, variable.replace(_place(entry, read, dtype, shardings[key].get_value()))))
    return nnx.merge(graph, nnx.from_flat_state(weights))


def _check_tied(files: tensors.TensorFiles, stored: dict[str, str], config: QwenVLConfig) -> None:
    """Refuses a tied model that brings an output projection of its own."""
    if not config.text.tie_word_embeddings or hf.HEAD not in files.headers:
        return
    embedding = stored[hf.PREFIXES[config.model_type].embedding]
    if not np.array_equal(files.read(hf.HEAD), files.read(embedding)):
        raise CheckpointError(
            f"{files.folder}: config.json says tie_word_embeddings, but {hf.HEAD} differs from {embedding}; "
            "set tie_word_embeddings to false, or remove the head."
        )


def abstract(config: QwenVLConfig, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """The model split into its structure and the shapes of its weights; nothing is computed or allocated."""
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    return nnx.split(model)


def _dtype(dtype) -> np.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def _dotted(key: tuple) -> str:
    return ".".join(str(part) for part in key)


def _place(entry: hf.Entry, read: list[Callable[[], np.ndarray]], dtype, sharding: NamedSharding) -> jax.Array:
    """Reads the tensors of one parameter, once each, into a buffer for every part that a device of this host holds."""
    shape = entry.native_shape
    devices = sharding.addressable_devices_indices_map(shape)
    starts = {
        device: tuple(s.indices(n) for s, n in zip(index, shape, strict=True)) for device, index in devices.items()
    }
    parts = {bounds: np.empty([stop - start for start, stop, _ in bounds], dtype) for bounds in starts.values()}
    for layer, one in enumerate(read):
        native = entry.to_native(one())
        native = native if entry.layers is None else native[None]
        for bounds, part in parts.items():
            first, *rest = bounds
            if entry.layers is None:
                part[...] = native[tuple(slice(*b) for b in bounds)]
            elif first[0] <= layer < first[1]:
                part[layer - first[0]] = native[(0, *(slice(*b) for b in rest))]
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in starts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def save(model: QwenVL, out_dir: str | Path, *, max_shard_bytes: int = tensors.MAX_SHARD_BYTES) -> None:
    """Writes config.json, *.safetensors and, where end ids are known, generation_config.json.

    Names and shapes are those of transformers 5, which loads the folder as it is. Other files in `out_dir`, such as a
    tokenizer, stay. Weights keep the dtype that they have.

    Args:
      model: what to write.
      out_dir: made if missing.
      max_shard_bytes: above this the weights go to several files with an index.

    Raises:
      CheckpointError: the folder cannot be written, or the shape cannot be said in the public layout.
    """
    values = {_dotted(key): variable.get_value() for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    table = hf.tensor_table(model.config)
    if set(values) != {entry.path for entry in table}:
        odd = sorted(set(values) ^ {entry.path for entry in table})
        raise CheckpointError(f"{out_dir}: {odd[0]} has no place in the public layout; save a model without it.")
    entries = {name: (entry, layer) for entry in table for layer, name in enumerate(entry.names())}
    host: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        entry, layer = entries[name]
        if entry.path not in host:
            host.clear()  # the order is that of the table, so a parameter is fetched once and one is held at a time
            host[entry.path] = np.asarray(values[entry.path])
        whole = host[entry.path]
        return entry.to_public(whole if entry.layers is None else whole[layer])

    sizes = {n: int(np.prod(entry.shape)) * values[entry.path].dtype.itemsize for n, (entry, _) in entries.items()}
    dtypes = sorted({value.dtype.name for value in values.values()})
    files = {"config.json": hf_config.config_to_json(model.config, dtypes[0])}
    if model.config.eos_token_ids:
        files["generation_config.json"] = {"eos_token_id": list(model.config.eos_token_ids)}
    tensors.write(Path(out_dir), sizes, read, files, max_shard_bytes)
