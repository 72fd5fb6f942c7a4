"""`--profile STEPS`: a trace of some steps for XProf (or Perfetto), in `OUT/profile`."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.errors import ConfigError

# What XProf takes as the boundaries of steps.
ANNOTATION = "train"
# Steps of a process that come before those that a mere number asks for: the first waits for what the others find made.
_WARM_UP = 1


class Profiler:
    """Traces the steps asked for.

    Args:
      steps: "5" for five steps, once the first of this process is done, or "10-15" for these steps of the run; None
        traces none.
      folder: for the trace, on this machine.
      say: told where the trace is.
      kept: where it is looked for, if that is elsewhere: in a bucket.

    Raises:
      ConfigError: what is neither.
    """

    def __init__(self, steps: str | None, folder: Path, say: Callable[[str], None], kept: Any = None):
        self._folder, self._say, self._open = folder, say, False
        self._kept = folder if kept is None else kept
        self._count, self._first, self._last = 0, 0, -1
        if steps is None:
            return
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
        if found and found[2]:
            self._first, self._last = int(found[1]), int(found[2])
        elif found:
            self._count = int(found[1])
        if not self._count and not 1 <= self._first <= self._last:
            raise ConfigError(
                f"--profile {steps} must be a number of steps, such as 5, or the first and the last, such as 10-15."
            )

    def expect(self, done: int, steps: int) -> None:
        """Says so if none of the steps that are left, those after `done` up to `steps`, is to be traced."""
        first, last = self._first, self._last
        if self._count:
            first = done + 1 + _WARM_UP
            last = first + self._count - 1
        if last >= 0 and (last <= done or first > steps):
            self._say(
                f"nothing is traced: --profile asks for steps {first} to {last}, and {done} of {steps} are done; ask "
                "for some of those that are left"
            )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Stands around the call of step `number` of the run."""
        if self._count:
            self._first = number + _WARM_UP
            self._last, self._count = self._first + self._count - 1, 0
        if not self._open and self._first <= number <= self._last:
            jax.profiler.start_trace(self._folder)
            self._open, self._first = True, number
        with jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=number):
            yield

    def done(self, number: int, output: Any) -> float:
        """Ends the trace with the last step asked for, once `output`, what it gave, is computed.

        Returns:
          Seconds that went into writing the trace.
        """
        if not self._open or number < self._last:
            return 0.0
        jax.block_until_ready(output)
        began = time.monotonic()
        self.close()
        return time.monotonic() - began

    def close(self) -> None:
        """Ends a trace that is open."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            self._say(
                f"a trace of steps {self._first} to {self._last} is in {self._kept}; `xprof {self._kept}` shows it"
            )
