"""Samplers: which frames of a video file are looked at, and why each was taken.

A sampler is a pure function from a clip (what a probe tells), its motion scores where it wants them, and what was asked
for, to frames with their times. A part of a conversation names one: `{"type": "video", ..., "sampler": "dynamic"}`.
`SAMPLERS` lists them; without a name it is `uniform`, the rule of the model's generation.

Ranges: `start` and `end`, in seconds from the first frame shown, are those of the file, and so are the times of frames
chosen within them: 3 s into the file is written `<3.0 seconds>`, whatever `start` is. This is what qwen-vl-utils does
with `video_start` and `video_end`, whose frame indices count from the start of the file. (The positions of Qwen2.5-VL,
which tell time without writing it, count from the first frame chosen, as the reference's do.)
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.data.motion import Motion, activity, cuts
from qwenvl_jax.data.video import VideoInfo
from qwenvl_jax.errors import MediaError

ROUNDING_SECONDS = 1e-3  # durations are shown in thousandths of a second, and may be asked for as shown
EVENT_SECONDS = 1.0  # how far around an event frames are denser


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """The part of a video file that frames are chosen from.

    Attributes:
      first: its first frame, counted in the file.
      times: f64[n], n > 0, seconds of its frames from the first frame of the file, not decreasing.
      fps: its mean frames per second.
      start, end: seconds between which times may be asked for.
    """

    first: int
    times: np.ndarray
    fps: float
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Wish:
    """What was asked for; each sampler reads the fields that `SAMPLERS` gives it.

    Attributes:
      rule: of the generation, which spreads frames evenly; see `qwenvl_jax.data.sampling`.
      fps: frames per second, on average.
      num_frames: frames, exactly; excludes `fps`.
      min_frames, max_frames: bounds of the number of frames, unless `num_frames` is given.
      min_fps, max_fps: frames per second where nothing and where most happens.
      timestamps: seconds in the file.
    """

    rule: Callable[..., np.ndarray]
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_fps: float = 1.0
    max_fps: float = 4.0
    timestamps: Sequence[float] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Frames that a sampler takes.

    Attributes:
      indices: i64[k], into all frames of the file, not decreasing.
      times: f64[k], seconds at which the file shows them, from its first frame.
      why: a few words for each.
    """

    indices: np.ndarray
    times: np.ndarray
    why: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One way to choose frames.

    Attributes:
      choose: the function.
      options: keys of a video part that it reads, beside the range.
      motion: whether it wants motion scores, for which the file is decoded once at a small size.
      needs: the option it does nothing without, or None.
      even: whether it spreads frames evenly by their indices.
    """

    choose: Callable[[Clip, Motion | None, Wish], Choice]
    options: tuple[str, ...]
    motion: bool = False
    needs: str | None = None
    even: bool = False


def clip_of(info: VideoInfo, start: float | None = None, end: float | None = None) -> Clip:
    """The frames of a file whose times lie between `start` and `end`, both included; all of them without.

    Args:
      start, end: seconds from the first frame shown.

    Raises:
      MediaError: a range outside the clip, one that ends before it starts, or one without a frame.
    """
    if start is None and end is None:
        return Clip(0, info.times, info.fps, 0.0, info.duration)
    low, high = 0.0 if start is None else start, info.duration if end is None else end
    if not 0 <= low < high <= info.duration + ROUNDING_SECONDS:
        raise MediaError(
            f"video {info.path} lasts {info.duration:.3f} s, and start={low:g} and end={high:g} are no part of it; "
            f"choose 0 <= start < end <= {info.duration:.3f}."
        )
    # Times are computed from ticks: what falls on a bound is within it.
    first, last = np.searchsorted(info.times, low - 1e-6), np.searchsorted(info.times, high + 1e-6, side="right")
    if first == last:
        raise MediaError(
            f"video {info.path} shows no frame between start={low:g} and end={high:g}; widen the range, a frame comes "
            f"every {1 / info.fps:.3f} s on average."
        )
    times = info.times[first:last]
    span = float(times[-1] - times[0])
    fps = info.fps if info.constant_rate or not span else (len(times) - 1) / span
    return Clip(int(first), times, fps, low, high)


def _uniform(clip: Clip, motion: Motion | None, wish: Wish) -> Choice:
    """Evenly, by the rule of the generation; `fps` or `num_frames` says how many."""
    del motion
    places = wish.rule(
        len(clip.times),
        clip.fps,
        fps=wish.fps,
        num_frames=wish.num_frames,
        min_frames=wish.min_frames,
        max_frames=wish.max_frames,
    )
    return _choice(clip, places, [f"evenly spaced{_held(clip, wish)}"] * len(places))


def _timestamps(clip: Clip, motion: Motion | None, wish: Wish) -> Choice:
    """For each time asked for the nearest frame, of two as near the earlier; written is the time of the frame."""
    del motion
    asked = np.asarray(wish.timestamps, np.float64)
    outside = asked[(asked < clip.start) | (asked > clip.end + ROUNDING_SECONDS)]
    if len(outside):
        raise MediaError(
            f"timestamps={outside[0]:g} is outside the clip, which goes from {clip.start:.3f} to {clip.end:.3f} s; "
            "choose times within it."
        )
    if (np.diff(asked) < 0).any():
        raise MediaError("timestamps must not decrease; put them in order of time.")
    after = np.clip(np.searchsorted(clip.times, asked), 1, max(len(clip.times) - 1, 1))
    if len(clip.times) == 1:
        places = np.zeros(len(asked), np.int64)
    else:
        places = after - (asked - clip.times[after - 1] <= clip.times[after] - asked)
    return _choice(clip, places, [f"nearest to {time:g} s" for time in asked])


def _dynamic(clip: Clip, motion: Motion | None, wish: Wish) -> Choice:
    """Denser where more moves: from `min_fps` where nothing does to `max_fps` where most does.

    With `fps` or `num_frames` given there are as many frames as that means, and beyond `max_frames` no more than those;
    the two rates are then scaled by one factor, so that their ratio stays.
    """
    assert motion is not None
    level = activity(motion, clip.times)
    return _by_level(clip, level, wish, lambda level: f"motion {level:.2f}")


def _event(clip: Clip, motion: Motion | None, wish: Wish) -> Choice:
    """Denser within a second of events: cuts, and where motion sets in or ends; else as `dynamic`."""
    assert motion is not None
    moving = activity(motion, clip.times) > 0.5
    events = np.concatenate([motion.frames[cuts(motion)], np.flatnonzero(np.diff(moving)) + 1])
    level = np.zeros(len(clip.times))
    for time in clip.times[events]:
        low, high = np.searchsorted(clip.times, (time - EVENT_SECONDS, time + EVENT_SECONDS))
        near = 1 - np.abs(clip.times[low:high] - time) / EVENT_SECONDS
        level[low:high] = np.maximum(level[low:high], near)
    return _by_level(clip, level, wish, lambda level: "near an event" if level else "no event near")


def _keyframes(clip: Clip, motion: Motion | None, wish: Wish) -> Choice:
    """Shot boundaries: the last frame of a shot and the first of the next, for every cut (of those that were looked at,
    in files of more than 60 fps).

    Then the first and the last frame of the clip and the middle of each shot, the longest first; then, up to the number
    that `fps`, `num_frames` or `min_frames` asks for, the middle of the widest gap. Where the boundaries alone are too
    many, those with the greatest change are kept.
    """
    assert motion is not None
    n = len(clip.times)
    wanted = _wanted(clip, wish)
    limit = wish.max_frames if wanted is None else wanted
    least = min(wish.min_frames, n) if wanted is None else wanted
    found = cuts(motion)
    found = found[np.argsort(-motion.changed[found], kind="stable")]
    kept = found[: limit // 2]
    some = "" if len(kept) == len(found) else f" (the {len(kept)} strongest of {len(found)} fit {limit} frames)"
    why: dict[int, str] = {}
    for cut in kept:
        why.setdefault(int(motion.frames[cut]), f"first of a shot{some}")
        why.setdefault(int(motion.frames[cut - 1]), f"last of a shot{some}")
    starts = [0, *sorted(motion.frames[found].tolist()), n]
    shots = sorted(itertools.pairwise(starts), key=lambda shot: shot[0] - shot[1])
    more = [(0, "first of the clip"), (n - 1, "last of the clip")]
    for place, reason in more + [((low + high - 1) // 2, "middle of a shot") for low, high in shots]:
        if len(why) < limit:
            why.setdefault(place, reason)
    while len(why) < least:
        places = np.asarray(sorted({-1, *why, n}))
        widest = int(np.argmax(np.diff(places)))
        why[int(places[widest] + places[widest + 1]) // 2] = "fills a gap"
    places = np.asarray(sorted(why), np.int64)
    return _choice(clip, places, [why[place] for place in places.tolist()])


_BOUNDS = ("fps", "num_frames", "min_frames", "max_frames")
SAMPLERS = {
    "uniform": Sampler(_uniform, _BOUNDS, even=True),
    "count": Sampler(_uniform, ("num_frames",), needs="num_frames", even=True),
    "dynamic": Sampler(_dynamic, (*_BOUNDS, "min_fps", "max_fps"), motion=True),
    "event": Sampler(_event, (*_BOUNDS, "min_fps", "max_fps"), motion=True),
    "keyframes": Sampler(_keyframes, _BOUNDS, motion=True),
    "timestamps": Sampler(_timestamps, ("timestamps",), needs="timestamps"),
}
OPTIONS = (*_BOUNDS, "min_fps", "max_fps", "timestamps")


def _choice(clip: Clip, places: np.ndarray, why: Sequence[str]) -> Choice:
    return Choice(np.asarray(places, np.int64) + clip.first, clip.times[places], tuple(why))


def _wanted(clip: Clip, wish: Wish) -> int | None:
    """How many frames `num_frames` or `fps` asks for; None if neither is given.

    Raises:
      MediaError: more than there are.
    """
    n = len(clip.times)
    if wish.num_frames is not None:
        if wish.num_frames > n:
            raise MediaError(
                f"num_frames={wish.num_frames} is more than the {n} frames of the clip; lower it, or take the sampler "
                "'uniform'."
            )
        return wish.num_frames
    if wish.fps is not None:
        return min(max(int(n / clip.fps * wish.fps), wish.min_frames), wish.max_frames, n)
    return None


def _held(clip: Clip, wish: Wish) -> str:
    """Says that `fps` asks for more frames than `max_frames`, or fewer than `min_frames`; else empty."""
    if wish.fps is None:
        return ""
    frames = int(len(clip.times) / clip.fps * wish.fps)
    if frames > wish.max_frames:
        return f" ({wish.fps:g} fps is held to max_frames={wish.max_frames})"
    return f" ({wish.fps:g} fps is raised to min_frames={wish.min_frames})" if frames < wish.min_frames else ""


def _by_level(clip: Clip, level: np.ndarray, wish: Wish, describe: Callable[[float], str]) -> Choice:
    """Frames at rates between `min_fps` (level 0) and `max_fps` (level 1), the first and the last included.

    Args:
      level: f64[n], in [0, 1], of each frame of the clip.
      describe: says a level in words.
    """
    n = len(clip.times)
    rates = wish.min_fps + (wish.max_fps - wish.min_fps) * level
    # Frames to take for each frame there is. None is taken twice.
    share = rates * np.diff(clip.times, append=clip.times[-1] + 1 / clip.fps)
    count = _wanted(clip, wish)
    own = int(np.minimum(share, 1).sum())
    if count is None:
        count = min(max(own, wish.min_frames), wish.max_frames, n)
    scale = 1.0 if count == own else _scale_to(share, count)
    share = np.minimum(share * scale, 1)
    passed = np.concatenate([[0.0], np.cumsum(share)[:-1]])
    if count == 1:
        places = np.zeros(1, np.int64)
    else:
        places = np.interp(np.linspace(0, passed[-1], count), passed, np.arange(n)).round().astype(np.int64)
    # Where rounding makes two the same, the later one moves on, as long as there is room behind it.
    order = np.arange(count)
    places = np.minimum(np.maximum.accumulate(places - order) + order, n - count + order)
    scaled = "" if scale == 1 else f", rates scaled by {scale:.2f} for {count} frames{_held(clip, wish)}"
    why = [f"{describe(level[i])}: {scale * rates[i]:.1f} fps{scaled}" for i in places.tolist()]
    return _choice(clip, places, why)


def _scale_to(share: np.ndarray, count: int) -> float:
    """The factor by which shares add up to `count` frames, none of them above 1; f64[n], count <= n."""
    positive = share[share > 0]
    low, high = 0.0, count / positive.sum()
    while np.minimum(positive * high, 1).sum() < min(count, len(positive)) * (1 - 1e-9):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if np.minimum(positive * middle, 1).sum() < count:
            low = middle
        else:
            high = middle
    return high
