"""A Qwen3 or Qwen3-MoE language model as the decoder of a Qwen3-VL.

Every weight is taken as it is, under the names of the vision-language layout; with text alone the result computes what
the language model did. Experts, which the language model stores apart, are stacked and transposed as Qwen3-VL-MoE
stores them. Rotary frequencies keep their base; each now turns by time, height or width, which are equal for text.
Source: the reference's `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM` and `Qwen3VLMoeForConditionalGeneration`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from qwenvl_jax.assemble.ingredient import Dropped, Ingredient, Piece, number, only
from qwenvl_jax.checkpoint import hf
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError

# Model type of the result, by that of the source.
RESULT_TYPES = {"qwen3": "qwen3_vl", "qwen3_moe": "qwen3_vl_moe"}
# What Qwen3-VL-MoE computes and does not ask its config about. The first is meant where the file says nothing, as in
# the reference's class: weights of experts that are not normalised again have no place in Qwen3-VL-MoE.
_ONLY_MOE = {"norm_topk_prob": (False, True), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
_MOE_KEYS = {
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "num_experts", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef", "output_router_logits",
}  # fmt: skip
# Frequencies of height and of width, out of all, in the public sizes: [24, 20, 20] of 64.
_SECTION = (20, 64)
_EXPERT = "{}mlp.experts.{}.{}_proj.weight"


@dataclasses.dataclass(frozen=True)
class Experts:
    """The sparse feed-forward layers of a Qwen3-MoE.

    Attributes:
      count: experts in a layer.
      active: experts that a token goes through.
      width: of an expert.
      aux_loss: coefficient of the balance loss, for training.
    """

    count: int
    active: int
    width: int
    aux_loss: float

    def to_json(self) -> dict[str, Any]:
        """The keys of the result's text_config."""
        return {
            "num_experts": self.count,
            "num_experts_per_tok": self.active,
            "moe_intermediate_size": self.width,
            "router_aux_loss_coef": self.aux_loss,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


def mrope_section(head_dim: int) -> list[int]:
    """How many frequencies turn by time, height and width: 24:20:20 of half a head, height and width rounded down."""
    half = head_dim // 2
    side = half * _SECTION[0] // _SECTION[1]
    return [half - 2 * side, side, side]


def check_type(source: Ingredient) -> None:
    """Refuses a folder that is no Qwen3.

    Raises:
      CheckpointError: names its model type.
    """
    if source.config.get("model_type") not in RESULT_TYPES:
        raise CheckpointError(
            f"{source.where}: model_type {source.config.get('model_type')!r} is no language model that is supported "
            f"({', '.join(RESULT_TYPES)}); give --text such a folder, as Qwen/Qwen3-4B-Base."
        )


def text_config(source: Ingredient) -> dict[str, Any]:
    """The text_config of the result, but for experts, in the public layout; values are checked where it is read.

    Raises:
      CheckpointError: rotary settings that are no object, or sizes that are no numbers.
    """
    values = {key: value for key, value in source.config.items() if value is not None and key not in _MOE_KEYS}
    values.pop("model_type")
    # What a file leaves out is the default of the source's class, not of Qwen3-VL's.
    values.setdefault("max_position_embeddings", 32768)
    if "head_dim" not in values:
        apart = source.config["model_type"] == "qwen3"
        width, heads = (number(values, key, 1, source.where) for key in ("hidden_size", "num_attention_heads"))
        values["head_dim"] = 128 if apart else width // heads
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key, {}), dict):
            raise CheckpointError(f"{source.where}: {key} must be an object; fetch the file again.")
    head_dim = number(values, "head_dim", 128, source.where)
    rope = {"mrope_section": mrope_section(head_dim), "mrope_interleaved": True}
    values["rope_parameters"] = {**values.get("rope_parameters", {}), **rope}
    return {**values, "model_type": "qwen3_vl_text"}


def read_experts(source: Ingredient) -> Experts | None:
    """The sparse layers of the source, or None of a dense model.

    Raises:
      CheckpointError: a setting that Qwen3-VL-MoE has no place for.
    """
    values, where = source.config, source.where
    if values["model_type"] == "qwen3":
        return None
    only(values, _ONLY_MOE, where)
    if not values.get("norm_topk_prob"):
        raise CheckpointError(
            f"{where}: norm_topk_prob is false, but Qwen3-VL-MoE always normalises the weights of the experts chosen; "
            "give another model."
        )
    count, aux_loss = values.get("num_experts"), values.get("router_aux_loss_coef", 0.001)
    if not isinstance(aux_loss, int | float):
        raise CheckpointError(f"{where}: router_aux_loss_coef must be a number, but is {aux_loss!r}; mend the file.")
    experts = Experts(
        count=number(values, "num_local_experts" if count is None else "num_experts", 128, where),
        active=number(values, "num_experts_per_tok", 8, where),
        width=number(values, "moe_intermediate_size", 768, where),
        aux_loss=float(aux_loss),
    )
    width = number(values, "hidden_size", 2048, where)
    if width in (experts.width, 2 * experts.width):
        raise CheckpointError(
            f"{where}: hidden_size={width} is once or twice moe_intermediate_size={experts.width}; readers of "
            "Qwen3-VL-MoE tell the axes of an expert by their sizes, and could not; give another model."
        )
    source.check_layers(experts.count)
    return experts


def decoder_pieces(
    source: Ingredient, config: QwenVLConfig, experts: Experts | None
) -> tuple[list[Piece], list[Dropped]]:
    """The tensors of the result's decoder, and what of the source has no place in it.

    Args:
      source: the language model.
      config: shape of the result, its feed-forward layers taken for dense ones.
      experts: what they really are, if not dense.

    Raises:
      CheckpointError: the source's tensors do not fit its config.json, or it is tied and has a head of its own.
    """
    t = config.text
    source.check_layers(t.num_hidden_layers)
    wanted: dict[str, tuple[int, ...]] = {}
    pieces = []
    table = [entry for entry in hf.tensor_table(config) if not entry.public.startswith(hf.VISION)]
    for entry in table:
        # Qwen3-VL-MoE keeps an intermediate_size that no layer has.
        if experts is not None and ".mlp." in entry.public:
            continue
        for name in entry.names():
            theirs = _stored(name)
            wanted[theirs] = entry.shape
            pieces.append(Piece(name, entry.shape, functools.partial(source.read, theirs)))
    if experts is not None:
        for i in range(t.num_hidden_layers):
            pieces += _expert_pieces(source, f"{hf.TEXT}layers.{i}.", t.hidden_size, experts, wanted)
    dropped = source.match(wanted, lambda name: _drop(name, t.tie_word_embeddings))
    if any(group.name == hf.HEAD for group in dropped):
        _check_tied(source)
    return pieces, dropped


def _stored(name: str) -> str:
    """The language model's name of a tensor of the result."""
    return name.replace(hf.TEXT, "model.", 1)


def _expert_pieces(source: Ingredient, layer: str, width: int, experts: Experts, wanted: dict) -> list[Piece]:
    """Router and experts of one layer; adds the source tensors to `wanted`."""
    E, F, theirs = experts.count, experts.width, _stored(layer)
    router = f"{theirs}mlp.gate.weight"
    wanted[router] = (E, width)
    for e in range(E):
        wanted |= {_EXPERT.format(theirs, e, name): (F, width) for name in ("gate", "up")}
        wanted[_EXPERT.format(theirs, e, "down")] = (width, F)
    return [
        Piece(f"{layer}mlp.gate.weight", (E, width), functools.partial(source.read, router)),
        Piece(
            f"{layer}mlp.experts.gate_up_proj",
            (E, width, 2 * F),
            functools.partial(_stack, source, theirs, E, ("gate", "up")),
        ),
        Piece(f"{layer}mlp.experts.down_proj", (E, F, width), functools.partial(_stack, source, theirs, E, ("down",))),
    ]


def _stack(source: Ingredient, layer: str, count: int, names: tuple[str, ...]) -> np.ndarray:
    """[E, inputs, outputs]: the experts' matrices, transposed; several are joined along their outputs."""
    whole = None
    for e in range(count):
        one = np.concatenate([source.read(_EXPERT.format(layer, e, name)).T for name in names], axis=1)
        if whole is None:
            whole = np.empty((count, *one.shape), one.dtype)
        whole[e] = one
    return whole


def _drop(name: str, tied: bool) -> str | None:
    """The group with which a tensor of the source is dropped: a tied head that is stored too, rotary buffers."""
    if name == hf.HEAD and tied:
        return name
    return "rotary inv_freq" if hf.current_name(name) is None else None


def _check_tied(source: Ingredient) -> None:
    embedding = _stored(hf.EMBEDDING)
    if not np.array_equal(source.read(hf.HEAD), source.read(embedding)):
        raise CheckpointError(
            f"{source.folder}: config.json says tie_word_embeddings, but {hf.HEAD} differs from {embedding}; set "
            "tie_word_embeddings to false, or remove the head."
        )
