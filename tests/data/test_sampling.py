"""Which frames are sampled, their sizes, and the times of their groups."""

import numpy as np
import pytest

from qwenvl_jax.data.sampling import clip_size, group_times, uniform_indices
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
    "wrong", [{"fps": 2, "num_frames": 3}, {}, {"fps": 0}, {"fps": float("nan")}, {"num_frames": -1}]
)
def test_options_that_say_nothing_or_two_things(wrong):
    with pytest.raises(MediaError):
        uniform_indices(60, 12, **wrong)


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
