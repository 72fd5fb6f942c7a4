"""Pooled features in the decoder: sums of merged tokens, their gradients, and what a batch without pooling pays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.pooling import METHODS, Pool
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.generate import generate
from qwenvl_jax.models.pretrained import load
from qwenvl_jax.models.qwenvl import _at_vision
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import Execution, shard_batch
from tests.checkpoint.shape import TINY, random_model

TABLE = np.broadcast_to(np.linspace(-1, 1, 256, dtype=np.float32), (3, 256))
H = 6


def make_sample(seed: int, media, patch_dim: int = 4) -> Sample:
    """A sample of (pool, (t, h, w) in merged tokens), with a word before each and after the last."""
    rng = np.random.default_rng(seed)
    made, kinds = [], [False]
    for pool, (t, h, w) in media:
        patches = rng.integers(0, 256, (4 * t * h * w, patch_dim), np.uint8)
        made.append(Media("video" if t > 1 else "image", patches, (t, 2 * h, 2 * w), pool=pool))
        shown = pool.grid(h, w) if pool else (h, w)
        kinds += [True] * (t * shown[0] * shown[1]) + [False]
    seen = np.asarray(kinds)
    tokens = rng.integers(1, 20, len(kinds)).astype(np.int32)
    positions = np.repeat(np.arange(len(kinds), dtype=np.int32)[:, None], 3, axis=1)
    index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
    weights = np.ones(len(kinds), np.float32)
    return Sample(tokens, positions, tokens, weights, index, tuple(made))


def pooled_by_torch(features_NH, medium):
    """The features of a medium, [t*h*w, H] in reading order, pooled by torch's own functions."""
    from torch.nn import functional

    t, h, w = medium.grid[0], medium.grid[1] // 2, medium.grid[2] // 2
    if medium.pool is None:
        return features_NH
    maps = features_NH.reshape(t, h, w, -1).permute(0, 3, 1, 2)
    side = medium.pool.side
    if medium.pool.method == "mean":
        maps = functional.avg_pool2d(maps, side, ceil_mode=True, count_include_pad=False)
    else:
        maps = functional.interpolate(maps, size=medium.pool.grid(h, w), mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(-1, features_NH.shape[-1])


def merged_places(batch_of_whole, row: int):
    """The group and the slots of a row's merged tokens, of a batch of the same media without pooling."""
    index = batch_of_whole.vision_index[row]
    return index[index >= 0]


def without_pooling(sample: Sample) -> Sample:
    media = [(None, (m.grid[0], m.grid[1] // 2, m.grid[2] // 2)) for m in sample.media]
    return make_sample(0, media)


@pytest.mark.reference
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [2, 3, 4])
def test_features_and_gradients_are_those_of_torch(side, method, window):
    """Odd sizes, images and videos, pooled and not, packed into rows and groups; windows move the merged tokens."""
    import torch

    pool = Pool(side, method)
    samples = [
        make_sample(0, [(pool, (1, 5, 3)), (None, (1, 2, 3)), (pool, (3, 4, 7))]),
        make_sample(1, [(pool, (2, 1, 5))]),
        make_sample(2, []),
        make_sample(3, [(Pool(2), (1, 6, 6)), (pool, (1, 9, 2))]),
        make_sample(4, [(pool, (1, 3, 3))]),
    ]
    rows = [[samples[0], samples[1]], [samples[2]], [samples[3]], [samples[4], samples[2]]]
    fixed = {"pixel_table": TABLE, "pad_token_id": 0, "groups": 2, "window": window}
    batch = collate(rows, length=90, **fixed)
    whole = collate([[without_pooling(s) for s in row] for row in rows], **fixed)
    slots = sum(v.patches.shape[1] * v.patches.shape[2] for v in batch.vision) // 4
    rng = np.random.default_rng(5)
    features = rng.standard_normal((2, slots, H), np.float32)
    x, cotangent = rng.standard_normal((2, 4, 90, H), np.float32)

    def show(features, x):
        return _at_vision(x, features, batch, Execution(), otherwise=x)

    (found, pull) = jax.vjp(jax.jit(show), features, x)
    ours, ours_x = pull(cotangent)
    leaf, leaf_x = (torch.tensor(value, requires_grad=True) for value in (features, x))
    expected = leaf_x.clone()
    for r, row in enumerate(rows):
        places, at, pieces = merged_places(whole, r), 0, []
        for medium in (m for s in row for m in s.media):
            n = len(medium.patches) // 4
            pieces.append(pooled_by_torch(leaf[r // 2][places[at : at + n].tolist()], medium))
            at += n
        seen = torch.from_numpy(np.asarray(batch.vision_index[r] >= 0))
        if pieces:
            expected[r, seen] = torch.cat(pieces)
    expected.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours, leaf.grad.numpy(), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(ours_x, leaf_x.grad.numpy())
    assert np.abs(ours).max() > 0.1 and (np.asarray(ours) == 0).any(axis=-1).any()  # slots of padding have none


# The model


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # programs that run once
def logits(model, batch):
    return model(batch)


def of_model(seed, media):
    """A sample whose vision tokens are the model's, at the positions of a pooled grid or any."""
    return make_sample(seed, media, patch_dim=TINY.vision.patch_dim)


def collated(rows, **options):
    return collate(rows, pixel_table=TABLE, pad_token_id=0, **options)


def test_packed_rows_equal_alone(model):
    """Pooled samples in a row with whole ones give what each gives alone, also where there are places for more."""
    samples = [
        of_model(0, [(Pool(2), (1, 3, 5)), (None, (1, 2, 2))]),
        of_model(1, [(Pool(3, "mean"), (2, 4, 3))]),
        of_model(2, [(None, (1, 3, 2))]),
    ]
    together = np.asarray(logits(model, collated([[samples[0], samples[2]], [samples[1]]], groups=2, pool_taps=12)))
    for sample, (row, start) in zip(samples, [(0, 0), (1, 0), (0, len(samples[0].tokens))], strict=True):
        alone = np.asarray(logits(model, collated([[sample]])))[0]
        largest = np.abs(alone).max()
        np.testing.assert_allclose(together[row, start : start + len(alone)], alone, rtol=0, atol=1e-5 * largest)


def test_places_of_the_pool_matter(model):
    """The comparison above can fail: other weights, or other places, are other logits."""
    batch = collated([[of_model(0, [(Pool(2), (1, 3, 5))])]])
    before = np.asarray(logits(model, batch))
    for changed in (
        dataclasses.replace(batch, pool_weights=batch.pool_weights[..., ::-1].copy()),
        dataclasses.replace(batch, pool_index=np.roll(batch.pool_index, 1, axis=1)),
    ):
        assert np.abs(np.asarray(logits(model, changed)) - before).max() > 1e-2


@pytest.mark.slow
def test_places_without_use_change_nothing(model):
    """A batch of a run that pools, without anything pooled in it: the logits are those of a run that does not."""
    sample = of_model(0, [(None, (1, 3, 5)), (None, (2, 2, 2))])
    plain, roomy = collated([[sample]]), collated([[sample]], pool_taps=4)
    assert plain.pool_index is None and roomy.pool_index.shape[-1] == 4
    np.testing.assert_array_equal(np.asarray(logits(model, plain)), np.asarray(logits(model, roomy)))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_places(model):
    """Temporary memory of forward and backward is that of few [B, T, H] arrays, however many tokens make one."""
    graph, state = nnx.split(model)
    samples = [of_model(0, [(Pool(2), (1, 8, 8))] * 4)]

    def temporary(taps):
        batch = collated([samples], length=512, pool_taps=taps)

        def loss(state, batch):
            return jnp.sum(nnx.merge(graph, state).hidden(batch, Execution(remat="full")))

        return jax.jit(jax.grad(loss)).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    hidden = 512 * TINY.text.hidden_size * 4
    assert temporary(64) - temporary(4) < 8 * hidden  # all places at once would take 60 times as much


@pytest.mark.slow
def test_no_device_reads_features_of_another(model):
    """Rows and groups over devices: the compiled forward pass exchanges nothing but what it did without pooling."""
    mesh = make_mesh(jax.devices()[:4], fsdp=4)
    graph, state = nnx.split(model)

    def exchanges(pool):
        rows = [[of_model(r, [(pool, (1, 4, 4))])] for r in range(4)]
        batch = shard_batch(collated(rows, groups=4, length=24), mesh)
        run = jax.jit(lambda state, batch: nnx.merge(graph, state).hidden(batch))
        text = run.lower(state, batch).compile().as_text()
        names = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")
        return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}

    assert exchanges(Pool(2)) == exchanges(None)


@pytest.fixture(scope="module")
def answering(tiny_checkpoint):
    from qwenvl_jax.data.processor import Processor

    return load(tiny_checkpoint, dtype="float32"), Processor.from_pretrained(tiny_checkpoint)


@pytest.mark.slow
def test_answers_about_pooled_media(answering):
    """Beside others, a question has the answer that it has alone; token for token that of the whole sequence again."""
    model, processor = answering
    frames = np.random.default_rng(0).integers(0, 256, (5, 96, 160, 3), np.uint8)

    def ask(**options):
        from qwenvl_jax.data.video import VideoFrames

        video = {"type": "video", "video": VideoFrames(frames, np.arange(5) / 2, duration=2.5), **options}
        return [{"role": "user", "content": [video, {"type": "text", "text": "what moves?"}]}]

    conversations = [ask(pool=2), ask(), ask(pool=3, pool_method="mean")]
    together = generate(model, processor, conversations, max_new_tokens=6)
    for conversation, answer in zip(conversations, together, strict=True):
        assert generate(model, processor, [conversation], max_new_tokens=6) == [answer]
    # The first token is that of the plain forward pass.
    for conversation, answer in zip(conversations, together, strict=True):
        batch = processor([conversation], True)
        assert int(np.argmax(np.asarray(logits(model, batch))[0, -1])) == answer.tokens[0]
