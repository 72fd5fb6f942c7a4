"""Models to and from folders: the public layout, and the native one that `qwenvl-jax convert` writes.

Loading never holds a second copy of the model: the shape comes first, abstractly, then where each weight is to lie, and
then one weight after another goes from the file to its devices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint import hf, hf_config, native, peft, reorder, source, tensors
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.ops import low_rank
from qwenvl_jax.parallel.mesh import single_device_mesh, with_all_axes
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import DEFAULT_RULES, Rules, param_shardings

DTYPES = ("bfloat16", "float16", "float32")


def load(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    adapter: str | Path | None = None,
) -> QwenVL:
    """Loads a model from a folder in the public layout or the native one, or a hub id.

    Args:
      path: see `qwenvl_jax.checkpoint.folder.resolve`.
      dtype: of parameters and activations: "bfloat16", "float16" or "float32".
      mesh, rules: the devices to spread the weights over, and how; see `qwenvl_jax.parallel.rules`. The first device
        by default. A mesh has any of the axes of `qwenvl_jax.parallel.mesh.make_mesh`; it is used as one of them all.
      adapter: folder or hub id of a LoRA adapter in PEFT's format, which is added to the weights.

    Raises:
      CheckpointError: the folder is incomplete, damaged, or of a kind that is not supported.
      ConfigError: an unknown dtype, or a mesh with other axes, or that does not divide the weights.
    """
    mesh = single_device_mesh() if mesh is None else with_all_axes(mesh)
    reader = Reader(path, dtype=dtype, mesh=mesh, rules=rules)
    update = None if adapter is None else peft.read(adapter, reader.config)
    weights = []
    for key, variable in nnx.to_flat_state(reader.state):
        value = reader.read(_dotted(key))
        if update is not None:
            value = _adapted(value, _dotted(key), update)
        weights.append((key, variable.replace(value)))
    loaded = nnx.merge(reader.graph, nnx.from_flat_state(weights))
    loaded.execution = Execution(mesh, rules)
    return loaded


class Reader:
    """The weights of a folder, one after another, or one layer of them after another, put where they are to lie.

    Args:
      path, dtype, mesh, rules: see `load`.

    Attributes:
      config: the model's shape.
      graph, state: the model, split as by `abstract`.
      shapes: of the weights, by name ("text.layers.attn.q.kernel").

    Raises:
      CheckpointError, ConfigError: see `load`.
    """

    def __init__(self, path: str | Path, *, dtype: str, mesh: Mesh, rules: Rules = DEFAULT_RULES):
        self._dtype = _dtype(dtype)
        self._source = native.open_source(folders.resolve(path))
        self.config = self._source.config
        self.graph, self.state = abstract(self.config, self._dtype)
        self._entries = {entry.path: entry for entry in self._source.table}
        placed = nnx.to_flat_state(param_shardings(self.state, mesh, rules))
        self._shardings = {_dotted(key): variable.get_value() for key, variable in placed}
        self.shapes = {name: self._entries[name].native_shape for name in self._shardings}

    def read(self, name: str) -> jax.Array:
        """A whole weight."""
        return _place(self._source, self._entries[name], self._dtype, self._shardings[name])

    def read_layer(self, name: str, layer: int) -> jax.Array:
        """One layer of a weight whose leading axis is that of the layers; it lies as the weight does."""
        sharding = self._shardings[name]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return _place(self._source, self._entries[name], self._dtype, sharding, layer)


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


def _adapted(value: jax.Array, name: str, adapter: peft.Adapter) -> jax.Array:
    """A weight with what an adapter adds to it, where it lies."""
    if name in adapter.saved:
        return jax.device_put(adapter.saved[name].astype(value.dtype), value.sharding)
    pair = adapter.pairs.get(name.removesuffix(".kernel"))
    if pair is None:
        return value
    scale = adapter.alpha / adapter.rank
    return jax.jit(low_rank.merged, static_argnums=3, out_shardings=value.sharding, donate_argnums=0)(
        value, *pair, scale
    )


Bounds = tuple[tuple[int, int], ...]  # first and last but one of a part along each axis


def _place(model, entry: hf.Entry, dtype, sharding: NamedSharding, layer: int | None = None) -> jax.Array:
    """Reads one parameter, or one layer of it, into a buffer for every part of it that a device of this host holds.

    Of a public tensor the slices that no part here needs stay unread, of a native one everything does.
    """
    stacked = entry.layers is not None and layer is None
    shape = entry.native_shape if layer is None else entry.native_shape[1:]
    devices = sharding.addressable_devices_indices_map(shape)
    bounds = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        for device, index in devices.items()
    }
    parts = {one: np.empty([stop - start for start, stop in one], dtype) for one in set(bounds.values())}
    numbers: Iterable[Any] = range(entry.layers or 0) if stacked else [layer]
    for number in numbers:
        # One layer of each part, and where it lies in that layer.
        wanted = [
            (part[number - one[0][0]], one[1:]) if stacked else (part, one)
            for one, part in parts.items()
            if not stacked or one[0][0] <= number < one[0][1]
        ]
        for block, axis, start in _blocks(model.tensor(entry, number), entry, [one for _, one in wanted]):
            for part, one in wanted:
                _fill(part, one, block, axis, start)
    arrays = [jax.device_put(parts[one], device) for device, one in bounds.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _blocks(tensor, entry: hf.Entry, wanted: Iterable[Bounds]) -> Iterator[tuple[np.ndarray, int, int]]:
    """Blocks of one layer of a parameter: the block, the axis along which it is a part of the layer, its start."""
    axis = source.native_axis(entry)
    if isinstance(tensor, native.NativeTensor):
        yield tensor.stored.mapped(), axis, 0
        return
    step = source.unit(entry)
    for start, stop in source.spans(entry, tensor.dtype.itemsize):
        first, last = start // step, stop // step
        if any(one[axis][0] < last and first < one[axis][1] for one in wanted):
            yield source.to_native(entry, tensor.rows(start, stop)), axis, first


def _fill(part: np.ndarray, bounds: Bounds, block: np.ndarray, axis: int, start: int) -> None:
    """Copies what a block and a part have in common."""
    low, high = bounds[axis]
    first, last = max(low, start), min(high, start + block.shape[axis])
    if first >= last:
        return
    here, there = [slice(None)] * part.ndim, [slice(*one) for one in bounds]
    here[axis], there[axis] = slice(first - low, last - low), slice(first - start, last - start)
    to, of = part[tuple(here)], block[tuple(there)]
    if to.dtype == of.dtype:
        reorder.copy(to, of)
    else:
        to[...] = of


def save(model: QwenVL, out_dir: str | Path, *, max_shard_bytes: int = tensors.MAX_SHARD_BYTES) -> None:
    """Writes config.json, *.safetensors and, where end ids are known, generation_config.json.

    Names and shapes are those of transformers 5, which loads the folder as it is. Other files in `out_dir`, such as a
    tokenizer, stay. Weights keep the dtype that they have. Where they are spread over several processes, all of them
    call this, and the first one writes.

    Args:
      model: what to write.
      out_dir: made if missing.
      max_shard_bytes: above this the weights go to several files with an index.

    Raises:
      CheckpointError: the folder cannot be written, or is in the native layout, or the shape cannot be said in the
        public one.
    """
    values = {_dotted(key): variable.get_value() for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    paths = {entry.path for entry in hf.tensor_table(model.config)}
    if set(values) != paths:
        odd = sorted(set(values) ^ paths)
        raise CheckpointError(f"{out_dir}: {odd[0]} has no place in the public layout; save a model without it.")
    write(
        model.config,
        out_dir,
        {name: value.dtype for name, value in values.items()},
        lambda name, layer: values[name] if layer is None else layer_of(values[name], layer),
        spread=not all(value.is_fully_addressable for value in values.values()),
        max_shard_bytes=max_shard_bytes,
    )


def write(
    config: QwenVLConfig,
    out_dir: str | Path,
    dtypes: Mapping[str, np.dtype],
    value: Callable[[str, int | None], jax.Array],
    *,
    spread: bool,
    max_shard_bytes: int = tensors.MAX_SHARD_BYTES,
) -> None:
    """Writes a model whose weights are made when their turn comes; `save` says what is written.

    Args:
      config: the model's shape.
      out_dir, max_shard_bytes: see `save`.
      dtypes: of the weights, by name.
      value: gives a weight, or one layer of one that has layers; called once for each, in the order of the files.
      spread: whether other processes hold parts of them; then all call this, and the first one writes.

    Raises:
      CheckpointError: see `save`.
    """
    if native.is_native(Path(out_dir)):
        # What would be loaded again is that layout, with the weights that it had.
        raise CheckpointError(
            f"{out_dir} is in the native layout, into which no model is saved; save into another folder, which "
            "`qwenvl-jax convert` then makes native."
        )
    table = hf.tensor_table(config)
    entries = {name: (entry, layer) for entry in table for name, layer in _layers(entry)}

    def read(name: str) -> np.ndarray:
        entry, layer = entries[name]
        return entry.to_public(_fetched(value(entry.path, layer)))

    specs = {name: (np.dtype(dtypes[entry.path]), entry.written_shape) for name, (entry, _) in entries.items()}
    if jax.process_index() and spread:
        for name in specs:
            read(name)  # as the writer does, tensor by tensor
        return
    files = {"config.json": hf_config.config_to_json(config, sorted({dtype.name for dtype, _ in specs.values()})[0])}
    if config.eos_token_ids:
        files["generation_config.json"] = {"eos_token_id": list(config.eos_token_ids)}
    tensors.write(Path(out_dir), specs, read, files, max_shard_bytes)


def _layers(entry: hf.Entry) -> Iterator[tuple[str, int | None]]:
    """The public names of an entry and the layers that they are of."""
    return zip(entry.names(), [None] if entry.layers is None else range(entry.layers), strict=True)


def _fetched(value: jax.Array) -> np.ndarray:
    """A tensor on this host; what lies with other processes is gathered, and all of them call this."""
    if not value.is_fully_addressable and isinstance(value.sharding, NamedSharding):
        value = jax.device_put(value, NamedSharding(value.sharding.mesh, PartitionSpec()))
    return np.asarray(value)


@jax.jit
def layer_of(stack: jax.Array, index: int) -> jax.Array:
    """One layer of a stack; only that leaves the device."""
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
