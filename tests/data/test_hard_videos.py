"""Videos as they occur: codecs, depths, fields, odd rates and starts, each with the frames and times it was made of."""

import functools
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from qwenvl_jax.data import ffmpeg_child, video
from qwenvl_jax.data.ffmpeg_child import ffmpeg_program
from qwenvl_jax.data.video import VideoInfo, probe, read_frames, skip_through, stream_through
from tests.media import ffmpeg, number_of, numbered_frames, write_clip

N, HEIGHT, WIDTH = 20, 64, 96
X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-qp", "4", "-pix_fmt", "yuv420p"]
X265 = ["-c:v", "libx265", "-preset", "ultrafast", "-crf", "2"]
QUIET = "log-level=error"
HDR = f"{QUIET}:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"

# By name: frames per second, and the options it is encoded with.
KINDS = {
    "film.mp4": ("24000/1001", [*X264, "-bf", "3", "-g", "12"]),
    "ntsc.mov": ("30000/1001", [*X264, "-bf", "2"]),
    "started.ts": ("25", [*X264, "-bf", "2", "-output_ts_offset", "5"]),
    "late.mkv": ("25", [*X264, "-output_ts_offset", "3"]),
    "interlaced.mp4": ("25", [*X264, "-flags", "+ildct+ilme", "-x264-params", "tff=1"]),
    "ten_bits.mp4": ("25", ["-c:v", "libx264", "-qp", "4", "-pix_fmt", "yuv420p10le"]),
    "hevc.mp4": ("25", [*X265, "-x265-params", f"{QUIET}:keyint=12:bframes=3", "-pix_fmt", "yuv420p"]),
    "hevc10.mkv": ("25", [*X265, "-x265-params", QUIET, "-pix_fmt", "yuv420p10le"]),
    "hdr.mp4": ("25", [*X265, "-x265-params", HDR, "-pix_fmt", "yuv420p10le"]),
    "vp9.webm": ("25", ["-c:v", "libvpx-vp9", "-crf", "4", "-b:v", "0", "-deadline", "realtime", "-cpu-used", "8"]),
    "av1.mp4": ("25", ["-c:v", "libsvtav1", "-preset", "12", "-crf", "8", "-pix_fmt", "yuv420p"]),
    "animated.gif": ("10", ["-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none", "-c:v", "gif"]),
}


@functools.cache
def encoders() -> frozenset[str]:
    """The names of the encoders that this ffmpeg has."""
    said = subprocess.run([ffmpeg_program(), "-hide_banner", "-encoders"], capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"^ V\S+ (\w\S*)", said.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`N` frames, of even numbers only, so that none is taken for another after a change of depth; without loss."""
    frames = numbered_frames(2 * N, HEIGHT, WIDTH)[::2]
    return write_clip(tmp_path_factory.mktemp("source") / "plain.mkv", frames, options=["-qp", "0"])


def write_kind(name: str, source: Path, folder: Path) -> tuple[Path, Fraction]:
    """A file of `KINDS`, and its frames per second."""
    fps, options = KINDS[name]
    encoder = options[options.index("-c:v") + 1]
    assert encoder in encoders(), f"this ffmpeg ({ffmpeg_program()}) has no encoder {encoder}, so {name} was not tested"
    ffmpeg("-r", fps, "-i", source, *options, folder / name)
    return folder / name, Fraction(fps)


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_are_those_that_were_encoded(name, source, tmp_path):
    path, fps = write_kind(name, source, tmp_path)
    info = probe(path)
    assert (info.height, info.width, len(info.times)) == (HEIGHT, WIDTH, N)
    assert info.times.tolist() == [i / float(fps) for i in range(N)] and info.fps == float(fps)
    own = (info.ticks - info.ticks[0]) * float(info.time_base)
    np.testing.assert_allclose(info.times, own, atol=float(info.time_base))
    frames = list(read_frames(info, np.arange(N)))
    assert {frame.shape for frame in frames} == {(HEIGHT, WIDTH, 3)} and frames[0].dtype == np.uint8
    np.testing.assert_allclose([number_of(frame) for frame in frames], np.arange(0, 2 * N, 2), atol=1)
    few = [0, N // 2, N - 1]
    for i, frame in zip(few, read_frames(info, np.array(few)), strict=True):
        np.testing.assert_array_equal(frame, frames[i], err_msg=f"frame {i} alone")


def moving(path: Path, *options, seconds: int = 5) -> VideoInfo:
    """A clip of 25 frames a second, no two alike."""
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=size=96x64:rate=25:duration={seconds}", *options, path)
    return probe(path)


CLOSED = [*X264, "-bf", "3", "-g", "12"]
# By name: how it is encoded, and whether frames can be decoded without those between.
SPARSE = {
    "closed.mp4": (CLOSED, True),
    "closed.mkv": (CLOSED, True),
    "closed.ts": (CLOSED, True),
    "open.mp4": ([*X264, "-x264-params", "open-gop=1:keyint=12:bframes=3:b-pyramid=normal:b-adapt=0"], False),
    "refresh.ts": ([*X264, "-x264-params", "intra-refresh=1:keyint=12:bframes=0"], False),
    "refresh.mp4": ([*X264, "-x264-params", "intra-refresh=1:keyint=12:bframes=0"], False),
    "hevc.mp4": ([*X265, "-x265-params", f"{QUIET}:keyint=12:open-gop=0", "-pix_fmt", "yuv420p"], True),
    "hevc_open.mp4": ([*X265, "-x265-params", f"{QUIET}:keyint=12:open-gop=1", "-pix_fmt", "yuv420p"], None),
    "vp9.webm": (
        ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "12", "-pix_fmt", "yuv420p"],
        False,
    ),
}


@pytest.fixture
def dropping(monkeypatch):
    """An ffmpeg that drops packets: where the system's is too old for it, the one that comes with the package."""
    if not ffmpeg_child.knows_packets():
        monkeypatch.setattr(ffmpeg_child, "ffmpeg_program", imageio_ffmpeg.get_ffmpeg_exe)
        monkeypatch.setattr(ffmpeg_child, "ffmpeg_version", functools.cache(ffmpeg_child.ffmpeg_version.__wrapped__))
    assert ffmpeg_child.knows_packets()


def test_an_ffmpeg_that_cannot_drop_packets_decodes_the_whole(tmp_path, monkeypatch):
    """Debian 12 has one of these."""
    info = moving(tmp_path / "clip.mp4", *CLOSED)
    wanted = np.array([5, 61, 110])
    whole = list(read_frames(info, wanted))
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_version", lambda: (5, 1))
    assert not list(skip_through(info, wanted))
    for frame, same in zip(read_frames(info, wanted), whole, strict=True):
        np.testing.assert_array_equal(frame, same)


@pytest.mark.usefixtures("dropping")
@pytest.mark.parametrize("name", SPARSE)
def test_frames_far_apart_are_the_frames_of_a_full_decode(name, tmp_path):
    options, skips = SPARSE[name]
    info = moving(tmp_path / name, *options)
    for wanted in (np.array([5, 61, 62, 110]), np.array([0, 124]), np.array([17])):
        whole = list(stream_through(info, wanted))
        alone = list(skip_through(info, wanted))
        if skips is not None and len(wanted) == 4:
            assert len(alone) == (4 if skips else 0)
        for frames in (alone, list(read_frames(info, wanted))):
            for i, frame in enumerate(frames):
                np.testing.assert_array_equal(frame, whole[i], err_msg=f"{name}, frame {wanted[i]}")


@pytest.mark.usefixtures("dropping")
def test_any_few_frames_are_the_frames_of_a_full_decode(tmp_path):
    info = moving(tmp_path / "clip.mp4", *CLOSED)
    whole = list(stream_through(info, np.arange(len(info.times))))
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 8):
        wanted = np.sort(rng.choice(len(whole), n, replace=False))
        for i, frame in zip(wanted.tolist(), read_frames(info, wanted), strict=True):
            np.testing.assert_array_equal(frame, whole[i])
    numbers = [3, 3, 70, 70, 70, 120]
    for i, frame in zip(numbers, read_frames(info, np.array(numbers)), strict=True):
        np.testing.assert_array_equal(frame, whole[i])


@pytest.mark.usefixtures("dropping")
def test_frames_far_apart_behind_an_edit_list(tmp_path):
    moving(tmp_path / "clip.mp4", *CLOSED)
    ffmpeg("-ss", "0.52", "-i", tmp_path / "clip.mp4", "-c", "copy", tmp_path / "edited.mp4")
    info = probe(tmp_path / "edited.mp4")
    assert len(info.times) < 125
    wanted = np.array([1, 40, 100])
    whole = list(stream_through(info, wanted))
    for i, frame in enumerate(read_frames(info, wanted)):
        np.testing.assert_array_equal(frame, whole[i])


@pytest.mark.usefixtures("dropping")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("frames.mp4", CLOSED),
        ("pyramid.mkv", [*X264, "-x264-params", "keyint=60:bframes=5:b-pyramid=normal:b-adapt=0"]),
        ("open.ts", [*X264, "-x264-params", "open-gop=1:keyint=12:bframes=3:b-adapt=0"]),
        ("slices.mp4", [*X264, "-bf", "2", "-slices", "3"]),
        ("fields.mp4", [*X264, "-bf", "2", "-flags", "+ildct+ilme", "-x264-params", "tff=1"]),
    ],
)
def test_frames_that_no_other_depends_on_are_left_out(name, options, tmp_path, monkeypatch):
    info = moving(tmp_path / name, *options)
    whole = list(stream_through(info, np.arange(len(info.times))))
    wanted = np.arange(3, len(whole), 8)
    if name != "open.ts":
        assert not list(skip_through(info, wanted))  # too little to be worth another look at the file
    monkeypatch.setattr("qwenvl_jax.data.video.LEAST_SPARED_PIXELS", 0)
    alone = list(skip_through(info, wanted))
    assert len(alone) == len(wanted)
    kept = video._needed_packets(info, wanted)
    assert kept.sum() < 0.9 * len(kept) and kept[info.packets.place[wanted]].all()
    for i, frame in zip(wanted.tolist(), alone, strict=True):
        np.testing.assert_array_equal(frame, whole[i], err_msg=f"{name}, frame {i}")


@pytest.mark.usefixtures("dropping")
def test_more_frames_than_a_command_line_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.LONGEST_ARGUMENT", 200)
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(40, 32, 32), fps="25")
    wanted = np.arange(0, 40, 2)
    assert [number_of(frame) for frame in read_frames(probe(path), wanted)] == wanted.tolist()
    monkeypatch.setattr("qwenvl_jax.data.video.LEAST_SPARED_PIXELS", 0)  # nor packets
    info = moving(tmp_path / "b.mp4", *CLOSED)
    wanted = np.arange(0, len(info.times), 5)
    for frame, same in zip(skip_through(info, wanted), stream_through(info, wanted), strict=True):
        np.testing.assert_array_equal(frame, same)


LONG = """
import resource, sys
import numpy as np
from qwenvl_jax.data.video import probe, read_frames
info = probe(sys.argv[1])
wanted = np.searchsorted(info.times, np.arange(0, info.duration - 1, 1))
count = sum(1 for _ in read_frames(info, wanted))
peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(count, len(info.times), round(info.duration), peak // 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hours_at_a_frame_a_second_take_little_memory(tmp_path):
    """Of 720p at 25 a second: 180,000 packets to list, a third of which is told one by one not to be decoded. Counted
    are this process and the larger of its children together, as if each had its peak at one time.
    """
    encoder = [*X264, "-qp", "30", "-bf", "3", "-g", "250"]
    source = "testsrc=size=1280x720:rate=25:duration=60"
    ffmpeg("-f", "lavfi", "-i", source, *encoder, tmp_path / "minute.mp4")
    film = tmp_path / "film.mp4"
    ffmpeg("-stream_loop", "119", "-i", tmp_path / "minute.mp4", "-c", "copy", film)
    ran = subprocess.run([sys.executable, "-c", LONG, film], capture_output=True, text=True, check=True)
    count, n, seconds, megabytes = map(int, ran.stdout.split())
    assert (count, n, seconds) == (7199, 180_000, 7200)
    assert megabytes < 2000
