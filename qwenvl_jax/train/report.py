"""`report.html`: the course of a finished run on one page that needs no other file.

Made from what the run's folder holds; `report.html.jinja` beside this file is the page. A long run is drawn by the
means of stretches of its steps.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwenvl_jax.page import ACCENT, ALERT, PALE, drawing, log_scale, moving_mean, style_panel, svg_of, write_page
from qwenvl_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 800  # that a curve is drawn by at most
_SMOOTH = 25  # stretches that a moving mean divides the run into
_TOLD = 4  # times of which answers are shown, the first and the last among them
_GIB = 1 << 30
_COLOURS = (ACCENT, ALERT, "#1d8a4a", "#8a4fc7", "#c78a1d", "#1d9aa8", "#b23a7e", "#64707f")

Lines = Sequence[Mapping[str, Any]]


def write_report(out: Path, name: str = "") -> Path:
    """Writes `report.html` into the folder of a run, whole or not at all, and returns its path.

    Args:
      out: the folder.
      name: of the run; the folder's by default.
    """
    metrics, timings, validation = (_read(out / f"{name}.jsonl") for name in ("metrics", "timings", "validation"))
    settings = json.loads((out / "config.json").read_text())
    begins = [(line["step"], line["stage"]) for n, line in enumerate(metrics) if _begins(metrics, n)]
    return write_page(
        Path(__file__).with_name("report.html.jinja"),
        out / "report.html",
        title=name or out.name,
        headline=_headline(metrics, begins),
        figures=_figures(metrics, timings, validation),
        sections=list(_sections(metrics, timings, validation, begins)),
        asked=_asked(validation),
        settings=sorted(settings.items()),
    )


def _read(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.exists() else []


def _begins(metrics: Lines, n: int) -> bool:
    return n == 0 or metrics[n]["stage"] != metrics[n - 1]["stage"]


def _headline(metrics: Lines, begins: Sequence[tuple[int, str]]) -> str:
    skipped = sum("skipped" in line for line in metrics)
    stages = ", ".join(f"{name} from step {step:,}" for step, name in begins)
    left_out = f" The guard left out {skipped:,} of them." if skipped else ""
    return f"{len(metrics):,} steps: {stages}.{left_out}"


def _figures(metrics: Lines, timings: Lines, validation: Lines) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: name, value, and what it is."""
    losses = [line["loss"] for line in metrics[-max(1, len(metrics) // _SMOOTH) :] if line["loss"] is not None]
    tokens = sum(line["tokens"] for line in metrics)
    found = [
        (
            "loss",
            f"{np.mean(losses):.4f}" if losses else "none",
            f"mean of the last {len(losses):,} steps" if len(losses) > 1 else "of the last step",
        )
    ]
    for name, loss in (validation[-1]["losses"] if validation else {}).items():
        at = f"at step {validation[-1]['step']:,}"
        found.append((f"validation, {name}", "none" if loss is None else f"{loss:.4f}", at))
    found.append(("tokens", f"{tokens:,}", "padding left out"))
    if seconds := sum(line.get("seconds", 0.0) for line in timings):
        waits = sum(line["wait"] for line in timings)
        found.append(("tokens a second", f"{tokens / seconds:,.0f}", "while steps were taken"))
        if used := [(line["mfu"], line["seconds"]) for line in timings if "mfu" in line]:
            mean = np.average([mfu for mfu, _ in used], weights=[weight for _, weight in used])
            found.append(("MFU", f"{mean:.1%}", "of the bf16 peak"))
        found.append(("waits for data", f"{waits / seconds:.1%}", "of the time of the steps"))
    if timings and "goodput" in timings[-1]:
        found.append(("goodput", f"{timings[-1]['goodput']:.1%}", "of the time since the first start"))
    return found


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A curve: its name in the legend, steps, values (NaN where there is none), and whether each step is one value."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    noisy: bool = True


def _curve(name: str, lines: Lines, value: Callable[[Mapping[str, Any]], Any], *, noisy: bool = True) -> _Curve:
    values = [value(line) for line in lines]
    return _Curve(
        name,
        np.asarray([line["step"] for line in lines], np.int64),
        np.asarray([np.nan if one is None else one for one in values], np.float64),
        noisy,
    )


def _by_name(lines: Lines, key: str, *, noisy: bool = True) -> list[_Curve]:
    """A curve for each name in the objects that lines have under a key."""
    names = list(dict.fromkeys(name for line in lines for name in line.get(key, {})))

    def value_of(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda line: line.get(key, {}).get(name)

    return [_curve(name, lines, value_of(name), noisy=noisy) for name in names]


def _sections(metrics: Lines, timings: Lines, validation: Lines, begins: Sequence[tuple[int, str]]):
    """The plots: (heading, what they show, [(name, SVG)])."""

    def drawn(panels: Sequence[tuple[str, Sequence[_Curve], str]]) -> list[tuple[str, str]]:
        shown = [(name, [c for c in curves if np.isfinite(c.values).any()], scale) for name, curves, scale in panels]
        return [(name, _draw(curves, scale, begins)) for name, curves, scale in shown if curves]

    def named(lines: Lines, key: str, name: str = "", *, noisy: bool = True) -> list[_Curve]:
        return [_curve(name, lines, lambda line: line.get(key), noisy=noisy)]

    about = "Pale: each step; strong: its moving mean. Dotted lines: where a stage begins."
    yield (
        "Training",
        about,
        drawn(
            [
                ("loss", named(metrics, "loss"), "log"),
                ("validation loss", _by_name(validation, "losses", noisy=False), "log"),
                ("loss by data set", _by_name(metrics, "loss_by_data"), "log"),
                ("loss by modality", _by_name(metrics, "loss_by_modality"), "log"),
                ("learning rate", named(metrics, "learning_rate", noisy=False), "linear"),
                ("gradient norm", named(metrics, "grad_norm"), "log"),
                (
                    "router's losses",
                    named(metrics, "router_balance", "balance") + named(metrics, "router_z", "z"),
                    "linear",
                ),
                ("load of the experts, 1 where balanced", _load(metrics), "linear"),
            ]
        ),
    )
    speed = named(timings, "tokens_per_second", "all") + named(timings, "vision_tokens_per_second", "vision")
    memory = [
        _curve(name, timings, _gib(key), noisy=False)
        for name, key in (("in use", "memory_bytes"), ("at most so far", "peak_memory_bytes"))
    ]
    wait = _curve("", timings, lambda line: line["wait"] / line["seconds"] if line.get("seconds") else None)
    yield (
        "Speed",
        "Measured in this run; another run differs.",
        drawn(
            [
                ("tokens a second", speed, "linear"),
                ("MFU", named(timings, "mfu"), "share"),
                ("share of a step's time spent waiting for data", [wait], "share"),
                ("memory of the fullest device, GiB", memory, "linear"),
                ("goodput", named(timings, "goodput", noisy=False), "share"),
            ]
        ),
    )


def _load(metrics: Lines) -> list[_Curve]:
    if not any("experts" in line for line in metrics):
        return []
    extremes: tuple[tuple[str, Callable[[Sequence[float]], float]], ...] = (("fullest", max), ("emptiest", min))
    return [_curve(name, metrics, _of_experts(pick)) for name, pick in extremes]


def _of_experts(pick: Callable[[Sequence[float]], float]) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda line: pick(line["experts"]) if "experts" in line else None


def _gib(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda line: line[key] / _GIB if key in line else None


def _draw(curves: Sequence[_Curve], scale: str, begins: Sequence[tuple[int, str]]) -> str:
    """SVG of a panel."""
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(5.4, 2.5), layout="constrained")
        panel = figure.subplots()
        for n, curve in enumerate(curves):
            _draw_curve(panel, curve, _COLOURS[n % len(_COLOURS)], alone=len(curves) == 1)
        positive = all(np.nanmin(curve.values) > 0 for curve in curves)
        if scale == "log" and positive:
            log_scale(panel)
        elif scale != "log":
            panel.set_ylim(bottom=0)
            form, factor = ("{:.3g} %", 100) if scale == "share" else ("{:,.6g}", 1)
            panel.yaxis.set_major_formatter(lambda value, _: form.format(factor * value))
        for step, _ in begins[1:]:
            panel.axvline(step, color="#64707f", linewidth=0.8, linestyle=":", zorder=0)
        style_panel(panel)
        panel.locator_params(axis="x", nbins=6, integer=True)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.set_xlabel("step")
        if any(curve.name for curve in curves):
            panel.legend(frameon=False, fontsize=8, loc="best")
        return svg_of(figure)


def _draw_curve(panel: "Axes", curve: _Curve, colour: str, *, alone: bool) -> None:
    there = np.isfinite(curve.values)
    steps, values = _thinned(curve.steps[there], curve.values[there])
    if not curve.noisy:
        mark = "o" if len(values) <= _SMOOTH else ""
        panel.plot(steps, values, color=colour, linewidth=1.6, marker=mark, markersize=3.5, label=curve.name)
        return
    window = max(1, len(values) // _SMOOTH)
    panel.plot(steps, values, color=PALE if alone else colour, linewidth=0.8, alpha=1 if alone else 0.25, zorder=1)
    middle = steps[(window - 1) // 2 : len(steps) - window // 2]
    mark = "o" if len(values) == 1 else ""  # no line goes through one point
    mean = moving_mean(values, window)
    panel.plot(middle, mean, color=colour, linewidth=1.6, marker=mark, markersize=3.5, zorder=2, label=curve.name)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of stretches of a curve, as many as are drawn at most."""
    if len(steps) <= _POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _asked(validation: Lines) -> list[tuple[str, list[tuple[str, list[tuple[str, str]], str]]]]:
    """For each data set its questions, each with (step, answer) of some times, and the truth."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in validation:
        for one in line["answers"]:
            key = (line["stage"], one["data"], one["id"])
            entry = found.setdefault(key, {"question": one["question"], "truth": one["truth"], "answers": []})
            entry["answers"].append((f"{line['step']:,}", one["answer"]))
    by_name: dict[str, list[tuple[str, list[tuple[str, str]], str]]] = {}
    for (stage, data, _), entry in found.items():
        answers = entry["answers"]
        picked = sorted({round(place) for place in np.linspace(0, len(answers) - 1, min(_TOLD, len(answers)))})
        by_name.setdefault(f"{data}, stage {stage}", []).append(
            (entry["question"], [answers[place] for place in picked], entry["truth"])
        )
    return list(by_name.items())
