"""Where the figures of a run are shown besides its own files: TensorBoard, Weights & Biases.

They are written from what `metrics.jsonl`, `timings.jsonl` and `validation.jsonl` get, and those files lead: when a run
goes on, a tracker is brought level with them first, so that it has each step once, and also those that were written
before it was asked for.
"""

import contextlib
import html
import importlib.util
import json
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.metrics import each_line

Tracker = Literal["tensorboard", "wandb"]
# What each needs, and the extra of this package that brings it.
_MODULES: dict[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
# The files that steps come from, by the name under which a tracker remembers how far it is.
_STEPS = {"metrics": ("metrics.jsonl", "timings.jsonl"), "validation": ("validation.jsonl",)}
_VALIDATION = "validation/"
_SECONDS_BETWEEN_FLUSHES = 2.0


class Sink(Protocol):
    """One tracker of a run.

    Attributes:
      last: the last step that it has, of the metrics and of the validation.
    """

    last: dict[str, int]

    def write(self, kind: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Takes the figures of a step and texts, by name."""

    def close(self) -> None:
        """Writes what waits, and ends."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are none, or whose library is not installed.

    Raises:
      ConfigError: names the extra that brings it.
    """
    for name in names:
        if name not in _MODULES:
            raise ConfigError(f"track={tuple(names)} must name trackers out of {', '.join(_MODULES)}; got {name!r}.")
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(
                f"track has {name!r}, which needs the package {_MODULES[name]}; install it with "
                f"`pip install 'qwenvl_jax[{name}]'`, or leave {name!r} out of track."
            )


class Trackers:
    """The trackers of a run, level with its files.

    Args:
      names: which.
      out: the run's folder; `metrics.jsonl` and the others are cut back to `done` already.
      done: steps that are done.
      settings: of the run, by dotted name, for those that show them.
      name: of the run, likewise; the folder's by default.
    """

    def __init__(self, names: Sequence[str], out: Path, done: int, settings: Mapping[str, str], name: str = ""):
        check_trackers(names)
        makers: dict[str, Callable[[Path, int, Mapping[str, str], str], Sink]] = {
            "tensorboard": _TensorBoard,
            "wandb": _WeightsAndBiases,
        }
        self._sinks: list[Sink] = []
        with contextlib.ExitStack() as opened:
            for tracker in dict.fromkeys(names):
                self._sinks.append(makers[tracker](out, done, settings, name or out.name))
                opened.callback(self._sinks[-1].close)
            for sink in self._sinks:
                for kind, step, line in _lines(out, sink.last):
                    sink.write(kind, step, numbers_of(line, kind), texts_of(line))
            opened.pop_all()

    def write(self, kind: Literal["metrics", "validation"], line: Mapping[str, Any]) -> None:
        """Takes a line that a file got, of a step later than those before."""
        for sink in self._sinks:
            if line["step"] > sink.last.get(kind, 0):
                sink.write(kind, line["step"], numbers_of(line, kind), texts_of(line))

    def close(self) -> None:
        """Writes what waits, and ends."""
        for sink in self._sinks:
            sink.close()


def numbers_of(line: Mapping[str, Any], kind: str = "metrics") -> dict[str, float]:
    """The figures in a line of a file by the names that trackers have them under: nested ones joined by "/"."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, list) and all(isinstance(one, int | float) for one in value):
            for number, inner in enumerate(value):
                add(f"{name}/{number}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)

    for name, value in line.items():
        if name != "step":
            add(f"{_VALIDATION}{name}" if kind == "validation" else name, value)
    return found


def texts_of(line: Mapping[str, Any]) -> dict[str, str]:
    """The answers in a line of the validation, by data set and sample."""
    found = {}
    for one in line.get("answers", ()):
        text = f"**{one['question']}**\n\n{one['answer']}\n\n(truth: {one['truth']})"
        found[f"{_VALIDATION}{one['data']}/{one['id']}"] = text
    return found


def _lines(out: Path, last: Mapping[str, int]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """What the files of a run have after the steps that a tracker has, in the order of the steps."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for kind, files in _STEPS.items():
        for file in files:
            for line in each_line(out / file) if (out / file).exists() else ():
                if line["step"] > last.get(kind, 0):
                    found.setdefault((line["step"], kind), {}).update(line)
    for (step, kind), line in sorted(found.items()):
        yield kind, step, line


class _TensorBoard:
    """Event files in `OUT/tensorboard`: an event for the figures of a step, one for each text."""

    def __init__(self, out: Path, done: int, settings: Mapping[str, str], name: str):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder = out / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.last = _cut_events(folder, done)
        # The name tells seconds alone, and a file that is there would be written over.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # A TensorBoard that is open forgets the steps that were cut off.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=done + 1, session_log=start))
        self._flushed = time.monotonic()

    def write(self, kind: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2, summary_pb2

        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        values += [value for name, text in texts.items() for value in summary.text(name, text).value]
        self._add(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))
        self.last[kind] = step
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _add(self, event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def close(self) -> None:
        self._writer.close()


def _cut_events(folder: Path, done: int) -> dict[str, int]:
    """Cuts event files back to the steps up to `done`; returns the last step of each kind that they have then."""
    from tensorboardX.proto import event_pb2

    last: dict[str, int] = {}
    for path in sorted(folder.glob("*tfevents*")):
        length = 0
        with path.open("rb+") as file:
            for end, record in _records(file):
                event = event_pb2.Event.FromString(record)
                if event.summary.value and event.step > done:
                    break
                length = end
                for value in event.summary.value:
                    kind = "validation" if value.tag.startswith(_VALIDATION) else "metrics"
                    last[kind] = max(last.get(kind, 0), event.step)
            file.truncate(length)
    return last


def _records(file) -> Iterator[tuple[int, bytes]]:
    """The whole records of an event file, each with the place where it ends.

    A record is its length in eight bytes, their checksum in four, the record, its checksum in four:
    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details.
    """
    while len(head := file.read(12)) == 12:
        (size,) = struct.unpack("<Q", head[:8])
        record = file.read(size + 4)
        if len(record) < size + 4:
            return
        yield file.tell(), record[:-4]


class _WeightsAndBiases:
    """A run of Weights & Biases, its files in `OUT/wandb`. WANDB_PROJECT, WANDB_MODE and so on hold as always.

    What was sent is not taken back: a run that goes on from a checkpoint sends no step that it sent before, whose
    metrics it would repeat.
    """

    def __init__(self, out: Path, done: int, settings: Mapping[str, str], name: str):
        import wandb

        self._state = out / "wandb" / "run.json"
        self._state.parent.mkdir(exist_ok=True)
        try:
            known = json.loads(self._state.read_text())
        except (FileNotFoundError, ValueError):
            known = {"id": uuid.uuid4().hex[:8], "last": {}}
        self._id, self.last = known["id"], known["last"]
        try:
            self._run = wandb.init(
                id=self._id,
                resume="allow",
                dir=str(out),
                name=os.environ.get("WANDB_NAME", name),
                project=os.environ.get("WANDB_PROJECT", "qwenvl_jax"),
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases cannot be used ({' '.join(str(error).split())}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave 'wandb' out of track."
            ) from error

    def write(self, kind: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        import wandb

        pages = {name: wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()}
        self._run.log({**numbers, **pages}, step=step)
        self.last[kind] = step
        unfinished = self._state.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"id": self._id, "last": self.last}))
        unfinished.replace(self._state)

    def close(self) -> None:
        self._run.finish()
