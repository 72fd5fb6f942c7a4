"""Memory of a conversion: that of its slices, however many layers there are."""

import dataclasses

from qwenvl_jax.config import MoeConfig, TextConfig
from tests.checkpoint.shape import TINY_MOE
from tools import bench_convert

# 13 MB a layer, most of it in two tensors of experts.
TEXT = TextConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512),
)
VISION = dataclasses.replace(TINY_MOE.vision, out_hidden_size=512)


def test_three_times_the_layers_take_no_more(tmp_path):
    peaks = []
    for layers in (4, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        text = dataclasses.replace(TEXT, num_hidden_layers=layers)
        config = dataclasses.replace(TINY_MOE, text=text, vision=VISION)
        size = bench_convert._write(config, folder / "public", sparse=True)
        assert size > layers * 13_000_000
        peaks.append(bench_convert._convert(folder, processes=1, discard=False)[2])
        assert (folder / "native" / "native" / "index.json").is_file()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 300e6, peaks
