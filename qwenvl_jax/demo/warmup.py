"""Text that teaches the form of the task: it stands in for the language model that a real run would start from.

The same clips, questions and answers as in `records`, but each temporal patch is told in words where pixels would be:

    <0.1 seconds> nothing<0.6 seconds> red circle<1.1 seconds> blue ring red circle ...When does the red circle appear?
    {"event": "red circle", "start": 0.6, "end": 1.1}

Given the whole task at once, a small model stays where it guesses among the times: to look one up it needs three steps
(what is asked for, where that is told, which time stands there) none of which helps without the others. So the warm-up
is a course of lessons that adds one step at a time, each lesson with a little of those before it:

    lesson   the clip is told as                     the answer
    pairs     red0.6 blue0.6                          red0.6 red0.6      the time right behind the word asked for
    recall    red circle<0.6 seconds> blue ring<...   red0.6 red0.6      the time some words behind it
    form      red circle<0.6 seconds> blue ring<...  {"event": ...}      the name is a few tokens away
    front    <0.6 seconds> red circle<...            {"event": ...}      the time stands before what is seen
    patches  <0.6 seconds> red circle<1.1 seconds>.. {"event": ...}      first and last among ever more patches
    task     as above, every patch

Without the first lesson it is left to the seed whether a model learns to recall at all: to find the word before that
equals this one is the first thing that lookup needs.

Only pairs of colour and shape that training clips show are named, and no pixel is drawn.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qwenvl_jax.demo.clips import Clip, outline_clip
from qwenvl_jax.demo.records import Sighting, questions_and_answers, sight, told
from qwenvl_jax.demo.vocabulary import SAMPLED_FPS

# The share of the course's tokens after which each lesson ends; the task itself has the rest.
LESSONS = {"pairs": 0.08, "recall": 0.18, "form": 0.26, "front": 0.44, "patches": 0.75}
# How often a lesson that is over comes back.
REPEATED = 0.1


def text_conversation(seed: int, index: int, fps: float = SAMPLED_FPS) -> list[dict]:
    """The task itself in words, number `index`: a pure function of its arguments."""
    return lesson(seed, index, None, fps)


def lesson(seed: int, index: int, progress: float | None, fps: float = SAMPLED_FPS) -> list[dict]:
    """Conversation number `index` of the course: a pure function of its arguments.

    Args:
      progress: how much of the course is behind it, 0 to 1; None for the task itself.
    """
    clip = outline_clip(seed, index, "train")
    rng = np.random.default_rng([seed, index])
    sighting = sight(clip, fps)
    terse = behind = paired = False
    if progress is not None:
        kept = _share(progress, "front", "patches")
        if kept < 0 or rng.random() < REPEATED:
            sighting = _once(sighting)
        elif kept < 1:
            sighting = _thinned(sighting, kept, rng)
        behind = rng.random() < max(1 - _share(progress, "form", "front"), REPEATED)
        terse = progress < LESSONS["recall"] or rng.random() < REPEATED
        # (Half as often as others: nothing of the task looks like it.)
        paired = progress < LESSONS["pairs"] or rng.random() < REPEATED / 2
    order = [int(e) for e in rng.permutation(len(clip.events))]
    terse = terse or paired
    messages = _terse(clip, sighting, order) if terse else questions_and_answers(clip, sighting, order)
    text = _pairs(clip, sighting, rng) if paired else told(clip, sighting, rng)
    messages[0]["content"] = (_times_behind(text) if behind and not paired else text) + messages[0]["content"]
    return messages


def course(seed: int, tokens: int, count_tokens: Callable[[list[dict]], int]) -> Iterator[list[dict]]:
    """The conversations of the course, in order, until they hold `tokens` tokens as `count_tokens` counts them."""
    done, index = 0, 0
    while done < tokens:
        messages = lesson(seed, index, done / tokens)
        yield messages
        done, index = done + count_tokens(messages), index + 1


def _share(progress: float, after: str, lesson_name: str) -> float:
    """How far a lesson is: from 0 where lesson `after` ends to 1 at its own end; negative before, at most 1."""
    return min((progress - LESSONS[after]) / (LESSONS[lesson_name] - LESSONS[after]), 1.0)


def _once(sighting: Sighting) -> Sighting:
    """Every event in the first of its patches alone, and only those patches."""
    first_TE = sighting.visible & (np.cumsum(sighting.visible, axis=0) == 1)
    kept_T = first_TE.any(axis=1)
    return dataclasses.replace(sighting, times=sighting.times[kept_T], visible=first_TE[kept_T])


def _thinned(sighting: Sighting, share: float, rng: np.random.Generator) -> Sighting:
    """The first and the last patch of every event, and that share of the others."""
    forward_TE, backward_TE = (np.cumsum(v, axis=0) == 1 for v in (sighting.visible, sighting.visible[::-1]))
    edge_T = (sighting.visible & (forward_TE | backward_TE[::-1])).any(axis=1)
    kept_T = edge_T | (rng.random(len(edge_T)) < share)
    return dataclasses.replace(sighting, times=sighting.times[kept_T], visible=sighting.visible[kept_T])


def _pairs(clip: Clip, sighting: Sighting, rng: np.random.Generator) -> str:
    """The colours of the events, each with the time of its first patch right behind it, in order of time."""
    colours = [clip.events[e].colour for e in rng.permutation(len(clip.events))]
    starts = {event.colour: sighting.span(e)[0] for e, event in enumerate(clip.events)}
    return "".join(f" {colour}{starts[colour]:.1f}" for colour in sorted(colours, key=starts.__getitem__))


def _times_behind(text: str) -> str:
    """What is told, with each time behind what is seen at it."""
    parts = (part.partition(">") for part in text.split("<")[1:])
    return "".join(f"{seen}<{time}>" for time, _, seen in parts)


def _terse(clip: Clip, sighting: Sighting, order: list[int]) -> list[dict]:
    """Questions and answers of colour and time alone, nothing between them."""
    messages = questions_and_answers(clip, sighting, order)
    for e, reply in zip(order, messages[1::2], strict=True):
        start, end = sighting.span(e)
        reply["content"] = f" {clip.events[e].colour}{start:.1f} {clip.events[e].colour}{end:.1f}"
    return messages
