"""Where conversations come from: random access by number, whatever holds them.

A record is a conversation of the public form with a name: `{"id": "clip-7", "messages": [{"role": ...}, ...]}`. It
comes from a JSONL file, one record a line, media paths relative to the file; or from any object with `__len__` and
`__getitem__` that yields such mappings (or the JSON text of one), a tfds or ArrayRecord data source for instance.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwenvl_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation of a data set.

    Attributes:
      id: its name; the number of the record where it has none of its own.
      messages: the conversation, media paths made absolute or relative to the working directory.
      where: file and line, or source and number, for errors.
      content: sha256 of the record as it is written, in hex; empty for records that are not text.
    """

    id: str
    messages: list[dict[str, Any]]
    where: str
    content: str = ""


class Source(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class JsonlSource:
    """The records of a JSONL file; blank lines are passed over. Only the places of the lines are kept in memory.

    Raises:
      DataError: the file is missing, cannot be read or has no records; a line is not a record (raised on access,
        naming file and line).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        offsets, numbers, offset = [], [], 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        offsets.append(offset)
                        numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise DataError(
                f"data file {self.path} cannot be read ({error.strerror}); give a JSONL file of records "
                '{"id": ..., "messages": [...]}, one a line.'
            ) from error
        if not offsets:
            raise DataError(
                f'data file {self.path} holds no records; write one {{"id": ..., "messages": [...]}} a line.'
            )
        self._offsets, self._numbers = np.asarray(offsets, np.int64), np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            line = file.readline().strip()
        return read_record(line, f"{self.path}:{self._numbers[index]}", index, folder=self.path.parent)


class ObjectSource:
    """Records of any object with `__len__` and `__getitem__`; media paths are used as they are."""

    def __init__(self, items):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(
                f"a data source must have __len__ and __getitem__, or be the path of a JSONL file; "
                f"got {type(items).__name__}."
            )
        if not len(items):
            raise DataError(f"the data source {type(items).__name__} is empty; give at least one record.")
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        return read_record(self._items[index], f"{type(self._items).__name__}[{index}]", index, folder=None)


class JoinedSources:
    """Several sources one after another."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[number - 1]) if number else 0
        return self._sources[number][index - begin]


class Subset:
    """Some records of a source.

    Args:
      indices: which, in order.
    """

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]


def open_source(source) -> Source:
    """Opens a JSONL file by its path, several files by a tuple or list of paths, or wraps an object.

    Raises:
      DataError: see `JsonlSource` and `ObjectSource`.
    """
    if isinstance(source, str | os.PathLike):
        return JsonlSource(source)
    if isinstance(source, tuple | list) and source and all(isinstance(path, str | os.PathLike) for path in source):
        return JoinedSources([JsonlSource(path) for path in source])
    return ObjectSource(source)


def read_record(value, where: str, index: int, folder: Path | None) -> Record:
    """Checks a record, given as a mapping or as JSON text, and resolves its media paths against `folder`.

    Raises:
      DataError: naming `where`, and what is wrong.
    """
    content = ""
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        content = hashlib.sha256(text).hexdigest()
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); write one record a line.") from error
    if not isinstance(value, Mapping) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise DataError(
            f'{where}: expected {{"id": ..., "messages": [...]}} with at least one message; got {_short(value)}.'
        )
    messages = [_with_paths(message, folder) for message in value["messages"]]
    return Record(str(value.get("id", index)), messages, where, content)


def media_paths(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths of a conversation's images and videos, in reading order; media in memory have none."""
    return [
        os.fspath(part[part["type"]])
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
        if _is_file(part)
    ]


def _is_file(part) -> bool:
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "video"):
        return False
    return isinstance(part.get(part["type"]), str | os.PathLike)


def _with_paths(message, folder: Path | None):
    if folder is None or not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**part, part["type"]: str(folder / part[part["type"]])} if _is_file(part) else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
