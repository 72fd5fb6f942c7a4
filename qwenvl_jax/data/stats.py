"""What a data set holds, in figures and plots: the work behind `qwenvl-jax data stats`."""

import collections
import concurrent.futures
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data import chat
from qwenvl_jax.data.bar import Bar
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.named import named_processor
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sheet import check_picture
from qwenvl_jax.data.sources import Reading, Source, open_source
from qwenvl_jax.data.video import VideoFrames, probe
from qwenvl_jax.errors import QwenVLError

# Looking at a file waits for another process, so a few at a time even on few cores.
_PROBES = 4

# Name of a distribution, and what is counted, one figure for each record, or for each video, or image.
FIGURES = {
    "tokens": "tokens of a record",
    "learnt": "learnt tokens of a record",
    "turns": "messages of a record",
    "duration": "seconds of a video",
    "source_fps": "frames per second of a video file",
    "frames": "frames taken of a video",
    "video_patches": "patches of a video",
    "image_patches": "patches of an image",
}
_WHERE = re.compile(r"^(?:\S+\[\d+\](?:, \S*:\d+)?|\S*:\d+): ")
_FILE = re.compile(
    r"\S*/\S*[^\s:;,)]|\b[\w-]+\.(?:mp4|mov|mkv|webm|avi|ts|gif|png|jpe?g|webp|bmp|tiff?)\b", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Stats:
    """The figures of a data set.

    Attributes:
      records: how many there are.
      values: for each name of `FIGURES`, f64[n].
      failures: records that cannot be used.
    """

    records: int
    values: dict[str, np.ndarray]
    failures: tuple[Failure, ...]

    def reasons(self) -> dict[str, int]:
        """How many records fail for each kind of reason, most first."""
        found = collections.Counter(kind_of(failure) for failure in self.failures)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def facts(self) -> dict[str, Any]:
        """The object that `--json` prints: counts, and for each name of `FIGURES` how many values there are, their sum,
        least, median, mean, 90th percentile and greatest (left out where there are none).
        """
        return {
            "records": self.records,
            "usable": self.records - len(self.failures),
            "images": len(self.values["image_patches"]),
            "videos": len(self.values["video_patches"]),
            "figures": {name: _summary(values) for name, values in self.values.items() if len(values)},
            "failures": self.reasons(),
        }


def _summary(values: np.ndarray) -> dict[str, float]:
    return {
        "count": len(values),
        "sum": float(values.sum()),
        "min": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p90": float(np.percentile(values, 90)),
        "max": float(values.max()),
    }


def kind_of(failure: Failure) -> str:
    """The reason of a failure without the names of files and the numbers in it, so that like ones count together."""
    reason = _WHERE.sub("", failure.reason)
    return re.sub(r"\d+(?:\.\d+)?", "N", _FILE.sub("FILE", reason))


def measure(source: Source, processor: Processor) -> Stats:
    """Looks at every record, without decoding a pixel (a sampler that goes by motion decodes small ones)."""

    def one(index: int) -> dict[str, list[float]] | Failure:
        try:
            record = source[index]
        except QwenVLError as error:
            return Failure(f"record {index}", str(error))
        try:
            if record.fetch is not None:
                record.fetch()
            return _figures(record.messages, record.options, processor)
        except QwenVLError as error:
            return Failure(f"{record.where} ({record.id})", f"{record.where}: {error}")

    with (
        Bar("looking at records", len(source)) as bar,
        concurrent.futures.ThreadPoolExecutor(_PROBES) as pool,
    ):
        found = list(bar.over(pool.map(one, range(len(source)))))
    failures = tuple(entry for entry in found if isinstance(entry, Failure))
    values = {
        name: np.asarray([v for entry in found if not isinstance(entry, Failure) for v in entry[name]], np.float64)
        for name in FIGURES
    }
    return Stats(len(source), values, failures)


def _figures(messages: list[dict], options: dict[str, Any], processor: Processor) -> dict[str, list[float]]:
    """The figures of a record, by name."""
    facts = processor.measure(messages, **options)
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    found["tokens"].append(facts.tokens)
    found["learnt"].append(facts.loss_tokens)
    found["turns"].append(len(messages))
    parts = chat.parts_of(messages, ("image", "video"))
    for (_, part), (t, h, w) in zip(parts, facts.grids, strict=True):
        found[f"{part['type']}_patches"].append(t * h * w)
        if part["type"] == "video":
            for name, value in _video_figures(part, processor).items():
                found[name].append(value)
    return found


def _video_figures(part: dict, processor: Processor) -> dict[str, float]:
    """Seconds, rate and frames of a video; of chosen frames the seconds only where they are given, and no rate."""
    source = part["video"]
    if isinstance(source, VideoFrames):
        frames, duration = len(source.frames), source.duration
    elif isinstance(source, list | tuple):
        frames, duration = len(source), part.get("duration")
    else:
        info, choice = probe(source), processor.opener.open(part).choice
        assert choice is not None  # of a file
        return {"duration": info.duration, "source_fps": info.fps, "frames": len(choice.indices)}
    return {"frames": frames, **({} if duration is None else {"duration": duration})}


def show(source: str, *, model: str | None = None, as_json: bool = False, out: str | None = None) -> None:
    """Prints figures of a data set, as JSON or as a table, and draws them; the work of `qwenvl-jax data stats`.

    Args:
      source: a JSONL file, or a data set that `data build` made.
      model: see `named_processor`.
      out: file to draw histograms and reasons of failures into; its ending says in which format.

    Raises:
      ConfigError: a picture that cannot be drawn.
      CheckpointError: there is no such model.
      DataError: data that cannot be read.
    """
    path = None if out is None else check_picture(out)
    processor = named_processor(model, source)
    stats = measure(open_source(source, Reading.of(processor)), processor)
    if path is not None:
        draw(stats, path, source)
    print(json.dumps(stats.facts(), indent=2, ensure_ascii=False) if as_json else table(stats, source))


def table(stats: Stats, source: str) -> str:
    """The figures for reading."""
    facts = stats.facts()
    lines = [
        f"{source}: {facts['records']:,} records, {facts['usable']:,} of them usable, with {facts['images']:,} images "
        f"and {facts['videos']:,} videos",
        "",
        f"{'':<34}{'sum':>14}{'least':>10}{'median':>10}{'mean':>10}{'90 %':>10}{'greatest':>10}",
    ]
    for name, summary in facts["figures"].items():
        numbers = [summary[key] for key in ("min", "median", "mean", "p90", "max")]
        total = "" if name in ("source_fps",) else f"{summary['sum']:,.0f}"
        lines.append(f"{FIGURES[name]:<34}{total:>14}" + "".join(f"{_short(number):>10}" for number in numbers))
    if facts["failures"]:
        lines += ["", "records   cannot be used, since"]
        lines += [f"{count:>7,}   {reason}" for reason, count in facts["failures"].items()]
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) else f"{number:,.2f}"


def draw(stats: Stats, out: Path, source: str) -> None:
    """Writes `figure_of` into a file."""
    figure_of(stats, source).savefig(out)


def figure_of(stats: Stats, source: str) -> Any:
    """A figure of Matplotlib: a histogram for each name of `FIGURES`, and bars for the reasons why records fail."""
    import matplotlib.figure

    reasons = list(stats.reasons().items())
    shown = reasons[:_MOST_REASONS]
    below = 0.7 + 0.22 * len(shown) if shown else 0.0
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        figure = matplotlib.figure.Figure(figsize=(12, 5.2 + below), layout="constrained", dpi=110)
        failed = f", {len(stats.failures):,} of them not usable" if stats.failures else ""
        figure.suptitle(f"{Path(source).name}: {stats.records:,} records{failed}", fontsize=10)
        parts = figure.subfigures(2 if shown else 1, 1, squeeze=False, height_ratios=[5.2, below] if shown else [1])
        panels = parts[0, 0].subplots(2, 4).ravel()
        for panel, (name, called) in zip(panels, FIGURES.items(), strict=True):
            panel.set_title(called, fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            _draw_values(panel, stats.values[name], _counted(name))
        if shown:
            left_out = len(reasons) - len(shown)
            _draw_reasons(parts[1, 0].subplots(), shown, f" (the most frequent; {left_out} more)" if left_out else "")
    return figure


_MOST_REASONS = 8  # the table has them all


def _counted(name: str) -> str:
    """Of what there is a figure of this name each."""
    return "images" if name == "image_patches" else "records" if name in ("tokens", "learnt", "turns") else "videos"


def _draw_values(panel: Any, values: np.ndarray, counted: str) -> None:
    if not len(values):
        panel.set_axis_off()
        panel.text(0.5, 0.5, "none", ha="center", va="center", transform=panel.transAxes)
        return
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) <= _FEW_KINDS:
        # Frame rates, say: bars side by side, for some are so near to each other that they would be one.
        panel.bar(range(len(kinds)), counts, color=_BLUE, width=0.7)
        panel.set_xticks(range(len(kinds)), [_short(kind) for kind in kinds])
        panel.set_xlim(-0.7, max(len(kinds), 4) - 0.3)
    else:
        wide = values.min() > 0 and values.max() > _WIDE * np.median(values)
        if wide:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:,g}")
        panel.hist(values, bins=_edges(values, wide), color=_BLUE)
        for value, called, colour in (
            (np.median(values), "median", "#e4572e"),
            (np.percentile(values, 90), "90 %", "#8a8a8a"),
        ):
            panel.axvline(float(value), color=colour, linewidth=1, label=f"{called} {_short(float(value))}")
        panel.legend(fontsize=7, frameon=False)
        panel.set_ylim(0, 1.25 * panel.get_ylim()[1])  # room for it
    panel.set_ylabel(counted, fontsize=7)
    panel.yaxis.get_major_locator().set_params(integer=True)


_BLUE = "#3457d5"
_FEW_KINDS, _WIDE, _BINS = 10, 20, 40


def _edges(values: np.ndarray, wide: bool) -> np.ndarray:
    """Edges of bins; of whole numbers each bin holds as many, so that no gap shows where there is none."""
    low, high = float(values.min()), float(values.max())
    bins = min(_BINS, max(5, len(values)))
    if wide:
        return np.geomspace(low, high, bins + 1)
    if (values == values.round()).all():
        step = max(1, math.ceil((high - low + 1) / bins))
        return np.arange(low, high + step + 1, step) - 0.5
    return np.linspace(low, high, bins + 1)


def _draw_reasons(panel: Any, reasons: list[tuple[str, int]], note: str) -> None:
    panel.set_title(f"why records cannot be used{note}", fontsize=8)
    counts = [count for _, count in reasons]
    panel.barh(range(len(reasons)), counts, color="#e4572e", height=0.7)
    for place, (reason, count) in enumerate(reasons):
        text = reason if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 3]}..."
        panel.text(count, place, f"  {count:,}  {text}", va="center", fontsize=7)
    # Room for the texts.
    panel.set_xlim(0, max(counts) * 4)
    panel.invert_yaxis()
    panel.set_axis_off()


_LONGEST = 150
