"""Memory of a conversion: that of its slices, however many layers there are."""

import dataclasses

from qwenvl_jax.config import MoeConfig, TextConfig
from tests.checkpoint.shape import TINY_MOE
from tools import bench_convert

# 3.5 MB a layer, most of it in two tensors of experts, each far below what the process holds anyway: how many are
# in memory at the highest moment is a matter of the threads' timing.
TEXT = TextConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256),
)
VISION = dataclasses.replace(TINY_MOE.vision, out_hidden_size=256)


def test_six_times_the_layers_take_no_more(tmp_path):
    peaks = []
    for layers in (4, 24):
        folder = tmp_path / str(layers)
        folder.mkdir()
        text = dataclasses.replace(TEXT, num_hidden_layers=layers)
        config = dataclasses.replace(TINY_MOE, text=text, vision=VISION)
        size = bench_convert._write(config, folder / "public", sparse=True)
        assert size > layers * 3_500_000
        peaks.append(bench_convert._convert(folder / "public", folder / "native", processes=1, discard=False)[2])
        assert (folder / "native" / "native" / "index.json").is_file()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 100e6, peaks
