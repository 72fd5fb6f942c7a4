"""The plan: which samples stand in which row of which step.

The rows of step n are a pure function of the facts about the data (tokens and frame sizes of each sample), the batch
shape, the seed and n. Neither the number of hosts or workers nor the point of a resume enters, so a run that was
stopped sees what it would have seen.

The samples form an endless stream, epoch after epoch, each epoch shuffled by its own seed. A step takes the next
`window` samples of the stream and lays them, oldest first, into B rows of T slots: each goes to the row that it fills
best, among the rows of the vision group with the fewest patches. What does not fit waits, at the head of the stream,
for the next step; the oldest sample always finds an empty row, so none waits for ever. Every step has the same shapes:

    step n     row 0 | c c c c a a a . |     group 0 | patches of c, a |
               row 1 | f f f f f b b b |     group 1 | patches of f, b |
"""

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.errors import ConfigError, DataError

VisionShape = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of every batch of a stage.

    Attributes:
      rows: B, rows of tokens in a step.
      length: T, token slots in a row.
      groups: G, vision groups; the rows are divided evenly among them, in order.
      vision: for each length bucket (R, L): vision rows in a group, patch slots in a row. Empty for text alone.
    """

    rows: int = 8
    length: int = 1024
    groups: int = 1
    vision: VisionShape = ()

    def __post_init__(self):
        for name in ("rows", "length", "groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch.{name}={getattr(self, name)} must be at least 1.")
        if self.rows % self.groups:
            raise ConfigError(f"batch.rows={self.rows} must be a multiple of batch.groups={self.groups}.")
        if any(len(bucket) != 2 or min(bucket) < 1 for bucket in self.vision):
            raise ConfigError(f"batch.vision={self.vision} must be pairs (rows, patches in a row), each at least 1.")


@dataclasses.dataclass(frozen=True)
class SampleFacts:
    """What the plan knows of a sample, without its pixels.

    Attributes:
      name: how errors call it.
      tokens: token slots that it takes.
      frames: patches of each frame (image, or temporal patch of a video), in order.
      loss_tokens: how many of its targets are learnt.
    """

    name: str
    tokens: int
    frames: tuple[int, ...] = ()
    loss_tokens: int = 1


def frames_fit(counts: Mapping[int, int], vision: VisionShape) -> bool:
    """Whether frames can be laid whole into the vision rows of one group by the rule of `collate.place_frames`.

    That is: longest first, each into the fullest row that still holds it, of the shortest rows that can. So the answer
    depends on how many frames of each size there are and not on their order, and equal frames fill row after row.

    Args:
      counts: how many frames there are of each number of patches.
      vision: the buckets (R, L) of a group.
    """
    buckets = [[length] * rows for length, rows in sorted((length, rows) for rows, length in vision)]
    for size in sorted(counts, reverse=True):
        left = counts[size]
        for free in buckets:
            for row in sorted(range(len(free)), key=free.__getitem__):
                here = min(left, free[row] // size)
                free[row] -= here * size
                left -= here
            if not left:
                break
        if left:
            return False
    return True


def check_fits(facts: Iterable[SampleFacts], shape: BatchShape) -> None:
    """Refuses data of which a sample can never stand in a batch of this shape, or has nothing to learn.

    Raises:
      DataError: names the first such sample, how many there are, and what to change.
    """
    problems = []
    for sample in facts:
        problem = misfit(sample, shape)
        if problem:
            problems.append(f"{sample.name} {problem}")
    if problems:
        more = f" ({len(problems) - 1} more samples do not fit either)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)


def misfit(sample: SampleFacts, shape: BatchShape) -> str | None:
    """Why a sample can never stand in a batch of this shape, or has nothing to learn; None if it can and has."""
    if sample.tokens > shape.length:
        return (
            f"has {sample.tokens} tokens, but a row has batch.length={shape.length}; raise batch.length, or take "
            "fewer frames or pixels of it."
        )
    if not sample.loss_tokens:
        return "teaches nothing: no token of it is the assistant's; give it an assistant turn, or remove it."
    if not sample.frames:
        return None
    if not shape.vision:
        return "has images or videos, but batch.vision is empty; give it pairs (rows, patches in a row)."
    longest = max(length for _, length in shape.vision)
    if max(sample.frames) > longest:
        return (
            f"has a frame of {max(sample.frames)} patches, but the longest vision row of batch.vision has {longest}; "
            "add a longer bucket, or take fewer pixels."
        )
    if not frames_fit(collections.Counter(sample.frames), shape.vision):
        return (
            f"has {len(sample.frames)} frames of {sum(sample.frames)} patches together, more than the "
            f"batch.vision={shape.vision} of a group holds; add vision rows, or take fewer frames or pixels."
        )
    return None


class Plan:
    """The rows of each step: `plan[n]` is B tuples of sample numbers, in the order in which they stand in the row.

    Steps are planned in order as they are asked for and remembered, so a plan asked for step n alone equals one asked
    for all; asking far ahead costs the planning of the steps between. Safe to use from
    several threads.

    Args:
      facts: of every sample of the data.
      shape: of the batches.
      seed: of the shuffles.
      window: how many samples of the stream a step may choose from; 0 takes four for each row.
      shuffle: whether an epoch is shuffled; else it has the order of the data.

    Raises:
      DataError: no samples, or samples that can never fit.
    """

    def __init__(
        self, facts: Sequence[SampleFacts], shape: BatchShape, *, seed: int, window: int = 0, shuffle: bool = True
    ):
        if not facts:
            raise DataError("the data has no samples; give at least one conversation.")
        check_fits(facts, shape)
        self.facts, self.shape = tuple(facts), shape
        self._options: dict[str, Any] = {"seed": seed, "window": window, "shuffle": shuffle}
        self._stream = _endless(len(self.facts), seed, shuffle)
        self._window = window or 4 * shape.rows
        self._waiting: list[int] = []
        self._steps: list[tuple[tuple[int, ...], ...]] = []
        self._lock = threading.Lock()

    def __reduce__(self):
        # A worker process plans for itself: the plan is a function of its arguments.
        return functools.partial(Plan, **self._options), (self.facts, self.shape)

    def __getitem__(self, step: int) -> tuple[tuple[int, ...], ...]:
        with self._lock:
            while len(self._steps) <= step:
                self._waiting += itertools.islice(self._stream, self._window - len(self._waiting))
                rows = _StepRows(self.shape)
                self._waiting = [i for i in self._waiting if not rows.place(i, self.facts[i])]
                self._steps.append(tuple(tuple(row) for row in rows.samples))
            return self._steps[step]


class _StepRows:
    """The rows of one step while samples are laid into them."""

    def __init__(self, shape: BatchShape):
        self.samples: list[list[int]] = [[] for _ in range(shape.rows)]
        self._left = [shape.length] * shape.rows
        self._vision = shape.vision
        self._room = sum(rows * length for rows, length in shape.vision)
        self._patches = [0] * shape.groups
        self._frames: list[collections.Counter[int]] = [collections.Counter() for _ in range(shape.groups)]
        self._rows_in_group = shape.rows // shape.groups

    def place(self, index: int, facts: SampleFacts) -> bool:
        """Puts a sample where it fits best; False if it fits nowhere."""
        rows = [row for row, left in enumerate(self._left) if facts.tokens <= left]
        group_of = self._rows_in_group
        if not facts.frames:
            rows.sort(key=lambda row: self._left[row])
        else:
            rows.sort(key=lambda row: (self._patches[row // group_of], self._left[row]))
        full = set()
        for row in rows:
            group = row // group_of
            if group in full:
                continue
            if not self._add_frames(group, facts):
                full.add(group)
                continue
            self._left[row] -= facts.tokens
            self.samples[row].append(index)
            return True
        return False

    def _add_frames(self, group: int, facts: SampleFacts) -> bool:
        if not facts.frames:
            return True
        together = self._frames[group] + collections.Counter(facts.frames)
        patches = self._patches[group] + sum(facts.frames)
        if patches > self._room or not frames_fit(together, self._vision):
            return False
        self._frames[group], self._patches[group] = together, patches
        return True


def _endless(count: int, seed: int, shuffle: bool) -> Iterator[int]:
    """Sample numbers, epoch after epoch, each in an order drawn from (seed, epoch)."""
    for epoch in itertools.count():
        if shuffle:
            yield from np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count).tolist()
        else:
            yield from range(count)
