"""What a person watching a conversion sees: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_DRAWINGS = 0.25


class Progress:
    """Shows tensors, bytes, the rate and the time left.

    Args:
      doing: what is done, such as "converting".
      tensors, size: how many there are, and their bytes.
      stream: where to show it; standard error by default.
    """

    def __init__(self, doing: str, tensors: int, size: int, stream: TextIO | None = None):
        self._doing, self._all, self._size = doing, tensors, size
        self._stream = stream or sys.stderr
        self._tensors = self._bytes = self._moved = 0
        self._began = self._shown = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            bar = self._bar = Bar(*columns, console=Console(file=self._stream), auto_refresh=False, transient=True)
            self._task = bar.add_task(self._doing, total=self._size, figures="")
            bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._tensors:
            self._show()

    def moved(self, count: int) -> None:
        """Counts bytes that went from one place to the other."""
        self._bytes += count
        self._moved += count
        now = time.monotonic()
        if now - self._shown >= (_SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_DRAWINGS):
            self._shown = now
            self._show()

    def finished(self, tensors: int, found: int = 0) -> None:
        """Counts whole tensors; `found` are the bytes of those that were there before and took no time."""
        self._tensors += tensors
        self._bytes += found

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._moved / seconds
        left = f"{_clock((self._size - self._bytes) / rate)} left" if rate else ""
        figures = f"{_size(self._bytes)} of {_size(self._size)}  {_size(rate)}/s  {left}".rstrip()
        description = f"{self._doing} {self._tensors}/{self._all} tensors"
        if self._bar is None:
            print(f"{description}  {figures}", file=self._stream, flush=True)
        else:
            self._bar.update(self._task, completed=self._bytes, description=description, figures=figures)
            self._bar.refresh()


def _size(count: float) -> str:
    for name, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.1f} {name}"
    return f"{count:.0f} B"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
