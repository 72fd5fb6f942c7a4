"""Worker processes that are replaced when they die or hang; nothing that they make changes by it.

A batch follows from the number of its step alone, so the batches after a loss are those that there would have been:

    steps delivered   0 1 2 |   a worker is killed: all are ended
                            | 3          made alone, since workers were ahead: it may be step 5 that kills them
                              | 4 5 ...  then a new iterator as before
"""

import atexit
import functools
import multiprocessing
import multiprocessing.process
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from qwenvl_jax.errors import DataError

Item = TypeVar("Item")

# Replacements in a row, without a batch between them, after which a step is given up.
MOST_REPLACEMENTS = 3
_WORKER = "grain-process-prefetch"  # how Grain names its processes
_DIED = "terminated unexpectedly"  # and what it says when one ended
_END_SECONDS = 30.0
_LAST_SECONDS = 120.0  # that workers which are asked to end go on: schedulers give jobs less than that
_START_SECONDS = 300.0  # that workers may take to start and import, beside the time for their first batch
_OFTEN = {
    signal.SIGKILL: ", as the system does where memory runs out",
    signal.SIGBUS: ", as happens where /dev/shm, through which batches pass, is full",
}


class Supervised(Iterator[Item]):
    """Passes on what an iterator over worker processes gives, and begins a new one where that stops giving.

    Args:
      make: begins an iterator from a step up to another, given what `remember` kept of the item before ("" of none).
      remember: what helps to go on after an item.
      first, steps: the first step, and the one after the last.
      timeout: seconds to wait for a batch before its workers count as hung; their start has more.
      describe: what stands in a step, for the error.
      say: told of each replacement.

    Raises (when a step is asked for):
      DataError: the same step was lost several times in a row; names it and what stands in it.
    """

    def __init__(
        self,
        make: Callable[[int, int, str], Iterator[Item]],
        first: int,
        steps: int,
        *,
        timeout: float,
        remember: Callable[[Item], str],
        describe: Callable[[int], str],
        say: Callable[[str], None],
    ):
        self._make, self._step, self._steps, self._timeout = make, first, steps, timeout
        self._remember, self._describe, self._say = remember, describe, say
        self._last, self._replaced, self._end = "", 0, steps
        self._puller: _Puller | None = None

    def __next__(self) -> Item:
        if self._step >= self._steps:
            raise StopIteration
        while True:
            if self._puller is None:
                self._end = self._step + 1 if self._replaced else self._steps
                self._puller = _Puller(functools.partial(self._make, self._step, self._end, self._last))
            try:
                item = self._puller.pull(self._timeout)
            except _Lost as lost:
                self._replace(str(lost))
                continue
            except BaseException:
                self.close()
                raise
            self._last = self._remember(item)
            self._step += 1
            self._replaced = 0
            if self._step == self._end:
                self.close()
            return item

    def close(self) -> None:
        """Ends the workers."""
        puller, self._puller = self._puller, None
        if puller is not None:
            puller.end()

    def __del__(self):
        self.close()

    def _replace(self, reason: str) -> None:
        self.close()
        self._replaced += 1
        if self._replaced > MOST_REPLACEMENTS:
            raise DataError(
                f"step {self._step + 1}: the workers that make it were lost {self._replaced} times in a row (the last "
                f"{reason}); in it stand {self._describe(self._step)}. Take out what kills or stalls them, raise "
                "data.worker_timeout, or give the machine more memory."
            )
        self._say(
            f"step {self._step + 1}: a worker {reason}; workers are started anew and the run goes on with this step "
            f"({self._replaced} of {MOST_REPLACEMENTS} times in a row)"
        )


class _Lost(Exception):
    """No batch came, and none will; says what happened to the worker."""


class _Puller:
    """Takes batches from one iterator, in a thread, so that waiting for one can have an end."""

    def __init__(self, make: Callable[[], Iterator]):
        # Grain starts its processes when the first batch is asked for; those of others are not ours to end.
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._started = False
        # A program may end without closing what it took batches from; workers would only end late.
        atexit.register(self.end)
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="batches")
        self._thread.start()

    def pull(self, timeout: float) -> Any:
        """The next batch.

        Raises:
          _Lost: a worker died, or none came in time.
        """
        self._wanted.put(True)
        seconds = timeout if self._started else timeout + _START_SECONDS
        try:
            item, error = self._found.get(timeout=seconds)
        except queue.Empty:
            raise _Lost(f"gave nothing for {seconds:g} s") from None
        self._started = True
        if error is None:
            return item
        if isinstance(error, RuntimeError) and _DIED in str(error):
            raise _Lost(_death(str(error))) from error
        raise error

    def end(self) -> None:
        """Ends the processes and the thread."""
        atexit.unregister(self.end)
        self._wanted.put(False)
        for process in self._workers():
            process.kill()  # one that was stopped, too
        self._thread.join(_END_SECONDS)
        for process in self._workers():  # started meanwhile
            process.kill()
            process.join(_END_SECONDS)

    def _workers(self) -> list[multiprocessing.process.BaseProcess]:
        return [
            process
            for process in multiprocessing.active_children()
            if process.pid not in self._others and process.name.startswith(_WORKER)
        ]

    def _run(self, make: Callable[[], Iterator]) -> None:
        iterator = None
        try:
            iterator = make()
            while self._wanted.get():
                self._found.put((next(iterator), None))
        except BaseException as error:
            self._found.put((None, error))
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


def _death(said: str) -> str:
    """In words, how a worker died, from what Grain says of it."""
    code = next((int(word.strip(".")) for word in said.split() if word.strip(".").lstrip("-").isdigit()), None)
    if code is None:
        return "died"
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}{_OFTEN.get(signal.Signals(-code), '')}"
    return f"ended with exit code {code}"


def _end_late(number: int, frame: Any) -> None:
    """Ends a worker, but not before the run that it works for had the time to ask for its last batch."""
    del frame

    def end() -> None:
        os._exit(128 + number)

    late = threading.Timer(_LAST_SECONDS, end)
    late.daemon = True
    late.start()


def end_with_parent(index: int = 0, count: int = 1) -> None:
    """Has a worker process end when the one that started it does, and not before; for Grain's `worker_init_fn`."""
    del index, count
    # Ctrl-C in a terminal reaches workers too, and SIGTERM where a scheduler sends it to all processes of a job.
    # Whether a run ends by it is for the run to say: it saves first, and may wait for one more batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_late)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end with parent").start()
