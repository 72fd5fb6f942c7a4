"""A curriculum as one run: stages in order, their data measured and planned before the first step.

Steps count through the whole run; a stage covers those after its `begin` up to its `end`:

    s0 |1 2 3| s1 |4 5 6 7 8| s2 |9 10|        begin 0, 3, 8; end 3, 8, 10
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data.built import with_other_facts
from qwenvl_jax.data.facts import facts_digest, measure_each, processor_key
from qwenvl_jax.data.failure import Failure, check_share
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packing import Plan, SampleFacts, misfit
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.data.sources import Reading, Subset, open_source
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import DataConfig, StageConfig, TrainConfig
from qwenvl_jax.train.quarantine import FILE


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

    def batches(self, done: int):
        """A new Grain iterator over the batches of the stage that follow step `done` of the run."""
        data = self.config.data
        return batches(
            self.loader,
            self.config.steps,
            first=done - self.begin,
            threads=data.threads,
            workers=data.workers,
            prefetch=data.prefetch,
        )


def prepare_stages(config: TrainConfig, processor, say: Callable[[str], None]) -> tuple[Stage, ...]:
    """Measures and plans the data of every stage, so that a run that cannot go through does not begin.

    Stages that read the same data alike share its facts; stages with the same `cache_bytes` share that room and what is
    in it.
    Samples that are malformed, or can never fit the stage's batches, are left out, as long as they are few.

    Raises:
      DataError: data that is missing, or too many samples that cannot be used; names the stage.
      ConfigError: a stage cannot carry the optimizer of the one before.
    """
    stages: list[Stage] = []
    begin, key = 0, processor_key(processor)
    seen: dict[Any, tuple] = {}
    kept: dict[int, Kept] = {}
    for index, stage in enumerate(config.stages):
        _check_carry(config, index)
        data = stage.data
        origin = data.source if isinstance(data.source, str | tuple) else id(data.source)
        name = (origin, data.format, data.hms_share, data.remote_media)
        try:
            processor = processor.fetching(data.remote_media)
            if name not in seen:
                say(f"{stage.name}: measuring the data")
                source = open_source(data.source, _reading(data, config.seed, processor))
                for folder in with_other_facts(source, key):
                    say(f"{stage.name}: {folder} was built for another processor, so its samples are measured again")
                entries = measure_each(source, processor, processor_key=key, cache=_beside(data.source))
                seen[name] = source, entries, {}
            source, entries, digests = seen[name]
            failures = tuple(_failures(entries, stage))
            check_share(failures, len(entries), data.max_failed)
            used = [i for i, one in enumerate(entries) if not isinstance(one, Failure) and not misfit(one, stage.batch)]
            facts = tuple(entries[i] for i in used)
            if len(facts) < len(entries):
                source = Subset(source, used)
            if failures not in digests:
                digests[failures] = facts_digest(facts, source)
            # Two streams of the same data in one run are shuffled apart.
            seed = int(np.random.SeedSequence([config.seed, index]).generate_state(1, np.uint64)[0])
            plan = Plan(facts, stage.batch, seed=seed, window=data.window, shuffle=data.shuffle)
            room = kept.setdefault(data.cache_bytes, Kept(data.cache_bytes))
            samples = SampleCache(source, processor, kept=room, folder=data.cache_dir, processor_key=key)
            loader = BatchLoader(plan, samples, processor)
        except DataError as error:
            raise DataError(f"stage {stage.name}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
        end = begin + stage.steps
        stages.append(Stage(stage, index, begin, end, loader, digests[failures], len(entries), failures))
        tokens = sum(sample.tokens for sample in facts)
        say(f"{stage.name}: {len(facts)} samples of {tokens / len(facts):.0f} tokens on average, {stage.steps} steps")
        if failures:
            count = f"{len(failures)} of {len(entries)} samples are left out"
            say(f"{stage.name}: {count}, see {FILE}; the first: {failures[0].reason}")
        begin = end
    return tuple(stages)


def _failures(entries: Iterable[SampleFacts | Failure], stage: StageConfig) -> Iterator[Failure]:
    """The samples that cannot be used in a stage."""
    for one in entries:
        if isinstance(one, Failure):
            yield one
        elif problem := misfit(one, stage.batch):
            yield Failure(one.name, f"{one.name} {problem}".rstrip("."))


def _reading(data: DataConfig, seed: int, processor) -> Reading:
    """How the records of a stage are read: for this model, and alike in every stage of the run."""
    return Reading.of(processor, format=data.format, hms_share=data.hms_share, seed=seed)


def _beside(source) -> Path | None:
    """Where the facts of a data file are kept: beside it; those of several files beside the first."""
    if isinstance(source, tuple | list) and source:
        source = source[0]
    return Path(source) if isinstance(source, str | Path) else None


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
