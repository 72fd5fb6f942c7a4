"""Plans of answers for reading, and `plan --serve`."""

import json
from collections.abc import Iterator, Mapping, Sequence

from qwenvl_jax.parallel.mesh import AXES
from qwenvl_jax.plan.bounds import USABLE
from qwenvl_jax.plan.compiling import check_libtpu
from qwenvl_jax.plan.serving import (
    CONTEXTS,
    FRAME_TOKENS,
    TEXT_TOKENS,
    WEIGHTS,
    Answering,
    Serving,
    contexts_of,
    frames_of,
    make_answering,
    read_serving,
)
from qwenvl_jax.plan.show import BOUNDS, gib, line, say


def serve_command(
    source: str,
    overrides: Sequence[str] = (),
    *,
    topology: str,
    model: str | None = None,
    contexts: Sequence[int] = (),
    rows: int = 0,
    as_json: bool = False,
    quick: bool = False,
) -> int:
    """Compiles what answers with a model on a slice, and prints what it takes: `plan --serve`.

    Args:
      source, overrides, topology, model, rows: see `qwenvl_jax.plan.serving.read_serving`.
      contexts: tokens of a row, prompt and answer; see `qwenvl_jax.plan.serving.contexts_of`.
      as_json: print an object: model, topology, devices, mesh, rows, parameters, and "contexts", `Answering.facts` by
        the size.
      quick: see `qwenvl_jax.plan.compiling.compile_step`.

    Returns:
      0, or 1 if a context does not fit.

    Raises:
      QwenVLError: what is wrong with a name, a setting or the surroundings.
    """
    check_libtpu()
    serving = read_serving(source, overrides, topology=topology, model=model, rows=rows)
    asked, found = contexts_of(serving.model, contexts), []
    for context in asked:
        frames_of(serving, context)  # mistakes are told before anything is compiled
    if left := [n for n in CONTEXTS if not contexts and n not in asked]:
        reach = serving.model.text.max_position_embeddings
        say(f"left out: {', '.join(f'{n:,}' for n in left)} tokens, more than the {reach:,} that {serving.name} reads")
    if not as_json:
        print("\n".join(_head(serving)), flush=True)
    for context in asked:
        say(f"{context:,} tokens: compiling for {topology}, which takes minutes ...")
        found.append(make_answering(serving, context, quick=quick))
        if not as_json:
            print("\n".join(_lines(found[-1])), flush=True)
    if as_json:
        print(json.dumps(facts(serving, found), indent=2))
    return 0 if all(one.fits for one in found) else 1


def facts(serving: Serving, found: Sequence[Answering]) -> dict:
    """The object of `--json`."""
    mesh = {axis: getattr(serving.mesh, axis) for axis in AXES} | {"rules": serving.mesh.rules}
    mesh |= {"override": list(serving.mesh.override)} if serving.mesh.override else {}
    return {
        "model": serving.name,
        "topology": serving.topology.name,
        "devices": serving.topology.devices,
        "mesh": mesh,
        "rows": serving.rows,
        "parameters": found[0].prompt.parameters,
        "contexts": {str(one.context): one.facts() for one in found},
    }


def _head(serving: Serving) -> Iterator[str]:
    yield f"{serving.name} on {serving.topology.name}, {serving.topology.devices} devices, bfloat16"
    sizes = [f"{axis} {getattr(serving.mesh, axis)}" for axis in AXES if getattr(serving.mesh, axis) > 1]
    override = [f"override {' '.join(serving.mesh.override)}"] if serving.mesh.override else []
    yield line("mesh", ", ".join([*sizes, f"rules {serving.mesh.rules}", *override]))
    yield line("rows", f"{serving.rows} at once, {serving.rows // serving.shares} on each share of the mesh")
    yield line(
        "assumed",
        f"each prompt is a video in frames of {FRAME_TOKENS} tokens and at least {TEXT_TOKENS} tokens of text",
    )


def _lines(found: Answering) -> Iterator[str]:
    facts, serving = found.facts(), found.serving
    held, video = facts["hbm"], facts["video"]
    yield f"\n{found.context:,} tokens of context, {video['tokens']:,} of a video of {2 * found.frames:,} frames"
    yield line("HBM, a device", f"{gib(held['limit'])}, of which a program may take {USABLE:.0%}")
    for name, kind in (("weights", "weights"), ("cache", "cache"), ("media", "media")):
        yield line(f"  {name}", f"{gib(held[kind]):>11}")
    for name, words in (("prompt", "while prompts are read"), ("token", "while a token of each row is read")):
        temporaries, total = held["temporaries"][name], held["total"][name]
        if total is None:
            yield line(f"  {name}", f"more than there is {words}")
        else:
            more = f"; temporaries and what comes out {gib(temporaries)}" if temporaries is not None else ""
            yield line(f"  {name}", f"{gib(total):>11}   {total / held['limit']:.0%} of the limit {words}{more}")
    yield line("  fits", "yes" if found.fits else f"NO, by {_excess(found)} too many: {advice(found)}")
    of = "the video" if serving.rows == 1 else f"{serving.rows} videos, one a row,"
    yield line(
        "video",
        f"{video['flops']:.3e} FLOPs from the frames of {of} to tokens, at least {max(video['bounds'].values()):.3g} s "
        f"({_bounds(video['bounds'])})",
    )
    for key, words in (("first_token", "first token"), ("next_token", "between tokens")):
        phase = facts[key]
        moved = "" if phase["bytes"] is None else f", at least {gib(phase['bytes'])} read and written by a device"
        yield line(words, f"{phase['flops']:.3e} FLOPs of all rows together{moved}")
        yield line("", f"at least {phase['seconds']:.3g} s ({_bounds(phase['bounds'])})")
    yield line("", f"at most {serving.rows / facts['next_token']['seconds']:,.0f} tokens a second of all rows")
    yield line("", "they are bounds, each as if nothing else took time, and no prediction")


def _bounds(found: Mapping[str, float | None]) -> str:
    return ", ".join(f"{BOUNDS[name].split(' (')[0]} {value:.3g} s" for name, value in found.items() if value)


def _excess(found: Answering) -> str:
    return gib(max(one.excess for one in found.memories))


def advice(found: Answering) -> str:
    """What to change about answers that do not fit."""
    serving, state = found.serving, found.token.state
    usable = USABLE * found.memories[0].limit
    weights = sum(state[kind] for kind in WEIGHTS)
    fewer = [*(["fewer --rows"] if serving.rows > serving.shares else []), "a smaller --context"]
    # With as many devices as heads of keys a larger slice has more shares, which are no smaller; with fewer, though
    # there are shares, it is a mesh by hand, of which a larger slice would have more as well.
    mesh, heads = serving.mesh, serving.model.text.num_key_value_heads
    wider = f"--mesh.tensor {2 * mesh.tensor}" if mesh.data % 2 == 0 else "a larger slice"
    larger = [wider] if heads % (2 * mesh.tensor) == 0 else []
    if weights > usable:
        return f"{' or '.join([*larger, _split_further(serving)])}: the weights alone take more than that"
    if weights + state["cache"] > usable:
        split = [_split_further(serving)] if weights / 2 + state["cache"] < usable else []
        return f"{' or '.join([*fewer, *larger, *split])}: weights and cache alone take more than that"
    return " or ".join([*fewer, *larger])


def _split_further(serving: Serving) -> str:
    """Settings with which weights are in twice as many parts."""
    mesh = serving.mesh
    sizes = {axis: getattr(mesh, axis) for axis in AXES if axis != "data"} | {"fsdp": 2 * mesh.fsdp}
    given = " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items() if size > 1)
    rules = mesh.rules if mesh.rules != "replicated" else "fsdp_tensor"
    where = "" if mesh.data % 2 == 0 else f"on a slice of {2 * serving.topology.devices} devices "
    return f"{where}{given} --mesh.rules {rules}"
