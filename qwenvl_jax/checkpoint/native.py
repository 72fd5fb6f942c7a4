"""The native layout: parameters in their own axis order, one file a layer, an index written when all of it is there.

    config.json, generation_config.json, tokenizer and processor files, qwenvl_jax.json
    native/text.layers.00012.safetensors    one layer: text.layers.12.attn.q.kernel, ...
    native/text.embed.safetensors           a large parameter that is no layer's
    native/rest.safetensors                 the others
    native/index.json                       written last: the conversion, and of every tensor its file and digest

A tensor's digest is the SHA-256 of its public form, the bytes that a safetensors file in the public layout holds, so
that it can be compared with any other form of the model. A file carries the digests of its tensors and the fingerprint
of the conversion that wrote it, and gets its name when it is complete: what is there under its name is whole.

A folder without the index is a half conversion. Running the same conversion again completes it.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.checkpoint import hf, hf_config, source
from qwenvl_jax.checkpoint.safetensors_file import DTYPES, NAMES, StoredTensor, read_header
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError

FOLDER = "native"
INDEX = "index.json"
PLAN = "plan.json"
FORMAT = "qwenvl_jax native 1"
PENDING = "0" * 64  # stands for a digest that is not known yet
_APART = 1 << 25  # values; a parameter of more that is no layer's has a file of its own


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a native file.

    Attributes:
      name: in the file, such as "text.layers.12.attn.q.kernel".
      entry: its line of the table.
      layer: which of the entry's, or None.
    """

    name: str
    entry: hf.Entry
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, without a layer axis."""
        return layer_shape(self.entry)


@dataclasses.dataclass(frozen=True)
class NativeFile:
    """One file and what belongs in it."""

    name: str
    parts: tuple[Part, ...]

    def specs(self, dtypes: Mapping[str, np.dtype]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
        """(name, type, shape) of its tensors; `dtypes` by their names."""
        return [(part.name, dtypes[part.name], part.shape) for part in self.parts]


def layer_shape(entry: hf.Entry) -> tuple[int, ...]:
    """Shape of the parameter of one layer."""
    return tuple(entry.split[i] for i in entry.order)


def layout(table: tuple[hf.Entry, ...]) -> tuple[NativeFile, ...]:
    """The files of a model, in the order of the computation."""
    files: dict[str, list[Part]] = {}
    stacks: dict[str, list[hf.Entry]] = {}
    for stem, entries in itertools.groupby((e for e in table if e.layers is not None), key=_stem):
        stacks.setdefault(stem, []).extend(entries)
    prefixes = {stem: _common_prefix([entry.path for entry in entries]) for stem, entries in stacks.items()}
    rest: list[Part] = []
    for entry in table:
        if entry.layers is not None:
            prefix = prefixes[_stem(entry)]
            for layer in range(entry.layers):
                name = f"{prefix}.{layer}{entry.path[len(prefix) :]}"
                files.setdefault(f"{prefix}.{layer:05}", []).append(Part(name, entry, layer))
        elif math.prod(entry.shape) > _APART:
            files[entry.path.rpartition(".")[0]] = [Part(entry.path, entry, None)]
        else:
            rest.append(Part(entry.path, entry, None))
    files["rest"] = rest
    return tuple(NativeFile(f"{name}.safetensors", tuple(parts)) for name, parts in files.items())


def _stem(entry: hf.Entry) -> str:
    return entry.public.partition("{}")[0]


def _common_prefix(paths: list[str]) -> str:
    """The leading components that dotted paths share, less the last of any."""
    split = [path.split(".")[:-1] for path in paths]
    return ".".join(
        one[0] for one in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*split, strict=False))
    )


def fingerprint(*values: Any) -> str:
    """SHA-256, in hex, of values that JSON can say."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def table_fingerprint(table: tuple[hf.Entry, ...]) -> str:
    """Of where every tensor goes; another one means that files written with it are not to be read with this table."""
    return fingerprint([[e.public, e.path, e.shape, e.split, e.order, e.layers] for e in table])


def file_digest(digests: Mapping[str, str]) -> str:
    """The digest of a file's content: of the names and digests of its tensors."""
    return fingerprint(sorted(digests.items()))


def is_native(folder: Path) -> bool:
    """Whether a folder holds the native layout, whole or not."""
    return (folder / FOLDER).is_dir()


class NativeSource:
    """A complete folder in the native layout.

    Attributes:
      folder: where it is.
      config: of the model.
      table: `hf.tensor_table` of it.
      index: what `native/index.json` holds.
      exchanged: the entries that the source had in the order of transformers 5; see `source.PublicSource`.
    """

    def __init__(self, folder: Path):
        """Reads the index and every header.

        Raises:
          CheckpointError: a half conversion, files that are missing, damaged or not those of the index, or a layout of
            another version of this package.
        """
        self.folder, self._root = folder, folder / FOLDER
        if not (self._root / INDEX).is_file():
            raise CheckpointError(
                f"{folder} is a half conversion ({FOLDER}/{INDEX} is missing); run `qwenvl-jax convert` again to "
                "complete it."
            )
        self.config: QwenVLConfig = hf_config.read_config(folder)
        self.table = hf.tensor_table(self.config)
        self.index = read_json(self._root / INDEX)
        again = "convert the model again, into a new folder"
        if self.index.get("format") != FORMAT or self.index.get("table") != table_fingerprint(self.table):
            raise CheckpointError(
                f"{self._root / INDEX} tells of another layout than this version reads for config.json; {again}."
            )
        self.exchanged = frozenset(self.index.get("exchanged", ()))
        self.files = layout(self.table)
        self._names = {(part.entry.path, part.layer): part.name for part in self.parts()}
        self._stored: dict[str, StoredTensor] = {}
        for file in self.files:
            self._read(file, again)

    def _read(self, file: NativeFile, again: str) -> None:
        path = self._root / file.name
        if not path.is_file():
            raise CheckpointError(f"{path}, named in {INDEX}, is missing; copy it again, or {again}.")
        stored, metadata = read_header(path)
        names = {part.name: part.shape for part in file.parts}
        listed = self.index.get("files", {}).get(file.name, {})
        if (
            {name: tensor.shape for name, tensor in stored.items()} != names
            or metadata.get("plan") != self.index.get("plan")
            or file_digest(digests(metadata)) != listed.get("sha256")
        ):
            raise CheckpointError(f"{path} is not the file that {INDEX} tells of; copy it again, or {again}.")
        self._stored |= stored

    def stored(self, part: Part) -> StoredTensor:
        """Where a tensor lies."""
        return self._stored[part.name]

    def digest(self, part: Part) -> str:
        """What the index says of a tensor's content."""
        return self.index["tensors"][part.name]["sha256"]

    def parts(self) -> Iterator[Part]:
        """All tensors."""
        return (part for file in self.files for part in file.parts)

    def tensor(self, entry: hf.Entry, layer: int | None) -> "NativeTensor":
        """The tensor of an entry in its public form; `layer` is None where the entry has none."""
        return NativeTensor(entry, self._stored[self._names[entry.path, layer]])


@dataclasses.dataclass(frozen=True)
class NativeTensor:
    """A tensor of the native layout, in its public form; see `source.Tensor`."""

    entry: hf.Entry
    stored: StoredTensor

    @property
    def shape(self):
        return self.entry.shape

    @property
    def dtype(self):
        return DTYPES[self.stored.dtype]

    def rows(self, start, stop):
        step = source.unit(self.entry)
        block = self.stored.read(start // step, stop // step, source.native_axis(self.entry))
        return source.to_rows(self.entry, block)


def digests(metadata: Mapping[str, str]) -> dict[str, str]:
    """The digests of tensors by name, from a file's metadata."""
    mark = "sha256:"
    return {key.removeprefix(mark): value for key, value in metadata.items() if key.startswith(mark)}


def metadata_of(plan: str, found: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file; the inverse of `digests`."""
    return {"format": FORMAT, "plan": plan, **{f"sha256:{name}": digest for name, digest in found.items()}}


def is_complete(path: Path, file: NativeFile, dtypes: Mapping[str, np.dtype], plan: str) -> bool:
    """Whether `path` is the file that the conversion with this fingerprint writes there."""
    try:
        stored, metadata = read_header(path)
    except CheckpointError:  # missing, or damaged since
        return False
    specs = {name: (NAMES[dtype], shape) for name, dtype, shape in file.specs(dtypes)}
    found = digests(metadata)
    return (
        metadata.get("plan") == plan
        and {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == specs
        and set(found) == set(specs)
        and PENDING not in found.values()
    )


def open_source(folder: Path) -> "source.PublicSource | NativeSource":
    """The tensors of a model's folder in either layout.

    Raises:
      CheckpointError: see the two classes.
    """
    return NativeSource(folder) if is_native(folder) else source.PublicSource(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file whole or not at all. One process at a time may write a name."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
