"""What a person watching work on a data set sees: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Counts pieces of work; safe to use from several threads.

    Args:
      doing: what is done, such as "measuring records".
      pieces: how many there are.
      stream: where to show it; standard error by default.
    """

    def __init__(self, doing: str, pieces: int, stream: TextIO | None = None):
        self._doing, self._pieces, self._done = doing, pieces, 0
        self._stream = stream or sys.stderr
        self._shown = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Progress | None = None

    def __enter__(self) -> "Bar":
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task(self._doing, total=self._pieces)
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, pieces: int = 1) -> None:
        """Counts pieces that are done."""
        with self._lock:
            self._done += pieces
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
            elif time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
                self._shown = time.monotonic()
                print(f"{self._doing}: {self._done:,} of {self._pieces:,}", file=self._stream, flush=True)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Passes on items and counts each when the next is asked for."""
        for item in items:
            yield item
            self.done()
