"""Parts of the model against the reference's own: tower, mergers, DeepStack features, experts and rotary tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.ops.experts import route
from qwenvl_jax.ops.rope import mrope_axes, mrope_cos_sin
from qwenvl_jax.parallel.placement import Execution

pytestmark = pytest.mark.support("exact")

TOLERANCE = 1e-4


def in_reading_order(features_GMH, batch):
    """[M, H]: the merged tokens of a batch of one row, as its tokens refer to them."""
    index = np.asarray(batch.vision_index)[0]
    return np.asarray(features_GMH)[0][index[index >= 0]]


@pytest.mark.parametrize("name", ["images", "video"])
def test_tower_mergers_and_deepstack(pair, name):
    """What the decoder is given, and what is added to its hidden states, for images of several sizes and a video."""
    inputs = pair.inputs(name)
    pixels, grids = ("pixel_values_videos", "video_grid_thw") if name == "video" else ("pixel_values", "image_grid_thw")
    with torch.no_grad():
        expected = pair.reference.model.visual(inputs[pixels], grid_thw=inputs[grids])
    batch = pair.processor([pair.conversations[name]])
    merged, deep = jax.jit(lambda model, batch: model.encode(batch))(pair.model, batch)
    np.testing.assert_allclose(in_reading_order(merged, batch), expected.pooler_output.numpy(), rtol=0, atol=TOLERANCE)
    taps = pair.model.config.vision.deepstack_visual_indexes
    assert (deep is None) == (not taps)
    for k in range(len(taps)):
        reference = expected.deepstack_features[k].numpy()
        np.testing.assert_allclose(in_reading_order(deep[k], batch), reference, rtol=0, atol=TOLERANCE)


def test_last_block_of_the_tower(pair):
    """The tower's output before the mergers, patch by patch."""
    inputs = pair.inputs("image")
    with torch.no_grad():
        expected = pair.reference.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    batch = pair.processor([pair.conversations["image"]])
    (rows,) = batch.vision
    last, _ = jax.jit(lambda model, rows: model.vision(rows, jnp.float32, Execution()))(pair.model, rows)
    # With windows the reference keeps its patches in their order too.
    ours = np.asarray(last)[0][np.asarray(rows.segment_ids)[0] > 0]
    np.testing.assert_allclose(ours, expected.last_hidden_state.numpy(), rtol=0, atol=TOLERANCE)


def layer_of(module, index: int):
    """One layer of a stack of layers."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def test_routers_and_experts(pair):
    """At every layer, on the hidden states of the reference: who goes where, with what share, and what comes out."""
    if pair.model.config.text.moe is None:
        assert not any("experts" in name for name, _ in pair.reference.named_parameters())
        return
    blocks = [layer.mlp for layer in pair.reference.model.language_model.layers]
    seen = {i: {} for i in range(len(blocks))}
    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, x, y, i=i: seen[i].update(x=x[0], y=y)))
        hooks.append(block.gate.register_forward_hook(lambda _, x, y, i=i: seen[i].update(route=y)))
    with torch.no_grad():
        pair.reference(**pair.inputs("mixed"))
    for hook in hooks:
        hook.remove()
    for i in range(len(blocks)):
        moe = layer_of(pair.model.text.layers.mlp, i)
        x = jnp.asarray(seen[i]["x"].numpy())
        logits, shares, experts = (part.numpy() for part in seen[i]["route"])
        ours = moe.router(x.reshape(-1, x.shape[-1]))
        np.testing.assert_allclose(np.asarray(ours), logits, rtol=0, atol=1e-5)
        our_shares, our_experts = route(ours, moe.k)
        np.testing.assert_array_equal(np.asarray(our_experts), experts)
        np.testing.assert_allclose(np.asarray(our_shares), shares, rtol=0, atol=1e-6)
        y, _ = moe(x, Execution())
        np.testing.assert_allclose(np.asarray(y), seen[i]["y"].numpy(), rtol=0, atol=1e-5)


FAR = (0, 1, 31, 32, 127, 128, 4_095, 262_143, 262_144, 999_999)


def test_rotary_tables_up_to_a_million(pair):
    """Cosines and sines at positions far beyond any length, the three axes apart.

    Angles are f32 products, so that both have the same ones; the tolerance is that of a cosine of a large number.
    """
    text = pair.model.config.text
    positions = np.stack([np.asarray(FAR), np.roll(FAR, 3), np.roll(FAR, 6)], axis=-1)[None]
    x = torch.zeros(1, len(FAR), text.hidden_size)
    rotary = pair.reference.model.language_model.rotary_emb
    expected = rotary(x, torch.from_numpy(positions.transpose(2, 0, 1).copy()))
    ours = mrope_cos_sin(jnp.asarray(positions, jnp.int32), text.rope, text.head_dim, jnp.float32)
    half = text.head_dim // 2
    for mine, reference in zip(ours, expected, strict=True):
        # The last bit of a frequency, 6e-8 of it, turns the fastest pairs by 0.06 here: one that is off fails.
        np.testing.assert_allclose(np.asarray(mine), reference[..., :half].numpy(), rtol=0, atol=2e-6)
    assert set(mrope_axes(text.rope)) == {0, 1, 2}


def test_far_positions(pair):
    """Logits where positions end at 999,999; with YaRN, they are others than without."""
    inputs = pair.inputs("mixed")
    batch = pair.processor([pair.conversations["mixed"]])
    shift = 999_999 - int(batch.positions.max())
    moved = dataclasses.replace(batch, positions=batch.positions + np.int32(shift))
    with torch.no_grad():
        positions = torch.from_numpy(np.asarray(moved.positions, np.int64)).permute(2, 0, 1)
        expected = pair.reference(**inputs, position_ids=positions).logits[0].numpy()

    @jax.jit
    def logits(model, batch):
        return model(batch)

    np.testing.assert_allclose(np.asarray(logits(pair.model, moved))[0], expected, rtol=0, atol=TOLERANCE)
    config = pair.model.config
    if config.text.rope.yarn is not None:
        text = dataclasses.replace(config.text, rope=dataclasses.replace(config.text.rope, yarn=None))
        plain = nnx.eval_shape(lambda: QwenVL(dataclasses.replace(config, text=text), rngs=nnx.Rngs(0)))
        without = nnx.merge(nnx.graphdef(plain), nnx.state(pair.model))
        assert np.abs(np.asarray(logits(without, moved))[0] - expected).max() > 100 * TOLERANCE
