"""Frozen answers of the reference: what is kept of an answer, ours to the same questions, and how two differ.

Answers are a flat dictionary of arrays, `conversation/what`:

    tokens    i32[T]      ids of the prompt
    positions i32[T, 3]   time, height, width
    grids     i32[N, 3]   patches of each image, then of each video, along time, height, width
    patches   u8[32]      SHA-256 of the float32 values of all patches, images first, little-endian
    logits    f32[R, C]   at `picked` positions of the prompt and rows of the vocabulary
    tower     f32[K, R, C] merged tokens and each DeepStack feature, at `picked` tokens and widths (one kind of vision)
    greedy    i32[16]     the likeliest next token, sixteen times
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import qwenvl_jax as qv
from tests.golden.checkpoints import conversations

FOLDER = Path(__file__).parent
STEPS = 16
TOLERANCE = 1e-4  # of logits and features, absolute
_LOGITS, _TOWER = (12, 40), (12, 16)
_META = "metadata"

Answers = dict[str, np.ndarray]


def frozen(model_type: str) -> tuple[Answers, dict]:
    """The committed answers of a generation, and what made them: versions, tool, date, smallest margins."""
    with np.load(FOLDER / f"{model_type}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop(_META).tobytes())


def freeze(model_type: str, answers: Answers, metadata: Mapping) -> Path:
    """Writes what `frozen` reads; returns the file."""
    path = FOLDER / f"{model_type}.npz"
    np.savez_compressed(path, **answers, **{_META: np.frombuffer(json.dumps(metadata).encode(), np.uint8)})
    return path


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))


def picked(values: np.ndarray, kind: str) -> np.ndarray:
    """The part of [..., rows, columns] that is kept: rows and columns spread evenly, the last ones among them."""
    rows, columns = {"logits": _LOGITS, "tower": _TOWER}[kind]
    return values[..., _evenly(values.shape[-2], rows), :][..., _evenly(values.shape[-1], columns)].astype(np.float32)


def digest(values: np.ndarray) -> np.ndarray:
    """u8[32], the SHA-256 of float32 values."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).digest(), np.uint8)


def kinds_of(conversation: list[dict]) -> set[str]:
    """Of "image" and "video", those that a conversation shows."""
    parts = [part for message in conversation if not isinstance(message["content"], str) for part in message["content"]]
    return {part["type"] for part in parts} - {"text"}


def our_answers(folder: Path, model_type: str) -> Answers:
    """What this library answers, all conversations padded into one batch."""
    model = qv.QwenVL.from_pretrained(folder, dtype="float32")
    processor = qv.Processor.from_pretrained(folder, "transformers")
    asked = conversations(model_type)
    batch = processor(list(asked.values()), add_generation_prompt=True)
    logits, (merged, deep) = jax.jit(lambda model, batch: (model(batch), model.encode(batch)))(model, batch)
    features = np.stack([np.asarray(merged), *(np.asarray(feature) for feature in (() if deep is None else deep))])
    written = qv.generate(model, processor, list(asked.values()), max_new_tokens=STEPS)
    answers: Answers = {}
    for row, (name, conversation) in enumerate(asked.items()):
        n = int((batch.segment_ids[row] > 0).sum())
        alone = processor([conversation], add_generation_prompt=True)
        answers[f"{name}/tokens"] = np.asarray(batch.tokens[row, :n], np.int32)
        answers[f"{name}/positions"] = np.asarray(batch.positions[row, :n], np.int32)
        answers[f"{name}/grids"] = processor.grids(alone).astype(np.int32)
        answers[f"{name}/patches"] = digest(processor.pixel_values(alone))
        answers[f"{name}/logits"] = picked(np.asarray(logits)[row, :n], "logits")
        answers[f"{name}/greedy"] = np.asarray(written[row].tokens, np.int32)
        if len(kinds_of(conversation)) == 1:
            index = batch.vision_index[row]
            answers[f"{name}/tower"] = picked(features[:, 0, index[index >= 0]], "tower")
    return answers


def differences(found: Answers, expected: Answers) -> list[str]:
    """One line for each answer that is another: integers exactly, numbers within `TOLERANCE`."""
    lines = [f"{name} is there on one side only" for name in sorted(found.keys() ^ expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        one, other = found[name], expected[name]
        if one.shape != other.shape:
            lines.append(f"{name} has shape {one.shape}, not {other.shape}")
        elif np.issubdtype(other.dtype, np.floating):
            off = np.abs(one - other)
            if not off.max(initial=0) <= TOLERANCE:  # (so that a NaN counts)
                lines.append(f"{name} is off by {off.max():.2g}")
        elif not np.array_equal(one, other):
            lines.append(f"{name} differs in {int((one != other).sum())} of {one.size} places")
    return lines


def verdict(reference: list[str], ours: list[str], made_with: str) -> str | None:
    """Who no longer gives the frozen answers, or None.

    Args:
      reference: `differences` of the live reference from the frozen answers.
      ours: those of this library.
      made_with: what the frozen answers were made with.
    """
    if not reference and not ours:
        return None
    since = f"since the frozen answers were made with {made_with}"
    if not ours:
        return f"the reference moved {since}; ours equals the frozen. Of the reference: {'; '.join(reference[:5])}"
    if not reference:
        return f"we moved {since}; the reference still gives them. Of ours: {'; '.join(ours[:5])}"
    return f"both moved {since}. Of the reference: {'; '.join(reference[:5])}. Of ours: {'; '.join(ours[:5])}"
