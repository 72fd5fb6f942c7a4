"""Values that are costly to make, kept while there is room."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

Value = TypeVar("Value")


class Kept:
    """Values by key, each made once as long as they fit into `max_bytes`; those used longest ago go first.

    Safe to use from several threads: two that want the same value wait for one making. A copy in another process begins
    empty.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._futures: collections.OrderedDict[Hashable, concurrent.futures.Future] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Kept, (self._max_bytes,)

    def get(self, key: Hashable, make: Callable[[], Value], size_of: Callable[[Value], int]) -> Value:
        """The value of `key`; made by `make` if it is not here. What `make` raises goes to all that wait for it."""
        with self._lock:
            mine = key not in self._futures
            if mine:
                self._futures[key] = concurrent.futures.Future()
            future = self._futures[key]
            self._futures.move_to_end(key)
        if not mine:
            return future.result()[0]
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._futures[key]
            future.set_exception(error)
            raise
        with self._lock:
            future.set_result((value, size_of(value)))
            self._bytes += future.result()[1]
            self._drop_oldest()
        return value

    def peek(self, key: Hashable):
        """The value of `key` if it is here, else None."""
        with self._lock:
            future = self._futures.get(key)
            if future is None or not future.done():
                return None
            self._futures.move_to_end(key)
            return future.result()[0]

    def _drop_oldest(self) -> None:
        while self._bytes > self._max_bytes:
            # What is still being made has a waiting owner and no size yet.
            key = next((key for key, future in self._futures.items() if future.done()), None)
            if key is None:
                return
            self._bytes -= self._futures.pop(key).result()[1]
