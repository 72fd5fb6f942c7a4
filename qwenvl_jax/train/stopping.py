"""Stopping a run by a signal, so that every process stops at the same place and a checkpoint of it is written."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator

from qwenvl_jax.train.processes import Processes

_ONE_WISH_SECONDS = 5.0


class Stop:
    """Whether a run is asked to stop, and where.

    The work of a run is one sequence of pieces, the same in all processes: steps, and within validation, batches and
    tokens. A signal may reach some processes and not others, and never all at the same moment. So each says how many
    pieces it has begun, waits before the next one until all have said it, and stops after the most that any has begun:
    no process waits on devices for a piece that another will not take, and none takes one more than it must.

        process 0   1 2 3 4 |signal                  4 begun                     stop after 5
        process 1   1 2 3 4 5 |told by process 0     5 begun    4 and 5: five    stop after 5

    Args:
      processes: of the run.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._changed = threading.Condition()
        self._begun, self._last = 0, -1
        self._asked = False

    def here(self) -> bool:
        """Whether the run stops here, and from then on everywhere; if not, the next piece counts as begun.

        To be asked at the same places by all processes.
        """
        with self._changed:
            # One second at a time, so that a second signal is seen to.
            while self._asked and self._last < 0:
                self._changed.wait(1.0)
            if self._asked and self._begun >= self._last:
                return True
            self._begun += 1
            return False

    def ask(self) -> None:
        """Asks all processes to stop."""
        if self._processes.count == 1:
            with self._changed:
                self._asked, self._last = True, 0
        else:
            self._processes.tell("stop", "asked")

    def agree(self, _: str = "") -> None:
        """Finds the last piece with the other processes, once one of them asked."""
        with self._changed:
            self._asked = True
            begun = self._begun
        last = max(int(text) for text in self._processes.gather("begun", str(begun)))
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def close(self) -> None:
        """Lets go of others that ask when this process has done its last piece, which was the last of the run."""
        if self._processes.count > 1 and self._last < 0:
            text = str(self._begun)
            index = self._processes.index
            self._processes.put(f"begun/{index or 'all'}", text if index else json.dumps([text]))


@contextlib.contextmanager
def stop_signals(processes: Processes) -> Iterator[Stop]:
    """A `Stop` that SIGTERM or Ctrl-C asks for; the second such signal acts as if nobody listened.

    SIGTERM within seconds of the first signal is the same wish once more: a machine that shuts down sends it to a
    launcher, which passes it on, and to the process itself.
    """
    stop = Stop(processes)
    with processes.watched("stop", stop.agree):
        # Python lets the main thread alone listen.
        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if here}

        def restore():
            for number, handler in before.items():
                signal.signal(number, handler)

        asked: list[float] = []

        def request(number: int, _):
            now = time.monotonic()
            if asked:
                if number != signal.SIGTERM or now - asked[0] > _ONE_WISH_SECONDS:
                    restore()
                    signal.raise_signal(number)
                return
            asked.append(now)
            # Elsewhere than in the handler, which may have interrupted whoever holds the lock.
            threading.Thread(target=stop.ask, daemon=True, name="stop").start()

        for number in before:
            signal.signal(number, request)
        try:
            yield stop
        finally:
            restore()
            stop.close()
