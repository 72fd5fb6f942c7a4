"""Validation: how a model does, at a set interval, on data that it does not learn from.

    {"step": 500, "stage": "s1", "losses": {"captions": 1.31}, "answers": [{"data": "captions", "id": "cap-7",
     "question": "what is this?", "answer": "a red square", "truth": "a red circle"}]}

Each data set is judged by itself: its loss, normalised as the stage's, over the same batches each time, and what the
model answers to its first samples. Nothing of the training is touched: neither its stream of batches nor its random
numbers; a run with validation has the losses and weights of one without. `validation.jsonl` has no step twice, however
often the run was stopped.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.classes import ONLY
from qwenvl_jax.data.facts import processor_key
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.mixture import MixturePart, MixtureReader
from qwenvl_jax.data.packing import Plan, SampleFacts, misfit
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import Record
from qwenvl_jax.errors import ConfigError, DataError, MediaError, QwenVLError, SourceError
from qwenvl_jax.generate import answers, prompt_batch
from qwenvl_jax.parallel.placement import shard_batch
from qwenvl_jax.train.config import StageConfig, TrainConfig
from qwenvl_jax.train.curriculum import Stage
from qwenvl_jax.train.metrics import StepFile, finite, read_metrics
from qwenvl_jax.train.state import ModelParts, Params
from qwenvl_jax.train.step import make_execution, make_loss, microbatches, normalised_weights

# Decoded media that are kept from one time to the next.
_CACHE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A data set that a stage is judged by.

    Attributes:
      name: of the data set.
      loader: makes its batches, in the shape of the stage's.
      batches: how many it has, at most as many as asked for.
      asked: records that the model answers.
      processor: that reads them.
      digest: sha256, in hex, of the data that its plan follows from.
    """

    name: str
    loader: BatchLoader
    batches: int
    asked: tuple[Record, ...]
    processor: Processor
    digest: str


def prepare_validation(
    config: TrainConfig, stages: Sequence[Stage], processor: Processor, say: Callable[[str], None]
) -> tuple[tuple[HeldOut, ...], ...]:
    """Measures and plans what each stage is judged by.

    Raises:
      DataError: data that is missing, or of which too many samples cannot be used; names the stage.
    """
    key = processor_key(processor)
    reader, kept = MixtureReader(processor, key, config.seed), Kept(_CACHE_BYTES)

    def held_out(stage: Stage, part: MixturePart) -> HeldOut:
        data, shape = stage.config.data, stage.loader.plan.shape

        def misfits(facts: SampleFacts) -> str | None:
            return misfit(facts, shape)

        mixture = reader.read(
            [data.in_root(part)],
            misfit=misfits,
            max_failed=data.max_failed,
            hms_share=data.hms_share,
            frame_rates=[rate for rate, _ in data.frame_rates],
            budget=data.video_budget,
            max_image_tokens=data.max_image_tokens,
            measure_at_most=data.measure_at_most,
            remote_media=data.remote_media,
            say=lambda line: say(f"{stage.config.name}: validation: {line}"),
        )
        once = dataclasses.replace(mixture.parts[0], weight=1.0, final_weight=None, max_epochs=1.0)
        weights = [weight for _, weight in data.frame_rates] or [1.0]
        plan = Plan(mixture.facts, shape, seed=config.seed, parts=[once], rate_weights=weights)
        fetching = processor.fetching(data.remote_media)
        samples = SampleCache(mixture.source, fetching, kept=kept, folder=data.cache_dir, processor_key=key)
        wanted = stage.config.validation
        asked = tuple(mixture.source[int(entry)] for entry in once.entries[: wanted.answers, 0])
        loader, count = stage.loader.over(plan, samples), _planned(plan, wanted.batches)
        return HeldOut(part.name or ONLY, loader, count, asked, fetching, mixture.digest)

    found: list[tuple[HeldOut, ...]] = []
    for stage in stages:
        try:
            found.append(tuple(held_out(stage, part) for part in stage.config.validation.data))
        except (DataError, ConfigError) as error:
            raise type(error)(f"stage {stage.config.name}, validation: {error}") from error
    return tuple(found)


def _planned(plan: Plan, most: int) -> int:
    """How many steps a plan has before its data come to their end, `most` at most."""
    for step in range(most):
        try:
            plan[step]
        except DataError:
            return step
    return most


class Validation:
    """Judges the model of a run, and writes what it finds.

    Args:
      path: of `validation.jsonl`.
      done: steps that the restored checkpoint holds; later lines, and a line half written, are removed.
      held_out: of each stage, from `prepare_validation`.
      parts: of the run.
      say: told of the losses.
      tell: told of samples that this process could not read; `say` by default.
      gather: the texts of all processes under a name, see `qwenvl_jax.train.processes.Processes.gather`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        done: int,
        *,
        held_out: Sequence[Sequence[HeldOut]],
        parts: ModelParts,
        say: Callable[[str], None],
        tell: Callable[[str], None] | None = None,
        gather: Callable[[str, str], list[str]] = lambda name, text: [text],
    ):
        self.path = Path(path)
        self._file = StepFile(path, done)
        self._known = {line["step"] for line in read_metrics(self.path)}
        self._held_out, self._parts, self._say = held_out, parts, say
        self._tell, self._gather = tell or say, gather
        self._compiled: tuple[int, Any] | None = None

    def due(self, stage: Stage, done: int) -> bool:
        """Whether the model is to be judged after `done` steps of the run: at each interval and at the stage's end."""
        if not self._held_out[stage.index] or done <= stage.begin or done in self._known:
            return False
        return done == stage.end or (done - stage.begin) % stage.config.validation.every == 0

    def judge(
        self, stage: Stage, done: int, params: Params, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Judges the model with these weights, all of them; writes and returns the line.

        Args:
          stop: asked before each batch and each token; once it says True nothing is written and None returned, so that
            the step is still due when the run goes on. See `qwenvl_jax.train.stopping.Stop.here`.
        """
        line: dict[str, Any] = {"step": done, "stage": stage.config.name, "losses": {}}
        held_out = self._held_out[stage.index]
        try:
            for one in held_out:
                line["losses"][one.name] = self._loss(stage, one, params, stop)
            line["answers"] = [
                answer for one in held_out for answer in self._answers(one, stage.config, done, params, stop)
            ]
        except _Stopped:
            self._say(f"{stage.config.name} step {done}: asked to stop; validation is left to the run that goes on")
            return None
        self._file.write(line)
        self._file.sync()
        self._known.add(done)
        told = "  ".join(f"{name} {'none' if loss is None else f'{loss:.4f}'}" for name, loss in line["losses"].items())
        self._say(f"{stage.config.name} step {done}: validation loss  {told}")
        return line

    def _loss(self, stage: Stage, one: HeldOut, params: Params, stop: Callable[[], bool]) -> float | None:
        """The weighted mean over the learnt tokens of all batches."""
        sums: list[tuple[jax.Array, jax.Array]] = []
        data = stage.config.data
        made = batches(one.loader, one.batches, threads=data.threads, prefetch=data.prefetch)
        with contextlib.closing(made):  # type: ignore[type-var]  # Grain's iterators have it
            for _ in range(one.batches):
                _go_on_unless(stop)
                planned = next(made)
                for failure in planned.failed:
                    self._tell(f"{stage.config.name}: validation of {one.name}: left out: {failure.reason}")
                batch = shard_batch(planned.batch, self._parts.mesh, self._parts.rules)
                if self._compiled is None or self._compiled[0] != stage.index:
                    evaluate = jax.jit(make_evaluation(self._parts, stage.config))
                    self._compiled = stage.index, evaluate.lower(params, batch).compile()
                # A batch is computed while the next are made, and no more wait in line: a stop would wait for them.
                jax.block_until_ready(sums[-1:])
                sums.append(self._compiled[1](params, batch))
        loss, weight = (sum(float(value) for value in values) for values in zip(*sums, strict=True))
        return finite(loss / weight) if weight else None

    def _answers(
        self, one: HeldOut, stage: StageConfig, done: int, params: Params, stop: Callable[[], bool]
    ) -> list[dict[str, str]]:
        """Answers of the model; where one of those asked together cannot be read, none of them is asked."""
        # Those that are asked alike go together, the same ones each time, so that nothing is compiled anew.
        alike: dict[str, list[Record]] = {}
        for record in one.asked:
            if question_and_truth(record) is not None:
                alike.setdefault(repr(sorted(record.options.items())), []).append(record)
        found: list[dict[str, str]] = []
        for number, records in enumerate(alike.values()):
            pairs = [pair for record in records if (pair := question_and_truth(record)) is not None]
            model, batch = self._parts.merge(params), None
            model.execution = dataclasses.replace(model.execution, attention=stage.attention)
            missing = ""
            for record in records:
                _go_on_unless(stop)
                try:
                    if record.fetch is not None:
                        record.fetch()
                except MediaError as error:
                    missing = f"{record.id} is not asked: {error}"
                    self._tell(f"{stage.name}: validation of {one.name}: {missing}")
            if not missing:
                try:
                    batch = prompt_batch(model, one.processor, [asked for asked, _ in pairs], **records[0].options)
                except SourceError:  # no fault of the records
                    raise
                except (QwenVLError, OSError) as error:  # a file that has gone, too
                    missing = f"{', '.join(record.id for record in records)}: not asked: {error}"
                    self._tell(f"{stage.name}: validation of {one.name}: {missing}")
            # What one process cannot read none asks: all have to run the same programs.
            if any(self._gather(f"asked/{done}/{one.name}/{number}", "missing" if missing else "")) or batch is None:
                continue
            said = answers(model, one.processor, batch, stage.validation.max_new_tokens, interrupted=stop)
            _go_on_unless(stop)
            found += [
                {
                    "data": one.name,
                    "id": record.id,
                    "question": _text(messages[-1]),
                    "answer": answer.text,
                    "truth": truth,
                }
                for record, (messages, truth), answer in zip(records, pairs, said, strict=True)
            ]
        return found

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Stopped(Exception):
    """The run is asked to stop."""


def _go_on_unless(stop: Callable[[], bool]) -> None:
    if stop():
        raise _Stopped


def make_evaluation(parts: ModelParts, stage: StageConfig) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Returns `evaluate(params, batch) -> (f32[], f32[])`: the summed loss of a batch and its summed weights.

    It takes a batch in as many microbatches as the stage's step, so that it fits where that does.
    """
    loss, execution = make_loss(parts, stage), make_execution(parts, stage)

    def one(params: Params, batch: Batch):
        weight = jnp.sum(normalised_weights(batch, stage.loss))
        return loss(params, batch) * weight, weight

    def evaluate(params: Params, batch: Batch):
        if stage.microbatches == 1:
            return one(params, batch)

        def add(total, part):
            # The barrier is the step's, see `qwenvl_jax.train.step.make_gradients`.
            return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(one(params, part))), None

        begun = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        return jax.lax.scan(add, begun, microbatches(batch, stage.microbatches, execution))[0]

    return evaluate


def question_and_truth(record: Record) -> tuple[list[dict[str, Any]], str] | None:
    """A record up to its last assistant turn, and the text of that; None where it has none or no turn before it."""
    last = next((n for n in reversed(range(len(record.messages))) if record.messages[n]["role"] == "assistant"), 0)
    return (record.messages[:last], _text(record.messages[last])) if last else None


def _text(message: Mapping[str, Any]) -> str:
    """What a message says in words."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
