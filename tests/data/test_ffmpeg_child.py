"""What the ffmpeg child may not do: each limit holds, and says what to do. Those of CPU and memory are Linux's."""

import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwenvl_jax.data.ffmpeg_child import Child, EndedError, command
from qwenvl_jax.data.video import probe, read_frames
from qwenvl_jax.errors import MediaError
from tests.media import ffmpeg, numbered_frames, write_clip


def huge_gif(width: int, height: int) -> bytes:
    """A GIF of 43 bytes and one frame that claims this size."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x0a\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + screen + frame + b";"


@pytest.mark.parametrize("side", [9000, 16_000, 65_535])
def test_a_tiny_file_that_claims_huge_frames(side, tmp_path):
    path = tmp_path / "huge.gif"
    path.write_bytes(huge_gif(side, side))
    with pytest.raises(MediaError) as caught:
        list(read_frames(probe(path), np.array([0])))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if side < 20_000:  # beyond, ffmpeg itself does not take them
        assert f"{side} x {side} pixels" in str(caught.value) and "scale it down" in str(caught.value)


def test_an_index_that_says_less_than_the_frames(tmp_path, monkeypatch):
    """The container speaks of small frames, the stream within of large ones, which are refused before they are made."""
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(4, 128, 128))
    data = path.read_bytes()
    entry = data.index(b"avc1", data.index(b"stsd"))
    sizes = struct.pack(">HH", 128, 128)
    at = data.index(sizes, entry)
    path.write_bytes(data[:at] + struct.pack(">HH", 32, 32) + data[at + 4 :])
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.MAX_FRAME_PIXELS", 64 * 64)
    with pytest.raises(MediaError, match="frames of 128 x 128 pixels, more than"):
        list(read_frames(probe(path), np.array([0])))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of a few kilobytes whose frames take 24 MB each to decode."""
    path = tmp_path_factory.mktemp("large") / "black.mp4"
    source = ["-f", "lavfi", "-i", "color=black:size=4096x4096:rate=10:duration=1"]
    ffmpeg(*source, "-c:v", "libx264", "-preset", "ultrafast", path)
    assert path.stat().st_size < 200_000
    return path


def test_a_child_that_is_asked_to_end(large):
    """It tells of no damage: the file is as good as it was."""
    with (
        pytest.raises(EndedError, match="ended by SIGTERM"),
        Child(command(large, format="rawvideo"), "a.mp4") as child,
    ):
        assert child.stdout.read(1 << 20)
        os.kill(child.pid, signal.SIGTERM)
        while child.stdout.read(1 << 20):
            pass
        child.finish()


def test_a_child_that_wants_too_much_memory(large, monkeypatch):
    info = probe(large)
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.MEMORY_LIMIT_BYTES", 160 << 20)
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.MEMORY_PER_CPU_BYTES", 0)
    with pytest.raises(MediaError, match=r"GiB of memory.*re-encode it in a smaller size"):
        list(read_frames(info, np.arange(10)))


def test_a_child_that_takes_too_much_of_the_cpu(tmp_path, monkeypatch):
    source = ["-f", "lavfi", "-i", "testsrc2=size=1920x1080:rate=30:duration=2", "-vf", "noise=alls=60:allf=t"]
    encoder = ["-c:v", "libx264", "-preset", "ultrafast", "-qp", "10", "-pix_fmt", "yuv420p"]
    ffmpeg(*source, *encoder, tmp_path / "short.mp4")
    ffmpeg("-stream_loop", "7", "-i", tmp_path / "short.mp4", "-c", "copy", tmp_path / "clip.mp4")
    info = probe(tmp_path / "clip.mp4")
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.LEAST_CPU_SECONDS", 1.0)
    monkeypatch.setattr("qwenvl_jax.data.ffmpeg_child.CPU_SECONDS_PER_MINUTE", 0.0)
    with pytest.raises(MediaError, match=r"more than 1 s of the CPU.*re-encode it in a smaller size"):
        list(read_frames(info, np.arange(0, len(info.times), 10)))


def test_limits_grow_with_the_video_and_leave_this_process_alone(tmp_path):
    before = [resource.getrlimit(which) for which in (resource.RLIMIT_CPU, resource.RLIMIT_DATA)]
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(4, 32, 32))
    for seconds, limit in ((0, 60), (60, 60), (7200, 3600)):
        with Child(command(path, format="framecrc", c="copy"), "video", seconds) as child:
            assert resource.prlimit(child.pid, resource.RLIMIT_CPU)[0] == limit
            child.stdout.read()
            child.finish()
    assert [resource.getrlimit(which) for which in (resource.RLIMIT_CPU, resource.RLIMIT_DATA)] == before


INTERRUPTED = """
import os, signal, sys
from qwenvl_jax.data.video import probe, read_frames

signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
info = probe(sys.argv[1])
frames = read_frames(info, range(len(info.times)))
next(frames)
os.killpg(0, signal.SIGINT)
print(1 + sum(1 for _ in frames))
"""


def test_ctrl_c_does_not_damage_the_sample_at_hand(tmp_path):
    """A terminal sends it to the whole group; a run then ends after its step, of which nothing may be missing."""
    path = tmp_path / "clip.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=640x360:rate=30:duration=2", "-pix_fmt", "yuv420p", path)
    # More than the pipe and its buffer hold, so that the child is still at work when the signal comes.
    assert 60 * 640 * 360 * 3 > 8 << 20
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", INTERRUPTED, str(path)]
    ran = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["interrupted", "60"], ran.stderr


def test_no_address_is_opened(tmp_path):
    """Not by a file that names one."""
    path = tmp_path / "hls.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="playlist"):
        probe(path)
