"""Facts about the samples of a data set, measured once without decoding a pixel and kept beside the data.

The file of facts, `<data>.facts-<processor>.json`, is only a cache: every entry is looked up by the record's text, the
state of its media files and the processor's settings, so a changed record, file or setting is measured again.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwenvl_jax.data import chat
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.files import written_whole
from qwenvl_jax.data.packing import Modality, SampleFacts
from qwenvl_jax.data.pooling import Pool
from qwenvl_jax.data.sources import Record, Source, media_paths
from qwenvl_jax.errors import DataError, QwenVLError, SourceError

# Data of more records is measured by `qwenvl-jax data build`, not before training, unless a run allows it.
MEASURE_AT_MOST = 100_000
# Probing a file waits for another process, so a few at a time even on few cores.
_PROBES = 4
# Entries of a file of facts that are kept beside those in use, for each of them.
_OTHERS = 7


def processor_key(processor) -> str:
    """A hash of everything that a processor makes samples with: of the files that it saves."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def sample_key(record: Record, processor_key: str) -> str:
    """What identifies a processed record: its text, the state of its media, the processor; "" if nothing can."""
    if not record.content or not processor_key:
        return ""
    try:
        states: list = record.states or [file_state(path) for path in media_paths(record.messages)]
    except OSError:
        return ""
    return hashlib.sha256(f"{processor_key} {record.content} {states}".encode()).hexdigest()


def file_state(path: str | os.PathLike) -> tuple[int, int]:
    """Size and time of a file: what changes when it is written anew."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def measure_source(
    source: Source, processor, *, processor_key: str = "", cache: Path | None = None
) -> tuple[SampleFacts, ...]:
    """The facts of every sample of `source`, in order.

    Args:
      processor, processor_key, cache: see `measure_each`.

    Raises:
      DataError: a record that cannot be used, naming file and line.
    """
    facts = []
    for one in measure_each(source, processor, processor_key=processor_key, cache=cache):
        if isinstance(one, Failure):
            raise DataError(one.reason)
        facts.append(one)
    return tuple(facts)


def measure_each(
    source: Source, processor, *, processor_key: str = "", cache: Path | None = None, at_most: int | None = None
) -> tuple[SampleFacts | Failure, ...]:
    """The facts of every sample of `source`, in order; of one that cannot be read, or that the processor refuses, why.

    Args:
      processor: its `measure(conversation, **options)` tells tokens and grids without decoding pixels.
      processor_key: a hash of the processor's settings; "" measures everything again.
      cache: the path that the file of facts begins with; None keeps none. Facts that came with a record are used where
        they hold, and not kept there.
      at_most: records that may be measured, since neither they nor the file of facts bring facts that hold; None has no
        bound.

    Raises:
      DataError: there are more to measure.
    """
    path = facts_path(cache, processor_key) if cache and processor_key else None
    known = read_facts(path) if path else {}
    if at_most is not None and len(source) > at_most:
        _check_known(source, processor_key, known, at_most)
    found = measure_numbers(source, range(len(source)), processor, processor_key, known)
    kept = {one.key: one.entry for one in found if isinstance(one, Measured) and one.key and not one.brought}
    if path:
        add_facts(path, known, kept)
    return tuple(one.facts() if isinstance(one, Measured) else one for one in found)


def _check_known(source: Source, processor_key: str, known: Mapping[str, list], at_most: int) -> None:
    missing, brought = 0, False
    for index in range(len(source)):
        try:
            record = source[index]
        except SourceError:
            raise
        except QwenVLError:
            continue  # it is told with the others that cannot be read
        key = sample_key(record, processor_key)
        if not key or (key not in known and (record.known is None or record.known[0] != key)):
            missing += 1
            brought |= record.known is not None
        if missing > at_most:
            # To build anew what was built brings the same facts again.
            remedy = (
                "those that `qwenvl-jax data build` left are of the processor that it was given (--model) and of the "
                "records as they stand, of which data.video_budget, data.frame_rates, data.hms_share and "
                "data.max_image_tokens make others: raise it to have them measured here, once"
                if brought
                else "let `qwenvl-jax data build` measure them once (on a cluster with --beam) and train on the folder "
                "that it makes, or raise it"
            )
            raise DataError(
                f"of {len(source):,} samples more than data.measure_at_most={at_most} have no facts by which steps are "
                f"planned, or none that hold for this processor and these settings; {remedy}."
            )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out about a sample.

    Attributes:
      name: how errors call it.
      key: what the facts hold for, see `sample_key`.
      entry: the facts as they are kept: tokens, learnt tokens, and runs of equal frames, each the patches in a frame
        and how many frames.
      pool_taps, modality: see `SampleFacts`.
      brought: whether they came with the record.
    """

    name: str
    key: str
    entry: list
    pool_taps: int = 0
    modality: Modality = "text"
    brought: bool = False

    def facts(self) -> SampleFacts:
        """The facts as planning takes them."""
        tokens, loss_tokens, runs = self.entry
        frames = tuple(patches for patches, n in runs for _ in range(n))
        return SampleFacts(self.name, tokens, frames, loss_tokens, self.pool_taps, self.modality)


def measure_numbers(
    source: Source, numbers: Sequence[int], processor, processor_key: str, known: Mapping[str, list]
) -> list[Measured | Failure]:
    """Measures some samples of a source, a few at a time.

    Args:
      numbers: which.
      processor, processor_key: see `measure_each`.
      known: entries found earlier, by key.

    Raises:
      SourceError: the source itself cannot be read.
    """

    def measure(index: int) -> Measured | Failure:
        try:
            record = source[index]
        except SourceError:  # no fault of the record
            raise
        except QwenVLError as error:
            return Failure(f"record {index}", str(error))
        name = f"{record.where} ({record.id})"
        key = sample_key(record, processor_key)
        if key and record.known is not None and record.known[0] == key:
            return Measured(name, key, record.known[1], _pool_taps(record), _modality(record), brought=True)
        if key and key in known:
            return Measured(name, key, known[key], _pool_taps(record), _modality(record))
        try:
            if record.fetch is not None:
                record.fetch()
            facts = processor.measure(record.messages, **record.options)
        except SourceError:
            raise
        except QwenVLError as error:
            return Failure(name, f"{record.where}: {error}")
        # Equal frames follow each other.
        entry = [facts.tokens, facts.loss_tokens, [[h * w, t] for t, h, w in facts.grids]]
        return Measured(name, key, entry, _pool_taps(record), _modality(record))

    with concurrent.futures.ThreadPoolExecutor(_PROBES) as pool:
        return list(pool.map(measure, numbers))


def _pool_taps(record: Record) -> int:
    """See `SampleFacts`; of a record that the processor took."""
    pools = [Pool.of(part) for _, part in chat.parts_of(record.messages, ("image", "video"))]
    return max((pool.taps for pool in pools if pool), default=0)


def _modality(record: Record) -> Modality:
    """See `SampleFacts`; of a record that the processor took."""
    kinds = {part["type"] for _, part in chat.parts_of(record.messages, ("image", "video"))}
    return "video" if "video" in kinds else "image" if "image" in kinds else "text"


def facts_digest(facts: tuple[SampleFacts, ...], source: Source) -> str:
    """A hash of everything that a plan and its batches follow from, pixels aside; the place of the data is left out."""
    digest = hashlib.sha256()
    for index, sample in enumerate(facts):
        frames = sorted(collections.Counter(sample.frames).items())
        digest.update(f"{source[index].id} {source[index].content} {sample.tokens} {frames}\n".encode())
    return digest.hexdigest()


def facts_path(data: Path, processor_key: str) -> Path:
    """The file of facts beside a data file."""
    return Path(f"{data}.facts-{processor_key[:12]}.json")


def read_facts(path: Path) -> dict[str, list]:
    """The entries of a file of facts; none if it is missing or damaged, for it can be made again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def add_facts(path: Path, known: dict[str, list], found: dict[str, list]) -> None:
    """Adds entries to those that a file of facts has."""
    if not found.items() <= known.items():
        # What other settings found out (frame rates, say) stays, as long as it is not much more than this.
        _write_facts(path, dict(list(known.items())[-_OTHERS * len(found) :]) | found)


def _write_facts(path: Path, entries: dict[str, list]) -> None:
    """Writes a file of facts whole or not at all. Data on a read-only disk is measured again each time."""
    try:
        with written_whole(path) as file:
            file.write(json.dumps(entries).encode())
    except OSError:
        return
