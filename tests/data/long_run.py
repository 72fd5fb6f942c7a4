"""A loader that runs for long: a process that `test_long_run.py` starts.

    python -m tests.data.long_run FOLDER STEPS WORKERS

prints lines of JSON: a step, and the resident memory and the open files of this process and of its workers then.
"""

import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.pipeline import batches
from tests.data.host import loader_of
from tests.data.mixed import mixed_config

EVERY = 500


def main(folder: str, steps: str, workers: str) -> None:
    config = mixed_config(folder, cache_bytes=100_000, window=12)
    parts = tuple(
        dataclasses.replace(part, weight=weight, final_weight=None, max_epochs=None)
        for part, weight in zip(config.stages[0].data.mixture, (60.0, 30.0, 0.3), strict=True)
    )
    data = dataclasses.replace(config.stages[0].data, mixture=parts, max_failed=1.0)
    batch = BatchShape(rows=1, length=192, vision=((4, 64),))
    stage = dataclasses.replace(config.stages[0], steps=int(steps), data=data, batch=batch)
    loader = loader_of(dataclasses.replace(config, stages=(stage,)))
    for step, planned in enumerate(batches(loader, int(steps), threads=1, workers=int(workers)), 1):
        del planned
        if step % EVERY == 0:
            pids = ["self", *(str(process.pid) for process in multiprocessing.active_children())]
            line = {"step": step, "memory": list(map(memory, pids)), "files": list(map(files, pids))}
            print(json.dumps(line), flush=True)


def memory(pid: str) -> int:
    """Bytes of resident memory that are the process's own."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096


def files(pid: str) -> int:
    """How many files are open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:])
