"""Compiles a stage's step for a slice that is not there, and reads off what it takes.

In a process of its own: libtpu wants environment variables that other code must not see, takes gigabytes, and what it
prints is for its developers.
"""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.plan.assumed import Assumed
from qwenvl_jax.train.config import TrainConfig

# Told that there is no TPU, libtpu looks for none, on this machine or on others.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "x",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
REQUEST, RESULT, DUMP = "request.pickle", "result.json", "dump"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Request:
    """A step to compile.

    Attributes:
      config: of one stage, its mesh given in full, its model a shape.
      assumed: the stage's batch.
      topology: name of the slice; "cpu" for the devices of this process's kind, in tests.
    """

    config: TrainConfig
    assumed: Assumed
    topology: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a step takes on each device.

    Attributes:
      parameters, learning: numbers of weights, of the whole model.
      state: bytes by kind: "weights", "frozen", "optimizer", "batch".
      arguments, temporaries, outputs, aliased, host: bytes of the compiled program; `aliased` of the outputs lie where
        arguments lay; `host` is in the host's memory. None of one that does not fit.
      needed: bytes that a program that does not fit would take, as the compiler has it; None of one that does.
      flops, again: of a step, of the whole slice; and those that rematerialization adds.
      sent: bytes that a device sends, by the mesh axes that they go along and the kind of exchange, as
        "fsdp all-gather"; None where they could not be counted.
      unknown_loops: see `qwenvl_jax.plan.hlo.Exchanges`.
      seconds: to trace and compile.
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
    unknown_loops: int
    seconds: float


def check_libtpu() -> None:
    """Raises ConfigError: libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("plans are compiled by libtpu, which is not installed: pip install 'qwenvl_jax[tpu]'.")


def compile_step(request: Request) -> Compiled:
    """Compiles in another process.

    Raises:
      QwenVLError: what that process found wrong with the settings, or that it ended before it was done.
    """
    with tempfile.TemporaryDirectory(prefix="qwenvl-plan-") as name:
        folder = Path(name)
        (folder / REQUEST).write_bytes(pickle.dumps(request))
        environment = {**os.environ, **_ENVIRONMENT}
        command = [sys.executable, "-m", "qwenvl_jax.plan.child", name]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if not (folder / RESULT).exists():
            lines = [line for line in ended.stderr.splitlines() if line.strip()] or ["nothing was said"]
            reason = "out of memory on this machine?" if ended.returncode == -9 else lines[-1][:500]
            raise QwenVLError(f"the compiler's process ended with status {ended.returncode}: {reason}")
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    if "error" in result:
        raise ConfigError(result["error"])
    return Compiled(**result)


def needed_bytes(message: str) -> int | None:
    """What a program would take, from what libtpu says of one that does not fit; None where it says nothing of it."""
    patterns = (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"\(([\d.]+)([KMGT]?)\) exceeds available HBM")
    for pattern in patterns:
        if found := re.search(pattern, message):
            return int(float(found[1]) * _UNITS[found[2]])
    return None
