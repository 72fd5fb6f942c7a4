"""Mixtures: several data sets as one stream, videos at frame rates drawn for each sample, within a budget of tokens.

The rule of the budget, for each video that does not set its own: the drawn frame rate is kept and frames get smaller
until each has `min_frame_tokens`; below that, fewer frames are taken. If a sample fits no batch even so, the next lower
rate of the set is taken in its place, and the run says for how many.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwenvl_jax.data.built import with_other_facts
from qwenvl_jax.data.facts import facts_digest, measure_each, sample_key
from qwenvl_jax.data.failure import Failure, check_share
from qwenvl_jax.data.packing import SampleFacts
from qwenvl_jax.data.pooling import MAX_SIDE, METHODS
from qwenvl_jax.data.sources import JoinedSources, Reading, Record, Source, Subset, open_source
from qwenvl_jax.data.stream import Part
from qwenvl_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """A data set of a mixture.

    Attributes:
      name: unique in the mixture; its shuffles follow from the run's seed and this name.
      source: path of a JSONL file, of a folder of `data build` or of tensorflow-datasets, several paths, or an object
        with `__len__` and `__getitem__`.
      weight: its share of the stream, beside the weights of the others.
      final_weight: its weight at the end of the stage, reached in a straight line; None keeps `weight`.
      max_epochs: how often each of its samples is seen at most in the stage; then the others share the rest. None has
        no end.
      max_samples: how many of its records are used, drawn once; None uses all.
      modality: what `modality_weights` call it, such as "text", "image", "video" or "ocr".
      format: of its records, one of those in docs/formats.md; "auto" tells them apart by their keys.
    """

    name: str
    source: Any
    weight: float = 1.0
    final_weight: float | None = None
    max_epochs: float | None = None
    max_samples: int | None = None
    modality: str = ""
    format: str = "auto"

    def __post_init__(self):
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigError(f"part {self.name!r} of the mixture: max_samples={self.max_samples} must be at least 1.")


_CAPS = ("max_video_tokens", "max_frame_tokens", "min_frame_tokens", "max_frames")


@dataclasses.dataclass(frozen=True)
class VideoBudget:
    """What a video of the data takes at most, where its record does not say.

    Attributes:
      max_video_tokens: merged tokens of a video.
      max_frame_tokens: merged tokens of a temporal patch.
      min_frame_tokens: merged tokens of a temporal patch below which fewer frames are taken, not smaller ones; needs
        `max_video_tokens`.
      max_frames: frames of a video.
      pool: side of the cells of merged tokens that become one, 1 for none; caps in tokens count those after it.
      pool_method: "bilinear" or "mean"; see `qwenvl_jax.data.pooling`.
    """

    max_video_tokens: int | None = None
    max_frame_tokens: int | None = None
    min_frame_tokens: int | None = None
    max_frames: int | None = None
    pool: int = 1
    pool_method: Literal["bilinear", "mean"] = "bilinear"

    def __post_init__(self):
        for name in (*_CAPS, "pool"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"video_budget.{name}={value} must be at least 1.")
        if self.pool > MAX_SIDE or self.pool_method not in METHODS:
            raise ConfigError(
                f"video_budget.pool={self.pool} must be at most {MAX_SIDE}, and video_budget.pool_method="
                f"{self.pool_method!r} one of {', '.join(METHODS)}."
            )
        if self.min_frame_tokens and not self.max_video_tokens:
            raise ConfigError("video_budget.min_frame_tokens needs video_budget.max_video_tokens; set both or neither.")
        if self.min_frame_tokens and self.min_frame_tokens > (self.max_video_tokens or 0):
            raise ConfigError("video_budget.min_frame_tokens must be at most video_budget.max_video_tokens.")
        if self.min_frame_tokens and self.max_frame_tokens and self.min_frame_tokens > self.max_frame_tokens:
            raise ConfigError("video_budget.min_frame_tokens must be at most video_budget.max_frame_tokens.")


@dataclasses.dataclass(frozen=True)
class ImageCap:
    """What an image takes at most, where its record gives no bounds in pixels.

    Attributes:
      tokens: merged tokens, before pooling.
      factor: pixels to the side of a merged token.
      merge: patches to its side.
      processor_key: of the processor; see `qwenvl_jax.data.facts.sample_key`.
    """

    tokens: int
    factor: int
    merge: int
    processor_key: str

    def of_record(self, record: Record) -> list[dict[str, Any]]:
        """Its messages, every image bounded; as they are where facts that came with the record say that all fit.

        So a built data set keeps its facts but for the images that are really made smaller.
        """
        images = [part for message in record.messages for part in _parts(message) if _is_image(part)]
        if not any(map(self._bounds, images)):
            return record.messages
        if record.known is not None and record.known[0] == sample_key(record, self.processor_key):
            runs = record.known[1][2]
            if all(patches <= self.tokens * self.merge**2 for patches, _ in runs):
                return record.messages
        return [self._of_message(message) for message in record.messages]

    def _of_message(self, message):
        if not any(map(self._bounds, _parts(message))):
            return message
        pixels = {"max_pixels": self.tokens * self.factor**2}
        return {**message, "content": [part | pixels if self._bounds(part) else part for part in message["content"]]}

    @staticmethod
    def _bounds(part) -> bool:
        return _is_image(part) and part.get("min_pixels") is None and part.get("max_pixels") is None


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Measured parts.

    Attributes:
      source: of the entries: each record of each part that can be used, at each frame rate.
      facts: of each entry.
      parts: the mixture over the entries.
      failures: records that are left out.
      samples: how many records there are, those left out included.
      lowered: how many pairs of a record and a rate got a lower rate, since they fit no batch.
    """

    source: Source
    facts: tuple[SampleFacts, ...]
    parts: tuple[Part, ...]
    failures: tuple[Failure, ...]
    samples: int
    lowered: int

    @property
    def digest(self) -> str:
        """A hash of everything that a plan and its batches follow from, pixels and settings aside."""
        digest = facts_digest(self.facts, self.source)
        tables = [part.entries for part in self.parts]
        if len(tables) == 1 and tables[0].shape[1] == 1:
            return digest
        text = " ".join(f"{part.name} {table.tolist()}" for part, table in zip(self.parts, tables, strict=True))
        return hashlib.sha256(f"{digest} {text}".encode()).hexdigest()


class MixtureReader:
    """Measures mixtures; parts that several stages read alike are measured once.

    Args:
      processor, processor_key: see `qwenvl_jax.data.facts.measure_each`.
      seed: of the run.
    """

    def __init__(self, processor, processor_key: str, seed: int):
        self._processor, self._key, self._seed = processor, processor_key, seed
        self._measured: dict[Any, _Measured] = {}

    def read(
        self,
        parts: Sequence[MixturePart],
        *,
        misfit: Callable[[SampleFacts], str | None],
        max_failed: float = 0.0,
        hms_share: float = 0.0,
        frame_rates: Sequence[float] = (),
        budget: VideoBudget = VideoBudget(),
        max_image_tokens: int | None = None,
        modality_weights: Sequence[tuple[str, float]] = (),
        measure_at_most: int | None = None,
        remote_media: tuple[str, ...] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> Mixture:
        """Reads the parts of a mixture.

        Args:
          misfit: why a sample can stand in no batch, or None.
          max_failed: share of the records of all parts that may be left out.
          hms_share: see `qwenvl_jax.data.sources.Reading`.
          frame_rates: rates that are drawn for videos whose record gives neither a rate nor a number of frames.
          budget: of videos.
          max_image_tokens: see `ImageCap`; None leaves images as they are.
          modality_weights: shares of the modalities, divided among the parts of each by their weights; none leaves the
            weights of the parts as they are.
          measure_at_most: see `at_most` of `qwenvl_jax.data.facts.measure_each`; holds for each part.
          remote_media: beginnings of the addresses that media may be fetched from; see `Processor.from_pretrained`.
          say: told of what takes time, and of what surprises.

        Raises:
          DataError: a part that is missing, or of which nothing can be used; too many records that cannot.
          ConfigError: parts, rates or weights that are none.
        """
        _check(parts, frame_rates)
        weights = _weights(parts, modality_weights)
        sources: list[Source] = []
        facts: list[SampleFacts] = []
        found: list[Part] = []
        failures: list[Failure] = []
        empty: list[tuple[MixturePart, list[Failure]]] = []
        samples, lowered = 0, 0
        processor = self._processor.fetching(remote_media) if remote_media else self._processor
        cap = None
        if max_image_tokens is not None:
            cap = ImageCap(max_image_tokens, processor.image.factor, processor.merge_size, self._key)
        for part, (weight, final) in zip(parts, weights, strict=True):
            measured = self._measure(part, processor, hms_share, tuple(frame_rates), budget, cap, measure_at_most, say)
            table, used, failed, changed = _fitting(measured, misfit)
            failures += failed
            samples += len(measured.table)
            lowered += changed
            if not len(table):
                empty.append((part, failed))
                continue
            sources.append(Subset(measured.source, used))
            found.append(Part(table + len(facts), part.name, weight, final, part.max_epochs))
            facts += [one for i in used if isinstance(one := measured.entries[i], SampleFacts)]
        check_share(failures, samples, max_failed)
        for part, failed in empty:
            told = failed[0].reason if failed else "there are no records"
            raise DataError(f"{told} (no sample of {_called(part)} can be used; mend the data, or leave it out).")
        source = sources[0] if len(sources) == 1 else JoinedSources(sources)
        return Mixture(source, tuple(facts), tuple(found), tuple(failures), samples, lowered)

    def _measure(
        self,
        part: MixturePart,
        processor,
        hms_share: float,
        rates: tuple[float, ...],
        budget: VideoBudget,
        cap: ImageCap | None,
        at_most,
        say,
    ):
        source = part.source
        if not isinstance(source, str | tuple):
            source = tuple(source) if isinstance(source, list) else id(source)
        some = None if part.max_samples is None else (part.max_samples, part.name)
        name = (source, part.format, hms_share, some, rates, budget, cap, processor.opener.remote)
        if name not in self._measured:
            say(f"measuring {_called(part)}")
            reading = Reading.of(processor, format=part.format, hms_share=hms_share, seed=self._seed)
            records = open_source(part.source, reading)
            for folder in with_other_facts(records, self._key):
                say(f"{folder} was built for another processor, so its samples are measured again")
            if part.max_samples is not None and part.max_samples < len(records):
                records = Subset(records, _drawn(len(records), part, self._seed).tolist())
            at_rates = AtRates(records, rates, budget, cap)
            beside = _beside(part.source)
            try:
                entries = measure_each(at_rates, processor, processor_key=self._key, cache=beside, at_most=at_most)
            except DataError as error:
                raise DataError(f"{_called(part)}: {error}") from error
            self._measured[name] = _Measured(at_rates, at_rates.table, entries)
        return self._measured[name]


class AtRates:
    """The records of a source, each at every frame rate that its videos may have: a source of more records.

    Args:
      source: of the records.
      rates: frames per second; none leaves the records as they are.
      budget: of the videos.
      images: what images take at most; None leaves them as they are.

    Attributes:
      table: i64[n, R], for each record of `source` the record here that it is at each rate; the same one where the rate
        changes nothing.
    """

    def __init__(self, source: Source, rates: Sequence[float], budget: VideoBudget, images: ImageCap | None = None):
        self._source, self._rates, self._budget, self._images = source, tuple(rates), budget, images
        counts = [len(rates) if rates and _has_rate(source, i) else 1 for i in range(len(source))]
        begin = np.cumsum([0, *counts])
        places = np.arange(max(1, len(rates)))
        self.table = np.stack([begin[:-1] + np.minimum(n, np.asarray(counts) - 1) for n in places], axis=1)
        self._record = np.repeat(np.arange(len(source)), counts)
        self._rate = np.arange(begin[-1]) - begin[self._record]

    def __len__(self) -> int:
        return len(self._record)

    def __getitem__(self, index: int) -> Record:
        record = self._source[int(self._record[index])]
        rate = self._rates[self._rate[index]] if self._rates else None
        capped = record.messages if self._images is None else self._images.of_record(record)
        messages = [_shown(message, rate, self._budget) for message in capped]
        if messages == record.messages:
            return record
        content = record.content
        if content:
            limits = f"{rate} {self._budget}"
            if capped is not record.messages:
                assert self._images is not None
                limits += f" {self._images.tokens}"
            content = hashlib.sha256(f"{content} {limits}".encode()).hexdigest()
        return dataclasses.replace(record, messages=messages, content=content)


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A part: its records at every rate, the table of `AtRates`, and the facts of each."""

    source: Source
    table: np.ndarray
    entries: tuple[SampleFacts | Failure, ...]


def _check(parts: Sequence[MixturePart], frame_rates: Sequence[float]) -> None:
    names = [part.name for part in parts]
    if len(parts) > 1 and (len(set(names)) < len(names) or not all(names)):
        raise ConfigError(f"the parts of a mixture must have a name each, no two the same; got {names}.")
    if any(not (np.isfinite(rate) and rate > 0) for rate in frame_rates):
        raise ConfigError(f"frame rates must be positive and finite, got {list(frame_rates)}.")


def _weights(parts: Sequence[MixturePart], shares: Sequence[tuple[str, float]]) -> list[tuple[float, float | None]]:
    """Weight and final weight of each part, once the modalities have their shares."""
    given = [(part.weight, part.final_weight) for part in parts]
    if not shares:
        return given
    of = dict(shares)
    modalities = {part.modality for part in parts}
    if len(of) < len(shares) or modalities != of.keys():
        raise ConfigError(
            f"modality_weights must give each modality of the mixture one share: it has {sorted(modalities)}, given "
            f"are {[name for name, _ in shares]}."
        )
    begin = [weight for weight, _ in given]
    end = [weight if final is None else final for weight, final in given]
    found = []
    for i, part in enumerate(parts):
        mates = [mate for mate, other in enumerate(parts) if other.modality == part.modality]
        first, last = (
            of[part.modality] * weights[i] / total if (total := sum(weights[mate] for mate in mates)) else 0.0
            for weights in (begin, end)
        )
        found.append((first, None if first == last else last))
    return found


def _fitting(
    measured: _Measured, misfit: Callable[[SampleFacts], str | None]
) -> tuple[np.ndarray, list[int], list[Failure], int]:
    """The table of the records that fit, over the entries that are used; those entries; the other records; and how
    many pairs of record and rate got another rate.
    """
    problems = [one if isinstance(one, Failure) else _failure(one, misfit(one)) for one in measured.entries]
    rows, failures, lowered = [], [], 0
    for row in measured.table.tolist():
        fitting = [place for place, entry in enumerate(row) if problems[entry] is None]
        if not fitting:
            first = problems[row[0]]
            assert first is not None
            failures.append(first)
            continue
        # The next lower rate that fits; where there is none, the lowest that does.
        chosen = [row[max((f for f in fitting if f <= place), default=fitting[0])] for place in range(len(row))]
        lowered += sum(entry != other for entry, other in zip(row, chosen, strict=True))
        rows.append(chosen)
    used = sorted({entry for row in rows for entry in row})
    table = np.searchsorted(used, np.asarray(rows, np.int64).reshape(len(rows), measured.table.shape[1]))
    return table, used, failures, lowered


def _failure(facts: SampleFacts, problem: str | None) -> Failure | None:
    return None if problem is None else Failure(facts.name, f"{facts.name} {problem}".rstrip("."))


def _has_rate(source: Source, index: int) -> bool:
    """Whether a record has a video that a frame rate would change; one that cannot be read has none."""
    try:
        messages = source[index].messages
    except DataError:
        return False
    return any(_takes_rate(part) for message in messages for part in _parts(message))


def _parts(message) -> list:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _is_image(part) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _is_file(part) -> bool:
    """Whether frames are chosen out of this part, a video file."""
    return isinstance(part, dict) and part.get("type") == "video" and isinstance(part.get("video"), str | Path | bytes)


def _takes_rate(part) -> bool:
    given = [key for key in ("fps", "num_frames") if _is_file(part) and part.get(key) is not None]
    return _is_file(part) and not given and part.get("sampler") in (None, "uniform")


def _shown(message, rate: float | None, budget: VideoBudget):
    """A message whose videos have this rate and budget where they set none."""
    if not any(_is_file(part) for part in _parts(message)):
        return message
    return {**message, "content": [_with_limits(part, rate, budget) for part in message["content"]]}


def _with_limits(part, rate: float | None, budget: VideoBudget):
    if not _is_file(part):
        return part
    limits: dict[str, Any] = {name: value for name in _CAPS if (value := getattr(budget, name)) is not None}
    bounded = any(part.get(key) is not None for key in ("min_pixels", "max_pixels", "max_frame_tokens"))
    if bounded or part.get("max_video_tokens") is not None:
        # It says how large it is: in pixels, which go with no bound in tokens, or in tokens.
        limits = {"max_frames": budget.max_frames} if budget.max_frames else {}
    if part.get("num_frames") is not None or part.get("sampler") in ("count", "timestamps"):
        limits = {key: value for key, value in limits.items() if key not in ("max_frames", "min_frame_tokens")}
    elif part.get("max_frames") is not None or part.get("min_frames") is not None:
        limits.pop("max_frames", None)
    if rate is not None and _takes_rate(part):
        limits["fps"] = rate
    if budget.pool > 1 and part.get("pool") is None:
        limits |= {"pool": budget.pool, "pool_method": budget.pool_method}
    return {**part, **limits}


def _drawn(count: int, part: MixturePart, seed: int) -> np.ndarray:
    """The records that are used of a part, in order."""
    key = [seed, zlib.crc32(f"{part.name} records".encode())]
    return np.sort(np.random.Generator(np.random.Philox(key=key)).permutation(count)[: part.max_samples])


def _called(part: MixturePart) -> str:
    if part.name:
        return f"part {part.name!r} of the mixture"
    return f"{part.source}" if isinstance(part.source, str | Path) else "the data"


def _beside(source) -> Path | None:
    """Where the facts of a data file are kept: beside it; those of several files beside the first."""
    if isinstance(source, tuple | list) and source:
        source = source[0]
    return Path(source) if isinstance(source, str | Path) else None
