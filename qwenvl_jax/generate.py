"""Answers from a model: one pass over the prompts, then one token a step from a key/value cache."""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.batch import Batch, KVCache
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError, QwenVLError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.parallel.placement import place_batch

# Lengths of rows and caches are rounded up to a multiple of this, so that prompts of about the same length share one
# compiled program.
LENGTH_STEP = 128

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said: the text, and its token ids without the prompt and without the token that ended it."""

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is picked from the logits.

    Attributes:
      temperature: 0 takes the likeliest token; else logits are divided by it before a draw.
      top_k: draw among this many likeliest tokens only; None for all.
      top_p: draw among the likeliest tokens that together reach this probability only; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise QwenVLError(f"temperature={self.temperature!r} must be 0 (the likeliest token) or a positive number.")
        if self.top_k is not None and (not _is_int(self.top_k) or self.top_k < 1):
            raise QwenVLError(f"top_k={self.top_k!r} must be a positive integer, or None for all tokens.")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise QwenVLError(f"top_p={self.top_p!r} must be above 0 and at most 1, or None for all tokens.")


def generate(
    model: QwenVL,
    processor: Processor,
    conversations: Sequence[Sequence[dict]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    stream: Callable[[int, str], None] | None = None,
    tools: Sequence[dict] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Answers every conversation.

    A model that is spread over several processes is asked the same by all of them, and each gets all answers. On a mesh
    as many conversations as its `data`, `fsdp` and `expert` divide are shared among them; others each device reads.

    Args:
      model: as `QwenVL.from_pretrained` gives it.
      processor: of the same folder.
      conversations: a list of conversations, each a list of messages that ends with the question.
      max_new_tokens: an answer stops here at the latest.
      temperature, top_p, top_k: see `Sampling`.
      seed: of the draws; an answer depends on it and on its conversation's place in the list alone.
      stream: called with (number of the conversation, new text) as text becomes certain.
      tools, chat_template_kwargs: of all conversations; see `Processor.sample`.
      interrupted: asked after each token; once it says True, answers end as they are.

    Returns:
      One answer for each conversation, in order.

    Raises:
      QwenVLError: a bad argument; a conversation or medium that cannot be used; a processor of another model.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise QwenVLError(f"max_new_tokens={max_new_tokens!r} must be a positive integer.")
    if not _is_int(seed) or not 0 <= seed < 2**32:
        raise QwenVLError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1.")
    if not isinstance(conversations, (list, tuple)) or not all(isinstance(one, (list, tuple)) for one in conversations):
        raise QwenVLError(
            "conversations must be a list of conversations, each a list of messages; put a single conversation into a "
            "list of its own."
        )
    if not conversations:
        return []
    batch = prompt_batch(model, processor, conversations, tools=tools, chat_template_kwargs=chat_template_kwargs)
    return answers(model, processor, batch, max_new_tokens, sampling, seed, stream=stream, interrupted=interrupted)


def prompt_batch(
    model: QwenVL,
    processor: Processor,
    conversations: Sequence[Sequence[dict]],
    **options: Any,
) -> Batch:
    """The conversations as `answers` takes them, on this host: one a row, rows of a length that programs share.

    Args:
      model, processor, conversations: see `generate`.
      options: of all conversations: `tools`, `chat_template_kwargs` and `time_format`; see `Processor.sample`.

    Raises:
      QwenVLError: a conversation or medium that cannot be used.
    """
    shares = model.execution.split("batch")
    batch = processor(
        [list(conversation) for conversation in conversations],
        True,
        **options,
        # Devices read the media of their own conversations, and those that share some share their frames.
        groups=shares if len(conversations) % shares == 0 else 1,
        vision_multiple=model.execution.split("vision_rows"),
    )
    return _at_length_step(batch)


def answers(
    model: QwenVL,
    processor: Processor,
    batch: Batch,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    *,
    stream: Callable[[int, str], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """One answer for each row of a `prompt_batch`; see `generate`.

    Raises:
      QwenVLError: a processor of another model.
    """
    _check_fit(model, batch, max_new_tokens)
    rows = len(batch.tokens)
    batch = place_batch(batch, model.execution)
    ends = end_token_ids(model, processor)
    writers = [_Writer(processor, functools.partial(stream, row) if stream else None) for row in range(rows)]
    open_rows = set(range(len(writers)))
    for tokens_B in _token_steps(model, batch, sampling or Sampling(), seed, max_new_tokens):
        for row in sorted(open_rows):
            token = int(tokens_B[row])
            if token in ends:
                open_rows.discard(row)
            else:
                writers[row].add(token)
        if not open_rows or interrupted():
            break
    return [writer.answer() for writer in writers]


def end_token_ids(model: QwenVL, processor: Processor) -> frozenset[int]:
    """Ids that end an answer: those of the folder's generation_config.json, else the tokenizer's end and padding."""
    if model.config.eos_token_ids:
        return frozenset(model.config.eos_token_ids)
    known = (processor.eos_token_id, processor.pad_token_id)
    return frozenset(i for i in known if i is not None)


def _is_int(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _at_length_step(batch: Batch) -> Batch:
    """Pads rows on the right to the next multiple of `LENGTH_STEP`."""
    room = -batch.tokens.shape[1] % LENGTH_STEP

    def pad(leaf, value=0):
        return np.pad(leaf, [(0, 0), (0, room)] + [(0, 0)] * (leaf.ndim - 2), constant_values=value)

    names = ["tokens", "positions", "segment_ids", "targets", "loss_weights"]
    if batch.pool_index is not None:
        names += ["pool_index", "pool_weights"]
    rows = {name: pad(np.asarray(getattr(batch, name))) for name in names}
    return dataclasses.replace(batch, **rows, vision_index=pad(np.asarray(batch.vision_index), -1))


def _check_fit(model: QwenVL, batch: Batch, max_new_tokens: int) -> None:
    """Refuses a batch whose ids or patches this model cannot read; says when positions leave the trained range."""
    config = model.config
    if (top := int(np.max(batch.tokens))) >= config.text.vocab_size:
        raise CheckpointError(
            f"the processor gives token id {top}, but the model has vocab_size={config.text.vocab_size}; load both "
            "from the same folder."
        )
    for rows in batch.vision:
        if rows.patches.shape[-1] != config.vision.patch_dim:
            raise CheckpointError(
                f"the processor gives patches of {rows.patches.shape[-1]} values, but the model reads "
                f"{config.vision.patch_dim}; load both from the same folder."
            )
    reach = int(np.max(batch.positions)) + 1 + max_new_tokens
    if reach > config.text.max_position_embeddings:
        _log.warning(
            "positions may reach %d, beyond the max_position_embeddings=%d of its training; answers may suffer.",
            reach,
            config.text.max_position_embeddings,
        )


def _token_steps(model: QwenVL, batch: Batch, sampling: Sampling, seed: int, count: int):
    """Yields the next token of every row, np i32[B], `count` times at most."""
    graph, weights = nnx.split(model)
    cache_size = batch.tokens.shape[1] + -(-count // LENGTH_STEP) * LENGTH_STEP
    # Prompts, seed and step are the host's: what is the same in all processes may go to the devices of all.
    draw = np.uint32(seed)
    tokens_B, cache = read_prompts(graph, weights, batch, draw, cache_size, sampling)
    yield np.asarray(tokens_B)
    for step in range(1, count):
        tokens_B, cache = read_token(graph, weights, tokens_B, cache, draw, np.int32(step), sampling)
        yield np.asarray(tokens_B)


@functools.partial(jax.jit, static_argnames=("graph", "cache_size", "sampling"))
def read_prompts(graph, weights, batch: Batch, seed, cache_size: int, sampling: Sampling):
    """Reads the prompts: (i32[B] first tokens, the cache)."""
    model = nnx.merge(graph, weights)
    logits_BV, cache = model.prefill(batch, cache_size)
    return _picked_everywhere(model, logits_BV, seed, 0, sampling), cache


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames=("cache",))
def read_token(graph, weights, tokens_B, cache: KVCache, seed, step, sampling: Sampling):
    """Reads one token a row: (i32[B] tokens after them, the cache)."""
    model = nnx.merge(graph, weights)
    logits_BV, cache = model.decode(tokens_B, cache)
    return _picked_everywhere(model, logits_BV, seed, step, sampling), cache


def _picked_everywhere(model: QwenVL, logits_BV, seed, step, sampling: Sampling):
    """The next tokens, i32[B], whole on every device, so that each process can read all of them."""
    # A key a row: what is drawn for a row does not depend on how many others there are.
    rows_B = jnp.arange(logits_BV.shape[0])
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
    return model.execution.constrain(pick(logits_BV, keys_B, step, sampling), None)


def pick(logits_BV, keys_B, step, sampling: Sampling):
    """The next tokens, i32[B], from f32[B, V] logits. Order as in the reference: temperature, top_k, top_p, draw."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / jnp.float32(sampling.temperature)
    V = logits_BV.shape[-1]
    if sampling.top_k is not None and sampling.top_k < V:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        likely_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it do not yet reach top_p, so the likeliest one always does.
        stays_BV = jnp.cumsum(likely_BV, axis=-1) - likely_BV < jnp.float32(sampling.top_p)
        least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    draw = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, step), logits))
    return draw(keys_B, logits_BV).astype(jnp.int32)


class _Writer:
    """Collects the tokens of one answer and hands on its text as soon as no later token can change it."""

    def __init__(self, processor: Processor, emit: Callable[[str], None] | None):
        self.processor, self.emit = processor, emit
        self.tokens: list[int] = []
        self.start, self.told = 0, 0  # text of tokens[start:told] was handed on last

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self._tell(final=False)

    def answer(self) -> Answer:
        self._tell(final=True)
        return Answer(self.processor.decode(self.tokens), self.tokens)

    def _tell(self, final: bool) -> None:
        """Hands on the text since the last time, unless it ends within a character of several bytes.

        The last piece is decoded together with the one before it, since tokens may join differently at a start.
        """
        if self.emit is None:
            return
        before = self.processor.decode(self.tokens[self.start : self.told])
        both = self.processor.decode(self.tokens[self.start :])
        if len(both) > len(before) and (final or not both.endswith("\ufffd")):
            self.start, self.told = self.told, len(self.tokens)
            self.emit(both[len(before) :])


def chat(
    model: str | Path,
    question: str,
    *,
    images: Sequence[str | Path] = (),
    videos: Sequence[str | Path] = (),
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    dialect: str | None = None,
    out=None,
) -> Answer:
    """One answer about images and videos, written to `out` as it comes: the work of `qwenvl-jax chat`.

    Args:
      model: a folder or hub id.
      question: the text; images and videos stand before it in the order given, images first.
      images, videos: files.
      max_new_tokens, temperature, top_p, top_k, seed: see `generate`.
      dtype: "bfloat16", "float16" or "float32".
      dialect: "official" or "transformers"; None for the model's own.
      out: a text stream, standard output by default.

    Raises:
      QwenVLError: anything wrong with the model, a file or an argument.
    """
    out = sys.stdout if out is None else out
    processor = Processor.from_pretrained(model, dialect=dialect)
    parts = [{"type": "image", "image": str(file)} for file in images]
    parts += [{"type": "video", "video": str(file)} for file in videos]
    conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    # Media are looked at before the weights are: a wrong file name should not cost the time to load a model.
    processor.measure(conversation)
    network = QwenVL.from_pretrained(model, dtype=dtype)

    def write(_row: int, text: str) -> None:
        out.write(text)
        out.flush()

    (answer,) = generate(
        network,
        processor,
        [conversation],
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stream=write,
    )
    out.write("\n")
    return answer
