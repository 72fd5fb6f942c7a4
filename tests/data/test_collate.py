"""Laying samples in rows and frames in vision rows."""

import numpy as np
import pytest

from qwenvl_jax.data.collate import choose_vision_shape, collate, place_frames, window_order
from qwenvl_jax.data.laying import frames_fit
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.errors import DataError

TABLE = np.zeros((3, 256), np.float32)
PATCH_DIM = 24
PAD = 99


def make_sample(seed: int, grids=(), words: int = 3) -> Sample:
    """A sample with a medium of each grid, (t, h, w), between words; every patch has bytes of its own."""
    rng = np.random.default_rng(seed)
    media = tuple(
        Media("video" if g[0] > 1 else "image", rng.integers(0, 256, (g[0] * g[1] * g[2], PATCH_DIM), np.uint8), g)
        for g in grids
    )
    merged = sum(len(m.patches) for m in media) // 4
    n = merged + words
    index = np.full(n, -1, np.int32)
    index[1 : 1 + merged] = np.arange(merged)
    tokens = rng.integers(0, 50, n).astype(np.int32)
    positions = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
    weights = (np.arange(n) % 2).astype(np.float32)
    return Sample(tokens, positions, np.append(tokens[1:], tokens[-1:]), weights, index, media)


def patches_seen(batch, row: int) -> np.ndarray:
    """The patches that the vision tokens of a row point at, in order."""
    group = row // (len(batch.tokens) // len(batch.vision[0].patches))
    merged = np.concatenate([v.patches[group].reshape(-1, 4, PATCH_DIM) for v in batch.vision])
    return merged[batch.vision_index[row][batch.vision_index[row] >= 0]].reshape(-1, PATCH_DIM)


def test_rows_of_samples_with_frames_in_groups():
    samples = [
        make_sample(0, [(1, 4, 6), (3, 2, 4)]),
        make_sample(1),
        make_sample(2, [(2, 4, 4)], words=5),
        make_sample(3, [(1, 2, 2)]),
        make_sample(4, [(1, 8, 8)]),
    ]
    rows = [[samples[0], samples[1]], [samples[2]], [samples[3], samples[4]], []]
    batch = collate(rows, pixel_table=TABLE, pad_token_id=PAD, length=40, groups=2)
    for r, row in enumerate(rows):
        n = sum(len(s.tokens) for s in row)
        for name in ("tokens", "targets", "loss_weights", "positions"):
            expected = np.concatenate([getattr(s, name) for s in row]) if row else []
            np.testing.assert_array_equal(getattr(batch, name)[r, :n].reshape(-1), np.reshape(expected, -1))
        assert batch.segment_ids[r].tolist() == [i + 1 for i, s in enumerate(row) for _ in s.tokens] + [0] * (40 - n)
        assert (batch.tokens[r, n:] == PAD).all() and (batch.vision_index[r, n:] == -1).all()
        assert not batch.loss_weights[r, n:].any() and not batch.positions[r, n:].any()
        media = [m.patches for s in row for m in s.media]
        if media:
            np.testing.assert_array_equal(patches_seen(batch, r), np.concatenate(media))
    assert [a.dtype.name for a in (batch.tokens, batch.positions, batch.vision_index)] == ["int32"] * 3


def test_vision_rows_tell_where_each_patch_stands():
    batch = collate(
        [[make_sample(0, [(1, 4, 6), (2, 2, 4)])]], pixel_table=TABLE, pad_token_id=PAD, vision_shape=((1, 24), (1, 20))
    )
    long, short = batch.vision
    assert long.segment_ids[0, 0].tolist() == [1] * 24 and long.items[0, 0].tolist() == [1] * 24
    assert short.segment_ids[0, 0].tolist() == [1] * 8 + [2] * 8 + [0] * 4
    assert short.items[0, 0].tolist() == [2] * 16 + [0] * 4
    assert (short.sizes[0, 0, :16] == (2, 4)).all() and (short.sizes[0, 0, 16:] == 1).all()
    block = [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = [(r + 2 * i, c + 2 * j) for i in range(2) for j in range(3) for r, c in block]
    assert [tuple(rc) for rc in long.coords[0, 0].tolist()] == expected
    assert long.pixel_table.shape == (1, 3, 256)


def test_frames_between_two_powers_of_two_share_a_bucket_as_long_as_the_longest():
    assert choose_vision_shape([[20, 32, 24]]) == ((3, 32),)
    assert choose_vision_shape([[24] * 6, [24]]) == ((6, 24),)
    assert choose_vision_shape([[4, 8, 4, 16], [64]]) == ((2, 16), (1, 64))
    assert choose_vision_shape([[], []]) == ()
    assert choose_vision_shape([[48] * 384]) == ((384, 48),)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_rows_of_a_chosen_shape_are_a_multiple(multiple):
    """For devices that share them; vision tokens read the same patches."""
    sample = make_sample(0, [(1, 4, 4), (1, 4, 8), (1, 4, 4), (1, 8, 12)])
    batch = collate([[sample]], pixel_table=TABLE, pad_token_id=PAD, vision_multiple=multiple)
    rows = [one.patches.shape[1] for one in batch.vision]
    assert all(n % multiple == 0 for n in rows) and len(rows) > 1
    held = np.concatenate([one.patches.reshape(-1, 4, PATCH_DIM) for one in batch.vision])
    index = batch.vision_index[batch.vision_index >= 0]
    wanted = np.concatenate([medium.patches for medium in sample.media]).reshape(-1, 4, PATCH_DIM)
    np.testing.assert_array_equal(held[index], wanted)


def test_the_planner_and_the_collator_agree_on_what_fits():
    rng = np.random.default_rng(3)
    fitting = 0
    for _ in range(200):
        shape = tuple((int(r), 4 * int(c)) for r, c in rng.integers(1, 5, (rng.integers(1, 4), 2)))
        lengths = (4 * rng.integers(1, 5, rng.integers(1, 9))).tolist()
        places = place_frames(lengths, shape)
        assert (places is not None) == frames_fit({n: lengths.count(n) for n in lengths}, shape)
        if places is None:
            continue
        fitting += 1
        slots = [(p.bucket, p.row, p.start + i) for p, n in zip(places, lengths, strict=True) for i in range(n)]
        assert len(slots) == len(set(slots))
        assert all(row < shape[b][0] and slot < shape[b][1] for b, row, slot in slots)
    assert 20 < fitting < 180


def test_text_alone_keeps_the_shapes_asked_for():
    batch = collate([[make_sample(0)]], pixel_table=TABLE, pad_token_id=PAD)
    assert batch.vision == () and batch.tokens.shape == (1, 3)
    batch = collate(
        [[make_sample(0)], []],
        pixel_table=TABLE,
        pad_token_id=PAD,
        vision_shape=((2, 8),),
        patch_dim=PATCH_DIM,
        groups=2,
    )
    assert batch.vision[0].patches.shape == (2, 2, 8, PATCH_DIM) and not batch.vision[0].segment_ids.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 20}, "length=20"),
        ({"groups": 3}, "groups=3"),
        ({"vision_shape": ((1, 24),)}, "do not fit vision_shape"),
        ({"vision_shape": ((4, 16),)}, "do not fit vision_shape"),
        ({"vision_shape": ((4, 30),)}, "multiple of 4"),
    ],
)
def test_shapes_that_do_not_hold_the_samples(options, said):
    rows = [[make_sample(0, [(2, 4, 6), (1, 4, 4)], words=6)], [make_sample(1)]]
    with pytest.raises(DataError, match=said):
        collate(rows, pixel_table=TABLE, pad_token_id=PAD, **options)


def test_text_alone_without_the_size_of_a_patch():
    with pytest.raises(DataError, match="patch_dim"):
        collate([[make_sample(0)]], pixel_table=TABLE, pad_token_id=PAD, vision_shape=((2, 8),))


def reference_windows(grid: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """The reference's order of merged tokens, and the borders of its windows in patches, for windows of 112 pixels."""
    import torch
    from transformers.vision_utils import get_vision_window_index

    order, borders = get_vision_window_index(torch.tensor([grid]), 2, 112, 14)
    return order.tolist(), borders.tolist()


def our_windows(grid: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    t, h, w = grid
    order, numbers = window_order(h // 2, w // 2, 4)
    borders = np.cumsum(np.tile(np.bincount(numbers)[1:], t) * 4)
    return [int(n) for i in range(t) for n in order + i * h * w // 4], [0, *borders.tolist()]


def test_worked_windows():
    order, borders = our_windows((1, 20, 12))
    expected = (
        "0 1 2 3 6 7 8 9 12 13 14 15 18 19 20 21 4 5 10 11 16 17 22 23 24 25 26 27 30 31 32 33 36 37 38 39 42 "
        "43 44 45 28 29 34 35 40 41 46 47 48 49 50 51 54 55 56 57 52 53 58 59"
    )
    assert order == [int(n) for n in expected.split()]
    assert borders == [0, 64, 96, 160, 192, 224, 240]
    assert our_windows((2, 16, 8)) == (list(range(64)), [0, 64, 128, 192, 256])


@pytest.mark.reference
def test_windows_are_those_of_the_reference():
    rng = np.random.default_rng(5)
    for t, h, w in [(1, 20, 12), (2, 16, 8), (1, 2, 2), *rng.integers(1, 15, (60, 3)).tolist()]:
        grid = (t, 2 * h, 2 * w)
        assert our_windows(grid) == reference_windows(grid), grid


@pytest.mark.reference
@pytest.mark.parametrize("shape", [None, ((3, 300), (2, 80))])
def test_patches_stand_window_after_window_and_tokens_point_at_them(shape):
    samples = [
        make_sample(0, [(1, 20, 12), (2, 6, 10)]),
        make_sample(1, [(3, 4, 4)], words=5),
        make_sample(2, [(1, 10, 18)]),
    ]
    rows, fixed = [[samples[0], samples[1]], [samples[2]]], {"pixel_table": TABLE, "pad_token_id": PAD}
    plain = collate(rows, **fixed, groups=2, vision_shape=shape)
    batch = collate(rows, **fixed, groups=2, vision_shape=shape, window=4)
    assert all(v.windows is None for v in plain.vision)
    for r, row in enumerate(rows):
        # What each token shows is the same; only where it stands is not.
        np.testing.assert_array_equal(patches_seen(batch, r), np.concatenate([m.patches for s in row for m in s.media]))
    frames = 0
    for v, p in zip(batch.vision, plain.vision, strict=True):
        assert v.windows.dtype == np.int32 and v.windows.shape == v.segment_ids.shape
        for name in ("segment_ids", "items", "sizes"):
            np.testing.assert_array_equal(getattr(v, name), getattr(p, name))
        np.testing.assert_array_equal(v.windows > 0, v.segment_ids > 0)
        for g, r in np.ndindex(v.windows.shape[:2]):
            windows, segments = v.windows[g, r], v.segment_ids[g, r]
            first = 1
            for number in range(1, segments.max() + 1):
                at = segments == number
                order, borders = reference_windows((1, *v.sizes[g, r][at][0].tolist()))
                moved = [4 * n + i for n in order for i in range(4)]
                np.testing.assert_array_equal(v.patches[g, r][at], p.patches[g, r][at][moved])
                np.testing.assert_array_equal(v.coords[g, r][at], p.coords[g, r][at][moved])
                expected = np.repeat(np.arange(first, first + len(borders) - 1), np.diff(borders))
                np.testing.assert_array_equal(windows[at], expected)
                first += len(borders) - 1
                frames += 1
    assert frames == 7
