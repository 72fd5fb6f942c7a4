"""One safetensors file: its header read with suspicion, its tensors read and written in slices.

Reading goes through `pread` into buffers of the caller's size, never through a mapping of the file, so that the memory
of a process that streams a large file is that of its buffers.

The format (https://github.com/huggingface/safetensors): eight bytes, the header's length, little endian; the header,
a JSON object of tensors by name with `dtype`, `shape` and `data_offsets`, and `__metadata__` of text by name; then the
tensors, one after another without holes.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwenvl_jax.errors import CheckpointError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # as the format's own library allows
_ONE_CALL = 1 << 30  # Linux reads and writes at most 2 GiB a call


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, and slices of it.

    Attributes:
      path: the file.
      name: in the file.
      dtype: the format's name of the type, such as "BF16".
      shape: of the tensor.
      offset: of its first byte in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """The tensor from index `start` to `stop` along one axis, as an array of its own.

        Raises:
          CheckpointError: the file is gone, unreadable or has become shorter.
        """
        dtype = DTYPES[self.dtype]
        shape = self.shape or (1,)
        if not self.shape:
            start, stop, axis = 0, 1, 0
        elif stop is None:
            stop = shape[axis]
        out = np.empty((*shape[:axis], stop - start, *shape[axis + 1 :]), dtype)
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                for at, part in _runs(self.offset, out, shape, axis, start):
                    read_at(fd, part, at)
            finally:
                os.close(fd)
        except (OSError, EOFError) as error:
            raise damaged(self.path, error) from error
        return out.reshape(self.shape) if not self.shape else out

    def mapped(self) -> np.ndarray:
        """The tensor as a read-only view of the file; a slice of it reads that part of the file only."""
        try:
            flat = (
                np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,)) if self.nbytes else np.empty(0, "u1")
            )
        except (OSError, ValueError) as error:
            raise damaged(self.path, error) from error
        return np.asarray(flat).view(DTYPES[self.dtype]).reshape(self.shape)


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error of a file that cannot be used as it is."""
    return CheckpointError(f"{path} is truncated or damaged ({reason}); fetch it again.")


def read_at(fd: int, out: np.ndarray, offset: int) -> None:
    """Fills a C-contiguous array with the bytes of a file from `offset` on; EOFError where the file ends before."""
    view = out.reshape(-1).view(np.uint8).data
    while view:
        count = os.preadv(fd, [view[:_ONE_CALL]], offset)
        if not count:
            raise EOFError(f"it ends {len(view)} bytes too soon")
        view, offset = view[count:], offset + count


def write_at(fd: int, data: np.ndarray | bytes, offset: int) -> None:
    """Writes the bytes of a C-contiguous array into a file at `offset`."""
    view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
    while view:
        count = os.pwrite(fd, view[:_ONE_CALL], offset)
        view, offset = view[count:], offset + count


def _runs(offset: int, block: np.ndarray, shape: Sequence[int], axis: int, start: int):
    """Where in the file the runs of a block lie that covers `shape` from `start` on along `axis`: (offset, the run)."""
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :]) * block.dtype.itemsize
    if block.shape[axis] == shape[axis]:
        yield offset, block
        return
    rows = block.reshape(outer, -1)
    for i in range(outer):
        yield offset + (i * shape[axis] + start) * inner, rows[i]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata. Nothing but the header is read.

    Raises:
      CheckpointError: the file cannot be read, or its header is cut, is no JSON, names a tensor twice, has offsets that
        overlap, leave holes, lead outside, or contradict type and shape.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise damaged(path, f"{size} bytes are no safetensors file")
            length = struct.unpack("<Q", start)[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise damaged(path, f"its header of {length} bytes is longer than the file or than any header")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, f"its {METADATA} is no object of texts")
    spans = []
    tensors = {}
    for name, entry in header.items():
        begin, end, tensor = _tensor(path, name, entry, 8 + length)
        tensors[name] = tensor
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise damaged(path, f"{name} begins at {begin}, the tensor before it ends at {at}")
        at = end
    if at != size - 8 - length:
        raise damaged(path, f"its header tells of {at} bytes of tensors, the file holds {size - 8 - length}")
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _tensor(path: Path, name: str, entry: Any, data: int) -> tuple[int, int, StoredTensor]:
    """Begin, end (both from `data` on) and place of one tensor, from its line of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{name} lacks one of dtype, shape and data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(path, f"{name} has the unknown type {str(dtype)[:40]!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise damaged(path, f"the shape or data_offsets of {name} are no counts")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise damaged(path, f"{name}, {dtype}{shape}, cannot take {end - begin} bytes")
    return begin, end, StoredTensor(path, name, dtype, tuple(shape), data + begin)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in values
    )


class Writer:
    """Writes the tensors of one file, in any order and in slices.

    A file that is there already, left by a process that was killed, is written over in place: a slice whose bytes are
    there is read and not written again.

    Args:
      path: the file to write, made if missing. Give one that no reader looks for, and rename it when `finish` has
        returned.
      tensors: (name, type, shape) of each. Larger types are stored first, so that every tensor is aligned.
      metadata: text by name; `finish` may change values, but not their lengths.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ):
        self._tensors = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
        header = self._header(metadata)
        self._length, offset, self._places = len(header), len(header), {}
        for name, dtype, shape in self._tensors:
            self._places[name] = StoredTensor(path, name, NAMES[dtype], shape, offset)
            offset += self._places[name].nbytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._open = True
        try:
            self._found = os.fstat(self._fd).st_size > 0
            os.ftruncate(self._fd, offset)
            write_at(self._fd, header, 0)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, name: str, block: np.ndarray, start: int = 0, axis: int = 0) -> None:
        """Writes a C-contiguous block: the tensor from `start` on along `axis`, whole along the others."""
        place = self._places[name]
        for at, run in _runs(place.offset, block, place.shape or (1,), axis, start):
            if not (self._found and self._holds(run, at)):
                write_at(self._fd, run, at)

    def _holds(self, run: np.ndarray, offset: int) -> bool:
        """Whether the file has these bytes there."""
        there = np.empty_like(run)
        read_at(self._fd, there, offset)
        return bool(np.array_equal(there.reshape(-1).view(np.uint8), run.reshape(-1).view(np.uint8)))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the final metadata and returns when everything is on disk."""
        header = self._header(metadata)
        assert len(header) == self._length, "the metadata changed its length"
        write_at(self._fd, header, 0)
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        """Lets go of the file, finished or not."""
        if self._open:
            self._open = False
            os.close(self._fd)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
        at = 0
        for name, dtype, shape in self._tensors:
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text
