"""The settings of a training run: a curriculum of stages over one model.

Made in Python files (`configs/`), changed from the command line by dotted names (`qwenvl_jax.train.overrides`). What
changes the numbers of a run is part of its fingerprint, and a run continues only with the same one; `RUNTIME_FIELDS`
and `EXECUTION_FIELDS` are the others.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_type_hints

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.facts import MEASURE_AT_MOST
from qwenvl_jax.data.mixture import MixturePart, VideoBudget
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.placement import Backend, Remat

# Of frozen kernels under adapters.
Storage = Literal["none", "nf4", "int4", "int8"]

# Settings that say how a run is carried out, not what it computes.
RUNTIME_FIELDS = frozenset(
    {
        "abort_after",
        "cache_bytes",
        "cache_dir",
        "threads",
        "workers",
        "prefetch",
        "worker_timeout",
        "keep_checkpoints",
        "keep_every",
        "max_failed",
        "measure_at_most",
        "track",
        "validation",
    }
)

# Settings of a stage that change nothing beyond rounding: a run may go on with others.
EXECUTION_FIELDS = ("remat", "unroll", "attention", "loss_chunk", "microbatches")

# Parts of the model with learning rates of their own, and the first names of their weights.
PARTS = {"vision": ("vision",), "mergers": ("merger", "deepstack"), "text": ("text",)}


def _check_words(config, prefix: str, *fields: str) -> None:
    """Refuses a setting that is none of the words of its type: Python does not check them in a config file."""
    for field in fields:
        words = get_args(get_type_hints(type(config))[field])
        if getattr(config, field) not in words:
            raise ConfigError(f"{prefix}{field}={getattr(config, field)!r} is not one of {', '.join(words)}.")


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
      max_image_tokens: merged tokens that an image takes at most, before pooling, where its record gives no bounds in
        pixels; None leaves the bounds of the processor.
      root: folder in which relative paths of data sets lie; "" is the working directory. Where data lies changes
        nothing in a run.
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
    max_image_tokens: int | None = None
    root: str = ""
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
        _check_words(self, "data.", "weigh_by")
        if not self.worker_timeout > 0:
            raise ConfigError(f"data.worker_timeout={self.worker_timeout} must be more than 0 seconds.")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"data.max_failed={self.max_failed} must be a share, from 0 to 1.")
        if self.max_image_tokens is not None and self.max_image_tokens < 1:
            raise ConfigError(f"data.max_image_tokens={self.max_image_tokens} must be at least 1, or None.")
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
        """The mixture, its paths in `root`; that of a single data set is the one part."""
        parts = self.mixture or (MixturePart("", self.source, format=self.format),)
        return tuple(map(self.in_root, parts))

    def in_root(self, part: MixturePart) -> MixturePart:
        """A data set whose relative paths are meant to lie in `root`."""
        return dataclasses.replace(part, source=self._placed(part.source))

    def _placed(self, source):
        if isinstance(source, tuple | list) and all(isinstance(path, str | os.PathLike) for path in source):
            return tuple(os.path.join(self.root, path) for path in source)
        is_path = isinstance(source, str | os.PathLike) and os.fspath(source)
        return os.path.join(self.root, source) if is_path and self.root else source


def _bounded(bound: str, holds: Callable[[float], bool], *fields: str) -> dict[str, tuple]:
    return dict.fromkeys(fields, (bound, holds))


_OPTIMIZER_BOUNDS = {
    **_bounded("more than 0", lambda x: 0 < x < math.inf, "learning_rate", "adam_learning_rate", "eps"),
    **_bounded("at least 0", lambda x: 0 <= x < math.inf, "warmup_steps", "weight_decay", "clip_norm"),
    **_bounded("from 0 to 1", lambda x: 0 <= x <= 1, "final_fraction", "decay_fraction"),
    **_bounded("at least 0 and less than 1", lambda x: 0 <= x < 1, "b1", "b2", "momentum"),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule. Gradients are clipped by their global norm first.

    Attributes:
      name: "adamw", or "muon" for the matrices with AdamW for the rest (embeddings, output projection, norms, biases).
      learning_rate: the peak of the schedule.
      adam_learning_rate: under "muon", the peak for what AdamW updates.
      rates: pairs (part, factor): the peaks of a part of the model are that many times those above, as for
        (("vision", 0.3),). Parts are those of `PARTS`; without a pair a part has 1.
      schedule: after the warm-up, "constant"; "cosine" down to `final_fraction` of the peak; or "wsd" (warm-up, stable,
        decay): the peak, then down to `final_fraction` of it over the last `decay_fraction` of the stage.
      warmup_steps: steps of linear growth from 0; a stage of no more steps never comes to its peak, and says so.
      final_fraction: of the peak, reached at the end of the last step of a cosine or of a decay.
      decay_fraction: share of the stage's steps, of its last ones, that the decay of "wsd" takes.
      decay_shape: of that decay, over its share t of steps done: "linear", 1 - t, or "sqrt", 1 - sqrt(t).
      b1, b2, eps: of AdamW.
      momentum: of Muon.
      weight_decay: decoupled, on matrices and tables only; multiplied by the learning rate.
      clip_norm: largest global norm of the gradients; 0 does not clip.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    adam_learning_rate: float = 1e-4
    rates: tuple[tuple[str, float], ...] = ()
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    decay_fraction: float = 0.1
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        _check_words(self, "optimizer.", "name", "schedule", "decay_shape")
        for field, (bound, holds) in _OPTIMIZER_BOUNDS.items():
            if not holds(getattr(self, field)):
                raise ConfigError(f"optimizer.{field}={getattr(self, field)} must be {bound}.")
        self._check_rates()

    def _check_rates(self) -> None:
        if any(isinstance(pair, str) or len(pair) != 2 or pair[0] not in PARTS for pair in self.rates):
            raise ConfigError(
                f"optimizer.rates={self.rates} must be pairs (part, factor), parts being {', '.join(PARTS)}."
            )
        if len(dict(self.rates)) < len(self.rates):
            raise ConfigError(f"optimizer.rates={self.rates} must name each part once.")
        if any(not 0 < factor < math.inf for _, factor in self.rates):
            raise ConfigError(
                f"optimizer.rates={self.rates} must have factors of more than 0; a part that is not to learn is left "
                "out of the stage's `trainable`."
            )


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
      abort_after: the run ends when a stage has left out more steps than this; with a larger one it goes on.
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
      router_balance: weight of the load balance of a decoder with experts, beside the loss; of each microbatch.
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
        _check_words(self, f"stage {self.name}: ", "loss")
        least = {"steps": 1, "loss_chunk": 1, "microbatches": 1, "router_balance": 0, "router_z": 0}
        for field, bound in least.items():
            if not getattr(self, field) >= bound:
                raise ConfigError(f"stage {self.name}: {field}={getattr(self, field)} must be at least {bound}.")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA), which learn in place of the model's weights; see `qwenvl_jax.train.adapters`.

    Names in parentheses are PEFT's. There is no dropout: a run's step is a function of weights and batch.

    Attributes:
      rank: width of the adapters (`r`); 0 has none, and the weights themselves learn.
      alpha: the update of a kernel is `alpha / rank` times the product of its adapter's halves (`lora_alpha`).
      targets: regular expression found in the dotted names of the projections that get adapters (`target_modules`);
        those of the decoder's attention and feed-forward layers by default. Experts get none.
      modules_to_save: regular expression found in the names of modules that learn whole beside the adapters and are
        saved with them, such as "^(merger|deepstack)"; none if it is empty.
      quantize: how the frozen kernels under adapters are stored: as they are ("none"), in four bits whose values are
        those of a normal distribution ("nf4", QLoRA), or as whole numbers ("int4", "int8").
      tile_size: inputs of a quantized kernel that share a scale.
      start: folder or hub id of an adapter in PEFT's format to begin with; a new one without it.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = r"^text\.layers\.(attn\.(q|k|v|o)|mlp\.(gate|up|down))$"
    modules_to_save: str = ""
    quantize: Storage = "none"
    tile_size: int = 64
    start: str | None = None

    def __post_init__(self):
        if self.rank < 0:
            raise ConfigError(f"adapter.rank={self.rank} must be at least 1, or 0 for no adapters.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"adapter.alpha={self.alpha} must be above 0.")
        if self.tile_size < 1:
            raise ConfigError(f"adapter.tile_size={self.tile_size} must be at least 1.")
        _check_words(self, "adapter.", "quantize")
        for name in ("targets", "modules_to_save"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(
                    f"adapter.{name}={getattr(self, name)!r} is no regular expression ({error}); correct it."
                ) from error
        if not self.rank and (self.quantize != "none" or self.modules_to_save or self.start):
            raise ConfigError("adapter.rank=0 has no adapters, but other settings of them are given; set the rank.")


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
      seed: of random weights and shuffles, from 0 to 2**32 - 1.
      dtype: of activations.
      param_dtype: of the weights and of the optimizer's state; weights that learn have no other copy, so that with
        "bfloat16" small changes are rounded away.
      checkpoint_every: steps between checkpoints; one is also written at the end of each stage.
      keep_checkpoints: how many of the latest stay.
      keep_every: checkpoints of steps that are multiples of this stay for ever; 0 keeps none beside the latest.
      mesh: the devices.
      track: where figures are shown besides the run's folder: "tensorboard", "wandb"; see `qwenvl_jax.train.tracking`.
      adapter: low-rank adapters, which then are what learns in every stage; see `AdapterConfig`.
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
    keep_every: int = 0
    mesh: MeshConfig = MeshConfig()
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    adapter: AdapterConfig = AdapterConfig()

    def __post_init__(self):
        _check_words(self, "", "dtype", "param_dtype")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"stages must be at least one, each with a name of its own; got {names}.")
        for field in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be from 0 to {2**32 - 1}.")
        if self.keep_every < 0 or self.keep_every % self.checkpoint_every:
            raise ConfigError(
                f"keep_every={self.keep_every} must be a multiple of checkpoint_every={self.checkpoint_every}, or 0."
            )
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

    Data sources are left out: where data lies changes nothing, and what it holds has a digest of its own. So is the
    mesh: a run may go on with other devices, whose sums are the same but for rounding. And so are the settings of
    `execution_settings`.
    """
    skipped, executed = RUNTIME_FIELDS | {"source", "root", "checkpoint_every", "mesh"}, execution_settings(config)
    return {
        name: repr(value)
        for name, value in flat(config)
        if name not in executed and skipped.isdisjoint(name.split("."))
    }


def changes_nothing(name: str) -> bool:
    """Whether a setting of this name is no part of a fingerprint; those that earlier versions wrote may have it."""
    return name.rpartition(".")[2] in RUNTIME_FIELDS.union(EXECUTION_FIELDS)


def execution_settings(config: TrainConfig) -> dict[str, str]:
    """How the stages are carried out on their devices, by dotted name, as text: it changes nothing beyond rounding.

    A router's balance is that of each microbatch, so that where a stage has it, `microbatches` is not among these.
    """
    # Of a model that is named only, nobody knows here whether it has experts.
    experts = isinstance(config.model, str) or config.model.text.moe is not None
    return {
        f"stages.{index}.{name}": repr(getattr(stage, name))
        for index, stage in enumerate(config.stages)
        for name in EXECUTION_FIELDS
        if not (name == "microbatches" and experts and stage.router_balance)
    }
