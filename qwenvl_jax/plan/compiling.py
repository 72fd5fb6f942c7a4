"""Compiles a stage's step, or what answers, for a slice that is not there, and reads off what it takes.

In a process of its own: libtpu wants environment variables that other code must not see, takes gigabytes, and what it
prints is for its developers.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.parallel.mesh import AXES
from qwenvl_jax.plan import dump
from qwenvl_jax.plan.assumed import Assumed
from qwenvl_jax.train.config import MeshConfig, TrainConfig

# Told that there is no TPU, libtpu looks for none, on this machine or on others.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "x",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
REQUEST, FACTS, RESULT, DUMP = "request.pickle", "facts.json", "result.json", "dump"
_PATIENCE = 0.5  # seconds between two looks at how far the compiler is
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Request:
    """A step to compile.

    Attributes:
      config: of one stage, its mesh given in full, its model a shape.
      assumed: the stage's batch.
      topology: name of the slice; "cpu" for the devices of this process's kind, in tests.
      slices: how many of them.
    """

    config: TrainConfig
    assumed: Assumed
    topology: str
    slices: int = 1

    @property
    def mesh(self) -> MeshConfig:
        """Of the run."""
        return self.config.mesh


Phase = Literal["prompt", "token"]


@dataclasses.dataclass(frozen=True)
class ServeRequest:
    """A program of `qwenvl_jax.generate` to compile, with weights and caches in bfloat16.

    Attributes:
      model: its shape.
      mesh: all sizes given.
      topology, slices: as of `Request`.
      rows, groups: of the batch.
      context: slots of a row's cache; prompts fill them but for one `LENGTH_STEP`.
      frames, patches: vision rows of a group, and patches of each.
      phase: the program that reads prompts, or the one that reads a token of each row.
      flops: of it, by formula.
    """

    model: QwenVLConfig
    mesh: MeshConfig
    topology: str
    rows: int
    groups: int
    context: int
    frames: int
    patches: int
    phase: Phase
    flops: int
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a step takes on each device.

    Attributes:
      parameters, learning: numbers of weights, of the whole model.
      state: bytes by kind: "weights", "frozen", "optimizer", "batch"; of what answers "decoder" (the weights that every
        token is multiplied with), "experts", "tower" (mergers, too), "table" (of its own, that rows are looked up in),
        "cache", "batch".
      arguments, temporaries, outputs, aliased, host: bytes of the compiled program; `aliased` of the outputs lie where
        arguments lay; `host` is in the host's memory. None of one for which the compiler found no memory.
      needed: bytes that a program that does not fit would take, as the compiler has it; None of one that does.
      flops, again: of a step, of the whole slice; and those that rematerialization adds.
      sent: bytes that a device sends, by the mesh axes that they go along and the kind of exchange, as
        "fsdp all-gather"; None where they could not be counted.
      across: bytes of them that go to other slices; None where they could not be counted.
      unknown_loops: see `qwenvl_jax.plan.hlo.Exchanges`.
      seconds: to trace and compile.
      notes: what a run would say at its start, see `qwenvl_jax.train.devices.attention_notes`.
    """

    parameters: int
    learning: int
    state: dict[str, int]
    arguments: int | None
    temporaries: int | None
    outputs: int | None
    aliased: int | None
    host: int | None
    needed: int | None
    flops: int
    again: int
    sent: dict[str, int] | None
    across: int | None
    unknown_loops: int
    seconds: float
    notes: Sequence[str] = ()


def check_libtpu() -> None:
    """Raises ConfigError: libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("plans are compiled by libtpu, which is not installed: pip install 'qwenvl_jax[tpu]'.")


def compile_step(request: Request | ServeRequest, *, quick: bool = False) -> Compiled:
    """Compiles in another process.

    Args:
      quick: stop it once all buffers have their memory. What it would do then, to generate code, takes most of the time
        and changes none of the figures; but a kernel that does not fit the fast memory would fail there.

    Raises:
      QwenVLError: what that process found wrong with the settings, or that it ended before it was done.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qwenvl-plan-") as name, (Path(name) / "log").open("w+b") as log:
        folder = Path(name)
        (folder / REQUEST).write_bytes(pickle.dumps(request))
        command = [sys.executable, "-m", "qwenvl_jax.plan.child", name, str(os.getpid())]
        child = subprocess.Popen(
            command, env={**os.environ, **_ENVIRONMENT}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while child.poll() is None:
                if quick and dump.assigned(folder / DUMP):
                    return _so_far(request, folder, time.monotonic() - began)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_PATIENCE)
        finally:
            child.kill()
            child.wait()
        if not (folder / RESULT).exists():
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            reason = "out of memory on this machine?" if child.returncode == -9 else (lines or ["no reason given"])[-1]
            raise QwenVLError(f"the compiler's process ended with status {child.returncode}: {reason[:500]}")
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    if "error" in result:
        raise ConfigError(result["error"])
    return Compiled(**result)


def _so_far(request: Request | ServeRequest, folder: Path, seconds: float) -> Compiled:
    """What is known once buffers have their memory."""
    counted = dump.sent_bytes(folder / DUMP, mesh_shape(request), request.slices)
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    facts |= dump.assigned_bytes(folder / DUMP)
    return Compiled(**facts, **counted, needed=None, seconds=seconds)


def mesh_shape(request: Request | ServeRequest) -> tuple[int, ...]:
    """Devices along each axis of the mesh."""
    return tuple(getattr(request.mesh, axis) for axis in AXES)


def needed_bytes(message: str, state: int) -> int | None:
    """What a program would take, from what libtpu says of one that does not fit; None where it says nothing of it.

    Args:
      state: bytes of its arguments, which one of the two messages leaves out.
    """
    whole = r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", 0
    temporaries = r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", state
    for pattern, more in (whole, temporaries):
        if found := re.search(pattern, message):
            return int(float(found[1]) * _UNITS[found[2]]) + more
    return None
