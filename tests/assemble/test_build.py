"""The folder that `assemble` writes: whole, read by everyone, made of nothing but its ingredients and fresh mergers."""

import collections
import tracemalloc

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import qwenvl_jax as qv
from qwenvl_jax import cli
from qwenvl_jax.assemble.build import assemble
from qwenvl_jax.assemble.ingredient import Ingredient
from qwenvl_jax.assemble.tower import VISION
from qwenvl_jax.checkpoint import hf
from qwenvl_jax.checkpoint.tensors import INDEX
from qwenvl_jax.train.metrics import read_metrics
from tests.assemble.ingredients import load_reference, load_tensors, write_qwen3
from tests.tiny import tiny_tokenizer
from tests.train.tiny_run import write_tiny_run


def test_the_reference_loads_it(assembled):
    """No tensor missing, unexpected or misshaped, and the settings that were carried over."""
    model = load_reference(assembled[0])
    assert model.config.text_config.rope_parameters["rope_theta"] == 30_000.0
    assert model.config.vision_config.deepstack_visual_indexes == [0, 1, 2]
    tokenizer = tiny_tokenizer()
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == ends


def test_tied_in_several_files(ingredients, tmp_path):
    out = tmp_path / "model"
    assemble(ingredients["siglip2"][0], ingredients["tied"][0], out, max_shard_bytes=30_000)
    assert (out / INDEX).is_file() and len(list(out.glob("*.safetensors"))) > 3
    model, source = load_reference(out), ingredients["tied"][1]
    weights = load_tensors(out)
    assert {value.dtype.name for value in weights.values()} == {"bfloat16"}
    assert hf.HEAD not in weights
    expected = source.model.embed_tokens.weight.to(torch.bfloat16).float()
    assert torch.equal(model.lm_head.weight, expected)


def test_ours_answers(assembled, clip):
    model = qv.QwenVL.from_pretrained(assembled[0], dtype="float32")
    processor = qv.Processor.from_pretrained(assembled[0])
    assert model.config.eos_token_ids == (processor.eos_token_id, processor.pad_token_id)
    assert processor.dialect == "official"
    parts = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "what happens in the video?"}]
    (answer,) = qv.generate(model, processor, [[{"role": "user", "content": parts}]], max_new_tokens=3)
    assert 1 <= len(answer.tokens) <= 3


def test_every_source_tensor_is_taken_once_or_named(ingredients, tmp_path, monkeypatch):
    reads, read = collections.Counter(), Ingredient.read
    monkeypatch.setattr(Ingredient, "read", lambda self, name: reads.update([(self.folder, name)]) or read(self, name))
    summary = assemble(ingredients["siglip"][0], ingredients["moe"][0], tmp_path / "model", side=4)
    assert set(reads.values()) == {1}
    for folder, groups in ((ingredients["siglip"][0], summary.dropped[0][1]), (ingredients["moe"][0], [])):
        left = [name for name in load_tensors(folder) if (folder, name) not in reads]
        assert len(left) == sum(group.tensors for group in groups)
        assert all(any(name == g.name or name.startswith(f"{g.name}.") for g in groups) for name in left)
    names = {group.name for group in summary.dropped[0][1]}
    assert names == {"text_model", "logit_scale", "logit_bias", "vision_model.head", "vision_model.post_layernorm"}
    assert all(name in str(summary) for name in names)


def test_mergers_begin_as_the_model_s_own(assembled, ingredients, tmp_path):
    """Zero biases, norms of one, weights of deviation 1 / sqrt(fan-in), all of them the seed's; nothing else is."""
    weights = load_tensors(assembled[0])
    mergers = {name for name in weights if "merger" in name}
    assert len(mergers) == 6 * 4
    for name in mergers:
        value = weights[name]
        if value.ndim == 2:
            assert abs(value.std() * value.shape[1] ** 0.5 - 1) < 0.05 and abs(value.mean()) < 0.05 * value.std() * 5
        else:
            assert np.all(value == float(name.endswith("norm.weight")))
    large = [weights[name].ravel()[:500] for name in sorted(mergers) if weights[name].ndim == 2]
    assert np.abs(np.corrcoef(large) - np.eye(len(large))).max() < 0.25
    for seed, equal in ((0, True), (1, False)):
        out = tmp_path / str(seed)
        assemble(ingredients["siglip"][0], ingredients["untied"][0], out, dtype="float32", side=7, seed=seed)
        other = load_tensors(out)
        different = {name for name in weights if not np.array_equal(weights[name], other[name])}
        assert different == (set() if equal else {name for name in mergers if weights[name].ndim == 2})


def test_summary_counts_what_is_there(assembled):
    folder, summary = assembled
    weights = load_tensors(folder)
    sizes = {"mergers": 0, "tower": 0, "decoder": 0}
    for name, value in weights.items():
        part = "mergers" if "merger" in name else "tower" if name.startswith(VISION) else "decoder"
        sizes[part] += value.size
    assert summary.weights == sizes
    assert hf.parameter_count(summary.config) == (sum(sizes.values()), sizes["tower"] + sizes["mergers"])
    text = str(summary)
    assert f"{sum(sizes.values()):,} parameters in float32" in text
    for words in ("5x5 resized to 7x7", "fresh, seed 0", "DeepStack after blocks 0, 1, 2", "theta 30000", "untied"):
        assert words in text, text
    assert text.splitlines()[-1] == f"next: qwenvl-jax train CONFIG --model {folder} --trainable mergers"


def test_memory_is_that_of_a_file_not_of_the_model(ingredients, tmp_path):
    settings = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    write_qwen3(tmp_path / "text", **settings)
    tracemalloc.start()
    out, shard = tmp_path / "model", 4 * 10**6
    assemble(ingredients["siglip"][0], tmp_path / "text", out, dtype="float32", side=4, max_shard_bytes=shard)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert whole > 40 * 10**6
    assert peak < 4 * shard, f"{peak} bytes at the peak, {whole} written"


@pytest.mark.slow
def test_s0_moves_the_mergers_alone(ingredients, clip, tmp_path, monkeypatch, capsys):
    """The two commands, as the summary says: assemble, then two steps of a config that knows nothing of the model."""
    config = write_tiny_run(tmp_path, clip)
    monkeypatch.chdir(tmp_path)
    sources = ["--vision", str(ingredients["siglip2"][0]), "--text", str(ingredients["tied"][0])]
    assert cli.main(["assemble", *sources, "s0", "--dtype", "float32", "--deepstack", "0,3", "--positions", "6"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: qwenvl-jax ").split()
    command[1] = str(config)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main([*command, "--out", "run", "--stages.s0.steps", "1", "--stages.s1.steps", "1"]) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    before, after = (qv.QwenVL.from_pretrained(path, dtype="float32") for path in ("s0", "run/model"))
    assert before.config == after.config and before.config.vision.deepstack_visual_indexes == (0, 3)
    moved = set()
    for (path, one), (_, two) in zip(
        nnx.to_flat_state(nnx.state(before)), nnx.to_flat_state(nnx.state(after)), strict=True
    ):
        if not np.array_equal(one.get_value(), two.get_value()):
            moved.add(path[0])
    assert moved == {"merger", "deepstack"}


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_folder_is_taken(made, ingredients, tmp_path):
    out = tmp_path / "a" / "model"
    if made:
        out.mkdir(parents=True)
    assemble(ingredients["siglip"][0], ingredients["tied"][0], out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    ]
