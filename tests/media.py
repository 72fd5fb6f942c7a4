"""Makers of small video files for tests, through ffmpeg."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenvl_jax.data.ffmpeg_child import ffmpeg_program, ffmpeg_version, keep_timestamps

STEP = 4


def ffmpeg(*arguments: str | Path, stdin: bytes | None = None):
    """Runs ffmpeg, overwriting its output; fails with what it says."""
    command = [ffmpeg_program(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def numbered_frames(n: int, height: int, width: int) -> np.ndarray:
    """u8[n, H, W, 3]: frame i is of brightness 40 + 4 i (at most 43 frames), its top left quarter brighter."""
    frames = np.zeros((n, height, width, 3), np.uint8)
    frames += (40 + STEP * np.arange(n, dtype=np.uint8))[:, None, None, None]
    frames[:, : height // 2, : width // 2] += 40
    return frames


def number_of(frame: np.ndarray) -> int:
    """Which of `numbered_frames` a decoded frame is, from its bottom right corner."""
    h, w = frame.shape[0] // 2, frame.shape[1] // 2
    return round((float(frame[h + 2 :, w + 2 :].mean()) - 40) / STEP)


def write_clip(
    path: Path,
    frames: np.ndarray,
    *,
    fps: str = "25",
    milliseconds: Sequence[int] | None = None,
    options: Sequence = (),
) -> Path:
    """Encodes frames as H.264.

    Args:
      frames: u8[n, H, W, 3].
      fps: constant rate, such as "12" or "30000/1001".
      milliseconds: time of each frame in place of a constant rate.
      options: further output options.
    """
    timing, after = [], []
    if milliseconds is not None:
        times = "+".join(f"eq(N,{i})*{t}" for i, t in enumerate(milliseconds))
        timing = ["-vf", f"settb=1/1000,setpts='{times}'", "-enc_time_base", "1:1000"]
        timing += [word for key, value in keep_timestamps().items() for word in (f"-{key}", value)]
        if ffmpeg_version() >= (4, 4):
            after = [
                "-bsf:v",
                "setts=duration=40",
            ]  # without one, some versions leave the last frame out of the edit list
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", fps, "-i", "pipe:"]
    pixels = "yuv444p" if frames.shape[1] % 2 or frames.shape[2] % 2 else "yuv420p"
    encoder = ["-c:v", "libx264", "-preset", "ultrafast", "-qp", "4", "-pix_fmt", pixels]
    ffmpeg(*source, *timing, *encoder, *after, *options, path, stdin=frames.tobytes())
    return path


def write_turned(path: Path, source: Path) -> Path:
    """Copies a clip, adding the note that it is to be shown turned by 90 degrees to the left."""
    if ffmpeg_version() < (6, 0):
        ffmpeg("-i", source, "-c", "copy", "-metadata:s:v:0", "rotate=90", path)
    else:
        ffmpeg("-display_rotation", "90", "-i", source, "-c", "copy", path)
    return path
