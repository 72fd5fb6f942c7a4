"""`timings.jsonl`: what differs from run to run, apart from the metrics, which do not; a line a step, no step twice.

    {"step": 7, "seconds": 1.283, "wait": 0.002, "tokens_per_second": 6315.7, "vision_tokens_per_second": 2411.1,
     "mfu": 0.412, "memory_bytes": 61203283968, "peak_memory_bytes": 80530636800, "goodput": 0.93}

- `seconds`: from the moment that the step before was done to the moment that this one was, or from the end of a pause
  (compiling, saving, validating) between them.
- `wait`: those of them in which the devices had nothing to do, since the next batch was not there yet.
- `wait_for_others`: of several processes, those of `wait` in which this one had its part of the batch, and another not.
- `mfu`: model FLOPs use, see `qwenvl_jax.flops`; left out where the peak of a device is not known.
- `memory_bytes`, `peak_memory_bytes`: of the fullest device of this process; left out where devices do not tell.
- `goodput`: of the wall time since the run was first started, pauses, failures and restarts included, the share that
  went into steps that stand, waits left out. Steps that a resumed run takes once more do not stand.
"""

import collections
import dataclasses
import math
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.flops import Work, utilization
from qwenvl_jax.train.metrics import StepFile, each_line

_LOOK_SECONDS = 0.002  # between looks at whether a step is done


@dataclasses.dataclass(frozen=True)
class Timing:
    """How fast a step was; see the module for units.

    Attributes:
      seconds, wait: as in the line.
      tokens, vision_tokens: of the batch.
      mfu: from 0 to 1, or None.
    """

    seconds: float
    wait: float
    tokens: int
    vision_tokens: int
    mfu: float | None


class LastStep:
    """When the devices were done with the step that was handed to them last.

    They compute it while the host goes on, and what the host waits for meanwhile costs nothing.
    """

    def __init__(self):
        self._last = _Handed(None, -math.inf)
        self._handed: queue.SimpleQueue[_Handed | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="last step").start()

    def begin(self, output: jax.Array) -> None:
        """Takes what a step gives, as it is handed to the devices."""
        self._last = _Handed(output, math.inf)
        self._handed.put(self._last)

    def done_at(self) -> float:
        """By `time.monotonic()`: infinity while the step is under way, minus infinity before the first."""
        return self._last.done

    def _watch(self) -> None:
        while (handed := self._handed.get()) is not None:
            # It looks and does not wait: a thread that waits in JAX cannot be ended, and the process neither.
            while not handed.output.is_ready():
                if self._closed.wait(_LOOK_SECONDS):
                    return
            handed.done, handed.output = time.monotonic(), None

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()
        self._handed.put(None)


@dataclasses.dataclass
class _Handed:
    """A step that was handed to the devices: what it gives, until it is done, and when it was."""

    output: Any
    done: float


class TimingLog:
    """Measures steps and writes their lines.

    Args:
      path: of the file.
      done: steps that the restored checkpoint holds; later lines, and a line half written, are removed.
      started: when the run was first started, in seconds since 1970; see `first_start`.
      devices: that the steps run on.
    """

    def __init__(self, path: str | os.PathLike, done: int, *, started: float, devices: Sequence[jax.Device]):
        self.path = Path(path)
        self._file = StepFile(path, done)
        self._started, self._devices = started, devices
        self._useful = sum(line["seconds"] - line["wait"] for line in each_line(self.path) if "seconds" in line)
        self._last, self._wait, self._others = time.monotonic(), 0.0, 0.0
        self._running: collections.deque[tuple[int, Work, float]] = collections.deque()

    def start(self) -> None:
        """Begins to measure: what went before, a pause, is no step's time."""
        self._last, self._wait, self._others = time.monotonic(), 0.0, 0.0

    def paused(self, seconds: float) -> None:
        """Leaves a pause out of the time of the step that is taken."""
        self._last += seconds

    def waited(self, own: float, others: float = 0.0) -> None:
        """Counts a wait of the devices for a batch: for this process's part, and then for the other processes."""
        self._wait += own + others
        self._others += others

    def begin(self, step: int, work: Work, flops: float) -> None:
        """Takes a step that was handed to the devices: what is in its batch, and what it costs."""
        self._running.append((step, work, flops))

    def finish(self, step: int) -> tuple[dict[str, Any], Timing]:
        """Writes the line of a step that is done, and returns it."""
        number, work, flops = self._running.popleft()
        assert number == step, "steps end in the order in which they began"
        now = time.monotonic()
        seconds = max(now - self._last, 1e-9)
        wait, others = min(self._wait, seconds), min(self._others, seconds)
        self._last, self._wait, self._others = now, 0.0, 0.0
        self._useful += seconds - wait
        timing = Timing(seconds, wait, work.tokens, work.vision_tokens, utilization(flops, seconds, self._devices))
        line: dict[str, Any] = {
            "step": step,
            "seconds": round(seconds, 6),
            "wait": round(wait, 6),
            **({"wait_for_others": round(others, 6)} if others else {}),
            "tokens_per_second": round(work.tokens / seconds, 1),
            "vision_tokens_per_second": round(work.vision_tokens / seconds, 1),
        }
        if timing.mfu is not None:
            line["mfu"] = round(timing.mfu, 4)
        line |= self._memory()
        line["goodput"] = round(self._useful / max(time.time() - self._started, self._useful, 1e-9), 4)
        self._file.write(line)
        return line, timing

    def _memory(self) -> dict[str, int]:
        here = [device.memory_stats() or {} for device in self._devices if device.process_index == jax.process_index()]
        found = {}
        for name, key in (("memory_bytes", "bytes_in_use"), ("peak_memory_bytes", "peak_bytes_in_use")):
            if told := [stats[key] for stats in here if key in stats]:
                found[name] = max(told)
        return found

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def first_start(folder: Path) -> float:
    """When the run in a folder was first started, in seconds since 1970: now, if it is not written there yet."""
    path = folder / "started"
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        now = time.time()
        path.write_text(f"{now}\n")
        return now
