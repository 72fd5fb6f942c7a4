"""The tensors of a model, whatever the form of its folder, as the table of `qwenvl_jax.checkpoint.hf` names them.

A folder in the public layout may store a tensor as the table says, or in one of these ways, made the same here:

* under a name of an earlier release;
* in eight-bit floating point with its scales beside it;
* experts with their last two axes exchanged, where the table's entry allows it (`swapped`);
* each expert for itself: `experts.{e}.gate_proj.weight` (F, H), `up_proj` (F, H) and `down_proj` (H, F) in place of
  `experts.gate_up_proj` (E, H, 2F) and `experts.down_proj` (E, F, H).

Everything is read in slices along the public tensor's leading axis, so that a buffer bounds the memory that it takes.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from qwenvl_jax.checkpoint import fp8, hf, hf_config, reorder, tensors
from qwenvl_jax.checkpoint.safetensors_file import DTYPES, StoredTensor
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError

BLOCK_BYTES = 128 << 20
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(Protocol):
    """A tensor of the table in its public form; `dtype` is that of the numbers it gives."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, *shape[1:]], in C order."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """A tensor as it is stored."""

    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.stored.dtype]

    def rows(self, start, stop):
        return self.stored.read(start, stop)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tensor stored in eight-bit floating point, and its scales."""

    weight: StoredTensor
    scale: StoredTensor
    kind: fp8.Fp8
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self):
        return self.weight.shape

    def rows(self, start, stop):
        rows, scale = self.weight.read(start, stop), self.scale
        if rows.ndim > 2:
            return fp8.dequantize(rows, scale.read(start, stop), self.kind.block)
        height = self.kind.block[0]
        scales = scale.read(start // height, -(-stop // height))
        return fp8.dequantize(rows, scales, self.kind.block, first_row=start)


@dataclasses.dataclass(frozen=True)
class Swapped:
    """A tensor stored with its last two axes exchanged; the first, of experts, is where slices are cut."""

    inner: Plain | Quantized

    @property
    def shape(self):
        *lead, last, first = self.inner.shape
        return (*lead, first, last)

    @property
    def dtype(self):
        return self.inner.dtype

    def rows(self, start, stop):
        return reorder.contiguous(self.inner.rows(start, stop).swapaxes(-1, -2))


@dataclasses.dataclass(frozen=True)
class PerExpert:
    """Experts stored each for itself: of each the matrices (out, in) whose transposes stand side by side."""

    experts: tuple[tuple[Plain | Quantized, ...], ...]

    @property
    def shape(self):
        first = self.experts[0]
        return (len(self.experts), first[0].shape[1], sum(part.shape[0] for part in first))

    @property
    def dtype(self):
        return self.experts[0][0].dtype

    def rows(self, start, stop):
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for to, parts in zip(out, self.experts[start:stop], strict=True):
            column = 0
            for part in parts:
                width = part.shape[0]
                reorder.copy(to[:, column : column + width], part.rows(0, width).T)
                column += width
        return out


def unit(entry: hf.Entry) -> int:
    """Rows of the public tensor that stay together when it is cut: one step of its first split axis."""
    return entry.shape[0] // entry.split[0]


def native_axis(entry: hf.Entry) -> int:
    """The axis of one layer of the parameter along which slices of the public tensor's rows lie."""
    return entry.order.index(0)


def to_native(entry: hf.Entry, rows: np.ndarray) -> np.ndarray:
    """Rows of the public tensor, a multiple of `unit`, as the slice of the parameter that they are; a view."""
    return rows.reshape(len(rows) // unit(entry), *entry.split[1:]).transpose(entry.order)


def to_rows(entry: hf.Entry, block: np.ndarray) -> np.ndarray:
    """The inverse of `to_native`, in C order."""
    rows = reorder.contiguous(block.transpose(np.argsort(entry.order)))
    return rows.reshape(rows.shape[0] * unit(entry), *entry.shape[1:])


def spans(entry: hf.Entry, itemsize: int, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Cuts a public tensor into slices (start, stop) of at most `max_bytes`, if single steps are not larger."""
    step = unit(entry)
    row = int(np.prod(entry.shape[1:], dtype=np.int64)) * itemsize
    step *= max(1, max_bytes // max(1, row * step))
    for start in range(0, entry.shape[0], step):
        yield start, min(start + step, entry.shape[0])


def read_config(folder: Path) -> tuple[QwenVLConfig, fp8.Fp8 | None]:
    """The shape of the model in a folder, and how its weights are quantized.

    Raises:
      CheckpointError: as `hf_config.read_config`, or a quantization that is not read.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = fp8.read_quantization(values, str(path))
    if kind is None:
        return hf_config.read_config(folder), None
    config = hf_config.config_from_json(fp8.without_quantization(values), str(path))
    if (folder / "generation_config.json").is_file():
        ends = read_json(folder / "generation_config.json").get("eos_token_id") or []
        config = dataclasses.replace(config, eos_token_ids=tuple(ends if isinstance(ends, list) else [ends]))
    return config, kind


class PublicSource:
    """A folder in the public layout whose every tensor is there, of its shape, and no other.

    Attributes:
      folder: where it is.
      config: of the model.
      table: `hf.tensor_table` of it.
      quantization: how it is stored, or None.
      exchanged: the entries, by their public names, that stand as [experts, out, in], the order of transformers 5, and
        not as released.
    """

    def __init__(self, folder: Path):
        """Reads config.json and the headers.

        Raises:
          CheckpointError: what is missing, unexpected, misshaped, damaged or not supported, all at once where the files
            can be read at all.
        """
        self.folder = folder
        self.config, self.quantization = read_config(folder)
        self.table = hf.tensor_table(self.config)
        self.files = tensors.TensorFiles(folder)
        fp8.refuse_other_kinds(self.files.headers, folder)
        self._tensors = _Match(self.files.headers, self.config, self.table, folder, self.quantization).tensors
        self.exchanged = frozenset(
            entry.public
            for entry in self.table
            if entry.swapped and any(isinstance(self._tensors[name], Swapped) for name in entry.names())
        )
        self._check_tied()

    def tensor(self, entry: hf.Entry, layer: int | None) -> Tensor:
        """The tensor of an entry; `layer` is None where the entry has none."""
        return self._tensors[entry.public if layer is None else entry.public.format(layer)]

    def _current(self, stored: str) -> str | None:
        return hf.current_name(stored, self.config.model_type)

    def _check_tied(self) -> None:
        """Refuses a tied model that brings an output projection of its own."""
        name = hf.PREFIXES[self.config.model_type].embedding
        head = next((t for key, t in self.files.headers.items() if self._current(key) == hf.HEAD), None)
        entry = next((entry for entry in self.table if entry.public == name), None)
        if not self.config.text.tie_word_embeddings or head is None or entry is None:
            return
        embedding, own = self._tensors[name], Plain(head)
        same = own.shape == embedding.shape and own.dtype == embedding.dtype
        for start, stop in spans(entry, embedding.dtype.itemsize) if same else ():
            same = same and np.array_equal(own.rows(start, stop), embedding.rows(start, stop))
        if not same:
            raise CheckpointError(
                f"{self.folder}: config.json says tie_word_embeddings, but {hf.HEAD} differs from {name}; "
                "set tie_word_embeddings to false, or remove the head."
            )


class _Match:
    """Finds every tensor of the table among the stored ones.

    Raises:
      CheckpointError: tensors are missing, unexpected, misshaped or not of floating point; all of them in one line.
    """

    def __init__(
        self,
        headers: Mapping[str, StoredTensor],
        config: QwenVLConfig,
        table: Sequence[hf.Entry],
        folder: Path,
        quantization: fp8.Fp8 | None,
    ):
        layers = max(entry.layers or 1 for entry in table)
        if layers > len(headers):  # said before the names of that many layers are spelled out
            raise CheckpointError(
                f"{folder}: config.json asks for {layers} layers, but the files hold only {len(headers)} tensors; use "
                "the config.json that belongs to the weights."
            )
        self._quantization = quantization
        self._found: dict[str, StoredTensor] = {}
        self._missing: list[str] = []
        self._faulty: list[str] = []
        unexpected = self._by_current_name(headers, config)
        names = [(name, entry) for entry in table for name in entry.names()]
        resolved = {name: self._resolve(name, entry) for name, entry in names}
        self.tensors = {
            name: tensor for name, tensor in resolved.items() if tensor is not None
        }  # all, or an error below
        unexpected += [stored.name for stored in self._found.values()]
        known = [name for name, _ in names]
        hinted = [_hinted(name, known, config.model_type) for name in sorted(unexpected)[: tensors.LISTED]]
        hinted += sorted(unexpected)[tensors.LISTED :]
        kinds = (("missing", self._missing), ("unexpected", hinted), ("misshaped", self._faulty))
        faults = [f"{len(names)} {kind} ({tensors.some(names)})" for kind, names in kinds if names]
        if faults:
            raise CheckpointError(
                f"{folder}: the tensors do not fit config.json: {'; '.join(faults)}; fetch the folder again, or use "
                "the config.json that belongs to the weights."
            )

    def _by_current_name(self, headers, config) -> list[str]:
        """Files the stored tensors under today's names; returns those that come second under one."""
        second = []
        embedding = hf.PREFIXES[config.model_type].embedding
        for name, stored in sorted(headers.items()):
            current = hf.current_name(name, config.model_type)
            if current == hf.HEAD and config.text.tie_word_embeddings:
                # A tied model may store its embedding as the head, alone or too.
                alone = all(hf.current_name(other, config.model_type) != embedding for other in headers)
                current = embedding if alone else None
            if current is None:
                continue
            if current in self._found:
                second.append(name)
            else:
                self._found[current] = stored
        return second

    def _resolve(self, name: str, entry: hf.Entry) -> Tensor | None:
        """The tensor of a name of the table; what is used is taken out of those found."""
        if name in self._found:
            return self._whole(name, entry)
        stem, _, last = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
        if parts is None or not stem.endswith(".experts") or f"{stem}.0.{parts[0]}.weight" not in self._found:
            self._missing.append(name)
            return None
        experts, inputs, outputs = entry.shape
        shape = (outputs // len(parts), inputs)
        found = [[self._one(f"{stem}.{e}.{part}.weight", (shape,)) for part in parts] for e in range(experts)]
        # One that is missing or faulty is an error in the end.
        return PerExpert(tuple(tuple(part for part in expert if part is not None) for expert in found))

    def _whole(self, name: str, entry: hf.Entry) -> Tensor | None:
        exchanged = entry.is_swapped(self._found[name].shape)
        tensor = self._one(name, (entry.shape, entry.swapped_shape) if entry.swapped else (entry.shape,))
        return Swapped(tensor) if exchanged and tensor is not None else tensor

    def _one(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> Plain | Quantized | None:
        """A stored tensor that must have one of these shapes, with its scales where it is quantized."""
        stored = self._found.pop(name, None)
        scale = self._found.pop(name + fp8.SCALE, None)
        if stored is None:
            self._missing.append(name)
            return None
        kind = self._quantization
        if stored.shape not in shapes:
            asked = " or ".join(str(list(shape)) for shape in shapes)
            return self._fault(f"{stored.name} is {list(stored.shape)}, config.json asks for {asked}")
        if stored.dtype in FLOATS and scale is None:
            return Plain(stored)
        if kind is None or stored.dtype != fp8.STORED:
            if scale is not None:
                self._found[name + fp8.SCALE] = scale
            return self._fault(f"{stored.name} is {stored.dtype}, not one of {'/'.join(FLOATS)}")
        if scale is None:
            return self._fault(f"{stored.name} is {stored.dtype} without {fp8.SCALE.lstrip('_')}")
        shape = kind.scale_shape(stored.shape)
        if scale.shape != shape or scale.dtype not in fp8.SCALES:
            return self._fault(
                f"{scale.name} is {scale.dtype} {list(scale.shape)}, not {'/'.join(fp8.SCALES)} {list(shape)}"
            )
        return Quantized(stored, scale, kind)

    def _fault(self, text: str) -> Plain | Quantized | None:
        """Notes what is wrong with a tensor, which is then not there."""
        self._faulty.append(text)
        return None


def _hinted(name: str, known: Sequence[str], model_type: str) -> str:
    near = difflib.get_close_matches(hf.current_name(name, model_type) or name, known, n=1, cutoff=0.8)
    return f"{name}, did you mean {near[0]}?" if near and near[0] != name else name
