"""Asks a model about clips it never saw, and says how far the answers are from the truth and from chance.

Every figure stands beside two others: that of the same model with the pixels blanked, and that of the best answer
one can give without looking, fitted on the training clips.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qwenvl_jax.data.video import VideoFrames
from qwenvl_jax.demo.clips import Clip, Event
from qwenvl_jax.demo.records import ask, parse_answer, sight
from qwenvl_jax.demo.vocabulary import SAMPLED_FPS
from qwenvl_jax.generate import generate

TOLERANCE = 0.5  # seconds within which a start or an end counts as right
MID_GREY = 128


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one clip: when does event number `event` happen?"""

    path: pathlib.Path
    clip: Clip
    event: int

    @property
    def truth(self) -> Event:
        return self.clip.events[self.event]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question with the model's answer as it came, and what it says (None where it is not the JSON asked for)."""

    question: Question
    text: str

    @property
    def parsed(self) -> tuple[str, float, float] | None:
        return parse_answer(self.text)

    @property
    def right(self) -> bool:
        """Whether the start is within the tolerance of the truth."""
        return self.parsed is not None and abs(self.parsed[1] - self.question.truth.start) <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a set of answers is worth; fractions in 0..1.

    Attributes:
      count: answers judged.
      starts, ends: fraction within half a second of the truth.
      iou: mean over the answers of intersection over union with the true interval; 0 for an answer that is no JSON.
      names: fraction that name the event asked for.
      json: fraction that are the JSON asked for.
    """

    count: int
    starts: float
    ends: float
    iou: float
    names: float
    json: float


def questions(clips: Sequence[tuple[pathlib.Path, Clip]], every_event: bool = False) -> list[Question]:
    """One question a clip, its events taken in turn from clip to clip; or one for every event."""
    if every_event:
        return [Question(path, clip, e) for path, clip in clips for e in range(len(clip.events))]
    return [Question(path, clip, clip.index % len(clip.events)) for path, clip in clips]


def blanked(clip: Clip, fps: float = SAMPLED_FPS) -> VideoFrames:
    """What the model is given of a clip when it may not see: mid-grey frames of the same number, size and times."""
    times_N = sight(clip, fps).frame_times
    frames_NHWC = np.full((len(times_N), clip.height, clip.width, 3), MID_GREY, np.uint8)
    return VideoFrames(frames_NHWC, times_N, clip.duration)


def answer_all(
    model,
    processor,
    asked: Sequence[Question],
    *,
    blank: bool = False,
    batch_size: int = 100,
    max_new_tokens: int = 40,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Answered]:
    """Answers of a model to questions, greedily decoded.

    Args:
      model: a `QwenVL`.
      processor: its `Processor`.
      blank: ask about the blanked clips instead.
      batch_size: questions at a time.
      progress: wraps the iterable of batches, to show a bar.

    Returns:
      The answers, in the order of `asked`.
    """
    # Clips of like length go together, so that little of a batch is padding.
    order = sorted(range(len(asked)), key=lambda i: asked[i].clip.duration)
    answers: dict[int, Answered] = {}
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    for batch in progress(batches):
        conversations = [
            ask(blanked(asked[i].clip), asked[i].truth, fps=None) if blank else ask(asked[i].path, asked[i].truth)
            for i in batch
        ]
        texts = generate(model, processor, conversations, max_new_tokens=max_new_tokens, temperature=0.0)
        for i, result in zip(batch, texts, strict=True):
            answers[i] = Answered(asked[i], result.text)
    return [answers[i] for i in range(len(asked))]


def judge(answers: Sequence[Answered]) -> Figures:
    """The figures of a set of answers."""
    parsed = [answer.parsed for answer in answers]
    nowhere = ("", np.inf, np.inf)
    names = np.array([(p or nowhere)[0] == a.question.truth.name for p, a in zip(parsed, answers, strict=True)])
    spans = np.array([(p or nowhere)[1:] for p in parsed], np.float64)
    return _figures([a.question for a in answers], spans, names, np.array([p is not None for p in parsed]))


def _figures(asked: Sequence[Question], spans_N2, names_N, json_N) -> Figures:
    truth_N2 = np.array([(q.truth.start, q.truth.end) for q in asked])
    close_N2 = np.abs(spans_N2 - truth_N2) <= TOLERANCE
    iou = float(overlap(spans_N2, truth_N2).mean())
    starts, ends = close_N2.mean(axis=0)
    return Figures(len(asked), float(starts), float(ends), iou, float(np.mean(names_N)), float(np.mean(json_N)))


def overlap(spans_N2: np.ndarray, truth_N2: np.ndarray) -> np.ndarray:
    """f64[N], intersection over union of intervals (start, end) in seconds; 0 where a span is empty or infinite."""
    start_N, end_N = np.maximum(spans_N2, truth_N2)[..., 0], np.minimum(spans_N2, truth_N2)[..., 1]
    inside_N = np.maximum(end_N - start_N, 0.0)
    total_N = np.maximum(spans_N2[..., 1], truth_N2[..., 1]) - np.minimum(spans_N2[..., 0], truth_N2[..., 0])
    usable_N = np.isfinite(spans_N2).all(axis=-1) & (spans_N2[..., 1] > spans_N2[..., 0])
    return np.divide(inside_N, total_N, out=np.zeros_like(inside_N), where=usable_N & (total_N > 0))


@dataclasses.dataclass(frozen=True)
class Blind:
    """The best answers without looking. Each time is `a + b * duration`; (a, b) is fitted for each figure apart.

    A constant time is b = 0, a constant share of the clip is a = 0.

    Attributes:
      start, end: (a, b) that put most starts or ends within the tolerance.
      span: ((a, b), (a, b)) of start and end, with the highest mean overlap.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    span: tuple[tuple[float, float], tuple[float, float]]

    def figures(self, asked: Sequence[Question]) -> Figures:
        """Figures of these answers: the best of each kind, and every name and JSON counted as right."""
        duration_N = np.array([q.clip.duration for q in asked])
        best = np.stack([_line(self.start, duration_N), _line(self.end, duration_N)], axis=1)
        span = np.stack([_line(self.span[0], duration_N), _line(self.span[1], duration_N)], axis=1)
        all_N = np.ones(len(asked))
        figures = _figures(asked, best, all_N, all_N)
        return dataclasses.replace(figures, iou=_figures(asked, span, all_N, all_N).iou)


def fit_blind(clips: Iterable[Clip]) -> Blind:
    """Fits the blind answers on training clips by searching a grid of (a, b): seconds 0 to 8, shares 0 to 1."""
    events = [(e.start, e.end, clip.duration) for clip in clips for e in clip.events]
    start_N, end_N, duration_N = np.array(events).T
    truth_N2 = np.stack([start_N, end_N], axis=1)
    grid = [(float(a), float(b)) for a in np.arange(0, 8.01, 0.2) for b in np.arange(0, 1.01, 0.05)]
    lines_LN = np.stack([_line(line, duration_N) for line in grid])
    start = int(np.argmax((np.abs(lines_LN - start_N) <= TOLERANCE).mean(axis=1)))
    end = int(np.argmax((np.abs(lines_LN - end_N) <= TOLERANCE).mean(axis=1)))

    def mean_overlap(starts_LN, ends_LN):
        starts_LN, ends_LN = np.broadcast_arrays(starts_LN, ends_LN)
        return overlap(np.stack([starts_LN, ends_LN], axis=2), truth_N2[None]).mean(axis=1)

    # Start and end of the span in turn, until neither improves.
    first, last, best = start, end, -1.0
    while True:
        first = int(np.argmax(mean_overlap(lines_LN, lines_LN[last][None])))
        values = mean_overlap(lines_LN[first][None], lines_LN)
        last = int(np.argmax(values))
        if values[last] <= best + 1e-9:
            return Blind(grid[start], grid[end], (grid[first], grid[last]))
        best = float(values[last])


def _line(line: tuple[float, float], duration_N: np.ndarray) -> np.ndarray:
    return line[0] + line[1] * duration_N
