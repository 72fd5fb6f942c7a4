"""The programs that are compiled: a stage's step as `train` jits it, and what `qwenvl_jax.generate` jits to answer."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from qwenvl_jax.batch import KVCache
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.flops import Work, step_flops
from qwenvl_jax.generate import LENGTH_STEP, Sampling, read_prompts, read_token
from qwenvl_jax.models import pretrained
from qwenvl_jax.parallel.mesh import AXES, make_mesh
from qwenvl_jax.parallel.placement import Execution, Remat, row_shares
from qwenvl_jax.parallel.rules import make_rules, param_shardings
from qwenvl_jax.plan.compiling import Request, ServeRequest
from qwenvl_jax.train import program
from qwenvl_jax.train.adapters import make_parts
from qwenvl_jax.train.devices import attention_notes, mesh_of

Facts = dict[str, Any]


def traced(request: Request | ServeRequest, devices: list[jax.Device]) -> tuple[jax.stages.Traced, Facts]:
    """The program of a request on these devices, and facts that are known without compiling it."""
    return traced_step(request, devices) if isinstance(request, Request) else traced_answer(request, devices)


def traced_step(request: Request, devices: list[jax.Device]) -> tuple[jax.stages.Traced, Facts]:
    """The same of a step."""
    config, (stage,) = request.config, request.config.stages
    assert isinstance(config.model, QwenVLConfig)  # as requests have it
    mesh, rules = mesh_of(config, devices)
    row_shares(mesh, rules)  # what processes of a run could not feed is refused here too
    parts = make_parts(config, config.model, mesh, rules)
    state, frozen = program.abstract_state(parts, stage, config.seed)
    batch = program.abstract_batch(config.model, request.assumed.shape, Execution(mesh, rules))
    step = program.trace_step(parts, stage, state, frozen, batch, classes=request.assumed.classes)
    # As they are meant: quantized ones are stored as codes, of which a byte has two, and scales.
    model = parts.exported_weights()
    counted = dict(model) | {name: weight for name, weight in state.params.items() if name not in model}
    rest = jax.tree.leaves((state.step, state.opt_state, state.rng, state.guard))
    facts = {
        "parameters": sum(math.prod(weight.shape) for weight in counted.values()),
        "learning": sum(math.prod(weight.shape) for weight in state.params.values()),
        "state": {
            "weights": held_bytes(state.params.values()),
            "frozen": held_bytes(frozen.values()),
            "optimizer": held_bytes(rest),
            "batch": held_bytes(jax.tree.leaves(batch)),
        },
        "flops": step_flops(config.model, request.assumed.work, state.params).total,
        "again": made_again(config.model, request.assumed.work, state.params, stage.remat),
        "notes": attention_notes(config, mesh, rules),
    }
    return step, facts


def made_again(model: QwenVLConfig, work: Work, learning: Collection[str], remat: Remat) -> int:
    """FLOPs that rematerialization adds to a step: of layers that have a backward pass, the forward pass or a part."""
    text = {"tokens": work.tokens, "text_pairs": work.text_pairs}
    seen = {name: getattr(work, name) for name in ("patches", "frame_pairs", "window_pairs")}
    counts = text | seen if any(name.startswith("vision.") for name in learning) else text
    pairs = {name: count if name.endswith("pairs") else 0 for name, count in counts.items()}
    whole, attention = (step_flops(model, Work(**parts), ()).forward for parts in (counts, pairs))
    return {"none": 0, "products_attention": 0, "products": attention, "attention": whole - attention}.get(remat, whole)


def traced_answer(request: ServeRequest, devices: list[jax.Device]) -> tuple[jax.stages.Traced, Facts]:
    """The same of a program that answers."""
    mesh = make_mesh(devices, **{axis: getattr(request.mesh, axis) for axis in AXES})
    rules = make_rules(request.mesh.rules, request.mesh.override)
    execution, config = Execution(mesh, rules), request.model
    graph, state = pretrained.abstract(config, jnp.bfloat16)
    shardings = dict(nnx.to_flat_state(param_shardings(state, mesh, rules)))
    held = {
        key: jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=shardings[key].get_value())
        for key, weight in nnx.to_flat_state(state)
    }
    placed = [(key, weight.replace(held[key])) for key, weight in nnx.to_flat_state(state)]
    model = nnx.merge(graph, nnx.from_flat_state(placed))
    model.execution = execution
    graph, weights = nnx.split(model)
    text, rows = config.text, request.rows
    sharding = NamedSharding(mesh, execution.spec(None, "batch", "kv_heads", None, None))
    shape = (text.num_hidden_layers, rows, text.num_key_value_heads, request.context, text.head_dim)
    kept: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    # As they come out of the program that reads prompts.
    tokens, lengths = (
        jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(mesh, execution.spec(axis)))
        for axis in (None, "batch")
    )
    number = jax.ShapeDtypeStruct((), jnp.uint32)
    vision = ((request.frames, request.patches),)
    asked = BatchShape(rows, request.context - LENGTH_STEP, request.groups, vision)
    batch = program.abstract_batch(config, asked, execution, classes=False)
    if request.phase == "prompt":
        step = read_prompts.trace(graph, weights, batch, number, request.context, Sampling())
    else:
        numbers: Any = lengths
        cache = KVCache(kept, kept, numbers, numbers)
        step = read_token.trace(graph, weights, tokens, cache, number, jax.ShapeDtypeStruct((), jnp.int32), Sampling())
    kinds: dict[str, list[Any]] = {"decoder": [], "experts": [], "tower": [], "table": []}
    for key, weight in held.items():
        # A table whose rows are looked up, and not the output projection too, is hardly read.
        looked_up = key[:2] == ("text", "embed") and not text.tie_word_embeddings
        decoder = "experts" if "experts" in key else "table" if looked_up else "decoder"
        kinds[decoder if key[0] == "text" else "tower"].append(weight)
    facts = {
        "parameters": sum(math.prod(weight.shape) for weight in held.values()),
        "learning": 0,
        "state": {
            **{kind: held_bytes(weights) for kind, weights in kinds.items()},
            "cache": 2 * held_bytes([kept]),
            "batch": held_bytes(jax.tree.leaves(batch)) if request.phase == "prompt" else 0,
        },
        "flops": request.flops,
        "again": 0,
    }
    return step, facts


def held_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the part of each array that a device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize if leaf.sharding is not None else 0
        for leaf in leaves
    )
