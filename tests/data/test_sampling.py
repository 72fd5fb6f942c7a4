"""Which frames are sampled, their sizes, and the times of their groups."""

import numpy as np
import pytest

from qwenvl_jax.data.sampling import (
    clip_size,
    even_indices,
    frame_size,
    group_times,
    stepped_indices,
    uniform_indices,
)
from qwenvl_jax.errors import MediaError


@pytest.mark.parametrize(
    ("n", "source_fps", "expected"),
    [
        (60, 12, [0, 7, 13, 20, 26, 33, 39, 46, 52, 59]),
        (7, 30, [0, 2, 4, 6]),
        (3, 30, [0, 1, 2]),
        (100, 24, [0, 14, 28, 42, 57, 71, 85, 99]),
        (61, 29.97, [0, 20, 40, 60]),
    ],
)
def test_indices_goldens(n, source_fps, expected):
    assert uniform_indices(n, source_fps, fps=2).tolist() == expected


def test_longer_clips_and_limits():
    indices = uniform_indices(300, 30, fps=2).tolist()
    assert len(indices) == 20 and indices[:12] == [0, 16, 31, 47, 63, 79, 94, 110, 126, 142, 157, 173]
    indices = uniform_indices(36000, 30, fps=2).tolist()
    assert len(indices) == 768 and indices[:10] == [0, 47, 94, 141, 188, 235, 282, 329, 375, 422]
    assert uniform_indices(60, 12, fps=2, max_frames=3).tolist() == [0, 30, 59]
    assert len(uniform_indices(60, 12, fps=2, min_frames=15)) == 15
    assert uniform_indices(60, 12, num_frames=2, min_frames=9).tolist() == [0, 59]
    assert uniform_indices(2, 12, num_frames=4).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("n", "source_fps", "expected"),
    [
        (60, 12, [0, 6, 12, 18, 24, 30, 36, 42, 48, 54]),
        (7, 30, [0, 1, 3, 5]),
        (61, 29.97, [0, 15, 30, 45]),
    ],
)
def test_stepped_indices_goldens(n, source_fps, expected):
    assert stepped_indices(n, source_fps, fps=2).tolist() == expected


@pytest.mark.parametrize(
    ("n", "source_fps", "wish", "expected"),
    [
        (60, 12, {"fps": 2}, [0, 7, 13, 20, 26, 33, 39, 46, 52, 59]),
        (66, 12, {"fps": 2}, [0, 7, 14, 22, 29, 36, 43, 51, 58, 65]),  # 11 wanted, 10 taken
        (7, 30, {"fps": 2}, [0, 2, 4, 6]),
        (3, 30, {"fps": 2}, [0, 2]),
        (40, 10, {"fps": 2, "min_frames": 9}, [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
        (40, 10, {"fps": 2, "max_frames": 7}, [0, 8, 16, 23, 31, 39]),
        (40, 10, {"num_frames": 5}, [0, 13, 26, 39]),
        (40, 10, {"num_frames": 7}, [0, 6, 11, 17, 22, 28, 33, 39]),
    ],
)
def test_even_indices_goldens(n, source_fps, wish, expected):
    assert even_indices(n, source_fps, **wish).tolist() == expected


@pytest.mark.reference
def test_even_indices_are_torchs_linspace():
    import torch

    rng = np.random.default_rng(1)
    cases = [(n, k) for n in range(2, 90) for k in range(2, n + 1, 2)]
    cases += [(int(n), 2 * int(k)) for n, k in rng.integers((800, 1), (40_000, 385), (3000, 2))]
    for n, k in cases:
        assert even_indices(n, 25, num_frames=k).tolist() == torch.linspace(0, n - 1, k).round().long().tolist()


@pytest.mark.parametrize("rule", [even_indices, stepped_indices])
@pytest.mark.parametrize("wish", [{"num_frames": 1}, {"num_frames": 12}, {"fps": 0.1, "max_frames": 1}])
def test_an_even_number_of_frames_must_be_there(rule, wish):
    with pytest.raises(MediaError, match="a video of 9 frames must be sampled at no fewer than 2"):
        rule(9, 10, **wish)
    with pytest.raises(MediaError, match="a video of 1 frames"):
        rule(1, 10, fps=2)


@pytest.mark.parametrize("rule", [uniform_indices, even_indices, stepped_indices])
@pytest.mark.parametrize(
    "wrong", [{"fps": 2, "num_frames": 3}, {}, {"fps": 0}, {"fps": float("nan")}, {"num_frames": -1}]
)
def test_options_that_say_nothing_or_two_things(rule, wrong):
    with pytest.raises(MediaError):
        rule(60, 12, **wrong)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((16, 1080, 1920), (928, 1664)),
        ((768, 1080, 1920), (128, 224)),
        ((2, 20, 20), (64, 64)),
        ((3, 64, 96), (64, 96)),
        ((5, 720, 1280), (704, 1280)),
    ],
)
def test_clip_size_goldens(clip, expected):
    budget = {"factor": 32, "temporal_factor": 2, "min_pixels": 4096, "max_pixels": 25_165_824}
    assert clip_size(*clip, **budget) == expected


def test_a_frame_is_sized_as_an_image_and_a_cap_counts_frames():
    budget = {"factor": 28, "temporal_factor": 2, "min_pixels": 3136, "max_pixels": 12_845_056}
    assert frame_size(768, 1080, 1920, **budget) == (1092, 1932)
    assert frame_size(1, 20, 20, **budget) == (56, 56)
    # 90 316 800 pixels for pairs of frames: 235 200 for each of 768.
    height, width = frame_size(768, 1080, 1920, **budget, cap_tokens=128_000)
    assert (height, width) == (336, 644) and height * width <= 235_200
    assert frame_size(8, 1080, 1920, **budget, cap_tokens=128_000) == (1092, 1932)


@pytest.mark.parametrize(("clip", "said"), [((1, 64, 64), "at least 2"), ((4, 40, 9000), "200 times")])
def test_clip_size_refuses(clip, said):
    with pytest.raises(MediaError, match=said):
        clip_size(*clip, factor=32, temporal_factor=2, min_pixels=4096, max_pixels=25_165_824)


@pytest.mark.parametrize(
    ("indices", "fps", "expected"),
    [
        ([0, 7, 13, 20, 26, 33, 39, 46, 52, 59], 12, ["0.3", "1.4", "2.5", "3.5", "4.6"]),
        ([0, 6, 12, 18, 24], 12, ["0.2", "1.2", "2.0"]),
        ([0, 2, 4, 6], 30, ["0.0", "0.2"]),
    ],
)
def test_group_times_goldens(indices, fps, expected):
    assert [f"{t:.1f}" for t in group_times(np.asarray(indices) / fps, 2)] == expected
