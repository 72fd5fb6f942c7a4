"""Facts about the samples of a data set, measured once without decoding a pixel and kept beside the data.

The file of facts, `<data>.facts-<processor>.json`, is only a cache: every entry is looked up by the record's text, the
state of its media files and the processor's settings, so a changed record, file or setting is measured again.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import tempfile
from pathlib import Path

from qwenvl_jax.data import chat
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.packing import SampleFacts
from qwenvl_jax.data.pooling import Pool
from qwenvl_jax.data.sources import Record, Source, media_paths
from qwenvl_jax.errors import DataError, QwenVLError

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
    source: Source, processor, *, processor_key: str = "", cache: Path | None = None
) -> tuple[SampleFacts | Failure, ...]:
    """The facts of every sample of `source`, in order; of one that cannot be read, or that the processor refuses, why.

    Args:
      processor: its `measure(conversation, **options)` tells tokens and grids without decoding pixels.
      processor_key: a hash of the processor's settings; "" measures everything again.
      cache: the path that the file of facts begins with; None keeps none. Facts that came with a record are used where
        they hold, and not kept there.
    """
    path = Path(f"{cache}.facts-{processor_key[:12]}.json") if cache and processor_key else None
    known = _read_facts(path) if path else {}
    found: dict[str, list] = {}

    def measure(index: int) -> SampleFacts | Failure:
        try:
            record = source[index]
        except QwenVLError as error:
            return Failure(f"record {index}", str(error))
        key = sample_key(record, processor_key)
        entry = known.get(key) if key else None
        brought = bool(key) and record.known is not None and record.known[0] == key
        if brought:
            assert record.known is not None
            entry = record.known[1]
        if entry is None:
            try:
                if record.fetch is not None:
                    record.fetch()
                facts = processor.measure(record.messages, **record.options)
            except QwenVLError as error:
                return Failure(f"{record.where} ({record.id})", f"{record.where}: {error}")
            # Equal frames follow each other: (patches in a frame, how many frames).
            entry = [facts.tokens, facts.loss_tokens, [[h * w, t] for t, h, w in facts.grids]]
        if key and not brought:
            found[key] = entry
        tokens, loss_tokens, runs = entry
        frames = tuple(patches for patches, count in runs for _ in range(count))
        pools = [Pool.of(part) for _, part in chat.parts_of(record.messages, ("image", "video"))]
        taps = max((pool.taps for pool in pools if pool), default=0)
        return SampleFacts(f"{record.where} ({record.id})", tokens, frames, loss_tokens, taps)

    with concurrent.futures.ThreadPoolExecutor(_PROBES) as pool:
        facts = tuple(pool.map(measure, range(len(source))))
    if path and not found.items() <= known.items():
        # What other settings found out (frame rates, say) stays, as long as it is not much more than this.
        others = dict(list(known.items())[-_OTHERS * len(found) :])
        _write_facts(path, others | found)
    return facts


def facts_digest(facts: tuple[SampleFacts, ...], source: Source) -> str:
    """A hash of everything that a plan and its batches follow from, pixels aside; the place of the data is left out."""
    digest = hashlib.sha256()
    for index, sample in enumerate(facts):
        frames = sorted(collections.Counter(sample.frames).items())
        digest.update(f"{source[index].id} {source[index].content} {sample.tokens} {frames}\n".encode())
    return digest.hexdigest()


def _read_facts(path: Path) -> dict[str, list]:
    """The entries of a file of facts; none if it is missing or damaged, for it can be made again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_facts(path: Path, entries: dict[str, list]) -> None:
    """Writes a file of facts whole or not at all. Data on a read-only disk is measured again each time."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(entries, file)
        os.replace(file.name, path)
    except OSError:
        return
