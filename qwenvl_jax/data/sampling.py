"""Which frames of a video are looked at, and how large they are then.

Every generation was released with rules of its own; `qwenvl_jax.data.generations` says which belongs to which. A video
file is always sampled: where neither `fps` nor `num_frames` is given, two frames a second are taken, as qwen-vl-utils
does. (The processors of transformers take every frame of a Qwen2-VL or Qwen2.5-VL video unless `do_sample_frames` is
set; with it set and `fps=2` they choose what the dialect "transformers" chooses here.)
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from qwenvl_jax.data.image import check_ratio, smart_resize
from qwenvl_jax.errors import MediaError


def uniform_indices(
    n_frames: int,
    source_fps: float,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """Frames spread evenly from the first to the last, both included (the rule of Qwen3-VL).

    n = trunc(n_frames / source_fps * fps), clipped to [min_frames, max_frames] and to what is there, or `num_frames` as
    it is; the indices are linspace(0, n_frames - 1, n) in float64, rounded half to even.

    Args:
      n_frames: frames in the clip.
      source_fps: frames per second of the clip, from its own timestamps.
      fps: frames per second wanted; excludes `num_frames`.
      num_frames: frames wanted; with more than there are, frames repeat.

    Returns:
      i64[n], not decreasing.

    Raises:
      MediaError: both or neither of `fps` and `num_frames`, or a value that is not positive.

    Reference: `Qwen3VLVideoProcessor.sample_frames` of transformers 5.23.
    """
    _check_wish(n_frames, source_fps, fps, num_frames)
    if num_frames is not None:
        n = num_frames
    elif fps is not None:
        n = min(max(int(n_frames / source_fps * fps), min_frames), max_frames, n_frames)
    return np.linspace(0, n_frames - 1, n).round().astype(np.int64)


def even_indices(
    n_frames: int,
    source_fps: float,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """An even number of frames spread from the first to the last, both included (the rule of qwen-vl-utils).

    n = n_frames / source_fps * fps, raised to `min_frames` (rounded up to even), then limited to `max_frames` and to
    what is there, and rounded down to even; or `num_frames` rounded to even, halves to the multiple of four. The
    indices are linspace(0, n_frames - 1, n), rounded half to even.

    Args:
      n_frames, source_fps, fps, num_frames: see `uniform_indices`; frames never repeat.

    Returns:
      i64[n], rising.

    Raises:
      MediaError: as `uniform_indices`, or n is less than 2 or more than there are.

    Reference: `smart_nframes` of qwen-vl-utils 0.0.14, and torch's linspace, which computes in float32 from both ends.
    """
    _check_wish(n_frames, source_fps, fps, num_frames)
    if num_frames is not None:
        n = round(num_frames / 2) * 2
    elif fps is not None:
        wish = max(n_frames / source_fps * fps, _ceil_even(min_frames))
        n = _floor_even(min(wish, _floor_even(max_frames), n_frames))
    _check_count(n, n_frames)
    step, index = np.float64(np.float32(n_frames - 1) / np.float32(n - 1)), np.arange(n)
    places = np.where(index < n // 2, step * index, n_frames - 1 - step * (n - 1 - index))
    return places.astype(np.float32).round().astype(np.int64)


def stepped_indices(
    n_frames: int,
    source_fps: float,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """An even number of frames, each a step of n_frames / n after the one before (the rule of transformers' Qwen2-VL).

    n = n_frames / source_fps * fps, raised to `min_frames`, then limited to `max_frames` and to what is there (both
    rounded down to even), and rounded down to even; or `num_frames` rounded to even, halves to the multiple of four.
    The indices are i * n_frames / n, truncated; so the last frame is only among them if all are.

    Args:
      n_frames, source_fps, fps, num_frames: see `uniform_indices`; frames never repeat.

    Returns:
      i64[n], rising.

    Raises:
      MediaError: as `uniform_indices`, or n is less than 2 or more than there are.

    Reference: `Qwen2VLVideoProcessor.sample_frames` of transformers 5.23. Where its `arange` counts a step too many, it
    asks for a frame after the last one and fails; here that step is left out.
    """
    _check_wish(n_frames, source_fps, fps, num_frames)
    if num_frames is not None:
        n = round(num_frames / 2) * 2
    elif fps is not None:
        limit = _floor_even(min(max_frames, n_frames))
        n = _floor_even(min(max(n_frames / source_fps * fps, min_frames), limit, n_frames))
    _check_count(n, n_frames)
    # torch's arange, in float32 on x86: two vectors of eight at a time, each counted on from its first value; then one
    # by one. Where a step falls on a whole number or just beside it, this decides what it is truncated to.
    step, index = n_frames / n, np.arange(n)
    first = np.float32(step * (index // 8 * 8)).astype(np.float64)
    in_vectors = np.float32(first + step * (index % 8))
    return np.where(index < n // 16 * 16, in_vectors, np.float32(step * index)).astype(np.int64)


def _check_wish(n_frames: int, source_fps: float, fps: float | None, num_frames: int | None):
    """What every rule asks of its arguments."""
    if (fps is None) == (num_frames is None):
        raise MediaError(f"give either fps or num_frames of a video, not both or neither; got {fps} and {num_frames}.")
    for name, value in (("n_frames", n_frames), ("source_fps", source_fps), ("fps", fps), ("num_frames", num_frames)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise MediaError(f"{name} of a video must be positive and finite, got {value}.")


def _check_count(n: int, n_frames: int):
    """Rules for an even number of frames that never repeat."""
    if not 2 <= n <= n_frames:
        raise MediaError(
            f"a video of {n_frames} frames must be sampled at no fewer than 2 of them and no more than there are, got "
            f"{n}; change fps, num_frames, min_frames or max_frames, or send a single frame as an image."
        )


def _floor_even(number: float) -> int:
    return math.floor(number / 2) * 2


def _ceil_even(number: float) -> int:
    return math.ceil(number / 2) * 2


def clip_size(
    n_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
    cap_tokens: int | None = None,
    max_frame_tokens: int | None = None,
    max_video_tokens: int | None = None,
) -> tuple[int, int]:
    """Height and width that the frames of a clip are resized to; the budgets count pixels of the whole clip.

    Args:
      n_frames: frames sampled, before an odd count is filled up.
      factor: side of a merged patch, in pixels.
      temporal_factor: frames in a temporal patch.
      min_pixels, max_pixels: bounds of frames * height * width.
      cap_tokens: merged tokens that a frame has at most (unless `min_pixels` asks for more), or None.
      max_frame_tokens: takes the place of `cap_tokens`, and goes before `min_pixels`.
      max_video_tokens: merged tokens of the clip at most, in place of `max_pixels`; goes before `min_pixels`.

    Raises:
      MediaError: fewer frames than a temporal patch holds, a side ratio over 200, or more tokens than asked for even
        when frames are as small as they can be.

    Reference: `smart_resize` of transformers 5.23's Qwen3-VL video processor.
    """
    asked = _token_share(n_frames, temporal_factor, max_frame_tokens, max_video_tokens)
    if asked is not None:
        # The rule below counts an odd number of frames as one more or one less, and divides by their own number.
        counted = min(n_frames, round(n_frames / temporal_factor) * temporal_factor)
        bound = asked * factor**2 * counted
        max_pixels = bound if max_video_tokens is not None else min(bound, max_pixels)
        min_pixels = min(min_pixels, max_pixels)
        cap_tokens = None if max_frame_tokens is not None else cap_tokens
    if cap_tokens is not None:
        share = min(cap_tokens * factor**2, max_pixels // n_frames)
        max_pixels = max(share, int(min_pixels * 1.05)) * n_frames
    if n_frames < temporal_factor:
        raise MediaError(
            f"a video must have at least {temporal_factor} sampled frames, got {n_frames}; give a longer video, raise "
            "fps or num_frames, or send the frame as an image."
        )
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(n_frames / temporal_factor) * temporal_factor * new_height * new_width
    if pixels > max_pixels:
        beta = math.sqrt((n_frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif pixels < min_pixels:
        beta = math.sqrt(min_pixels / (n_frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    _check_share(new_height, new_width, factor, asked)
    return new_height, new_width


def frame_size(
    n_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
    cap_tokens: int | None = None,
    max_frame_tokens: int | None = None,
    max_video_tokens: int | None = None,
) -> tuple[int, int]:
    """Height and width that the frames of a video are resized to, each as an image; the budgets count a frame's pixels.

    Args:
      n_frames: frames sampled, before an odd count is filled up.
      factor, temporal_factor: see `clip_size`.
      min_pixels, max_pixels: bounds of height * width.
      cap_tokens: length of a context of which the whole video takes at most nine tenths (unless `min_pixels` asks for
        more), or None.
      max_frame_tokens: merged tokens of a frame at most, in place of `max_pixels`; goes before `min_pixels`.
      max_video_tokens: merged tokens of the video at most, in place of `cap_tokens`; goes before `min_pixels`.

    Raises:
      MediaError: a side of zero, a side ratio over 200, or more tokens than asked for even when frames are as small as
        they can be.

    Reference: `Qwen2VLVideoProcessor.resize` of transformers 5.23.
    """
    asked = _token_share(n_frames, temporal_factor, max_frame_tokens, max_video_tokens)
    if asked is not None:
        bound = asked * factor**2
        max_pixels = bound if max_frame_tokens is not None else min(bound, max_pixels)
        min_pixels = min(min_pixels, max_pixels)
        cap_tokens = None if max_video_tokens is not None else cap_tokens
    if cap_tokens is not None:
        share = int(cap_tokens * factor * factor * 0.9) * temporal_factor // n_frames
        max_pixels = max(min(max_pixels, share), int(min_pixels * 1.05))
    size = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    _check_share(*size, factor, asked)
    return size


def pooled_size(
    rule: Callable[..., tuple[int, int]],
    n_frames: int,
    height: int,
    width: int,
    *,
    pool: int,
    factor: int,
    temporal_factor: int,
    max_frame_tokens: int | None = None,
    max_video_tokens: int | None = None,
    **bounds: int | None,
) -> tuple[int, int]:
    """Height and width of frames whose merged tokens are pooled: what was asked for in tokens counts those after it.

    Without `max_frame_tokens` and `max_video_tokens` it is what the rule gives without pooling, which counts pixels.

    Args:
      rule: `clip_size` or `frame_size`, which takes the other arguments.
      pool: side of a cell, in merged tokens; 1 for no pooling.

    Raises:
      MediaError: as the rule.
    """
    call = functools.partial(rule, n_frames, height, width, factor=factor, temporal_factor=temporal_factor, **bounds)
    asked = _token_share(n_frames, temporal_factor, max_frame_tokens, max_video_tokens)
    if asked is None or pool == 1:
        return call(max_frame_tokens=max_frame_tokens, max_video_tokens=max_video_tokens)
    groups, share = -(-n_frames // temporal_factor), asked * pool**2
    while True:
        # Both caps come to the same share, and each does what it does to the other bounds.
        try:
            size = call(
                max_frame_tokens=None if max_frame_tokens is None else share,
                max_video_tokens=None if max_video_tokens is None else share * groups,
            )
        except _TooLarge as error:
            raise _TooLarge(
                f"frames have more tokens at the smallest size that keeps their shape, pooled {pool} x {pool}, than "
                f"the {asked} that max_frame_tokens or max_video_tokens leaves each; raise it, pool more, or take "
                "fewer frames."
            ) from error
        rows, columns = size[0] // factor, size[1] // factor
        if -(-rows // pool) * -(-columns // pool) <= asked:
            return size
        # Cells at the edges that are not full count like full ones: the next smaller size.
        share = rows * columns - 1


class _TooLarge(MediaError):
    """More tokens than asked for, even when frames are as small as they can be."""


def _token_share(
    n_frames: int, temporal_factor: int, max_frame_tokens: int | None, max_video_tokens: int | None
) -> int | None:
    """Merged tokens that a temporal patch has at most, by a cap on frames, on the video, or both; None without.

    A temporal patch has as many tokens as one of its frames would have alone, so a frame's cap is one on each of them.

    Raises:
      MediaError: a cap on the video that leaves a temporal patch no token.
    """
    groups = -(-n_frames // temporal_factor)
    if max_video_tokens is not None and max_video_tokens < groups:
        raise MediaError(
            f"max_video_tokens={max_video_tokens} is less than a token for each of the {groups} temporal patches that "
            f"{n_frames} frames make; raise it, or take fewer frames."
        )
    of_video = None if max_video_tokens is None else max_video_tokens // groups
    given = [cap for cap in (max_frame_tokens, of_video) if cap is not None]
    return min(given) if given else None


def _check_share(height: int, width: int, factor: int, asked: int | None):
    """Raises MediaError if a frame of this size has more merged tokens than were asked for."""
    tokens = (height // factor) * (width // factor)
    if asked is not None and tokens > asked:
        raise _TooLarge(
            f"frames have {tokens} tokens at the smallest size that keeps their shape, more than the {asked} that "
            "max_frame_tokens or max_video_tokens leaves each; raise it, or take fewer frames."
        )


def group_times(times: np.ndarray, temporal_patch_size: int) -> tuple[float, ...]:
    """Seconds of each temporal patch: the mean of its first and last frame; an odd count repeats the last frame.

    Args:
      times: f64[n], seconds of the sampled frames.
    """
    padded = np.concatenate([times, np.repeat(times[-1:], -len(times) % temporal_patch_size)])
    return tuple(
        float((a + b) / 2)
        for a, b in zip(
            padded[::temporal_patch_size], padded[temporal_patch_size - 1 :: temporal_patch_size], strict=True
        )
    )
