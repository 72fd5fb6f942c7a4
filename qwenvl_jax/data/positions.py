"""Rotary positions (time, height, width) of the tokens of one sample.

A sample is a chain of runs. A run of text counts on, the same on all three axes; a run of vision spreads a grid from
where it begins, and the next run begins after its longer merged side (the rule of transformers 5.23 for every
generation, and of every release for Qwen3-VL). An image of 2 x 3 merged tokens after three words:

    token   a  b  c  .  .  .  .  .  .  d
    time    0  1  2  3  3  3  3  3  3  6
    height  0  1  2  3  3  3  4  4  4  6
    width   0  1  2  3  4  5  3  4  5  6
"""

from collections.abc import Iterable

import numpy as np

TEXT, IMAGE, VIDEO = 0, 1, 2


def vision_block(start: int, grid: tuple[int, int, int], *, merge_size: int, interval: float = 1.0) -> np.ndarray:
    """Positions of one run of vision.

    Args:
      start: position at which the run begins.
      grid: (t, h, w) in patches.
      interval: positions between temporal patches, truncated to whole ones after multiplying.

    Returns:
      i32[t * h/m * w/m, 3], in row-major order of the grid.
    """
    t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
    block_THW3 = np.empty((t, h, w, 3), np.int32)
    block_THW3[..., 0] = (np.arange(t) * interval).astype(np.int32)[:, None, None]
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
) -> np.ndarray:
    """Positions of a whole sample.

    Args:
      kinds: u8[n], `TEXT`, `IMAGE` or `VIDEO` for each token.
      image_grids, video_grids: (t, h, w) in patches of each run of that kind, in reading order.
      merge_size: patches to the side of a merged token.

    Returns:
      i32[n, 3].

    Reference: `get_rope_index` of transformers 5.23, which consumes runs of equal kind in the same way.
    """
    grids = {IMAGE: iter(image_grids), VIDEO: iter(video_grids)}
    edges = np.flatnonzero(np.diff(kinds)) + 1
    pieces, position = [np.empty((0, 3), np.int32)], 0
    for run in np.split(np.arange(len(kinds)), edges) if len(kinds) else ():
        kind = int(kinds[run[0]])
        if kind == TEXT:
            pieces.append(np.repeat(np.arange(position, position + len(run), dtype=np.int32)[:, None], 3, axis=1))
            position += len(run)
            continue
        grid = next(grids[kind])
        block = vision_block(position, grid, merge_size=merge_size)
        if len(block) != len(run):
            raise ValueError(f"a run of {len(run)} vision tokens does not match its grid {grid} of {len(block)}.")
        pieces.append(block)
        position += max(grid[1], grid[2]) // merge_size
    return np.concatenate(pieces)
