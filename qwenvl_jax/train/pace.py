"""Which process makes the others wait, and whether it is its data that is late: told in the log while a run goes on."""

from collections.abc import Callable, Sequence

import numpy as np

EVERY = 50  # steps between looks
_LEAST = 5  # steps that tell something
_WORTH_TELLING = 0.1  # share of the time of a step
_ABOVE = 2.0  # times the median of the processes that is well above it


class Pace:
    """Gathers seconds by process and, once in a while, names those that are well behind the others.

    Every process is as fast as the slowest, since a step is taken together. What tells them apart is what their devices
    wait for: for a batch of their own (a starved loader), or for the others to come to the step (the one that never
    does is the slow one: its host is busy, or its data late). A device that computes slowly is not seen here.

    Args:
      say: told, at most once for each look and process.
      every: steps between looks.
    """

    def __init__(self, say: Callable[[str], None], every: int = EVERY):
        self._say, self._every = say, every
        self._seen: list[list[tuple[float, float, float]]] = []
        self._stage = ""

    def add(self, stage: str, step: int, records: Sequence[dict]) -> None:
        """Takes what the processes know as they begin a step.

        Args:
          records: by process: "step", seconds of the step before or None; "idle", those of them spent waiting for the
            other processes; "wait", seconds in which its devices waited for this step's batch.
        """
        if stage != self._stage:
            self._stage, self._seen = stage, []
        # A process's first step has no time, and the second one's holds the compilation of the first.
        if all(record["step"] is not None for record in records):
            self._seen.append([(record["step"], record["wait"], record["idle"]) for record in records])
        if len(self._seen) > self._every:
            self._look(step)

    def end(self, step: int) -> None:
        """Looks at the steps of several processes since the last look, as their stage ends or stops after a step."""
        if len(self._seen) > _LEAST and len(self._seen[0]) > 1:
            self._look(step)

    def _look(self, step: int) -> None:
        for line in behind(np.asarray(self._seen[1:])):
            self._say(f"{self._stage} step {step}: {line}")
        self._seen = self._seen[:1]


def behind(seconds: np.ndarray) -> list[str]:
    """What is to be told of processes that are behind.

    Args:
      seconds: f64[steps, processes, 3]: of a step, waiting for the own batch, waiting for the other processes.
    """
    steps, count = seconds.shape[:2]
    # Means, since a loader that is late in one step of ten starves a run as well.
    mean = max(float(seconds[..., 0].mean()), 1e-9)
    waits, idles = seconds[..., 1].mean(axis=0), seconds[..., 2].mean(axis=0)
    lines = []
    # Of the other processes; of a single one there is nothing to compare with.
    usual = [np.median(np.delete(waits, index)) if count > 1 else 0.0 for index in range(count)]
    starved = [
        index for index in range(count) if waits[index] > _WORTH_TELLING * mean and waits[index] > _ABOVE * usual[index]
    ]
    if not starved and np.median(waits) > _WORTH_TELLING * mean:
        lines.append(f"all processes wait for batches {np.median(waits) / mean:.0%} of the last {steps} steps' time")
    for index in starved:
        line = f"waits for batches {waits[index] / mean:.0%} of the last {steps} steps' time"
        lines.append(f"process {index} {line}, the others {usual[index] / mean:.0%}" if count > 1 else line)
    for index in range(count):
        others = np.delete(idles, index)
        if count > 1 and index not in starved and others.min() > max(_WORTH_TELLING * mean, _ABOVE * idles[index]):
            lines.append(
                f"process {index} is slow: the others wait for it at least {others.min() / mean:.0%} of the last "
                f"{steps} steps' time, and not for its batches"
            )
    return lines
