"""Measures how long the frames of a video take: from a file to patches, and few of them against a full decode.

    .venv/bin/python -m tools.bench_video                  # 60 s of 1080p at 30 fps
    .venv/bin/python -m tools.bench_video --hours 2        # and two hours of it, with the memory it takes

Each clip is made first, H.264 with B-frames and a key frame every `--gop`, of a test picture with noise. The ways are
timed in turn, `--rounds` times; the table has medians. What is compared:

    patches at 2 fps    probed, sampled, decoded, resized and cut as Qwen3-VL's processor does
    frames at ... fps   probed and decoded, without the rest; the file is looked at anew each time
    full decode         the frames at 2 fps out of all that the file holds
    PyAV, decord, torchcodec at ... fps    the same frames, where they can be imported, with all threads in use; PyAV
                        decodes all and keeps some, the others find their way to a list of frames

Frames of ours are compared with those of a full decode; those of others may differ by how they turn colours into RGB.
Then a frame is resized, beside torchvision: in the layout of a decoded frame, and with each colour a plane.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwenvl_jax.data import image, video
from qwenvl_jax.data.ffmpeg_child import ffmpeg_program
from qwenvl_jax.data.frames import public_opener
from tools.machine import machine

# Reads frames of a file and tells the peak memory, in MB, of this process and of the largest of its children.
_CHILD = """
import resource, sys, time
import numpy as np
from qwenvl_jax.data.video import probe, read_frames
start = time.perf_counter()
info = probe(sys.argv[1])
wanted = np.searchsorted(info.times, np.arange(0, info.times[-1], 1 / float(sys.argv[2])))
count = sum(1 for _ in read_frames(info, wanted))
own, child = (resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(count, len(info.times), time.perf_counter() - start, own, child)
"""


SPARSE = (0.1, 0.05, 0.02)
SIZES = ((320, 608), (448, 800), (928, 1664))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=60, help="of the clip; default: %(default)s")
    parser.add_argument("--gop", type=int, nargs="+", default=[250, 60], help="most frames between key frames")
    parser.add_argument("--hours", type=float, default=0.0, help="of the long file; 0 leaves it out")
    parser.add_argument("--place", default=tempfile.gettempdir(), help="for the files; default: %(default)s")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-video-", dir=options.place) as folder:
        for gop in options.gop:
            clip = _write_clip(Path(folder) / f"gop{gop}.mp4", options.seconds, gop)
            print(f"\nA key frame every {gop}; {clip.stat().st_size / 1e6:.1f} MB\n")
            _time_all(clip, options.rounds)
        _time_resizing(clip, options.rounds)
        if options.hours:
            _long(clip, Path(folder) / "long.mp4", options.hours, options.seconds)


def _write_clip(path: Path, seconds: int, gop: int) -> Path:
    """1080p at 30 fps."""
    source = ["-f", "lavfi", "-i", f"testsrc2=size=1920x1080:rate=30:duration={seconds}", "-vf", "noise=alls=8:allf=t"]
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "26", "-bf", "3", "-pix_fmt", "yuv420p"]
    subprocess.run([ffmpeg_program(), "-v", "error", "-y", *source, *encoder, "-g", str(gop), path], check=True)
    return path


def _time_all(clip: Path, rounds: int) -> None:
    opener = public_opener("qwen3_vl_4b")
    part = {"type": "video", "video": str(clip), "fps": 2.0}
    opener.open(part).load()  # compiles the resizing
    info = video.probe(clip)
    wanted = {fps: np.searchsorted(info.times, np.arange(0, info.times[-1], 1 / fps)) for fps in (2.0, *SPARSE)}
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "patches at 2 fps": lambda: [_fresh(lambda: opener.open(part).load())],
        "full decode": lambda: list(video.stream_through(info, wanted[2.0])),
    }
    others = _others()
    for fps, chosen in wanted.items():
        ways[f"frames at {fps:g} fps"] = lambda chosen=chosen: list(
            video.read_frames(_fresh(lambda: video.probe(clip)), chosen)
        )
        for name, read in others.items():
            if name != "PyAV" or fps == 2.0:
                ways[f"{name} at {fps:g} fps"] = lambda read=read, chosen=chosen: read(clip, chosen)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, list[np.ndarray]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - start)
            outputs[name] = found if "patches" not in name else []
    _print_times(seconds)
    full = statistics.median(seconds["full decode"])
    print()
    for fps, chosen in wanted.items():
        ours = outputs[f"frames at {fps:g} fps"]
        equal = all(map(np.array_equal, ours, video.stream_through(info, chosen)))
        ratio = full / statistics.median(seconds[f"frames at {fps:g} fps"])
        print(f"- {fps:g} fps: {ratio:.1f} times as fast as a full decode, frames {'equal' if equal else 'DIFFERENT'}")
    for name in others:
        pairs = list(zip(outputs["frames at 2 fps"], outputs[f"{name} at 2 fps"], strict=True))
        off = max(float(np.abs(a.astype(np.int16) - b).mean()) for a, b in pairs)
        print(f"- {name}'s frames differ by at most {off:.2f} of 255 in the mean of a frame")


def _print_times(seconds: dict[str, list[float]], unit: str = "seconds", factor: float = 1.0) -> None:
    print(f"| | {unit} | of each round |\n| --- | --- | --- |")
    for name, taken in seconds.items():
        rounds = ", ".join(f"{factor * s:.2f}" for s in taken)
        print(f"| {name} | {factor * statistics.median(taken):.2f} | {rounds} |")


def _time_resizing(clip: Path, rounds: int) -> None:
    """Milliseconds of a frame; torchvision with one thread, as ours has, since whole frames are spread over workers."""
    try:
        from tests.parity import reference  # noqa: F401, makes torchvision importable  # isort: skip
        import torch
        from torchvision.transforms.v2 import InterpolationMode, functional
    except ImportError as error:
        print(f"\ntorchvision was not measured: {error}")
        return
    torch.set_num_threads(1)
    frame = next(video.read_frames(video.probe(clip), np.array([0]))).copy()
    decoded = torch.from_numpy(frame).permute(2, 0, 1)
    planes = decoded.contiguous()
    seconds: dict[str, list[float]] = {}
    for size in SIZES:

        def by_torchvision(pixels, size=size):
            return functional.resize(pixels, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)

        ways = {
            "ours": lambda size=size: image.resize(frame, *size),
            "torchvision": lambda: by_torchvision(decoded),
            "torchvision, planes": lambda: by_torchvision(planes),
        }
        equal = np.array_equal(ways["ours"](), ways["torchvision"]().permute(1, 2, 0).numpy())
        for _ in range(rounds):
            for name, way in ways.items():
                taken = []
                for _ in range(20):
                    start = time.perf_counter()
                    way()
                    taken.append(time.perf_counter() - start)
                label = f"{name}, to {size[0]} x {size[1]}{'' if equal else ' (DIFFERENT)'}"
                seconds.setdefault(label, []).append(statistics.median(taken))
    print("\nA frame of 1080 x 1920 resized\n")
    _print_times(seconds, "milliseconds", 1000)


def _fresh(do: Callable):
    """What `do` gives when nothing is remembered of earlier probes."""
    video._PROBED = video.Kept(64 << 20)
    return do()


def _others() -> dict[str, Callable[[Path, np.ndarray], list[np.ndarray]]]:
    """The other decoders that can be imported here; says which cannot, and why."""
    found = {}
    for name, module, read in (
        ("PyAV", "av", _by_pyav),
        ("decord", "decord", _by_decord),
        ("torchcodec", "torchcodec.decoders", _by_torchcodec),
    ):
        try:
            importlib.import_module(module)
            found[name] = read
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name} was not measured: {type(error).__name__}, {Path(str(error).splitlines()[0]).name}\n")
    return found


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


def _by_decord(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
    import decord

    return list(decord.VideoReader(str(path)).get_batch(wanted.tolist()).asnumpy())


def _by_torchcodec(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0)
    return list(decoder.get_frames_at(wanted.tolist()).data.numpy())


def _long(clip: Path, path: Path, hours: float, seconds_each: int) -> None:
    """The clip over and over, read at 0.1 and at 1 fps by processes of their own."""
    loops = round(hours * 3600 / seconds_each) - 1
    command = [ffmpeg_program(), "-v", "error", "-y", "-stream_loop", str(loops), "-i", clip, "-c", "copy", path]
    subprocess.run(command, check=True)
    print(f"\n{hours:g} hours, {path.stat().st_size / 1e9:.2f} GB\n")
    print("| fps | frames | of | seconds | peak MB | of ffmpeg |\n| --- | --- | --- | --- | --- | --- |")
    for fps in ("0.1", "1"):
        ran = subprocess.run([sys.executable, "-c", _CHILD, path, fps], capture_output=True, text=True, check=True)
        count, n, seconds, own, child = ran.stdout.split()
        print(f"| {fps} | {count} | {n} | {float(seconds):.1f} | {own} | {child} |", flush=True)


if __name__ == "__main__":
    main()
