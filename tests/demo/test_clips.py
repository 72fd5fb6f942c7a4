"""The demo's clips: pure functions of (seed, index, split), real MP4 files, held-out pairs, whole sets or none."""

import dataclasses
import hashlib

import numpy as np
import pytest

from qwenvl_jax.data.video import probe, read_frames
from qwenvl_jax.demo import clips
from qwenvl_jax.errors import DataError


def test_a_description_depends_on_seed_index_and_split_alone():
    clip = clips.describe_clip(3, 5, "train")
    assert clip == clips.describe_clip(3, 5, "train")
    assert (
        len({clip, *(clips.describe_clip(*key) for key in ((4, 5, "train"), (3, 6, "train"), (3, 5, "validation")))})
        == 4
    )
    # The description itself, fixed: a change of it invalidates every figure that was measured on these clips.
    text = repr([clips.describe_clip(0, index, "evaluation") for index in range(20)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4ba3c25b698c2fb1"


def test_descriptions_keep_their_promises():
    seen = set()
    for index in range(300):
        split = clips.SPLITS[index % 3]
        clip = clips.describe_clip(0, index, split)
        seen |= {(clip.width, clip.height), clip.frame_rate}
        assert 3.9 <= clip.duration <= 12.1
        assert 2 <= len(clip.events) == len({event.colour for event in clip.events}) <= 4
        for event in clip.events:
            assert event.start >= 0.3 and event.end <= clip.duration and event.end - event.start > 0.99
            assert (clips.HELD_OUT[event.colour] == event.shape) == (split == "evaluation")
    assert seen >= {*clips.FRAME_SIZES, *clips.FRAME_RATES}
    assert set(clips.HELD_OUT.values()) == set(clips.SHAPES)


def test_starts_lie_evenly_between_sampled_frames():
    starts = [e.start for i in range(400) for e in clips.describe_clip(1, i, "train").events]
    phase, _ = np.histogram(np.mod(starts, 0.5), bins=5)
    assert phase.min() > 0.8 * len(starts) / 5


def test_objects_stay_inside_the_frame_and_keep_moving():
    clip = clips.describe_clip(0, 1, "train")
    for event in clip.events:
        corners = clips.path(event, np.linspace(0, clip.duration, 200), clip.width, clip.height)
        assert (corners >= 0).all()
        assert (corners + event.side <= (clip.width, clip.height)).all()
        assert np.abs(np.diff(corners, axis=0)).sum() > 5


def test_a_written_clip_shows_its_objects_at_their_times(tmp_path):
    clip = next(c for c in (clips.describe_clip(0, i, "train") for i in range(50)) if c.frame_rate == "30000/1001")
    clips.write_clip(clip, tmp_path / "clip.mp4")
    info = probe(tmp_path / "clip.mp4")
    assert (info.width, info.height, len(info.times)) == (clip.width, clip.height, clip.frames)
    np.testing.assert_allclose(info.times, np.arange(clip.frames) / clip.fps, atol=1e-6)
    shown_NHWC = np.stack(list(read_frames(info, np.arange(clip.frames)))).astype(int)
    drawn_NHWC = clips.draw_clip(clip).astype(int)
    assert np.abs(shown_NHWC - drawn_NHWC).mean() < 4
    alone = dataclasses.replace(clip, events=())
    changed_N = (np.abs(shown_NHWC - clips.draw_clip(alone)).max(axis=3) > 60).sum(axis=(1, 2)) > 20
    present_N = [any(e.start <= t < e.end for e in clip.events) for t in info.times]
    np.testing.assert_array_equal(changed_N, present_N)


@pytest.mark.parametrize("shape", clips.SHAPES)
def test_shapes_differ_and_fill_their_square(shape):
    mask = clips._shape_mask(shape, 20)
    assert mask.shape == (20, 20) and mask.min() >= 0 and mask.max() == 1
    others = [clips._shape_mask(other, 20) for other in clips.SHAPES if other != shape]
    assert min(np.abs(mask - other).mean() for other in others) > 0.1


def test_a_set_is_made_once_and_taken_as_it_is(tmp_path, monkeypatch):
    seen = []
    made = clips.make_clips(tmp_path, "train", 3, 7, progress=lambda jobs: (seen.append(1) or job for job in jobs))
    assert len(seen) == 3 and [clip for _, clip in made] == [clips.describe_clip(7, i, "train") for i in range(3)]
    assert all(path.stat().st_size > 500 for path, _ in made)
    monkeypatch.setattr(clips, "write_clip", lambda *args: pytest.fail("the set was there already"))
    assert clips.make_clips(tmp_path, "train", 3, 7) == made


def test_a_set_that_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def stop(clip, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clips, "write_clip", stop)
        with pytest.raises(KeyboardInterrupt):
            clips.make_clips(tmp_path, "train", 3, 7)
    assert list(tmp_path.iterdir()) == []
    assert len(clips.make_clips(tmp_path, "train", 2, 7)) == 2


def test_a_set_of_other_clips_is_refused(tmp_path):
    (target,) = {path.parent for path, _ in clips.make_clips(tmp_path, "train", 1, 0)}
    manifest = target / clips.MANIFEST
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataError, match="holds other clips"):
        clips.make_clips(tmp_path, "train", 1, 0)
    manifest.write_text("{")
    with pytest.raises(DataError, match="is no list of clips"):
        clips.make_clips(tmp_path, "train", 1, 0)
    with pytest.raises(DataError, match="not one of train, validation, evaluation"):
        clips.describe_clip(0, 0, "test")


def test_ffmpeg_failing_is_said_in_one_line(tmp_path):
    with pytest.raises(DataError, match="could not write") as caught:
        clips.write_clip(clips.describe_clip(0, 0, "train"), tmp_path / "no folder" / "clip.mp4")
    assert "\n" not in str(caught.value)
