"""From a plan to batches: Grain over the steps of the plan, a cache of decoded samples, a hash of each batch.

    plan[n] -> samples (media decoded once, kept) -> collate -> Batch      by Grain's threads or worker processes

A batch follows from the number of its step alone, so a run that goes on begins at that number, with as many threads and
workers as it likes, and reads no sample that it does not need.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.classes import classes_of
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.facts import file_state
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.ffmpeg_child import EndedError
from qwenvl_jax.data.files import is_remote, written_whole
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packing import Plan
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.data.sources import Source
from qwenvl_jax.data.supervised import Supervised, end_with_parent
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError, SourceError
from qwenvl_jax.flops import Work

_NAMED = 20  # samples that an error names
_log = logging.getLogger(__name__)
# Folders of decoded media that could not be written, each told once in a process.
_unwritten: set[Path] = set()
_telling = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A processed sample.

    Attributes:
      id: its name.
      sample: tokens and patches.
      digest: sha256 of its tokens, targets, weights and pixels, and how they are pooled.
    """

    id: str
    sample: Sample
    digest: bytes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["batch"],
    meta_fields=["tokens", "row_hashes", "failed", "state", "work"],
)
@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A batch of the plan, or the part of one that a host makes.

    Attributes:
      batch: NumPy arrays of the plan's shape, or of the host's rows and groups.
      tokens: slots that hold a token, padding left out.
      row_hashes: sha256, in hex, for each row over span, name, tokens and pixels of its samples in order.
      failed: planned samples that are not in it, since they could not be made.
      state: what the plan goes on from after it, as JSON; see `qwenvl_jax.data.packing.Plan.state`.
      work: what a step over it costs follows from this.
    """

    batch: Batch
    tokens: int
    row_hashes: tuple[str, ...]
    failed: tuple[Failure, ...] = ()
    state: str = ""
    work: Work = dataclasses.field(default_factory=Work)

    @property
    def hash(self) -> str:
        """sha256, in hex, over all that is in the batch; see `batch_hash`."""
        return batch_hash(self.row_hashes)


def batch_hash(row_hashes: Iterable[str]) -> str:
    """The hash of a batch out of those of its rows; of several hosts, those of one after those of the other."""
    return hashlib.sha256("".join(row_hashes).encode()).hexdigest()


class SampleCache:
    """Processed samples by number. Tokens and decoded media are kept apart, so that records that show the same clip in
    the same way, of this source or of another that shares `kept`, share its patches.

    Args:
      source: of the records.
      processor: its `sample(conversation, read=..., **options)` makes a `Sample`.
      kept: what keeps them, as far as they fit.
      folder: where decoded media are kept across runs, one file each; None keeps none. That it cannot be written is
        told once, and costs no sample.
      processor_key: a hash of the processor's settings, part of those files' names.
    """

    def __init__(self, source: Source, processor, *, kept: Kept, folder=None, processor_key: str = ""):
        self._source, self._processor, self._kept = source, processor, kept
        self._folder, self._processor_key = Path(folder) if folder else None, processor_key

    def __getitem__(self, index: int) -> Loaded:
        found: list[np.ndarray] = []

        def make() -> tuple[Loaded, list[str]]:
            loaded, keys, patches = self._load(index)
            found.extend(patches)
            return loaded, keys

        loaded, keys = self._kept.get((id(self), index), make, lambda made: 1000 + 40 * len(made[0].sample.tokens))
        patches = found or [self._kept.peek(key) for key in keys]
        if any(array is None for array in patches):
            _, _, patches = self._load(index)
        media = tuple(
            dataclasses.replace(medium, patches=array)
            for medium, array in zip(loaded.sample.media, patches, strict=True)
        )
        return dataclasses.replace(loaded, sample=dataclasses.replace(loaded.sample, media=media))

    def _load(self, index: int) -> tuple[Loaded, list[str], list[np.ndarray]]:
        """A sample whose media have no patches, and the keys and patches of its media."""
        record = self._source[index]
        keys: list[str] = []
        patches: list[np.ndarray] = []

        def read(part: dict, decode: Callable[[], np.ndarray]) -> np.ndarray:
            key = _media_key(part, self._processor_key)
            # Media in memory belong to their record alone.
            keys.append(key or f"{id(self)} {index} {len(keys)}")
            path = self._folder / f"{key}.npy" if self._folder and key and self._processor_key else None
            make = functools.partial(_on_disk, path, decode) if path else decode
            patches.append(self._kept.get(keys[-1], make, lambda array: array.nbytes))
            return patches[-1][:0]

        try:
            if record.fetch is not None:
                record.fetch()
            make = functools.partial(self._processor.sample, record.messages, read=read, **record.options)
            try:
                sample = make()
            except EndedError:  # with the run, perhaps, which saves first and may want this sample for that
                del keys[:], patches[:]
                sample = make()
        except SourceError:  # no fault of the sample
            raise
        except (QwenVLError, OSError) as error:  # a file that has gone, too
            raise DataError(f"{record.where}: {error}") from error
        digest = hashlib.sha256()
        for array in (sample.tokens, sample.targets, sample.loss_weights, *patches):
            digest.update(np.ascontiguousarray(array).data)
        pools = [medium.pool for medium in sample.media]
        if any(pools):
            digest.update(repr(pools).encode())
        return Loaded(record.id, sample, digest.digest()), keys, patches


def _media_key(part: dict, processor_key: str) -> str:
    """What identifies the patches of an image or a video: the file's state and how it is shown; "" if no file here."""
    if not isinstance(part[part["type"]], str | os.PathLike) or is_remote(part[part["type"]]):
        return ""
    path = os.fspath(part[part["type"]])
    shown = {name: value for name, value in part.items() if name != part["type"]}
    text = (
        f"{processor_key} {os.path.abspath(path)} {file_state(path)} {json.dumps(shown, sort_keys=True, default=repr)}"
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _on_disk(path: Path, decode: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file; decoded, and written whole or not at all, if it is missing or damaged.

    A file that cannot be written is told, and the array is none the worse.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        array = decode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            np.save(file, array)
    except OSError as error:
        _tell_unwritten(path.parent, error)
    return array


def _tell_unwritten(folder: Path, error: OSError) -> None:
    with _telling:
        if folder in _unwritten:
            return
        _unwritten.add(folder)
    _log.warning(
        "data.cache_dir=%s cannot be written (%s): media that it lacks are decoded each time they are wanted; make "
        "room or give leave there.",
        folder,
        error.strerror or error,
    )


class BatchLoader:
    """Makes the batch of a step, or a host's part of it: `loader(n) -> PlannedBatch`.

    Each host makes the rows, and the vision groups, that follow those of the host before, as arrays sharded over hosts
    are laid out; together they are the batch that one host alone would make.

    A sample that cannot be made, or that is not what was measured, is told in `failed`. Its tokens are missing from the
    row, and its frames are black: so the others lie where the plan knows that they fit.

    Args:
      plan: of the whole batches.
      samples: the data.
      processor: that makes the samples.
      host, hosts: number of this host, from 0, and how many there are.
      vision_multiple: of which the vision rows of each bucket of a group are in the batches, for devices that share
        them: the plan's, and empty ones. What stands in the others does not depend on it.

    Attributes:
      classes: of the samples, in the order of their numbers in `Batch.classes`, which count from 1.

    Raises:
      ConfigError: vision rows that do not hold whole merged tokens; rows or groups that do not divide among the hosts.
    """

    def __init__(
        self,
        plan: Plan,
        samples: SampleCache,
        processor,
        *,
        host: int = 0,
        hosts: int = 1,
        vision_multiple: int = 1,
    ):
        if not 0 <= host < hosts:
            raise ConfigError(f"host={host} must be from 0 to {hosts - 1}, since there are hosts={hosts}.")
        grouped = bool(plan.shape.buckets)  # groups are of vision rows
        for name in ("rows", "groups") if grouped else ("rows",):
            if getattr(plan.shape, name) % hosts:
                raise ConfigError(
                    f"batch.{name}={getattr(plan.shape, name)} must be a multiple of the {hosts} hosts that read data."
                )
        per_host = plan.shape.rows // hosts
        self._rows = range(host * per_host, (host + 1) * per_host)
        self._groups = plan.shape.groups // hosts if grouped else 1
        self.plan, self.samples = plan, samples
        self.classes, self._class_of = classes_of(plan)
        names = ("pixel_table", "merge_size", "pad_token_id", "patch_dim", "window")
        self._fixed = {name: getattr(processor, name) for name in names} | {"vision_multiple": vision_multiple}
        block = processor.merge_size**2
        if any(length % block for _, length in plan.shape.buckets):
            raise ConfigError(f"batch.vision={plan.shape.vision}: patches in a row must be a multiple of {block}.")

    def over(self, plan: Plan, samples: SampleCache) -> "BatchLoader":
        """A loader of other data for the same host; the shape of the batches is the same."""
        other = copy.copy(self)
        other.plan, other.samples = plan, samples
        other.classes, other._class_of = classes_of(plan)
        return other

    def __call__(self, step: int) -> PlannedBatch:
        rows, classes, hashes, tokens, failed = [], [], [], 0, []
        planned = self.plan[step]
        for row in self._rows:
            start, samples, digest = 0, [], hashlib.sha256()
            for index in planned[row]:
                try:
                    loaded = self._checked(index)
                except SourceError:
                    raise
                except QwenVLError as error:
                    failed.append(Failure(self.plan.facts[index].name, str(error)))
                    digest.update(f"{start} failed {self.plan.facts[index].name}\n".encode())
                    samples.append(self._black(index))
                    continue
                end = start + len(loaded.sample.tokens)
                digest.update(f"{start} {end} {loaded.id}\n".encode() + loaded.digest)
                samples.append(loaded.sample)
                start = end
            tokens += start
            rows.append(samples)
            classes.append(self._class_of[list(planned[row])].tolist())
            hashes.append(digest.hexdigest())
        shape = self.plan.shape
        batch = collate(
            rows,
            length=shape.length,
            groups=self._groups,
            vision_shape=shape.buckets,
            pool_taps=shape.pool_taps,
            classes=classes,
            **self._fixed,
        )
        state = json.dumps(self.plan.state(step + 1))
        return PlannedBatch(batch, tokens, tuple(hashes), tuple(failed), state, Work.of(batch))

    def _black(self, index: int) -> Sample:
        """A sample of no token with black frames of the sizes that were measured."""
        m, dim = self._fixed["merge_size"], self._fixed["patch_dim"]
        grids = [(1, m, patches // m) for patches in self.plan.facts[index].frames]
        media = tuple(Media("image", np.zeros((h * w, dim), np.uint8), (1, h, w)) for _, h, w in grids)
        none = np.empty(0, np.int32)
        return Sample(none, np.empty((0, 3), np.int32), none, np.empty(0, np.float32), none, media)

    def _checked(self, index: int) -> Loaded:
        loaded, facts = self.samples[index], self.plan.facts[index]
        frames = tuple(h * w for media in loaded.sample.media for t, h, w in [media.grid] for _ in range(t))
        if (len(loaded.sample.tokens), frames) != (facts.tokens, facts.frames):
            raise DataError(
                f"{facts.name} was measured as {facts.tokens} tokens and {len(facts.frames)} frames but came as "
                f"{len(loaded.sample.tokens)} and {len(frames)}; did the file change during the run? Start again."
            )
        return loaded


def batches(
    loader: BatchLoader,
    steps: int,
    *,
    first: int = 0,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
    worker_timeout: float = 600.0,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[PlannedBatch]:
    """An iterator over the batches of steps `first` to `steps - 1`; close it, or take all of them, to end its workers.

    The content of the batches depends on neither `first`, `threads`, `workers` nor `prefetch`.

    Args:
      threads: that make batches, in each process; 0 makes them in the caller's.
      workers: processes; 0 stays in this one. Each has a cache of samples of its own. One that dies or hangs is
        replaced (`qwenvl_jax.data.supervised`).
      prefetch: batches made ahead, in each process.
      worker_timeout: seconds without a batch after which workers count as hung.
      say: told when workers are replaced.
    """
    ahead = max(prefetch, threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    if not workers:
        return iter(grain.MapDataset.range(first, steps).map(loader).to_iter_dataset(options))
    # Grain's workers read absl's flags, which a program that has its own command line never parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def begin(step: int, end: int, state: str) -> Iterator[PlannedBatch]:
        if state:
            loader.plan.resume(json.loads(state))  # the workers plan on from there
        dataset = grain.MapDataset.range(step, end).map(loader).to_iter_dataset(options)
        processes = grain.MultiprocessingOptions(num_workers=min(workers, end - step))
        return iter(dataset.mp_prefetch(processes, worker_init_fn=end_with_parent))

    def describe(step: int) -> str:
        names = [loader.plan.facts[entry].name for row in loader.plan[step] for entry in row]
        more = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more

    return Supervised(
        begin, first, steps, timeout=worker_timeout, remember=lambda planned: planned.state, describe=describe, say=say
    )
