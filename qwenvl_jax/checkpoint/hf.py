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

VISION = "model.visual."
TEXT = "model.language_model."
EMBEDDING = f"{TEXT}embed_tokens.weight"
HEAD = "lm_head.weight"


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
    """

    public: str
    path: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    layers: int | None = None

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
        return tensor.reshape(self.split).transpose(self.order)

    def to_public(self, layer: np.ndarray) -> np.ndarray:
        """One layer of the parameter as the public tensor; the inverse of `to_native`."""
        return layer.transpose(np.argsort(self.order)).reshape(self.shape)


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


def _layer_norm(public: str, path: str, width: int, layers=None):
    yield _same(f"{public}.weight", f"{path}.scale", width, layers=layers)
    yield _same(f"{public}.bias", f"{path}.bias", width, layers=layers)


def tensor_table(config: QwenVLConfig) -> tuple[Entry, ...]:
    """Every tensor of a model of this shape, in the order of the computation. Source: SPEC of the public checkpoints,
    the reference's `Qwen3VLForConditionalGeneration.state_dict`."""
    return (*_vision_entries(config), *_text_entries(config))


def _vision_entries(config: QwenVLConfig) -> Iterable[Entry]:
    v = config.vision
    D, F, Y, heads = v.hidden_size, v.intermediate_size, v.depth, (v.num_heads, v.hidden_size // v.num_heads)
    conv = (D, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    # The patch convolution's stride is its kernel, so it is a product with the flattened patch.
    yield Entry(f"{VISION}patch_embed.proj.weight", "vision.patch_embed.kernel", conv, (D, math.prod(conv[1:])), (1, 0))
    yield _bias(f"{VISION}patch_embed.proj.bias", "vision.patch_embed.bias", (D,))
    yield _same(f"{VISION}pos_embed.weight", "vision.pos_embed.table", v.num_position_embeddings, D)
    block, path = f"{VISION}blocks.{{}}.", "vision.blocks."
    yield from _layer_norm(f"{block}norm1", f"{path}norm1", D, layers=Y)
    yield from _linear_and_bias(f"{block}attn.qkv", f"{path}attn.qkv", (3, *heads), (D,), Y)
    yield from _linear_and_bias(f"{block}attn.proj", f"{path}attn.proj", (D,), heads, Y)
    yield from _layer_norm(f"{block}norm2", f"{path}norm2", D, layers=Y)
    yield from _linear_and_bias(f"{block}mlp.linear_fc1", f"{path}mlp.fc1", (F,), (D,), Y)
    yield from _linear_and_bias(f"{block}mlp.linear_fc2", f"{path}mlp.fc2", (D,), (F,), Y)
    wide, out, taps = v.spatial_merge_size**2 * D, v.out_hidden_size, len(v.deepstack_visual_indexes)
    mergers = [(f"{VISION}merger.", "merger.", D, None)]
    if taps:
        mergers.append((f"{VISION}deepstack_merger_list.{{}}.", "deepstack.", wide, taps))
    for public, path, norm, layers in mergers:
        yield from _layer_norm(f"{public}norm", f"{path}norm", norm, layers=layers)
        yield from _linear_and_bias(f"{public}linear_fc1", f"{path}fc1", (wide,), (wide,), layers)
        yield from _linear_and_bias(f"{public}linear_fc2", f"{path}fc2", (out,), (wide,), layers)


def _text_entries(config: QwenVLConfig) -> Iterable[Entry]:
    t = config.text
    H, F, V, Y, E = t.hidden_size, t.intermediate_size, t.vocab_size, t.num_hidden_layers, t.head_dim
    heads, kv_heads = (t.num_attention_heads, E), (t.num_key_value_heads, E)
    yield _same(EMBEDDING, "text.embed.table", V, H)
    layer, path = f"{TEXT}layers.{{}}.", "text.layers."
    yield _same(f"{layer}input_layernorm.weight", f"{path}input_norm.scale", H, layers=Y)
    for name, out in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield _linear(f"{layer}self_attn.{name}_proj.weight", f"{path}attn.{name}.kernel", out, (H,), Y)
    yield _linear(f"{layer}self_attn.o_proj.weight", f"{path}attn.o.kernel", (H,), heads, Y)
    for name in ("q_norm", "k_norm"):
        yield _same(f"{layer}self_attn.{name}.weight", f"{path}attn.{name}.scale", E, layers=Y)
    yield _same(f"{layer}post_attention_layernorm.weight", f"{path}post_attention_norm.scale", H, layers=Y)
    for name, out, inp in (("gate", F, H), ("up", F, H), ("down", H, F)):
        yield _linear(f"{layer}mlp.{name}_proj.weight", f"{path}mlp.{name}.kernel", (out,), (inp,), Y)
    yield _same(f"{TEXT}norm.weight", "text.norm.scale", H)
    if not t.tie_word_embeddings:
        yield _linear(HEAD, "text.head.kernel", (V,), (H,))


def parameter_count(config: QwenVLConfig) -> tuple[int, int]:
    """(all parameters, those of tower and mergers) of a model of this shape, a tied head counted once."""
    sizes = [(entry, math.prod(entry.native_shape)) for entry in tensor_table(config)]
    return sum(n for _, n in sizes), sum(n for entry, n in sizes if entry.public.startswith(VISION))


_OLD_PREFIXES = (
    (re.compile(r"^visual\."), VISION),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), TEXT),
)
_BUFFER = re.compile(r"(^|\.)rotary_(pos_)?emb\.(original_)?inv_freq$")


def current_name(stored: str) -> str | None:
    """The name of today's layout for a stored tensor, or None for one that is to be ignored.

    Prefixes of earlier releases are taken for what they meant. Ignored are buffers of rotary frequencies, which follow
    from the configuration.
    """
    if _BUFFER.search(stored):
        return None
    for pattern, prefix in _OLD_PREFIXES:
        renamed, count = pattern.subn(prefix, stored)
        if count:
            return renamed
    return stored
