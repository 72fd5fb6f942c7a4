"""FLOPs counted from what is in a batch, against arithmetic written out and against what the compiler counts."""

import dataclasses

import jax
import numpy as np
import pytest

from qwenvl_jax import flops
from qwenvl_jax.batch import Batch
from qwenvl_jax.config import MoeConfig, QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.flops import Work, step_flops
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.train.config import StageConfig
from qwenvl_jax.train.state import ModelParts
from qwenvl_jax.train.step import make_loss
from tests.checkpoint.shape import GENERATIONS, TINY, TINY_MOE, TINY_QWEN2_5
from tests.parallel.meshed import even_config, everything

# Wide enough that what the compiler counts besides products (norms, softmax, activations) is little.
WIDE = QwenVLConfig(
    text=TextConfig(
        vocab_size=1000,
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        rope=RopeConfig(mrope_section=(24, 20, 20)),
    ),
    vision=VisionConfig(
        depth=3,
        hidden_size=256,
        intermediate_size=512,
        num_heads=2,
        out_hidden_size=384,
        deepstack_visual_indexes=(0, 1),
        num_position_embeddings=16,
    ),
)
SHORT = 128  # attention takes rows up to this length in one block


def full_batch(config: QwenVLConfig, rows: int = 2) -> Batch:
    """Rows that a sample with an image of 8 x 8 patches fills, so that nothing is padding."""
    rng = np.random.default_rng(0)

    def sample() -> Sample:
        tokens = rng.integers(0, 900, SHORT).astype(np.int32)
        index = np.full(SHORT, -1, np.int32)
        index[5:21] = np.arange(16)
        patches = rng.integers(0, 256, (64, config.vision.patch_dim), dtype=np.uint8)
        positions = np.repeat(np.arange(SHORT, dtype=np.int32)[:, None], 3, axis=1)
        weights = np.ones(SHORT, np.float32)
        return Sample(tokens, positions, tokens, weights, index, (Media("image", patches, (1, 8, 8)),))

    table = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(3, 0)
    return collate([[sample()] for _ in range(rows)], pixel_table=table, groups=rows, pad_token_id=0)


def counted(config: QwenVLConfig, batch: Batch, trainable: str) -> tuple[float, tuple[str, ...]]:
    """XLA's count of FLOPs of loss and gradients in the program before the compiler changes it, and what learns."""
    parts = ModelParts(config, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    stage = StageConfig(name="s", steps=1, trainable=trainable, loss_chunk=1 << 20, unroll=True)
    names, loss = parts.select(trainable), make_loss(parts, stage)
    shapes = {name: jax.ShapeDtypeStruct(weight.shape, weight.dtype) for name, weight in parts.weights.items()}
    learning = {name: shapes.pop(name) for name in names}
    gradients = jax.value_and_grad(lambda learning, frozen, batch: loss(learning | frozen, batch))
    return jax.jit(gradients).lower(learning, shapes, batch).cost_analysis()["flops"], names


@pytest.mark.parametrize("trainable", ["all", "mergers", r"^vision\."])
def test_as_the_compiler_counts(trainable):
    """Layers unrolled, since it counts the body of a loop once."""
    batch = full_batch(WIDE)
    compiled, names = counted(WIDE, batch, trainable)
    work = Work.of(batch)
    head = 2 * work.tokens * 384 * 1000
    # A row of this length is computed as a whole square; the causal half is what counts.
    square = dataclasses.replace(work, text_pairs=2 * SHORT**2)
    expected = step_flops(WIDE, square, names).total
    # The logits are made again in the backward pass.
    expected += head
    assert abs(compiled / expected - 1) < 0.03


def test_experts_as_the_compiler_counts():
    """On a CPU the rows of each expert are filled up to blocks, which this shape makes 1.5 times the work."""
    config = dataclasses.replace(
        WIDE, text=dataclasses.replace(WIDE.text, moe=MoeConfig(4, 2, 768), num_hidden_layers=2)
    )
    batch = full_batch(config)
    compiled, names = counted(config, batch, "all")
    square = dataclasses.replace(Work.of(batch), text_pairs=2 * SHORT**2)
    expected = step_flops(config, square, names).total + 2 * square.tokens * 384 * 1000
    rows = square.tokens * 2
    block = rows // 4 // 8
    filled = (rows // block + 4) * block / rows
    experts = 3 * 3 * 2 * rows * 384 * 768 * 2  # passes, matrices, a product; layers
    assert abs(compiled / (expected + (filled - 1) * experts) - 1) < 0.03


def test_what_is_in_a_batch():
    """Two samples in a row of ten slots, one in the next; three frames, windows of the first two."""
    segments = np.array([[1] * 3 + [2] * 5 + [0] * 2, [1] * 8 + [0] * 2], np.int32)
    batch = everything(even_config("qwen2_5_vl"))
    rows = dataclasses.replace(
        batch.vision[0],
        segment_ids=np.array([[[1] * 4 + [2] * 8 + [0] * 4], [[1] * 16]], np.int32),
        windows=np.array([[[1] * 4 + [2] * 4 + [3] * 4 + [0] * 4], [[1] * 12 + [2] * 4]], np.int32),
    )
    index = np.full((2, 10), -1, np.int32)
    index[0, :2] = 0, 1
    batch = dataclasses.replace(batch, segment_ids=segments, vision_index=index, vision=(rows, rows))
    assert Work.of(batch) == Work(
        tokens=16,
        vision_tokens=2,
        text_pairs=(3 * 4 + 5 * 6 + 8 * 9) // 2,
        patches=2 * 28,
        frame_pairs=2 * (4**2 + 8**2 + 16**2),
        window_pairs=2 * (3 * 4**2 + 12**2 + 4**2),
    )
    assert Work(1, 2, 3, 4, 5, 6) + Work(1, 1, 1, 1, 1, 1) == Work(2, 3, 4, 5, 6, 7)


def test_padding_and_packing_cost_nothing():
    """A sample costs the same beside others as alone, in rows as long as itself or longer."""
    config = even_config("qwen3_vl")
    batch = everything(config)
    lengths = [n for row in batch.segment_ids for n in np.bincount(row)[1:]]
    work = Work.of(batch)
    assert work.tokens == sum(lengths)
    assert work.text_pairs == sum(n * (n + 1) // 2 for n in lengths)
    wider = dataclasses.replace(batch, segment_ids=np.pad(batch.segment_ids, ((0, 0), (0, 30))))
    assert Work.of(wider) == work


@pytest.mark.parametrize("name", GENERATIONS)
def test_weights_times_tokens(name):
    """Without attention and vision, forward is two FLOPs for each token and each weight of a matrix that it meets."""
    config = even_config(name)
    parts = ModelParts(config, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    text = {n: w for n, w in parts.weights.items() if n.startswith("text.") and (w.inputs or "experts" in n)}
    met = sum(int(np.prod(w.shape)) * (config.text.moe.num_experts_per_tok / 8 if "experts" in n else 1)
              for n, w in text.items())  # fmt: skip
    if config.text.tie_word_embeddings:
        met += config.text.vocab_size * config.text.hidden_size
    cost = step_flops(config, Work(tokens=100), ())
    assert (cost.forward, cost.backward) == (200 * met, 0)
    # Everything learns: twice as much again; but no gradient goes to what has no weights before it.
    every = step_flops(config, Work(tokens=100), parts.names)
    assert every.backward == 2 * every.forward
    assert every.total == 3 * every.forward


def test_tower():
    """Of Qwen2.5-VL, whose second and fourth block attend to the frame and the others to windows."""
    config = TINY_QWEN2_5
    D, F, wide, H = 24, 18, 96, 20
    patches, frames, windows = 64, 1000, 300
    blocks = 4 * patches * 2 * (4 * D * D + 3 * D * F) + 4 * D * 2 * (frames + windows)
    merger = patches // 4 * 2 * (wide * wide + wide * H)
    embed = patches * 2 * config.vision.patch_dim * D
    work = Work(patches=patches, frame_pairs=frames, window_pairs=windows)
    assert step_flops(config, work, ()).forward == embed + blocks + merger


@pytest.mark.parametrize(
    ("learning", "share"),
    [
        (["text.head.kernel"], 1.0),  # its own gradient, and nothing before it
        (["text.norm.scale"], 1.0),  # the gradient of the head's input
        (["text.norm.scale", "text.head.kernel"], 2.0),
    ],
)
def test_only_what_learns_has_a_backward_pass(learning, share):
    work = Work(tokens=100, text_pairs=5050, patches=64, frame_pairs=64**2)
    assert step_flops(TINY, work, learning).backward == share * 2 * 100 * 20 * 50


def test_a_frozen_tower_has_no_backward_pass():
    """Mergers that learn cost their own gradients and a way back through the decoder, whose weights have none."""
    parts = ModelParts(TINY_MOE, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    seen, told = Work(patches=64, frame_pairs=64**2), Work(tokens=100, text_pairs=5050)
    mergers = parts.select("mergers")
    of_mergers = 3 * 16 * 2 * (96 * 96 + 96 * 20)
    # Their norms come before them and learn, so gradients reach them too.
    assert step_flops(TINY_MOE, seen, mergers).backward == 2 * of_mergers
    decoder = step_flops(TINY_MOE, told, mergers)
    attention = 3 * 4 * 5050 * 60
    assert decoder.backward == decoder.forward + attention


def test_adapters_have_gradients_go_through_what_they_adapt():
    """At the attention's last product of each layer: before the first nothing learns, after it all inputs do."""
    work = Work(tokens=100, text_pairs=5050)
    cost = step_flops(TINY, work, ["text.layers.attn.o.kernel_lora_a", "text.layers.attn.o.kernel_lora_b"])
    qkv, o, attention = 2 * 100 * 20 * (6 + 2 + 2) * 10, 2 * 100 * 60 * 20, 4 * 5050 * 60
    assert cost.backward == cost.forward - 3 * attention - qkv - o + 2 * 2 * attention


class Device:
    """What `flops` reads of a device that is not here."""

    def __init__(self, kind: str, **values):
        self.device_kind = kind
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        (Device("TPU v4", num_cores=2), 275e12),
        (Device("TPU v5 lite", num_cores=1), 197e12),
        (Device("TPU v5", num_cores=2), 459e12),
        (Device("TPU v6 lite", num_cores=1), 918e12),
        (Device("TPU7x", num_cores=1), 2307e12 / 2),
        (Device("NVIDIA A100-SXM4-80GB"), 312e12),
        (Device("NVIDIA H100 80GB HBM3"), 989e12),
        (Device("NVIDIA H100 PCIe"), 756e12),
        (Device("NVIDIA H200"), 989e12),
        (Device("NVIDIA B200"), 2250e12),
        (Device("NVIDIA GB200"), 2500e12),
        (Device("cpu"), None),
    ],
)
def test_peaks(device, peak):
    assert flops.peak_flops(device) == peak


def test_utilization():
    chips = [Device("TPU v6 lite", num_cores=1)] * 4
    assert flops.utilization(918e12, 0.5, chips) == pytest.approx(0.5)
    assert flops.utilization(918e12, 0.5, [*chips, *jax.devices("cpu")[:1]]) is None
