"""A tiny run in several processes on this machine, each with one device: its config, and ways to start it."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.train.config import MeshConfig, TrainConfig
from tests.train.tiny_run import ROOT, environment, tiny_config, write_tiny_run

CONFIG = """\
from tests.train.several import several_config


def get_config():
    return several_config({folder!r})
"""


def write_several_run(folder: Path, clip: Path) -> Path:
    """As `write_tiny_run`, with batches that four processes can share."""
    write_tiny_run(folder, clip)
    (folder / "several.py").write_text(CONFIG.format(folder=str(folder)))
    return folder / "several.py"


def several_config(folder: str | Path) -> TrainConfig:
    """The last stage of `tiny_config`, over all devices of all processes."""
    config = tiny_config(folder)
    batch = BatchShape(rows=4, length=80, groups=4, vision=((4, 24),))
    stage = dataclasses.replace(config.stages[1], batch=batch)
    return dataclasses.replace(config, stages=(stage,), mesh=MeshConfig())


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    count: int,
    *arguments: object,
    logs: Path,
    port: int | None = None,
    only: int | None = None,
) -> list[subprocess.Popen]:
    """Starts `qwenvl-jax` (or, of a list that begins with "-m", that module) in so many processes of one run.

    Args:
      logs: folder for what each says, in a file by its number.
      port: of the coordinator; a free one by default.
      only: the one process to start, where they are started one by one.
    """
    module = () if arguments[0] == "-m" else ("-m", "qwenvl_jax")
    command = [sys.executable, *map(str, (*module, *arguments))]
    port = port or free_port()
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for index in range(count) if only is None else [only]:
        joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
        several = {**joined, "JAX_PROCESS_ID": str(index)} if count > 1 else {}
        with (logs / f"{index}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment(**several), stdout=log, stderr=subprocess.STDOUT)
            )
    return processes


def finish(processes: list[subprocess.Popen], seconds: float = 500) -> list[int]:
    """Waits for all and returns their statuses; ends those that do not end."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(logs: Path) -> str:
    """What all processes said."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(logs.glob("*.log")))
