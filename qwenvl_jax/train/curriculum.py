"""A curriculum as one run: stages in order, their data measured and planned before the first step.

Steps count through the whole run; a stage covers those after its `begin` up to its `end`:

    s0 |1 2 3| s1 |4 5 6 7 8| s2 |9 10|        begin 0, 3, 8; end 3, 8, 10
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwenvl_jax.data.buckets import with_buckets
from qwenvl_jax.data.classes import SampleClass
from qwenvl_jax.data.facts import processor_key
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.mixture import Mixture, MixtureReader
from qwenvl_jax.data.packing import AUTO, Plan, fill, misfit
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import StageConfig, TrainConfig
from qwenvl_jax.train.quarantine import FILE

_LOOKED_AT = 20  # steps whose fill is told


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage with its place in the run and its planned data.

    Attributes:
      config: its settings.
      index: number in the curriculum, from 0.
      begin, end: steps of the run done before it, and after it.
      loader: makes the batch of each of its steps.
      digest: sha256, in hex, of the data that its plan follows from.
      samples: how many the data has.
      failures: those of them that are left out of the plan.
    """

    config: StageConfig
    index: int
    begin: int
    end: int
    loader: BatchLoader
    digest: str
    samples: int
    failures: tuple[Failure, ...]

    def samples_of(self, step: int, before: str = "") -> list[str]:
        """Names of the samples in step `step` of the run.

        Args:
          before: state of the plan before that step (`PlannedBatch.state` of the one before), if known. Without, all
            steps are planned from the nearest that is remembered, which takes hours where that is far.
        """
        plan, number = self.loader.plan, step - 1 - self.begin
        state = json.loads(before) if before else {"step": None}
        rows = plan.rows_after(state) if state["step"] == number else plan[number]
        return [plan.facts[entry].name for row in rows for entry in row]

    @property
    def classes(self) -> tuple[SampleClass, ...]:
        """The classes of its samples; number n of `Batch.classes` is entry n - 1."""
        return self.loader.classes

    def batches(self, done: int, plan: str = "", say: Callable[[str], None] = lambda line: None):
        """A new iterator over the batches of the stage that follow step `done` of the run.

        Args:
          say: told when workers are replaced.
          plan: state of the plan after that step, if known (`PlannedBatch.state`), so that no step is planned again.
        """
        data = self.config.data
        if plan and (state := json.loads(plan))["step"] == done - self.begin:
            self.loader.plan.resume(state)
        return batches(
            self.loader,
            self.config.steps,
            first=done - self.begin,
            threads=data.threads,
            workers=data.workers,
            prefetch=data.prefetch,
            worker_timeout=data.worker_timeout,
            say=say,
        )


def prepare_stages(
    config: TrainConfig,
    processor,
    say: Callable[[str], None],
    *,
    vision_rows_multiple: int = 1,
    host: int = 0,
    hosts: int = 1,
) -> tuple[Stage, ...]:
    """Measures and plans the data of every stage, so that a run that cannot go through does not begin.

    Stages that read the same data alike share its facts; stages with the same `cache_bytes` share that room and what is
    in it.
    Samples that are malformed, or can never fit the stage's batches, are left out, as long as they are few.

    Args:
      vision_rows_multiple: what the vision rows of a group are a multiple of in batches, some of them empty. Samples
        are laid into the others: what a batch holds does not depend on the mesh.
      host, hosts: which part of each batch is made here; see `qwenvl_jax.data.pipeline.BatchLoader`.

    Raises:
      DataError: data that is missing, or too many samples that cannot be used; names the stage.
      ConfigError: a stage cannot carry the optimizer of the one before.
    """
    stages: list[Stage] = []
    begin, key = 0, processor_key(processor)
    reader = MixtureReader(processor, key, config.seed)
    kept: dict[int, Kept] = {}
    for index, stage in enumerate(config.stages):
        _check_carry(config, index)
        data = stage.data
        try:
            mixture = reader.read(
                data.parts,
                misfit=functools.partial(misfit, shape=stage.batch),
                max_failed=data.max_failed,
                hms_share=data.hms_share,
                frame_rates=[rate for rate, _ in data.frame_rates],
                budget=data.video_budget,
                max_image_tokens=data.max_image_tokens,
                modality_weights=data.modality_weights,
                measure_at_most=data.measure_at_most,
                remote_media=data.remote_media,
                say=functools.partial(_say_of, stage, say),
            )
            # Two streams of the same data in one run are shuffled apart.
            seed = int(np.random.SeedSequence([config.seed, index]).generate_state(1, np.uint64)[0])
            drawing: dict[str, Any] = {
                "seed": seed,
                "parts": mixture.parts,
                "rate_weights": [weight for _, weight in data.frame_rates] or [1.0],
                "weigh_by": data.weigh_by,
            }
            merge = processor.merge_size**2
            shape = with_buckets(stage.batch, mixture.facts, merge=merge, **drawing)
            plan = Plan(mixture.facts, shape, window=data.window, shuffle=data.shuffle, steps=stage.steps, **drawing)
            room = kept.setdefault(data.cache_bytes, Kept(data.cache_bytes))
            fetching = processor.fetching(data.remote_media)
            samples = SampleCache(mixture.source, fetching, kept=room, folder=data.cache_dir, processor_key=key)
            placed = {"host": host, "hosts": hosts, "vision_multiple": vision_rows_multiple}
            loader = BatchLoader(plan, samples, processor, **placed)
            told = list(_described(stage, mixture, plan, vision_rows_multiple))
        except DataError as error:
            raise DataError(f"stage {stage.name}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
        end = begin + stage.steps
        stages.append(Stage(stage, index, begin, end, loader, mixture.digest, mixture.samples, mixture.failures))
        for line in told:
            say(f"{stage.name}: {line}")
        begin = end
    return tuple(stages)


def _say_of(stage: StageConfig, say: Callable[[str], None], line: str) -> None:
    say(f"{stage.name}: {line}")


def _described(stage: StageConfig, mixture: Mixture, plan: Plan, multiple: int) -> Iterator[str]:
    """What a user should know of the data of a stage, line by line.

    Raises:
      DataError: a mixture that will come to its end before the stage does.
    """
    facts, count = mixture.facts, sum(len(part.entries) for part in mixture.parts)
    tokens = sum(sample.tokens for sample in facts)
    yield f"{count} samples of {tokens / len(facts):.0f} tokens on average, {stage.steps} steps"
    if mixture.lowered:
        yield f"{mixture.lowered} times a sample fits no batch at a frame rate, and has the next lower one in its place"
    if mixture.failures:
        left_out = f"{len(mixture.failures)} of {mixture.samples} samples are left out"
        yield f"{left_out}, see {FILE}; the first: {mixture.failures[0].reason}"
    if stage.batch.vision == AUTO:
        empty = any(rows % multiple for rows, _ in plan.shape.buckets)
        rounded = f", and empty rows up to a multiple of {multiple} for this mesh" if empty else ""
        yield f"vision rows chosen for the data: batch.vision={plan.shape.vision}{rounded}"
    of_tokens, of_patches = fill(plan, range(min(stage.steps, _LOOKED_AT)))
    slots = plan.shape.rows * plan.shape.length
    means = [np.mean([facts[entry].tokens for entry in part.entries.flat]) for part in mixture.parts]
    enough = sum(part.most * mean for part, mean in zip(mixture.parts, means, strict=True)) / (slots * of_tokens)
    if enough < stage.steps:
        raise DataError(
            f"the mixture has samples for about {enough:.0f} of {stage.steps} steps, since every part has max_epochs; "
            "take fewer steps, or raise it."
        )
    filled = f"{of_tokens:.0%} of the token slots"
    if plan.shape.vision:
        filled += f" and {of_patches:.0%} of the patch slots"
    yield f"the first {min(stage.steps, _LOOKED_AT)} steps fill {filled}"


def _check_carry(config: TrainConfig, index: int) -> None:
    stage = config.stages[index]
    if not stage.carry_optimizer:
        return
    before = config.stages[index - 1] if index else None
    if before is None or (before.optimizer.name, before.trainable) != (stage.optimizer.name, stage.trainable):
        raise ConfigError(
            f"stage {stage.name}: carry_optimizer needs a stage before it with the same optimizer.name and trainable; "
            "set it to False, or make them equal."
        )
