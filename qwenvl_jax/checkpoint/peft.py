"""Low-rank adapters in the format of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

Names there are those of the modules of transformers 5, layer by layer; here the layers of a stack are the leading axis:

    base_model.model.<module of layer i>.lora_A.weight (R, in)   <->  a[i] [in, R]
    base_model.model.<module of layer i>.lora_B.weight (out, R)  <->  b[i] [R, out]

`in` and `out` join several axes of a kernel (heads and their width, say) as the public tensor does, and what is one
projection in the public layout (the tower's queries, keys and values) has one adapter. Source: PEFT 0.21, `LoraConfig`
and `get_peft_model_state_dict`.

The embedding of a tied model, saved whole, is its head too. PEFT takes it so with `ensure_weight_tying`, and then wants
it under both names; without, it leaves the model its old head.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint import hf
from qwenvl_jax.checkpoint.safetensors_file import StoredTensor, Writer, read_header
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDING = "text.embed.table"
_PAIR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

# Keys of adapter_config.json that change no number here: what was adapted follows from the tensors' names.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Ways to begin that leave the model's own weights as they are; others (PiSSA, OLoRA, ...) change them.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter: what it adds to projections, and modules that it replaces.

    Attributes:
      rank, alpha: the update of a kernel is `alpha / rank * a @ b`.
      pairs: (a [*layers, in, R], b [*layers, R, out]) by the name of the module, such as "text.layers.attn.q".
      saved: parameters of other modules, whole, by their paths ("merger.fc1.kernel").
      base: name or path of the model that it belongs to, if that is known.
    """

    rank: int
    alpha: float
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    saved: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base: str | None = None


def write(adapter: Adapter, folder: str | Path, config: QwenVLConfig) -> None:
    """Writes an adapter as PEFT reads it.

    Args:
      adapter: what to write; numbers keep their dtypes.
      folder: made if missing.
      config: the model's shape.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    table = {entry.path: entry for entry in hf.tensor_table(config)}
    stored: dict[str, np.ndarray] = {}
    targets, saved = [], []
    for module, (a, b) in adapter.pairs.items():
        entry = table[f"{module}.kernel"]
        targets.append(_module(entry, config))
        for name, layer in _layers(entry):
            stem = f"{_PREFIX}{_live_name(name, config).removesuffix('.weight')}"
            one_a, one_b = (a, b) if layer is None else (a[layer], b[layer])
            shape_a, shape_b = _shapes(entry, adapter.rank)
            stored[f"{stem}.lora_A.weight"] = np.ascontiguousarray(one_a.T).reshape(shape_a)
            stored[f"{stem}.lora_B.weight"] = np.ascontiguousarray(one_b.T).reshape(shape_b)
    for path, value in adapter.saved.items():
        entry = table[path]
        for name, layer in _layers(entry):
            public = _live_name(name, config)
            stored[_PREFIX + public] = np.ascontiguousarray(entry.to_public(value if layer is None else value[layer]))
            saved.append(public.rpartition(".")[0])
    tied = _EMBEDDING in adapter.saved and config.text.tie_word_embeddings
    if tied:
        stored[_PREFIX + hf.HEAD] = stored[_PREFIX + _live_name(table[_EMBEDDING].public, config)]
    values = _config(adapter, sorted(set(targets)), sorted(set(saved)))
    if tied:
        values["ensure_weight_tying"] = True
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        specs = [(name, value.dtype, value.shape) for name, value in stored.items()]
        partial = folder / f".{WEIGHTS}.partial"
        with Writer(partial, specs, {"format": "pt"}) as writer:
            for name, value in stored.items():
                writer.write(name, value)
            writer.finish({"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); choose another place.") from error


def _config(adapter: Adapter, targets: list[str], saved: list[str]) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        # An expression, which PEFT holds against whole names: ends of names would find modules of the tower, too.
        "target_modules": "|".join(targets),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def read(name_or_path: str | Path, config: QwenVLConfig) -> Adapter:
    """Reads an adapter that PEFT, or `write`, saved.

    A module that is adapted in some layers only has zeros in the others, which add nothing.

    Args:
      name_or_path: a folder, or a hub id.
      config: the shape of the model that it belongs to.

    Raises:
      CheckpointError: files are missing or damaged, the adapter is of another model, or of a kind that is not
        supported (DoRA, rank-stabilised, ranks that differ).
    """
    folder = folders.resolve(name_or_path)
    values = read_json(folder / CONFIG)
    _check(folder / CONFIG, values)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; save the adapter as safetensors (PEFT's default).")
    rank = values["r"]
    entries = {name: (entry, layer) for entry in hf.tensor_table(config) for name, layer in _layers(entry)}
    halves: dict[str, dict[str, dict[int | None, np.ndarray]]] = {}
    whole: dict[str, dict[int | None, np.ndarray]] = {}
    stored = read_header(folder / WEIGHTS)[0]
    if config.text.tie_word_embeddings:
        _check_tied(folder, values, stored, config)
    for name, tensor in stored.items():
        match = _PAIR.match(name)
        public = f"{match['module']}.weight" if match else name
        public = hf.current_name(public.removeprefix(_PREFIX), config.model_type) or public
        if public not in entries or (match and not entries[public][0].path.endswith(".kernel")):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} belongs to no {'projection' if match else 'parameter'} of this "
                f"{config.model_type} model; give an adapter of this model, of none of its experts."
            )
        entry, layer = entries[public]
        if match is None:
            _check_shape(tensor, entry.shape)
            whole.setdefault(entry.path, {})[layer] = entry.to_native(tensor.read())
            continue
        side = match["side"]
        shape = _shapes(entry, rank)[side == "B"]
        _check_shape(tensor, shape)
        module = entry.path.removesuffix(".kernel")
        half = tensor.read().reshape(shape[0], -1).T
        halves.setdefault(module, {}).setdefault(side, {})[layer] = half
    pairs = {module: _stacked_pair(folder, module, sides, entries) for module, sides in halves.items()}
    saved = {path: _stacked(folder, path, layers, entries) for path, layers in whole.items()}
    return Adapter(rank, float(values["lora_alpha"]), pairs, saved, values.get("base_model_name_or_path"))


def _check(file: Path, values: Mapping[str, Any]) -> None:
    """Refuses an adapter whose update is not `lora_alpha / r * A B`."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type={kind!r}; give a LoRA adapter.")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{file}: r={rank!r} must be a whole number of at least 1.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{file}: lora_alpha={alpha!r} must be a number.")
    beginning = values.get("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        raise CheckpointError(
            f"{file}: init_lora_weights={beginning!r} changed the model's own weights; have PEFT convert the adapter "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    known = _NEUTRAL | {"peft_type", "r", "lora_alpha", "init_lora_weights", "bias"}
    odd = {key: value for key, value in values.items() if key not in known and value}
    if values.get("bias", "none") != "none":
        odd["bias"] = values["bias"]
    if odd:
        key, value = next(iter(odd.items()))
        raise CheckpointError(f"{file}: {key}={value!r} is not supported; train the adapter without it, or merge it.")


def _check_tied(folder: Path, values: Mapping[str, Any], stored: dict[str, StoredTensor], config: QwenVLConfig) -> None:
    """Refuses an adapter of a tied model whose embedding and head differ; takes the head out of `stored`."""
    names = {hf.current_name(name.removeprefix(_PREFIX), config.model_type): name for name in stored}
    embedding, head = names.get(hf.PREFIXES[config.model_type].embedding), names.get(hf.HEAD)
    if embedding is None:
        return
    if not values.get("ensure_weight_tying"):
        raise CheckpointError(
            f"{folder / CONFIG}: the embedding is saved whole without ensure_weight_tying, so that PEFT leaves the "
            "model its old head, though it is tied; if it was trained as both, set ensure_weight_tying to true."
        )
    if head is not None and not np.array_equal(stored.pop(head).read(), stored[embedding].read()):
        raise CheckpointError(
            f"{folder / WEIGHTS}: {head} differs from {embedding}, but the model is tied; save both alike."
        )


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} has shape {tensor.shape}, expected {shape}; give an adapter of a model of "
            "this shape, with one rank."
        )


def _stacked_pair(folder: Path, module: str, sides: Mapping, entries: Mapping) -> tuple[np.ndarray, np.ndarray]:
    a, b = sides.get("A", {}), sides.get("B", {})
    if set(a) != set(b):
        layer = min(set(a) ^ set(b), key=str)
        raise CheckpointError(
            f"{folder / WEIGHTS}: {module}{'' if layer is None else f' of layer {layer}'} has one of lora_A and lora_B "
            "without the other; fetch or save it again."
        )
    path = f"{module}.kernel"
    return _stacked(folder, path, a, entries, fill=True), _stacked(folder, path, b, entries, fill=True)


def _stacked(folder: Path, path: str, layers: Mapping, entries: Mapping, fill: bool = False) -> np.ndarray:
    """One parameter of the layers that were found."""
    if None in layers:
        return layers[None]
    count = next(entry.layers for entry, _ in entries.values() if entry.path == path)
    missing = sorted(set(range(count)) - set(layers))
    if missing and not fill:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {path} of layer {missing[0]} is not among the modules saved whole, but others are; "
            "save it in all layers."
        )
    zeros = np.zeros_like(next(iter(layers.values())))
    return np.stack([layers.get(i, zeros) for i in range(count)])


def _layers(entry: hf.Entry) -> Iterator[tuple[str, int | None]]:
    """The public names of a parameter and the layers that they are of."""
    return zip(entry.names(), [None] if entry.layers is None else range(entry.layers), strict=True)


def _shapes(entry: hf.Entry, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of lora_A and lora_B; of a convolution (the patches') the first has its window, the second one of 1."""
    out, *inputs = entry.shape
    return (rank, *inputs), (out, rank, *(1 for _ in inputs[1:]))


def _live_name(public: str, config: QwenVLConfig) -> str:
    """The name in the modules of transformers 5, which older generations' files do not use."""
    ours, live = hf.PREFIXES[config.model_type], hf.PREFIXES["qwen3_vl"]
    for prefix, replacement in ((ours.vision, live.vision), (ours.text, live.text)):
        if public.startswith(prefix):
            return replacement + public.removeprefix(prefix)
    return public


def _module(entry: hf.Entry, config: QwenVLConfig) -> str:
    """An expression for the module's name in every layer."""
    name = _live_name(entry.public, config).removesuffix(".weight")
    return re.escape(name).replace(r"\{\}", r"\d+")
