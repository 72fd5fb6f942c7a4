"""Adapters against PEFT, on the reference: the same folder gives the same logits, whoever wrote it."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from qwenvl_jax.checkpoint import peft as ours
from qwenvl_jax.models import pretrained
from qwenvl_jax.ops.losses import chunked_cross_entropy
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.train.adapters import AdaptedParts
from qwenvl_jax.train.config import AdapterConfig
from tests.parity.conftest import shapes

pytestmark = pytest.mark.parametrize(
    "pair", shapes(["qwen3 tied", "qwen2.5 untied"], ["qwen2 tied", "qwen3 moe untied"]), indirect=True
)

TOLERANCE = 1e-4
RANK, ALPHA = 3, 5.0
# Projections of every part: the decoder's, the tower's (one for queries, keys and values; the patches', which are a
# convolution in the reference), the mergers'.
TARGETS = r"attn\.\w+$|mlp\.(gate|up|down|fc1|fc2)$|merger\.fc|deepstack\.fc1|patch_embed"
SAVED = r"^(deepstack\.fc2|text\.norm)$"


@pytest.fixture
def trained(pair):
    """The model with adapters whose every number is random, as a long training would leave them; (parts, params)."""
    adapter = AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS, modules_to_save=SAVED)
    make = {"mesh": single_device_mesh(), "dtype": "float32", "param_dtype": "float32"}
    parts = AdaptedParts(pair.model.config, adapter, seed=0, **make)
    params, rng = parts.split(pair.model), np.random.default_rng(0)
    for name in parts.select("all"):
        value = np.asarray(params[name])
        params[name] = jnp.asarray(value + 0.1 * rng.standard_normal(value.shape).astype(np.float32))
    return parts, params


def assert_same_tensors(folder, other):
    """Same names and bits."""
    left, right = (load_file(path / ours.WEIGHTS) for path in (folder, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and np.array_equal(value, right[name]), name


def their_logits(model, pair):
    with torch.no_grad():
        return model(**pair.inputs("mixed")).logits[0].numpy()


def our_logits(model, pair):
    batch = pair.processor([pair.conversations["mixed"]])
    return np.asarray(jax.jit(lambda model, batch: model(batch))(model, batch))[0]


def test_peft_loads_what_was_trained_here(pair, trained, tmp_path):
    """PEFT's logits are ours, the adapter beside the weights or within them; and what PEFT saves is what we saved."""
    parts, params = trained
    ours.write(parts.to_peft(params, str(pair.folder)), tmp_path / "ours", parts.config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.reference), tmp_path / "ours").eval()
    expected = their_logits(theirs, pair)
    assert np.abs(expected - their_logits(pair.reference, pair)).max() > 0.1
    np.testing.assert_allclose(our_logits(parts.merge(params), pair), expected, rtol=0, atol=TOLERANCE)
    loaded = pretrained.load(pair.folder, dtype="float32", adapter=tmp_path / "ours")
    np.testing.assert_allclose(our_logits(loaded, pair), expected, rtol=0, atol=TOLERANCE)

    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = ours.read(tmp_path / "theirs", parts.config)
    assert (again.rank, again.alpha, again.base) == (RANK, ALPHA, str(pair.folder))
    ours.write(again, tmp_path / "again", parts.config)
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")
    first, second = (json.loads((tmp_path / name / ours.CONFIG).read_text()) for name in ("ours", "again"))
    assert first == second


def test_what_peft_made_is_loaded(pair, tmp_path):
    """An adapter of PEFT's own making, on modules named by their ends, in one of the decoder's layers only."""
    names = [name for name, _ in pair.reference.named_modules()]
    made = [
        name for name in names if name.endswith(("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj", "attn.qkv"))
    ]
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=made, init_lora_weights=False, lora_dropout=0.1)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(pair.reference), config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = pretrained.load(pair.folder, dtype="float32", adapter=tmp_path)
    expected = their_logits(theirs, pair)
    assert np.abs(expected - their_logits(pair.reference, pair)).max() > 0.1
    np.testing.assert_allclose(our_logits(loaded, pair), expected, rtol=0, atol=TOLERANCE)


def test_an_embedding_saved_whole(pair, tmp_path):
    """Of a tied model it is the head too, there as here; PEFT saves what we saved."""
    config = pair.model.config
    table, rng = np.asarray(pair.model.text.embed.table.get_value()), np.random.default_rng(0)
    changed = table + 0.1 * rng.standard_normal(table.shape).astype(np.float32)
    kernel = pair.model.text.layers.attn.q.kernel.get_value()
    halves = np.zeros((len(kernel), config.text.hidden_size, 2)), np.zeros((len(kernel), 2, kernel[0, 0].size))
    pairs = {"text.layers.attn.q": tuple(half.astype(np.float32) for half in halves)}
    ours.write(ours.Adapter(2, 4.0, pairs, {"text.embed.table": changed}, str(pair.folder)), tmp_path / "ours", config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.reference), tmp_path / "ours").eval()
    expected = their_logits(theirs, pair)
    assert np.abs(expected - their_logits(pair.reference, pair)).max() > 0.1
    loaded = pretrained.load(pair.folder, dtype="float32", adapter=tmp_path / "ours")
    np.testing.assert_allclose(our_logits(loaded, pair), expected, rtol=0, atol=TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.slow
def test_gradients(pair, trained, tmp_path):
    """Of the mean loss, for every tensor of the adapter: to 1e-4 of the largest of each."""
    parts, params = trained
    ours.write(parts.to_peft(params, None), tmp_path, parts.config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.reference), tmp_path, is_trainable=True).eval()
    inputs = pair.inputs("mixed")
    loss = theirs(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }

    batch = pair.processor([pair.conversations["mixed"]])
    weights = np.asarray(batch.segment_ids > 0, np.float32)
    weights[:, -1] = 0  # nothing follows the last token
    learning = {name: params[name] for name in parts.select("all")}

    @jax.jit
    @jax.value_and_grad
    def loss_of(learning, frozen):
        model = parts.merge(frozen | learning)
        total = chunked_cross_entropy(
            model.hidden(batch), model.text.head_weight(), batch.targets, jnp.asarray(weights), chunk=64
        )
        return total / weights.sum()

    value, found = loss_of(learning, {name: params[name] for name in params if name not in learning})
    np.testing.assert_allclose(value, loss.detach().numpy(), atol=TOLERANCE)
    ours.write(parts.to_peft(found, None), tmp_path / "gradients", parts.config)
    found = load_file(tmp_path / "gradients" / ours.WEIGHTS)
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        largest = np.abs(expected).max()
        assert largest > 0, name
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE * largest, err_msg=name)
