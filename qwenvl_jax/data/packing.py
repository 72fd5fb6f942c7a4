"""The plan: which samples stand in which row of which step.

The rows of step n are a pure function of the facts about the data (tokens and frame sizes of each sample), the mixture,
the batch shape, the seed and n. Neither the number of hosts or workers nor the point of a resume enters, so a run that
was stopped sees what it would have seen.

The samples form an endless stream (`qwenvl_jax.data.stream`), of which a window waits to be laid into B rows of T
slots. A step takes from it, in this order: what has waited for `PATIENCE` steps; samples with images or videos, those
with the most patches first; text, the longest first. Each goes to the row that it fills best, among the rows of the
vision group with the fewest patches. What does not fit waits on; the oldest sample always finds an empty row, so none
waits for ever. Every step has the same shapes:

    step n     row 0 | c c c c a a a . |     group 0 | patches of c, a |
               row 1 | f f f f f b b b |     group 1 | patches of f, b |
"""

import collections
import copy
import dataclasses
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from qwenvl_jax.data.laying import Frames, frames_fit, lay_samples
from qwenvl_jax.data.stream import Part, Stream, WeighBy, one_part
from qwenvl_jax.errors import ConfigError, DataError

# Steps that a sample waits at most while others that fill the rows better go before it.
PATIENCE = 3
# A step chooses from samples that would fill as many steps.
_STEPS_AHEAD = 4
# How much more than the mean a step may take of the patches that wait.
_HASTE = 1.1
# Steps remembered, each with the state that the next one follows from.
_REMEMBERED = 256
_KEPT_PLACES = 1024  # steps between places that are kept for good

Modality = Literal["text", "image", "video"]
VisionShape = tuple[tuple[int, int], ...]
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of every batch of a stage.

    Attributes:
      rows: B, rows of tokens in a step.
      length: T, token slots in a row.
      groups: G, vision groups; the rows are divided evenly among them, in order.
      vision: for each length bucket (R, L): vision rows in a group, patch slots in a row. Empty for text alone; "auto"
        lets `qwenvl_jax.data.buckets` choose rows for the data.
      pool_taps: Q, merged tokens that a pooled token is made of at most: 4 for "bilinear", p*p for "mean". 0 for data
        without pooling. It stands in every batch, so that all have one shape.
    """

    rows: int = 8
    length: int = 1024
    groups: int = 1
    vision: VisionShape | Literal["auto"] = ()
    pool_taps: int = 0

    def __post_init__(self):
        for name in ("rows", "length", "groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch.{name}={getattr(self, name)} must be at least 1.")
        if self.pool_taps < 0:
            raise ConfigError(f"batch.pool_taps={self.pool_taps} must be 0 or more.")
        if self.rows % self.groups:
            raise ConfigError(f"batch.rows={self.rows} must be a multiple of batch.groups={self.groups}.")
        if self.vision == AUTO:
            return
        if any(isinstance(bucket, str) or len(bucket) != 2 or min(bucket) < 1 for bucket in self.vision):
            raise ConfigError(
                f'batch.vision={self.vision} must be pairs (rows, patches in a row), each at least 1, or "{AUTO}".'
            )

    @property
    def buckets(self) -> VisionShape:
        """`vision`, once it is chosen."""
        if isinstance(self.vision, str):
            raise ConfigError(f'batch.vision="{self.vision}" is not chosen yet; see `qwenvl_jax.data.buckets`.')
        return self.vision


@dataclasses.dataclass(frozen=True)
class SampleFacts:
    """What the plan knows of a sample, without its pixels.

    Attributes:
      name: how errors call it.
      tokens: token slots that it takes.
      frames: patches of each frame (image, or temporal patch of a video), in order.
      loss_tokens: how many of its targets are learnt.
      pool_taps: merged tokens that a pooled token of it is made of at most; 0 without pooling.
      modality: "video" of a sample with a video, else "image" of one with an image, else "text".
    """

    name: str
    tokens: int
    frames: tuple[int, ...] = ()
    loss_tokens: int = 1
    pool_taps: int = 0
    modality: Modality = "text"


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
    if sample.pool_taps > shape.pool_taps:
        return (
            f"has images or videos pooled from {sample.pool_taps} merged tokens to one, but batch.pool_taps="
            f"{shape.pool_taps}; raise batch.pool_taps, or pool less."
        )
    if not sample.frames or shape.vision == AUTO:
        return None
    if not shape.buckets:
        return "has images or videos, but batch.vision is empty; give it pairs (rows, patches in a row)."
    longest = max(length for _, length in shape.buckets)
    if max(sample.frames) > longest:
        return (
            f"has a frame of {max(sample.frames)} patches, but the longest vision row of batch.vision has {longest}; "
            "add a longer bucket, or take fewer pixels."
        )
    if not frames_fit(collections.Counter(sample.frames), shape.buckets):
        return (
            f"has {len(sample.frames)} frames of {sum(sample.frames)} patches together, more than the "
            f"batch.vision={shape.vision} of a group holds; add vision rows, or take fewer frames or pixels."
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Step:
    """A planned step.

    Attributes:
      rows: the entries of each row, in order.
      after: how the plan goes on from it.
    """

    rows: tuple[tuple[int, ...], ...]
    after: "_Place"


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """Where a plan stands before a step.

    Attributes:
      step: number of the step.
      waiting: i64[n], entries that were drawn and not laid yet, in order.
      since: i64[n], the step at which each was drawn, rising.
      stream: state of the stream.
    """

    step: int
    waiting: np.ndarray
    since: np.ndarray
    stream: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        lists = {"waiting": self.waiting.tolist(), "since": self.since.tolist()}
        return {"step": self.step, **lists, "stream": self.stream}

    @classmethod
    def of_json(cls, state: dict[str, Any]) -> "_Place":
        """From plain values."""
        waiting, since = (np.asarray(state[name], np.int64) for name in ("waiting", "since"))
        return cls(state["step"], waiting, since, state["stream"])


def fill(plan: "Plan", steps: Iterable[int]) -> tuple[float, float]:
    """Shares of the token slots and of the patch slots of some steps that hold something.

    Steps without images and videos are left out of the second, which is 1 where there is none with them.
    """
    shape, tokens, patches, with_vision = plan.shape, 0, 0, 0
    slots = shape.groups * sum(rows * length for rows, length in shape.buckets)
    steps = list(steps)
    for step in steps:
        entries = [entry for row in plan[step] for entry in row]
        tokens += sum(plan.facts[entry].tokens for entry in entries)
        here = sum(sum(plan.facts[entry].frames) for entry in entries)
        patches += here
        with_vision += here > 0
    return tokens / (len(steps) * shape.rows * shape.length), patches / (with_vision * slots) if with_vision else 1.0


class Plan:
    """The rows of each step: `plan[n]` is B tuples of sample numbers, in the order in which they stand in the row.

    Steps are planned in order as they are asked for, so a plan asked for step n alone equals one asked for all; asking
    far ahead costs the planning of the steps between, unless a state near there is given. The last steps asked for are
    remembered, however long the run. Safe to use from several threads.

    Args:
      facts: of every sample of the data, at every frame rate.
      shape: of the batches.
      seed: of the shuffles.
      window: how many samples of the stream a step chooses from; 0 takes as many as would fill four steps, and at least
        four for each row.
      shuffle: whether an epoch is shuffled; else it has the order of the data, and steps keep to it as far as samples
        fit.
      parts: of the mixture, over `facts`; None is a single part.
      rate_weights, weigh_by: see `qwenvl_jax.data.stream.Stream`.
      steps: of the stage, over which weights change from the first to the last; 0 where none do.
      state: of a plan of the same arguments, to go on from; see `state`.

    Raises:
      DataError: no samples, or samples that can never fit; a step after the end of the mixture, once it is asked for.
      ConfigError: weights of the mixture that are no shares.
    """

    def __init__(
        self,
        facts: Sequence[SampleFacts],
        shape: BatchShape,
        *,
        seed: int,
        window: int = 0,
        shuffle: bool = True,
        parts: Sequence[Part] | None = None,
        rate_weights: Sequence[float] = (1.0,),
        weigh_by: WeighBy = "samples",
        steps: int = 0,
        state: dict[str, Any] | None = None,
    ):
        if not facts:
            raise DataError("the data has no samples; give at least one conversation.")
        check_fits(facts, shape)
        self.facts, self.shape = tuple(facts), shape
        self.parts = tuple(one_part(len(facts)) if parts is None else parts)
        self._options: dict[str, Any] = {
            "seed": seed,
            "window": window,
            "shuffle": shuffle,
            "parts": self.parts,
            "rate_weights": tuple(rate_weights),
            "weigh_by": weigh_by,
            "steps": steps,
        }
        self._tokens = np.asarray([one.tokens for one in facts], np.int64)
        self._patches = np.asarray([sum(one.frames) for one in facts], np.int64)
        self._frames = Frames([one.frames for one in facts])
        self._stream = Stream(
            self.parts, self._tokens, seed=seed, shuffle=shuffle, rate_weights=rate_weights, weigh_by=weigh_by
        )
        self._window, self._length = window, steps
        none = np.empty(0, np.int64)
        self._next = _Place(0, none, none, self._stream.state)
        self._places = {0: self._next}
        self._recent: collections.OrderedDict[int, _Step] = collections.OrderedDict()
        self._lock = threading.Lock()
        if state is not None:
            self.resume(state)

    def __reduce__(self):
        # A worker process plans for itself, from here on: the plan is a function of its arguments.
        with self._lock:
            return functools.partial(Plan, **self._options, state=self._next.to_json()), (self.facts, self.shape)

    def reshaped(self, shape: BatchShape) -> "Plan":
        """The plan of the same samples from its beginning, in a shape that is known to hold each of them."""
        other = copy.copy(self)
        other.shape, other._lock, other._stream = shape, threading.Lock(), copy.deepcopy(self._stream)
        other._next, other._recent = self._places[0], collections.OrderedDict()
        other._places = {0: other._next}
        return other

    def __getitem__(self, step: int) -> tuple[tuple[int, ...], ...]:
        return self._planned(step).rows

    def rows_after(self, state: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
        """The step that follows from a `state`: `self[state["step"]]`, but no step before it is planned for that."""
        with self._lock:
            if state["step"] in self._recent:
                return self._recent[state["step"]].rows
            return self._plan(_Place.of_json(state)).rows

    def state(self, step: int) -> dict[str, Any]:
        """What a plan goes on from after its first `step` steps; plain values, for JSON."""
        return (self._planned(step - 1).after if step else self._places[0]).to_json()

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a state that a plan of the same arguments had, so that its steps are not planned once more."""
        with self._lock:
            self._next = self._places[state["step"]] = _Place.of_json(state)

    def _planned(self, step: int) -> _Step:
        with self._lock:
            if step in self._recent:
                return self._recent[step]
            if step < self._next.step:
                self._next = self._places[max(begin for begin in self._places if begin <= step)]
            while True:
                number = self._next.step
                planned = self._plan(self._next)
                self._recent[number], self._next = planned, planned.after
                self._recent.move_to_end(number)
                if len(self._recent) > _REMEMBERED:
                    self._recent.popitem(last=False)
                if (number + 1) % _KEPT_PLACES == 0:
                    self._places[number + 1] = planned.after
                if number == step:
                    return planned

    def _plan(self, place: _Place) -> _Step:
        """The step that follows from a place."""
        self._stream.restore(place.stream)
        drawn = self._draw(place)
        waiting = np.concatenate([place.waiting, drawn])
        since = np.concatenate([place.since, np.full(len(drawn), place.step, np.int64)])
        if not len(waiting):
            raise DataError(
                f"the mixture comes to its end before step {place.step + 1}: every part was given max_epochs times; "
                "take fewer steps, or raise max_epochs."
            )
        # Data whose order is to be kept is laid as it came.
        kept = not self._options["shuffle"] or self._window == 1
        late = len(waiting) if kept else int(np.searchsorted(since, place.step - PATIENCE, side="right"))
        order = self._order(late, waiting)
        row_of = lay_samples(
            waiting[order],
            self._tokens,
            self._patches,
            self._frames,
            most=self._most_patches(waiting),
            exempt=late,
            rows=self.shape.rows,
            length=self.shape.length,
            groups=self.shape.groups,
            vision=self.shape.buckets,
        )
        rows: list[list[int]] = [[] for _ in range(self.shape.rows)]
        for entry, row in zip(waiting[order].tolist(), row_of.tolist(), strict=True):
            if row >= 0:
                rows[row].append(entry)
        left = np.sort(order[row_of < 0])
        return _Step(tuple(map(tuple, rows)), _Place(place.step + 1, waiting[left], since[left], self._stream.state))

    def _draw(self, place: _Place) -> np.ndarray:
        """i64[n], entries from the stream, as many as the window has room for."""
        progress = min(1.0, place.step / (self._length - 1)) if self._length > 1 else 0.0
        slots = _STEPS_AHEAD * self.shape.rows * self.shape.length
        count, tokens = len(place.waiting), int(self._tokens[place.waiting].sum())
        drawn: list[int] = []
        while count < self._window if self._window else tokens < slots or count < _STEPS_AHEAD * self.shape.rows:
            taken = self._stream.take(progress)
            if taken is None:
                break
            drawn.append(taken[1])
            count += 1
            tokens += int(self._tokens[taken[1]])
        return np.asarray(drawn, np.int64)

    def _order(self, late: int, waiting: np.ndarray) -> np.ndarray:
        """i64[n], places in `waiting`, in the order in which they are laid into rows: the first `late` stay first.

        What fills the vision rows goes before text, and the long before the short, which fill what is left.
        """
        rest = waiting[late:]
        order = np.lexsort((-self._tokens[rest], -self._patches[rest]))
        return np.concatenate([np.arange(late), late + order])

    def _most_patches(self, waiting: np.ndarray) -> int:
        """Patches that a step takes at most: somewhat more than its part of those that wait; so steps are alike."""
        tokens, patches = int(self._tokens[waiting].sum()), self._patches[waiting]
        part = self.shape.rows * self.shape.length / tokens
        return max(int(_HASTE * part * int(patches.sum())), int(patches.max()))
