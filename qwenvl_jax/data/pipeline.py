"""From a plan to batches: Grain over the steps of the plan, a cache of decoded samples, a hash of each batch.

    plan[n] -> samples (decoded once, kept) -> collate -> Batch          by Grain's threads or worker processes

The iterator's state is Grain's own and small; a run that resumes from it reads no sample that it does not need.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import tempfile
import threading
import zipfile
from pathlib import Path

import grain
import jax
import numpy as np

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.facts import sample_key
from qwenvl_jax.data.packing import Plan
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.data.sources import Source
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A processed sample.

    Attributes:
      id: its name.
      sample: tokens and patches.
      digest: sha256 of its tokens, targets, weights and pixels.
    """

    id: str
    sample: Sample
    digest: bytes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["batch"], meta_fields=["tokens", "hash"])
@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A batch of the plan.

    Attributes:
      batch: NumPy arrays of the plan's shape.
      tokens: slots that hold a token, padding left out.
      hash: sha256, in hex, over row, span, name, tokens and pixels of each sample in order.
    """

    batch: Batch
    tokens: int
    hash: str


class SampleCache:
    """Processed samples by number, each decoded once as long as they fit into `memory_bytes`.

    Safe to use from several threads; two that want the same sample wait for one decoding.

    Args:
      source: of the records.
      processor: its `sample(conversation)` makes a `Sample`.
      memory_bytes: upper bound of what is kept; the samples used longest ago go first.
      folder: where processed samples are kept across runs, one file each; None keeps none.
      processor_key: a hash of the processor's settings, part of those files' names.
    """

    def __init__(self, source: Source, processor, *, memory_bytes: int, folder=None, processor_key: str = ""):
        self._source, self._processor = source, processor
        self._memory_bytes, self._folder, self._processor_key = memory_bytes, folder, processor_key
        self._kept: collections.OrderedDict[int, concurrent.futures.Future] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self):
        return _sample_cache, (self._source, self._processor, self._memory_bytes, self._folder, self._processor_key)

    def __getitem__(self, index: int) -> Loaded:
        with self._lock:
            future = self._kept.get(index)
            mine = future is None
            if mine:
                future = self._kept[index] = concurrent.futures.Future()
            self._kept.move_to_end(index)
        if not mine:
            return future.result()
        try:
            loaded = self._load(index)
        except BaseException as error:
            with self._lock:
                del self._kept[index]
            future.set_exception(error)
            raise
        future.set_result(loaded)
        self._make_room(loaded)
        return loaded

    def _make_room(self, loaded: Loaded) -> None:
        with self._lock:
            self._bytes += _size(loaded.sample)
            for index, future in list(self._kept.items()):
                if self._bytes <= self._memory_bytes:
                    break
                if future.done():
                    del self._kept[index]
                    self._bytes -= _size(future.result().sample)

    def _load(self, index: int) -> Loaded:
        record = self._source[index]
        key = sample_key(record, self._processor_key) if self._folder else ""
        path = Path(self._folder) / f"{key}.npz" if key else None
        sample = _read_sample(path) if path else None
        if sample is None:
            try:
                sample = self._processor.sample(record.messages)
            except QwenVLError as error:
                raise DataError(f"{record.where}: {error}") from error
            if path:
                _write_sample(path, sample)
        digest = hashlib.sha256()
        for array in (sample.tokens, sample.targets, sample.loss_weights, *(media.patches for media in sample.media)):
            digest.update(np.ascontiguousarray(array))
        return Loaded(record.id, sample, digest.digest())


def _sample_cache(source, processor, memory_bytes, folder, processor_key) -> SampleCache:
    return SampleCache(source, processor, memory_bytes=memory_bytes, folder=folder, processor_key=processor_key)


class BatchLoader:
    """Makes the batch of a step: `loader(n) -> PlannedBatch`.

    Raises:
      ConfigError: vision rows that do not hold whole merged tokens.
      DataError: (on call) a sample that cannot be processed, or that is not what was measured.
    """

    def __init__(self, plan: Plan, samples: SampleCache, processor):
        self.plan, self.samples = plan, samples
        self._fixed = {
            name: getattr(processor, name) for name in ("pixel_table", "merge_size", "pad_token_id", "patch_dim")
        }
        block = processor.merge_size**2
        if any(length % block for _, length in plan.shape.vision):
            raise ConfigError(f"batch.vision={plan.shape.vision}: patches in a row must be a multiple of {block}.")

    def __call__(self, step: int) -> PlannedBatch:
        rows, digest, tokens = [], hashlib.sha256(), 0
        for row, indices in enumerate(self.plan[step]):
            start, samples = 0, []
            for index in indices:
                loaded = self._checked(index)
                end = start + len(loaded.sample.tokens)
                digest.update(f"{row} {start} {end} {loaded.id}\n".encode() + loaded.digest)
                samples.append(loaded.sample)
                start = end
            tokens += start
            rows.append(samples)
        shape = self.plan.shape
        batch = collate(
            rows,
            length=shape.length,
            groups=shape.groups,
            vision_shape=shape.vision,
            **self._fixed,
        )
        return PlannedBatch(batch, tokens, digest.hexdigest())

    def _checked(self, index: int) -> Loaded:
        loaded, facts = self.samples[index], self.plan.facts[index]
        frames = tuple(h * w for media in loaded.sample.media for t, h, w in [media.grid] for _ in range(t))
        if (len(loaded.sample.tokens), frames) != (facts.tokens, facts.frames):
            raise DataError(
                f"{facts.name} was measured as {facts.tokens} tokens and {len(facts.frames)} frames but came as "
                f"{len(loaded.sample.tokens)} and {len(frames)}; did the file change during the run? Start again."
            )
        return loaded


def batches(loader: BatchLoader, steps: int, *, threads: int = 2, workers: int = 0, prefetch: int = 4):
    """A Grain iterator over the batches of steps 0 to `steps - 1`.

    Its `get_state()` after n batches, handed to `set_state()` of a new one, continues with batch n. The content of the
    batches depends on neither `threads`, `workers` nor `prefetch`.

    Args:
      threads: that make batches, in each process; 0 makes them in the caller's.
      workers: processes; 0 stays in this one. Each has a cache of samples of its own.
      prefetch: batches made ahead, in each process.
    """
    ahead = max(prefetch, threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(steps).map(loader).to_iter_dataset(options)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def _size(sample: Sample) -> int:
    return sum(media.patches.nbytes for media in sample.media) + 40 * len(sample.tokens)


def _write_sample(path: Path, sample: Sample) -> None:
    """Writes a processed sample whole or not at all."""
    arrays = {f.name: getattr(sample, f.name) for f in dataclasses.fields(Sample) if f.name != "media"}
    for i, media in enumerate(sample.media):
        arrays |= {f"{i}.kind": media.kind, f"{i}.patches": media.patches, f"{i}.grid": media.grid}
        arrays[f"{i}.times"] = np.asarray(media.times, np.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)


def _read_sample(path: Path) -> Sample | None:
    """A sample that `_write_sample` wrote; None if there is none or its file is damaged, for it can be made again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            fields = {f.name: arrays[f.name] for f in dataclasses.fields(Sample) if f.name != "media"}
            count = sum(name.endswith(".kind") for name in arrays.files)
            media = tuple(
                Media(
                    kind=str(arrays[f"{i}.kind"]),
                    patches=arrays[f"{i}.patches"],
                    grid=tuple(arrays[f"{i}.grid"].tolist()),
                    times=tuple(arrays[f"{i}.times"].tolist()),
                )
                for i in range(count)
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Sample(**fields, media=media)
