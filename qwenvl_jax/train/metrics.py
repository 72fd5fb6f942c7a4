"""`metrics.jsonl`: one line a step, and no step twice, however often the run was stopped.

    {"step": 7, "loss": 1.31, "tokens": 8102, "batch": "5ae1...", "stage": "s1", "learning_rate": 3e-05,
     "grad_norm": 0.82, "loss_by_data": {"captions": 1.12, "clips": 1.58}, "loss_by_modality": {"image": 1.12, ...}}

`tokens` are those that are no padding, `batch` is a hash of the samples, `learning_rate` what the step was taken with.
A loss of a data set or modality is the weighted mean over its own tokens; one that the batch has nothing of is left
out. With experts, also `router_balance`, `router_z`, and `experts`, each expert's share of the tokens times their
number, averaged over layers: 1 for each where they are balanced. `skipped` stands in a step that was left out: how many
steps of the stage have been, with it. All of it follows from the settings; what differs from run to run is in
`timings.jsonl`.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.data.classes import SampleClass
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.optimizer import learning_rate
from qwenvl_jax.train.refusals import naming
from qwenvl_jax.train.step import StepOutput


class StepFile:
    """A file of one line a step, to append to; opens by cutting off what lies behind the restored step.

    Args:
      path: of the file.
      done: steps that the restored checkpoint holds; later lines, and a line half written, are removed.
    """

    def __init__(self, path: str | os.PathLike, done: int):
        self.path = Path(path)
        # No buffer: what a full disk did not take is not tried once more by `close`, whose error would hide the first.
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(length_of(self.path, done))

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line at once, so that another process sees whole lines."""
        text = json.dumps(line).encode() + b"\n"
        with naming(self.path):
            while text:  # a disk that fills up takes a part
                text = text[self._file.write(text) :]

    def sync(self) -> None:
        """Has the disk keep what was written."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricsLog:
    """Appends a line for each step.

    A step's loss is fetched when the next step has been handed to the device, so that writing it makes nothing wait.

    Args:
      path, done: see `StepFile`.
    """

    def __init__(self, path: str | os.PathLike, done: int):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = StepFile(path, done)
        self._pending: tuple[dict[str, Any], StepOutput, Sequence[SampleClass]] | None = None

    def push(
        self, line: dict[str, Any], output: StepOutput, classes: Sequence[SampleClass] = ()
    ) -> dict[str, Any] | None:
        """Takes a step's line and what it gave, still being computed; writes and returns the line before it.

        Args:
          classes: that `output.sums` tells losses of.
        """
        written = self.flush()
        self._pending = (line, output, classes)
        return written

    def flush(self) -> dict[str, Any] | None:
        """Writes the line that waits, if there is one, and returns it."""
        if self._pending is None:
            return None
        line, output, classes = self._pending
        self._pending = None
        line = {
            "step": line["step"],
            "loss": finite(output.loss),
            **line,
            "grad_norm": finite(output.grad_norm),
            **({"skipped": int(output.skipped)} if output.skipped else {}),
            **_told_apart(output.sums, classes),
            **_of_experts(output.sums),
        }
        self._file.write(line)
        return line

    def sync(self) -> None:
        """Writes what waits, and has the disk keep it: before a checkpoint says that these steps are done."""
        self.flush()
        self._file.sync()

    def close(self) -> None:
        """Closes the file; a waiting line is not written."""
        self._file.close()


def learning_rates(stage: StageConfig) -> np.ndarray:
    """f32[steps], the learning rate of each step of a stage."""
    schedule = learning_rate(stage.optimizer, stage.steps)
    return np.asarray(jax.vmap(schedule)(jnp.arange(stage.steps, dtype=jnp.int32)), np.float32)


def finite(value: jax.Array | float) -> float | None:
    """A number, or None where it is none: JSON has no word for it."""
    number = float(value)
    return number if math.isfinite(number) else None


def _told_apart(sums: Mapping[str, Any], classes: Sequence[SampleClass]) -> dict[str, dict[str, float | None]]:
    """The losses of each data set and of each modality, out of the sums of each class."""
    if "loss" not in sums or not classes:
        return {}
    losses, weights = (np.asarray(sums[name], np.float64) for name in ("loss", "weight"))
    kinds: dict[str, Callable[[SampleClass], str]] = {
        "loss_by_data": lambda one: one.data,
        "loss_by_modality": lambda one: one.modality,
    }
    found: dict[str, dict[str, float | None]] = {}
    for kind, name_of in kinds.items():
        found[kind] = {}
        for name in dict.fromkeys(map(name_of, classes)):
            of_name = np.asarray([name_of(one) == name for one in classes])
            if weight := weights[of_name].sum():
                found[kind][name] = finite(losses[of_name].sum() / weight)
    return found


def _of_experts(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The router's losses, and how the tokens are spread over the experts."""
    found: dict[str, Any] = {name: finite(sums[name]) for name in ("router_balance", "router_z") if name in sums}
    if "experts" in sums:
        choices_YX = np.asarray(sums["experts"], np.float64)
        total_Y1 = np.maximum(choices_YX.sum(axis=1, keepdims=True), 1)
        load_X = (choices_YX / total_Y1).mean(axis=0) * choices_YX.shape[1]
        found["experts"] = [round(float(load), 4) for load in load_X]
    return found


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl` or another file of steps; a half-written last line is left out."""
    return list(each_line(path))


def each_line(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The same one after the other, as long as the run may be."""
    with Path(path).open("rb") as file:
        for text in file:
            line = _parsed(text)
            if line is None:
                return
            yield line


def length_of(path: Path, done: int) -> int:
    """Bytes of the lines of a file of steps up to step `done`."""
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
