"""What a person watching a run sees: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from qwenvl_jax.train.timings import Timing

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.25
_WAIT_SHOWN = 0.05  # share of the time spent waiting for batches that is shown


class Progress:
    """Shows stage, step, loss, tokens a second, MFU and the time left; also the voice of the run's messages.

    Args:
      steps: of the whole run.
      done: steps done before.
      log: file that messages are also written to; None writes none.
      stream: where to show it.
    """

    def __init__(self, steps: int, done: int, log: TextIO | None = None, stream: TextIO | None = None):
        self._steps, self._done, self._log = steps, done, log
        self._stream = stream or sys.stderr
        self._began, self._shown = time.monotonic(), float("-inf")
        self._first, self._tokens, self._waited, self._others = done, 0, 0.0, 0.0
        self._seen, self._used = 0, 0.0
        self._bar: Bar | None = None

    def __enter__(self):
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            bar = self._bar = Bar(*columns, console=Console(file=self._stream), auto_refresh=False, transient=True)
            self._task = bar.add_task("", total=self._steps, completed=self._done, figures="")
            bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Shows a message of its own line, and keeps it in the log."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=self._stream, flush=True)
        if self._log is not None:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self._log, flush=True)

    def resume(self, done: int) -> None:
        """Counts from `done` steps, those of an earlier process."""
        self._done = done
        self.start_clock()

    def start_clock(self) -> None:
        """Begins to count speed anew, after a pause for compiling."""
        self._began, self._first, self._tokens = time.monotonic(), self._done, 0
        self._waited, self._others = 0.0, 0.0
        self._seen, self._used = 0, 0.0

    def paused(self, seconds: float) -> None:
        """Leaves a pause, in which no step was to be taken, out of the speed."""
        self._began += seconds

    def waited(self, own: float, others: float = 0.0) -> None:
        """Counts a wait of the devices for a batch: for this process's part, and then for the other processes."""
        self._waited += own
        self._others += others

    @property
    def wait_shares(self) -> tuple[float, float]:
        """Shares of the time, since the clock was started, that went into the one wait and into the other."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return self._waited / seconds, self._others / seconds

    def update(self, line: dict[str, Any], timing: "Timing | None" = None) -> None:
        """Takes a finished step's line of the metrics, and how fast it was."""
        if timing is not None:
            self._seen += timing.vision_tokens
            self._used += (timing.mfu or 0.0) * timing.seconds
        self._done, self._tokens = line["step"], self._tokens + line["tokens"]
        now = time.monotonic()
        if now - self._shown < (_SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_DRAWINGS):
            return
        self._shown = now
        seconds = max(now - self._began, 1e-9)
        left = (self._steps - self._done) * seconds / max(self._done - self._first, 1)
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        figures = f"loss {loss}  {self._tokens / seconds:,.0f} tokens/s"
        if self._seen:
            figures += f" ({self._seen / seconds:,.0f} vision)"
        if self._used:
            figures += f"  MFU {self._used / seconds:.1%}"
        figures += f"  {_clock(left)} left"
        if (share := sum(self.wait_shares)) >= _WAIT_SHOWN:
            figures += f"  waits for data {share:.0%}"
        if self._bar is None:
            print(f"{line['stage']} step {self._done}/{self._steps}  {figures}", file=self._stream, flush=True)
        else:
            description = f"{line['stage']} {self._done}/{self._steps}"
            self._bar.update(self._task, completed=self._done, description=description, figures=figures)
            self._bar.refresh()


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
