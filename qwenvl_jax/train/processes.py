"""Several processes that carry out one run: how they join, what they tell each other, and how they end together.

What devices exchange goes through the mesh. The rest, some hundred bytes a step, goes through the key-value store that
JAX's coordination service keeps in process 0, so that no device waits for it. A run of one process has nobody to talk
to: each method then returns at once.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.train.refusals import refusal

# A process that gave no sign of life for so long is lost, and the others end: a run must stop within a minute.
HEARTBEAT_SECONDS = 30
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Waiting is done in pieces, between which Python sees to signals.
_PIECE_MS = 1000
_FOREVER_MS = 10**9
# Process 0 holds the store: it ends after the others have read why.
_READING_SECONDS = 2.0
_runs = itertools.count()


def join() -> None:
    """Joins the other processes of a run, where the environment says that there are some.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say so, or a cluster that JAX knows (TPU pods,
    Slurm, Open MPI, Kubernetes: see `jax.distributed.initialize`). To be called before JAX looks for devices.

    Raises:
      ConfigError: variables that are missing or no numbers, or a coordinator that cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in (_ADDRESS, _COUNT, _INDEX) if os.environ.get(name)}
    arguments: dict[str, Any] = {}
    if _COUNT in given or _INDEX in given:
        missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in given]
        if missing:
            raise ConfigError(
                f"{' and '.join(given)} are set, but {' and '.join(missing)} not; a run of several processes needs "
                "all three."
            )
        count, index = _number(_COUNT, given), _number(_INDEX, given)
        if not 0 <= index < count:
            raise ConfigError(f"{_INDEX}={index} must be from 0 to {count - 1}, since {_COUNT}={count}.")
        # Given in full, so that no cluster is looked for and each process keeps all devices that it sees.
        arguments = {"num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}
        arguments["coordinator_address"] = given[_ADDRESS]
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if arguments:
            raise ConfigError(f"{_ADDRESS}={given[_ADDRESS]} cannot be used ({error}); give host:port.") from error
        # No cluster: a run of one process.
    except RuntimeError as error:
        if arguments or _ADDRESS in given:
            raise ConfigError(
                f"the processes of the run did not find each other at {_ADDRESS}={given[_ADDRESS]} "
                f"({str(error).splitlines()[0]}); start all of them, with the same address."
            ) from error
        # JAX was in use before, by a program that calls this one: it has joined or not.


def _number(name: str, given: Mapping[str, str]) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise ConfigError(f"{name}={given[name]!r} must be a whole number.") from None


class Processes:
    """The processes of one run, as one of them sees them.

    Attributes:
      index, count: number of this process, from 0, and how many there are; JAX's without arguments.

    Args:
      client: of the coordination service; JAX's by default.
    """

    def __init__(self, index: int | None = None, count: int | None = None, client: Any = None):
        self.index = jax.process_index() if index is None else index
        self.count = jax.process_count() if count is None else count
        # Each run that these processes carry out, one after the other, has keys of its own.
        self._scope = f"qwenvl_jax/{next(_runs) if client is None else 'given'}"
        self._client: Any = _client() if self.count > 1 and client is None else client

    @contextlib.contextmanager
    def screen(self) -> Iterator[TextIO | None]:
        """Where a run is shown: None, the usual place, in process 0; nowhere in the others, which would repeat it."""
        if self.index == 0:
            yield None
            return
        with open(os.devnull, "w") as nowhere:
            yield nowhere

    def put(self, name: str, text: str) -> None:
        """Publishes a text under a name; what was there is replaced."""
        self._client.key_value_set(f"{self._scope}/{name}", text, allow_overwrite=True)

    def get(self, name: str) -> str:
        """What is published under a name; waits for it."""
        while True:
            try:
                return self._client.blocking_key_value_get(f"{self._scope}/{name}", _PIECE_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def gather(self, name: str, text: str) -> list[str]:
        """The texts of all processes in order; waits until each has given its own. A name is used once."""
        if self.count == 1:
            return [text]
        if self.index:
            self.put(f"{name}/{self.index}", text)
            return json.loads(self.get(f"{name}/all"))
        texts = [text, *(self.get(f"{name}/{index}") for index in range(1, self.count))]
        self.put(f"{name}/all", json.dumps(texts))
        return texts

    def forget(self, name: str) -> None:
        """Frees what was gathered under a name, once every process has it."""
        if self.count > 1 and self.index == 0:
            self._client.key_value_delete(f"{self._scope}/{name}/")

    def check_same(self, settings: Mapping[str, str]) -> None:
        """Checks that all processes were started with the same settings, by name.

        Raises:
          ConfigError: in every process, if one has not those of process 0; names the first that differs.
        """
        if self.count == 1:
            return
        if self.index == 0:
            self.put("settings", json.dumps(dict(settings)))
        first = json.loads(self.get("settings"))
        odd = [name for name in {**first, **settings} if first.get(name) != settings.get(name)]
        told = ""
        if odd:
            told = (
                f"process {self.index} has {odd[0]}={settings.get(odd[0])}, but process 0 has {first.get(odd[0])}; "
                "start every process with the same settings, code and data."
            )
        for line in self.gather("checked", told):
            if line:
                raise ConfigError(line)

    @contextlib.contextmanager
    def watched(self, name: str, act: Callable[[str], None]) -> Iterator[None]:
        """Meanwhile calls `act`, in a thread, with the text that another process publishes for this one: see `tell`."""
        if self.count == 1:
            yield
            return
        key = f"{name}/{self.index}"

        def wait() -> None:
            # One long wait and no asking again and again: there may be hundreds of processes.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                text = self._client.blocking_key_value_get(f"{self._scope}/{key}", _FOREVER_MS)
                if text:
                    act(text)

        thread = threading.Thread(target=wait, daemon=True, name=name)
        thread.start()
        try:
            yield
        finally:
            self.put(key, "")
            thread.join()

    def tell(self, name: str, text: str) -> None:
        """Publishes a text for the watchers of that name in all processes, this one too."""
        for index in range(self.count):
            self.put(f"{name}/{index}", text)

    @contextlib.contextmanager
    def sharing_fate(self) -> Iterator[None]:
        """Ends all processes when an error ends one: none can go on alone, and waiting for a lost one has no end.

        In a run of one process errors pass. Of several, each says its error and exits at once: 2 for a mistake of the
        user, 130 for an interruption, 1 for anything else, such as a process that is gone.
        """
        if self.count == 1:
            yield
            return
        try:
            with self.watched("fate", self._end_with):
                yield
        except BaseException as error:
            status, told = _told(error)
            if status == 1:
                with contextlib.suppress(OSError):  # as below
                    traceback.print_exc()
                told += "; start the processes again, the run continues from its latest checkpoint"
            line = f"process {self.index}: {told}"
            with contextlib.suppress(Exception):
                self.tell("fate", json.dumps([status, line]))
            self._exit(status, line)

    def _end_with(self, text: str) -> None:
        status, line = json.loads(text)
        self._exit(status, line)

    def _exit(self, status: int, line: str) -> None:
        with contextlib.suppress(OSError):  # whoever read it may be gone, and the process must end all the same
            print(f"qwenvl-jax: error: {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        if self.index == 0:
            time.sleep(_READING_SECONDS)
        # Not by way of the interpreter's end, which waits for the other processes.
        os._exit(status)


def _told(error: BaseException) -> tuple[int, str]:
    """Exit status and line of an error."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, QwenVLError):
        return 2, " ".join(str(error).split())
    if line := refusal(error):
        return 2, line
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return 1, f"the step could not be finished, as happens when another process is gone ({first})"
    return 1, f"{type(error).__name__}: {first}"


def _client() -> Any:
    """JAX's connection to its coordination service, which has no public name; Orbax uses it alike."""
    from jax._src import distributed

    return distributed.global_state.client


def first_of_each(parts: Sequence[int]) -> list[int]:
    """Of processes that make these parts, one for each part in order."""
    return [int(index) for index in np.unique(np.asarray(parts), return_index=True)[1]]
