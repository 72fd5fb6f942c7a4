"""The public Hugging Face layout: which tensor of a file is which parameter of the model.

One declarative table (`tensor_table`) says it for reading, writing and comparing alike. A public tensor becomes a
parameter by splitting its axes and reordering them; the inverse follows from the same two facts:

    q_proj.weight (N*E, H)  --split-->  (N, E, H)  --order (2, 0, 1)-->  kernel [H, N, E]

Layers, which stand apart in a file, are the leading axis of one stacked parameter.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from qwenvl_jax.config import QwenVLConfig

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """What the names of a generation's tensors begin with, those of the tower and those of the decoder."""

    vision: str
    text: str

    @property
    def embedding(self) -> str:
        """Name of the table of word embeddings."""
        return f"{self.text}embed_tokens.weight"


_OLDER, _NEWER = Prefixes("visual.", "model."), Prefixes("model.visual.", "model.language_model.")
# As released, and as transformers 5 writes them. Either spelling is read for every generation.
PREFIXES = {"qwen2_vl": _OLDER, "qwen2_5_vl": _OLDER, "qwen3_vl": _NEWER, "qwen3_vl_moe": _NEWER}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
      public: name in a file; `{}` stands for the number of the layer.
      path: the parameter, attribute names from the model down, joined by dots.
      shape: of the public tensor.
      split: the public tensor's axes, taken apart; as many values as `shape`.
      order: the split axes in the order of the parameter.
      layers: how many tensors are stacked along the parameter's leading axis; None for a parameter of its own.
      swapped: whether files may hold the tensor with its last two axes exchanged; see `is_swapped`.
    """

    public: str
    path: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    layers: int | None = None
    swapped: bool = False

    @property
    def swapped_shape(self) -> tuple[int, ...]:
        """Shape of the tensor with its last two axes exchanged."""
        *lead, a, b = self.shape
        return (*lead, b, a)

    def is_swapped(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor of this shape has its last two axes exchanged.

        Experts are released as [experts, in, out] and held by transformers 5 as [experts, out, in], which it also
        writes; reading, it exchanges the axes of what does not have its own shape. Where in and out are equal the
        shape says nothing, and the tensor is taken, here as there, for [experts, out, in].
        """
        return self.swapped and tuple(shape) == self.swapped_shape

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in files that are written: as released, if transformers can tell it from its own."""
        return self.swapped_shape if self.is_swapped(self.shape) else self.shape

    @property
    def native_shape(self) -> tuple[int, ...]:
        """Shape of the parameter, the layer axis included."""
        one = tuple(self.split[i] for i in self.order)
        return one if self.layers is None else (self.layers, *one)

    def names(self) -> list[str]:
        """The public names that make up the parameter, in the order of the layers."""
        return [self.public] if self.layers is None else [self.public.format(i) for i in range(self.layers)]

    def to_native(self, tensor: np.ndarray) -> np.ndarray:
        """A public tensor as one layer of the parameter, without copying where NumPy can avoid it."""
        if self.is_swapped(tensor.shape):
            tensor = tensor.swapaxes(-1, -2)
        return tensor.reshape(self.split).transpose(self.order)

    def to_public(self, layer: np.ndarray) -> np.ndarray:
        """One layer of the parameter as the public tensor; the inverse of `to_native`."""
        tensor = layer.transpose(np.argsort(self.order)).reshape(self.shape)
        return tensor.swapaxes(-1, -2) if self.is_swapped(self.shape) else tensor


def _same(public: str, path: str, *shape: int, layers: int | None = None) -> Entry:
    """A tensor that is stored as the parameter is."""
    return Entry(public, path, shape, shape, tuple(range(len(shape))), layers)


def _linear(public: str, path: str, outputs: tuple[int, ...], inputs: tuple[int, ...], layers=None) -> Entry:
    """A weight stored (out, in), each side possibly several axes joined; the parameter is [*inputs, *outputs]."""
    n = len(outputs)
    order = (*range(n, n + len(inputs)), *range(n))
    return Entry(public, path, (math.prod(outputs), math.prod(inputs)), (*outputs, *inputs), order, layers)


def _bias(public: str, path: str, outputs: tuple[int, ...], layers=None) -> Entry:
    """A bias stored flat; the parameter is [*outputs]."""
    return Entry(public, path, (math.prod(outputs),), outputs, tuple(range(len(outputs))), layers)


def _linear_and_bias(public: str, path: str, outputs: tuple[int, ...], inputs: tuple[int, ...], layers=None):
    yield _linear(f"{public}.weight", f"{path}.kernel", outputs, inputs, layers)
    yield _bias(f"{public}.bias", f"{path}.bias", outputs, layers)


def _norm(public: str, path: str, width: int, layers=None, *, bias: bool):
    """A layer norm, or without bias an RMS norm."""
    yield _same(f"{public}.weight", f"{path}.scale", width, layers=layers)
    if bias:
        yield _same(f"{public}.bias", f"{path}.bias", width, layers=layers)


def tensor_table(config: QwenVLConfig) -> tuple[Entry, ...]:
    """Every tensor of a model of this shape, in the order of the computation.

    Source: the `state_dict` of the reference's models, and what its `save_pretrained` makes of it.
    """
    return (*_vision_entries(config), *_text_entries(config))


# Public names of tower and mergers, by generation: the two layers of a feed-forward layer without gate, and the norm
# and the two layers of a merger.
_MLP_NAMES = {"qwen2_vl": ("fc1", "fc2")}
_MERGER_NAMES = {"qwen2_vl": ("ln_q", "mlp.0", "mlp.2"), "qwen2_5_vl": ("ln_q", "mlp.0", "mlp.2")}


def _vision_entries(config: QwenVLConfig) -> Iterable[Entry]:
    v, VISION = config.vision, PREFIXES[config.model_type].vision
    layer_norm = v.norm == "layer_norm"
    D, F, Y, heads = v.hidden_size, v.intermediate_size, v.depth, (v.num_heads, v.hidden_size // v.num_heads)
    conv = (D, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    # The patch convolution's stride is its kernel, so it is a product with the flattened patch.
    yield Entry(f"{VISION}patch_embed.proj.weight", "vision.patch_embed.kernel", conv, (D, math.prod(conv[1:])), (1, 0))
    if v.patch_bias:
        yield _bias(f"{VISION}patch_embed.proj.bias", "vision.patch_embed.bias", (D,))
    if v.num_position_embeddings:
        yield _same(f"{VISION}pos_embed.weight", "vision.pos_embed.table", v.num_position_embeddings, D)
    block, path = f"{VISION}blocks.{{}}.", "vision.blocks."
    yield from _norm(f"{block}norm1", f"{path}norm1", D, layers=Y, bias=layer_norm)
    yield from _linear_and_bias(f"{block}attn.qkv", f"{path}attn.qkv", (3, *heads), (D,), Y)
    yield from _linear_and_bias(f"{block}attn.proj", f"{path}attn.proj", (D,), heads, Y)
    yield from _norm(f"{block}norm2", f"{path}norm2", D, layers=Y, bias=layer_norm)
    if v.gated_mlp:
        for name, out, inp in (("gate", F, D), ("up", F, D), ("down", D, F)):
            yield from _linear_and_bias(f"{block}mlp.{name}_proj", f"{path}mlp.{name}", (out,), (inp,), Y)
    else:
        fc1, fc2 = _MLP_NAMES.get(config.model_type, ("linear_fc1", "linear_fc2"))
        yield from _linear_and_bias(f"{block}mlp.{fc1}", f"{path}mlp.fc1", (F,), (D,), Y)
        yield from _linear_and_bias(f"{block}mlp.{fc2}", f"{path}mlp.fc2", (D,), (F,), Y)
    wide, out, taps = v.spatial_merge_size**2 * D, v.out_hidden_size, len(v.deepstack_visual_indexes)
    mergers: list[tuple[str, str, int, int | None]] = [(f"{VISION}merger.", "merger.", D, None)]
    if taps:
        mergers.append((f"{VISION}deepstack_merger_list.{{}}.", "deepstack.", wide, taps))
    norm, fc1, fc2 = _MERGER_NAMES.get(config.model_type, ("norm", "linear_fc1", "linear_fc2"))
    for public, path, width, layers in mergers:
        yield from _norm(f"{public}{norm}", f"{path}norm", width, layers=layers, bias=layer_norm)
        yield from _linear_and_bias(f"{public}{fc1}", f"{path}fc1", (wide,), (wide,), layers)
        yield from _linear_and_bias(f"{public}{fc2}", f"{path}fc2", (out,), (wide,), layers)


def _text_entries(config: QwenVLConfig) -> Iterable[Entry]:
    t, prefixes = config.text, PREFIXES[config.model_type]
    H, F, V, Y, E = t.hidden_size, t.intermediate_size, t.vocab_size, t.num_hidden_layers, t.head_dim
    heads, kv_heads = (t.num_attention_heads, E), (t.num_key_value_heads, E)
    yield _same(prefixes.embedding, "text.embed.table", V, H)
    layer, path = f"{prefixes.text}layers.{{}}.", "text.layers."
    yield _same(f"{layer}input_layernorm.weight", f"{path}input_norm.scale", H, layers=Y)
    for name, outputs in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield _linear(f"{layer}self_attn.{name}_proj.weight", f"{path}attn.{name}.kernel", outputs, (H,), Y)
        if t.attention_bias:
            yield _bias(f"{layer}self_attn.{name}_proj.bias", f"{path}attn.{name}.bias", outputs, Y)
    yield _linear(f"{layer}self_attn.o_proj.weight", f"{path}attn.o.kernel", (H,), heads, Y)
    for name in ("q_norm", "k_norm") if t.qk_norm else ():
        yield _same(f"{layer}self_attn.{name}.weight", f"{path}attn.{name}.scale", E, layers=Y)
    yield _same(f"{layer}post_attention_layernorm.weight", f"{path}post_attention_norm.scale", H, layers=Y)
    if t.moe is not None:
        X, F = t.moe.num_experts, t.moe.moe_intermediate_size
        yield _linear(f"{layer}mlp.gate.weight", f"{path}mlp.router.kernel", (X,), (H,), Y)
        experts, path = f"{layer}mlp.experts.", f"{path}mlp.experts."
        yield Entry(
            f"{experts}gate_up_proj", f"{path}gate_up", (X, H, 2 * F), (X, H, 2, F), (0, 1, 2, 3), Y, swapped=True
        )
        yield Entry(f"{experts}down_proj", f"{path}down", (X, F, H), (X, F, H), (0, 1, 2), Y, swapped=True)
    else:
        for name, out, inp in (("gate", F, H), ("up", F, H), ("down", H, F)):
            yield _linear(f"{layer}mlp.{name}_proj.weight", f"{path}mlp.{name}.kernel", (out,), (inp,), Y)
    yield _same(f"{prefixes.text}norm.weight", "text.norm.scale", H)
    if not t.tie_word_embeddings:
        yield _linear(HEAD, "text.head.kernel", (V,), (H,))


def parameter_count(config: QwenVLConfig) -> tuple[int, int]:
    """(all parameters, those of tower and mergers) of a model of this shape, a tied head counted once."""
    sizes = [(entry, math.prod(entry.native_shape)) for entry in tensor_table(config)]
    vision = PREFIXES[config.model_type].vision
    return sum(n for _, n in sizes), sum(n for entry, n in sizes if entry.public.startswith(vision))


# Spellings of the two prefixes that releases and tools have written.
_VISION_PREFIX = re.compile(r"^(model\.)?visual\.")
_TEXT_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.(?!language_model\.|visual\.))")
_HEAD_PREFIX = re.compile(r"^language_model\.lm_head\.")
_BUFFER = re.compile(r"(^|\.)rotary_(pos_)?emb\.(original_)?inv_freq$")


def current_name(stored: str, model_type: str) -> str | None:
    """The name in the table for a stored tensor, or None for one that is to be ignored.

    Prefixes of other releases and tools are taken for what they meant. Ignored are buffers of rotary frequencies, which
    follow from the configuration.
    """
    if _BUFFER.search(stored):
        return None
    prefixes = PREFIXES[model_type]
    spellings = ((_VISION_PREFIX, prefixes.vision), (_TEXT_PREFIX, prefixes.text), (_HEAD_PREFIX, "lm_head."))
    for pattern, prefix in spellings:
        renamed, count = pattern.subn(prefix, stored)
        if count:
            return renamed
    return stored
