"""Judging answers: figures, blanked clips, and the best answer without looking."""

import dataclasses
import pathlib

import numpy as np
import pytest

from qwenvl_jax.demo import evaluate
from qwenvl_jax.demo.clips import describe_clip
from qwenvl_jax.demo.records import answer, sight


def ask_about(split, count, **kwargs):
    clips = [(pathlib.Path(f"{i}.mp4"), describe_clip(2, i, split)) for i in range(count)]
    return evaluate.questions(clips, **kwargs)


def test_overlap_of_intervals():
    truth = np.array([[1.0, 3.0]] * 5)
    spans = np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0], [3.0, 1.0], [np.inf, np.inf]])
    np.testing.assert_allclose(evaluate.overlap(spans, truth), [1, 1 / 3, 0, 0, 0])


def test_figures_of_known_answers():
    asked = ask_about("evaluation", 4)

    def reply(question, shift, name=None):
        truth = question.truth
        text = answer(name or truth.name, truth.start + shift, truth.end + shift)
        return evaluate.Answered(question, text)

    answers = [reply(asked[0], 0), reply(asked[1], 0.3), reply(asked[2], 0.7, "red dog")]
    answers.append(evaluate.Answered(asked[3], "no idea"))
    figures = evaluate.judge(answers)
    assert (figures.count, figures.starts, figures.ends, figures.names, figures.json) == (4, 0.5, 0.5, 0.5, 0.75)
    spans = [(a.parsed or (None, 0, 0))[1:] for a in answers]
    truths = [(q.truth.start, q.truth.end) for q in asked]
    assert figures.iou == pytest.approx(evaluate.overlap(np.array(spans), np.array(truths)).mean())
    assert [a.right for a in answers] == [True, True, False, False]


def test_answers_from_what_the_frames_show_are_nearly_all_right():
    asked = ask_about("evaluation", 60, every_event=True)
    answers = [evaluate.Answered(q, answer(q.truth.name, *sight(q.clip).span(q.event))) for q in asked]
    figures = evaluate.judge(answers)
    assert (figures.names, figures.json) == (1, 1)
    assert min(figures.starts, figures.ends) > 0.9 and figures.iou > 0.75


def test_the_blind_answer_is_the_best_of_its_kind_and_far_from_seeing():
    clips = [q.clip for q in ask_about("train", 150)]
    asked = ask_about("train", 150, every_event=True)
    blind = evaluate.fit_blind(clips)
    figures = blind.figures(asked)
    assert 0.1 < figures.starts < 0.4 and 0.1 < figures.iou < 0.55
    for change in (
        {"start": (3.0, 0.0)},
        {"start": (0.0, 0.5)},
        {"end": (0.0, 0.5)},
        {"span": ((0.0, 0.0), (0.0, 1.0))},
    ):
        other = dataclasses.replace(blind, **change).figures(asked)
        assert other.starts <= figures.starts and other.ends <= figures.ends and other.iou <= figures.iou + 1e-9


def test_a_blanked_clip_keeps_its_times_and_size():
    (question,) = ask_about("evaluation", 1)
    video = evaluate.blanked(question.clip)
    assert video.frames.shape[1:] == (question.clip.height, question.clip.width, 3)
    assert (video.frames == evaluate.MID_GREY).all() and video.duration == question.clip.duration
    np.testing.assert_array_equal(video.timestamps, sight(question.clip).frame_times)
