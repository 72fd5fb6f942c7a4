"""`metrics.jsonl` and `timings.jsonl`: one line a step, and no step twice, however often the run was stopped."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.train.step import StepOutput


class MetricsLog:
    """Appends a line for each step; opens by cutting off what lies behind the restored step.

    A step's loss is fetched when the next step has been handed to the device, so that writing it makes nothing wait.

    Args:
      path: of the file.
      done: steps that the restored checkpoint holds; later lines, and a line half written, are removed.
    """

    def __init__(self, path: str | os.PathLike, done: int):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(_length_of(self.path, done))
        self._pending: tuple[dict[str, Any], StepOutput] | None = None

    def push(self, line: dict[str, Any], output: StepOutput) -> dict[str, Any] | None:
        """Takes a step's line and what it gave, still being computed; writes and returns the line before it."""
        written = self.flush()
        self._pending = (line, output)
        return written

    def flush(self) -> dict[str, Any] | None:
        """Writes the line that waits, if there is one, and returns it."""
        if self._pending is None:
            return None
        line, output = self._pending
        self._pending = None
        line = {
            "step": line["step"],
            "loss": _finite(output.loss),
            **line,
            "grad_norm": _finite(output.grad_norm),
            **({"skipped": int(output.skipped)} if output.skipped else {}),
        }
        # One write, so that another process sees whole lines.
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        return line

    def sync(self) -> None:
        """Writes what waits, and has the disk keep it: before a checkpoint says that these steps are done."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a waiting line is not written."""
        self._file.close()


class TimingLog:
    """`timings.jsonl`: what differs from run to run, apart from the metrics, which do not.

        {"step": 7, "seconds": 1.283, "wait": 0.002}

    `seconds` since the step before was handed to the device, `wait` of them for the batch; the first step of a process
    has no `seconds`.

    Args:
      path, done: as of `MetricsLog`.
    """

    def __init__(self, path: str | os.PathLike, done: int):
        self.path = Path(path)
        self._file = self.path.open("ab")
        self._file.truncate(_length_of(self.path, done))
        self._last: float | None = None

    def push(self, step: int, wait: float) -> None:
        """Writes the line of a step that waited so many seconds for its batch."""
        now = time.monotonic()
        line: dict[str, Any] = {"step": step}
        if self._last is not None:
            line["seconds"] = round(now - self._last, 6)
        self._last = now
        self._file.write(json.dumps(line | {"wait": round(wait, 6)}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: jax.Array) -> float | None:
    """A number, or None where it is none: JSON has no word for it."""
    number = float(value)
    return number if math.isfinite(number) else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; a half-written last line is left out."""
    lines = []
    with Path(path).open("rb") as file:
        for text in file:
            line = _parsed(text)
            if line is None:
                break
            lines.append(line)
    return lines


def _length_of(path: Path, done: int) -> int:
    """Bytes of the lines up to step `done`."""
    length = 0
    with path.open("rb") as file:
        for text in file:
            line = _parsed(text)
            if line is None or line["step"] > done:
                break
            length += len(text)
    return length


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line, or None if it is not whole."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
