"""Times training steps of a stage on the devices of this machine: the very program that `train` runs, on made-up rows.

    python -m tools.bench_train configs/pretrain/s1.py --model qwen3_vl_4b --rows 2 --vision 0.4 --attention cudnn

Rows are packed with samples of many lengths (`--samples`, on average so many a row); of the tokens `--vision` are of
images, each about `--image-tokens` large, whose patches the tower reads and is trained on. Pixels, tokens and weights
are random, which costs what real ones do. FLOPs are those of `qwenvl_jax.flops`: attention for each sample, its causal
half only; nothing for padding nor for what rematerialization makes again.

    MFU = FLOPs of the step / (median seconds of a step * devices * peak bf16 FLOPs a second of a device)

Where there is no GPU, `--compile-for h200` says what a step takes of one's memory:

    JAX_PLATFORMS=cpu python -m tools.bench_train configs/pretrain/s3.py --rows 1 --samples 1 --vision 0.25 \\
        --attention cudnn --remat full offload --compile-for h200
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from qwenvl_jax.batch import Batch, VisionRows
from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.flops import Work, peak_flops, step_flops
from qwenvl_jax.ops.packed_attention import most_segments, rows_at_once, work_bytes
from qwenvl_jax.parallel.placement import Backend, Execution, Remat, shard_batch
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import DataConfig, TrainConfig
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.devices import mesh_of
from qwenvl_jax.train.program import abstract_batch, abstract_state, begun_state, state_shardings, trace_step
from qwenvl_jax.train.state import ModelParts
from tools.absent_gpu import GPUS, absent_gpu

_GIB = 2**30
# A row of patches holds an image or several, and is at least so long.
_PATCHES = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config of one stage, such as configs/pretrain/s1.py")
    names = [name for name, shape in PRESETS.items() if not shape.vision.window_size]  # windows are not made up here
    parser.add_argument("--model", default="qwen3_vl_2b", choices=names, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=1, help="of a batch; default: %(default)s")
    parser.add_argument("--length", type=int, help="token slots of a row; default: the stage's")
    parser.add_argument("--microbatches", type=int, default=1, help="of a batch; default: %(default)s")
    parser.add_argument("--samples", type=float, default=12, help="of a row, on average; default: %(default)s")
    parser.add_argument("--vision", type=float, default=0.0, help="share of vision tokens; default: %(default)s")
    parser.add_argument("--image-tokens", type=int, default=1024, help="of an image, at most; default: %(default)s")
    parser.add_argument("--attention", nargs="+", default=["auto"], choices=get_args(Backend), help="default: auto")
    parser.add_argument("--remat", nargs="+", choices=get_args(Remat), help="default: the stage's")
    parser.add_argument(
        "--first", action="store_true", help="of the policies of --remat time the first that fits alone"
    )
    parser.add_argument("--loss-chunk", type=int, help="tokens whose logits are made at once; default: the stage's")
    parser.add_argument("--layers", type=int, help="of the decoder, for a slice of a model; default: all")
    parser.add_argument("--steps", type=int, default=5, help="timed; one goes before them; default: %(default)s")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N dearest operations of a step")
    parser.add_argument(
        "--compile-for", choices=list(GPUS), help="compile for one of these, which need not be here, and time nothing"
    )
    parser.add_argument("--out", type=Path, help="a .jsonl file to which each result is added")
    options = parser.parse_args()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}; {_versions()}; {time.strftime('%Y-%m-%d')}")
    for attention in options.attention:
        for remat in options.remat or [None]:
            if options.compile_for:
                print(held_line(options, attention, remat), flush=True)
                continue
            try:
                result = timed(options, attention, remat)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(
                    f"{options.model} {attention} {remat or ''}: does not fit: {str(error).splitlines()[0]}", flush=True
                )
                continue
            print(line_of(result), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            if options.first:
                break


def stage_of(options: argparse.Namespace, attention: str, remat: str | None) -> tuple[TrainConfig, Batch]:
    """A run of the one stage of a config, as the options change it, and a batch of it."""
    config, _ = load_config_file(options.config)
    if len(config.stages) != 1:
        raise SystemExit(f"{options.config} has {len(config.stages)} stages; give a config of one.")
    (stage,) = config.stages
    model = PRESETS[options.model]
    if options.layers:
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_hidden_layers=options.layers))
    # Rows and groups are divided among shares of the mesh and microbatches.
    groups = Execution(*mesh_of(config)).split("batch") * options.microbatches
    if options.rows % groups:
        raise SystemExit(f"--rows {options.rows} must be a multiple of {groups}, devices * --microbatches.")
    batch = made_batch(
        model,
        groups=groups,
        rows=options.rows,
        length=options.length or stage.batch.length,
        samples=options.samples,
        vision=options.vision,
        image_tokens=options.image_tokens,
        seed=0,
    )
    chosen = {"attention": attention, "remat": remat or stage.remat, "loss_chunk": options.loss_chunk}
    stage = dataclasses.replace(
        stage,
        **{name: value for name, value in chosen.items() if value},
        batch=BatchShape(options.rows, batch.tokens.shape[1], groups=groups, vision=vision_shape(batch)),
        microbatches=options.microbatches,
        data=DataConfig(),
    )
    # A run that takes its processor from a pretrained model names none; nothing is read with it here.
    processor = config.processor or options.model
    return dataclasses.replace(config, model=model, processor=processor, stages=(stage,)), batch


def timed(options: argparse.Namespace, attention: str, remat: str | None) -> dict[str, Any]:
    """Compiles the step of a stage and times it; what is found, by name."""
    config, batch = stage_of(options, attention, remat)
    (stage,), model = config.stages, config.model
    assert isinstance(model, QwenVLConfig)  # as `stage_of` has it
    mesh, rules = mesh_of(config)
    parts = ModelParts(model, dtype=config.dtype, param_dtype=config.param_dtype, mesh=mesh, rules=rules)
    params = parts.random(0)
    learning = {name: params.pop(name) for name in parts.select(stage.trainable)}
    begin = functools.partial(begun_state, parts, stage, 0)
    shardings = state_shardings(parts, jax.eval_shape(begin, learning))
    state = jax.jit(begin, donate_argnums=0, out_shardings=shardings)(learning)
    work, placed = Work.of(batch), shard_batch(batch, mesh, rules)
    names = tuple(state.params)

    begun = time.perf_counter()
    lowered = trace_step(parts, stage, state, params, placed).lower()
    traced = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()
    held = step.memory_analysis()

    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        state, told = jax.block_until_ready(step(state, params, placed))
        seconds.append(time.perf_counter() - start)
        assert np.isfinite(told.loss) and not told.skipped, f"the loss is {told.loss}: nothing worth timing"
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(step(state, params, placed))
            print_dearest(Path(folder), options.profile)
    flops = step_flops(model, work, names).total
    median = statistics.median(seconds[1:] or seconds)
    peak = peak_flops(jax.devices()[0])
    return {
        "model": options.model,
        "stage": stage.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "attention": Execution(mesh, rules, attention=stage.attention).backend,
        "remat": stage.remat,
        "tokens": batch.tokens.size,
        "rows": options.rows,
        "microbatches": options.microbatches,
        "work": dataclasses.asdict(work),
        "layers": model.text.num_hidden_layers,
        "seconds": median,
        "all_seconds": seconds,
        "tokens_a_second": work.tokens / median,
        "flops": flops,
        "tflops_a_second": flops / median / 1e12,
        "mfu": flops / (median * jax.device_count() * peak) if peak else None,
        "trace_seconds": traced - begun,
        "compile_seconds": compiled - traced,
        "gib": {
            "arguments": held.argument_size_in_bytes / _GIB,
            "temporaries": held.temp_size_in_bytes / _GIB,
            "peak_of_process": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / _GIB,
        },
        "loss": float(told.loss),
        "versions": _versions(),
    }


def held_line(options: argparse.Namespace, attention: str, remat: str | None) -> str:
    """What a step takes of the memory of a GPU that need not be here, for people."""
    config, batch = stage_of(options, attention, remat)
    (stage,), model = config.stages, config.model
    assert isinstance(model, QwenVLConfig)  # as `stage_of` has it
    mesh, rules = mesh_of(config, [absent_gpu(options.compile_for)])
    parts = ModelParts(model, dtype=config.dtype, param_dtype=config.param_dtype, mesh=mesh, rules=rules)
    shapes = abstract_batch(model, stage.batch, Execution(mesh, rules), classes=False)
    held = trace_step(parts, stage, *abstract_state(parts, stage, 0), shapes).lower().compile().memory_analysis()
    given, made, host = (
        size / _GIB for size in (held.argument_size_in_bytes, held.temp_size_in_bytes, held.host_temp_size_in_bytes)
    )
    line = (
        f"{options.model} {stage.name} {attention:>6} {stage.remat:>10} {batch.tokens.size:>7} tokens, "
        f"{sum(map(math.prod, stage.batch.vision))} patches, one {GPUS[options.compile_for].name}: "
        f"{given:.1f} GiB of state and batch + {made:.1f} of temporaries"
    )
    if attention == "cudnn":
        microbatch = options.rows // options.microbatches
        line += f" + up to {kernel_bytes(model, stage.batch, microbatch) / _GIB:.1f} that cuDNN works in"
    return line + (f"; {host:.1f} GiB of the host" if host else "")


def kernel_bytes(model: QwenVLConfig, shape: BatchShape, rows: int) -> int:
    """What cuDNN's kernel of packed rows takes to work in, which the compiler does not tell: for the dearest rows."""
    text, vision = model.text, model.vision
    width = vision.hidden_size // vision.num_heads
    kinds = [(rows, shape.length, text.num_attention_heads, text.head_dim, True)]
    kinds += [(R, L, vision.num_heads, width, False) for R, L in shape.vision]
    found = [0]
    for B, T, N, E, causal in kinds:
        most = most_segments(B, T, N, E, causal=causal)
        if most >= 2:
            found.append(work_bytes(rows_at_once(B, T, N, E, most=most), T, N, E, most=most))
    return max(found)


def print_dearest(folder: Path, count: int) -> None:
    """Where the time of a profiled step went, by operation, the dearest first."""
    (file,) = folder.rglob("*.xplane.pb")
    spent: dict[tuple[str, str], list[float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                facts = dict(event.stats)
                name = str(facts.get("tf_op") or facts.get("name") or "")
                spent.setdefault(
                    (event.name[:60], re.sub(r"\b(jit|jvp|transpose)\(([^()]*)\)", r"\2", name)), []
                ).append(event.duration_ns / 1e6)
    total = sum(sum(each) for each in spent.values())
    print(f"{total:.1f} ms of operations")
    for (kernel, name), each in sorted(spent.items(), key=lambda item: -sum(item[1]))[:count]:
        print(f"{sum(each):8.2f} ms {len(each):>5} x {kernel:<60} {name[-110:]}")


def line_of(result: dict[str, Any]) -> str:
    """A result, for people."""
    gib, mfu = result["gib"], result["mfu"]
    share = result["work"]["vision_tokens"] / result["work"]["tokens"]
    return (
        f"{result['model']} {result['stage']} {result['attention']:>6} {result['remat']:>10} "
        f"{result['tokens']:>7} tokens ({share:.0%} vision): {result['seconds'] * 1e3:8.0f} ms, "
        f"{result['tokens_a_second']:8.0f} tokens/s, {result['tflops_a_second']:5.0f} TFLOP/s"
        + (f", MFU {mfu:.1%}" if mfu else "")
        + f"; {gib['arguments']:.1f} + {gib['temporaries']:.1f} GiB; "
        f"traced {result['trace_seconds']:.0f} s, compiled {result['compile_seconds']:.0f} s; "
        f"loss {result['loss']:.3f}"
    )


def made_batch(
    model: QwenVLConfig,
    *,
    rows: int,
    groups: int,
    length: int,
    samples: float,
    vision: float,
    image_tokens: int,
    seed: int,
) -> Batch:
    """Full rows of samples, some of whose tokens are those of images."""
    sizes = {"length": length, "samples": samples, "vision": vision, "image_tokens": image_tokens}
    made = [_made_group(model, rows=rows // groups, seed=seed + group, **sizes) for group in range(groups)]
    most = max((one.vision[0].patches.shape[1] for one in made if one.vision), default=0)

    def joined(path, *leaves):
        if path[0].name == "vision" and path[-1].name != "pixel_table":
            # Rows that some groups need more than others; sizes of padding are 1.
            fill = int(path[-1].name == "sizes")
            room = [[(0, 0), (0, most - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2)] for leaf in leaves]
            leaves = tuple(np.pad(leaf, one, constant_values=fill) for leaf, one in zip(leaves, room, strict=True))
        return np.concatenate(leaves)

    return jax.tree_util.tree_map_with_path(joined, *made)


def _made_group(
    model: QwenVLConfig, *, rows: int, length: int, samples: float, vision: float, image_tokens: int, seed: int
) -> Batch:
    """The rows of one vision group."""
    rng = np.random.default_rng(seed)
    merge, config = model.vision.spatial_merge_size, model.vision
    shape = (rows, length)
    tokens = rng.integers(0, min(model.text.vocab_size, 150_000), shape, dtype=np.int32)
    segments, index = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    frames: list[tuple[int, int]] = []  # height and width in patches
    places = []  # row, first slot and tokens of each
    for row in range(rows):
        for number, (start, stop) in enumerate(_samples(rng, length, samples), 1):
            segments[row, start:stop] = number
            wanted, at = round((stop - start) * vision), start
            while wanted >= 4:
                tall = max(2, min(math.isqrt(wanted), math.isqrt(image_tokens)))
                wide = max(1, min(wanted, image_tokens) // tall)
                frames.append((tall * merge, wide * merge))
                places.append((row, at, tall * wide))
                at, wanted = at + tall * wide, wanted - tall * wide
    positions = np.zeros((*shape, 3), np.int32)
    for row in range(rows):
        begins = np.flatnonzero(np.diff(segments[row], prepend=0))
        positions[row] = (np.arange(length) - np.repeat(begins, np.diff([*begins, length])))[:, None]
    seen, firsts = _vision_rows(rng, frames, config, merge**2 * image_tokens)
    for first, (row, at, count) in zip(firsts, places, strict=True):
        index[row, at : at + count] = first + np.arange(count)
    weights = (index < 0).astype(np.float32)
    return Batch(
        tokens=tokens,
        positions=positions,
        segment_ids=segments,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=weights,
        vision_index=index,
        vision=seen,
    )


def _samples(rng, length: int, samples: float) -> Iterator[tuple[int, int]]:
    """Where the samples of a row start and stop; their lengths differ as those of real ones do."""
    count = max(1, round(samples))
    sizes = rng.lognormal(0, 0.8, count)
    stops = np.round(np.cumsum(sizes) / sizes.sum() * length).astype(int)
    yield from zip([0, *stops[:-1]], stops, strict=True)


def _vision_rows(
    rng, frames: list[tuple[int, int]], config: VisionConfig, most: int
) -> tuple[tuple[VisionRows, ...], list[int]]:
    """The rows of one length that hold frames, and the first merged token of each frame."""
    if not frames:
        return (), []
    L = max(_PATCHES, most)
    held: list[int] = []  # patches in each row
    put = []
    for tall, wide in frames:
        patches = tall * wide
        row = next((r for r, used in enumerate(held) if used + patches <= L), len(held))
        if row == len(held):
            held.append(0)
        put.append((row, held[row]))
        held[row] += patches
    R, merge = len(held), config.spatial_merge_size
    coords, sizes = np.zeros((1, R, L, 2), np.int32), np.ones((1, R, L, 2), np.int32)
    segments, items = np.zeros((1, R, L), np.int32), np.zeros((1, R, L), np.int32)
    counts = [0] * R
    for number, ((tall, wide), (row, at)) in enumerate(zip(frames, put, strict=True), 1):
        slots = (0, row, slice(at, at + tall * wide))
        counts[row] += 1
        grid = np.stack(np.meshgrid(np.arange(tall), np.arange(wide), indexing="ij"), -1)
        # In merge order: the patches of a merged token side by side.
        grid = grid.reshape(tall // merge, merge, wide // merge, merge, 2).swapaxes(1, 2).reshape(-1, 2)
        coords[slots], sizes[slots], segments[slots], items[slots] = grid, (tall, wide), counts[row], number
    tables = np.linspace(-1, 1, 256, dtype=np.float32)[None, None].repeat(3, axis=1)
    rows = VisionRows(
        patches=rng.integers(0, 256, (1, R, L, config.patch_dim), dtype=np.uint8),
        coords=coords,
        sizes=sizes,
        segment_ids=segments,
        items=items,
        pixel_table=tables,
    )
    return (rows,), [(row * L + at) // merge**2 for row, at in put]


def vision_shape(batch: Batch) -> Any:
    """(rows, patches a row) of the batch's vision rows, as `BatchShape.vision` has them."""
    return tuple(rows.patches.shape[1:3] for rows in batch.vision)


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))


if __name__ == "__main__":
    main()
