"""Clips for temporal grounding: coloured shapes appear in a video, move about, and leave again.

A clip is described first, as a pure function of (seed, index, split), then drawn and written as a real MP4 file:

    describe_clip(seed, index, split) -> Clip -> draw_clip -> u8[N, H, W, 3] -> write_clip -> file

Nothing lines up with the frames that a model will see: durations, frame rates and onsets are drawn from continuous
ranges. One (colour, shape) pair of every colour is held out: the clips of split "evaluation" show only those pairs,
the others ("train", "validation") never show one.
"""

import dataclasses
import fractions
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import ffmpeg
import numpy as np
from PIL import Image, ImageDraw

from qwenvl_jax.data.ffmpeg_child import ffmpeg_program
from qwenvl_jax.errors import DataError

COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 175, 60),
    "blue": (40, 75, 235),
    "yellow": (240, 215, 30),
    "purple": (185, 45, 215),
    "cyan": (40, 210, 220),
}
SHAPES = ("square", "circle", "triangle", "cross", "ring")
# The shape that each colour never has in training; every shape is among them.
HELD_OUT = {
    "red": "ring",
    "green": "triangle",
    "blue": "square",
    "yellow": "cross",
    "purple": "circle",
    "cyan": "triangle",
}
SPLITS = ("train", "validation", "evaluation")
FRAME_RATES = ("12", "15", "24", "25", "30000/1001", "30")
# (width, height); all come to 4 or 6 merged tokens of 32 x 32 pixels, some after a resize.
FRAME_SIZES = ((64, 64), (64, 64), (96, 64), (64, 96), (80, 80), (72, 64))
SHORTEST, LONGEST = 4.0, 12.0
MANIFEST = "clips.json"


@dataclasses.dataclass(frozen=True)
class Event:
    """One object and the time it is there: visible in the frames shown at times t with start <= t < end.

    Attributes:
      colour, shape: its name, "red circle".
      start, end: seconds.
      side: pixels.
      x, y: left upper corner at time 0, before reflection at the frame's edges, in pixels.
      vx, vy: pixels a second.
    """

    colour: str
    shape: str
    start: float
    end: float
    side: int
    x: float
    y: float
    vx: float
    vy: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Clip:
    """Everything that is in one clip.

    Attributes:
      seed, index, split: what it was made from.
      width, height: pixels.
      frame_rate: frames a second, as ffmpeg writes it ("30000/1001").
      frames: number of frames.
      background: grey levels of the four corners (left top, right top, left bottom, right bottom).
      events: in no particular order; their colours differ.
    """

    seed: int
    index: int
    split: str
    width: int
    height: int
    frame_rate: str
    frames: int
    background: tuple[float, float, float, float]
    events: tuple[Event, ...]

    @property
    def fps(self) -> float:
        return float(fractions.Fraction(self.frame_rate))

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps

    @property
    def file_name(self) -> str:
        return f"{self.index:05d}.mp4"


def combinations(split: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs that clips of a split may show."""
    if split == "evaluation":
        return list(HELD_OUT.items())
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if HELD_OUT[colour] != shape]


def describe_clip(seed: int, index: int, split: str) -> Clip:
    """Describes clip number `index` of a split: a pure function, the same on every machine.

    Raises:
      DataError: for a split that does not exist.
    """
    clip = outline_clip(seed, index, split)
    rng = np.random.default_rng([seed, index, SPLITS.index(split), 1])
    events: list[Event] = []
    for event in clip.events:
        events.append(_placed(event, events, clip, rng))
    return dataclasses.replace(clip, events=tuple(events))


def outline_clip(seed: int, index: int, split: str) -> Clip:
    """`describe_clip` without the paths of the objects, all left at (0, 0): what happens when, and nothing else.

    Raises:
      DataError: for a split that does not exist.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r} is not one of {', '.join(SPLITS)}; choose one of them.")
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])
    width, height = FRAME_SIZES[rng.integers(len(FRAME_SIZES))]
    frame_rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    fps = float(fractions.Fraction(frame_rate))
    frames = round(rng.uniform(SHORTEST, LONGEST) * fps)
    shapes: dict[str, list[str]] = {}
    for colour, shape in combinations(split):
        shapes.setdefault(colour, []).append(shape)
    events = []
    for colour in map(str, rng.permutation(list(COLOURS))[: rng.integers(2, 5)]):
        start = rng.uniform(0.3, frames / fps - 1.5)
        end = rng.uniform(start + 1.0, frames / fps)
        shape = shapes[colour][rng.integers(len(shapes[colour]))]
        events.append(Event(colour, shape, round(start, 4), round(end, 4), int(rng.integers(18, 27)), 0, 0, 0, 0))
    level, slope_x, slope_y = rng.uniform(50, 205), rng.uniform(-40, 40), rng.uniform(-40, 40)
    corners = [level + sx * slope_x / 2 + sy * slope_y / 2 for sy in (-1, 1) for sx in (-1, 1)]
    a, b, c, d = (round(float(corner), 1) for corner in corners)
    return Clip(seed, index, split, width, height, frame_rate, frames, (a, b, c, d), tuple(events))


def _placed(event: Event, others: Sequence[Event], clip: Clip, rng: np.random.Generator) -> Event:
    """`event` on the one of a few random paths that keeps it farthest from the other objects, so that all are seen."""
    width, height = clip.width, clip.height
    times_T = np.arange(0.0, clip.duration, 0.25)
    candidates = []
    for _ in range(8):
        x, y = rng.uniform(0, width - event.side), rng.uniform(0, height - event.side)
        vx, vy = rng.uniform(2, 9, 2) * rng.choice((-1, 1), 2)
        x, y, vx, vy = (round(float(value), 3) for value in (x, y, vx, vy))
        candidates.append(dataclasses.replace(event, x=x, y=y, vx=vx, vy=vy))

    def nearest(candidate: Event) -> float:
        gaps = [float(max(width, height))]
        for other in others:
            both_T = (times_T >= max(event.start, other.start)) & (times_T < min(event.end, other.end))
            if both_T.any():
                mine, theirs = (path(e, times_T[both_T], width, height) + e.side / 2 for e in (candidate, other))
                gaps.append(float(np.abs(mine - theirs).max(axis=1).min()))
        return min(gaps)

    return max(candidates, key=nearest)


def path(event: Event, times: np.ndarray, width: int, height: int) -> np.ndarray:
    """f64[T, 2], left upper corner (x, y) of an object at `times` f64[T]; it is reflected at the frame's edges."""

    def reflect(position_T, room):
        return room - np.abs(np.mod(position_T, 2 * room) - room)

    x_T = reflect(event.x + event.vx * times, float(width - event.side))
    y_T = reflect(event.y + event.vy * times, float(height - event.side))
    return np.stack([x_T, y_T], axis=1)


def draw_clip(clip: Clip) -> np.ndarray:
    """u8[N, H, W, 3], the frames of a clip in RGB."""
    left_top, right_top, left_bottom, right_bottom = clip.background
    across_W, down_H1 = np.linspace(0, 1, clip.width), np.linspace(0, 1, clip.height)[:, None]
    top_W = left_top + (right_top - left_top) * across_W
    bottom_W = left_bottom + (right_bottom - left_bottom) * across_W
    ground_HW = np.rint(top_W + (bottom_W - top_W) * down_H1).astype(np.uint8)
    frames_NHWC = np.empty((clip.frames, clip.height, clip.width, 3), np.uint8)
    frames_NHWC[:] = ground_HW[None, :, :, None]
    times_N = np.arange(clip.frames) / clip.fps
    for event in clip.events:
        cover_ss1 = _shape_mask(event.shape, event.side)[:, :, None]
        paint_ss3 = cover_ss1 * np.array(COLOURS[event.colour], np.float32)
        shown = np.flatnonzero((times_N >= event.start) & (times_N < event.end))
        corners = np.rint(path(event, times_N[shown], clip.width, clip.height)).astype(int)
        for n, (x, y) in zip(shown, corners, strict=True):
            window = frames_NHWC[n, y : y + event.side, x : x + event.side]
            window[:] = (paint_ss3 + (1 - cover_ss1) * window + 0.5).astype(np.uint8)
    return frames_NHWC


def _shape_mask(shape: str, side: int) -> np.ndarray:
    """f32[side, side] in 0..1, how much of each pixel the shape covers; drawn four times as large and averaged."""
    s = 4 * side
    image = Image.new("L", (s, s))
    draw = ImageDraw.Draw(image)
    if shape == "square":
        draw.rectangle((0.08 * s, 0.08 * s, 0.92 * s, 0.92 * s), fill=255)
    elif shape == "circle":
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(s / 2, 0), (s - 1, s - 1), (0, s - 1)], fill=255)
    elif shape == "cross":
        draw.rectangle((0.34 * s, 0, 0.66 * s, s - 1), fill=255)
        draw.rectangle((0, 0.34 * s, s - 1, 0.66 * s), fill=255)
    else:
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        draw.ellipse((0.3 * s, 0.3 * s, 0.7 * s, 0.7 * s), fill=0)
    return np.asarray(image, np.float32).reshape(side, 4, side, 4).mean(axis=(1, 3)) / 255


def write_clip(clip: Clip, target: str | os.PathLike) -> None:
    """Draws a clip and writes it as an H.264 MP4 file.

    Raises:
      DataError: if ffmpeg cannot write the file; the line carries ffmpeg's own last words.
    """
    frames_NHWC = draw_clip(clip)
    size = f"{clip.width}x{clip.height}"
    source = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=size, framerate=clip.frame_rate)
    # One thread and the fastest preset: a clip this small is done before a second thread would have started.
    options = {"vcodec": "libx264", "crf": 18, "pix_fmt": "yuv420p", "preset": "ultrafast", "threads": 1}
    job = source.output(os.fspath(target), **options).global_args("-loglevel", "error").overwrite_output()
    try:
        job.run(cmd=ffmpeg_program(), input=frames_NHWC.tobytes(), capture_stdout=True, capture_stderr=True)
    except ffmpeg.Error as error:
        words = (error.stderr or b"").decode(errors="replace").strip().splitlines() or ["no message"]
        raise DataError(f"ffmpeg could not write {target}: {words[-1]}; see that there is room on the disk.") from error


def make_clips(
    folder: str | os.PathLike,
    split: str,
    count: int,
    seed: int,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
    workers: int = 2,
) -> list[tuple[pathlib.Path, Clip]]:
    """Writes `count` clips of a split below `folder`, or takes them as they are if they stand there.

    The clips are made in a temporary folder that gets its name only when all of them and the manifest are written, so
    that a folder with that name is always whole.

    Args:
      folder: where data sets lie; this one becomes `folder/{split}-{count}-seed{seed}`.
      progress: wraps the iterable of finished clips, to show a bar.
      workers: ffmpeg processes at a time.

    Returns:
      The clips with their files, in order of index.

    Raises:
      DataError: if the folder there holds other clips than this version describes, or if ffmpeg fails.
    """
    target = pathlib.Path(folder) / f"{split}-{count}-seed{seed}"
    clips = [describe_clip(seed, index, split) for index in range(count)]
    if target.exists():
        if read_clips(target) != clips:
            raise DataError(f"{target} holds other clips than this version makes; remove that folder to make it anew.")
        return [(target / clip.file_name, clip) for clip in clips]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # Threads suffice: nearly all the work is done by the ffmpeg process that each of them waits for.
        with ThreadPoolExecutor(workers) as pool:
            jobs = pool.map(lambda clip: write_clip(clip, unfinished / clip.file_name), clips)
            for _ in progress(jobs):
                pass
        manifest = [dataclasses.asdict(clip) for clip in clips]
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return [(target / clip.file_name, clip) for clip in clips]


def read_clips(folder: str | os.PathLike) -> list[Clip]:
    """The clips that the manifest of a data set names.

    Raises:
      DataError: if the manifest is missing or unreadable.
    """
    manifest = pathlib.Path(folder) / MANIFEST
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        return [_clip(value) for value in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is no list of clips ({error}); remove {folder} to have it made anew.") from error


def _clip(value: dict) -> Clip:
    events = tuple(Event(**event) for event in value["events"])
    return Clip(**{**value, "background": tuple(value["background"]), "events": events})
