"""A Qwen3 or Qwen3-MoE language model as the decoder of a Qwen3-VL.

Every weight is taken as it is, under the names of the vision-language layout; with text alone the result computes what
the language model did. Experts, which the language model stores apart, are stacked and transposed as Qwen3-VL-MoE
stores them. Rotary frequencies keep their base; each now turns by time, height or width, which are equal for text.
Source: the reference's `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM` and `Qwen3VLMoeForConditionalGeneration`.
"""

import functools
from typing import Any

import numpy as np

from qwenvl_jax.assemble.ingredient import Dropped, Ingredient, Piece, number
from qwenvl_jax.checkpoint import hf
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError

# Model type of the result, by that of the source.
_RESULT_TYPES = {"qwen3": "qwen3_vl", "qwen3_moe": "qwen3_vl_moe"}
# Frequencies of height and of width, out of all, in the public sizes: [24, 20, 20] of 64.
_SECTION = (20, 64)
# Which of an expert's matrices each stacked tensor joins.
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def mrope_section(head_dim: int) -> list[int]:
    """How many frequencies turn by time, height and width: 24:20:20 of half a head, height and width rounded down."""
    half = head_dim // 2
    side = half * _SECTION[0] // _SECTION[1]
    return [half - 2 * side, side, side]


def result_type(source: Ingredient) -> str:
    """The model type of the result.

    Raises:
      CheckpointError: the source is no Qwen3.
    """
    found = source.config.get("model_type")
    if found not in _RESULT_TYPES:
        raise CheckpointError(
            f"{source.where}: model_type {found!r} is no language model for this ({', '.join(_RESULT_TYPES)}); "
            "give --text such a folder, as Qwen/Qwen3-4B-Base."
        )
    return _RESULT_TYPES[found]


def text_config(source: Ingredient) -> dict[str, Any]:
    """The text_config of the result in the public layout; what it says is checked where it is read.

    Raises:
      CheckpointError: rotary settings that are no object, sizes that are no numbers, or experts whose weights are not
        normalised, which Qwen3-VL-MoE has no place for.
    """
    values, where = {key: value for key, value in source.config.items() if value is not None}, source.where
    sparse = values.pop("model_type") == "qwen3_moe"
    # What a file leaves out is the default of the source's class, not of Qwen3-VL's.
    values.setdefault("max_position_embeddings", 32768)
    if "head_dim" not in values:
        width, heads = (number(values, key, 1, where) for key in ("hidden_size", "num_attention_heads"))
        values["head_dim"] = width // heads if sparse else 128
    if sparse and values.get("norm_topk_prob") is not True:
        raise CheckpointError(
            f"{where}: norm_topk_prob must be true, since Qwen3-VL-MoE always normalises the weights of the experts "
            "chosen; give another model."
        )
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key, {}), dict):
            raise CheckpointError(f"{where}: {key} must be an object; fetch the file again.")
    head_dim = number(values, "head_dim", 128, where)
    rope = {"mrope_section": mrope_section(head_dim), "mrope_interleaved": True}
    values["rope_parameters"] = {**values.get("rope_parameters", {}), **rope}
    return {**values, "model_type": f"{result_type(source)}_text"}


def decoder_pieces(source: Ingredient, config: QwenVLConfig) -> tuple[list[Piece], list[Dropped]]:
    """The tensors of the result's decoder, and what of the source has no place in it.

    Args:
      source: the language model.
      config: shape of the result.

    Raises:
      CheckpointError: the source's tensors do not fit its config.json, or it is tied and has a head of its own.
    """
    t, prefixes = config.text, hf.PREFIXES[config.model_type]
    source.check_count(t.num_hidden_layers, "layers")
    if t.moe is not None:
        source.check_count(t.moe.num_experts, "experts")
    wanted: dict[str, tuple[int, ...]] = {}
    pieces = []
    for entry in hf.tensor_table(config):
        if entry.public.startswith(prefixes.vision):
            continue
        for name in entry.names():
            # The language model's own name for it.
            stored = name.replace(prefixes.text, "model.", 1)
            if t.moe is not None and (parts := _PARTS.get(stored.rpartition(".mlp.experts.")[2])):
                pieces.append(_stacked(source, entry, name, stored, parts, t.moe.num_experts, wanted))
            else:
                wanted[stored] = entry.shape
                pieces.append(Piece(name, entry.shape, functools.partial(source.read, stored)))
    dropped = source.match(wanted, lambda name: _drop(name, t.tie_word_embeddings))
    if any(group.name == hf.HEAD for group in dropped):
        _check_tied(source, prefixes.embedding.replace(prefixes.text, "model.", 1))
    return pieces, dropped


def _stacked(
    source: Ingredient, entry: hf.Entry, name: str, stored: str, parts: tuple[str, ...], count: int, wanted: dict
) -> Piece:
    """The experts of one layer as one tensor, [count, inputs, outputs], as released; adds their sources to `wanted`.

    `parts` are joined along their outputs. Where in and out are equal, so that readers cannot tell them apart, the axes
    are exchanged, as `Entry.is_swapped` says.
    """
    experts = stored.rpartition(".")[0]
    _, inputs, outputs = entry.shape
    names = [[f"{experts}.{e}.{part}_proj.weight" for part in parts] for e in range(count)]
    wanted |= {one: (outputs // len(parts), inputs) for expert in names for one in expert}

    def make() -> np.ndarray:
        def one(expert: list[str]) -> np.ndarray:
            joined = np.concatenate([source.read(part) for part in expert])
            return joined if entry.is_swapped(entry.shape) else joined.T

        first = one(names[0])
        whole = np.empty((count, *first.shape), first.dtype)
        whole[0] = first
        for e, expert in enumerate(names[1:], 1):
            whole[e] = one(expert)
        return whole

    return Piece(name, entry.shape, make)


def _drop(name: str, tied: bool) -> str | None:
    """The group with which a tensor of the source is dropped: a tied head that is stored too, rotary buffers."""
    if name == hf.HEAD and tied:
        return name
    return "rotary inv_freq" if name.endswith("rotary_emb.inv_freq") else None


def _check_tied(source: Ingredient, embedding: str) -> None:
    if not np.array_equal(source.read(hf.HEAD), source.read(embedding)):
        raise CheckpointError(
            f"{source.folder}: config.json says tie_word_embeddings, but {hf.HEAD} differs from {embedding}; set "
            "tie_word_embeddings to false, or remove the head."
        )
