"""Motion scores of real files: what moves, what cuts, and what encoding alone does not."""

import tracemalloc

import numpy as np
import pytest

from qwenvl_jax.data import motion
from qwenvl_jax.data.motion import activity, cuts, motion_scores
from qwenvl_jax.data.video import probe
from qwenvl_jax.errors import MediaError
from tests.media import write_clip

# As people encode: lossy, with a whole picture every second, which makes still pictures flicker.
LOSSY = ["-qp", "30", "-g", "10"]


def still_with_burst(seconds: int, start: float, end: float, fps: int = 10) -> np.ndarray:
    """u8[n, 64, 96, 3]: a textured picture over which a small square moves between two times."""
    background = np.random.default_rng(0).integers(60, 190, (16, 24, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.repeat(background[None], seconds * fps, axis=0)
    for i in range(round(start * fps), round(end * fps)):
        x = 7 * i % 80
        frames[i, 24:36, x : x + 12] = (250, 20, 20)
    return frames


def shots(lengths: list[int]) -> np.ndarray:
    """u8[n, 48, 64, 3]: shots of a colour each, in which a textured field slides on by two pixels a frame."""
    rng, frames = np.random.default_rng(3), []
    for length in lengths:
        tint = rng.integers(30, 200, 3)
        field = np.clip(rng.integers(-40, 40, (12, 40, 1)).repeat(4, 0).repeat(4, 1) + tint, 0, 255).astype(np.uint8)
        frames += [np.roll(field, 2 * i, axis=1)[:, :64] for i in range(length)]
    return np.stack(frames)


@pytest.fixture(scope="module")
def burst(tmp_path_factory):
    """A still minute in which something moves from 30 to 31 s."""
    path = tmp_path_factory.mktemp("motion") / "burst.mp4"
    return probe(write_clip(path, still_with_burst(60, 30, 31), fps="10", options=LOSSY))


def test_activity_is_where_something_moves(burst):
    level = activity(motion_scores(burst), burst.times)
    inside = (burst.times >= 30) & (burst.times <= 31)
    around = (burst.times >= 29.4) & (burst.times <= 31.6)
    assert level[inside].min() > 0.85 and level[~around].max() < 0.05
    assert not len(cuts(motion_scores(burst)))


def test_scores_are_the_same_each_time_and_take_little_memory(burst, monkeypatch):
    one = motion_scores(burst)
    assert motion_scores(burst) is one
    monkeypatch.setattr(motion, "_SCORED", motion.Kept(1 << 20))
    tracemalloc.start()
    two = motion_scores(burst)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(one.moved, two.moved)
    np.testing.assert_array_equal(one.changed, two.changed)
    assert peak < 2 * 2**20, "600 frames of 18 kB were held together"


def test_every_cut_is_found_and_nothing_else(tmp_path):
    lengths = [23, 9, 41, 12, 30, 6, 18, 25, 11, 37, 8, 15, 22, 10, 33, 13, 27, 7, 19, 20, 16]
    frames = shots(lengths)
    info = probe(write_clip(tmp_path / "shots.mp4", frames, fps="25", options=["-qp", "28"]))
    scores = motion_scores(info)
    assert scores.frames[cuts(scores)].tolist() == np.cumsum(lengths)[:-1].tolist()


def test_a_cut_of_colours_as_bright_as_each_other(tmp_path):
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    frames[:10], frames[10:] = (255, 0, 0), (0, 130, 0)
    assert cuts(motion_scores(probe(write_clip(tmp_path / "colours.mp4", frames)))).tolist() == [10]


def test_of_a_fast_file_some_frames_are_looked_at(tmp_path):
    lengths = [61, 40, 59]
    info = probe(write_clip(tmp_path / "fast.mp4", shots(lengths), fps="120"))
    scores = motion_scores(info)
    assert scores.frames.tolist() == list(range(0, 160, 2))
    assert scores.frames[cuts(scores)].tolist() == [62, 102]  # the first looked at from 61 and from 101 on


def test_a_part_counts_from_its_own_first_frame(tmp_path):
    scores = motion_scores(probe(write_clip(tmp_path / "shots.mp4", shots([10, 10, 10]))))
    part = scores.part(10, 25)
    assert part.frames.tolist() == list(range(15)) and part.changed[0] == 0
    assert cuts(part).tolist() == [10] and cuts(scores).tolist() == [10, 20]


def test_a_damaged_file_is_named(tmp_path):
    path = write_clip(tmp_path / "whole.mp4", still_with_burst(4, 1, 2), options=["-g", "4"])
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") + 4000
    data[start : start + 2000] = bytes(2000)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=r"damaged\.mp4"):
        motion_scores(probe(tmp_path / "damaged.mp4"))


def test_a_file_that_changes_after_the_probe(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", shots([20]))
    info = probe(path)
    for length, said in ((15, "of 20 frames asked for, 15 came"), (25, "more frames than its index")):
        write_clip(path, shots([length]))
        with pytest.raises(MediaError, match=said):
            motion_scores(info)
    path.unlink()
    with pytest.raises(MediaError, match="does not exist"):
        motion_scores(info)
