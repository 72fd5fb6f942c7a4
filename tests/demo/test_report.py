"""The report: one file that needs no other, with every figure, curve and case in it."""

import re

import numpy as np
import pytest

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.demo import evaluate, report
from qwenvl_jax.demo.clips import draw_clip, make_clips
from qwenvl_jax.demo.records import answer, ask, sight
from qwenvl_jax.demo.verdict import figures_wanted
from qwenvl_jax.demo.vocabulary import write_processor_folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(write_processor_folder(tmp_path_factory.mktemp("processor")))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return evaluate.questions(make_clips(tmp_path_factory.mktemp("clips"), "evaluation", 4, 0))


def perfect(question):
    return evaluate.Answered(question, answer(question.truth.name, *sight(question.clip).span(question.event)))


def test_frames_are_put_together_from_their_patches(processor, asked):
    question = next(q for q in asked if q.clip.width % 32 == q.clip.height % 32 == 0)
    (media,) = processor.sample(ask(question.path, question.truth), add_generation_prompt=True).media
    frames = report.seen_frames(media).reshape(-1, question.clip.height, question.clip.width, 3)
    times = sight(question.clip).frame_times
    drawn = draw_clip(question.clip)[np.rint(times * question.clip.fps).astype(int)]
    assert np.abs(frames[: len(drawn)].astype(int) - drawn).mean() < 4


def test_the_page_holds_everything_and_refers_to_nothing_outside(processor, asked, tmp_path):
    answers = [perfect(asked[0]), evaluate.Answered(asked[1], "<b>no idea</b>")]
    figures = evaluate.judge(answers)
    stages = [
        report.StageCurve("S0", "only the mergers learn", [1, 2, 3], [3.0, 2.5, 2.25], (3.1, 2.2)),
        report.StageCurve("S1", "everything learns", list(range(4, 104)), list(np.linspace(2.2, 0.5, 100)), None),
    ]
    page = report.write_report(
        report.Report(
            headline="One sentence.",
            checks=[report.Check("starts", "at least 80 %", "50 %", False)],
            rows=[report.Row("the model", figures), report.Row("chance", figures, "blind")],
            stages=stages,
            cases=[
                ("Right", [report.case_picture(processor, answers[0])]),
                ("Wrong", [report.case_picture(processor, answers[1])]),
            ],
            facts=[("command", "qwenvl-jax demo")],
        ),
        tmp_path / "new" / "report.html",
    )
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.findall(r"<(?:script|link|iframe)", text) and "url(http" not in text and "@import" not in text
    for part in ("One sentence.", "the model", "chance", "S0", "everything learns", "3.10", "2.20", "at least 80 %"):
        assert part in text
    assert "<b>no idea</b>" not in text and "&lt;b&gt;no idea&lt;/b&gt;" in text
    assert "check missed" in text and "case right" in text and "case wrong" in text
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_an_answer_stands_at_its_times(processor, asked):
    picture = report.case_picture(processor, perfect(asked[0]))
    bars = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', picture)]
    truth, (start, end) = asked[0].truth, sight(asked[0].clip).span(asked[0].event)
    assert bars[0] == pytest.approx((report._x(truth.start), report._SECOND * (truth.end - truth.start)), abs=0.11)
    assert bars[1] == pytest.approx((report._x(start), report._SECOND * (end - start)), abs=0.11)
    assert picture.count("<image ") == len(sight(asked[0].clip).times)


def test_figures_are_held_against_what_was_wanted():
    good = evaluate.Figures(100, 0.85, 0.7, 0.65, 1.0, 1.0)
    blanked, chance = evaluate.Figures(100, 0.2, 0.3, 0.4, 1, 1), evaluate.Figures(100, 0.2, 0.3, 0.4, 1, 1)
    stages = [report.StageCurve(name, "", [1], [1.0], (2.0, 1.0)) for name in ("S0", "S1")]
    assert all(check.met for check in figures_wanted(good, blanked, chance, stages, 100))

    def missed(*arguments):
        return [check.what for check in figures_wanted(*arguments) if not check.met]

    def worse(figures, **change):
        return evaluate.Figures(**{**vars(figures), **change})

    assert missed(worse(good, starts=0.79), blanked, chance, stages, 100) == ["starts within 0.5 s"]
    assert missed(worse(good, iou=0.59), blanked, chance, stages, 100) == ["mean IoU"]
    assert missed(good, worse(blanked, starts=0.26), chance, stages, 100) == ["starts, pixels blanked"]
    assert missed(good, worse(blanked, iou=0.46), chance, stages, 100) == ["mean IoU, pixels blanked"]
    assert missed(good, blanked, chance, stages, 99) == ["answers the same after export"]
    flat = [*stages, report.StageCurve("S2", "", [1], [1.0], (1.0, 1.0))]
    assert missed(good, blanked, chance, flat, 100) == ["stages that lower the held-out loss"]
