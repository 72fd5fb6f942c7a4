"""Rotary positions (time, height, width) of the tokens of one sample.

A sample is a chain of runs. A run of text counts on, the same on all three axes; a run of vision spreads a grid from
where it begins. The next run begins after the longer merged side of that grid (transformers 5.23) or after the highest
position in it, whatever the axis (the models' own release); these differ only for a video in one run that lasts longer
than it is wide and high. An image of 2 x 3 merged tokens after three words:

    token   a  b  c  .  .  .  .  .  .  d
    time    0  1  2  3  3  3  3  3  3  6
    height  0  1  2  3  3  3  4  4  4  6
    width   0  1  2  3  4  5  3  4  5  6

Along a video that is one run, the time axis counts temporal patches (Qwen2-VL) or parts of a second (Qwen2.5-VL).
"""

from collections.abc import Iterable, Sequence

import numpy as np

TEXT, IMAGE, VIDEO = 0, 1, 2


def steps_at_rate(count: int, tokens_per_second: float, second_per_grid: float) -> np.ndarray:
    """Time positions of temporal patches that follow each other evenly, from the first: i * rate * seconds, truncated.

    Args:
      count: of temporal patches.
      tokens_per_second: positions in a second.
      second_per_grid: seconds from one temporal patch to the next.

    Returns:
      i32[count].

    Reference: `get_rope_index` of transformers 5.23's Qwen2.5-VL, which computes in float32; just below a whole number,
    float64 truncates to another one.
    """
    interval = np.float32(tokens_per_second) * np.float32(second_per_grid)
    return (np.arange(count, dtype=np.float32) * interval).astype(np.int32)


def steps_at_times(times: np.ndarray, tokens_per_second: float) -> np.ndarray:
    """Time positions of temporal patches at any times, from the first: seconds * rate, truncated.

    Args:
      times: f64[t], seconds of each temporal patch; taken as known to a millionth of a position.
      tokens_per_second: positions in a second.

    Returns:
      i32[t].
    """
    return np.trunc(np.round((times - times[0]) * tokens_per_second, 6)).astype(np.int32)


def vision_block(
    start: int, grid: tuple[int, int, int], *, merge_size: int, steps: np.ndarray | None = None
) -> np.ndarray:
    """Positions of one run of vision.

    Args:
      start: position at which the run begins.
      grid: (t, h, w) in patches.
      steps: i32[t], time positions of the temporal patches from the start of the run; without, they are counted.

    Returns:
      i32[t * h/m * w/m, 3], in row-major order of the grid.
    """
    t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
    block_THW3 = np.empty((t, h, w, 3), np.int32)
    block_THW3[..., 0] = (np.arange(t) if steps is None else steps)[:, None, None]
    block_THW3[..., 1] = np.arange(h, dtype=np.int32)[None, :, None]
    block_THW3[..., 2] = np.arange(w, dtype=np.int32)[None, None, :]
    return block_THW3.reshape(-1, 3) + np.int32(start)


def split_frames(grids: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Grids of single temporal patches: Qwen3-VL puts text between them, so that each is a run of its own."""
    return [(1, h, w) for t, h, w in grids for _ in range(t)]


def mrope_positions(
    kinds: np.ndarray,
    image_grids: Iterable[tuple[int, int, int]],
    video_grids: Iterable[tuple[int, int, int]],
    *,
    merge_size: int,
    video_steps: Sequence[np.ndarray | None] | None = None,
    past_time: bool = False,
) -> np.ndarray:
    """Positions of a whole sample.

    Args:
      kinds: u8[n], `TEXT`, `IMAGE` or `VIDEO` for each token.
      image_grids, video_grids: (t, h, w) in patches of each run of that kind, in reading order.
      merge_size: patches to the side of a merged token.
      video_steps: for each run of video, `steps` of `vision_block`.
      past_time: whether what follows a run of vision begins after its highest position on all axes, time too (the
        models' own release), or after its longer side only (transformers 5.23), where it may overlap the run's times.

    Returns:
      i32[n, 3].

    Reference: `get_rope_index` of transformers 5.23, which consumes runs of equal kind in the same way.
    """
    video_grids = list(video_grids)
    runs = {
        IMAGE: ((grid, None) for grid in image_grids),
        VIDEO: zip(video_grids, video_steps or [None] * len(video_grids), strict=True),
    }
    edges = np.flatnonzero(np.diff(kinds)) + 1
    pieces, position = [np.empty((0, 3), np.int32)], 0
    for run in np.split(np.arange(len(kinds)), edges) if len(kinds) else ():
        kind = int(kinds[run[0]])
        if kind == TEXT:
            pieces.append(np.repeat(np.arange(position, position + len(run), dtype=np.int32)[:, None], 3, axis=1))
            position += len(run)
            continue
        grid, steps = next(runs[kind])
        block = vision_block(position, grid, merge_size=merge_size, steps=steps)
        if len(block) != len(run):
            raise ValueError(f"a run of {len(run)} vision tokens does not match its grid {grid} of {len(block)}.")
        pieces.append(block)
        position = int(block.max()) + 1 if past_time else position + max(grid[1], grid[2]) // merge_size
    return np.concatenate(pieces)
