"""Conversations and tools: their form, the checkpoint's chat template, which part of the rendered text is to be learnt.

A chat template is a program out of a checkpoint, so it runs in jinja's sandbox and sees plain values only. What users
write must not turn into control tokens: the special tokens in their text are taken apart before rendering by a
character that occurs nowhere else, and put together again, as text, by the tokenizer side (`TextEncoder`).
"""

import dataclasses
import datetime
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

from qwenvl_jax.data.pooling import MAX_SIDE, METHODS
from qwenvl_jax.data.samplers import OPTIONS as SAMPLING_OPTIONS
from qwenvl_jax.data.samplers import SAMPLERS
from qwenvl_jax.errors import CheckpointError, ConversationError

ROLES = ("system", "user", "assistant", "tool")
PART_KEYS = {
    "text": ("type", "text"),
    "image": ("type", "image", "min_pixels", "max_pixels", "pool", "pool_method"),
    "video": (
        "type",
        "video",
        "fps",
        "num_frames",
        "min_frames",
        "max_frames",
        "min_pixels",
        "max_pixels",
        "max_frame_tokens",
        "max_video_tokens",
        "min_frame_tokens",
        "pool",
        "pool_method",
        "min_fps",
        "max_fps",
        "sampler",
        "start",
        "end",
        "timestamps",
        "duration",
    ),
}
# Options that may be fractions; options that are checked apart; the rest are positive whole numbers.
_FRACTIONS = ("fps", "min_fps", "max_fps", "duration")
_OTHERWISE = ("sampler", "start", "end", "timestamps", "pool_method")
# The names under which templates read a message's reasoning.
_REASONING = ("reasoning_content", "thinking")
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")


def check_conversation(conversation: Any):
    """Raises ConversationError unless this is a list of messages, each with a role and text or known parts.

    The error names the message, and the part in it, by index from 0.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ConversationError(
            "a conversation must be a list of at least one message such as {'role': 'user', 'content': 'Hello'}, got "
            f"{_show(conversation)}."
        )
    for m, message in enumerate(conversation):
        where = f"message {m}"
        if not isinstance(message, dict):
            raise ConversationError(f"{where} must be a dict with 'role' and 'content', got {_show(message)}.")
        _check_keys(message, MESSAGE_KEYS, where)
        if message.get("role") not in ROLES:
            raise ConversationError(
                f"{where} must have a role out of {', '.join(ROLES)}, got {_show(message.get('role'))}."
            )
        _check_said_by_assistant(message, where)
        content = message.get("content")
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            continue
        if not isinstance(content, (list, tuple)):
            raise ConversationError(
                f"{where} must have content that is a str or a list of parts, got {_show(content)}."
            )
        for p, part in enumerate(content):
            _check_part(part, message["role"], f"{where}, part {p}")


def _check_said_by_assistant(message: dict, where: str):
    """The reasoning and the tool calls of a message."""
    for key in ("reasoning_content", "tool_calls"):
        if message.get(key) and message["role"] != "assistant":
            raise ConversationError(f"{where} has {key} but is of the {message['role']}; only the assistant has some.")
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    if not isinstance(reasoning, (str, type(None))):
        raise ConversationError(f"{where} must have a str under 'reasoning_content', got {_show(reasoning)}.")
    if not isinstance(calls, (list, tuple, type(None))):
        raise ConversationError(f"{where} must have a list of calls under 'tool_calls', got {_show(calls)}.")
    for c, call in enumerate(calls or ()):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConversationError(
                f"{where}, tool call {c} must be such as {{'name': 'crop', 'arguments': {{}}}}, within 'function' "
                f"or not; got {_show(call)}."
            )
        if not isinstance(function.get("arguments", {}), (dict, str)) or not _is_json(call):
            raise ConversationError(
                f"{where}, tool call {c} must have arguments that are a dict of JSON values or the text of one, got "
                f"{_show(function.get('arguments'))}."
            )


def check_tools(tools: Any):
    """Raises ConversationError unless this is None or a list of functions in JSON schema.

    A function has a name, within "function" (`{"type": "function", "function": {"name": ..., "parameters": ...}}`) or
    not.
    """
    if not isinstance(tools, (list, tuple, type(None))):
        raise ConversationError(f"tools must be a list of functions in JSON schema, got {_show(tools)}.")
    for t, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not _is_json(tool):
            raise ConversationError(
                f"tool {t} must be a function in JSON schema such as {{'type': 'function', 'function': {{'name': "
                f"'crop', 'parameters': {{...}}}}}}, got {_show(tool)}."
            )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _check_part(part: Any, role: str, where: str):
    """One part of a message's content."""
    kinds = tuple(PART_KEYS)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        raise ConversationError(f"{where} must be a dict with a type out of {', '.join(kinds)}, got {_show(part)}.")
    _check_keys(part, PART_KEYS[kind], f"{where} ({kind})")
    if part.get(kind) is None:
        raise ConversationError(f"{where} ({kind}) lacks its value; give it under the key '{kind}'.")
    if kind == "text" and not isinstance(part["text"], str):
        raise ConversationError(f"{where} must have a str under 'text', got {_show(part['text'])}.")
    if kind != "text" and role not in ("user", "tool"):
        raise ConversationError(
            f"{where} is {kind} in a message of the {role}; only user and tool messages show media."
        )
    for key in PART_KEYS[kind][2:]:
        if key in _OTHERWISE:
            continue
        value, whole = part.get(key), key not in _FRACTIONS
        number = isinstance(value, (int, np.integer) if whole else (int, float, np.number)) and value is not True
        if value is not None and not (number and 0 < value < float("inf")):
            raise ConversationError(
                f"{where} must have a positive {'whole ' if whole else ''}number under '{key}', got {_show(value)}."
            )
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels"), ("min_fps", "max_fps")):
        if part.get(low) is not None and part.get(high) is not None and part[low] > part[high]:
            raise ConversationError(f"{where} has {low}={part[low]} above {high}={part[high]}; swap or drop one.")
    if kind != "text":
        _check_pooling(part, where)
    if kind == "video":
        _check_sampling(part, where)


def _check_pooling(part: dict, where: str):
    """How the merged tokens of an image or video are pooled."""
    if (part.get("pool") or 1) > MAX_SIDE:
        raise ConversationError(
            f"{where} must have a whole number from 1 (no pooling) to {MAX_SIDE} under 'pool', got "
            f"{_show(part['pool'])}."
        )
    method = part.get("pool_method")
    if method is None:
        return
    if method not in METHODS:
        raise ConversationError(
            f"{where} has an unknown pool_method {_show(method)}; there are {' and '.join(METHODS)}."
        )
    if part.get("pool") is None:
        raise ConversationError(f"{where} gives pool_method without pool; give both, or drop it.")


def _check_min_frame_tokens(part: dict, where: str):
    """The size of frames below which there are to be fewer."""
    least = part["min_frame_tokens"]
    if part.get("max_video_tokens") is None:
        raise ConversationError(
            f"{where} gives min_frame_tokens, below which fewer frames are taken to hold max_video_tokens; give that "
            "too."
        )
    for key in ("max_video_tokens", "max_frame_tokens"):
        if part.get(key) is not None and part[key] < least:
            raise ConversationError(f"{where} has min_frame_tokens={least} above {key}={part[key]}; lower it.")
    if part.get("num_frames") is not None or part.get("sampler") in ("count", "timestamps"):
        raise ConversationError(
            f"{where} gives min_frame_tokens, which takes fewer frames, and asks for certain frames; drop one."
        )


def _check_sampling(part: dict, where: str):
    """The options of a video part that say which frames are chosen, and those that exclude each other."""
    given = [key for key in PART_KEYS["video"] if part.get(key) is not None]
    if "fps" in given and "num_frames" in given:
        raise ConversationError(f"{where} gives both fps and num_frames, which exclude each other; drop one.")
    pixels = [key for key in given if key.endswith("_pixels")]
    tokens = [key for key in given if key.endswith("_tokens")]
    if pixels and tokens:
        raise ConversationError(
            f"{where} gives both {pixels[0]} and {tokens[0]}, which bound the same in pixels and in tokens; drop one."
        )
    if "min_frame_tokens" in given:
        _check_min_frame_tokens(part, where)
    name = part.get("sampler")
    if name is None:
        name = "uniform"
    if not isinstance(name, str) or name not in SAMPLERS:
        close = difflib.get_close_matches(name, SAMPLERS, n=1) if isinstance(name, str) else []
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(SAMPLERS)}."
        raise ConversationError(f"{where} has an unknown sampler {_show(name)}; {hint}")
    sampler = SAMPLERS[name]
    as_images = isinstance(part["video"], (list, tuple))  # which have no times of their own
    if "duration" in given and not as_images:
        raise ConversationError(f"{where} gives duration, which only a video given as images takes; drop it.")
    if as_images and "timestamps" not in given:
        raise ConversationError(f"{where} gives a video as images without timestamps; give the seconds of each.")
    read = (*sampler.options, "timestamps") if as_images else sampler.options
    odd = [key for key in given if key in SAMPLING_OPTIONS and key not in read]
    if odd:
        others = ", ".join(other for other, value in SAMPLERS.items() if odd[0] in value.options)
        raise ConversationError(
            f"{where} gives {odd[0]}, which the sampler '{name}' does not take; drop it, or choose one that does "
            f"({others})."
        )
    if sampler.needs and sampler.needs not in given:
        raise ConversationError(f"{where} has the sampler '{name}' without {sampler.needs}; give it.")
    for key in ("start", "end"):
        if part.get(key) is not None and not _is_time(part[key]):
            raise ConversationError(
                f"{where} must have seconds, a number not below 0, under '{key}', got {_show(part[key])}."
            )
    times = part.get("timestamps")
    if times is not None and not (isinstance(times, (list, tuple)) and times and all(_is_time(t) for t in times)):
        raise ConversationError(
            f"{where} must have a list of seconds, numbers not below 0, under 'timestamps', got {_show(times)}."
        )


def _is_time(value: Any) -> bool:
    """Whether this is a number of seconds."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")


def _check_keys(value: dict, known: tuple[str, ...], where: str):
    """Refuses keys that nothing reads, guessing what was meant."""
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys are {', '.join(known)}."
            raise ConversationError(f"{where} has an unknown key {key!r}; {hint}")


def _show(value: Any) -> str:
    """A short form of a value for an error message."""
    if isinstance(value, (str, int, float, bool, type(None), dict, list, tuple)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def parts_of(conversation: list[dict], kinds: tuple[str, ...]) -> list[tuple[str, dict]]:
    """The parts of some kinds, in reading order, each with where it stands for error messages."""
    found = []
    for m, message in enumerate(conversation):
        for p, part in enumerate(message["content"] if isinstance(message.get("content"), (list, tuple)) else ()):
            if part["type"] in kinds:
                found.append((f"message {m}, part {p}", part))
    return found


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """What chat templates on the hub are written for."""

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A chat template, and the names that it reads."""
    environment = _environment()
    try:
        template = environment.from_string(source)
        return template, frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template cannot be parsed (line {error.lineno}: {error.message}); download it again."
        ) from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark the assistant's words; rendered as it is."""

    tags = {"generation"}  # noqa: RUF012, jinja reads a class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drops the two marks and keeps what is between."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    conversation: list[dict],
    *,
    add_generation_prompt: bool,
    tools: Sequence[dict] | None = None,
    **values,
) -> str:
    """The text of a conversation, media standing as the template's placeholders.

    Args:
      template: jinja source from the checkpoint.
      conversation: as `check_conversation` wants it.
      add_generation_prompt: whether the assistant's turn is opened at the end.
      tools: as `check_tools` wants them.
      **values: further names that the template may read, such as `enable_thinking` or `eos_token`.

    Raises:
      CheckpointError: the template cannot be parsed.
      ConversationError: the template refuses the conversation, or has no place for something in it.

    Reference: `render_jinja_template` of transformers, which leaves out in silence what a template has no place for.
    """
    compiled, names = _compile(template)
    _check_places(template, names, conversation, tools)
    try:
        return compiled.render(
            messages=[_for_template(message) for message in conversation],
            tools=_plain(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **_plain(values),
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversationError(f"the checkpoint's chat template refuses the conversation: {reason}") from error


def check_template_values(template: str, values: Any):
    """Raises ConversationError unless this is None or a dict of names that the template reads, with JSON values."""
    if not isinstance(values, (dict, type(None))) or not _is_json(values):
        raise ConversationError(f"chat_template_kwargs must be a dict of JSON values, got {_show(values)}.")
    takes = _compile(template)[1].difference(("messages", "tools", "documents", "add_generation_prompt"))
    for name in values or ():
        if name not in takes:
            raise ConversationError(
                f"chat_template_kwargs has {name!r}, which the checkpoint's chat template does not take; drop it (the "
                f"template takes {', '.join(sorted(takes)) or 'none'})."
            )


def _check_places(template: str, names: frozenset[str], conversation: list[dict], tools: Sequence[dict] | None):
    """Refuses what the template would leave out."""
    lost = "which would be lost; leave it out, or take the chat template of a model that has one."
    if tools and "tools" not in names:
        raise ConversationError(f"the checkpoint's chat template has no place for tools, {lost}")
    for m, message in enumerate(conversation):
        if message.get("tool_calls") and "tool_calls" not in template:
            raise ConversationError(f"message {m}: the checkpoint's chat template has no place for tool_calls, {lost}")
        if message.get("reasoning_content") and not any(name in template for name in _REASONING):
            raise ConversationError(
                f"message {m}: the checkpoint's chat template has no place for reasoning_content, {lost}"
            )


def _for_template(message: dict) -> dict:
    """A message as templates read it: reasoning also under its other name, calls without content with an empty one."""
    plain = _plain(message)
    if plain.get("reasoning_content") is not None:
        plain = {"thinking": plain["reasoning_content"], **plain}
    return {**plain, "content": ""} if plain.get("content", "") is None else plain


def _plain(value: Any) -> Any:
    """JSON values only: a template sees that a picture is there, never the object."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else "(media)"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of a text with the place of each in it.

    Attributes:
      ids: i32[n].
      starts: i64[n], the character at which the token begins, in the text as encoded (with guards in place).
    """

    ids: np.ndarray
    starts: np.ndarray


class TextEncoder:
    """A tokenizer that tells control tokens of the template from the same letters in what users wrote.

    Args:
      tokenizer: with its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._as_text = Tokenizer.from_str(tokenizer.to_str())
        self._as_text.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: number for number, token in added.items() if token.special}
        special = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def __reduce__(self):
        # A pickled tokenizer forgets `encode_special_tokens`.
        return TextEncoder, (self._tokenizer,)

    def guard_for(self, *values: Any) -> str:
        """A character that occurs in none of these values, to stand inside tokens that are meant as text."""
        text = json.dumps(_plain(values), ensure_ascii=False)
        return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)

    def protect(self, conversation: list[dict], guard: str) -> list[dict]:
        """The conversation with every special token in its texts taken apart by `guard`."""

        def part(value):
            if not isinstance(value, dict):
                return self.protect_value(value, guard)
            kept = ("type", value["type"]) if value.get("type") in ("image", "video") else ("type",)
            return {k: v if k in kept else self.protect_value(v, guard) for k, v in value.items()}

        def field(name, value):
            if name == "content" and isinstance(value, (list, tuple)):
                return [part(item) for item in value]
            return value if name == "role" else self.protect_value(value, guard)

        return [{name: field(name, value) for name, value in message.items()} for message in conversation]

    def protect_value(self, value: Any, guard: str) -> Any:
        """A value of JSON with every special token in it, also in the names of its members, taken apart by `guard`."""
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0][0] + guard + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self.protect_value(k, guard): self.protect_value(v, guard) for k, v in value.items()}
        return [self.protect_value(item, guard) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, text: str, guard: str) -> Encoded:
        """Tokens of a rendered text. Special tokens are themselves, those with a guard inside are plain text."""
        if guard not in text:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            begins = np.asarray([start for start, _ in encoding.offsets], np.int64)
            return Encoded(np.asarray(encoding.ids, np.int32), begins)
        ids: list[int] = []
        starts: list[int] = []
        place = 0
        pieces = re.split(f"({self._special.pattern})", text)  # plain text at even places, special tokens at odd ones
        for k, piece in enumerate(pieces):
            if k % 2:
                ids.append(self._special_ids[piece])
                starts.append(place)
            elif piece:
                # Offsets are counted in the piece without guards, then moved past the guards that stood before them.
                kept = np.flatnonzero([c != guard for c in piece])
                encoding = self._as_text.encode(piece.replace(guard, ""), add_special_tokens=False)
                ids.extend(encoding.ids)
                starts.extend(int(place + kept[start]) for start, _ in encoding.offsets)
            place += len(piece)
        return Encoded(np.asarray(ids, np.int32), np.asarray(starts, np.int64))


def learnt_spans(text: str, turn_start: str, turn_end: str) -> list[tuple[int, int]]:
    """Character spans that the assistant says: from after `<|im_start|>assistant\\n` through `<|im_end|>\\n`.

    The last turn may still be open (a generation prompt); nothing of it is learnt.

    Reference: Qwen's public fine-tuning scripts, whose labels run from the second token after `assistant` through
    `<|im_end|>` and the newline behind it.
    """
    spans, opening = [], f"{turn_start}assistant\n"
    place = text.find(opening)
    while place >= 0:
        start = place + len(opening)
        end = text.find(turn_end, start)
        if end < 0:
            break
        end += len(turn_end)
        spans.append((start, end + (text[end : end + 1] == "\n")))
        place = text.find(opening, end)
    return spans
