"""Where conversations come from: random access by number, whatever holds them.

A record is a conversation of the public form with a name: `{"id": "clip-7", "messages": [{"role": ...}, ...]}`, or
what `qwenvl_jax.data.records` makes one of. It comes from a JSONL file, one record a line, media paths relative to the
file; or from any object with `__len__` and `__getitem__` that yields such mappings (or the JSON text of one), a tfds or
ArrayRecord data source for instance.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwenvl_jax.data.coordinates import THOUSANDTHS, Convention, Sizes
from qwenvl_jax.data.files import is_remote
from qwenvl_jax.data.records import Telling, check_format, find_format, record_options, to_conversation
from qwenvl_jax.data.times import choose_time_format
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError, SourceError

_ARRAY_HINT = "a file that is one JSON array becomes lines by: jq -c '.[]' data.json > data.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation of a data set.

    Attributes:
      id: its name; the number of the record where it has none of its own.
      messages: the conversation, media paths made absolute or relative to the working directory.
      where: file and line, or source and number, for errors.
      content: sha256, in hex, of the record as it is written and of how it was read; empty for records that are not
        text.
      options: what else the processor's `sample` and `measure` take of it, by name: `tools`, `time_format` and such.
      fetch: puts the media where `messages` says; to be called before they are opened. None if they lie there already.
      states: what changes when a medium changes, for each in reading order; None takes the size and the time of files.
      known: facts that came with the record, as `qwenvl_jax.data.facts` keeps them: the sample key that they hold for,
        and the entry.
    """

    id: str
    messages: list[dict[str, Any]]
    where: str
    content: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fetch: Callable[[], None] | None = None
    states: list | None = None
    known: tuple[str, list] | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become conversations.

    Attributes:
      format: one of `qwenvl_jax.data.records.FORMATS`, or "auto", which tells them apart by their keys.
      hms_share: from 0 to 1, how many of the records tell times as H:M:S, before frames and in answers made here; the
        others tell seconds. Which do follows from `seed` and the record's name (`qwenvl_jax.data.times`).
      seed: of the run.
      coordinates: how the model counts boxes and points.
      sizes: gives the sizes of the picture that a part shows, as `Processor.picture_sizes` does.

    Raises:
      ConfigError: a format that does not exist, or a share that is none.
    """

    format: str = "auto"
    hms_share: float = 0.0
    seed: int = 0
    coordinates: Convention = THOUSANDTHS
    sizes: Callable[[dict], Sizes] | None = None

    @classmethod
    def of(cls, processor, **options) -> "Reading":
        """How records are read for the model of a processor; `options` are the other fields."""
        return cls(coordinates=processor.generation.coordinates, sizes=processor.picture_sizes, **options)

    def __post_init__(self):
        check_format(self.format)
        if isinstance(self.hms_share, bool) or not 0 <= self.hms_share <= 1:
            raise ConfigError(f"hms_share={self.hms_share!r} must be a number from 0 to 1.")


class Source(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class JsonlSource:
    """The records of a JSONL file; blank lines are passed over. Only the places of the lines are kept in memory.

    Args:
      path: of the file.
      reading: how its records become conversations.
      places: of its lines, if they were looked up before, in this process or another.

    Raises:
      DataError: the file is missing, cannot be read or has no records; a line is not a record (raised on access,
        naming file and line).
      SourceError: the file has gone since (raised on access).
    """

    def __init__(self, path: str | os.PathLike, reading: Reading = Reading(), places: np.ndarray | None = None):
        self.path, self._reading = Path(path), reading
        self.places = _places(self.path) if places is None else places  # i64[n, 2]: offset, number of the line

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        place = functools.partial(join, self.base)
        return read_record(self.text(index), self.where(index), index, place, self._reading)

    def text(self, index: int) -> bytes:
        """A record as it is written."""
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.places[index, 0]))
                return file.readline().strip()
        except OSError as error:
            raise SourceError(
                f"data file {self.path} cannot be read any more ({error.strerror}); put it back as it was, and start "
                "the same command again."
            ) from error

    def where(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.path}:{self.places[index, 1]}"

    @property
    def base(self) -> Path:
        """What media paths in records are relative to."""
        return self.path.parent

    @property
    def state_file(self) -> Path:
        """What is written anew when the records are."""
        return self.path


def _places(path: Path) -> np.ndarray:
    """i64[n, 2]: where each line that holds something begins, in bytes, and its number, from 1."""
    places, offset = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    places.append((offset, number))
                offset += len(line)
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}); give a JSONL file of records "
            '{"id": ..., "messages": [...]}, one a line.'
        ) from error
    if not places:
        raise DataError(f'data file {path} holds no records; write one {{"id": ..., "messages": [...]}} a line.')
    return np.asarray(places, np.int64)


class ObjectSource:
    """Records of any object with `__len__` and `__getitem__`, a data source of tensorflow-datasets for instance; media
    paths are used as they are.
    """

    def __init__(self, items, reading: Reading = Reading()):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(
                f"a data source must have __len__ and __getitem__, or be the path of a JSONL file; "
                f"got {type(items).__name__}."
            )
        if not len(items):
            raise DataError(f"the data source {type(items).__name__} is empty; give at least one record.")
        self._items, self._reading = items, reading

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        where = f"{type(self._items).__name__}[{index}]"
        item = self._items[index]
        if hasattr(self._items, "dataset_info"):
            from qwenvl_jax.data.tfds_source import features_of, to_record

            item = to_record(item, features_of(self._items))
        return read_record(item, where, index, None, self._reading)


class JoinedSources:
    """Several sources one after another."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        source, number = self.locate(index)
        return source[number]

    def locate(self, index: int) -> tuple[Any, int]:
        """The source that a record comes from, and its number there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[number - 1]) if number else 0
        return self.sources[number], index - begin


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


def open_source(source, reading: Reading = Reading()) -> Source:
    """Opens a JSONL file, a built data set or one of tensorflow-datasets by its path, several by a tuple or list of
    paths, or wraps an object.

    Raises:
      DataError: see `JsonlSource`, `qwenvl_jax.data.built.BuiltSource`, `qwenvl_jax.data.tfds_source.TfdsSource` and
        `ObjectSource`.
    """
    if isinstance(source, str | os.PathLike):
        return _open_path(source, reading)
    if isinstance(source, tuple | list) and source and all(isinstance(path, str | os.PathLike) for path in source):
        return JoinedSources([_open_path(path, reading) for path in source])
    return ObjectSource(source, reading)


def _open_path(path: str | os.PathLike, reading: Reading) -> Source:
    if not os.path.isdir(path):
        return JsonlSource(path, reading)
    # Both read sources by what is above.
    from qwenvl_jax.data.built import BuiltSource, is_foreign
    from qwenvl_jax.data.tfds_source import TfdsSource

    return TfdsSource(Path(path), reading) if is_foreign(path) else BuiltSource(path, reading)


def join(folder: Path, path: str | os.PathLike) -> str:
    """A path that a record gives relative to a folder."""
    return str(folder / path)


def read_record(
    value, where: str, index: int, place: Callable[[str], str] | None, reading: Reading = Reading()
) -> Record:
    """Makes the conversation of a record, given as a mapping or as JSON text.

    Args:
      value: the record.
      where: where it stands, for errors.
      index: its number, which names it if it has no name.
      place: gives the path where a medium lies that the record names; None for paths that are used as they are.
      reading: how it is read.

    Raises:
      DataError: naming `where`, and what is wrong.
    """
    text = value.encode() if isinstance(value, str) else value
    if isinstance(text, bytes):
        try:
            value = json.loads(text)
        except ValueError as error:
            hint = _ARRAY_HINT if text.lstrip().startswith(b"[") else "write one record a line."
            raise DataError(f"{where}: not JSON ({error}); {hint}") from error
    if not isinstance(value, Mapping):
        hint = _ARRAY_HINT if isinstance(value, list) else "write one record a line."
        raise DataError(
            f'{where}: expected a record such as {{"id": ..., "messages": [...]}}, got {_short(value)}; {hint}'
        )
    name = str(value.get("id", index))
    time_format = choose_time_format(reading.seed, name, reading.hms_share)
    telling = Telling(time_format, reading.coordinates, _sizes_in(place, reading.sizes))
    try:
        form = find_format(value) if reading.format == "auto" else reading.format
        messages = to_conversation(value, form, telling)
        options = record_options(value)
    except QwenVLError as error:
        raise DataError(f"{where}: {error}") from error
    if time_format != "seconds":
        options["time_format"] = time_format
    content = ""
    if isinstance(text, bytes):
        # What the text alone does not tell; nothing for most records, which keep the digest of their text.
        told = [] if form == "messages" else [form, reading.coordinates]
        read = repr([*told, time_format]).encode() if told or time_format != "seconds" else b""
        content = hashlib.sha256(text + read).hexdigest()
    return Record(name, [_with_paths(message, place) for message in messages], where, content, options)


def media_paths(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths of a conversation's images and videos, in reading order; media in memory have none."""
    return [
        os.fspath(source)
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
        for source in _files_of(part)
    ]


def _files_of(part) -> list[str | os.PathLike]:
    """The paths, or addresses, of an image, a video, or a video given as images."""
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "video"):
        return []
    value = part.get(part["type"])
    return [
        source for source in (value if isinstance(value, list) else [value]) if isinstance(source, str | os.PathLike)
    ]


def _sizes_in(
    place: Callable[[str], str] | None, sizes: Callable[[dict], Sizes] | None
) -> Callable[[dict], Sizes] | None:
    """`sizes` for parts whose media lie where `place` says."""
    return None if sizes is None else lambda part: sizes(_with_path(part, place))


def _with_paths(message, place: Callable[[str], str] | None):
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_with_path(part, place) for part in message["content"]]}


def _with_path(part, place: Callable[[str], str] | None):
    if place is None or not _files_of(part):
        return part
    value = part[part["type"]]
    placed = [_placed(source, place) for source in (value if isinstance(value, list) else [value])]
    return {**part, part["type"]: placed if isinstance(value, list) else placed[0]}


def _placed(source, place: Callable[[str], str]):
    """Where a path is; addresses and media in memory as they are."""
    return place(os.fspath(source)) if isinstance(source, str | os.PathLike) and not is_remote(source) else source


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
