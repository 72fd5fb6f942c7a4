"""The process that compiles: `python -m qwenvl_jax.plan.child FOLDER PARENT`; see `qwenvl_jax.plan.compiling`."""

import dataclasses
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.plan import compiling
from qwenvl_jax.plan.dump import assigned, assigned_bytes, sent_bytes
from qwenvl_jax.plan.programs import traced


def main(folder: Path, parent: int) -> None:
    """Compiles the request in a folder and writes the result there.

    Args:
      parent: number of the process that asks, with which this one ends.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    request = pickle.loads((folder / compiling.REQUEST).read_bytes())
    try:
        result = dataclasses.asdict(compiled(request, folder))
    except QwenVLError as error:
        result = {"error": str(error)}
    (folder / compiling.RESULT).write_text(json.dumps(result))


def _end_with(parent: int) -> None:
    """Ends this process once the one that asks is gone: a compiler at work hears no signal for minutes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compiled(request: compiling.Request | compiling.ServeRequest, folder: Path) -> compiling.Compiled:
    """Compiles a request.

    Args:
      folder: for facts that are known before, and for what the compiler writes.
    """
    # As in a run; tests are stricter.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    began = time.monotonic()
    step, facts = traced(request, devices_of(request.topology, request.slices))
    lowered = step.lower()
    (folder / compiling.FACTS).write_text(json.dumps(facts))
    dump = folder / compiling.DUMP
    # Where to write changes nothing in the program.
    options = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}
    memory, needed = None, None
    try:
        memory = lowered.compile(compiler_options=options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = compiling.needed_bytes(str(error), sum(facts["state"].values()))
        if needed is None:
            raise
    seconds = time.monotonic() - began
    counted = sent_bytes(dump, compiling.mesh_shape(request), request.slices)
    found = {
        "arguments": "argument_size_in_bytes",
        "temporaries": "temp_size_in_bytes",
        "outputs": "output_size_in_bytes",
        "aliased": "alias_size_in_bytes",
        "host": "host_temp_size_in_bytes",
    }
    sizes: dict[str, Any] = {name: getattr(memory, key) if memory else None for name, key in found.items()}
    if memory is None and assigned(dump):
        sizes = assigned_bytes(dump)
    return compiling.Compiled(**facts, **sizes, **counted, needed=needed, seconds=seconds)


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of slices, for compiling."""
    if topology == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
