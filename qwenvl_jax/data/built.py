"""Data sets that `qwenvl-jax data build` made: records with their facts in ArrayRecord, read by tensorflow-datasets.

    DST/                  a tfds data set, split "train": a record each, with the facts that a plan needs
    DST/media/            another, if media are embedded: the bytes of each file once, whichever records show it
    DST/processor/        tokenizer and settings that the facts hold for
    DST/quarantine.jsonl  the records that were left out, if any
    DST/media-cache/      embedded media as files, made when they are first wanted; may be deleted at any time

A record is the line of the file that it came from, byte for byte, so that it is read as from there, and its batches are
the same. ffmpeg reads files, not bytes: that is why media are taken out of the data set before they are decoded.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwenvl_jax.data.files import written_whole
from qwenvl_jax.data.sources import JoinedSources, Reading, Record, Source, join, read_record
from qwenvl_jax.errors import DataError, SourceError

MEDIA, MEDIA_CACHE, PROCESSOR, QUARANTINE = "media", "media-cache", "processor", "quarantine.jsonl"
SPLIT = "train"
INFO = "dataset_info.json"  # tfds's own
# As tensorflow-datasets calls the data sets, which shows in the names of their files.
TITLES = {"records": "qwenvl_records", "media": "qwenvl_media"}
# What we say of a data set stands in tfds's own file of metadata.
METADATA, OURS, VERSION = "metadata.json", "qwenvl_jax", 1
# How array_record tells of bytes that are not what was written, and what it adds if then no record can be read.
_CORRUPT, _ALL_OF_IT = "Corrupted Riegeli/records file", "Failed to read "


def import_tfds() -> Any:
    """tensorflow-datasets, which works without TensorFlow.

    Raises:
      DataError: it is not installed.
    """
    try:
        # The package itself logs what fails when it is imported, and goes on.
        import tensorflow_datasets.public_api as tfds
    except ImportError as error:
        raise DataError(
            f"data sets in ArrayRecord need tensorflow-datasets ({error}); install it with "
            "`pip install 'qwenvl_jax[tfds]'`."
        ) from error
    return tfds


def built_metadata(folder: str | os.PathLike) -> dict[str, Any]:
    """What `data build` wrote about a data set.

    Raises:
      DataError: the folder is not one that it made, or one of a newer version.
    """
    path = Path(folder) / METADATA
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))[OURS]
        version = ours["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data folder {folder} is not a data set of `qwenvl-jax data build` ({METADATA} is missing or damaged); "
            "give such a folder, one of tensorflow-datasets, or a JSONL file."
        ) from error
    if version != VERSION:
        raise DataError(f"data folder {folder} has version {version}, this package reads {VERSION}; build it again.")
    return ours


def is_foreign(folder: str | os.PathLike) -> bool:
    """Whether a folder is a data set of tensorflow-datasets that `data build` did not make."""
    try:
        info = json.loads((Path(folder) / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and info.get("name") != TITLES["records"]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A medium within a data set.

    Attributes:
      index: number of the file in `DST/media`.
      digest: sha256 of its bytes, in hex.
      size: of the file, in bytes.
    """

    index: int
    digest: str
    size: int


class BuiltSource:
    """The records of a folder that `data build` made, with the facts that came with them.

    Args:
      folder: of the data set.
      reading: how its records become conversations.

    Raises:
      DataError: the folder is not such a data set, or tensorflow-datasets is not installed; a record is damaged, or
        none (raised on access, naming its number or the file and the line that it came from).
      SourceError: the folder cannot be read, or its media not be written into files (raised on access, too).
    """

    def __init__(self, folder: str | os.PathLike, reading: Reading):
        self.folder, self._reading = Path(folder), reading
        metadata = built_metadata(folder)
        self.processor_key = metadata["processor"]
        self._records = open_split(self.folder)
        self._media = open_split(self.folder / MEDIA) if metadata["embedded"] else None

    def __reduce__(self):
        # A worker process opens the files for itself.
        return BuiltSource, (self.folder, self._reading)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        item = read_item(self._records, index, self.folder)
        where = f"{self.folder}[{index}], {item['where'].decode()}"
        origin, number, text = Path(os.fsdecode(item["folder"])), int(item["number"]), item["record"]
        entry = [int(item["tokens"]), int(item["loss_tokens"]), item["frames"].tolist()]
        known = (item["key"].decode(), entry)
        if self._media is None:
            record = read_record(text, where, number, functools.partial(join, origin), self._reading)
            return dataclasses.replace(record, known=known)
        inside = {path: Embedded(*values) for path, values in json.loads(item["media"]).items()}
        places = {path: self._place(path, medium) for path, medium in inside.items()}

        def place(path: str) -> str:
            return places.get(join(origin, path), join(origin, path))

        try:
            record = read_record(text, where, number, place, self._fetching(inside))
        except DataError as error:
            if isinstance(error.__cause__, SourceError):  # media could not be fetched to look at
                raise error.__cause__ from None
            raise
        return dataclasses.replace(
            record,
            known=known,
            states=embedded_states(inside.values()),
            fetch=functools.partial(self._fetch, inside),
        )

    def _fetching(self, inside: dict[str, Embedded]) -> Reading:
        """The reading, with media fetched before their sizes are asked for."""
        sizes = self._reading.sizes
        if sizes is None:
            return self._reading

        def fetched(part: dict):
            self._fetch(inside)
            return sizes(part)

        return dataclasses.replace(self._reading, sizes=fetched)

    def _place(self, path: str, medium: Embedded) -> str:
        """Where an embedded medium lies as a file, once it was fetched."""
        return str(self.folder / MEDIA_CACHE / (medium.digest + Path(path).suffix))

    def _fetch(self, inside: dict[str, Embedded]) -> None:
        """Writes the embedded media of a record that are not there yet into files, each whole or not at all.

        Raises:
          DataError: a medium is damaged.
          SourceError: media cannot be read, or not be written.
        """
        for path, medium in inside.items():
            target = Path(self._place(path, medium))
            try:
                if target.is_file() and target.stat().st_size == medium.size:
                    continue
                data = read_item(self._media, medium.index, self.folder / MEDIA)["data"]
                target.parent.mkdir(exist_ok=True)
                with written_whole(target) as file:
                    file.write(data)
            except OSError as error:
                raise SourceError(
                    f"{target.parent}: embedded media are decoded from files in this folder, which cannot be written "
                    f"({error.strerror}); make room or give leave, copy the data set to a place that can, or build it "
                    "with --reference-media."
                ) from error


def embedded_states(media: Iterable[Embedded]) -> list:
    """What changes when an embedded medium changes, for each; see `Record.states`."""
    return [["embedded", medium.digest] for medium in media]


def with_other_facts(source: Source, processor_key: str) -> list[Path]:
    """The folders of a source whose facts are another processor's."""
    sources = source.sources if isinstance(source, JoinedSources) else (source,)
    return [one.folder for one in sources if isinstance(one, BuiltSource) and one.processor_key != processor_key]


def open_split(folder: Path) -> Any:
    """The records of a tfds data set, with random access: of its split "train", or of its only one.

    Raises:
      DataError: none of the folder's splits is to be read; tensorflow-datasets is not installed.
      SourceError: the folder is damaged.
    """
    tfds = import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits)
        if SPLIT in splits or len(splits) == 1:
            return builder.as_data_source(SPLIT if SPLIT in splits else splits[0])
    except NotImplementedError as error:
        raise DataError(
            f"data folder {folder} is in a format without random access; write it as ArrayRecord, with "
            "file_format='array_record' of its builder."
        ) from error
    except Exception as error:  # whatever tfds, protobuf and array_record raise about files that are damaged
        raise _unreadable(folder, error) from error
    raise DataError(
        f"data folder {folder} has the splits {', '.join(splits) or '(none)'}; call the one to train on {SPLIT!r}, or "
        "give tfds.data_source(...) of it."
    )


def read_item(items: Any, index: int, folder: Path) -> dict[str, Any]:
    """An item of a tfds data set.

    Raises:
      DataError: this item is damaged.
      SourceError: the folder is damaged, has gone or cannot be read.
    """
    try:
        return items[index]
    except Exception as error:  # array_record raises ValueError and RuntimeError, protobuf its own
        if _is_of_item(error):
            raise DataError(f"{folder}[{index}] is damaged ({_said(error)}); copy the folder again.") from error
        raise _unreadable(folder, error) from error


def _is_of_item(error: Exception) -> bool:
    """Whether an item could not be read for what it is itself, and others can."""
    if isinstance(error, RuntimeError):  # of array_record, about its file
        return str(error).startswith(_CORRUPT) and _ALL_OF_IT not in str(error)
    return not isinstance(error, OSError | MemoryError)  # bytes that came, but are not such an item


def _unreadable(folder: Path, error: Exception) -> SourceError:
    return SourceError(f"data folder {folder} cannot be read ({_said(error)}); copy it again, or build it again.")


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
