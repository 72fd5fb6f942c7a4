"""A record as the model sees it: the work behind `qwenvl-jax data inspect`."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from qwenvl_jax.data.named import named_processor
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sample import Sample
from qwenvl_jax.data.sources import Reading, Record, open_source
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError

READ, LEARNT, VISION = "read", "learnt", "vision"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A record and the sample that it becomes, whose media have no patches.

    Attributes:
      record: as its source gives it.
      sample: tokens and grids.
      processor: that made it.
    """

    record: Record
    sample: Sample
    processor: Processor

    @property
    def learnt(self) -> np.ndarray:
        """bool[n], whether the model is taught to say a token."""
        return np.append(False, self.sample.loss_weights[:-1] > 0)

    def pieces(self) -> list[dict[str, Any]]:
        """Runs of tokens of one kind: first, how many, kind ("read", "learnt", "vision") and text, empty of vision."""
        kinds = np.where(self.sample.vision_index >= 0, VISION, np.where(self.learnt, LEARNT, READ)).tolist()
        found: list[dict[str, Any]] = []
        start = 0
        for kind, run in itertools.groupby(kinds):
            count = len(list(run))
            ids = self.sample.tokens[start : start + count].tolist()
            text = "" if kind == VISION else self.processor.decode(ids, skip_special_tokens=False)
            found.append({"first": start, "tokens": count, "kind": kind, "text": text})
            start += count
        return found

    def facts(self) -> dict[str, Any]:
        """The object that `--json` prints.

        where and id name the record; conversation and options are what the processor was given; tokens and learnt say
        how many; pieces are runs of tokens (see `pieces`); ids and taught, 0 or 1, are those of each token; media are
        images and videos in reading order, with grid (t, h, w) in patches and times in seconds of temporal patches.
        """
        media = [
            {"type": medium.kind, "grid": list(medium.grid), "times": list(medium.times)}
            for medium in self.sample.media
        ]
        return {
            "where": self.record.where,
            "id": self.record.id,
            "conversation": self.record.messages,
            "options": self.record.options,
            "tokens": len(self.sample.tokens),
            "learnt": int(self.learnt.sum()),
            "pieces": self.pieces(),
            "ids": self.sample.tokens.tolist(),
            "taught": self.learnt.astype(int).tolist(),
            "media": media,
        }


def see(source: str, index: int = 0, model: str | None = None) -> Seen:
    """Processes a record, all but its pixels.

    Args:
      source: a JSONL file, or a data set that `data build` made.
      index: of the record, from 0.
      model: see `named_processor`.

    Raises:
      ConfigError: there is no such record.
      CheckpointError: there is no such model.
      DataError: the data or the record cannot be used, naming file and line.
    """
    processor = named_processor(model, source)
    records = open_source(source, Reading.of(processor))
    if not 0 <= index < len(records):
        raise ConfigError(f"--index {index} must be from 0 to {len(records) - 1}, the last record of {source}.")
    record = records[index]

    def no_pixels(part: dict, decode: Callable[[], np.ndarray]) -> np.ndarray:
        return np.empty((0, processor.patch_dim), np.uint8)

    try:
        if record.fetch is not None:
            record.fetch()
        sample = processor.sample(record.messages, read=no_pixels, **record.options)
    except QwenVLError as error:
        raise DataError(f"{record.where}: {error}") from error
    return Seen(record, sample, processor)


def show(source: str, *, index: int = 0, model: str | None = None, as_json: bool = False) -> None:
    """Prints a record as the model sees it, as JSON or for reading; the work of `qwenvl-jax data inspect`."""
    seen = see(source, index, model)
    # Images out of data: URLs are objects in memory.
    print(json.dumps(seen.facts(), indent=2, ensure_ascii=False, default=repr) if as_json else text(seen))


def text(seen: Seen) -> str:
    """A record for reading: its conversation, its tokens with what is learnt marked, its grids and times."""
    facts = seen.facts()
    lines = [f"{facts['where']} ({facts['id']}): {facts['tokens']:,} tokens, {facts['learnt']:,} of them learnt", ""]
    for message in facts["conversation"]:
        shown = message.get("content")
        parts = shown if isinstance(shown, list) else [{"type": "text", "text": shown or ""}]
        lines += [f"{message['role']:<10} {_part(part)}" for part in parts]
        lines += [f"{message['role']:<10} {key}: {message[key]}" for key in _BESIDE if message.get(key)]
    lines += ["", f"{'token':>7}  {'':<6}  the prompt, a line for each run of tokens"]
    for piece in facts["pieces"]:
        if piece["kind"] == VISION:
            lines.append(f"{piece['first']:>7}  {VISION:<6}  {piece['tokens']} merged tokens")
        else:
            lines.append(f"{piece['first']:>7}  {piece['kind']:<6}  {json.dumps(piece['text'], ensure_ascii=False)}")
    for number, medium in enumerate(facts["media"]):
        t, h, w = medium["grid"]
        times = f" at {', '.join(f'{time:.3f}' for time in medium['times'])} s" if medium["times"] else ""
        lines += [""] * (number == 0) + [f"{medium['type']} {number}: {t} x {h} x {w} patches{times}"]
    return "\n".join(lines)


_BESIDE = ("reasoning_content", "tool_calls", "name", "tool_call_id")


def _part(part: dict[str, Any]) -> str:
    kind = part["type"]
    if kind == "text":
        return part["text"]
    options = "".join(f", {key}={value!r}" for key, value in part.items() if key not in ("type", kind))
    return f"[{kind} {part[kind]}{options}]"
