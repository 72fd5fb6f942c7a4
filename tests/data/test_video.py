"""Videos: times and frames of real files, and one clear line for each kind of bad file."""

import re

import numpy as np
import pytest

from qwenvl_jax.data.video import VideoFrames, probe, read_frames, stream_through
from qwenvl_jax.errors import MediaError
from tests.media import ffmpeg, number_of, numbered_frames, write_clip, write_turned

VFR = [0, 40, 80, 120, 500, 540, 600, 1000, 1033, 1500, 1700, 1790]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One file of each kind, by name."""
    folder = tmp_path_factory.mktemp("clips")
    plain = write_clip(folder / "cfr12.mp4", numbered_frames(24, 48, 64), fps="12")
    write_clip(folder / "cfr30.mp4", numbered_frames(30, 48, 64), fps="30", options=["-bf", "3", "-g", "12"])
    write_clip(folder / "ntsc.mp4", numbered_frames(30, 48, 64), fps="30000/1001", options=["-bf", "2"])
    write_clip(folder / "vfr.mp4", numbered_frames(12, 48, 64), milliseconds=VFR)
    write_clip(folder / "odd.mp4", numbered_frames(6, 33, 51), fps="10")
    write_turned(folder / "rotated.mp4", plain)
    ffmpeg("-ss", "0.52", "-i", folder / "cfr30.mp4", "-c", "copy", folder / "edited.mp4")
    ffmpeg("-itsoffset", "1.5", "-i", plain, "-c", "copy", folder / "offset.mp4")
    ffmpeg("-i", folder / "ntsc.mp4", "-c", "copy", folder / "ntsc.mkv")
    ffmpeg("-i", folder / "ntsc.mp4", "-c", "copy", folder / "ntsc.ts")
    ffmpeg("-i", plain, "-c:v", "mpeg4", "-bf", "2", "-q:v", "2", folder / "reordered.avi")
    return folder


@pytest.mark.parametrize(
    ("name", "fps", "n", "size"),
    [
        ("cfr12.mp4", 12, 24, (48, 64)),
        ("cfr30.mp4", 30, 30, (48, 64)),
        ("ntsc.mp4", 30000 / 1001, 30, (48, 64)),
        ("ntsc.mkv", 30000 / 1001, 30, (48, 64)),
        ("ntsc.ts", 30000 / 1001, 30, (48, 64)),
        ("odd.mp4", 10, 6, (33, 51)),
        ("rotated.mp4", 12, 24, (64, 48)),
        ("offset.mp4", 12, 24, (48, 64)),
        ("reordered.avi", 12, 24, (48, 64)),
    ],
)
def test_constant_rates_give_index_over_rate_and_every_frame_comes(clips, name, fps, n, size):
    info = probe(clips / name)
    assert (info.fps, info.height, info.width) == (fps, *size)
    assert info.times.tolist() == [i / fps for i in range(n)]
    assert info.duration == pytest.approx(n / fps, abs=1e-3)
    wanted = [0, 1, 1, n // 2, n - 1]
    frames = list(read_frames(info, np.array(wanted)))
    assert all(f.shape == (*size, 3) and f.dtype == np.uint8 for f in frames)
    if name != "rotated.mp4":  # turned, the bright quarter stands where the number is read
        assert [number_of(f) for f in frames] == wanted


def test_rotation_turns_pixels(clips):
    upright, turned = (next(read_frames(probe(clips / f), np.array([0]))) for f in ("cfr12.mp4", "rotated.mp4"))
    np.testing.assert_allclose(turned.astype(int), np.rot90(upright).astype(int), atol=8)


def test_times_of_a_varying_rate_are_the_streams_own(clips):
    info = probe(clips / "vfr.mp4")
    np.testing.assert_allclose(info.times, np.array(VFR) / 1000, atol=1e-9)
    assert info.fps == pytest.approx(12 / info.duration)
    assert [number_of(f) for f in read_frames(info, np.arange(12))] == list(range(12))


def test_an_edit_list_hides_frames_and_times_start_at_the_first_shown(clips):
    info = probe(clips / "edited.mp4")
    assert len(info.times) < 30 and info.times[0] == 0 and info.fps == 30
    numbers = [number_of(f) for f in read_frames(info, np.arange(len(info.times)))]
    assert numbers == list(range(30 - len(numbers), 30))


def test_many_frames(clips, tmp_path, monkeypatch):
    info = probe(write_clip(tmp_path / "long.mp4", numbered_frames(40, 16, 16).repeat(40, axis=0), fps="30"))
    wanted = np.sort(np.random.default_rng(0).permutation(1600)[:768])
    assert [number_of(f) for f in read_frames(info, wanted)] == (wanted // 40).tolist()
    info = probe(clips / "cfr30.mp4")
    monkeypatch.setattr("qwenvl_jax.data.video.MAX_SELECTED", 3)
    assert [number_of(f) for f in stream_through(info, np.array([2, 5, 9, 11]))] == [2, 5, 9, 11]


def test_the_reading_may_stop_early(clips):
    frames = read_frames(probe(clips / "cfr30.mp4"), np.arange(30))
    assert number_of(next(frames)) == 0
    frames.close()


def _bad_files(clips, folder):
    """What is in each bad file, and what its error says."""
    whole = (clips / "cfr30.mp4").read_bytes()
    fast = folder / "fast.mp4"
    ffmpeg("-i", clips / "cfr30.mp4", "-c", "copy", "-movflags", "+faststart", fast)
    fast_bytes, mkv = fast.read_bytes(), (clips / "ntsc.mkv").read_bytes()
    ts = (clips / "ntsc.ts").read_bytes()
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", folder / "audio.mp4")
    ffmpeg("-i", clips / "cfr12.mp4", folder / "whole.gif")
    gif = (folder / "whole.gif").read_bytes()
    secret = clips / "cfr12.mp4"
    return {
        "empty.mp4": (b"", "is empty"),
        "random.mp4": (np.random.default_rng(0).bytes(50_000), "not a video"),
        "text.mp4": (b"hello\n" * 100, "video"),
        "audio.mp4": ((folder / "audio.mp4").read_bytes(), "no video stream"),
        "noindex.mp4": (whole[: len(whole) * 2 // 3], "truncated"),
        "cut.mp4": (fast_bytes[: len(fast_bytes) * 2 // 3], "truncated"),
        "cut_a_little.mp4": (fast_bytes[:-1], "truncated"),
        "cut.mkv": (mkv[: len(mkv) * 2 // 3], "truncated"),
        "cut.ts": (ts[: len(ts) * 2 // 3 // 188 * 188 + 40], "truncated"),
        "cut.gif": (gif[: len(gif) * 2 // 3], "truncated"),
        "concat.mp4": (f"ffconcat version 1.0\nfile '{secret}'\n".encode(), "playlist"),
        "hls.mp4": (f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n".encode(), "playlist"),
        "picture.mp4": (b"P6 8 8 255\n" + bytes(192), "not a video"),
    }


def test_bad_files_give_one_line_that_names_them(clips, tmp_path):
    for name, (data, said) in _bad_files(clips, tmp_path).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(MediaError) as caught:
            list(read_frames(probe(path), np.array([0])))
        message = str(caught.value)
        assert said in message and str(path) in message and "\n" not in message, f"{name}: {message}"
    for path, said in ((tmp_path / "missing.mp4", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(MediaError, match=said):
            probe(path)


def test_damage_inside_a_file_is_not_passed_over(clips, tmp_path):
    data = bytearray((clips / "cfr30.mp4").read_bytes())
    start = data.find(b"mdat") + 1500
    data[start : start + 1500] = bytes(1500)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=re.escape("damaged.mp4")):
        info = probe(tmp_path / "damaged.mp4")
        list(read_frames(info, np.arange(len(info.times))))


def test_a_file_that_changes_between_probe_and_reading(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes((clips / "cfr30.mp4").read_bytes())
    info = probe(path)
    path.write_bytes((clips / "cfr12.mp4").read_bytes())
    with pytest.raises(MediaError, match="damaged"):
        list(read_frames(info, np.array([0, 29])))
    with pytest.raises(MediaError, match="do not exist"):
        list(read_frames(info, np.array([30])))


def test_a_child_that_takes_too_long_is_stopped(clips, monkeypatch):
    info = probe(clips / "cfr30.mp4")
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.TIME_LIMIT_SECONDS", -2 * info.duration)
    with pytest.raises(MediaError, match="took ffmpeg more than"):
        list(read_frames(info, np.arange(30)))


def test_names_that_look_like_options_or_protocols(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "concat:a.mp4", "a%03d.mp4", "ü 'x'.mp4"):
        (tmp_path / name).write_bytes((clips / "cfr12.mp4").read_bytes())
        info = probe(name)
        assert number_of(next(read_frames(info, np.array([0])))) == 0


FRAMES = np.zeros((3, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "timestamps", "duration", "said"),
    [
        (FRAMES, None, None, "unknown"),
        (FRAMES, [0.0, 0.5], None, "each of the 3 frames"),
        (FRAMES, [0.0, np.nan, 1.0], None, "known"),
        (FRAMES, [-1.0, 0.0, 1.0], None, "not negative"),
        (FRAMES, [0.0, 2.0, 1.0], None, "must not decrease"),
        (FRAMES, ["a", "b", "c"], None, "numbers"),
        (FRAMES, [0.0, 1.0, 2.0], 1.5, "duration"),
        (FRAMES, [0.0, 1.0, 2.0], float("nan"), "duration"),
        (FRAMES.astype(np.float32), [0.0, 1.0, 2.0], None, "uint8"),
        (FRAMES[..., :1], [0.0, 1.0, 2.0], None, "uint8"),
        (FRAMES[:0], [], None, "uint8"),
    ],
)
def test_video_frames_refuse_what_is_unknown_or_does_not_match(frames, timestamps, duration, said):
    with pytest.raises(MediaError, match=said):
        VideoFrames(frames, timestamps, duration)


def test_video_frames_keep_what_is_given():
    clip = VideoFrames(FRAMES, [0, 0.5, 0.5], duration=2.0)
    assert clip.timestamps.dtype == np.float64 and clip.duration == 2.0
    assert (clip.height, clip.width) == (4, 4)
