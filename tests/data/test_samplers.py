"""Samplers: properties of each on clips of any shape, their acceptance on real files, and what a part may ask for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwenvl_jax as qv
from qwenvl_jax.data.motion import Motion, motion_scores
from qwenvl_jax.data.samplers import SAMPLERS, Clip, Wish, clip_of
from qwenvl_jax.data.sampling import clip_size, even_indices, frame_size, stepped_indices, uniform_indices
from qwenvl_jax.data.video import probe
from qwenvl_jax.errors import ConversationError, MediaError
from tests.data.test_motion import LOSSY, shots, still_with_burst
from tests.media import number_of, numbered_frames, write_clip
from tests.tiny import tiny_processor_folder

MOVING = ("dynamic", "event", "keyframes")
LENGTHS = [23, 9, 41, 12, 30, 6, 18, 25, 11, 37, 8, 15, 22, 10, 33, 13, 27, 7, 19, 20, 16]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A still minute with a burst from 30 to 31 s; 21 shots; 40 numbered frames at 10 fps, constant and varying."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "burst.mp4", still_with_burst(60, 30, 31), fps="10", options=LOSSY)
    write_clip(folder / "shots.mp4", shots(LENGTHS), fps="25", options=["-qp", "28"])
    write_clip(folder / "numbered.mp4", numbered_frames(40, 64, 96), fps="10")
    write_clip(
        folder / "vfr.mp4", numbered_frames(10, 64, 96), milliseconds=[0, 40, 90, 500, 540, 900, 1000, 1500, 1800, 1900]
    )
    return folder


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """By model type."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        tiny_processor_folder(folder / name, model_type=name)
    return {name: qv.Processor.from_pretrained(folder / name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}


def ask(path, **options):
    return [{"role": "user", "content": [{"type": "video", "video": path, **options}, {"type": "text", "text": "?"}]}]


def choose(name, path, rule=uniform_indices, start=None, end=None, **wish):
    info = probe(path)
    clip = clip_of(info, start, end)
    scores = motion_scores(info).part(clip.first, clip.first + len(clip.times)) if SAMPLERS[name].motion else None
    return SAMPLERS[name].choose(clip, scores, Wish(rule, **wish))


def within(choice, start, end):
    return int(((choice.times >= start) & (choice.times <= end)).sum())


# Properties, for any clip


@st.composite
def cases(draw):
    """A clip with motion scores: constant or varying rate, from somewhere within a file."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, fps, first = (
        draw(st.integers(1, 300)),
        draw(st.sampled_from([1.0, 7.0, 24.0, 30.0, 120.0])),
        draw(st.integers(0, 50)),
    )
    gaps = np.full(n, 1 / fps) if draw(st.booleans()) else rng.exponential(1 / fps, n) * rng.integers(0, 2, n)
    times = first / fps + np.concatenate([[0.0], np.cumsum(gaps)[:-1]])
    step = draw(st.sampled_from([1, 2, 5]))
    frames = np.arange(draw(st.integers(0, step - 1)), n, step)
    quiet = rng.random(len(frames)) < draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    moved, changed = rng.random(len(frames)), 2 * rng.random(len(frames))
    moved[quiet] = changed[quiet] = 0
    moved[:1] = changed[:1] = 0
    return Clip(first, times, fps, float(times[0]), float(times[-1]) + 1 / fps), Motion(frames, moved, changed)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(MOVING), st.data())
def test_any_clip_gives_frames_of_its_own_in_order_and_no_more_than_asked(case, name, data):
    clip, scores = case
    n = len(clip.times)
    wish = {"min_frames": data.draw(st.integers(1, 8)), "max_frames": data.draw(st.integers(8, 60))}
    exact = data.draw(st.none() | st.integers(1, n))
    if exact:
        wish["num_frames"] = exact
    elif data.draw(st.booleans()):
        wish["fps"] = data.draw(st.floats(0.1, 60))
    choice = SAMPLERS[name].choose(clip, scores, Wish(uniform_indices, **wish))
    places = choice.indices - clip.first
    assert (np.diff(places) > 0).all() and places[0] >= 0 and places[-1] < n
    np.testing.assert_array_equal(choice.times, clip.times[places])
    assert len(choice.why) == len(places) and all(choice.why)
    assert len(places) == exact if exact else min(wish["min_frames"], n) <= len(places) <= wish["max_frames"]
    again = SAMPLERS[name].choose(clip, scores, Wish(uniform_indices, **wish))
    np.testing.assert_array_equal(choice.indices, again.indices)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([uniform_indices, even_indices, stepped_indices]), st.data())
def test_uniform_and_count_are_the_rule_of_the_generation(case, rule, data):
    clip, n = case[0], len(case[0].times)
    if n < 2:
        return
    fps, number = data.draw(st.floats(1, 5)), 2 * data.draw(st.integers(1, n // 2))
    for name, options in (("uniform", {"fps": fps, "min_frames": 2}), ("count", {"num_frames": number})):
        choice = SAMPLERS[name].choose(clip, None, Wish(rule, **options))
        np.testing.assert_array_equal(choice.indices, clip.first + rule(n, clip.fps, **options))


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_no_frame_is_nearer_to_a_time_than_the_one_taken(case, shares):
    clip = case[0]
    asked = [clip.start + share * (clip.end - clip.start) for share in sorted(shares)]
    choice = SAMPLERS["timestamps"].choose(clip, None, Wish(uniform_indices, timestamps=asked))
    off = np.abs(choice.times - asked)
    np.testing.assert_allclose(off, np.abs(clip.times[:, None] - asked).min(axis=0), rtol=0, atol=1e-9)


# What each is for, on real files


@pytest.mark.parametrize("wish", [{}, {"max_frames": 32}, {"num_frames": 48}, {"fps": 2.0}])
def test_a_burst_gets_three_times_the_frames_at_equal_budget(clips, wish):
    dynamic = choose("dynamic", clips / "burst.mp4", **wish)
    even = choose("count", clips / "burst.mp4", num_frames=len(dynamic.indices))
    # Averaged over where the even frames happen to fall: their number in a second.
    assert within(dynamic, 30, 31) >= 3 * len(even.indices) / 60
    assert within(dynamic, 30, 31) >= 3 * within(dynamic, 10, 20) / 10
    assert within(dynamic, 30, 31) >= 2 * within(even, 30, 31)


def test_without_more_words_the_rate_goes_from_one_to_four(clips):
    choice = choose("dynamic", clips / "burst.mp4")
    rates = 1 / np.diff(choice.times)
    assert 60 <= len(choice.indices) <= 66 and rates.min() > 0.8 and rates.max() < 5.1  # 10 fps
    assert "4.0 fps" in choice.why[int(np.argmin(np.abs(choice.times - 30.5)))] and "1.0 fps" in choice.why[5]
    wide = choose("dynamic", clips / "burst.mp4", min_fps=0.5, max_fps=8.0)
    assert 29 <= len(wide.indices) <= 42 and within(wide, 30, 31) >= 7
    few = choose("dynamic", clips / "burst.mp4", max_frames=32)
    assert len(few.indices) == 32 and all("rates scaled by 0." in why for why in few.why)


def test_shuffled_scores_change_the_choice(clips):
    info = probe(clips / "burst.mp4")
    scores, rng = motion_scores(info), np.random.default_rng(0)
    order = rng.permutation(len(scores.frames))
    shuffled = Motion(scores.frames, scores.moved[order], scores.changed[order])
    for name in ("dynamic", "event"):
        one, two = (SAMPLERS[name].choose(clip_of(info), s, Wish(uniform_indices)) for s in (scores, shuffled))
        assert one.indices.tolist() != two.indices.tolist()


def test_keyframes_are_both_sides_of_every_cut(clips):
    choice = choose("keyframes", clips / "shots.mp4")
    known = np.cumsum(LENGTHS)[:-1]
    found = [cut in choice.indices and cut - 1 in choice.indices for cut in known]
    assert np.mean(found) >= 0.95
    assert len(choice.indices) == 2 * 20 + 2 + 21
    few = choose("keyframes", clips / "shots.mp4", max_frames=11)
    assert len(few.indices) == 11 and "5 strongest of 20" in "".join(few.why)
    assert len(choose("keyframes", clips / "numbered.mp4").indices) == 4
    assert len(choose("keyframes", clips / "shots.mp4", num_frames=100).indices) == 100


def test_event_frames_gather_around_cuts_and_where_motion_begins_and_ends(clips):
    choice = choose("event", clips / "burst.mp4")
    assert within(choice, 29, 32) / 3 >= 2 * within(choice, 0, 28) / 28
    assert "near an event" in "".join(choice.why) and "no event near" in choice.why[0]
    one_cut = choose("event", clips / "shots.mp4", start=0, end=1.2)  # the cut is at 0.92 s
    assert np.abs(one_cut.times - 0.92).min() < 0.2


# Through the processor


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "uniform"},
        {"sampler": "count", "num_frames": 6},
        {"sampler": "dynamic"},
        {"sampler": "dynamic", "fps": 1.0, "max_fps": 2.0, "min_fps": 0.5},
        {"sampler": "event", "num_frames": 7},
        {"sampler": "keyframes", "max_frames": 9},
        {"sampler": "timestamps", "timestamps": [0, 1.24, 3]},
        {"start": 1.0, "end": 3.0},
        {"sampler": "dynamic", "start": 1, "end": 3.5},
    ],
)
def test_every_sampler_goes_through_the_processor(processors, clips, model, options):
    processor, conversation = processors[model], ask(clips / "numbered.mp4", **options)
    batch = processor([conversation])
    opened = processor.opener.open(conversation[0]["content"][0])
    assert processor.grids(batch).tolist() == [list(opened.grid)]
    assert processor.measure(conversation).times == (opened.times,)
    if "start" in options:
        assert opened.choice.times.min() >= 1 and opened.choice.times.max() <= options["end"]
    text = processor.decode(processor.sample(conversation).tokens, skip_special_tokens=False)
    written = [f"<{time:.1f} seconds>" for time in opened.times]
    assert text.count(" seconds>") == (len(written) if model == "qwen3_vl" else 0)
    assert model != "qwen3_vl" or all(time in text for time in written)
    # The frames decoded are those chosen: 40 frames, of which frame i is of brightness 40 + 4 i.
    patches = processor.sample(conversation).media[0].patches
    p, (t, h, w) = processor.image.patch_size, opened.grid
    last = patches.reshape(t, h * w, 3, 2, p, p)[:, -1]
    seen = [number_of(np.moveaxis(pair[:, i], 0, -1).repeat(2, 0).repeat(2, 1)) for pair in last for i in range(2)]
    assert seen[: len(opened.choice.indices)] == opened.choice.indices.tolist()


def test_without_a_sampler_nothing_changes(processors, clips):
    for processor in processors.values():
        plain, named = (processor([ask(clips / "numbered.mp4", **o)]) for o in ({}, {"sampler": "uniform", "fps": 2.0}))
        for name in ("tokens", "positions", "vision_index"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(named, name))
        np.testing.assert_array_equal(processor.pixel_values(plain), processor.pixel_values(named))


def test_times_within_a_range_are_those_of_the_file(processors, clips):
    processor = processors["qwen3_vl"]
    facts = processor.measure(ask(clips / "numbered.mp4", start=2.0, end=3.0, num_frames=4))
    # Frames 20 to 30: linspace(0, 10, 4) rounds to 0, 3, 7, 10.
    assert facts.times == (((2.0 + 2.3) / 2, pytest.approx((2.7 + 3.0) / 2)),)
    with_rates = processor.measure(ask(clips / "numbered.mp4", start=2.0, fps=2.0))  # 20 frames: 2 s, 4 frames
    assert with_rates.grids[0][0] == 2 and with_rates.times[0][-1] > 3


def test_time_positions_of_a_range_count_from_its_first_frame(processors, clips):
    opener = processors["qwen2_5_vl"].opener
    part = {"type": "video", "video": clips / "numbered.mp4", "fps": 5.0}
    whole, half = opener.open(part), opener.open({**part, "start": 2.0})
    assert half.steps.tolist() == whole.steps[: len(half.steps)].tolist() and half.steps[0] == 0
    uneven = opener.open(
        {"type": "video", "video": part["video"], "sampler": "timestamps", "timestamps": [1, 1.5, 3, 3.5]}
    )
    assert uneven.steps.tolist() == [0, 4]  # two positions in a second


def test_nearest_frames_of_a_varying_rate(clips):
    choice = choose("timestamps", clips / "vfr.mp4", timestamps=[0.06, 0.3, 0.71, 0.73, 1.86])
    assert choice.indices.tolist() == [1, 3, 4, 5, 9]
    assert choice.times[-1] == pytest.approx(1.9) and choice.why[-1] == "nearest to 1.86 s"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 3.0, "end": 3.0}, "start=3 and end=3"),
        ({"start": 2.0, "end": 4.5}, "lasts 4.000 s"),
        ({"start": 4.0}, "no part of it"),
        ({"start": 2.01, "end": 2.09}, "no frame between start=2.01 and end=2.09"),
        ({"sampler": "timestamps", "timestamps": [1.0, 4.2]}, "timestamps=4.2 is outside the clip"),
        ({"sampler": "timestamps", "timestamps": [0.5, 1.5], "start": 1.0}, "timestamps=0.5 is outside the clip"),
        ({"sampler": "timestamps", "timestamps": [2.0, 1.0]}, "must not decrease"),
        ({"sampler": "dynamic", "num_frames": 41}, "more than the 40 frames"),
        ({"max_video_tokens": 3}, "less than a token for each of the 4"),
    ],
)
def test_what_cannot_be_had_is_refused(processors, clips, options, said):
    with pytest.raises(MediaError, match=said) as caught:
        processors["qwen3_vl"].measure(ask(clips / "numbered.mp4", **options))
    assert "numbered.mp4" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "dynamics"}, "unknown sampler 'dynamics'; did you mean 'dynamic'?"),
        ({"sampler": 3}, "unknown sampler 3; there are uniform, count"),
        ({"sampler": ""}, "unknown sampler ''"),
        ({"sampler": "count"}, "'count' without num_frames"),
        ({"sampler": "timestamps"}, "without timestamps"),
        ({"sampler": "count", "num_frames": 4, "fps": 2}, "both fps and num_frames"),
        ({"sampler": "count", "num_frames": 4, "max_frames": 9}, "max_frames, which the sampler 'count' does not take"),
        ({"max_fps": 3}, r"does not take; drop it, or choose one that does \(dynamic, event\)"),
        ({"timestamps": [1]}, r"\(timestamps\)"),
        ({"sampler": "timestamps", "timestamps": []}, "list of seconds"),
        ({"sampler": "timestamps", "timestamps": [1, "2"]}, "list of seconds"),
        ({"sampler": "timestamps", "timestamps": [1, float("nan")]}, "list of seconds"),
        ({"sampler": "dynamic", "min_fps": 5, "max_fps": 4}, "min_fps=5 above max_fps=4"),
        ({"sampler": "dynamic", "min_fps": 0}, "positive number under 'min_fps'"),
        ({"start": -1}, "seconds, a number not below 0, under 'start'"),
        ({"end": True}, "under 'end'"),
        ({"max_frame_tokens": 2.5}, "whole number"),
        ({"max_pixels": 10_000, "max_video_tokens": 100}, "both max_pixels and max_video_tokens"),
        ({"smapler": "count"}, "did you mean 'sampler'"),
    ],
)
def test_malformed_options(processors, options, said):
    with pytest.raises(ConversationError, match=said) as caught:
        processors["qwen3_vl"].measure(ask("none.mp4", **options))
    assert "message 0, part 0" in str(caught.value) and "\n" not in str(caught.value)


def test_frames_of_the_caller_take_no_sampler(processors):
    frames = qv.VideoFrames(np.zeros((4, 64, 64, 3), np.uint8), [0, 1, 2, 3], duration=4.0)
    for options in ({"sampler": "dynamic"}, {"start": 1.0}, {"sampler": "timestamps", "timestamps": [1.0]}):
        with pytest.raises(ConversationError, match="used as they are; drop"):
            processors["qwen3_vl"].measure(ask(frames, **options))
    assert processors["qwen3_vl"].measure(ask(frames, max_frame_tokens=1)).grids == ((2, 2, 2),)


# Caps


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 2048),
    st.integers(100, 2200),
    st.integers(100, 4000),
    st.sampled_from([None, 640, 768]),
    st.sampled_from([None, 16_384, 224 * 1024]),
)
def test_caps_hold_and_are_used(n, height, width, of_frame, of_video):
    if of_frame is None and of_video is None:
        return
    third = {"factor": 32, "temporal_factor": 2, "min_pixels": 4096, "max_pixels": 25_165_824}
    second = {"factor": 28, "temporal_factor": 2, "min_pixels": 3136, "max_pixels": 12_845_056}
    groups = -(-n // 2)
    share = min(of_frame or 10**9, (of_video or 10**12) // groups)
    for rule, budget in ((clip_size, third), (frame_size, second)):
        f, caps = budget["factor"], {"max_frame_tokens": of_frame, "max_video_tokens": of_video}
        try:
            h, w = rule(n, height, width, **budget, **caps)
        except MediaError as error:
            assert "at the smallest size" in str(error) and max(height, width) > share * min(height, width) / 4
            continue
        tokens = (h // f) * (w // f)
        assert tokens <= share and h % f == w % f == 0
        # Large frames come close to the cap, unless the clip's own bound is lower.
        bounds = [share, height * width / f**2]
        bounds += [24_576 / n] if rule is clip_size and of_video is None else []
        bounds += [16_384] if rule is frame_size and of_frame is None else []
        if min(bounds) > 100 and max(height, width) < 4 * min(height, width):
            assert tokens > 0.6 * min(bounds)


def test_a_shape_that_no_cap_can_hold(processors, tmp_path):
    path = write_clip(tmp_path / "wide.mp4", numbered_frames(8, 32, 640))
    with pytest.raises(MediaError, match=r"wide\.mp4: frames have 6 tokens at the smallest size .* more than the 2 "):
        processors["qwen3_vl"].measure(ask(path, max_frame_tokens=2))


def test_a_cap_may_raise_the_folders_budget(processors, clips):
    def tokens(model, **options):
        t, h, w = (
            processors[model].measure(ask(clips / "numbered.mp4", sampler="count", num_frames=40, **options)).grids[0]
        )
        return t * h * w // 4

    # The folders allow 262144 pixels for a clip of Qwen3-VL, 65536 for a frame of the others.
    assert tokens("qwen3_vl") == 20 * 6 and tokens("qwen3_vl", max_video_tokens=60) <= 60
    assert tokens("qwen3_vl", max_frame_tokens=4) <= 80
    assert tokens("qwen2_5_vl", max_video_tokens=60) <= 60
    folder_bound = clip_size(40, 1080, 1920, factor=32, temporal_factor=2, min_pixels=4096, max_pixels=262_144)
    raised = clip_size(
        40, 1080, 1920, factor=32, temporal_factor=2, min_pixels=4096, max_pixels=262_144, max_video_tokens=16_384
    )
    assert 20 * raised[0] * raised[1] // 1024 > 15_000 and folder_bound[0] * folder_bound[1] * 40 <= 262_144
