"""Compares a released checkpoint with the reference, for whoever has a network and the memory.

    .venv/bin/python -m tools.compare_released Qwen/Qwen3-VL-2B-Instruct     # what `make test` installs is needed
    .venv/bin/python -m tools.compare_released ./folder --dtype float32 --tokens 8

Fetches the checkpoint, or takes a folder; answers a text, a picture and a short clip, all made by code, with
transformers and with this library, one model in memory at a time, in bfloat16 and, where it fits, in float32. Prints
the largest difference of logits and how many greedy tokens are the same, and last the rows to add to
docs/released.json; `python -m tools.support` then writes docs/support.md.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np

from qwenvl_jax.data.video import VideoFrames
from qwenvl_jax.errors import CheckpointError, QwenVLError

DTYPES = {"bfloat16": 2, "float32": 4}  # bytes a weight


@dataclasses.dataclass(frozen=True)
class Side:
    """What one implementation says.

    Attributes:
      tokens: ids of each prompt.
      logits: f32[T, V] of each prompt.
      answers: greedy tokens to each, without the one that ends them.
    """

    tokens: list[list[int]]
    logits: list[np.ndarray]
    answers: list[list[int]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a hub id, such as Qwen/Qwen3-VL-2B-Instruct, or a folder")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both, float32 where it fits")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens of each answer; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        rows = compare(options.name, options.dtype, options.tokens)
    except QwenVLError as error:
        print(f"compare_released: {error}", file=sys.stderr)
        return 2
    print("\nto be added to docs/released.json:")
    for row in rows:
        print(json.dumps(row))
    return 0


def compare(name: str, dtypes: list[str] | None, steps: int) -> list[dict]:
    """Runs both sides and prints what they make of each input.

    Args:
      name: a hub id or a folder.
      dtypes: of weights and activations; None for bfloat16, and float32 where it fits into memory.
      steps: greedy tokens of each answer.

    Returns:
      A row of docs/released.json for each dtype.

    Raises:
      CheckpointError: the checkpoint cannot be had or read, or fits in none of the dtypes.
    """
    from qwenvl_jax.checkpoint import folder as folders

    folder = folders.resolve(name)
    wanted = dtypes or _fitting(folder)
    asked, rows = inputs(), []
    for dtype in wanted:
        theirs = _reference_side(folder, asked, dtype, steps)
        gc.collect()
        ours = _our_side(folder, asked, dtype, steps)
        rows.append(_row(name, folder, dtype, list(asked), ours, theirs))
    return rows


def inputs() -> dict[str, list[dict]]:
    """The conversations, the same bytes everywhere: a text, a picture of 448x448 and a clip of 4 s at 2 fps."""
    rows, columns = np.mgrid[0:448, 0:448]
    picture = np.stack([rows * 255 // 447, columns * 255 // 447, np.full_like(rows, 90)], axis=-1).astype(np.uint8)
    picture[(rows - 150) ** 2 + (columns - 280) ** 2 < 90**2] = (220, 30, 40)
    picture[300:400, 60:200] = (30, 60, 220)
    frames = np.full((8, 224, 224, 3), 235, np.uint8)
    for i, frame in enumerate(frames):
        frame[80:140, 10 + 20 * i : 70 + 20 * i] = (20, 150, 60)
    clip = VideoFrames(frames, np.arange(8) / 2, duration=4.0)

    def user(*parts: dict) -> list[dict]:
        return [{"role": "user", "content": list(parts)}]

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    return {
        "text": user(text("Name the planets of the solar system, from the sun outwards.")),
        "image": user({"type": "image", "image": picture}, text("Which shapes do you see, and in which colours?")),
        "video": user({"type": "video", "video": clip}, text("What moves, and in which direction?")),
    }


def _fitting(folder: Path) -> list[str]:
    """bfloat16, and float32 if its weights, and half as much again, fit into the memory that is free."""
    from qwenvl_jax.checkpoint import hf, native

    weights = hf.parameter_count(native.open_source(folder).config)[0]
    free = _free_bytes()
    fitting = [dtype for dtype, size in DTYPES.items() if free is None or 1.5 * size * weights < free]
    if not fitting:
        raise CheckpointError(
            f"{folder}: {weights / 1e9:.1f} B weights need {2 * weights / 2**30:.0f} GiB in bfloat16, and "
            f"{free / 2**30:.0f} GiB are free; compare it on a larger machine, or force one with --dtype."
        )
    return fitting


def _free_bytes() -> int | None:
    """Free memory of this machine; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _reference_side(folder: Path, asked: dict, dtype: str, steps: int) -> Side:
    """transformers, on the CPU."""
    import torch

    from tests.parity.reference import transformers
    from tools.make_golden import reference_inputs

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokens, logits, answers = [], [], []
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for conversation in asked.values():
        made = reference_inputs(processor, conversation)
        length = made["input_ids"].shape[1]
        with torch.inference_mode():
            logits.append(model(**made).logits[0].float().numpy())
            # (Released settings sample and penalise repetition; these are the plain likeliest tokens.)
            written = model.generate(
                **made, max_new_tokens=steps, do_sample=False, repetition_penalty=1.0, top_p=None, top_k=None
            )
        tokens.append(made["input_ids"][0].tolist())
        answers.append([token for token in written[0, length:].tolist() if token not in ends])
    return Side(tokens, logits, answers)


def _our_side(folder: Path, asked: dict, dtype: str, steps: int) -> Side:
    """This library, on JAX's first device."""
    import jax

    import qwenvl_jax as qv

    model = qv.QwenVL.from_pretrained(folder, dtype=dtype)
    processor = qv.Processor.from_pretrained(folder, "transformers")
    forward = jax.jit(lambda model, batch: model(batch))
    tokens, logits, answers = [], [], []
    for conversation in asked.values():
        batch = processor([conversation], add_generation_prompt=True)
        n = int((batch.segment_ids[0] > 0).sum())
        logits.append(np.asarray(forward(model, batch))[0, :n].astype(np.float32))
        tokens.append(batch.tokens[0, :n].tolist())
        answers.append(qv.generate(model, processor, [conversation], max_new_tokens=steps)[0].tokens)
    return Side(tokens, logits, answers)


def _row(name: str, folder: Path, dtype: str, asked: list[str], ours: Side, theirs: Side) -> dict:
    """Prints each input's figures and makes the row.

    Raises:
      CheckpointError: the prompts differ, so that nothing can be compared.
    """
    import jax

    largest, same, total = 0.0, 0, 0
    for i, kind in enumerate(asked):
        if ours.tokens[i] != theirs.tokens[i]:
            raise CheckpointError(
                f"{folder}: the prompt of {kind!r} is not the reference's ({len(ours.tokens[i])} tokens, not "
                f"{len(theirs.tokens[i])}); please report it with this line."
            )
        difference = float(np.abs(ours.logits[i] - theirs.logits[i]).max())
        pairs = list(zip(ours.answers[i], theirs.answers[i], strict=False))
        agree = next((j for j, (a, b) in enumerate(pairs) if a != b), len(pairs))
        count = max(len(ours.answers[i]), len(theirs.answers[i]))
        print(f"{dtype}, {kind}: logits within {difference:.2e}; the first {agree} of {count} greedy tokens agree")
        largest, same, total = max(largest, difference), same + agree, total + count
    released = folder.parent.name == "snapshots"
    device = jax.devices()[0]
    return {
        "name": name if released else folder.name,
        "revision": folder.name[:12] if released else "a local folder",
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "dtype": dtype,
        "largest difference": f"{largest:.2e}",
        "greedy tokens agree": f"{same} of {total}",
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "transformers", "torch")),
    }


if __name__ == "__main__":
    sys.exit(main())
