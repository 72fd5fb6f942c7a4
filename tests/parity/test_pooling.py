"""Pooling in the whole model against the reference, whose tower's features are pooled by torch's own functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from qwenvl_jax.checkpoint import hf
from qwenvl_jax.data.video import VideoFrames
from qwenvl_jax.ops.losses import chunked_cross_entropy
from qwenvl_jax.parallel.placement import Execution
from tests.parity import reference
from tests.parity.conftest import shapes

TOLERANCE = 1e-4  # of logits, and of each tensor's largest gradient


def _conversation() -> list[dict]:
    """Images and videos of odd sizes, pooled in several ways and not at all; frames evenly spaced."""
    rng = np.random.default_rng(3)

    def image(height, width, **options):
        return {"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8), **options}

    def video(count, height, width, **options):
        frames = rng.integers(0, 256, (count, height, width, 3), np.uint8)
        return {"type": "video", "video": VideoFrames(frames, np.arange(count) / 2, duration=count / 2), **options}

    user = [
        image(160, 96, pool=2),
        image(64, 96),
        video(5, 96, 160, pool=2),
        {"type": "text", "text": "and"},
        image(224, 160, pool=3, pool_method="mean"),
        video(4, 128, 96, pool=4, pool_method="mean"),
        {"type": "text", "text": "when does it appear?"},
    ]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": "the red square appears at three"}]


CONVERSATION = _conversation()


def pooled(features, media):
    """The tower's features of media, [n, H] of each, pooled frame by frame."""
    found = []
    for tokens, medium in zip(features, media, strict=True):
        t, h, w = medium.grid[0], medium.grid[1] // 2, medium.grid[2] // 2
        maps = tokens.reshape(t, h, w, -1).permute(0, 3, 1, 2)
        if medium.pool is not None and medium.pool.method == "mean":
            maps = functional.avg_pool2d(maps, medium.pool.side, ceil_mode=True, count_include_pad=False)
        elif medium.pool is not None:
            size = (-(-h // medium.pool.side), -(-w // medium.pool.side))
            maps = functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        found.append((maps.shape[2:], maps.permute(0, 2, 3, 1).reshape(-1, tokens.shape[-1])))
    return [shape for shape, _ in found], [tokens for _, tokens in found]


def pooled_inputs(pair):
    """What the reference's `forward` takes: the pooled features, and grids as a smaller picture would have them."""
    sample = pair.processor.sample(CONVERSATION)
    inputs = reference.reference_inputs(sample, CONVERSATION, pair.reference.config, pair.processor.pixel_table)
    outputs = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [medium for medium in sample.media if medium.kind == kind]
        encode = getattr(pair.reference.model, f"get_{kind}_features")
        outputs[kind] = encode(inputs.pop(pixels), inputs[grids], return_dict=True)
        sizes, outputs[kind].pooler_output = pooled(outputs[kind].pooler_output, media)
        if getattr(outputs[kind], "deepstack_features", None):
            outputs[kind].deepstack_features = [pooled(one, media)[1] for one in outputs[kind].deepstack_features]
        inputs[grids] = torch.tensor(
            [(medium.grid[0], 2 * rows, 2 * columns) for medium, (rows, columns) in zip(media, sizes, strict=True)]
        )
    return inputs | {"mm_encoder_outputs": outputs}


@pytest.mark.parametrize(
    "pair", shapes(fast=("qwen3 untied",), slow=("qwen2.5 untied", "qwen2 untied", "qwen3 moe tied")), indirect=True
)
def test_logits_and_gradients_with_pooled_media(pair):
    """The reference makes its own positions: those of the pooled grids."""
    pair.reference.zero_grad()
    inputs = pooled_inputs(pair)
    found = pair.reference(**inputs, labels=inputs["input_ids"])
    found.loss.backward()
    expected = {
        hf.current_name(name, pair.model.config.model_type): tensor.grad.numpy().copy()
        for name, tensor in pair.reference.named_parameters()
    }
    pair.reference.zero_grad()
    batch = pair.processor([CONVERSATION])
    assert batch.pool_index.shape[-1] == 16
    graph, state = nnx.split(pair.model)
    weights = np.asarray(batch.segment_ids > 0, np.float32)
    weights[:, -1] = 0  # nothing follows the last token

    def loss_of(state, batch):
        model = nnx.merge(graph, state)
        hidden = model.hidden(batch, Execution(remat="full"))
        total = chunked_cross_entropy(hidden, model.text.head_weight(), batch.targets, jnp.asarray(weights), chunk=64)
        return total / weights.sum(), model.text.logits(hidden)

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(state, batch)
    np.testing.assert_allclose(np.asarray(logits)[0], found.logits[0].detach().numpy(), rtol=0, atol=TOLERANCE)
    assert abs(float(loss) - float(found.loss.detach())) < TOLERANCE
    ours = {".".join(map(str, key)): np.asarray(v.get_value()) for key, v in nnx.to_flat_state(gradients)}
    compared = set()
    for entry in hf.tensor_table(pair.model.config):
        for layer, name in enumerate(entry.names()):
            gradient = entry.to_public(ours[entry.path] if entry.layers is None else ours[entry.path][layer])
            if gradient.shape != expected[name].shape:  # the reference holds experts the other way round
                gradient = gradient.swapaxes(-1, -2)
            largest = np.abs(expected[name]).max()
            np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=TOLERANCE * largest, err_msg=name)
            compared.add(name)
    assert compared == set(expected)
