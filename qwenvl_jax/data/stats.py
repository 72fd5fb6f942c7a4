"""What a data set holds, in figures and plots: the work behind `qwenvl-jax data stats`."""

import collections
import concurrent.futures
import dataclasses
import json
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
_WHERE = re.compile(r"^(?:\S+\[\d+\], )?\S*:\d+: ")
_FILE = re.compile(
    r"\S*/\S*[^\s:;,)]|\b[\w-]+\.(?:mp4|mov|mkv|webm|avi|ts|gif|png|jpe?g|webp|bmp|tiff?)\b", re.IGNORECASE
)
_PLOTTED = ("tokens", "learnt", "duration", "source_fps", "frames", "video_patches")


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
        if part["type"] == "image" or isinstance(part["video"], VideoFrames):
            continue
        info, choice = probe(part["video"]), processor.opener.open(part).choice
        assert choice is not None  # of a file
        found["duration"].append(info.duration)
        found["source_fps"].append(info.fps)
        found["frames"].append(len(choice.indices))
    return found


def show(source: str, *, model: str | None = None, as_json: bool = False, out: str | None = None) -> None:
    """Prints figures of a data set, as JSON or as a table, and draws them; the work of `qwenvl-jax data stats`.

    Args:
      source: a JSONL file, or a data set that `data build` made.
      model: see `named_processor`.
      out: file to draw histograms into; its ending says in which format.

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
    """Writes a picture of histograms."""
    import matplotlib.figure

    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained", dpi=110)
        failed = f", {len(stats.failures):,} of them not usable" if stats.failures else ""
        figure.suptitle(f"{Path(source).name}: {stats.records:,} records{failed}", fontsize=10)
        panels = figure.subplots(2, 3).ravel().tolist()
        for panel, name in zip(panels, _PLOTTED, strict=True):
            values = stats.values[name]
            panel.set_title(FIGURES[name], fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            if len(values):
                panel.hist(values, bins=min(40, max(5, len(values))), color="#3457d5")
                panel.axvline(float(np.median(values)), color="#e4572e", linewidth=0.8, label="median")
                panel.legend(fontsize=7, frameon=False)
            else:
                panel.set_axis_off()
                panel.text(0.5, 0.5, "none", ha="center", va="center", transform=panel.transAxes)
        figure.savefig(out)
