"""Records in the formats that people have, as conversations of ours.

    messages                  OpenAI's chat messages, and our own: they share the key
    llava                     LLaVA and ShareGPT: `conversations` of {"from", "value"} with <image> and <video> marks
    qwen                      Qwen's fine-tuning scripts: the same form
    temporal_grounding        a video, an event, its start and end
    spatiotemporal_grounding  a video, an event, boxes or points at times or over spans
    dense_captions            a video, captions with start and end

The last three become a question and an answer, whose times and coordinates are written as the model is to say them
(`Telling`). Every function here is pure: record -> conversation, media paths left as they are. docs/formats.md shows
each.

References: OpenAI's chat completions; `_build_messages` of Qwen's qwen-vl-finetune, whose trimming of the user's texts
is followed; ActivityNet Captions for `timestamps` and `sentences`.
"""

import base64
import binascii
import dataclasses
import difflib
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.data.coordinates import THOUSANDTHS, Convention, Sizes, from_shares, to_shares
from qwenvl_jax.data.image import image_of_bytes
from qwenvl_jax.data.times import time_text
from qwenvl_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Telling:
    """How times and places are told in the texts of grounding and captions.

    Attributes:
      time_format: one of `qwenvl_jax.data.times.TIME_FORMATS`.
      coordinates: how the model counts them.
      sizes: gives the sizes of the picture that a part shows; needed for coordinates in pixels.
    """

    time_format: str = "seconds"
    coordinates: Convention = THOUSANDTHS
    sizes: Callable[[dict], Sizes] | None = None

    def span(self, entry: Mapping, where: str) -> tuple[str, str]:
        """Start and end of an entry as text."""
        start, end = (_seconds(entry.get(key), f"'{key}' of {where}") for key in ("start", "end"))
        if start > end:
            raise DataError(f"{where} starts at {start} and ends at {end} seconds; swap or correct them.")
        return self.time(start), self.time(end)

    def time(self, seconds: float) -> str:
        """A time as text."""
        return time_text(seconds, self.time_format)


def check_format(name: str):
    """Raises ConfigError unless this is a format, or "auto", which tells them apart by their keys."""
    known = ("auto", *FORMATS)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        raise ConfigError(f"format must be one of {', '.join(known)}, got {name!r}{hint}")


def find_format(record: Mapping) -> str:
    """The format that the keys of a record tell.

    Raises:
      DataError: they tell none or several.
    """
    found = [name for name, (marks, _) in FORMATS.items() if any(set(keys) <= set(record) for keys in marks)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(map(str, record)) or "none"
    if found:
        raise DataError(
            f"expected a record of one format, but the keys {keys} are those of {' and of '.join(found)}; set "
            "the data's format to the one that is meant."
        )
    known = "; ".join(
        f"{name} ({' or '.join('+'.join(m) for m in marks)})" for name, (marks, _) in FORMATS.items() if marks
    )
    raise DataError(
        f"expected a record of a known format, got the keys {keys}; known formats and their keys are {known}."
    )


def to_conversation(record: Mapping, format: str = "auto", telling: Telling = Telling()) -> list[dict]:
    """The conversation of a record.

    Args:
      record: a mapping out of JSON; media may also be objects in memory.
      format: one of `FORMATS`, or "auto".
      telling: how times and places are told.

    Raises:
      DataError: no such record, and what is wrong with it.
      MediaError: an image within the record that is none.
    """
    return FORMATS[find_format(record) if format == "auto" else format][1](record, telling)


def record_options(record: Mapping) -> dict[str, Any]:
    """What a record tells the processor beside its conversation: `tools` and `chat_template_kwargs`, where it has them.

    Raises:
      DataError: one is a text that is not JSON.
    """
    return {key: _from_json(record[key], key) for key in ("tools", "chat_template_kwargs") if record.get(key)}


def _messages(record: Mapping, telling: Telling) -> list[dict]:
    """Our own messages as they are, OpenAI's in our form. What is malformed is left to the processor's check."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f'expected "messages" with at least one message, got {_short(messages)}.')
    return [
        _message(message, f"message {m}") if isinstance(message, Mapping) else message
        for m, message in enumerate(messages)
    ]


def _message(message: Mapping, where: str) -> dict:
    # Records written by servers spell out what is not there.
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if kept.get("role") == "developer":
        kept["role"] = "system"
    for key in ("thinking", "reasoning"):
        if isinstance(kept.get(key), str):
            kept.setdefault("reasoning_content", kept.pop(key))
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call(call, f"{where}, tool call {c}") for c, call in enumerate(kept["tool_calls"])]
        kept["content"] = kept.get("content") or ""
    if isinstance(kept.get("content"), list):
        kept["content"] = [_part(part, f"{where}, part {p}") for p, part in enumerate(kept["content"])]
    return kept


def _call(call: Any, where: str) -> Any:
    """A tool call whose arguments, text in OpenAI's form, are JSON values, so that the template writes them its way."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], where)}
    # Without arguments, servers write an empty text.
    return {**call, "arguments": _from_json(call.get("arguments") or {}, f"{where}: arguments")}


def _part(part: Any, where: str) -> Any:
    """A part of a message, images and videos in our form."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "video"):
        return {**part, kind: _medium(part.get(kind), kind, where)}
    if kind not in ("image_url", "video_url"):
        return part
    value, kind = part.get(kind), kind.removesuffix("_url")
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise DataError(
            f'{where} must be such as {{"type": "{kind}_url", "{kind}_url": {{"url": ...}}}}, got {_short(part)}.'
        )
    options = {key: option for key, option in part.items() if key not in ("type", f"{kind}_url")}
    return {"type": kind, kind: _medium(url, kind, where), **options}


def _medium(value: Any, kind: str, where: str) -> Any:
    """A path or an object in memory; what a `data:` URL holds."""
    if not isinstance(value, str):
        return value
    scheme = re.match(r"(data|file|https?):", value)
    if not scheme:
        return value
    if scheme[1] == "file":
        return urllib.parse.unquote(urllib.parse.urlsplit(value).path)
    if scheme[1] == "data" and kind == "image":
        head, _, body = value.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("no base64")
            return image_of_bytes(base64.b64decode(body, validate=True))
        except (binascii.Error, ValueError) as error:
            raise DataError(
                f"{where}: {_short(value)} is not an image in base64 ({error}); write data:image/png;base64,... or "
                "give a path."
            ) from error
    raise DataError(f"{where}: {_short(value)} is no file; write the {kind} into one and give its path.")


_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


def _llava(record: Mapping, telling: Telling) -> list[dict]:
    """Turns whose marks stand for the record's images and videos in order; the user's texts are trimmed around them."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f'expected "conversations" with at least one turn, got {_short(turns)}.')
    said = []
    for t, turn in enumerate(turns):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(text, str) or speaker not in _ROLES:
            raise DataError(
                f'turn {t} must be {{"from": ..., "value": text}} with from out of {", ".join(_ROLES)}, got '
                f"{_short(turn)}."
            )
        said.append((speaker, _ROLES[speaker], text))
    pools = {kind: _pool(record, kind) for kind in ("image", "video")}
    for kind, pool in pools.items():
        marks = sum(text.count(f"<{kind}>") for _, role, text in said if role in ("user", "tool"))
        if marks != len(pool):
            raise DataError(
                f"the turns have {marks} <{kind}> marks, the record has {len(pool)} {kind}s; write one mark for each."
            )
    messages: list[dict] = []
    if isinstance(record.get("system"), str) and said[0][1] != "system":
        messages.append({"role": "system", "content": record["system"]})
    for t, (speaker, role, text) in enumerate(said):
        if speaker == "function_call":
            calls = _from_json(text, f"turn {t}")
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": role, "content": "", "tool_calls": [_call(call, f"turn {t}") for call in calls]})
        elif role in ("user", "tool"):
            pieces = [piece.strip() for piece in re.split("(<image>|<video>)", text)]
            parts = [
                pools[piece[1:-1]].pop(0) if piece in ("<image>", "<video>") else {"type": "text", "text": piece}
                for piece in pieces
                if piece
            ]
            messages.append({"role": role, "content": parts})
        else:
            messages.append({"role": role, "content": text})
    return messages


def _pool(record: Mapping, kind: str) -> list[dict]:
    """The parts of a record's images or videos."""
    given = [key for key in (kind, f"{kind}s") if record.get(key) is not None]
    if len(given) == 2:
        raise DataError(f"the record has both '{kind}' and '{kind}s'; give the {kind}s under one of them.")
    values = record[given[0]] if given else []
    return [_shown(value, kind) for value in (values if isinstance(values, list | tuple) else [values])]


def _shown(value: Any, kind: str = "video") -> dict:
    """The part that shows a medium of a record: a path, an object in memory, or a mapping that has it with options."""
    options = dict(value) if isinstance(value, Mapping) else {kind: value}
    if options.get(kind) is None:
        raise DataError(f'expected a path under "{kind}", or {{"{kind}": path}} with options, got {_short(value)}.')
    return {"type": kind, **options, kind: _medium(options[kind], kind, kind)}


def _temporal_grounding(record: Mapping, telling: Telling) -> list[dict]:
    """When something happens."""
    event = _text(record, "event")
    start, end = telling.span(record, "the event")
    question = f'When does "{event}" happen in the video? Give its start and its end.'
    return _asked(record, question, f"From {start} to {end}.")


def _spatiotemporal_grounding(record: Mapping, telling: Telling) -> list[dict]:
    """Where something is, over time: JSON with "bbox_2d" or "point_2d", names that Qwen2.5-VL and later are taught."""
    event, part, answer = _text(record, "event"), _shown(record.get("video")), []
    entries = _entries(record, "boxes")
    for b, entry in enumerate(entries):
        where = f"entry {b} of 'boxes'"
        if "time" in entry:
            said: dict[str, Any] = {"time": telling.time(_seconds(entry["time"], f"'time' of {where}"))}
        else:
            said = dict(zip(("start", "end"), telling.span(entry, where), strict=True))
        key, name, count = ("point", "point_2d", 2) if "point" in entry else ("box", "bbox_2d", 4)
        said[name] = _place(entry.get(key), count, f"'{key}' of {where}", record, part, telling)
        answer.append(said)
    question = f'Where is "{event}" in the video, and when? Answer in JSON, with times and coordinates.'
    return _asked(record, question, json.dumps(answer, ensure_ascii=False))


def _dense_captions(record: Mapping, telling: Telling) -> list[dict]:
    """What happens, one line for each part of the video."""
    if "captions" not in record and "timestamps" in record:
        spans, sentences = record.get("timestamps"), record.get("sentences")
        if not isinstance(spans, list) or not isinstance(sentences, list) or len(spans) != len(sentences):
            raise DataError(
                "'timestamps' and 'sentences' must be lists of the same length; give a span for each sentence."
            )
        if not all(isinstance(span, list | tuple) and len(span) == 2 for span in spans):
            raise DataError(f"'timestamps' must hold [start, end] for each sentence, in seconds, got {_short(spans)}.")
        record = {
            **record,
            "captions": [
                {"start": start, "end": end, "caption": sentence}
                for (start, end), sentence in zip(spans, sentences, strict=True)
            ],
        }
    lines = []
    for c, entry in enumerate(_entries(record, "captions")):
        start, end = telling.span(entry, f"entry {c} of 'captions'")
        lines.append(f"{start} to {end}: {_text(entry, 'caption').strip()}")
    return _asked(record, "Describe what happens in the video, each part with its start and its end.", "\n".join(lines))


def _asked(record: Mapping, question: str, answer: str) -> list[dict]:
    """A question about a record's video, its own words for it if it has some, and the answer."""
    text = _text(record, "question") if record.get("question") is not None else question
    return [
        {"role": "user", "content": [_shown(record.get("video")), {"type": "text", "text": text}]},
        {"role": "assistant", "content": answer},
    ]


def _place(values: Any, count: int, where: str, record: Mapping, part: dict, telling: Telling) -> list[int]:
    """The coordinates of a box or a point as the model says them.

    The record says what they count: "pixels" of the picture in the file, shares of the sides ("unit") or "thousandths".
    """
    unit = record.get("coordinates")
    if unit not in ("pixels", "unit", "thousandths"):
        raise DataError(
            "'coordinates' must say what the numbers of 'boxes' count: pixels (of the file's picture), unit (0 to 1) "
            f"or thousandths; got {_short(unit)}."
        )
    if not isinstance(values, list | tuple) or len(values) != count or not all(map(_is_number, values)):
        names = "[x1, y1, x2, y2]" if count == 4 else "[x, y]"
        raise DataError(f"{where} must be {names} in numbers, got {_short(values)}.")
    if count == 4 and (values[0] > values[2] or values[1] > values[3]):
        raise DataError(f"{where} must have its left top corner first, [x1, y1, x2, y2], got {_short(values)}.")
    size: Any = {"unit": (1, 1), "thousandths": (1000, 1000)}.get(unit, (record.get("height"), record.get("width")))
    if size == (None, None):
        size = _sizes(part, telling).original
    elif not all(_is_number(side) and side > 0 for side in size):
        raise DataError(f"'height' and 'width' must be the video's, in pixels, or both be left out; got {size}.")
    resized = _sizes(part, telling).resized if telling.coordinates.parts is None else None
    return from_shares(to_shares(np.asarray(values, np.float64), size), telling.coordinates, resized).tolist()


def _sizes(part: dict, telling: Telling) -> Sizes:
    if telling.sizes is None:
        raise DataError("coordinates in pixels need the size of the video; read the record with the model's processor.")
    return telling.sizes(part)


def _entries(record: Mapping, key: str) -> Sequence[Mapping]:
    entries = record.get(key)
    if not isinstance(entries, list | tuple) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f"'{key}' must be a list of at least one mapping, got {_short(entries)}.")
    return entries


def _text(record: Mapping, key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"'{key}' must be a text, got {_short(text)}.")
    return text


def _seconds(value: Any, where: str) -> float:
    if not _is_number(value) or value < 0:
        raise DataError(f"{where} must be a time in seconds, 0 or more, got {_short(value)}.")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _from_json(value: Any, where: str) -> Any:
    """What a text of JSON says; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where} must be JSON ({error}), got {_short(value)}.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# By name: the keys that tell each format, as alternatives, and what makes its conversation.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Mapping, Telling], list[dict]]]] = {
    "messages": ((("messages",),), _messages),
    "llava": ((("conversations",),), _llava),
    "qwen": ((), _llava),
    "temporal_grounding": ((("video", "event", "start", "end"),), _temporal_grounding),
    "spatiotemporal_grounding": ((("video", "event", "boxes"),), _spatiotemporal_grounding),
    "dense_captions": ((("video", "captions"), ("video", "timestamps", "sentences")), _dense_captions),
}
