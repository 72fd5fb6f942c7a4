"""The settings of a training run: a curriculum of stages over one model.

Made in Python files (`configs/`), changed from the command line by dotted names (`qwenvl_jax.train.overrides`). What
changes the numbers of a run is part of its fingerprint, and a run continues only with the same one; `RUNTIME_FIELDS`
are the others.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.facts import MEASURE_AT_MOST
from qwenvl_jax.data.mixture import MixturePart, VideoBudget
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.placement import Backend, Remat

# Settings that say how a run is carried out, not what it computes.
RUNTIME_FIELDS = frozenset(
    {
        "cache_bytes",
        "cache_dir",
        "threads",
        "workers",
        "prefetch",
        "worker_timeout",
        "keep_checkpoints",
        "max_failed",
        "measure_at_most",
        "track",
        "validation",
    }
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples of a stage come from and how they are read.

    Attributes:
      source: path of a JSONL file of records, of a folder that `qwenvl-jax data build` made, or of another one of
        tensorflow-datasets, several paths, or an object with `__len__` and `__getitem__`.
      format: of the records, one of those in docs/formats.md; "auto" tells them apart by their keys.
      mixture: several data sets in place of `source`, each with a weight; see `qwenvl_jax.data.mixture.MixturePart`.
      weigh_by: whether weights are shares of the samples or of the tokens.
      modality_weights: pairs (modality, share), divided among the parts of each modality by their weights; empty leaves
        the weights as they are.
      frame_rates: pairs (frames per second, weight), drawn anew for each sample in each epoch, for videos whose record
        gives neither `fps` nor `num_frames`; empty leaves them at the model's rate.
      video_budget: of videos whose record gives none; see `qwenvl_jax.data.mixture.VideoBudget`.
      remote_media: beginnings of the addresses from which images and videos may be fetched, such as "gs://my-bucket/";
        none are without. They are fetched anew each time they are needed.
      hms_share: from 0 to 1, the share of records that tell times as H:M:S; the others tell seconds.
      shuffle: whether each epoch has an order of its own, drawn from the run's seed.
      window: samples of the stream that a step chooses from when it is packed; 0 takes as many as would fill four
        steps, and at least four for each row.
      cache_bytes: how much memory decoded media may keep; stages with the same figure share it.
      cache_dir: folder where decoded media are kept across runs; None keeps none.
      threads: that make batches; 0 makes them between the steps.
      workers: processes that make batches, each with caches and threads of its own; 0 stays in this one.
      prefetch: batches made ahead.
      worker_timeout: seconds without a batch after which workers count as hung and are replaced.
      max_failed: share of the samples that may fail (a damaged file, say) and be left out, each told and written to the
        run's `quarantine.jsonl`; with more the run stops.
      measure_at_most: samples of a data set that are measured before the first step, where they bring no facts that
        hold; with more the run is refused, for `qwenvl-jax data build` does it once and for all.
    """

    source: Any = ""
    format: str = "auto"
    mixture: tuple[MixturePart, ...] = ()
    weigh_by: Literal["samples", "tokens"] = "samples"
    modality_weights: tuple[tuple[str, float], ...] = ()
    frame_rates: tuple[tuple[float, float], ...] = ()
    video_budget: VideoBudget = dataclasses.field(default_factory=VideoBudget)
    remote_media: tuple[str, ...] = ()
    hms_share: float = 0.0
    shuffle: bool = True
    window: int = 0
    cache_bytes: int = 1 << 30
    cache_dir: str | None = None
    threads: int = 1
    workers: int = 0
    prefetch: int = 2
    worker_timeout: float = 600.0
    max_failed: float = 0.02
    measure_at_most: int = MEASURE_AT_MOST

    def __post_init__(self):
        if not self.worker_timeout > 0:
            raise ConfigError(f"data.worker_timeout={self.worker_timeout} must be more than 0 seconds.")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"data.max_failed={self.max_failed} must be a share, from 0 to 1.")
        if self.measure_at_most < 0:
            raise ConfigError(f"data.measure_at_most={self.measure_at_most} must be at least 0.")
        if self.mixture and (self.source != "" or self.format != "auto"):
            raise ConfigError("data.source and data.format belong to one data set; in a mixture each part has its own.")
        for name in ("modality_weights", "frame_rates"):
            pairs = getattr(self, name)
            if any(len(pair) != 2 or not (math.isfinite(pair[1]) and pair[1] >= 0) for pair in pairs):
                raise ConfigError(f"data.{name}={pairs} must be pairs whose second is a weight, 0 or more.")
            if pairs and not sum(pair[1] for pair in pairs):
                raise ConfigError(f"data.{name}={pairs} must have a weight above 0.")

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture; that of a single data set is the one part."""
        return self.mixture or (MixturePart("", self.source, format=self.format),)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule. Gradients are clipped by their global norm first.

    Attributes:
      name: "adamw", or "muon" for the matrices with AdamW for the rest (embeddings, output projection, norms, biases).
      learning_rate: the peak of the schedule.
      adam_learning_rate: under "muon", the peak for what AdamW updates.
      schedule: after the warm-up, "constant", or "cosine" down to `final_fraction` of the peak.
      warmup_steps: steps of linear growth from 0.
      final_fraction: of the peak, reached at the last step of a cosine.
      b1, b2, eps: of AdamW.
      momentum: of Muon.
      weight_decay: decoupled, on matrices and tables only; multiplied by the learning rate.
      clip_norm: largest global norm of the gradients; 0 does not clip.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    adam_learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What a stage is judged by while it trains; see `qwenvl_jax.train.validation`.

    Videos are read as those of the stage's data are: at its frame rates, within its budget.

    Attributes:
      data: data sets, each judged by itself, with a `name`, `source`, `format` and `max_samples`; none are without.
      every: steps of the stage from one time to the next; it is also judged at its end.
      batches: of each data set at most, the same each time.
      answers: samples of each data set that the model answers, its first ones.
      max_new_tokens: an answer stops here at the latest.
    """

    data: tuple[MixturePart, ...] = ()
    every: int = 1000
    batches: int = 16
    answers: int = 4
    max_new_tokens: int = 64

    def __post_init__(self):
        for field, bound in {"every": 1, "batches": 1, "answers": 0, "max_new_tokens": 1}.items():
            if getattr(self, field) < bound:
                raise ConfigError(f"validation.{field}={getattr(self, field)} must be at least {bound}.")
        names = [part.name for part in self.data]
        if len(set(names)) < len(names) or (len(names) > 1 and not all(names)):
            raise ConfigError(f"the data sets of validation.data must have a name each, no two the same; got {names}.")
        for part in self.data:
            for name in ("weight", "final_weight", "max_epochs", "modality"):
                if getattr(part, name) != getattr(MixturePart, name):
                    raise ConfigError(
                        f"validation.data: {part.name!r} has {name}={getattr(part, name)!r}, but data sets are judged "
                        "one by one, each sample once; leave it out."
                    )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Steps that are left out: weights and optimizer stay as they were, and the log names the samples.

    A step whose loss or gradient is not finite is always left out.

    Attributes:
      max_loss: a loss above this is left out; 0 for no bound.
      max_grad_norm: a gradient of a larger global norm is left out; 0 for no bound.
      spike: a gradient of more than so many times the running mean norm is left out; 0 for no bound.
      spike_after: steps before `spike` counts.
      abort_after: the run ends when a stage has left out more steps than this.
    """

    max_loss: float = 0.0
    max_grad_norm: float = 0.0
    spike: float = 0.0
    spike_after: int = 100
    abort_after: int = 10

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value >= 0 or (field.name == "spike" and 0 < value <= 1):
                raise ConfigError(f"guard.{field.name}={value} must be 0 or more (spike: 0, or more than 1).")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a curriculum.

    Attributes:
      name: for the log; unique in the run.
      steps: optimizer steps.
      data: the samples.
      batch: the shape of every batch.
      optimizer: the update rule and its schedule over this stage's steps.
      carry_optimizer: whether the optimizer's state comes from the stage before; else it is fresh.
      trainable: "all", "mergers", or a regular expression found in the dotted names of the weights that learn.
      loss: normalisation: "token" weighs supervised tokens alike, "sample" samples alike, "sqrt" a sample of N
        supervised tokens by the square root of N (an interpretation of the Qwen3-VL report, section 3).
      loss_chunk: tokens whose logits are held at a time.
      microbatches: parts in which a batch is taken, one after another; memory holds the activations of one.
      router_balance: weight of the load balance of a decoder with experts, beside the loss.
      router_z: weight of its router's z-loss.
      guard: which steps are left out.
      validation: what it is judged by on the way.
      remat, unroll, attention: how the model is run; see `qwenvl_jax.parallel.placement.Execution`.
    """

    name: str
    steps: int
    data: DataConfig = DataConfig()
    batch: BatchShape = dataclasses.field(default_factory=BatchShape)
    optimizer: OptimizerConfig = OptimizerConfig()
    carry_optimizer: bool = False
    trainable: str = "all"
    loss: Literal["token", "sample", "sqrt"] = "sqrt"
    loss_chunk: int = 1024
    microbatches: int = 1
    router_balance: float = 0.0
    router_z: float = 0.0
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    remat: Remat = "none"
    unroll: bool = False
    attention: Backend = "auto"

    def __post_init__(self):
        least = {"steps": 1, "loss_chunk": 1, "microbatches": 1, "router_balance": 0, "router_z": 0}
        for field, bound in least.items():
            if not getattr(self, field) >= bound:
                raise ConfigError(f"stage {self.name}: {field}={getattr(self, field)} must be at least {bound}.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, and what is split over them.

    Attributes:
      data, fsdp, expert, context, tensor: devices along each mesh axis; `fsdp=0` takes all that the others leave, else
        the first ones are used. Rows of a batch are shared by data * fsdp * expert, the tokens of a row by context.
      rules: a table of `qwenvl_jax.parallel.rules`.
      override: rules that differ from the table, such as "embed=fsdp+context", or "kv_heads=" to hold an axis whole.
    """

    data: int = 1
    fsdp: int = 0
    expert: int = 1
    context: int = 1
    tensor: int = 1
    rules: str = "fsdp_tensor"
    override: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run: a model, and the stages that it goes through.

    Attributes:
      model: a shape, or the name or path of a pretrained model, whose weights are then the first.
      stages: in order; each goes on with the weights of the one before.
      processor: folder (or hub id) of tokenizer and preprocessor settings; None takes that of the pretrained model.
      init: folder (or hub id) of the first weights, in place of `model`'s own or of random ones.
      seed: of random weights and shuffles.
      dtype: of activations.
      param_dtype: of the weights and of the optimizer's state.
      checkpoint_every: steps between checkpoints; one is also written at the end of each stage.
      keep_checkpoints: how many of the latest stay.
      mesh: the devices.
      track: where figures are shown besides the run's folder: "tensorboard", "wandb"; see `qwenvl_jax.train.tracking`.
    """

    model: QwenVLConfig | str
    stages: tuple[StageConfig, ...]
    processor: str | None = None
    init: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    mesh: MeshConfig = MeshConfig()
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"stages must be at least one, each with a name of its own; got {names}.")
        for field in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least 1.")
        if self.processor is None and not isinstance(self.model, str) and self.init is None:
            raise ConfigError("processor is not set; give the folder of a tokenizer and preprocessor settings.")

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def flat(config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested dataclasses by its dotted name; entries of tuples of dataclasses by their number."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{name}.")
        elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
            for number, item in enumerate(value):
                yield from flat(item, f"{name}.{number}.")
        else:
            yield name, value


def fingerprint(config: TrainConfig) -> dict[str, str]:
    """The settings that the numbers of a run follow from, by dotted name, as text.

    Data sources are left out: where data lies changes nothing, and what it holds has a digest of its own.
    """
    skipped = RUNTIME_FIELDS | {"source", "checkpoint_every"}
    return {name: repr(value) for name, value in flat(config) if skipped.isdisjoint(name.split("."))}
