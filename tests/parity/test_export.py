"""Exports, as the reference loads them."""

import json

import pytest
import torch

from qwenvl_jax.models import pretrained
from tests.parity import reference

pytestmark = pytest.mark.support("exports")


def test_reference_loads_an_export_bit_equal(pair, tmp_path):
    """Same names, no tensor missing or unexpected, same bits; in one file and in several."""
    original = pair.reference.state_dict()
    for name, size in (("single", 10**9), ("sharded", 50_000)):
        pair.model.save_pretrained(tmp_path / name) if name == "single" else pretrained.save(
            pair.model, tmp_path / name, max_shard_bytes=size
        )
        exported = reference.load_checkpoint(tmp_path / name)
        tensors = exported.state_dict()
        assert tensors.keys() == original.keys()
        assert all(torch.equal(tensors[key], original[key]) for key in original)
        assert exported.generation_config.eos_token_id == pair.reference.generation_config.eos_token_id


def test_config_is_the_reference_s_own(pair, tmp_path):
    """Every key the reference wrote to config.json has the same value in the export."""
    pair.model.save_pretrained(tmp_path)
    ours = reference.transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = reference.transformers.AutoConfig.from_pretrained(pair.folder).to_dict()
    for config in (ours, theirs):
        for key in ("transformers_version", "_name_or_path"):
            config.pop(key, None)
        # Released files have it and other tools read it; the reference does neither.
        config["text_config"].pop("norm_topk_prob", None)
    assert ours == theirs
    # ... and the file says everything itself, leaving nothing to the defaults of a version
    written, saved = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, pair.folder))
    for section in ("text_config", "vision_config"):
        neutral = {"initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"}
        neutral |= {"sliding_window", "max_window_layers", "layer_types"}  # nothing slides
        neutral |= {"output_router_logits", "router_aux_loss_coef"}  # of training
        neutral |= {"tie_word_embeddings"}  # the one at the top counts
        assert set(saved[section]) - neutral <= set(written[section])


def test_half_precision(pair, tmp_path):
    """A model loaded in bfloat16 is exported as the reference's own conversion would be."""
    pretrained.save(pretrained.load(pair.folder, dtype="bfloat16"), tmp_path)
    exported = type(pair.reference).from_pretrained(tmp_path)
    assert exported.dtype == torch.bfloat16
    tensors = exported.state_dict()
    assert all(torch.equal(tensors[k], value.to(torch.bfloat16)) for k, value in pair.reference.state_dict().items())
