"""Conversations about clips, and what their answers are.

A training conversation asks for every event of a clip, one turn each, in one sequence:

    user       [video] When does the red circle appear?
    assistant  {"event": "red circle", "start": 3.4, "end": 7.1}
    user       When does the blue ring appear?
    assistant  ...

It is taught what can be seen: `start` is the printed time of the first temporal patch (two sampled frames) that shows
the object, `end` that of the last, so that every answer is a copy of times in the prompt. The answers are judged
against the true times of the event, which no frame needs to show.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from qwenvl_jax.data.sampling import group_times, uniform_indices
from qwenvl_jax.demo.clips import Clip, Event
from qwenvl_jax.demo.vocabulary import SAMPLED_FPS

DESCRIBE = "What is there?"


@dataclasses.dataclass(frozen=True)
class Sighting:
    """What the sampled frames of a clip show.

    Attributes:
      frame_times: f64[n], seconds of each sampled frame.
      times: f64[t], seconds of each temporal patch, as in the prompt before rounding to a tenth.
      visible: bool[t, e], whether event e of the clip is in one of the frames of the patch.
    """

    frame_times: np.ndarray
    times: np.ndarray
    visible: np.ndarray

    def span(self, event: int) -> tuple[float, float]:
        """Times of the first and the last patch that show event number `event`, as printed: to a tenth of a second."""
        seen = np.flatnonzero(self.visible[:, event])
        return float(f"{self.times[seen[0]]:.1f}"), float(f"{self.times[seen[-1]]:.1f}")


def sight(clip: Clip, fps: float = SAMPLED_FPS) -> Sighting:
    """What a model sees of a clip, sampled at `fps` frames a second by the rule that the processor follows."""
    indices_N = uniform_indices(clip.frames, clip.fps, fps=fps)
    times_N = indices_N / clip.fps
    starts_E, ends_E = np.array([(event.start, event.end) for event in clip.events]).T
    visible_NE = (times_N[:, None] >= starts_E) & (times_N[:, None] < ends_E)
    # An odd count of frames is filled up with the last one, as in the processor.
    visible_NE = np.pad(visible_NE, ((0, len(times_N) % 2), (0, 0)), mode="edge")
    return Sighting(times_N, np.array(group_times(times_N, 2)), visible_NE[0::2] | visible_NE[1::2])


def question(name: str) -> str:
    """The question for the event called `name`."""
    return f"When does the {name} appear?"


def answer(name: str, start: float, end: float) -> str:
    """The JSON that answers it; times in seconds, printed to a tenth."""
    return f'{{"event": "{name}", "start": {start:.1f}, "end": {end:.1f}}}'


def parse_answer(text: str) -> tuple[str, float, float] | None:
    """(event, start, end) of an answer, or None if it is not the JSON asked for."""
    try:
        value = json.loads(text)
        event, start, end = str(value["event"]), float(value["start"]), float(value["end"])
    except (ValueError, TypeError, KeyError):
        return None
    return (event, start, end) if math.isfinite(start) and math.isfinite(end) else None


def ask(video: object, event: Event, fps: float | None = SAMPLED_FPS) -> list[dict]:
    """A conversation that asks when one event happens.

    Args:
      video: a path or `VideoFrames`; frames chosen by the caller take `fps=None`.
    """
    part = {"type": "video", "video": os.fspath(video) if isinstance(video, os.PathLike) else video}
    if fps is not None:
        part["fps"] = fps
    return [{"role": "user", "content": [part, {"type": "text", "text": question(event.name)}]}]


def conversation(
    clip: Clip, video: object, rng: np.random.Generator, fps: float = SAMPLED_FPS, describe: bool = False
) -> list[dict]:
    """The training conversation of a clip: all its events in an order drawn from `rng`, with the answers.

    Args:
      video: a path or `VideoFrames`.
      describe: ask, after all events, for what is seen at each time: something to learn at every temporal patch.
    """
    sighting, order = sight(clip, fps), [int(e) for e in rng.permutation(len(clip.events))]
    messages = ask(video, clip.events[order[0]], fps) + questions_and_answers(clip, sighting, order)[1:]
    if describe:
        messages.append({"role": "user", "content": DESCRIBE})
        messages.append({"role": "assistant", "content": told(clip, sighting)})
    return messages


def told(clip: Clip, sighting: Sighting, rng: np.random.Generator | None = None) -> str:
    """What the temporal patches of a clip show, in words: "<0.1 seconds> nothing<0.6 seconds> red circle blue ring".

    Args:
      rng: draws the order of the objects in each patch; without it they stand in the order in which they appear.
    """
    first = np.argsort([event.start for event in clip.events])
    parts = []
    for time, visible_E in zip(sighting.times, sighting.visible, strict=True):
        seen = [e for e in first if visible_E[e]]
        names = [clip.events[e].name for e in (seen if rng is None else rng.permutation(seen))]
        words = "".join(f" {name}" for name in names or ["nothing"])
        parts.append(f"<{time:.1f} seconds>{words}")
    return "".join(parts)


def questions_and_answers(clip: Clip, sighting: Sighting, order: Sequence[int]) -> list[dict]:
    """Messages of text that ask for the events of a clip in the given order and answer with what is seen."""
    messages = []
    for e in order:
        name = clip.events[e].name
        messages.append({"role": "user", "content": question(name)})
        messages.append({"role": "assistant", "content": answer(name, *sighting.span(e))})
    return messages


def write_records(target: str | os.PathLike, conversations: Iterable[tuple[str, list[dict]]]) -> pathlib.Path:
    """Writes (id, conversation) pairs as the JSONL file that `qwenvl_jax.data.sources` reads; whole or not at all.

    Paths of media stand in it relative to the file, so that the folder can be moved.
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for name, messages in conversations:
            record = {"id": name, "messages": [_relative(message, target.parent) for message in messages]}
            file.write(json.dumps(record) + "\n")
    unfinished.replace(target)
    return target


def _relative(message: dict, folder: pathlib.Path) -> dict:
    if isinstance(message["content"], str):
        return message
    parts = [
        {**part, "video": os.path.relpath(part["video"], folder)} if part["type"] == "video" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def training_conversations(
    clips: Sequence[tuple[pathlib.Path, Clip]],
    seed: int,
    passes: int = 1,
    longest: float = math.inf,
    describe: bool = False,
) -> Iterable[tuple[str, list[dict]]]:
    """(id, conversation) of clips of at most `longest` seconds; each pass asks for the events in another order.

    `describe` as in `conversation`.
    """
    for number in range(passes):
        for path, clip in clips:
            if clip.duration <= longest:
                rng = np.random.default_rng([seed, clip.index, number])
                yield f"clip-{clip.index}-{number}", conversation(clip, path, rng, describe=describe)
