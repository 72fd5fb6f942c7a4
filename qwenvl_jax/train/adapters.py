"""Adapters: a run that learns low-rank updates of projections and leaves the model's own weights as they are.

With W a kernel, frozen, and R the rank, a projection computes

    y = x W + (alpha / R) (x A) B          A [in, R] random, B [R, out] zero at first: the run begins with the model

Source: LoRA (arXiv 2106.09685); over kernels stored in four bits, QLoRA (arXiv 2305.14314). The products are those of
qwix. It does not reach weights inside of a scanned stack, so one layer of a projection is adapted, abstractly, and what
that adds gets the layers' axis back.
"""

import dataclasses
import functools
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.checkpoint import peft
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models import pretrained
from qwenvl_jax.models.layers import Linear
from qwenvl_jax.models.moe import Experts
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.ops import low_rank
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import DEFAULT_RULES, Rules, partition_spec
from qwenvl_jax.train.config import AdapterConfig, TrainConfig
from qwenvl_jax.train.run_folder import RunFolder
from qwenvl_jax.train.state import ModelParts, Params, WeightInfo, Weights

A, B = "kernel_lora_a", "kernel_lora_b"  # the names that qwix gives
_CODES, _SCALES = "kernel.array.qvalue", "kernel.array.scale"
_TYPES: Mapping[str, Any] = {"nf4": "nf4", "int8": jnp.int8, "int4": jnp.int4}
# Codes of four bits lie two in a byte: programs of JAX 0.10 compiled ahead of time take no arrays of smaller types.
_HALF_BYTES: Mapping[str, Any] = {"nf4": jnp.uint4, "int4": jnp.int4}


class _Provider(qwix.LoraProvider):
    """Adapts a `Linear` at its product.

    qwix stands in for functions of JAX by name. `project` calls them inside of the branches of a choice by platform,
    where qwix cannot tell a weight from another array; so it stands in for `project`.
    """

    def get_intercept_map(self):
        return {"qwenvl_jax.ops.products.project": self.project}

    def project(self, x, kernel, inputs: int):
        """See `qwenvl_jax.ops.products.project`; `kernel` may be quantized."""
        # A quantized kernel is used in the dtype of its scales.
        inner = getattr(kernel, "array", None)
        kernel = kernel.astype(x.dtype) if inner is None else kernel.replace(array=inner.astype(x.dtype))
        summed = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
        return self.dot_general(x, kernel, (summed, ((), ())))


def make_parts(config: TrainConfig, shape: QwenVLConfig, mesh: Mesh, rules: Rules) -> ModelParts:
    """The model of a run, taken apart: with adapters if the run has them.

    Raises:
      ConfigError: adapters that this model cannot have.
    """
    make: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "mesh": mesh, "rules": rules}
    if not config.adapter.rank:
        return ModelParts(shape, **make)
    return AdaptedParts(shape, config.adapter, seed=config.seed, **make)


class AdaptedParts(ModelParts):
    """A model with adapters as its structure and its weights by name.

    The weights of an adapter are f32 whatever the others are, as PEFT has them, and enter products in the dtype of the
    activations.

    Args:
      config: the model's shape.
      adapter: see `AdapterConfig`; its rank is above 0.
      seed: of the first A.
      mesh, rules, dtype, param_dtype: see `ModelParts`.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        adapter: AdapterConfig,
        *,
        seed: int,
        mesh: Mesh,
        rules: Rules = DEFAULT_RULES,
        dtype,
        param_dtype,
    ):
        make: dict[str, Any] = {"mesh": mesh, "rules": rules, "dtype": dtype, "param_dtype": param_dtype}
        self.base = ModelParts(config, **make)
        super().__init__(config, change=functools.partial(_adapted_model, adapter, Execution(mesh, rules)), **make)
        self.adapter, self._seed = adapter, seed
        for name in [name for name in self.names if name.endswith(f".{_CODES}") and adapter.quantize in _HALF_BYTES]:
            self._pack(name)
        self._dtype = jnp.dtype(dtype)
        self.modules = tuple(name.removesuffix(f".{A}") for name in self.names if name.endswith(f".{A}"))
        self.saved = _saved_names(adapter, self.names, self.modules)
        self._learning = {f"{module}.{half}" for module in self.modules for half in (A, B)} | set(self.saved)
        kernels = [f"{module}.kernel" for module in self.modules]
        self._merging = {name: jax.jit(self._merged, out_shardings=self._of_one_layer(name)) for name in kernels}
        self._origin: dict[str, str] | None = None

    def _pack(self, name: str) -> None:
        """Describes codes as they are stored, two in a byte along the last axis."""
        info = self.weights[name]
        *lead, last = info.shape
        if last % 2:
            raise ConfigError(
                f"adapter.quantize={self.adapter.quantize}: {name} has {last} values in a row, an odd number; "
                "leave its module out of adapter.targets."
            )
        info = dataclasses.replace(info, shape=(*lead, last // 2), dtype=jnp.dtype(jnp.uint8))
        self.weights[name] = info
        spec = partition_spec(name, info.shape, info.axes, self.mesh, self.rules)
        self.shardings[name] = NamedSharding(self.mesh, spec)

    def _unpacked(self, codes):
        """Codes as qwix takes them."""
        kind = _HALF_BYTES.get(self.adapter.quantize)
        if kind is None:
            return codes
        return jax.lax.bitcast_convert_type(codes, kind).reshape(*codes.shape[:-1], -1)

    @property
    def scale(self) -> float:
        """The factor of an update."""
        return self.adapter.alpha / self.adapter.rank

    def select(self, trainable: str) -> tuple[str, ...]:
        """Names of what learns: those of the adapters and of the modules saved whole that `trainable` picks."""
        names = tuple(name for name in super().select(trainable) if name in self._learning)
        if not names:
            raise ConfigError(
                f"trainable={trainable!r} picks no adapter; adapters are on {self.modules[0]} and others, see "
                "adapter.targets."
            )
        return names

    def check_start(self) -> None:
        _ = self._start

    def drawn(self, seed: int) -> Weights:
        return self.base.drawn(seed)

    def begun(self, weights: Weights) -> Params:
        """The base, its kernels quantized one after another and layer by layer, and adapters at the start of a run."""
        found = self._first() if self._start is None else self._started(self._start)
        return found | self._base(weights, without=found.keys())

    def merge(self, params: Mapping[str, jax.Array]) -> QwenVL:
        """The model with adapters beside its kernels, in the dtype of the activations."""
        halves = {name: params[name].astype(self._dtype) for name in params if name.endswith((A, B))}
        codes = {name: self._unpacked(params[name]) for name in params if name.endswith(f".{_CODES}")}
        return super().merge({**params, **halves, **codes})

    def exported(self, params: Mapping[str, jax.Array], name: str, layer: int | None) -> jax.Array:
        """A weight of the model without adapters, or one layer of it: their updates are in the kernels.

        A quantized kernel is what its numbers mean, not the one that it was made of: the updates were learnt beside the
        quantized one, and the model that comes out is the model that was trained.
        """
        module = name.removesuffix(".kernel")
        if module not in self.modules:
            return super().exported(params, name, layer)
        stored = (name,) if name in params else (f"{module}.{_CODES}", f"{module}.{_SCALES}")
        values = [params[one] for one in (*stored, f"{module}.{A}", f"{module}.{B}")]
        return self._merging[name](values if layer is None else [pretrained.layer_of(value, layer) for value in values])

    def _merged(self, values: Sequence[jax.Array]) -> jax.Array:
        """A kernel as it is stored, or one layer of it, and its adapter's halves, as one kernel."""
        *kernel, a, b = values
        return low_rank.merged(kernel[0] if len(kernel) == 1 else self._dequantized(*kernel), a, b, self.scale)

    def _of_one_layer(self, name: str) -> NamedSharding:
        """Where one layer of a weight of the base lies, or the weight if it has no layers."""
        axes, spec = self.base.weights[name].axes, self.base.shardings[name].spec
        return NamedSharding(self.mesh, PartitionSpec(*spec[axes[0] == "layers" :]))

    def exported_weights(self) -> Mapping[str, WeightInfo]:
        return self.base.weights

    def _dequantized(self, codes, scales):
        """The kernel that codes and scales mean, in the dtype of the scales."""
        return qwix.dequantize(qwix.QArray(self._unpacked(codes), scales, qtype=_TYPES[self.adapter.quantize]))

    def stored(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """Of what is frozen in a stage, what learnt in another; the base is read and quantized again."""
        return {name: value for name, value in frozen.items() if name in self._learning}

    def origin(self, frozen: Params) -> dict[str, Any]:
        """A digest of the base, as it is frozen."""
        if self._origin is None:
            self._origin = {"base": self._digest(frozen)}
        return self._origin

    def _digest(self, params: Mapping[str, jax.Array]) -> str:
        """A digest of the base, the same on every mesh: whole numbers add up alike in any order."""
        sums = jax.jit(_sums, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        names = sorted(set(params) - self._learning)
        return hashlib.sha256(json.dumps({n: np.asarray(sums(params[n])).tolist() for n in names}).encode()).hexdigest()

    def made_again(self, initial: Callable[[], Weights], origin: Mapping[str, Any]) -> Params:
        """The base, made as when the run began.

        Raises:
          CheckpointError: its weights are other ones now.
        """
        base = self._base(initial(), without=self._learning)
        if self.origin(base)["base"] != origin["base"]:
            raise CheckpointError(
                "the model's own weights are not those that the run began with, beside which its adapters were learnt"
                + (" (or devices of this kind quantize them otherwise)" if self.adapter.quantize != "none" else "")
                + "; put the old ones back, or begin anew in another output folder."
            )
        return base

    def to_peft(self, params: Mapping[str, jax.Array], base: str | None) -> peft.Adapter:
        """What was learnt, on this host; `base` names the model that it belongs to. All processes call it."""
        whole = NamedSharding(self.mesh, PartitionSpec())

        def fetched(name: str) -> np.ndarray:
            value = params[name]
            return np.asarray(value if value.is_fully_addressable else jax.device_put(value, whole))

        pairs = {m: (fetched(f"{m}.{A}"), fetched(f"{m}.{B}")) for m in self.modules}
        saved = {name: fetched(name) for name in self.saved}
        return peft.Adapter(self.adapter.rank, self.adapter.alpha, pairs, saved, base)

    def save_adapter(self, params: Mapping[str, jax.Array], folder: RunFolder, base: str | None) -> None:
        """Writes what was learnt in PEFT's format as `adapter` of a run's folder, if it is not there."""
        adapter = self.to_peft(params, base)
        if not (folder.out / "adapter" / peft.CONFIG).exists():
            with folder.new_model("adapter") as making:
                peft.write(adapter, making, self.config)

    def _base(self, weights: Weights, *, without: Collection[str]) -> Params:
        """The base's weights as they are kept beside adapters; those in `without` are not read."""
        self.base.check_shapes(weights.shapes)
        found: Params = {}
        for name in self.names:
            if name in without:
                continue
            if name in self.base.weights:
                found[name] = self.base.placed(name, weights.read(name))
            elif name.endswith(f".{_CODES}"):
                module = name.removesuffix(f".{_CODES}")
                found[name], found[f"{module}.{_SCALES}"] = self._quantized(f"{module}.kernel", weights)
        return found

    def _first(self) -> Params:
        """New adapters, as PEFT begins: A uniform within 1 / sqrt(fan-in), B zero."""
        names = [name for name in self.names if name.endswith((A, B))]

        def draw():
            found = {}
            for name in names:
                info = self.weights[name]
                # The draw follows from the name, not from which other adapters there are.
                key = jax.random.fold_in(jax.random.key(self._seed), zlib.crc32(name.encode()))
                bound = info.shape[-2] ** -0.5
                drawn = jax.random.uniform(key, info.shape, info.dtype, -bound, bound)
                found[name] = jnp.zeros(info.shape, info.dtype) if name.endswith(B) else drawn
            return found

        # A program that runs once is not worth optimizing.
        unoptimized = {"xla_backend_optimization_level": 0}
        shardings = {name: self.shardings[name] for name in names}
        return jax.jit(draw, out_shardings=shardings, compiler_options=unoptimized)()

    def _started(self, start: peft.Adapter) -> Params:
        """The adapters and the modules saved whole of an adapter that was read."""
        halves = {f"{m}.{half}": pair[half == B] for m, pair in start.pairs.items() for half in (A, B)}
        return {
            name: jax.device_put(value.astype(self.weights[name].dtype), self.shardings[name])
            for name, value in (halves | dict(start.saved)).items()
        }

    def _quantized(self, name: str, weights: Weights) -> tuple[jax.Array, jax.Array]:
        """Codes and scales of a kernel; of one with layers no more than one layer is held beside them."""
        info, module = self.base.weights[name], name.removesuffix(".kernel")
        stacked = info.axes[0] == "layers"
        outputs = range(info.inputs, len(info.shape) - stacked)
        names = f"{module}.{_CODES}", f"{module}.{_SCALES}"
        shardings = tuple(self.shardings[name] for name in names)

        def one(kernel):
            array = qwix.quantize(
                kernel.astype(info.dtype),
                _TYPES[self.adapter.quantize],
                channelwise_axes=tuple(outputs),
                tiled_axes=_tiles(info.inputs, self.adapter.tile_size),
            )
            codes = array.qvalue
            if self.adapter.quantize in _HALF_BYTES:
                codes = jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.uint8)
            return codes, array.scale

        if not stacked:
            return jax.jit(one, out_shardings=shardings)(weights.read(name))

        def put(stacks, kernel, layer):
            return tuple(
                jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
                for stack, value in zip(stacks, one(kernel), strict=True)
            )

        def empty():
            return tuple(jnp.zeros(self.weights[name].shape, self.weights[name].dtype) for name in names)

        stacks = jax.jit(empty, out_shardings=shardings)()
        put = jax.jit(put, donate_argnums=0, out_shardings=shardings)
        for layer in range(info.shape[0]):
            # Each layer is gone from the device before the next one comes.
            stacks = jax.block_until_ready(put(stacks, weights.read_layer(name, layer), layer))
        return stacks

    @functools.cached_property
    def _start(self) -> peft.Adapter | None:
        """The adapter to begin with; a run that goes on does without."""
        if not self.adapter.start:
            return None
        start = peft.read(self.adapter.start, self.config)
        self._check_fits(self.adapter.start, start)
        return start

    def _check_fits(self, path: str, start: peft.Adapter) -> None:
        """Refuses to begin with an adapter of other modules or another rank."""
        if (start.rank, start.alpha) != (self.adapter.rank, self.adapter.alpha):
            raise CheckpointError(
                f"adapter.start={path}: it has r={start.rank} and lora_alpha={start.alpha:g}, the run adapter.rank="
                f"{self.adapter.rank} and adapter.alpha={self.adapter.alpha:g}; set them alike."
            )
        for kind, ours, theirs in (
            ("targets", set(self.modules), set(start.pairs)),
            ("modules_to_save", set(self.saved), set(start.saved)),
        ):
            if ours != theirs:
                name = min(ours ^ theirs)
                has, lacks = ("the run", "it") if name in ours else ("it", "the run")
                raise CheckpointError(
                    f"adapter.start={path}: {has} has {name}, {lacks} has not; set adapter.{kind} to what it was made "
                    "with."
                )


def _tiles(inputs: int, tile_size: int) -> dict[int, int]:
    """Tile sizes along the input axes of a kernel: of the last axis some inputs share a scale, of others none."""
    return dict.fromkeys(range(inputs - 1), 1) | {inputs - 1: tile_size}


def _adapted_model(adapter: AdapterConfig, execution: Execution, model: QwenVL) -> QwenVL:
    """An abstract model whose targets have adapters and, if asked, quantized kernels."""
    for name, linear in _targets(model, adapter).items():
        parent, leaf = model, name.rpartition(".")[2]
        for part in name.split(".")[:-1]:
            parent = getattr(parent, part)
        setattr(parent, leaf, _adapted(name, linear, adapter, execution))
    return model


def _targets(model: QwenVL, adapter: AdapterConfig) -> dict[str, Linear]:
    """The projections that get adapters, by name."""
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    picked = [name for name in modules if re.search(adapter.targets, name)]
    for name in picked:
        if isinstance(modules[name], Experts):
            raise ConfigError(
                f"adapter.targets={adapter.targets!r} picks {name}: experts get no adapters; name the other "
                "projections, such as those of attention: layers\\.attn\\.(q|k|v|o)$."
            )
        if name.endswith(".router"):
            raise ConfigError(
                f"adapter.targets={adapter.targets!r} picks {name}: PEFT has no adapters for routers; leave it out."
            )
        if name == "text.head":
            raise ConfigError(
                f"adapter.targets={adapter.targets!r} picks {name}: the loss reads its weight in chunks, past any "
                "adapter; leave it out, or put it into adapter.modules_to_save."
            )
    found = {name: module for name in sorted(picked) if isinstance(module := modules[name], Linear)}
    if not found:
        known = [name for name, module in modules.items() if isinstance(module, Linear)]
        raise ConfigError(
            f"adapter.targets={adapter.targets!r} picks no projection; they are {', '.join(sorted(known))}."
        )
    return found


def _saved_names(adapter: AdapterConfig, names: tuple[str, ...], targets: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the weights of modules that learn whole."""
    if not adapter.modules_to_save:
        return ()
    found = tuple(name for name in names if re.search(adapter.modules_to_save, name.rpartition(".")[0]))
    told = f"adapter.modules_to_save={adapter.modules_to_save!r}"
    if not found:
        raise ConfigError(f"{told} picks no module; their names are as {names[0].rpartition('.')[0]}.")
    for name in found:
        if any(name.startswith(f"{target}.") for target in targets):
            raise ConfigError(f"{told} picks {name.rpartition('.')[0]}, which has an adapter; a module learns one way.")
        if ".experts." in name:
            raise ConfigError(f"{told} picks {name.rpartition('.')[0]}: experts are not saved beside adapters.")
    return found


def _adapted(name: str, linear: Linear, adapter: AdapterConfig, execution: Execution) -> Linear:
    """An abstract projection with its adapter: one layer is given to qwix, and gets its neighbours back."""
    graph, state = nnx.split(linear)
    kernel, inputs = linear.kernel, linear.inputs
    axes, shape, dtype = kernel.get_metadata("axes"), kernel.get_value().shape, kernel.get_value().dtype
    lead = shape[:1] if axes[0] == "layers" else ()
    axes, shape = axes[len(lead) :], shape[len(lead) :]
    quantize, tiles_axis = {}, axes[inputs - 1]
    if adapter.quantize != "none":
        if shape[inputs - 1] % adapter.tile_size:
            raise ConfigError(
                f"adapter.tile_size={adapter.tile_size} does not divide the {shape[inputs - 1]} inputs of {name}; use "
                "a divisor, or leave the module out of adapter.targets."
            )
        # Tiles stay together where there are too few of them to be split as their inputs are.
        if shape[inputs - 1] // adapter.tile_size % execution.split(axes[inputs - 1]):
            tiles_axis = "adapter"
        tiles = _tiles(inputs, adapter.tile_size)
        quantize = {"weight_qtype": _TYPES[adapter.quantize], "tile_size": tiles}
    provider = _Provider(module_path=".*", rank=adapter.rank, alpha=adapter.alpha, **quantize)

    def adapted(one, x):
        return qwix.apply_lora_to_model(nnx.merge(graph, one), provider, x, rngs=nnx.Rngs(0))

    # Arguments, not arrays made inside: of those qwix looks for the array that they were made of.
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(lead) :], leaf.dtype), state)
    x = jax.ShapeDtypeStruct((1, *shape[:inputs]), dtype)
    graph, found = nnx.split(nnx.eval_shape(adapted, one, x))
    described = {
        # Axes that a half joins are split as the first of them. (With queries, keys and values it is no longer many
        # matrices, as an optimizer takes that axis for.)
        A: {"axes": (axes[0], "adapter"), "inputs": 1},
        B: {"axes": ("adapter", "adapter" if axes[inputs] == "qkv" else axes[inputs]), "inputs": 1},
        _CODES: {"axes": axes, "inputs": 0},
        _SCALES: {"axes": (*axes[: inputs - 1], tiles_axis, *axes[inputs:]), "inputs": 0},
        "bias": {"axes": axes[inputs:], "inputs": 0},
        "kernel": {"axes": axes, "inputs": inputs},
    }

    def stacked(path, variable):
        key, value = ".".join(map(str, path)), variable.get_value()
        if key in (A, B) and value.shape == shape:
            # qwix would take the half for the kernel.
            raise ConfigError(f"adapter.rank={adapter.rank} is the whole width of {name}; use a smaller one.")
        about = described[key]
        kind = jnp.float32 if key in (A, B) else value.dtype
        metadata = about | {"axes": (("layers",) if lead else ()) + about["axes"]}
        return type(variable)(jax.ShapeDtypeStruct((*lead, *value.shape), kind), **metadata)

    return nnx.merge(graph, nnx.map_state(stacked, found))


_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32}


def _sums(value):
    """Two sums of the bits of an array, u32[2]; the second tells also whether numbers changed places."""
    wide = _UNSIGNED.get(value.dtype.itemsize)
    bits = (value if wide is None else jax.lax.bitcast_convert_type(value, wide)).astype(jnp.uint32)
    places = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        places = places * jnp.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    odd = places | jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * odd, dtype=jnp.uint32)])
