"""Bad ingredients: one line that names the file and the remedy, status 2, and nothing written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax import cli
from qwenvl_jax.assemble.build import assemble
from qwenvl_jax.assemble.ingredient import Ingredient
from qwenvl_jax.errors import CheckpointError
from tests.assemble.ingredients import edit_json, write_qwen3
from tests.tiny import tiny_tokenizer


@pytest.fixture
def place(ingredients, tmp_path, monkeypatch):
    """A folder with copies of a SigLIP 2, `vision`, and of a tied Qwen3, `text`, free to damage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ingredients["siglip"][0], tmp_path / "vision")
    shutil.copytree(ingredients["tied"][0], tmp_path / "text")
    return tmp_path


def _refused(place, capsys, *words, arguments=("--vision", "vision", "--text", "text", "out")) -> None:
    before = {str(path): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
    assert cli.main(["assemble", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qwenvl-jax: error: ") and err.count("\n") == 1 and len(err) < 600, err
    assert all(word in err for word in words), err
    assert before == {str(path): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def _edit_tensors(folder, **changes):
    """Changes tensors by name with `/` for `.`; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("/", ".")
        tensors = {key: tensor for key, tensor in tensors.items() if key != name or value is not None}
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_vision(place, **changes):
    values = json.loads((place / "vision/config.json").read_text())
    edit_json(place / "vision/config.json", vision_config={**values["vision_config"], **changes})


TEXT_SETTINGS = [
    ({"model_type": "llama"}, ("text/config.json", "'llama'", "qwen3, qwen3_moe")),
    ({"attention_bias": True}, ("text/config.json", "attention_bias")),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, ("text/config.json", "llama3", "yarn")),
    ({"rope_parameters": [1]}, ("text/config.json", "rope_parameters must be an object")),
    ({"head_dim": 11}, ("text/config.json", "head_dim", "even")),
    ({"num_hidden_layers": 10**9}, ("text", "1000000000 layers")),
    ({"num_hidden_layers": 3}, ("text", "11 unexpected", "model.layers.3.")),
    ({"num_hidden_layers": 5}, ("text", "11 missing", "model.layers.4.")),
    ({"hidden_size": 48}, ("text", "misshaped", "config.json asks for")),
    ({"hidden_size": "40"}, ("text/config.json", "hidden_size must be a positive integer")),
    ({"tie_word_embeddings": "no"}, ("text/config.json", "tie_word_embeddings must be true or false")),
    ({"vocab_size": 100}, ("tokenizer.json", "vocab_size=100")),
    ({"attention_dropuot": 0.1}, ("text/config.json", "did you mean attention_dropout?")),
]


@pytest.mark.parametrize(("changes", "words"), TEXT_SETTINGS)
def test_settings_of_the_language_model(place, capsys, changes, words):
    edit_json(place / "text/config.json", **changes)
    _refused(place, capsys, *words)


MOE_SETTINGS = [
    ({"norm_topk_prob": False}, ("norm_topk_prob",)),
    ({"decoder_sparse_step": 2}, ("decoder_sparse_step",)),
    ({"mlp_only_layers": [0]}, ("mlp_only_layers",)),
    ({"num_experts_per_tok": 9}, ("num_experts_per_tok=9", "num_experts=5")),
    ({"num_local_experts": 10**9}, ("1000000000 experts",)),
    ({"num_local_experts": 6}, ("missing", "experts.5.")),
    ({"num_local_experts": 4}, ("unexpected", "experts.4.")),
]


@pytest.mark.parametrize(("changes", "words"), MOE_SETTINGS)
def test_settings_of_experts(place, ingredients, capsys, changes, words):
    shutil.rmtree(place / "text")
    shutil.copytree(ingredients["moe"][0], place / "text")
    edit_json(place / "text/config.json", **changes)
    _refused(place, capsys, "text", *words)


VISION_SETTINGS = [
    ({"layer_norm_eps": 1e-5}, ("layer_norm_eps = 1e-05",)),
    ({"num_channels": 1}, ("num_channels",)),
    ({"hidden_act": "quick_gelu"}, ("quick_gelu",)),
    ({"num_attention_heads": 4}, ("hidden_size=24", "num_heads=16")),
    ({"patch_size": [16, 14]}, ("patch_size must be a positive integer",)),
    ({"image_size": 8}, ("image_size is smaller than patch_size=16",)),
    ({"image_size": 96}, ("position_embedding", "[25, 24]", "[36, 24]")),
    ({"num_hidden_layers": 3}, ("unexpected", "encoder.layers.3.")),
    ({"num_hidden_layers": 10**9}, ("1000000000 layers",)),
]


@pytest.mark.parametrize(("changes", "words"), VISION_SETTINGS)
def test_settings_of_the_tower(place, capsys, changes, words):
    _edit_vision(place, **changes)
    _refused(place, capsys, "vision", *words)


def test_a_naflex_table_that_is_no_square(place, ingredients, capsys):
    shutil.copy(ingredients["siglip2"][0] / "config.json", place / "vision/config.json")
    _edit_vision(place, num_patches=26)
    _refused(place, capsys, "vision/config.json", "num_patches must be a square, but is 26")


def test_a_config_of_the_other_kind(place, ingredients, capsys):
    """A convolution where a NaFlex config promises a product, or the other way round."""
    shutil.copy(ingredients["siglip2"][0] / "config.json", place / "vision/config.json")
    _refused(place, capsys, "patch_embedding.weight is [24, 3, 16, 16]", "[24, 768]")


def test_sources_in_each_other_s_place(place, capsys):
    swapped = ("--vision", "text", "--text", "vision", "out")
    _refused(place, capsys, "text/config.json", "'qwen3' is no SigLIP 2", "--vision", arguments=swapped)
    _refused(
        place, capsys, "'siglip' is no language model", arguments=("--vision", "vision", "--text", "vision", "out")
    )


@pytest.mark.parametrize("source", ["vision", "text"])
def test_tensors(place, capsys, source):
    _edit_tensors(place / source, **{"strange/weight": np.zeros(3, np.float32)})
    _refused(place, capsys, f"{source}: the tensors", "1 unexpected (strange.weight)")
    _edit_tensors(place / source, **{"strange/weight": None})
    name = next(iter(sorted(name for name in load_file(place / source / "model.safetensors") if ".0." in name)))
    good = load_file(place / source / "model.safetensors")[name]
    if name.startswith("text_model"):
        name = name.replace("text_model", "vision_model")
        good = load_file(place / source / "model.safetensors")[name]
    key = name.replace(".", "/")
    _edit_tensors(place / source, **{key: good.astype(np.int32)})
    _refused(place, capsys, f"{name} is I32")
    _edit_tensors(place / source, **{key: None})
    _refused(place, capsys, f"1 missing ({name})")


def test_a_tied_head_of_its_own(place, capsys):
    embedding = load_file(place / "text/model.safetensors")["model.embed_tokens.weight"]
    _edit_tensors(place / "text", **{"lm_head/weight": embedding + 1})
    _refused(place, capsys, "tie_word_embeddings", "lm_head.weight differs from model.embed_tokens.weight")
    _edit_tensors(place / "text", **{"lm_head/weight": embedding})
    assert cli.main(["assemble", "--vision", "vision", "--text", "text", "out"]) == 0
    assert "lm_head.weight of text, 1 tensor\n" in capsys.readouterr().out


def test_a_tokenizer_without_marks_of_vision(place, capsys):
    text = tiny_tokenizer().to_str().replace("<|image_pad|>", "<|picture|>")
    (place / "text/tokenizer.json").write_text(text)
    _refused(place, capsys, "tokenizer.json has no <|image_pad|>", "give --text a Qwen3")
    (place / "text/tokenizer.json").write_text("{")
    _refused(place, capsys, "tokenizer.json cannot be read as a tokenizer")
    (place / "text/tokenizer.json").unlink()
    _refused(place, capsys, "text has no tokenizer.json")


@pytest.mark.parametrize("source", ["vision", "text"])
def test_files(place, capsys, source):
    weights = place / source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    _refused(place, capsys, f"{source}/model.safetensors is truncated or damaged")
    weights.unlink()
    _refused(place, capsys, f"{source} has no weights")
    (place / source / "config.json").write_text("[]")
    _refused(place, capsys, f"{source}/config.json holds a JSON list")
    (place / source / "config.json").unlink()
    _refused(place, capsys, f"{source} has no config.json")


def test_arguments(place, capsys):
    sources = ("--vision", "vision", "--text", "text", "out")
    for options, words in (
        (("--deepstack", "1,9"), ("deepstack", "from 0 to 3", "1,9")),
        (("--deepstack", "2,1"), ("increasing", "2,1")),
        (("--deepstack", "one"), ("--deepstack", "5,11,17")),
        (("--positions", "0"), ("side must be at least 1",)),
        (("--dtype", "float8"), ("--dtype", "bfloat16")),
        (("--seed", "-1"), ("seed must be from 0",)),
    ):
        _refused(place, capsys, *words, arguments=(*sources, *options))
    _refused(place, capsys, "--text", arguments=("--vision", "vision", "out"))
    _refused(place, capsys, "text is there and is not an empty folder", arguments=(*sources[:-1], "text"))
    _refused(place, capsys, "text/config.json/out cannot be written", arguments=(*sources[:-1], "text/config.json/out"))
    (place / "file").write_text("")
    _refused(place, capsys, "file is there and is not an empty folder", arguments=(*sources[:-1], "file"))


def test_more_taps_than_layers(place, capsys):
    shutil.rmtree(place / "text")
    write_qwen3(place / "text", num_hidden_layers=2)
    _refused(place, capsys, "3 DeepStack features need as many decoder layers", "num_hidden_layers=2")


def test_a_failure_half_way_leaves_nothing(place, monkeypatch):
    """A source whose disk fails after some tensors were written; then a target whose disk is full."""
    read, seen = Ingredient.read, []

    def failing(self, name):
        seen.append(name)
        if len(seen) > 30:
            raise CheckpointError("the disk is gone")
        return read(self, name)

    before = sorted(place.rglob("*"))
    monkeypatch.setattr(Ingredient, "read", failing)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        assemble("vision", "text", "out", max_shard_bytes=10_000)
    assert sorted(place.rglob("*")) == before
    monkeypatch.setattr(Ingredient, "read", read)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"out cannot be written \(.*No space left"):
        assemble("vision", "text", "out")
    assert sorted(place.rglob("*")) == before
