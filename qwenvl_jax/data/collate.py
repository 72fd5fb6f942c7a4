"""From samples, already placed in rows, to a `Batch`: token rows, and the frames of each group laid in vision rows."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.batch import Batch, VisionRows
from qwenvl_jax.data.pooling import Pool
from qwenvl_jax.data.sample import Sample
from qwenvl_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class _Frame:
    """One frame of a group: which patches of which medium, and where they are to stand.

    Attributes:
      patches: u8[h*w, 3*tau*P*P].
      size: (h, w) in patches.
      item: number of the image or video in the group, from 1.
      pool: how its merged tokens are pooled, or None.
    """

    patches: np.ndarray
    size: tuple[int, int]
    item: int
    pool: Pool | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a frame stands in its group: bucket, row in it, first slot in the row, number in the row from 1."""

    bucket: int
    row: int
    start: int
    number: int


def place_frames(lengths: Sequence[int], shape: Sequence[tuple[int, int]]) -> list[Place] | None:
    """Lays frames whole into the vision rows of one group.

    Longest first, each into the fullest row that still holds it, of the shortest rows that can; so whether they fit
    depends on how many frames of each length there are, not on their order. The planner counts by the same rule
    (`laying.frames_fit`).

    Args:
      lengths: patches of each frame, in reading order.
      shape: (rows, patches in a row) of each bucket.

    Returns:
      The place of each frame, in the order of `lengths`, or None where they do not all fit.
    """
    free = [[length] * rows for rows, length in shape]
    numbers = [[0] * rows for rows, _ in shape]
    buckets = sorted(range(len(shape)), key=lambda b: shape[b][1])
    places: dict[int, Place] = {}
    for f in sorted(range(len(lengths)), key=lambda f: -lengths[f]):  # stable: equal frames keep reading order
        for b in buckets:
            fitting = [r for r, left in enumerate(free[b]) if left >= lengths[f]]
            if fitting:
                r = min(fitting, key=lambda r: (free[b][r], r))
                start = shape[b][1] - free[b][r]
                free[b][r] -= lengths[f]
                numbers[b][r] += 1
                places[f] = Place(b, r, start, numbers[b][r])
                break
        else:
            return None
    return [places[f] for f in range(len(lengths))]


def choose_vision_shape(lengths_by_group: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Buckets for frames of these lengths: frames between the same two powers of two share a bucket.

    A row is as long as the longest frame of its bucket, so that frames of one size, as in a video, waste nothing.

    Args:
      lengths_by_group: patches of each frame, for each group.

    Returns:
      (rows, patches in a row) of each bucket, shortest first; empty where there are no frames.
    """
    buckets: dict[int, list[list[int]]] = {}
    for g, lengths in enumerate(lengths_by_group):
        for length in lengths:
            key = max(4, (length - 1).bit_length())  # frames up to 16 patches are all alike
            buckets.setdefault(key, [[] for _ in lengths_by_group])[g].append(length)
    shape = []
    for key in sorted(buckets):
        longest = max(max(lengths, default=0) for lengths in buckets[key])
        # Of frames longer than half a row each needs a row; beyond that bound it takes few tries.
        rows = max(sum(2 * length > longest for length in lengths) for lengths in buckets[key])
        while any(place_frames(lengths, [(rows, longest)]) is None for lengths in buckets[key]):
            rows += 1
        shape.append((rows, longest))
    return tuple(shape)


def collate(
    rows: Sequence[Sequence[Sample]],
    *,
    pixel_table: np.ndarray,
    pad_token_id: int,
    length: int | None = None,
    groups: int = 1,
    vision_shape: tuple[tuple[int, int], ...] | None = None,
    vision_multiple: int = 1,
    merge_size: int = 2,
    patch_dim: int | None = None,
    window: int = 0,
    pool_taps: int | None = None,
    classes: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Makes a `Batch` of NumPy arrays.

    Args:
      rows: the samples of each row, in order; a row may be empty.
      pixel_table: f32[3, 256], the normalised value of each byte.
      pad_token_id: fills the rest of a row.
      length: token slots in a row; the longest row without it.
      groups: vision groups, dividing the number of rows.
      vision_shape: (rows, patches in a row) of each bucket, for each group alike; chosen to fit without it.
      vision_multiple: of which the rows of each bucket are, for devices that share those of a group; rows beyond the
        shape's stay empty, so that frames stand where they would without it.
      merge_size: patches to the side of a merged token.
      patch_dim: bytes in a patch; needed where `vision_shape` is given and no sample may have media.
      window: side of an attention window of the tower, in merged tokens; 0 for a tower without windows.
      pool_taps: Q, merged tokens that a pooled token is made of at most; 0 for a batch without pooling, as many as
        needed without it.
      classes: the number of each sample's class, from 1, as in `rows`; see `Batch.classes`.

    Raises:
      DataError: a row is longer than `length`, the rows do not divide into the groups, frames do not fit the shape, or
        pooled ones are made of more than `pool_taps`.
    """
    if not rows or len(rows) % groups:
        raise DataError(f"{len(rows)} rows do not divide evenly into groups={groups}; change one of them.")
    needed = max(sum(len(sample.tokens) for sample in row) for row in rows)
    length = needed if length is None else length
    if needed > length:
        raise DataError(f"a row of {needed} tokens does not fit length={length}; raise it, or sample fewer frames.")
    per_group = len(rows) // groups
    frames_by_group = [_frames([s for row in rows[g * per_group :][:per_group] for s in row]) for g in range(groups)]
    lengths = [[len(frame.patches) for frame in frames] for frames in frames_by_group]
    laid = choose_vision_shape(lengths) if vision_shape is None else tuple(vision_shape)
    _check_shape(laid, merge_size)
    shape = tuple((-(-count // vision_multiple) * vision_multiple, patches) for count, patches in laid)
    places: list[list[Place]] = []
    for g, one in enumerate(lengths):
        placed = place_frames(one, laid)
        if placed is None:
            raise DataError(
                f"the {len(lengths[g])} frames of group {g} (longest {max(lengths[g])} patches, {sum(lengths[g])} in "
                f"all) do not fit vision_shape={list(laid)} of (rows, patches); enlarge it or lower max_pixels."
            )
        places.append(placed)
    vision = _vision_rows(frames_by_group, places, shape, pixel_table, merge_size, patch_dim, window)
    taps = _check_taps(frames_by_group, pool_taps)
    shown = [
        _shown(frames, _merged_index(frames, placed, shape, merge_size, window), merge_size, max(1, taps))
        for frames, placed in zip(frames_by_group, places, strict=True)
    ]
    return _token_rows(rows, shown, length, pad_token_id, taps, vision, classes)


def _check_shape(shape: tuple[tuple[int, int], ...], merge_size: int):
    """Rows must hold whole merged tokens."""
    for rows, patches in shape:
        if rows < 1 or patches < 1 or patches % merge_size**2:
            raise DataError(
                f"vision_shape={list(shape)} must hold pairs (rows, patches) with patches a multiple of "
                f"{merge_size**2}, got ({rows}, {patches})."
            )


def _check_taps(frames_by_group: list[list[_Frame]], given: int | None) -> int:
    """Merged tokens to a pooled one: as given, if it holds all frames, or as they need; 0 where none is pooled."""
    needed = max((frame.pool.taps for frames in frames_by_group for frame in frames if frame.pool), default=0)
    if given is not None and needed > given:
        raise DataError(
            f"an image or video is pooled from {needed} merged tokens to one, more than pool_taps={given}; raise it, "
            "or pool less."
        )
    return needed if given is None else given


def _frames(samples: list[Sample]) -> list[_Frame]:
    """The frames of a group in reading order."""
    frames, item = [], 0
    for sample in samples:
        for medium in sample.media:
            item += 1
            t, h, w = medium.grid
            frames += [_Frame(medium.patches[i * h * w :][: h * w], (h, w), item, medium.pool) for i in range(t)]
    return frames


def _merge_order(h: int, w: int, m: int) -> np.ndarray:
    """i32[h*w, 2]: row and column of each patch of a frame, patches in merge order."""
    rows_columns = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    return rows_columns.reshape(h // m, m, w // m, m, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)


def window_order(rows: int, columns: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The merged tokens of a frame, window after window.

    The frame is cut into windows of `window` x `window` from its upper left corner; those at the right and lower edge
    are what is left. A frame of 3 x 5 with windows of 2:

        0  1 |  2  3 |  4         stands as  0 1 5 6 | 2 3 7 8 | 4 9 | 10 11 | 12 13 | 14
        5  6 |  7  8 |  9
       ------+-------+---
       10 11 | 12 13 | 14

    Args:
      rows, columns: of the frame, in merged tokens.
      window: side of a window, in merged tokens.

    Returns:
      i64[rows*columns], the number in reading order of the merged token at each place, and the number of the window
      that it is in, from 1.

    Reference: `get_vision_window_index` of transformers 5.23.
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    numbers = row // window * -(-columns // window) + column // window + 1
    order = np.argsort(numbers, kind="stable")  # stable: a window keeps reading order within
    return order, numbers[order]


def _vision_rows(
    frames_by_group: list[list[_Frame]],
    places: list[list[Place]],
    shape: tuple[tuple[int, int], ...],
    pixel_table: np.ndarray,
    merge_size: int,
    patch_dim: int | None,
    window: int,
) -> tuple[VisionRows, ...]:
    """Fills the buckets."""
    groups = len(frames_by_group)
    width = next((f.patches.shape[1] for frames in frames_by_group for f in frames), patch_dim)
    if not shape:
        return ()
    if width is None:
        raise DataError("a batch of text alone with a vision_shape needs patch_dim, the bytes in a patch.")
    buckets: list[dict[str, np.ndarray]] = [
        {
            "patches": np.zeros((groups, rows, slots, width), np.uint8),
            "coords": np.zeros((groups, rows, slots, 2), np.int32),
            "sizes": np.ones((groups, rows, slots, 2), np.int32),
            "segment_ids": np.zeros((groups, rows, slots), np.int32),
            "items": np.zeros((groups, rows, slots), np.int32),
            **({"windows": np.zeros((groups, rows, slots), np.int32)} if window else {}),
        }
        for rows, slots in shape
    ]
    for g, frames in enumerate(frames_by_group):
        # Along each row, since windows are numbered on from frame to frame.
        for frame, place in sorted(zip(frames, places[g], strict=True), key=lambda pair: pair[1].start):
            h, w = frame.size
            at = (g, place.row, slice(place.start, place.start + h * w))
            bucket = buckets[place.bucket]
            patches, coords = frame.patches, _merge_order(h, w, merge_size)
            if window:
                block = merge_size**2
                order, numbers = window_order(h // merge_size, w // merge_size, window)
                moved = (order[:, None] * block + np.arange(block)).reshape(-1)
                patches, coords = patches[moved], coords[moved]
                before = bucket["windows"][g, place.row, place.start - 1] if place.start else 0
                bucket["windows"][at] = before + np.repeat(numbers, block)
            bucket["patches"][at] = patches
            bucket["coords"][at] = coords
            bucket["sizes"][at] = (h, w)
            bucket["segment_ids"][at] = place.number
            bucket["items"][at] = frame.item
    table = np.repeat(np.asarray(pixel_table, np.float32)[None], groups, axis=0)
    return tuple(VisionRows(**bucket, pixel_table=table) for bucket in buckets)


@dataclasses.dataclass(frozen=True)
class _Shown:
    """The vision tokens of a group in reading order, of all its media.

    Attributes:
      index: i32[n, Q], the merged tokens of the group that each is made of; one where nothing is pooled.
      weights: f32[n, Q], their weights.
      begin: the first of each medium.
    """

    index: np.ndarray
    weights: np.ndarray
    begin: list[int]


def _token_rows(
    rows: Sequence[Sequence[Sample]],
    shown: list[_Shown],
    length: int,
    pad_token_id: int,
    taps: int,
    vision: tuple[VisionRows, ...],
    classes: Sequence[Sequence[int]] | None,
) -> Batch:
    """Lays the samples of each row side by side and points their vision tokens at the merged tokens of the group."""
    axes = next((s.positions.shape[1] for row in rows for s in row), 3)
    tokens_BT = np.full((len(rows), length), pad_token_id, np.int32)
    positions_BTA = np.zeros((len(rows), length, axes), np.int32)
    segments_BT = np.zeros((len(rows), length), np.int32)
    targets_BT = np.full((len(rows), length), pad_token_id, np.int32)
    weights_BT = np.zeros((len(rows), length), np.float32)
    index_BT = np.full((len(rows), length), -1, np.int32)
    classes_BT = np.zeros((len(rows), length), np.int32)
    pool_index_BTQ = np.zeros((len(rows), length, taps), np.int32)
    pool_weights_BTQ = np.zeros((len(rows), length, taps), np.float32)
    per_group = len(rows) // len(shown)
    for g, of_group in enumerate(shown):
        media = iter(of_group.begin)
        for b in range(g * per_group, (g + 1) * per_group):
            start = 0
            for number, sample in enumerate(rows[b], 1):
                at = (b, slice(start, start + len(sample.tokens)))
                tokens_BT[at] = sample.tokens
                positions_BTA[at] = sample.positions
                segments_BT[at] = number
                targets_BT[at] = sample.targets
                weights_BT[at] = sample.loss_weights
                classes_BT[at] = classes[b][number - 1] if classes is not None else 0
                first = [next(media) for _ in sample.media]
                seen = sample.vision_index >= 0
                if seen.any():
                    tokens = first[0] + sample.vision_index[seen]
                    index_BT[at][seen] = of_group.index[tokens, 0]
                    if taps:
                        pool_index_BTQ[at][seen] = of_group.index[tokens]
                        pool_weights_BTQ[at][seen] = of_group.weights[tokens]
                start += len(sample.tokens)
    return Batch(
        tokens=tokens_BT,
        positions=positions_BTA,
        segment_ids=segments_BT,
        targets=targets_BT,
        loss_weights=weights_BT,
        vision_index=index_BT,
        vision=vision,
        pool_index=pool_index_BTQ if taps else None,
        pool_weights=pool_weights_BTQ if taps else None,
        classes=None if classes is None else classes_BT,
    )


def _merged_index(
    frames: list[_Frame], places: list[Place], shape: tuple[tuple[int, int], ...], merge_size: int, window: int
) -> list[np.ndarray]:
    """i64[h/m * w/m] of each frame: for its merged tokens in reading order, their numbers among the group's slots."""
    before = np.cumsum([0] + [rows * slots for rows, slots in shape])  # patch slots of the buckets before
    pieces = []
    for frame, place in zip(frames, places, strict=True):
        start = (before[place.bucket] + place.row * shape[place.bucket][1] + place.start) // merge_size**2
        tokens = np.arange(len(frame.patches) // merge_size**2)
        if window:
            order, _ = window_order(frame.size[0] // merge_size, frame.size[1] // merge_size, window)
            tokens = np.argsort(order)
        pieces.append(start + tokens)
    return pieces


def _shown(frames: list[_Frame], merged: list[np.ndarray], merge_size: int, taps: int) -> _Shown:
    """The vision tokens of a group whose frames have these merged tokens."""
    sides = [(frame.size[0] // merge_size, frame.size[1] // merge_size) for frame in frames]
    counts = [math.prod(f.pool.grid(*side) if f.pool else side) for f, side in zip(frames, sides, strict=True)]
    ends = np.cumsum([0, *counts])
    index, weights = np.zeros((ends[-1], taps), np.int32), np.zeros((ends[-1], taps), np.float32)
    for frame, side, tokens, start, end in zip(frames, sides, merged, ends[:-1], ends[1:], strict=True):
        if frame.pool is None:
            # Places of weight 0 are those of a token that stands here anyway.
            index[start:end], weights[start:end, 0] = tokens[:, None], 1
        else:
            places, shares = frame.pool.mixing(*side)
            index[start:end] = tokens[places[:, :1]]
            index[start:end, : places.shape[1]] = tokens[places]
            weights[start:end, : places.shape[1]] = shares
    firsts = [f for f, frame in enumerate(frames) if f == 0 or frame.item != frames[f - 1].item]
    return _Shown(index, weights, [int(ends[f]) for f in firsts])
