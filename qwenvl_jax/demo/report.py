"""`report.html`: what a run of the demo learnt, and what it answered, on one page that needs no other file.

Loss curves are drawn by matplotlib as SVG; each case is an SVG of its own, the frames as the model was given them above
a timeline of truth and answer; `report.html.jinja` beside this file holds the page.
"""

import base64
import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence

import jinja2
import numpy as np
from PIL import Image

from qwenvl_jax.data.sample import Media
from qwenvl_jax.demo.clips import COLOURS
from qwenvl_jax.demo.evaluate import TOLERANCE, Answered, Figures
from qwenvl_jax.demo.records import ask, question
from qwenvl_jax.page import ACCENT, ALERT, PALE, drawing, log_scale, moving_mean, style_panel, svg_of, write_page


@dataclasses.dataclass(frozen=True)
class StageCurve:
    """The losses of one stage.

    Attributes:
      name: "S0"; `about`: what it does, in a few words.
      steps, losses: of every training step, numbered over the whole run.
      held_out: (loss before the stage, loss after it) on clips it does not train on, or None if not measured.
    """

    name: str
    about: str
    steps: Sequence[int]
    losses: Sequence[float]
    held_out: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of figures; `kind` ("model", "blank", "blind") sets its style."""

    name: str
    figures: Figures
    kind: str = "model"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing the run had to show: what, what was wanted, what came, and whether that is met."""

    what: str
    wanted: str
    came: str
    met: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Attributes:
      headline: one sentence.
      checks, rows, stages: see their classes.
      cases: SVG pictures of answers, from `case_picture`, with a heading for each group.
      facts: how it was made, name and value.
    """

    headline: str
    checks: Sequence[Check]
    rows: Sequence[Row]
    stages: Sequence[StageCurve]
    cases: Sequence[tuple[str, Sequence[str]]]
    facts: Sequence[tuple[str, str]]


def write_report(report: Report, target: str | os.PathLike) -> pathlib.Path:
    """Writes the page, whole or not at all, and returns its path."""
    template = pathlib.Path(__file__).with_name("report.html.jinja")
    return write_page(template, target, report=report, curves=loss_curves(report.stages), tolerance=TOLERANCE)


def loss_curves(stages: Sequence[StageCurve]) -> str:
    """SVG of the training loss of each stage, one panel a stage, with the held-out loss before and after it."""
    import matplotlib.figure

    with drawing():
        figure = matplotlib.figure.Figure(figsize=(2.2 * max(len(stages), 2), 2.7), layout="constrained")
        panels = figure.subplots(1, max(len(stages), 1), sharey=True, squeeze=False)[0]
        for panel, stage in zip(panels, stages, strict=False):
            _draw_stage(panel, stage)
        panels[0].set_ylabel("loss per answer token")
        return svg_of(figure)


def _draw_stage(panel, stage: StageCurve) -> None:
    steps, losses = np.asarray(stage.steps), np.asarray(stage.losses, np.float64)
    panel.plot(steps, losses, color=PALE, linewidth=0.8, zorder=1)
    window = max(1, len(losses) // 25)
    if len(losses) > window:
        panel.plot(
            steps[window - 1 :], moving_mean(losses, window), color=ACCENT, linewidth=1.8, zorder=2, label="training"
        )
    if stage.held_out is not None and len(steps):
        ends = [steps[0], steps[-1]]
        panel.plot(ends, stage.held_out, "--", color=ALERT, linewidth=1, zorder=3)
        panel.plot(ends, stage.held_out, "o", color=ALERT, markersize=5, zorder=4, label="held-out clips")
        for x, y, side in zip(ends, stage.held_out, ("left", "right"), strict=True):
            offset = (5 if side == "left" else -5, 6)
            panel.annotate(
                f"{y:.2f}", (x, y), offset, textcoords="offset points", ha=side, color="#b23a16", fontsize=8, zorder=5
            )
    log_scale(panel)
    panel.set_title(stage.name, fontsize=10, fontweight="bold", loc="left", pad=12)
    panel.set_xlabel("step")
    style_panel(panel)
    panel.locator_params(axis="x", nbins=4)


def seen_frames(media: Media, merge: int = 2, tau: int = 2, patch: int = 16) -> np.ndarray:
    """u8[t, tau, H, W, 3]: the frames of a video as the model is given them, put together again from its patches."""
    t, h, w = media.grid
    patches = media.patches.reshape(t, h // merge, w // merge, merge, merge, 3, tau, patch, patch)
    return patches.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(t, tau, h * patch, w * patch, 3)


# Geometry of a case, in pixels of the page.
_SECOND, _LEFT, _RIGHT, _BAR = 84, 78, 24, 15


def case_picture(processor, answered: Answered) -> str:
    """SVG of one answer: a sampled frame of every temporal patch at its time, then truth and answer on a timeline.

    Args:
      processor: the `Processor` that made the prompt; it gives the frames and times that the model was given.
    """
    clip, truth = answered.question.clip, answered.question.truth
    media = processor.sample(ask(answered.question.path, truth), add_generation_prompt=True).media[0]
    frames = seen_frames(media)[:, 0]
    step = float(np.median(np.diff(media.times))) if len(media.times) > 1 else 0.5
    width = min(_SECOND * step - 3, 60)
    height = width * frames.shape[1] / frames.shape[2]
    top = height + 16
    parts = [
        _frame(_x(time) - width / 2, 0, width, height, frame) for time, frame in zip(media.times, frames, strict=True)
    ]
    parts += [f'<text class="time" x="{_x(time):.1f}" y="{height + 11:.1f}">{time:.1f}</text>' for time in media.times]
    colour = "rgb({}, {}, {})".format(*COLOURS[truth.colour])
    parts.append(_bar("truth", truth.start, truth.end, top, f'fill="{colour}"'))
    if answered.parsed is not None:
        _, start, end = answered.parsed
        style = f'fill="{colour}" fill-opacity="0.25" stroke="{colour}" stroke-width="1.5"'
        parts.append(_bar("answer", max(start, 0.0), min(end, clip.duration), top + _BAR + 6, style))
    else:
        parts.append(f'<text class="label" x="0" y="{top + 2 * _BAR + 2}">answer</text>')
    bottom = top + 2 * _BAR + 8
    for time in (truth.start, truth.end):
        parts.append(f'<line class="edge" x1="{_x(time):.1f}" x2="{_x(time):.1f}" y1="0" y2="{bottom}"/>')
    size = f'width="{_x(clip.duration) + _RIGHT:.0f}" height="{bottom + 2:.0f}"'
    drawing = f'<svg {size} role="img">{"".join(parts)}</svg>'
    return (
        jinja2.Environment(autoescape=True)
        .from_string(_CASE)
        .render(
            drawing=drawing, answered=answered, clip=clip, question=question(truth.name), verdict=_verdict(answered)
        )
    )


_CASE = """<figure class="case {{ 'right' if answered.right else 'wrong' }}"><figcaption><b>{{ question }}</b>
<code>{{ answered.text }}</code> <span class="verdict">{{ verdict }}</span>
<span class="from">{{ clip.file_name }}, {{ '%.1f' % clip.duration }} s at {{ clip.frame_rate }} frames a second</span>
</figcaption><div class="scroll">{{ drawing | safe }}</div></figure>"""


def _verdict(answered: Answered) -> str:
    if answered.parsed is None:
        return "not the JSON asked for"
    truth = answered.question.truth
    _, start, end = answered.parsed
    mark = "\u2713" if answered.right else "\u2717"
    return f"{mark} start {start - truth.start:+.2f} s, end {end - truth.end:+.2f} s"


def _x(time: float) -> float:
    return _LEFT + _SECOND * time


def _bar(label: str, start: float, end: float, y: float, style: str) -> str:
    length = max(_x(end) - _x(start), 2.0)
    return (
        f'<text class="label" x="0" y="{y + 12:.1f}">{label}</text>'
        f'<rect x="{_x(start):.1f}" y="{y:.1f}" width="{length:.1f}" height="{_BAR}" rx="3" {style}/>'
    )


def _frame(x: float, y: float, width: float, height: float, frame_HWC: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(frame_HWC).save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return f'<image x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height:.1f}" href="{source}"/>'
