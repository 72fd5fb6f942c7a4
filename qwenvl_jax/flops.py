"""What a training step costs in floating-point operations, counted from what is in its batch, and model FLOPs use.

Counted are the products that the model needs, 2 m n k for [m, k] times [k, n]:

- of tokens and patches that are there, padding left out;
- attention for each sample, frame and window by itself, never for a packed row; in the decoder the causal half only;
- the vision tower, the mergers, the router, the experts that a token goes through, the output projection;
- backward, a product for the gradient of a weight that learns, and one for the gradient of its input where anything
  before it learns. What rematerialization makes again is not counted, nor are adapters' own small products.

    MFU = FLOPs of the step / (seconds of the step * devices * peak FLOPs a second of a device)

The definition of MFU: PaLM (arXiv 2204.02311), appendix B; there attention is counted for whole rows.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.batch import Batch
from qwenvl_jax.config import QwenVLConfig, TextConfig, VisionConfig

# Peak bf16 FLOPs a second, dense, of one core of a TPU, by JAX's name of the device. A device has one core or, as v5p
# and v4 mostly, two. From the pages of each at cloud.google.com/tpu/docs, where figures are for a chip: v4 (275e12) and
# v5p (459e12) have two cores, and so has tpu7x (2307e12), whose cores are devices of their own.
TPU_CORE_PEAKS = {
    "TPU v4": 137.5e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 229.5e12,
    "TPU v5p": 229.5e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}
# The same of GPUs, by what the name of the device holds; the first that fits. From NVIDIA's data sheets, not sparse.
GPU_PEAKS = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
)


def peak_flops(device: Any) -> float | None:
    """The peak bf16 FLOPs a second of a `jax.Device`; None of one that is not in the tables, a CPU say."""
    kind = device.device_kind
    if kind in TPU_CORE_PEAKS:
        return TPU_CORE_PEAKS[kind] * getattr(device, "num_cores", 1)
    return next((peak for name, peak in GPU_PEAKS if name in kind), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is in a batch, as far as the cost of a step follows from it.

    Attributes:
      tokens: token slots that hold a token.
      vision_tokens: those of them that are vision tokens.
      text_pairs: pairs of a query and a key that it sees in a decoder layer: n (n + 1) / 2 for a sample of n tokens.
      patches: patch slots that hold a patch.
      frame_pairs: pairs of patches of the same frame: n^2 for each.
      window_pairs: pairs of patches of the same attention window; 0 without windows.
    """

    tokens: int = 0
    vision_tokens: int = 0
    text_pairs: int = 0
    patches: int = 0
    frame_pairs: int = 0
    window_pairs: int = 0

    @classmethod
    def of(cls, batch: Batch) -> "Work":
        """Counts a batch of NumPy arrays."""
        samples = _lengths(batch.segment_ids)
        frames = [_lengths(rows.segment_ids) for rows in batch.vision]
        windows = [_lengths(rows.windows) for rows in batch.vision if rows.windows is not None]
        return cls(
            tokens=int(samples.sum()),
            vision_tokens=int(np.count_nonzero(np.asarray(batch.vision_index) >= 0)),
            text_pairs=int((samples * (samples + 1) // 2).sum()),
            patches=sum(int(lengths.sum()) for lengths in frames),
            frame_pairs=sum(int((lengths**2).sum()) for lengths in frames),
            window_pairs=sum(int((lengths**2).sum()) for lengths in windows),
        )

    @classmethod
    def of_frames(cls, vision: VisionConfig, held: Mapping[int, int]) -> "Work":
        """The tower's work of so many patches in frames of each size, given in patches, all of whole windows."""
        window = vision.window_size // vision.patch_size if vision.window_size else 0
        patches, pairs = sum(held.values()), sum(size * count for size, count in held.items())
        return cls(patches=patches, frame_pairs=pairs, window_pairs=patches * window**2)

    def __add__(self, other: "Work") -> "Work":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Work(**sums)


def _lengths(numbers) -> np.ndarray:
    """i64[n], how many slots each run of a number in each row has; 0 is padding."""
    rows = np.asarray(numbers, np.int64).reshape(-1, np.shape(numbers)[-1])
    width = int(rows.max(initial=0)) + 1
    counts = np.bincount((np.arange(len(rows))[:, None] * width + rows).reshape(-1), minlength=len(rows) * width)
    return counts.reshape(len(rows), width)[:, 1:].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a step: those of the forward pass, and those that the gradients take beyond them."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of the whole step; the update, which is small, left out."""
        return self.forward + self.backward


def step_flops(config: QwenVLConfig, work: Work, learning: Collection[str]) -> Flops:
    """The FLOPs of a training step.

    Args:
      config: of the model.
      work: what is in the batch.
      learning: dotted names of the weights that learn, such as "text.layers.mlp.up.kernel"; none for a forward pass.
    """
    rates = _rates(config, frozenset(learning))
    # Costs of merged tokens come in whole tokens, of `_unit` patches each.
    forward, backward = (
        sum(getattr(work, name) * rate[i] for name, rate in rates.items()) // _unit(config) for i in (0, 1)
    )
    return Flops(forward, backward)


def _unit(config: QwenVLConfig) -> int:
    return config.vision.spatial_merge_size**2


@functools.lru_cache(maxsize=32)
def _rates(config: QwenVLConfig, learning: frozenset[str]) -> dict[str, tuple[int, int]]:
    """Forward and backward FLOPs of `_unit` of each kind of work, to which a step's are proportional."""
    names = ("tokens", "text_pairs", "patches", "frame_pairs", "window_pairs")
    counts = {name: _counted(config, Work(**{name: _unit(config)}), learning) for name in names}
    return {name: (count.forward, count.backward) for name, count in counts.items()}


def _counted(config: QwenVLConfig, work: Work, learning: frozenset[str]) -> "_Count":
    count = _Count(learning)
    seen = _vision(count, config.vision, work)
    merged = work.patches // _unit(config)
    features = [_merger(count, config.vision, "merger", merged, seen[-1])]
    features += [_merger(count, config.vision, "deepstack", merged, live) for live in seen[:-1]]
    live = count.learns("text.embed") or features[0]
    for layer in range(config.text.num_hidden_layers):
        live = _text_layer(count, config.text, work, live)
        live |= layer + 1 < len(features) and features[layer + 1]
    live |= count.learns("text.norm")
    head = "text.embed.table" if config.text.tie_word_embeddings else "text.head.kernel"
    count.product(head, 2 * work.tokens * config.text.hidden_size * config.text.vocab_size, live)
    return count


class _Count:
    """Adds up products.

    A value is `live` if a gradient goes through it: something that it was made with learns.
    """

    def __init__(self, learning: frozenset[str]):
        self.forward, self.backward = 0, 0
        self._learning = learning

    def product(self, weight: str, flops: int, live: bool) -> bool:
        """Counts values times a weight, and returns whether the result is live."""
        module = weight.rpartition(".")[0]
        self.forward += flops
        self.backward += flops * ((weight in self._learning) + live)
        return live or self.learns(module)

    def attention(self, flops: int, live: bool) -> None:
        """Counts scores and the weighted sum of values: two products, each with two factors that have gradients."""
        self.forward += flops
        self.backward += 2 * flops * live

    def learns(self, module: str) -> bool:
        """Whether any weight in a module learns."""
        return any(name.startswith(module + ".") for name in self._learning)


def _vision(count: _Count, config: VisionConfig, work: Work) -> list[bool]:
    """The tower; whether the outputs of the DeepStack blocks, and the last output, are live."""
    D, F = config.hidden_size, config.intermediate_size
    live = count.product("vision.patch_embed.kernel", 2 * work.patches * config.patch_dim * D, False)
    live |= count.learns("vision.pos_embed")
    outputs = []
    for block in range(config.depth):
        windowed = config.window_size and block not in config.fullatt_block_indexes
        pairs = work.window_pairs if windowed else work.frame_pairs
        inner = live or count.learns("vision.blocks.norm1")
        inner = count.product("vision.blocks.attn.qkv.kernel", 6 * work.patches * D * D, inner)
        count.attention(4 * pairs * D, inner)
        live |= count.product("vision.blocks.attn.proj.kernel", 2 * work.patches * D * D, inner)
        inner = live or count.learns("vision.blocks.norm2")
        first = ("gate", "up") if config.gated_mlp else ("fc1",)
        into = [count.product(f"vision.blocks.mlp.{name}.kernel", 2 * work.patches * D * F, inner) for name in first]
        last = "down" if config.gated_mlp else "fc2"
        live |= count.product(f"vision.blocks.mlp.{last}.kernel", 2 * work.patches * D * F, any(into))
        outputs.append(live)
    return [outputs[tap] for tap in config.deepstack_visual_indexes] + outputs[-1:]


def _merger(count: _Count, config: VisionConfig, name: str, merged: int, live: bool) -> bool:
    wide = config.spatial_merge_size**2 * config.hidden_size
    live |= count.learns(f"{name}.norm")
    live = count.product(f"{name}.fc1.kernel", 2 * merged * wide * wide, live)
    return count.product(f"{name}.fc2.kernel", 2 * merged * wide * config.out_hidden_size, live)


def _text_layer(count: _Count, config: TextConfig, work: Work, live: bool) -> bool:
    H, E = config.hidden_size, config.head_dim
    inner = live or count.learns("text.layers.input_norm")
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    made = [
        count.product(f"text.layers.attn.{name}.kernel", 2 * work.tokens * H * number * E, inner)
        or count.learns(f"text.layers.attn.{name}_norm")
        for name, number in heads.items()
    ]
    width = config.num_attention_heads * E
    count.attention(4 * work.text_pairs * width, any(made))
    live |= count.product("text.layers.attn.o.kernel", 2 * work.tokens * width * H, any(made))
    inner = live or count.learns("text.layers.post_attention_norm")
    return live | (_experts(count, config, work, inner) if config.moe else _mlp(count, config, work, inner))


def _mlp(count: _Count, config: TextConfig, work: Work, live: bool) -> bool:
    flops = 2 * work.tokens * config.hidden_size * config.intermediate_size
    into = [count.product(f"text.layers.mlp.{name}.kernel", flops, live) for name in ("gate", "up")]
    return count.product("text.layers.mlp.down.kernel", flops, any(into))


def _experts(count: _Count, config: TextConfig, work: Work, live: bool) -> bool:
    assert config.moe is not None  # asked for only where the decoder has experts
    routed = count.product(
        "text.layers.mlp.router.kernel", 2 * work.tokens * config.hidden_size * config.moe.num_experts, live
    )
    rows = work.tokens * config.moe.num_experts_per_tok
    flops = 2 * rows * config.hidden_size * config.moe.moe_intermediate_size
    # One module owns both weights, so what is between them is live with either; a frozen first one is rare.
    inner = count.product("text.layers.mlp.experts.gate_up", 2 * flops, live)
    return count.product("text.layers.mlp.experts.down", flops, inner) or routed


def utilization(flops: float, seconds: float, devices: Sequence[Any]) -> float | None:
    """MFU, from 0 to 1, of a step on these devices; None where the peak of one is not known."""
    peaks = [peak_flops(device) for device in devices]
    if not peaks or not seconds or any(peak is None for peak in peaks):
        return None
    return flops / (seconds * math.fsum(peak for peak in peaks if peak is not None))
