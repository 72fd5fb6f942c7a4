"""`qwenvl-jax data build`: JSONL files as a data set in ArrayRecord that tensorflow-datasets reads; see `built`.

Records are measured first, as training does it, so that a data set with too many bad ones is not begun. Then they are
written in the order of the files, shard after shard, into a hidden folder beside the destination (`building`), here or
by the workers of a cluster (`on_beam`). A builder of tensorflow-datasets makes a data set of the shards, which takes
the name of the destination at the end. A build that was killed goes on where it was.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax import __version__
from qwenvl_jax.data.bar import Bar
from qwenvl_jax.data.building import Building, Shards, begin, media_features, open_plain, record_features
from qwenvl_jax.data.built import MEDIA, OURS, PROCESSOR, QUARANTINE, SPLIT, TITLES, VERSION, import_tfds
from qwenvl_jax.data.facts import MEASURE_AT_MOST, Measured, add_facts, facts_path, processor_key, read_facts
from qwenvl_jax.data.failure import Failure, check_share
from qwenvl_jax.data.named import named_processor
from qwenvl_jax.data.on_beam import OnBeam
from qwenvl_jax.data.sources import Reading
from qwenvl_jax.errors import ConfigError, DataError

SHARD_BYTES = 256 << 20


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
    beam: str | None = None,
    beam_options: Sequence[str] = (),
) -> Built:
    """Makes a data set of JSONL files, or of data sets of tensorflow-datasets that bring no facts.

    Args:
      sources: the files, or folders.
      destination: a folder that is not there yet, or an empty one.
      model: whose processor the facts are measured with; see `named_processor`.
      embed_media: whether the bytes of images and videos go into the data set; else it refers to the files by their
        absolute paths.
      shards: files that the records are laid into; by default as many as hold 256 MiB each.
      max_failed: share of the records that may be left out since they cannot be used.
      beam: the runner of Apache Beam whose workers measure and write; None does it in this process. Workers must see
        files and destination under the same paths.
      beam_options: of Beam's pipeline, see `OnBeam`.

    Raises:
      ConfigError: a destination, a number or a runner that cannot be used; another process builds the same.
      CheckpointError: there is no such model.
      DataError: a file that cannot be read, or too many records that cannot be used.
    """
    destination = Path(destination)
    _check(destination, shards, max_failed)
    tfds = import_tfds()
    if beam_options and beam is None:
        raise ConfigError("--beam-option is for --beam; name a runner, such as --beam DirectRunner.")
    make = _here if beam is None else OnBeam(beam, beam_options)
    processor = named_processor(model)
    files = [open_plain(path, Reading.of(processor)) for path in sources]
    count = sum(map(len, files))
    if shards is not None and shards > count:
        raise ConfigError(f"--shards {shards} is more than the {count} records; give at most as many.")
    key = processor_key(processor)
    with _held(destination.absolute()) as folder:
        beside = facts_path(Path(sources[0]).absolute(), key)
        about = {"version": VERSION, "package": __version__, "embedded": embed_media, "facts": str(beside)}
        begin(folder, files, processor, key, about)
        building = Building(folder)
        make(building, "measure", building.parts)
        _keep_facts(building, beside)
        usable, failures = building.gather()
        check_share(failures, count, max_failed, "--max-failed ")
        if not usable:
            raise DataError(f"{failures[0].reason} (no record of {count} can be used; mend the data).")
        text = sum(map(_size, sources))
        records = Shards("records", min(usable, shards or math.ceil(text / SHARD_BYTES)))
        media, figures = building.number_media(SHARD_BYTES) if embed_media else (Shards("media", 0), (0, 0))
        make(building, "write_records", records.number, records.number)
        make(building, "write_media", media.number, media.number)
        metadata = {"version": VERSION, "package": __version__, "processor": key, "embedded": figures[0] > 0}
        finished = folder / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        _assemble(tfds, building, records, finished / "dataset", record_features(tfds), metadata)
        if media.number:
            _assemble(tfds, building, media, finished / "dataset" / MEDIA, media_features(tfds), metadata)
        processor.save_pretrained(finished / "dataset" / PROCESSOR)
        _list(failures, finished / "dataset" / QUARANTINE)
        os.rename(finished / "dataset", destination)  # an empty folder gives way
        shutil.rmtree(folder)
    return Built(destination, usable, failures, figures)


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


def _size(source: str | Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    path = Path(source)
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


@contextlib.contextmanager
def _held(destination: Path) -> Iterator[Path]:
    """The folder of a build, held against other processes; the system frees it when this one dies."""
    folder = destination.parent / f".{destination.name}.building"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{destination} is being built by another process; wait for it, or give another folder."
            ) from error
        yield folder


def _here(building: Building, work: str, count: int, *arguments: Any) -> None:
    """Makes the pieces 0 to `count` in this process, one after another; see `OnBeam.__call__`."""
    doing = {"measure": "measuring records", "write_records": "writing records", "write_media": "writing media"}[work]
    sizes = [len(building.part(number)) if work == "measure" else 1 for number in range(count)]
    with Bar(doing, sum(sizes)) as bar:
        for number, size in enumerate(sizes):
            getattr(building, work)(*arguments, number)
            bar.done(size)


def _assemble(
    tfds: Any, building: Building, shards: Shards, folder: Path, features: Any, metadata: dict[str, Any]
) -> None:
    """Makes a tfds data set of one split out of shards, in a folder that is not there yet."""
    info: Any = tfds.core.DatasetInfo
    builder: Any = tfds.core.dataset_builder.FileReaderBuilder  # not among the names of tfds.core

    class Info(info):
        def initialize_from_bucket(self):
            """Looks for nothing in Google's bucket."""

    class Builder(builder, skip_registration=True):  # type: ignore[call-arg]
        name = TITLES[shards.kind]
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

        # tfds's own builder by shards would write them here. When it is killed nothing stays, and with Beam and more
        # than ten shards it tells their lengths in the wrong order (4.9.10 sorts their numbers as text).
        def _download_and_prepare(self, dl_manager, download_config=None):
            template = self._get_filename_template(SPLIT)
            paths = [
                Path(template.sharded_filepath(shard_index=index, num_shards=shards.number))
                for index in range(shards.number)
            ]
            for index, path in enumerate(paths):
                _link(building.folder / shards.name(index), path)
            split = tfds.core.SplitInfo(
                name=SPLIT,
                shard_lengths=building.items(shards),
                num_bytes=sum(path.stat().st_size for path in paths),
                filename_template=template,
            )
            self.info.set_splits(tfds.core.SplitDict([split]))

    made = Builder(data_dir=folder)
    # It makes a folder for downloads, of which there are none, and tells where the data will lie.
    with contextlib.redirect_stdout(io.StringIO()):
        downloads = building.folder / "finished" / "downloads"
        made.download_and_prepare(download_dir=downloads, file_format="array_record")


def _link(path: Path, name: Path) -> None:
    """Gives a file a second name, so that a build killed meanwhile still has it; or where that cannot be, another."""
    try:
        os.link(path, name)
    except OSError:
        os.rename(path, name)


def _keep_facts(building: Building, path: Path) -> None:
    """Keeps the facts of small data where training looks for them."""
    if len(building.source) > MEASURE_AT_MOST:
        return
    found = (one for number in range(building.parts) for _, one in building.measured(number))
    kept = {one.key: one.entry for one in found if isinstance(one, Measured) and one.key}
    add_facts(path, read_facts(path), kept)


def _list(failures: Sequence[Failure], path: Path) -> None:
    if failures:
        lines = [json.dumps({"sample": failure.sample, "reason": failure.reason}) for failure in failures]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
