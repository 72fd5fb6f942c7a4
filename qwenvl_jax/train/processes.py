"""Several processes that carry out one run: how they join, what they tell each other, and how they end together.

What devices exchange goes through the mesh. The rest, some hundred bytes a step, goes through the key-value store that
JAX's coordination service keeps in process 0, so that no device waits for it. A run of one process has nobody to talk
to: each method then returns at once.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from qwenvl_jax.errors import ConfigError, QwenVLError, StoreError
from qwenvl_jax.train import clusters
from qwenvl_jax.train.refusals import refusal

# A process that gave no sign of life for so long is lost, and the others end: a run must stop within a minute.
HEARTBEAT_SECONDS = 30
# Hosts start minutes apart; whoever looks at the log may want to know sooner.
_JOIN_SECONDS = 300
_PATIENCE_SECONDS = 30
# Waiting is done in pieces, between which Python sees to signals.
_PIECE_MS = 1000
_LONG_MS = 10**8
# Process 0 holds the store: it ends after the others have read why.
_READING_SECONDS = 2.0
_runs = itertools.count()


def join() -> None:
    """Joins the other processes of a run, where the environment says that there are some; see `clusters`.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say so, or a cluster that JAX knows (TPU pods,
    Slurm, Open MPI, Kubernetes: see `jax.distributed.initialize`). To be called before JAX looks for devices; in a
    program that used JAX before no cluster is looked for.

    Raises:
      ConfigError: variables that are missing or no numbers, one of several processes that cannot find the others, or by
        its variables one of several that used JAX before.

    Where others do not come, JAX ends this process by SIGABRT, so that whoever started it may try again.
    """
    if jax.distributed.is_initialized():
        return
    in_use = _jax_in_use()
    if in_use and not any(os.environ.get(name) for name in (clusters.COUNT, clusters.INDEX)):
        return
    arguments = clusters.arguments(os.environ)  # what was given by hand is looked at in any case
    if in_use and arguments and arguments.get("num_processes", 1) > 1:
        raise ConfigError(
            f"{clusters.COUNT}={arguments['num_processes']} says that this is one of several processes, but JAX was "
            "used here before it could join the others, and the run would go on alone; start the run before anything "
            "else uses JAX, or unset the variable."
        )
    if arguments is None or in_use:
        return
    if _initialize(arguments):
        # At once: JAX listens to SIGTERM from here on and would keep it to itself.
        _end_by_sigterm()
        # CPUs, unlike a TPU or a GPU, run programs at once that were handed over one after the other; exchanges of two
        # (a step and a save, say) then meet those of another process in any order, and Gloo ends both.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        if jax.default_backend() == "cpu":
            # Read back from the cache, a program of CPUs has lost the order of its exchanges (jaxlib 0.10.2), and those
            # of two processes meet in any order.
            jax.config.update("jax_enable_compilation_cache", False)
    else:
        clusters.check_alone(os.environ)


def _initialize(arguments: Mapping[str, Any]) -> bool:
    """Has JAX join the processes; whether it found that there are any."""
    times = {"initialization_timeout": _JOIN_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    patience = threading.Timer(_PATIENCE_SECONDS, _tell_waiting)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(**{**arguments, **times})
    except ValueError:
        if arguments:
            raise
        return False
    except ModuleNotFoundError as error:
        # JAX asks the machine's metadata with it, on TPU VMs.
        raise ConfigError(
            f"the other hosts of this TPU slice are found with the package {error.name}, which is not installed; "
            "pip install 'qwenvl_jax[tpu]'."
        ) from error
    finally:
        patience.cancel()
    return True


def _tell_waiting() -> None:
    """Says whom this process waits for: JAX says it only when it ends the process, and not in these words."""
    state = _state()
    others = f"process 0 at {state.coordinator_address}" if state.process_id else "the others"
    print(
        f"qwenvl-jax: process {state.process_id} waits for {others}; it ends after {_JOIN_SECONDS} s. Every process of "
        f"the run has to be started, and to reach {state.coordinator_address}.",
        file=sys.stderr,
        flush=True,
    )


def _end_by_sigterm() -> None:
    """Has SIGTERM interrupt the process where no step is under way.

    JAX's coordination service listens to it, for a use that is not ours, and a process that still reads its data or its
    weights would not end.
    """

    def interrupt(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # Python lets no other listen
        signal.signal(signal.SIGTERM, interrupt)


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
        self._leaving: list[Callable[[], None]] = []

    @classmethod
    def joined(cls) -> "Processes":
        """Those that this process has joined, without JAX looking for devices; itself alone if it joined none."""
        state = _state()
        return cls(state.process_id or 0, state.num_processes or 1)

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

    def get(self, name: str, waiting: Callable[[float], None] = lambda seconds: None) -> str:
        """What is published under a name; waits for it, and says now and then for how long."""
        began = time.monotonic()
        while True:
            try:
                return self._client.blocking_key_value_get(f"{self._scope}/{name}", _PIECE_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            waiting(time.monotonic() - began)

    def gather(
        self, name: str, text: str, waiting: Callable[[int, float], None] = lambda index, seconds: None
    ) -> list[str]:
        """The texts of all processes in order; waits until each has given its own. A name is used once.

        Args:
          waiting: told, in process 0, which process is waited for, and for how many seconds, again and again.
        """
        if self.count == 1:
            return [text]
        if self.index:
            self.put(f"{name}/{self.index}", text)
            return json.loads(self.get(f"{name}/all"))
        others = range(1, self.count)
        texts = [text, *(self.get(f"{name}/{index}", functools.partial(waiting, index)) for index in others)]
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
            while True:
                # Long waits and no asking again and again: there may be hundreds of processes.
                try:
                    text = self._client.blocking_key_value_get(f"{self._scope}/{key}", _LONG_MS)
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" in str(error):  # a run may take weeks
                        continue
                    return
                if text:
                    act(text)
                return

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
    def leaving(self, act: Callable[[], None]) -> Iterator[None]:
        """Meanwhile has `act` be called when this process exits at once, see `sharing_fate`: nothing else clears up."""
        self._leaving.append(act)
        try:
            yield
        finally:
            self._leaving.remove(act)

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
            if status == 1 and not isinstance(error, StoreError):  # which tells all there is
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
        for act in tuple(self._leaving):
            with contextlib.suppress(Exception):
                act()
        # Not by way of the interpreter's end, which waits for the other processes.
        os._exit(status)


def _told(error: BaseException) -> tuple[int, str]:
    """Exit status and line of an error."""
    first = _first_line(error)
    if isinstance(error, QwenVLError):
        return 2, " ".join(str(error).split())
    if isinstance(error, StoreError):
        return 1, " ".join(str(error).split())
    if line := refusal(error):
        return 2, line
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return 1, f"the step could not be finished, as happens when another process is gone ({first})"
    return 1, f"{type(error).__name__}: {first}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _client() -> Any:
    """JAX's connection to its coordination service."""
    return _state().client


def _state() -> Any:
    """What JAX knows of the processes it joined, which has no public name; Orbax uses it alike."""
    from jax._src import distributed

    return distributed.global_state


def _jax_in_use() -> bool:
    """Whether JAX has looked for devices, after which it joins no others; this has no public name either."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def first_of_each(parts: Sequence[int]) -> list[int]:
    """Of processes that make these parts, one for each part in order."""
    return [int(index) for index in np.unique(np.asarray(parts), return_index=True)[1]]
