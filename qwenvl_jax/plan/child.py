"""The process that compiles: `python -m qwenvl_jax.plan.child FOLDER`; see `qwenvl_jax.plan.compiling`."""

import dataclasses
import json
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.flops import Work, step_flops
from qwenvl_jax.parallel.placement import Execution, Remat
from qwenvl_jax.plan import compiling
from qwenvl_jax.plan.dump import assigned, assigned_bytes, sent_bytes
from qwenvl_jax.train import program
from qwenvl_jax.train.adapters import make_parts
from qwenvl_jax.train.devices import mesh_of


def main(folder: Path) -> None:
    """Compiles the request in a folder and writes the result there."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
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


def traced_step(request: compiling.Request, devices: list[jax.Device]) -> tuple[jax.stages.Traced, dict[str, Any]]:
    """The step of a request on these devices, and facts that are known without compiling it."""
    config, (stage,) = request.config, request.config.stages
    assert isinstance(config.model, QwenVLConfig)  # as requests have it
    mesh, rules = mesh_of(config, devices)
    parts = make_parts(config, config.model, mesh, rules)
    state, frozen = program.abstract_state(parts, stage, config.seed)
    batch = program.abstract_batch(config.model, request.assumed.shape, Execution(mesh, rules))
    step = program.trace_step(parts, stage, state, frozen, batch, classes=request.assumed.classes)
    rest = jax.tree.leaves((state.step, state.opt_state, state.rng, state.guard))
    facts = {
        "parameters": sum(math.prod(weight.shape) for weight in (state.params | frozen).values()),
        "learning": sum(math.prod(weight.shape) for weight in state.params.values()),
        "state": {
            "weights": _bytes(state.params.values()),
            "frozen": _bytes(frozen.values()),
            "optimizer": _bytes(rest),
            "batch": _bytes(jax.tree.leaves(batch)),
        },
        "flops": step_flops(config.model, request.assumed.work, state.params).total,
        "again": made_again(config.model, request.assumed.work, state.params, stage.remat),
    }
    return step, facts


def made_again(model: QwenVLConfig, work: Work, learning: Collection[str], remat: Remat) -> int:
    """FLOPs that rematerialization adds to a step: of layers that have a backward pass, the forward pass or a part."""
    text = {"tokens": work.tokens, "text_pairs": work.text_pairs}
    seen = {name: getattr(work, name) for name in ("patches", "frame_pairs", "window_pairs")}
    counts = text | seen if any(name.startswith("vision.") for name in learning) else text
    pairs = {name: count if name.endswith("pairs") else 0 for name, count in counts.items()}
    whole, attention = (step_flops(model, Work(**parts), ()).forward for parts in (counts, pairs))
    return {"none": 0, "products": attention, "attention": whole - attention}.get(remat, whole)


def compiled(request: compiling.Request, folder: Path) -> compiling.Compiled:
    """Compiles a request.

    Args:
      folder: for facts that are known before, and for what the compiler writes.
    """
    # As in a run; tests are stricter.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    began = time.monotonic()
    step, facts = traced_step(request, devices_of(request.topology))
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
        needed = compiling.needed_bytes(str(error))
        if needed is None:
            raise
    seconds = time.monotonic() - began
    sent, unknown = sent_bytes(dump, compiling.mesh_shape(request))
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
    return compiling.Compiled(**facts, **sizes, needed=needed, sent=sent, unknown_loops=unknown, seconds=seconds)


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a slice, for compiling."""
    if topology == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def _bytes(leaves: Iterable[Any]) -> int:
    """Of the part of each array that a device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize if leaf.sharding is not None else 0
        for leaf in leaves
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
