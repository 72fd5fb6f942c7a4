"""Which frames of a video are looked at, and how large they are then."""

import math

import numpy as np

from qwenvl_jax.data.image import check_ratio
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
    if (fps is None) == (num_frames is None):
        raise MediaError(f"give either fps or num_frames of a video, not both or neither; got {fps} and {num_frames}.")
    for name, value in (("n_frames", n_frames), ("source_fps", source_fps), ("fps", fps), ("num_frames", num_frames)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise MediaError(f"{name} of a video must be positive and finite, got {value}.")
    if num_frames is None:
        num_frames = min(max(int(n_frames / source_fps * fps), min_frames), max_frames, n_frames)
    return np.linspace(0, n_frames - 1, num_frames).round().astype(np.int64)


def clip_size(
    n_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Height and width that the frames of a clip are resized to; the budgets count pixels of the whole clip.

    Args:
      n_frames: frames sampled, before an odd count is filled up.
      factor: side of a merged patch, in pixels.
      temporal_factor: frames in a temporal patch.
      min_pixels, max_pixels: bounds of frames * height * width.

    Raises:
      MediaError: fewer frames than a temporal patch holds, or a side ratio over 200.

    Reference: `smart_resize` of transformers 5.23's Qwen3-VL video processor.
    """
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
    return new_height, new_width


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
