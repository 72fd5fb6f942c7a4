"""Qwen2-VL and Qwen2.5-VL: which generation a folder is of, the official dialect, times of every kind, windows."""

import json

import numpy as np
import pytest

import qwenvl_jax as qv
from qwenvl_jax.errors import CheckpointError, MediaError
from tests.media import numbered_frames, write_clip
from tests.tiny import tiny_processor_folder

RNG = np.random.default_rng(8)
GENERATIONS = ("qwen2_vl", "qwen2_5_vl")


def change(path, **values):
    """Sets keys of a JSON file, removing those that are None; makes the file if it is missing."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**old, **values}.items() if value is not None}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each, as the public ones are."""
    made = {}
    for model_type in GENERATIONS:
        made[model_type] = tmp_path_factory.mktemp(model_type)
        pixels = (3136, 90_000)
        tiny_processor_folder(made[model_type], model_type=model_type, older_files=True, image_pixels=pixels)
        vision = {"tokens_per_second": 2, "window_size": 112, "spatial_patch_size": 14, "spatial_merge_size": 2}
        change(made[model_type] / "config.json", model_type=model_type, vision_config=vision)
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """30 frames at 10 a second, and 12 at a varying rate."""
    folder = tmp_path_factory.mktemp("clips")
    times = [0, 100, 200, 300, 1500, 1600, 1700, 2600, 2700, 4300, 4400, 4500]
    return {
        "even": write_clip(folder / "even.mp4", numbered_frames(30, 56, 56), fps="10"),
        "varying": write_clip(folder / "varying.mp4", numbered_frames(12, 56, 56), milliseconds=times),
    }


def ask(**video):
    return [{"role": "user", "content": [{"type": "video", **video}, {"type": "text", "text": "?"}]}]


def frames(times, duration=None, height=56, width=56):
    pixels = RNG.integers(0, 256, (len(times), height, width, 3), dtype=np.uint8)
    return qv.VideoFrames(pixels, np.asarray(times, np.float64), duration)


def steps(processor, **video):
    """Time positions of a video's temporal patches from the first, and the position after the video from there."""
    sample = processor.sample(ask(**video))
    t, h, w = sample.media[0].grid
    at = np.flatnonzero(sample.tokens == processor.video_token_id)
    assert len(at) == t * h * w // 4 and (np.diff(at) == 1).all()
    times = sample.positions[at, 0].reshape(t, -1)
    assert (times == times[:, :1]).all()
    return (times[:, 0] - times[0, 0]).tolist(), int(sample.positions[at[-1] + 1, 0] - times[0, 0])


def load(folders, model_type, dialect="transformers"):
    return qv.Processor.from_pretrained(folders[model_type], dialect)


# Which generation.


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("older_files", [False, True])
def test_the_generation_is_told_by_config_or_else_by_the_processors_name(tmp_path, model_type, older_files):
    tiny_processor_folder(tmp_path, model_type=model_type, older_files=older_files)
    assert model_type in qv.Processor.from_pretrained(tmp_path).generation.model_types
    for name in ("tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        if (tmp_path / name).exists():
            change(tmp_path / name, processor_class=None)
    if model_type.startswith("qwen3"):  # its video processor is its own
        assert qv.Processor.from_pretrained(tmp_path).generation.written_times
        change(tmp_path / "video_preprocessor_config.json", video_processor_type=None)
    with pytest.raises(CheckpointError, match=r"nothing says which Qwen-VL this is.*copy config.json"):
        qv.Processor.from_pretrained(tmp_path)
    change(tmp_path / "config.json", model_type=model_type)
    assert model_type in qv.Processor.from_pretrained(tmp_path).generation.model_types


def test_config_goes_before_the_processors_name(tmp_path):
    tiny_processor_folder(tmp_path, model_type="qwen2_vl")
    change(tmp_path / "config.json", model_type="qwen2_5_vl")
    assert qv.Processor.from_pretrained(tmp_path).generation.absolute_time
    change(tmp_path / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="model_type 'llama'; it must be one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        qv.Processor.from_pretrained(tmp_path)


def test_a_video_processor_that_two_generations_share_tells_nothing(tmp_path):
    tiny_processor_folder(tmp_path, model_type="qwen2_vl", video_pixels=(3136, 20_000))
    for name in ("tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        change(tmp_path / name, processor_class=None)
    with pytest.raises(CheckpointError, match="nothing says"):
        qv.Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "tokens_per_second", "window"),
    [
        (None, 2, 4),  # as all public checkpoints say
        ({}, 4, 4),  # as the class says
        ({"tokens_per_second": 5, "window_size": 168}, 5, 6),
        ({"window_size": 140, "patch_size": 7}, 4, 10),
    ],
)
def test_what_config_says_of_time_and_windows_is_kept_without_it(tmp_path, config, tokens_per_second, window):
    tiny_processor_folder(tmp_path, model_type="qwen2_5_vl")
    if config is not None:
        change(tmp_path / "config.json", model_type="qwen2_5_vl", vision_config=config)
    processor = qv.Processor.from_pretrained(tmp_path)
    assert (processor.tokens_per_second, processor.window) == (tokens_per_second, window)
    processor.save_pretrained(tmp_path / "saved")
    again = qv.Processor.from_pretrained(tmp_path / "saved")
    assert (again.tokens_per_second, again.window) == (tokens_per_second, window)


@pytest.mark.parametrize("wrong", [{"tokens_per_second": 0}, {"window_size": "wide"}, {"window_size": 27}])
def test_numbers_of_config_that_cannot_be_used(tmp_path, wrong):
    tiny_processor_folder(tmp_path, model_type="qwen2_5_vl")
    change(tmp_path / "config.json", model_type="qwen2_5_vl", vision_config=wrong)
    with pytest.raises(CheckpointError, match=f"vision_config.{next(iter(wrong))}="):
        qv.Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "qwenvl_jax.json"])
def test_a_vision_config_that_is_no_object(tmp_path, name):
    tiny_processor_folder(tmp_path, model_type="qwen2_5_vl")
    change(tmp_path / name, vision_config=[1, 2], **({"model_type": "qwen2_5_vl"} if name == "config.json" else {}))
    with pytest.raises(CheckpointError, match=rf"/{name}: vision_config must be an object, but is \[1, 2\]"):
        qv.Processor.from_pretrained(tmp_path)


# Dialects.


@pytest.mark.parametrize("model_type", GENERATIONS)
def test_the_text_is_the_same_in_both_dialects_and_tells_no_times(folders, model_type):
    video = frames([0.0, 0.5, 1.0, 1.5], 2.0)
    samples = [load(folders, model_type, d).sample(ask(video=video)) for d in ("official", "transformers")]
    np.testing.assert_array_equal(samples[0].tokens, samples[1].tokens)
    processor = load(folders, model_type)
    text = processor.decode(samples[0].tokens, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\n<|vision_start|>" + "<|video_pad|>" * 8 + "<|vision_end|>?<|im_end|>\n")
    assert "seconds" not in text


@pytest.mark.parametrize(
    ("model_type", "dialect", "expected"),
    [
        ("qwen2_vl", "transformers", ([0, 1, 2, 3, 4, 5], 2)),
        ("qwen2_vl", "official", ([0, 1, 2, 3, 4, 5], 6)),
        ("qwen2_5_vl", "transformers", ([0, 2, 4, 6, 8, 10], 2)),
        ("qwen2_5_vl", "official", ([0, 2, 4, 6, 8, 10], 11)),
    ],
)
def test_what_follows_a_video(folders, model_type, dialect, expected):
    """Two frames a second; 2 x 2 merged tokens."""
    processor = load(folders, model_type, dialect)
    assert steps(processor, video=frames(np.arange(12) / 2, 6.0)) == expected


@pytest.mark.parametrize("model_type", GENERATIONS)
def test_the_dialects_give_images_alike(folders, model_type):
    image = RNG.integers(0, 256, (90, 170, 3), dtype=np.uint8)
    conversation = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    one, two = (load(folders, model_type, d)([conversation]) for d in ("official", "transformers"))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.positions, two.positions)


@pytest.mark.parametrize("model_type", GENERATIONS)
def test_frames_of_a_file_in_each_dialect(folders, clips, model_type):
    """Three seconds at 10 frames a second: six frames at two a second, when nothing else is said."""
    times = {}
    for dialect in ("official", "transformers"):
        facts = load(folders, model_type, dialect).measure(ask(video=clips["even"]))
        times[dialect] = np.round(np.asarray(facts.times[0]) * 20).astype(int).tolist()  # sums of frame numbers
    assert times["transformers"] == [0 + 5, 10 + 15, 20 + 25]
    assert times["official"] == [0 + 6, 12 + 17, 23 + 29]
    with pytest.raises(MediaError, match=r"video .*even\.mp4: a video of 30 frames must be sampled at no fewer than 2"):
        load(folders, model_type).measure(ask(video=clips["even"], num_frames=40))


# Times.


def test_evenly_spaced_frames_are_spread_over_their_clip(folders):
    processor = load(folders, "qwen2_5_vl")
    assert steps(processor, video=frames([0, 0.5, 1, 1.5, 2, 2.5], 3.0))[0] == [0, 2, 4]
    # The reference goes by frames in a second of the clip, not by the times themselves.
    assert steps(processor, video=frames([0, 0.5, 1, 1.5, 2, 2.5], 6.0))[0] == [0, 4, 8]
    # Picked evenly from a film of 29.97 frames a second, as whole frames allow.
    picked = np.round(np.linspace(0, 179, 12)) / 29.97
    assert steps(processor, video=frames(picked, 180 / 29.97))[0] == [0, 2, 4, 6, 8, 10]


def test_frames_at_irregular_times_stand_at_their_times(folders):
    processor = load(folders, "qwen2_5_vl")
    times = [0.3, 0.9, 1.7, 1.9, 5.3, 11.25, 11.5]
    expected = [0, 2, 10, 22]  # 2 x (0, 1.4, 5, 11.2), truncated
    for duration in (None, 20.0):
        assert steps(processor, video=frames(times, duration))[0] == expected
    assert steps(processor, video=frames([0.0] * 4))[0] == [0, 0]


def test_a_missing_duration_is_told_where_it_matters(folders):
    processor = load(folders, "qwen2_5_vl")
    for dialect in ("official", "transformers"):
        with pytest.raises(MediaError, match=r"message 0, part 0: .*; give duration, the length in seconds"):
            load(folders, "qwen2_5_vl", dialect)([ask(video=frames([0, 0.5, 1.0, 1.5]))])
    assert steps(processor, video=frames([0, 0.5])) == ([0], 2)  # one temporal patch
    assert steps(load(folders, "qwen2_vl"), video=frames([0, 0.5, 1.0, 1.5]))[0] == [0, 1]


def test_a_file_of_varying_rate_goes_by_its_own_times(folders, clips):
    processor = load(folders, "qwen2_5_vl")
    facts = processor.measure(ask(video=clips["varying"], num_frames=6))
    assert facts.grids == ((3, 4, 4),)
    # Frames 0 2 4 6 8 10: pairs begin at 0, 1.5 and 2.7 seconds.
    assert steps(processor, video=clips["varying"], num_frames=6)[0] == [0, 3, 5]
    assert steps(processor, video=clips["even"], num_frames=6)[0] == [0, 2, 4]


# Sizes and windows.


@pytest.mark.parametrize("model_type", GENERATIONS)
def test_bounds_of_a_part_count_a_frame(folders, model_type):
    processor = load(folders, model_type)

    def grid(n, **options):
        return processor.measure(ask(video=frames(np.arange(n) / 2, n / 2, 224, 224), **options)).grids[0]

    assert grid(4) == (2, 16, 16) and grid(40) == (20, 16, 16)
    assert grid(4, max_pixels=112 * 112) == (2, 8, 8) and grid(40, max_pixels=112 * 112) == (20, 8, 8)
    assert grid(4, min_pixels=280 * 280) == (2, 20, 20)


def test_only_towers_with_windows_get_them_and_the_references_order_remains(folders):
    image = RNG.integers(0, 256, (170, 230, 3), dtype=np.uint8)
    parts = [{"type": "image", "image": image}, {"type": "video", "video": frames(np.arange(6) / 2, 3.0, 140, 200)}]
    conversations = [[{"role": "user", "content": parts}], [{"role": "user", "content": parts[::-1]}]]
    plain, windowed = load(folders, "qwen2_vl"), load(folders, "qwen2_5_vl")
    assert (plain.window, windowed.window) == (0, 4)
    for groups in (1, 2):
        one, two = plain(conversations, groups=groups), windowed(conversations, groups=groups)
        assert all(rows.windows is None for rows in one.vision)
        assert all(rows.windows.max() > 1 for rows in two.vision)
        assert any((a.patches != b.patches).any() for a, b in zip(one.vision, two.vision, strict=True))
        np.testing.assert_array_equal(plain.pixel_values(one), windowed.pixel_values(two))
        np.testing.assert_array_equal(plain.grids(one), windowed.grids(two))
        assert plain.grids(one).tolist() == [[1, 12, 16]] * 2 + [[3, 10, 14]] * 2
