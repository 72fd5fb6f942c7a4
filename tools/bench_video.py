"""Measures how long the frames of a video take: from a file to patches, and few of them against a full decode.

    .venv/bin/python -m tools.bench_video                  # 60 s of 1080p at 30 fps
    .venv/bin/python -m tools.bench_video --hours 2        # and two hours of it, with the largest process's memory

The clip is made first, H.264 with B-frames and a key frame every 250, of a test picture with noise. The ways are timed
in turn, `--rounds` times; the table has medians. What is compared:

    patches at 2 fps    probed, sampled, decoded, resized and cut as Qwen3-VL's processor does
    frames at 2 fps     probed and decoded, without the rest
    PyAV at 2 fps       the same frames by PyAV (`pip install av`), if it is there, all its threads in use
    frames at 0.1 fps   decoded without most of those between
    the same, streamed  the same frames out of a full decode

Frames of both ways are compared: at 0.1 fps they are equal; PyAV's differ by how it turns colours into RGB.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwenvl_jax.data import video
from qwenvl_jax.data.ffmpeg_child import ffmpeg_program, ffmpeg_version
from qwenvl_jax.data.frames import public_opener

# Reads frames of a file and tells the peak memory, in MB, of the largest of this process and its children.
_CHILD = """
import resource, sys, time
import numpy as np
from qwenvl_jax.data.video import probe, read_frames
start = time.perf_counter()
info = probe(sys.argv[1])
wanted = np.searchsorted(info.times, np.arange(0, info.times[-1], 1 / float(sys.argv[2])))
count = sum(1 for _ in read_frames(info, wanted))
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(count, len(info.times), time.perf_counter() - start, peak // 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=60, help="of the clip; default: %(default)s")
    parser.add_argument("--hours", type=float, default=0.0, help="of the long file; 0 leaves it out")
    parser.add_argument("--place", default=tempfile.gettempdir(), help="for the files; default: %(default)s")
    options = parser.parse_args()
    ffmpeg = ".".join(map(str, ffmpeg_version()))
    about = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, ffmpeg {ffmpeg}"
    print(f"{about}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory(prefix="bench-video-", dir=options.place) as folder:
        clip = _write_clip(Path(folder) / "clip.mp4", options.seconds)
        print(f"clip: {clip.stat().st_size / 1e6:.1f} MB\n")
        _time_all(clip, options.rounds)
        if options.hours:
            _long(clip, Path(folder) / "long.mp4", options.hours, options.seconds)


def _write_clip(path: Path, seconds: int) -> Path:
    """1080p at 30 fps."""
    source = ["-f", "lavfi", "-i", f"testsrc2=size=1920x1080:rate=30:duration={seconds}", "-vf", "noise=alls=8:allf=t"]
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "26", "-bf", "3", "-g", "250", "-pix_fmt", "yuv420p"]
    subprocess.run([ffmpeg_program(), "-v", "error", "-y", *source, *encoder, path], check=True)
    return path


def _time_all(clip: Path, rounds: int) -> None:
    opener = public_opener("qwen3_vl_4b")
    part = {"type": "video", "video": str(clip), "fps": 2.0}
    opener.open(part).load()  # compiles the resizing
    info = video.probe(clip)
    many, few = (np.searchsorted(info.times, np.arange(0, info.times[-1], 1 / fps)) for fps in (2.0, 0.1))
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "patches at 2 fps": lambda: [_fresh(lambda: opener.open(part).load())],
        "frames at 2 fps": lambda: list(video.read_frames(_fresh(lambda: video.probe(clip)), many)),
        "frames at 0.1 fps": lambda: list(video.read_frames(info, few)),
        "the same, streamed": lambda: list(video.stream_through(info, few)),
    }
    if importlib.util.find_spec("av"):
        ways["PyAV at 2 fps"] = lambda: _by_pyav(clip, many)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, list[np.ndarray]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            outputs[name] = way()
            seconds[name].append(time.perf_counter() - start)
    print("| | seconds | of each round |\n| --- | --- | --- |")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.2f} | {', '.join(f'{s:.2f}' for s in taken)} |")
    equal = all(map(np.array_equal, outputs["frames at 0.1 fps"], outputs["the same, streamed"]))
    ratio = statistics.median(seconds["the same, streamed"]) / statistics.median(seconds["frames at 0.1 fps"])
    print(f"\nat 0.1 fps: {ratio:.1f} times as fast as a full decode, frames {'equal' if equal else 'DIFFERENT'}")
    if "PyAV at 2 fps" in outputs:
        pairs = zip(outputs["frames at 2 fps"], outputs["PyAV at 2 fps"], strict=True)
        off = max(float(np.abs(a.astype(np.int16) - b).mean()) for a, b in pairs)
        print(f"PyAV's frames differ by at most {off:.2f} of 255 in the mean of a frame")
    else:
        print("PyAV is not installed, and was not measured")


def _fresh(do: Callable):
    """What `do` gives when nothing is remembered of earlier probes."""
    video._PROBED = video.Kept(64 << 20)
    return do()


def _by_pyav(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
    import av

    chosen, frames = set(wanted.tolist()), []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if i in chosen:
                frames.append(frame.to_ndarray(format="rgb24"))
    return frames


def _long(clip: Path, path: Path, hours: float, seconds_each: int) -> None:
    """The clip over and over, read at 1 and at 0.1 fps by processes of their own."""
    loops = round(hours * 3600 / seconds_each) - 1
    command = [ffmpeg_program(), "-v", "error", "-y", "-stream_loop", str(loops), "-i", clip, "-c", "copy", path]
    subprocess.run(command, check=True)
    print(f"\n{hours:g} hours, {path.stat().st_size / 1e9:.2f} GB\n")
    print("| fps | frames | of | seconds | peak MB |\n| --- | --- | --- | --- | --- |")
    for fps in ("0.1", "1"):
        ran = subprocess.run([sys.executable, "-c", _CHILD, path, fps], capture_output=True, text=True, check=True)
        count, n, seconds, peak = ran.stdout.split()
        print(f"| {fps} | {count} | {n} | {float(seconds):.1f} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
