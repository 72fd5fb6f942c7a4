"""Pooled media on the host: what each token is made of, how many there are, where they stand, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwenvl_jax as qv
from qwenvl_jax import cli
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.facts import measure_source
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.mixture import AtRates, VideoBudget
from qwenvl_jax.data.packing import BatchShape, Plan, SampleFacts, misfit
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache
from qwenvl_jax.data.pooling import MAX_SIDE, METHODS, Pool
from qwenvl_jax.data.sampling import clip_size, frame_size, pooled_size
from qwenvl_jax.data.sources import Reading, open_source
from qwenvl_jax.errors import ConfigError, ConversationError, DataError, MediaError
from tests.media import numbered_frames, write_clip
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import write_records

GENERATIONS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """By model type."""
    folder = tmp_path_factory.mktemp("models")
    for name in GENERATIONS:
        tiny_processor_folder(folder / name, model_type=name)
    return {name: qv.Processor.from_pretrained(folder / name) for name in GENERATIONS}


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """Twelve frames at 2 per second, of 5 x 7 merged tokens of Qwen3-VL."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", numbered_frames(12, 160, 224), fps="2")


def frames(count: int, height: int, width: int) -> qv.VideoFrames:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return qv.VideoFrames(pixels, np.arange(count) / 2, duration=count / 2)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def ask(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what moves?"}]}]


def video(source, **options):
    return {"type": "video", "video": source, **options}


# What a pooled token is made of


@pytest.mark.reference
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [2, 3, 4, 7])
def test_weights_are_those_of_torch(method, side):
    """Sides of every remainder, and frames smaller than a cell."""
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(side)
    pool = Pool(side, method)
    for rows in (1, 2, 3, 4, 5, 7, 8, 12, 13):
        for columns in (1, 3, 4, 6, 9, 11):
            grid = rng.standard_normal((rows, columns, 5), np.float32)
            shown = pool.grid(rows, columns)
            index, weights = pool.mixing(rows, columns)
            assert index.shape == weights.shape == (shown[0] * shown[1], pool.taps)
            ours = np.einsum("nq,nqh->nh", weights, grid.reshape(-1, 5)[index])
            maps = torch.from_numpy(grid).permute(2, 0, 1)[None]
            if method == "bilinear":
                expected = functional.interpolate(maps, size=shown, mode="bilinear", align_corners=False)
            else:
                expected = functional.avg_pool2d(maps, side, ceil_mode=True, count_include_pad=False)
            assert expected.shape[2:] == shown
            np.testing.assert_allclose(ours, expected[0].permute(1, 2, 0).reshape(-1, 5).numpy(), rtol=0, atol=1e-6)


def test_worked_cells():
    """A frame of 3 x 5 by 2, as in the docstring."""
    index, weights = Pool(2, "mean").mixing(3, 5)
    cells = [sorted(set(i[w > 0].tolist())) for i, w in zip(index, weights, strict=True)]
    assert cells == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]
    assert [w.max() for w in weights] == [0.25, 0.25, 0.5, 0.5, 0.5, 1]
    # Centres lie at 0.25 and 1.75 of three rows, at 1/3, 2 and 11/3 of five columns.
    index, weights = Pool(2).mixing(3, 5)
    assert index[0].tolist() == [0, 1, 5, 6] and index[-1].tolist() == [8, 9, 13, 14]
    np.testing.assert_allclose(weights[0], np.outer([0.75, 0.25], [2 / 3, 1 / 3]).ravel(), atol=1e-6)
    np.testing.assert_allclose(weights[-1], np.outer([0.25, 0.75], [1 / 3, 2 / 3]).ravel(), atol=1e-6)


def test_sides_that_divide():
    """At 2 both methods are one; at 3 bilinear takes the middle of each cell."""
    grid = np.random.default_rng(0).standard_normal(48)
    (i, w), (j, v) = Pool(2).mixing(6, 8), Pool(2, "mean").mixing(6, 8)
    np.testing.assert_allclose((w * grid[i]).sum(1), (v * grid[j]).sum(1), atol=1e-6)
    index, weights = Pool(3).mixing(3, 6)
    assert index[:, 0].tolist() == [7, 10] and weights[:, 0].tolist() == [1, 1]


# How many there are, and where


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_positions_are_those_of_a_smaller_picture(processors, name, side, method):
    """Text, targets and times are as they are for media of the pooled size; patches are those of the whole size."""
    processor = processors[name]
    factor = processor.image.factor
    media = [(image, 5, 3), (lambda *size: frames(6, *size), 4, 7), (image, 1, 2)]
    options = {"pool": side, "pool_method": method, "min_pixels": factor**2}

    def conversation(pool):
        parts = []
        for make, rows, columns in media:
            sides = (rows, columns) if pool else (-(-rows // side), -(-columns // side))
            pixels = make(sides[0] * factor, sides[1] * factor)
            kind = "image" if isinstance(pixels, np.ndarray) else "video"
            bounds = options if pool else {"min_pixels": factor**2}
            parts.append({"type": kind, kind: pixels, **bounds})
        return ask(*parts)

    pooled, small = (processor.sample(conversation(pool)) for pool in (True, False))
    for field in ("tokens", "positions", "targets", "loss_weights", "vision_index"):
        np.testing.assert_array_equal(getattr(pooled, field), getattr(small, field), err_msg=field)
    plain = processor.sample(
        ask(
            *[
                {k: v for k, v in part.items() if not k.startswith("pool")}
                for part in conversation(True)[0]["content"][:-1]
            ]
        )
    )
    assert len(plain.tokens) > len(pooled.tokens)
    for one, other in zip(pooled.media, plain.media, strict=True):
        assert one.grid == other.grid and one.times == other.times
        assert one.pool == Pool(side, method) and other.pool is None
        np.testing.assert_array_equal(one.patches, other.patches)
    facts = processor.measure(conversation(True))
    assert facts.tokens == len(pooled.tokens) and facts.grids == tuple(m.grid for m in pooled.media)


def test_none_and_one_are_no_pooling(processors):
    processor = processors["qwen3_vl"]
    part = video(frames(4, 96, 96))
    plain = processor([ask(part)])
    for options in ({"pool": None}, {"pool": 1}, {"pool": 1, "pool_method": "mean"}):
        batch = processor([ask({**part, **options})])
        assert batch.pool_index is batch.pool_weights is None
        np.testing.assert_array_equal(batch.vision_index, plain.vision_index)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("video", {"pool": 0}, "positive whole number under 'pool'"),
        ("video", {"pool": 2.0}, "positive whole number under 'pool'"),
        ("image", {"pool": True}, "positive whole number under 'pool'"),
        ("image", {"pool": MAX_SIDE + 1}, "from 1 .no pooling. to 16 under 'pool', got 17"),
        ("video", {"pool": 2, "pool_method": "max"}, "unknown pool_method 'max'; there are bilinear and mean"),
        ("image", {"pool_method": "mean"}, "pool_method without pool"),
        ("image", {"pol": 2}, "did you mean 'pool'"),
    ],
)
def test_malformed_options(processors, kind, options, said):
    with pytest.raises(ConversationError, match=said) as caught:
        processors["qwen3_vl"].measure(ask({"type": kind, kind: "none", **options}))
    assert "message 0, part 0" in str(caught.value) and "\n" not in str(caught.value)


# Caps


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 600),
    st.integers(100, 2200),
    st.integers(100, 4000),
    st.sampled_from([None, 30, 192, 768]),
    st.sampled_from([None, 4000, 16_384]),
    st.integers(2, 5),
)
def test_caps_count_tokens_after_pooling(n, height, width, of_frame, of_video, pool):
    if of_frame is None and of_video is None:
        return
    share = min(of_frame or 10**9, (of_video or 10**12) // -(-n // 2))
    for rule, factor, most in ((clip_size, 32, 25_165_824), (frame_size, 28, 12_845_056)):
        bounds = {"factor": factor, "temporal_factor": 2, "min_pixels": 4 * factor**2, "max_pixels": most}
        caps = {"max_frame_tokens": of_frame, "max_video_tokens": of_video}
        try:
            h, w = pooled_size(rule, n, height, width, pool=pool, **bounds, **caps)
        except MediaError as error:
            assert "at the smallest size" in str(error) or share < 1
            continue
        rows, columns = h // factor, w // factor
        assert -(-rows // pool) * -(-columns // pool) <= share and h % factor == w % factor == 0
        try:
            plain = rule(n, height, width, **bounds, **caps)
        except MediaError:
            continue  # a shape that fits the cap only when it is pooled
        assert pooled_size(rule, n, height, width, pool=1, **bounds, **caps) == plain
        # Of an odd number of frames the reference's rule may give larger ones for a smaller bound.
        assert n % 2 or h * w >= plain[0] * plain[1]


def test_without_a_cap_frames_are_as_large_as_without_pooling(processors, mp4):
    processor = processors["qwen3_vl"]
    grids = [processor.measure(ask(video(mp4, pool=side))).grids for side in (1, 2, 3)]
    assert grids[0] == grids[1] == grids[2]


def test_a_cap_buys_resolution(processors, mp4):
    """At the same budget, pooled frames are larger, and take no more tokens."""
    for name, processor in processors.items():
        areas = []
        for side in (1, 2, 3):
            part = video(mp4, pool=side, max_video_tokens=36)
            ((t, h, w),) = processor.measure(ask(part)).grids
            sample = processor.sample(ask(part))
            assert t == 6 and (sample.tokens == processor.video_token_id).sum() <= 36
            areas.append(h * w)
        assert areas[0] < areas[1] <= areas[2], name


def test_a_shape_that_no_cap_can_hold(processors, tmp_path):
    path = write_clip(tmp_path / "wide.mp4", numbered_frames(8, 32, 640))
    with pytest.raises(
        MediaError, match=r"wide\.mp4: frames have more tokens .*pooled 2 x 2, than the 1 that max_frame"
    ):
        processors["qwen3_vl"].measure(ask(video(path, max_frame_tokens=1, pool=2)))
    assert processors["qwen3_vl"].measure(ask(video(path, max_frame_tokens=3, pool=8))).tokens


def test_rather_fewer_frames_than_smaller_ones(processors, mp4):
    """`min_frame_tokens` counts tokens after pooling, as the caps do."""

    def measured(**options):
        ((t, h, w),) = processors["qwen3_vl"].measure(ask(video(mp4, pool=2, **options))).grids
        return t, -(-h // 4) * -(-w // 4)

    frames, natural = measured()
    cap = frames * natural // 2
    # Smaller frames where they may be, half as many where they may not.
    assert measured(max_video_tokens=cap, min_frame_tokens=1)[0] == frames
    assert measured(max_video_tokens=cap, min_frame_tokens=natural) == (frames // 2, natural)


# Batches


def test_batches_without_pooling_are_as_they_were(processors):
    batch = processors["qwen3_vl"]([ask({"type": "image", "image": image(96, 64)})])
    assert batch.pool_index is batch.pool_weights is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_places_of_a_batch(processors, name):
    """Each token names the merged tokens that it is made of, whatever row, group, bucket or window they stand in."""
    processor = processors[name]
    parts = [
        {"type": "image", "image": image(160, 96), "pool": 3, "pool_method": "mean"},
        {"type": "image", "image": image(64, 96)},
        video(frames(5, 128, 224), pool=2),
    ]
    conversations = [ask(*parts), ask({"type": "text", "text": "no picture"}), ask(parts[2], parts[0]), ask(parts[1])]
    samples = [processor.sample(conversation) for conversation in conversations]
    fixed = {"pixel_table": processor.pixel_table, "pad_token_id": processor.pad_token_id, "window": processor.window}
    batch = collate([[samples[0], samples[1]], [], [samples[2]], [samples[3]]], groups=2, **fixed)
    assert batch.pool_index.dtype == np.int32 and batch.pool_weights.dtype == np.float32
    assert batch.pool_index.shape == batch.pool_weights.shape == (*batch.tokens.shape, 9)
    np.testing.assert_allclose(batch.pool_weights.sum(-1), batch.vision_index >= 0, atol=1e-6)
    np.testing.assert_array_equal(batch.pool_index[batch.vision_index < 0], 0)
    merged = [
        np.concatenate([v.patches[g].reshape(-1, 4 * processor.patch_dim) for v in batch.vision]).astype(np.float32)
        for g in range(2)
    ]
    for row, of_row in ((0, [samples[0]]), (2, [samples[2]]), (3, [samples[3]])):
        expected = []
        for medium in of_row[0].media:
            t, h, w = medium.grid
            tokens = medium.patches.reshape(t, h * w // 4, -1).astype(np.float32)
            for frame in tokens:
                if medium.pool is None:
                    expected.append(frame)
                else:
                    index, weights = medium.pool.mixing(h // 2, w // 2)
                    expected.append(np.einsum("nq,nqd->nd", weights, frame[index]))
        seen = batch.vision_index[row] >= 0
        index, weights = batch.pool_index[row][seen], batch.pool_weights[row][seen]
        np.testing.assert_array_equal(index[:, 0], batch.vision_index[row][seen])
        found = np.einsum("nq,nqd->nd", weights, merged[row // 2][index])
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)


def test_places_for_more_than_is_needed_and_for_less(processors):
    processor = processors["qwen3_vl"]
    sample = processor.sample(ask(video(frames(4, 96, 96), pool=2)))
    fixed = {"pixel_table": processor.pixel_table, "pad_token_id": processor.pad_token_id}
    four, nine = (collate([[sample]], pool_taps=taps, **fixed) for taps in (None, 9))
    assert four.pool_index.shape[-1] == 4 and nine.pool_index.shape[-1] == 9
    np.testing.assert_array_equal(nine.pool_weights[..., :4], four.pool_weights)
    assert not nine.pool_weights[..., 4:].any()
    text = collate([[processor.sample(ask())]], pool_taps=9, **fixed)
    assert text.pool_index.shape == (*text.tokens.shape, 9) and not text.pool_weights.any()
    with pytest.raises(DataError, match="pooled from 4 merged tokens to one, more than pool_taps=0"):
        collate([[sample]], pool_taps=0, **fixed)


def test_patches_of_a_pooled_batch_are_not_compared(processors):
    batch = processors["qwen3_vl"]([ask(video(frames(4, 96, 96), pool=2))])
    for look in (processors["qwen3_vl"].pixel_values, processors["qwen3_vl"].grids):
        with pytest.raises(DataError, match="make it without pool"):
            look(batch)


# Data


@pytest.fixture(scope="module")
def records(tmp_path_factory, mp4):
    """The clip pooled, pooled by the mean, whole, and an image, in one file."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("records")
    PIL.Image.fromarray(image(160, 96)).save(folder / "picture.png")
    clip = {"video": str(mp4), "max_frames": 4}
    answer = {"from": "gpt", "value": "a red square"}
    return write_records(
        folder / "data.jsonl",
        [
            {"id": "by-2", "video": {**clip, "pool": 2}, "conversations": [_human("<video>"), answer]},
            {
                "id": "mean",
                "video": {**clip, "pool": 2, "pool_method": "mean"},
                "conversations": [_human("<video>"), answer],
            },
            {"id": "whole", "video": clip, "conversations": [_human("<video>"), answer]},
            {
                "id": "picture",
                "image": {"image": "picture.png", "pool": 3, "pool_method": "mean"},
                "conversations": [_human("<image>"), answer],
            },
        ],
    )


def _human(mark):
    return {"from": "human", "value": f"{mark}\nwhat is it?"}


def test_facts_and_misfits(records, processors):
    processor = processors["qwen3_vl"]
    source = open_source(str(records), Reading.of(processor))
    facts = measure_source(source, processor)
    assert [one.pool_taps for one in facts] == [4, 4, 0, 9]
    assert facts[0].tokens == facts[1].tokens < facts[2].tokens and facts[0].frames == facts[2].frames
    shape = BatchShape(rows=1, length=400, vision=((8, 140),), pool_taps=4)
    assert [misfit(one, shape) is None for one in facts] == [True, True, True, False]
    with pytest.raises(
        DataError, match=r"pooled from 9 merged tokens to one, but batch\.pool_taps=4; raise batch\.pool"
    ):
        Plan(facts, shape, seed=0)
    assert misfit(SampleFacts("x", 9, (4,), pool_taps=4), BatchShape(vision="auto")) is not None
    with pytest.raises(ConfigError, match=r"batch\.pool_taps=-1"):
        BatchShape(pool_taps=-1)


def test_planned_batches_have_one_shape_and_tell_how_they_are_pooled(records, processors):
    processor = processors["qwen3_vl"]
    source = open_source(str(records), Reading.of(processor))
    facts = measure_source(source, processor)
    shape = BatchShape(rows=1, length=max(one.tokens for one in facts), vision=((2, 140),), pool_taps=9)
    plan = Plan(facts, shape, seed=0, shuffle=False, window=1)
    loader = BatchLoader(plan, SampleCache(source, processor, kept=Kept(1 << 30)), processor)
    planned = [loader(step) for step in range(4)]
    assert [row for step in range(4) for row in plan[step]] == [(0,), (1,), (2,), (3,)]
    assert {one.batch.pool_index.shape for one in planned} == {(1, shape.length, 9)}
    # The same clip, words and pixels, pooled in two ways: but for the names, only the weights differ.
    np.testing.assert_array_equal(planned[0].batch.tokens, planned[1].batch.tokens)
    assert not np.array_equal(planned[0].batch.pool_weights, planned[1].batch.pool_weights)
    first, second = (loader.samples[number].digest for number in (0, 1))
    assert first != second


def test_a_budget_pools_what_its_record_does_not(records, processors, mp4):
    processor = processors["qwen3_vl"]
    source = open_source(str(records), Reading.of(processor))

    def pools(budget):
        found = AtRates(source, (), budget)
        parts = [found[i].messages[0]["content"][0] for i in range(len(found))]
        processor.measure(found[2].messages)
        return [Pool.of(part) for part in parts]

    asked = [Pool(2), Pool(2, "mean"), None, Pool(3, "mean")]
    assert pools(VideoBudget()) == asked
    asked[2] = Pool(3)
    assert pools(VideoBudget(pool=3)) == asked
    asked[2] = Pool(3, "mean")
    assert pools(VideoBudget(pool=3, pool_method="mean", max_video_tokens=16)) == asked
    for wrong in ({"pool": 0}, {"pool": 17}, {"pool_method": "max"}):
        with pytest.raises(ConfigError, match=r"video_budget\.pool"):
            VideoBudget(**wrong)


# What the command line says


def test_data_frames(mp4, capsys):
    def shown(*arguments):
        assert cli.main(["data", "frames", str(mp4), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    whole, pooled = shown(), shown("--pool", "3", "--pool-method", "mean")
    t, h, w = whole["grid"]
    assert whole["tokens"] == t * h * w // 4 and pooled["grid"] == whole["grid"]
    assert pooled["tokens"] == t * -(-h // 6) * -(-w // 6) < whole["tokens"]
    assert cli.main(["data", "frames", str(mp4), "--pool", "3", "--pool-method", "mean"]) == 0
    assert f"{pooled['tokens'] // t} each after pooling by 3 (mean)" in capsys.readouterr().out
