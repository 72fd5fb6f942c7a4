"""A data set while it is built: work in pieces that any process can do, and a folder that keeps what is done.

    .DST.building/plan.json        what is built of which files; with another plan the build begins anew
    .DST.building/lines-0.npy      where the lines of the first file begin
    .DST.building/processor/       what the facts are measured with
    .DST.building/measured/        for each `PART` records their facts, and digests of media to embed
    .DST.building/usable.npy       numbers of the records that can be used
    .DST.building/numbers/         for each `PART` records the numbers of their embedded media
    .DST.building/records/         shards of records, and beside each what it was made of
    .DST.building/media/           shards of embedded media, and what they are to hold

A piece is known by its number; what it needs it reads from the folder, and what it made it puts there whole or not at
all. So pieces are made in any order, by one process or by a cluster that shares the file system, and again if need be,
and a build that was killed makes only those that are missing. A piece made earlier counts if what it was made of is the
same still: the lines, the sizes and times of the media, the facts.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data.built import Embedded, embedded_states, import_tfds, is_foreign
from qwenvl_jax.data.facts import MEASURE_AT_MOST, Measured, file_state, measure_numbers, read_facts, sample_key
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import JoinedSources, JsonlSource, Reading, Record, media_paths
from qwenvl_jax.data.tfds_source import TfdsSource
from qwenvl_jax.errors import DataError

# Records that are measured at a time: seconds of work where each shows a video.
PART = 256
# A record is one protocol buffer, which ends at 2 GiB.
MAX_MEDIUM_BYTES = (2 << 30) - (1 << 20)

_PLAN, _USABLE = "plan.json", "usable.npy"


@dataclasses.dataclass(frozen=True)
class Shards:
    """Files of a data set that is built.

    Attributes:
      kind: "records" or "media".
      number: how many.
    """

    kind: str
    number: int

    def name(self, index: int) -> str:
        """Of a shard, within the folder of the build."""
        return f"{self.kind}/{index:05}-of-{self.number:05}"


class Building:
    """A build, as each process that takes part in it sees it.

    Args:
      folder: what `begin` made.

    Raises:
      DataError: the folder is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            text = (folder / _PLAN).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{folder / _PLAN} cannot be read ({error.strerror}); sources and destination of a build must lie on a "
                "file system that all of its workers share, under the same path."
            ) from error
        plan = json.loads(text)
        self.token = hashlib.sha256(text.encode()).hexdigest()  # of the plan, for which pieces are
        self._facts = Path(plan["facts"])
        self.embedded, self._key = plan["embedded"], plan["processor"]
        self.processor = Processor.from_pretrained(folder / "processor")
        reading = Reading.of(self.processor)
        self.source = JoinedSources(
            [
                open_plain(path, reading, lines if (lines := folder / f"lines-{number}.npy").exists() else None)
                for number, (path, *_) in enumerate(plan["files"])
            ]
        )

    @property
    def parts(self) -> int:
        """How many pieces measuring has."""
        return -(-len(self.source) // PART)

    def part(self, number: int) -> range:
        """The records of a piece of measuring."""
        return range(number * PART, min((number + 1) * PART, len(self.source)))

    @functools.cached_property
    def _known(self) -> dict[str, list]:
        """Facts that training has found, by key."""
        return read_facts(self._facts) if len(self.source) <= MEASURE_AT_MOST else {}

    def measure(self, number: int) -> None:
        """Makes a piece of `measured`; what is known of it already is not measured again.

        Raises:
          DataError: a file that cannot be embedded.
        """
        path = self.folder / f"measured/{number:05}.json"
        before = _read(path) or {"facts": [], "media": {}}
        known = {**self._known, **{one[1]: one[2] for one in before["facts"] if isinstance(one, list)}}
        found = measure_numbers(self.source, self.part(number), self.processor, self._key, known)
        media: dict[str, list] = {}
        if self.embedded:
            for index, one in zip(self.part(number), found, strict=True):
                if isinstance(one, Measured):
                    _look_at_media(self.source[index], media, before["media"])
        facts = [[one.name, one.key, one.entry] if isinstance(one, Measured) else vars(one) for one in found]
        _write(path, {"facts": facts, "media": media})

    def measured(self, number: int) -> Iterator[tuple[int, Measured | Failure]]:
        """What a piece of measuring found: each record's number, and facts or failure."""
        facts = _read(self.folder / f"measured/{number:05}.json")["facts"]
        for index, one in zip(self.part(number), facts, strict=True):
            yield index, Measured(*one) if isinstance(one, list) else Failure(**one)

    def gather(self) -> tuple[int, tuple[Failure, ...]]:
        """Finds out from all pieces of measuring how many records can be used; what fails."""
        failures, usable = [], []
        for number in range(self.parts):
            for index, one in self.measured(number):
                if isinstance(one, Failure):
                    failures.append(one)
                else:
                    usable.append(index)
        np.save(self.folder / _USABLE, np.asarray(usable, np.int64))
        return len(usable), tuple(failures)

    def number_media(self, shard_bytes: int) -> tuple[Shards, tuple[int, int]]:
        """Numbers the files that are embedded: each content once, in the order in which records show them.

        Args:
          shard_bytes: of which a shard has at most as many, or one file.

        Returns:
          The shards, and how many files there are, and their bytes.
        """
        by_digest: dict[str, Embedded] = {}
        shards: list[list[list]] = []
        room = 0
        for number in range(self.parts):
            media = _read(self.folder / f"measured/{number:05}.json")["media"]
            numbers = {}
            for path, (size, _, digest) in media.items():
                if digest not in by_digest:
                    by_digest[digest] = Embedded(len(by_digest), digest, size)
                    if not shards or size > room:
                        shards.append([])
                        room = shard_bytes
                    shards[-1].append([path, len(by_digest) - 1, digest])
                    room -= size
                numbers[path] = dataclasses.astuple(by_digest[digest])
            _write(self.folder / f"numbers/{number:05}.json", numbers)
        made = Shards("media", len(shards))
        for index, files in enumerate(shards):
            _write(self.folder / f"{made.name(index)}.todo", files)
        return made, (len(by_digest), sum(medium.size for medium in by_digest.values()))

    def write_records(self, shards: int, index: int) -> None:
        """Makes a shard of records; they are laid out evenly."""
        usable = np.load(self.folder / _USABLE, mmap_mode="r")
        begin, end = (round(len(usable) * part / shards) for part in (index, index + 1))
        made_of = list(self._entries(usable[begin:end].tolist()))
        self._write_shard(
            Shards("records", shards).name(index),
            made_of,
            lambda: (self._record_item(*entry) for entry in made_of),
            record_features(import_tfds()),
        )

    def _entries(self, indices: Sequence[int]) -> Iterator[tuple[int, str, list, dict[str, list]]]:
        """The number of each record, the key of its facts, the facts, and the numbers of its parts' media by path."""
        for number, inside in itertools.groupby(indices, lambda index: index // PART):
            measured = dict(self.measured(number))
            numbers = _read(self.folder / f"numbers/{number:05}.json") if self.embedded else {}
            for index in inside:
                one = measured[index]
                assert isinstance(one, Measured)  # only such are usable
                record_media = {}
                if numbers:
                    paths = media_paths(self.source[index].messages)
                    record_media = {path: numbers[path] for path in paths}
                yield index, one.key, one.entry, record_media

    def _record_item(self, index: int, key: str, entry: list, media: dict[str, list]) -> dict[str, Any]:
        """A record as tensorflow-datasets takes it."""
        file, number = self.source.locate(index)
        record = file[number]
        if sample_key(record, self._key) != key:
            raise DataError(f"{record.where}: the record or its media changed while the data set was built; {_AGAIN}.")
        if self.embedded:
            record = dataclasses.replace(record, states=embedded_states(Embedded(*one) for one in media.values()))
        tokens, loss_tokens, runs = entry
        # Runs are told for each image or video; equal neighbours are one.
        same = itertools.groupby(itertools.chain.from_iterable([patches] * count for patches, count in runs))
        frames = [[patches, len(list(run))] for patches, run in same]
        return {
            "id": record.id,
            "record": file.text(number),
            "where": record.where,
            # As it is, also where it is no text.
            "folder": os.fsencode(file.base.absolute()),
            "number": number,
            "key": sample_key(record, self._key),
            "tokens": tokens,
            "loss_tokens": loss_tokens,
            "frames": np.asarray(frames, np.int64).reshape(-1, 2),
            "media": json.dumps(media),
        }

    def write_media(self, shards: int, index: int) -> None:
        """Makes a shard of embedded media."""
        name = Shards("media", shards).name(index)
        files = _read(self.folder / f"{name}.todo")
        self._write_shard(name, files, lambda: map(_media_item, files), media_features(import_tfds()))

    def _write_shard(self, name: str, made_of: list, items: Callable[[], Iterable[dict]], features: Any) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        target, note = self.folder / name, self.folder / f"{name}.json"
        if target.exists() and _read(note) == {"made_of": digest, "items": len(made_of)}:
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as hidden:
            path = os.path.join(hidden, "shard")
            # As tensorflow-datasets writes them, each to be read without its neighbours; but with fields in one order,
            # so that the same data gives the same files.
            writer = ArrayRecordWriter(path, "group_size:1")
            examples = ExampleSerializer(features.get_serialized_info())
            for item in items():
                example = examples.get_tf_example(features.encode_example(item))
                writer.write(example.SerializeToString(deterministic=True))
            writer.close()
            os.replace(path, target)
        _write(note, {"made_of": digest, "items": len(made_of)})

    def items(self, shards: Shards) -> list[int]:
        """How many records, or media, each shard has."""
        return [_read(self.folder / f"{shards.name(index)}.json")["items"] for index in range(shards.number)]


def open_plain(path: str | Path, reading: Reading, lines: Path | None = None) -> JsonlSource | TfdsSource:
    """A source that a data set is built of.

    Args:
      path: a JSONL file, or a folder of tensorflow-datasets.
      lines: file with the places of the lines, if they were looked up before.

    Raises:
      DataError: see `JsonlSource` and `TfdsSource`; or the folder was built already.
    """
    if not os.path.isdir(path):
        return JsonlSource(path, reading, None if lines is None else np.load(lines, mmap_mode="r"))
    if not is_foreign(path):
        raise DataError(
            f"{path} is no data set of tensorflow-datasets, or was built already; give what it was built of."
        )
    return TfdsSource(Path(path), reading)


_AGAIN = "start the same build again, which looks at it anew"


def begin(
    folder: Path, files: Sequence[JsonlSource | TfdsSource], processor: Processor, key: str, about: dict[str, Any]
) -> None:
    """Makes the folder of a build, or keeps it if it has the same plan.

    Args:
      key: of the processor.
      about: what else decides what the pieces are.
    """
    paths = [file.path if isinstance(file, JsonlSource) else file.folder for file in files]
    states = [[os.path.abspath(path), *file_state(file.state_file)] for path, file in zip(paths, files, strict=True)]
    plan = {"files": states, "processor": key, **about}
    if _read(folder / _PLAN) == plan:
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("."):
            path.unlink()
    for kind in ("measured", "numbers", "records", "media"):
        (folder / kind).mkdir()
    for number, file in enumerate(files):
        if isinstance(file, JsonlSource):
            np.save(folder / f"lines-{number}.npy", file.places)
    processor.save_pretrained(folder / "processor")
    _write(folder / _PLAN, plan)


def record_features(tfds: Any) -> Any:
    """The features of a record."""
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


def media_features(tfds: Any) -> Any:
    """The features of an embedded file."""
    features = tfds.features
    return features.FeaturesDict(
        {
            "sha256": features.Text(doc="of the data, in hex"),
            "name": features.Text(doc="of the file"),
            "data": features.Text(doc="the bytes of the file"),
        }
    )


def _media_item(file: tuple[str, int, str]) -> dict[str, Any]:
    """A file as tensorflow-datasets takes it."""
    path, _, digest = file
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check it.") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(f"{path} changed while the data set was built; {_AGAIN}.")
    return {"sha256": digest, "name": Path(path).name, "data": data}


def _look_at_media(record: Record, media: dict[str, list], before: dict[str, list]) -> None:
    """Adds the size, the time and the digest of a record's files by path; `before` has those found earlier."""
    for path in media_paths(record.messages):
        if path in media:
            continue
        try:
            size, changed = file_state(path)
            if size > MAX_MEDIUM_BYTES:
                raise DataError(f"{record.where}: {path} has {size} bytes, too many to embed; build without.")
            if before.get(path, [])[:2] == [size, changed]:
                media[path] = before[path]
                continue
            with open(path, "rb") as file:
                media[path] = [size, changed, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise DataError(f"{record.where}: {path} cannot be read ({error.strerror}); check it.") from error


def _read(path: Path) -> Any:
    """What a file in JSON holds; None if it is missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _write(path: Path, value: Any) -> None:
    """Writes a file in JSON, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)
