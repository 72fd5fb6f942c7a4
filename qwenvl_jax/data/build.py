"""`qwenvl-jax data build`: JSONL files as a data set in ArrayRecord that tensorflow-datasets reads; see `built`.

Records are measured first, as training does it, so that a data set with too many bad ones is not begun. Then they are
written by a builder of tensorflow-datasets, shard after shard, in the order of the files, into a hidden folder beside
the destination that takes its name at the end.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax import __version__
from qwenvl_jax.data.bar import Bar
from qwenvl_jax.data.built import (
    MEDIA,
    OURS,
    PROCESSOR,
    QUARANTINE,
    SPLIT,
    VERSION,
    Embedded,
    embedded_states,
    import_tfds,
)
from qwenvl_jax.data.facts import measure_each, processor_key, sample_key
from qwenvl_jax.data.failure import Failure, check_share
from qwenvl_jax.data.named import named_processor
from qwenvl_jax.data.packing import SampleFacts
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import JoinedSources, JsonlSource, Reading, Record, Source, media_paths
from qwenvl_jax.errors import ConfigError, DataError

# tensorflow-datasets holds the records of a shard until it is written.
SHARD_BYTES = 256 << 20
# A record is one protocol buffer, which ends at 2 GiB.
MAX_MEDIUM_BYTES = (2 << 30) - (1 << 20)


@dataclasses.dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
      folder: the data set.
      records: how many it has.
      failures: the records that were left out.
      media: embedded files, and their bytes together; both 0 where media are referenced.
    """

    folder: Path
    records: int
    failures: tuple[Failure, ...]
    media: tuple[int, int]

    def __str__(self) -> str:
        text = f"{self.folder}: {self.records:,} records"
        if self.media[0]:
            text += f", {self.media[0]:,} media files of {self.media[1]:,} bytes embedded"
        if self.failures:
            text += f"; {len(self.failures)} left out, see {self.folder / QUARANTINE}"
        return text


def build(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    model: str | None = None,
    embed_media: bool = False,
    shards: int | None = None,
    max_failed: float = 0.02,
) -> Built:
    """Makes a data set of JSONL files.

    Args:
      sources: the files.
      destination: a folder that is not there yet, or an empty one.
      model: whose processor the facts are measured with; see `named_processor`.
      embed_media: whether the bytes of images and videos go into the data set; else it refers to the files by their
        absolute paths.
      shards: files that the records are laid into; by default as many as hold 256 MiB each.
      max_failed: share of the records that may be left out since they cannot be used.

    Raises:
      ConfigError: a destination or a number that cannot be used.
      CheckpointError: there is no such model.
      DataError: a file that cannot be read, or too many records that cannot be used.
    """
    destination = Path(destination)
    _check(destination, shards, max_failed)
    tfds = import_tfds()
    processor = named_processor(model)
    files = [JsonlSource(path, Reading.of(processor)) for path in sources]
    count = sum(map(len, files))
    if shards is not None and shards > count:
        raise ConfigError(f"--shards {shards} is more than the {count} records; give at most as many.")
    key = processor_key(processor)
    with Bar("measuring records", count) as bar:
        facts = measure_each(_Watched(JoinedSources(files), bar), processor, processor_key=key, cache=Path(sources[0]))
    failures = tuple(one for one in facts if isinstance(one, Failure))
    check_share(failures, count, max_failed, "--max-failed ")
    if len(failures) == count:
        raise DataError(f"{failures[0].reason} (no record of {count} can be used; mend the data).")
    usable = list(_usable(files, facts))
    media = _embed(usable) if embed_media else _Media()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as hidden:
        folder = Path(hidden) / "dataset"
        metadata = {"version": VERSION, "package": __version__, "processor": key, "embedded": bool(media.files)}
        text = sum(file.path.stat().st_size for file in files)
        number = min(len(usable), shards or math.ceil(text / SHARD_BYTES))
        with Bar("writing records", len(usable)) as bar:
            parts = [_later(_record_items, part, key, media, bar) for part in _even(usable, number)]
            _write(tfds, folder, "qwenvl_records", _record_features(tfds), parts, metadata)
        if media.files:
            with Bar("writing media", len(media.files)) as bar:
                parts = [_later(_media_items, part, bar) for part in media.parts()]
                _write(tfds, folder / MEDIA, "qwenvl_media", _media_features(tfds), parts, metadata)
        _finish(folder, processor, failures)
        os.rename(folder, destination)  # an empty folder gives way
    return Built(destination, len(usable), failures, media.figures)


def build_command(sources: Sequence[str], destination: str, **options: Any) -> None:
    """Builds and tells what was built; the work of `qwenvl-jax data build`."""
    print(build(sources, destination, **options))


def _check(destination: Path, shards: int | None, max_failed: float) -> None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConfigError(f"{destination} exists and is not an empty folder; give a new one, or delete it.")
    if shards is not None and shards < 1:
        raise ConfigError(f"--shards {shards} must be at least 1.")
    if not 0 <= max_failed <= 1:
        raise ConfigError(f"--max-failed {max_failed} must be a share, from 0 to 1.")


class _Watched:
    """A source that counts what is read from it."""

    def __init__(self, source: Source, bar: Bar):
        self._source, self._bar = source, bar

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        try:
            return self._source[index]
        finally:
            self._bar.done()


@dataclasses.dataclass(frozen=True)
class _Line:
    """A record that can be used: its file, its number in it, its facts."""

    file: JsonlSource
    index: int
    facts: SampleFacts


def _usable(files: Sequence[JsonlSource], facts: Sequence[SampleFacts | Failure]) -> Iterator[_Line]:
    places = ((file, index) for file in files for index in range(len(file)))
    for (file, index), one in zip(places, facts, strict=True):
        if not isinstance(one, Failure):
            yield _Line(file, index, one)


def _even(lines: Sequence[_Line], number: int) -> list[Sequence[_Line]]:
    """As many parts, of about as many records each."""
    ends = [round(len(lines) * part / number) for part in range(number + 1)]
    return [lines[begin:end] for begin, end in itertools.pairwise(ends)]


@dataclasses.dataclass
class _Media:
    """Files that are embedded: each content once, in the order in which records show them.

    Attributes:
      files: the path of each content, and what it becomes.
      known: what each path becomes.
    """

    files: list[tuple[str, Embedded]] = dataclasses.field(default_factory=list)
    known: dict[str, Embedded] = dataclasses.field(default_factory=dict)

    @property
    def figures(self) -> tuple[int, int]:
        """How many files, and their bytes."""
        return len(self.files), sum(medium.size for _, medium in self.files)

    def parts(self) -> list[list[tuple[str, Embedded]]]:
        """The files in parts of `SHARD_BYTES` or of one file."""
        parts: list[list[tuple[str, Embedded]]] = []
        room = 0
        for path, medium in self.files:
            if not parts or medium.size > room:
                parts.append([])
                room = SHARD_BYTES
            parts[-1].append((path, medium))
            room -= medium.size
        return parts


def _media_items(files: Sequence[tuple[str, Embedded]], bar: Bar) -> Iterator[tuple[int, dict]]:
    """Media as tensorflow-datasets takes them."""
    for path, medium in bar.over(files):
        data = Path(path).read_bytes()
        if hashlib.sha256(data).hexdigest() != medium.digest:
            raise DataError(f"{path} changed while the data set was built; build it again.")
        yield medium.index, {"sha256": medium.digest, "name": Path(path).name, "data": data}


def _embed(lines: Sequence[_Line]) -> _Media:
    """Finds out which files are embedded, and what is the same under several names."""
    media = _Media()
    by_digest: dict[str, Embedded] = {}
    with Bar("looking at media", len(lines)) as bar:
        for line in bar.over(lines):
            record = line.file[line.index]
            for path in media_paths(record.messages):
                if path in media.known:
                    continue
                try:
                    size = os.path.getsize(path)
                    if size > MAX_MEDIUM_BYTES:
                        raise DataError(f"{record.where}: {path} has {size} bytes, too many to embed; build without.")
                    with open(path, "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise DataError(f"{record.where}: {path} cannot be read ({error.strerror}); check it.") from error
                if digest not in by_digest:
                    by_digest[digest] = Embedded(len(media.files), digest, size)
                    media.files.append((path, by_digest[digest]))
                media.known[path] = by_digest[digest]
    return media


def _record_items(lines: Sequence[_Line], key: str, media: _Media, bar: Bar) -> Iterator[tuple[int, dict]]:
    """Records as tensorflow-datasets takes them."""
    for number, line in enumerate(bar.over(lines)):
        record = line.file[line.index]
        inside: dict[str, Embedded] = {}
        if media.files:
            inside = {path: media.known[path] for path in media_paths(record.messages)}
            record = dataclasses.replace(record, states=embedded_states(inside.values()))
        runs = [[patches, len(list(same))] for patches, same in itertools.groupby(line.facts.frames)]
        yield (
            number,
            {
                "id": record.id,
                "record": line.file.text(line.index),
                "where": record.where,
                # As it is, also where it is no text.
                "folder": os.fsencode(line.file.path.parent.absolute()),
                "number": line.index,
                "key": sample_key(record, key),
                "tokens": line.facts.tokens,
                "loss_tokens": line.facts.loss_tokens,
                "frames": np.asarray(runs, np.int64).reshape(-1, 2),
                "media": json.dumps({path: dataclasses.astuple(medium) for path, medium in inside.items()}),
            },
        )


def _later(work: Callable, *arguments) -> Callable[[], Iterator[tuple[int, dict]]]:
    return lambda: work(*arguments)


def _record_features(tfds: Any) -> Any:
    features = tfds.features
    return features.FeaturesDict(
        {
            "id": features.Text(doc="name of the record"),
            "record": features.Text(doc="the record in JSON, as it was written"),
            "where": features.Text(doc="file and line it came from"),
            "folder": features.Text(doc="what the paths in it are relative to"),
            "number": features.Scalar(np.int64, doc="of the record in its file, from 0; names one without an id"),
            "key": features.Text(doc="what the facts hold for: processor, record and the state of its media"),
            "tokens": features.Scalar(np.int64, doc="token slots that it takes"),
            "loss_tokens": features.Scalar(np.int64, doc="targets that are learnt"),
            "frames": features.Tensor(
                shape=(None, 2), dtype=np.int64, doc="runs of equal frames: patches in a frame, how many frames"
            ),
            "media": features.Text(doc="JSON: path -> [number in the data set media/, sha256, bytes], if embedded"),
        }
    )


def _media_features(tfds: Any) -> Any:
    features = tfds.features
    return features.FeaturesDict(
        {
            "sha256": features.Text(doc="of the data, in hex"),
            "name": features.Text(doc="of the file"),
            "data": features.Text(doc="the bytes of the file"),
        }
    )


def _write(
    tfds: Any,
    folder: Path,
    title: str,
    features: Any,
    shards: Sequence[Callable[[], Iterator[tuple[int, dict]]]],
    metadata: dict[str, Any],
) -> None:
    """Writes a data set of one split into a folder that is not there yet."""

    info: Any = tfds.core.DatasetInfo
    builder: Any = tfds.core.ShardBasedBuilder

    class Info(info):
        def initialize_from_bucket(self):
            """Looks for nothing in Google's bucket."""

    # Records stand in the order of the files: this kind of builder writes them as they come.
    class Builder(builder, skip_registration=True):  # type: ignore[call-arg]
        name = title
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # where checksums of downloads would stand; looking for it needs a package more

        def _info(self):
            return Info(
                builder=self,
                description="Records for training Qwen-VL, by qwenvl_jax.",
                features=features,
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict({OURS: metadata}),
            )

        def _build_data_dir(self, given):
            return given, given  # no folders of name and version within

        def _shard_iterators_per_split(self, dl_manager):
            return {SPLIT: shards}

    made = Builder(data_dir=folder, file_format="array_record")
    # It makes a folder for downloads, of which there are none, and tells where the data will lie.
    with contextlib.redirect_stdout(io.StringIO()):
        made.download_and_prepare(download_dir=folder.parent / "downloads")
    shutil.rmtree(folder.parent / "downloads", ignore_errors=True)


def _finish(folder: Path, processor: Processor, failures: Sequence[Failure]) -> None:
    """Writes what stands beside the records."""
    processor.save_pretrained(folder / PROCESSOR)
    if failures:
        lines = [json.dumps({"sample": failure.sample, "reason": failure.reason}) for failure in failures]
        (folder / QUARANTINE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
