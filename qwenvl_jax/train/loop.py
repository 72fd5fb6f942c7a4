"""A training run from start to end: data, weights, stages, checkpoints, and the trained model.

Killed at any moment and started again, a run goes on from its latest checkpoint with the losses and batches that it
would have had: weights, optimizer, random key and the place in the data are saved together, batches are planned, and
`metrics.jsonl` is cut back to the checkpoint.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint import source
from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.failure import Failure, check_share
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.flops import peak_flops, step_flops
from qwenvl_jax.models.pretrained import Reader
from qwenvl_jax.parallel.host_memory import keep_freed_memory
from qwenvl_jax.parallel.placement import Execution, row_share, shard_batch
from qwenvl_jax.train import program, run_folder
from qwenvl_jax.train.adapters import make_parts
from qwenvl_jax.train.config import TrainConfig, changes_nothing, execution_settings, fingerprint
from qwenvl_jax.train.config_file import prepared_config
from qwenvl_jax.train.curriculum import Stage, prepare_stages
from qwenvl_jax.train.devices import attention_notes, mesh_of
from qwenvl_jax.train.exchange import Exchange
from qwenvl_jax.train.export import keep_facts
from qwenvl_jax.train.metrics import MetricsLog, learning_rates
from qwenvl_jax.train.optimizer import optimizer_notes
from qwenvl_jax.train.processes import Processes
from qwenvl_jax.train.profile import Profiler
from qwenvl_jax.train.progress import Progress
from qwenvl_jax.train.quarantine import FILE, Quarantine
from qwenvl_jax.train.report import write_report
from qwenvl_jax.train.state import Params, TrainState, Weights
from qwenvl_jax.train.stopping import Stop, stop_signals
from qwenvl_jax.train.timings import LastStep, TimingLog, first_start
from qwenvl_jax.train.tracking import Trackers, check_trackers
from qwenvl_jax.train.validation import Validation, prepare_validation

_WORTH_TELLING = 0.1  # share of a stage's time spent waiting for batches


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      out: its folder.
      step, steps: steps done, and steps of the whole run.
      model: folder of the trained model, or None if the run was stopped before its end.
    """

    out: Path
    step: int
    steps: int
    model: Path | None


def train(
    config: TrainConfig,
    out,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    profile: str | None = None,
) -> RunResult:
    """Runs a curriculum, or continues it.

    Args:
      config: the run.
      out: its folder; a run that began there is continued.
      on_step: called with each line of the metrics once it is written.
      profile: steps to trace; see `qwenvl_jax.train.profile`.

    Raises:
      QwenVLError: settings, data or checkpoints that cannot be used.
    """
    processes = Processes()
    with (
        processes.sharing_fate(),
        run_folder.opened(out, processes) as folder,
        (folder.local / "train.log").open("a") as log,
        processes.screen() as screen,
    ):
        progress = Progress(config.steps, 0, log, screen)
        run = _Run(config, folder, progress, on_step, processes, profile)
        # An error ends all processes before the store waits for those that are gone.
        keeping: dict[str, Any] = {"keep": config.keep_checkpoints, "keep_every": config.keep_every}
        keeping["ignored"] = changes_nothing
        with (
            progress,
            CheckpointStore(folder.checkpoints, fingerprint=run.fingerprint, **keeping) as store,
            processes.sharing_fate(),
        ):
            return run.go(store)


def train_command(
    config_path: str,
    overrides: Sequence[str] = (),
    model: str | None = None,
    out: str | None = None,
    profile: str | None = None,
) -> RunResult:
    """Trains as a config file says: the `train` command.

    Args:
      config_path, overrides, model: see `qwenvl_jax.train.config_file.prepared_config`.
      out: the run's folder; `runs/<folder of the config>/<its name>` without it.
      profile: see `train`.

    Raises:
      QwenVLError: what is wrong with the config file, a setting, the data or the run's folder.
    """
    path = Path(config_path).absolute()
    # A mistake in the files of one process ends the others, which wait for it.
    with Processes.joined().sharing_fate():
        config = prepared_config(config_path, overrides, model)
        return train(config, out or Path("runs") / path.parent.name / path.stem, profile=profile)


class _Run:
    """The parts of a run that stay the same from its first step to its last."""

    def __init__(
        self,
        config: TrainConfig,
        folder: run_folder.RunFolder,
        progress: Progress,
        on_step,
        processes: Processes,
        profile: str | None,
    ):
        self.config, self.progress, self.on_step = config, progress, on_step
        self.folder, self.out, self.processes = folder, folder.local, processes
        self.say = progress.say
        keep_freed_memory()
        check_trackers(config.track)
        self.profiler = Profiler(profile, self.out / "profile", self.say, folder.out / "profile")
        self.mesh, self.rules = mesh_of(config)
        for note in (*attention_notes(config, self.mesh, self.rules), *optimizer_notes(config)):
            self.say(note)
        origin = config.processor or config.init or config.model
        if isinstance(origin, QwenVLConfig):
            raise ConfigError("processor is empty; give the folder of a tokenizer and preprocessor settings.")
        self.processor = Processor.from_pretrained(origin)
        self.say(f"tokenizer and preprocessor settings are those of {origin}")
        shape = config.model if isinstance(config.model, QwenVLConfig) else _shape_of(config.model)
        _check_processor(shape, self.processor)
        self.parts = make_parts(config, shape, self.mesh, self.rules)
        for stage in config.stages:  # what they say of weights has to fit this model
            program.optimizer_of(self.parts, stage)
        shaped = dataclasses.replace(config, model=shape, processor="")
        settings, self.execution = fingerprint(shaped), execution_settings(shaped)
        run_folder.check(folder, settings)
        if not (folder.local / "config.json").exists():
            self.parts.check_start()
            if self._source is not None:
                folders.resolve(self._source, weights=False)  # told before any data is read
        multiple = Execution(self.mesh, self.rules).split("vision_rows")
        host, hosts = row_share(self.mesh, self.rules)
        self.exchange = Exchange(processes, host, self.say)
        placed = {"host": host, "hosts": hosts}
        self.stages = prepare_stages(config, self.processor, self.say, vision_rows_multiple=multiple, **placed)
        self.held_out = prepare_validation(config, self.stages, self.processor, self.say)
        self.fingerprint = settings | {f"stages.{stage.index}.data.digest": stage.digest for stage in self.stages}
        run_folder.check(folder, self.fingerprint)
        judged = {
            f"stages.{stage.index}.validation": str(
                [stage.config.validation, *((one.digest, one.batches) for one in its)]
            )
            for stage, its in zip(self.stages, self.held_out, strict=True)
        }
        processes.check_same(self.fingerprint | self.execution | judged | {"mesh": repr(config.mesh)})

    def go(self, store: CheckpointStore) -> RunResult:
        """Restores or begins, goes through the stages that are left, and writes the model."""
        place = store.progress()
        # Not before: a folder with a checkpoint of another run stays as it is.
        keep_facts(self.out, self.parts.config, self.processor, self.config.param_dtype)
        self.folder.begin(self.fingerprint)
        done = 0
        if place:
            done = place["step"]
            params, state = self._restore(store, place)
            self.progress.resume(done)
            self.say(f"continuing after step {done} of {self.config.steps}")
            self._tell_mesh(place.get("mesh"))
            self._tell_execution(place.get("execution", {}))
        else:
            params, state = self.parts.begun(self._initial()), None
        metrics = MetricsLog(self.out / "metrics.jsonl", done)
        planned = [(stage.config.name, failure) for stage in self.stages for failure in stage.failures]
        self.quarantine = Quarantine(self.out, planned, done)
        self._before: dict[int, str] = {}
        devices = list(self.mesh.devices.flat)
        self.timings = TimingLog(self.out / "timings.jsonl", done, started=first_start(self.out), devices=devices)
        self.profiler.expect(done, self.config.steps)
        # One process tells of all.
        track = self.config.track if self.processes.index == 0 else ()
        self.trackers = Trackers(track, self.out, done, self.fingerprint, self.folder.name)
        if unknown := {device.device_kind for device in devices if peak_flops(device) is None}:
            self.say(f"no MFU is told: the peak FLOPs of {', '.join(sorted(unknown))} are not known")
        self.validation = Validation(
            self.out / "validation.jsonl",
            done,
            held_out=self.held_out,
            parts=self.parts,
            say=self.say,
            tell=self.exchange.say,
            gather=self.processes.gather,
        )
        self.last_step = LastStep()
        logs = (metrics, self.timings, self.last_step, self.trackers, self.validation, self.profiler)
        with contextlib.ExitStack() as opened, stop_signals(self.processes) as stop:
            for log in logs:
                opened.enter_context(contextlib.closing(log))
            if place:  # at a step from before the run was stopped
                assert state is not None
                self._validate(self.stages[place["stage"]], state, _others(params, state), done, metrics, stop)
            for stage in self.stages:
                if done >= stage.end or stop.here():
                    continue
                if done == stage.begin:
                    state = self._fresh_state(stage, params, state)
                assert state is not None  # restored, or begun with the stage
                frozen = _others(params, state)
                # The step takes the arrays that learn: nothing else may hold them.
                del params
                plan = place.get("plan", "") if place and place["stage"] == stage.index else ""
                # Closed however the stage ends, so that no worker stays.
                mine = stage.batches(done, plan, functools.partial(self._say_of, stage))
                whole = self.exchange.batches(stage.config.name, done, mine, self.last_step.done_at)
                with contextlib.closing(whole) as batches:
                    state, done = self._run_stage(stage, batches, state, frozen, done, store, metrics, stop)
                params = frozen | state.params
            # A second signal is the same wish until what the first one asked for is on disk.
            store.wait()
        if done < self.config.steps or self.validation.due(self.stages[-1], done):
            self.say(f"stopped after step {done} of {self.config.steps}; the same command continues")
            return RunResult(self.folder.out, done, self.config.steps, None)
        del state  # the optimizer's is not needed any more
        return RunResult(self.folder.out, done, self.config.steps, self._export(params))

    def _run_stage(self, stage: Stage, batches, state, frozen, done: int, store, metrics, stop):
        """Takes the steps of a stage that are left, until its end or a stop; returns (state, steps done)."""

        def save():
            # The lines of the steps that the checkpoint holds are on disk before it is.
            self._written(metrics.flush())
            metrics.sync()
            # The place in the data: how many batches of which stage were taken, and how the plan goes on.
            place = {"stage": stage.index, "batches": done - stage.begin, "plan": plan, "mesh": self._mesh_facts()}
            place |= {"execution": self.execution, "source": _whole_path(self._source)}
            self.folder.publish(self.say)
            stored = self.parts.stored(frozen)
            store.save(done, {"state": state, "frozen": stored}, place | self.parts.origin(frozen))
            self.timings.start()

        compiled, plan, rates = None, "", learning_rates(stage.config)
        while done < stage.end and not stop.here():
            planned = next(batches)
            self.timings.waited(*self.exchange.waits)
            self.progress.waited(*self.exchange.waits)
            self._leave_out(stage, done + 1, planned.failed)
            batch = shard_batch(planned.batch, self.mesh, self.rules)
            if compiled is None:
                compiled = self._compile(stage, state, frozen, batch)
            with self.profiler.step(done + 1):
                state, output = compiled(state, frozen, batch)
            self.last_step.begin(output.loss)
            # How the plan went on before the steps whose lines may not be written yet: this and the one before it.
            self._before = {done + 1: plan} | {step: state for step, state in self._before.items() if step == done}
            done, plan = done + 1, planned.state
            self.timings.paused(self.profiler.done(done, output))
            line = {"step": done, "tokens": planned.tokens, "batch": planned.hash, "stage": stage.config.name}
            line["learning_rate"] = float(rates[done - stage.begin - 1])
            self.timings.begin(done, planned.work, step_flops(self.parts.config, planned.work, state.params).total)
            self._written(metrics.push(line, output, stage.classes))
            self._validate(stage, state, frozen, done, metrics, stop)
            if done == stage.end or done % self.config.checkpoint_every == 0:
                save()
        if done < stage.end:
            save()
        self.exchange.pace.end(done)
        self._tell_waits(stage)
        return state, done

    def _validate(self, stage: Stage, state, frozen: Params, done: int, metrics: MetricsLog, stop: Stop) -> None:
        """Judges the model where it is due, before a checkpoint says that the step is done; not if the run stops."""
        if self.validation.due(stage, done):
            self._written(metrics.flush())
            # In every process: programs that exchange something and do not wait for each other may meet in any order.
            jax.block_until_ready(state)
            began = time.monotonic()
            if line := self.validation.judge(stage, done, frozen | state.params, stop.here):
                self.trackers.write("validation", line)
                (self.out / "report.html").unlink(missing_ok=True)  # of a run that was done; made anew with this line
            self.progress.paused(time.monotonic() - began)
            self.timings.start()

    def _say_of(self, stage: Stage, line: str) -> None:
        """Says a line of a stage, whichever process finds it out."""
        self.exchange.say(f"{stage.config.name}: {line}")

    def _mesh_facts(self) -> dict[str, int]:
        return {**self.mesh.shape, "processes": self.processes.count}

    def _tell_mesh(self, before: dict[str, int] | None) -> None:
        """A run may go on elsewhere: it is the same run, but for the order in which devices add up."""
        if before is not None and before != self._mesh_facts():
            self.say(
                f"the checkpoint was written on the mesh {before}, this one is {self._mesh_facts()}: weights, "
                "optimizer and batches are the same, losses may differ in their last digits"
            )

    def _tell_execution(self, before: dict[str, str]) -> None:
        """A run may go on with other settings of how it is carried out: it is the same run, but for rounding."""
        now = self.execution
        changed = [f"{name}={now[name]} (was {was})" for name, was in before.items() if now.get(name, was) != was]
        if changed:
            self.say(f"goes on with {', '.join(changed)}: the same but for rounding, losses may differ in last digits")

    def _tell_waits(self, stage: Stage) -> None:
        """Says how much of a stage's time went into waiting for batches, if that is worth a change."""
        own, others = self.progress.wait_shares
        if own > _WORTH_TELLING:
            data = stage.config.data
            self.say(
                f"{stage.config.name}: {own:.0%} of the time was spent waiting for batches (see "
                f"{self.timings.path.name}); more data.workers (now {data.workers}) or "
                f"data.threads (now {data.threads}) shorten it",
            )
        if others > _WORTH_TELLING:
            self.say(
                f"{stage.config.name}: {others:.0%} of the time was spent waiting for other processes (see "
                f"{self.timings.path.name}); this log names those that are behind"
            )

    def _leave_out(self, stage: Stage, step: int, failures: Sequence[Failure]) -> None:
        """Tells of samples that a step could not use, and stops when a stage has too many.

        Raises:
          DataError: more than its `data.max_failed`.
        """
        name = stage.config.name
        for failure in self.quarantine.add(name, step, failures):
            self.say(f"step {step}: left out, and written to {self.folder.out / FILE}: {failure.reason}")
        try:
            check_share(self.quarantine.of(name) if failures else (), stage.samples, stage.config.data.max_failed)
        except DataError as error:
            raise DataError(f"stage {name}, step {step}: {error}") from error

    def _written(self, line: dict[str, Any] | None) -> None:
        if line is None:
            return
        self._tell_skipped(line)
        timing_line, timing = self.timings.finish(line["step"])
        self.progress.update(line, timing)
        self.trackers.write("metrics", line | timing_line)
        if self.on_step is not None:
            self.on_step(line)

    def _tell_skipped(self, line: dict[str, Any]) -> None:
        """Tells of a step that was left out, and ends the run when a stage has too many.

        Raises:
          DataError: more than its `guard.abort_after`.
        """
        if not line.get("skipped"):
            return
        stage = next(stage for stage in self.stages if stage.config.name == line["stage"])
        samples = ", ".join(stage.samples_of(line["step"], self._before.get(line["step"], "")))
        figures = f"loss {line['loss']}, gradient norm {line['grad_norm']}"
        self.say(f"step {line['step']}: left out, weights stay as they were: {figures}; its samples: {samples}")
        bound = stage.config.guard.abort_after
        if line["skipped"] > bound:
            raise DataError(
                f"stage {line['stage']}, step {line['step']}: {line['skipped']} steps were left out, more than "
                f"guard.abort_after={bound} ({figures}); look at the samples named in train.log. Raise "
                "guard.abort_after to go on in this folder; with other data, another learning rate or other bounds the "
                "run begins anew, in another output folder."
            )

    def _compile(self, stage: Stage, state, frozen, batch):
        """The step of a stage, compiled ahead for these shapes: called with others it raises, it never recompiles."""
        began = time.monotonic()
        traced = program.trace_step(self.parts, stage.config, state, frozen, batch, classes=len(stage.classes))
        compiled = traced.lower().compile()
        learning = sum(weight.size for weight in state.params.values())
        self.say(
            f"{stage.config.name}: step compiled in {time.monotonic() - began:.1f} s; {learning:,} of "
            f"{learning + sum(weight.size for weight in frozen.values()):,} weights learn"
        )
        self.progress.start_clock()
        self.timings.start()
        return compiled

    def _fresh_state(self, stage: Stage, params: Params, before: TrainState | None) -> TrainState:
        """The state at the first step of a stage: the random key goes on, the optimizer only if the stage says so."""
        learning = {name: params[name] for name in self.parts.select(stage.config.trainable)}

        def begin(learning):
            # The weights themselves are not among the results, which would be copies.
            begun = program.begun_state(self.parts, stage.config, self.config.seed, learning)
            return dataclasses.replace(begun, params={})

        shardings = program.state_shardings(self.parts, jax.eval_shape(begin, learning))
        state = jax.jit(begin, out_shardings=shardings)(learning)
        if before is not None:
            opt_state = before.opt_state if stage.config.carry_optimizer else state.opt_state
            state = dataclasses.replace(state, opt_state=opt_state, rng=before.rng)
        return dataclasses.replace(state, params=learning)

    def _initial(self) -> Weights:
        """The weights that the run begins with."""
        config, source = self.config, self._source
        if source is None:
            self.say(f"no initial weights given: starting from random ones (seed {config.seed})")
            return self.parts.drawn(config.seed)
        self.say(f"starting from the weights of {source}")
        return Reader(source, dtype=config.param_dtype, mesh=self.mesh, rules=self.rules)

    @property
    def _source(self) -> str | None:
        """Name or path of the first weights."""
        return self.config.init or (self.config.model if isinstance(self.config.model, str) else None)

    def _restore(self, store: CheckpointStore, place: dict[str, Any]) -> tuple[Params, TrainState]:
        stage = self.stages[place["stage"]]
        state, frozen = program.abstract_state(self.parts, stage.config, self.config.seed)
        stored = {"state": state, "frozen": self.parts.stored(frozen)}
        saved = store.restore(stored)
        frozen = self.parts.made_again(self._initial, place) | saved["frozen"]
        return frozen | saved["state"].params, saved["state"]

    def _export(self, params: Params) -> Path:
        target = self.folder.out / "model"
        # What process 0 sees is what holds: it is the one that writes.
        if self.processes.gather("model", "written" if (target / "config.json").exists() else "")[0] != "written":
            self.parts.save_adapter(params, self.folder, self._source)
            with self.folder.new_model() as folder:
                self.parts.save(params, folder)
                if self.processes.index == 0:
                    self.processor.save_pretrained(folder)
            self.processes.gather("exported", "")
        if self.processes.index == 0 and not (self.out / "report.html").exists():
            write_report(self.out, self.folder.name)
            self.folder.publish()
        self.say(
            f"done: {self.config.steps} steps; the model is in {target}, the report is {self.folder.out}/report.html"
        )
        return target


def _whole_path(source: str | None) -> str | None:
    """A path of this machine such that it holds from other folders too; names of a hub as they are."""
    return os.path.abspath(source) if source and os.path.exists(source) else source


def _others(params: Params, state: TrainState) -> Params:
    """The weights that do not learn."""
    return {name: value for name, value in params.items() if name not in state.params}


def _shape_of(name: str) -> QwenVLConfig:
    return source.read_config(folders.resolve(name, weights=False))[0]


def _check_processor(shape: QwenVLConfig, processor: Processor) -> None:
    """Refuses a processor that is not the model's.

    It is that of another generation, cuts patches of another size, or its tokenizer's marks have other ids, or ids that
    the model has no row for.
    """
    kinds = processor.generation.model_types
    if shape.model_type not in kinds:
        raise ConfigError(
            f"the model is a {shape.model_type}, but the processor is that of {' and '.join(kinds)}; give the model's "
            "own, as --processor NAME-OR-FOLDER."
        )
    vision = shape.vision
    for what, given, read in (
        ("values in a patch", processor.patch_dim, vision.patch_dim),
        ("patches to the side of a merged token", processor.merge_size, vision.spatial_merge_size),
        ("merged tokens to the side of a window", processor.window, vision.window_cells),
    ):
        if given != read:
            raise ConfigError(
                f"the processor has {given} {what}, the model {read}; give the model's own, as --processor "
                "NAME-OR-FOLDER."
            )
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if getattr(shape, name) != getattr(processor, name):
            raise ConfigError(
                f"model.{name}={getattr(shape, name)}, but the processor's tokenizer has {getattr(processor, name)}; "
                "use the tokenizer of the model, or its ids in the model's config."
            )
    entries = processor.tokenizer.get_vocab_size()
    if entries > shape.text.vocab_size:
        raise ConfigError(
            f"model.text.vocab_size={shape.text.vocab_size} is smaller than the tokenizer's {entries} entries; "
            "raise it."
        )
