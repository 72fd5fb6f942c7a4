"""Rotary positions against worked examples of the reference."""

import numpy as np
import pytest

from qwenvl_jax.data.positions import (
    IMAGE,
    TEXT,
    VIDEO,
    mrope_positions,
    split_frames,
    steps_at_rate,
    steps_at_times,
    vision_block,
)

DIALECTS = {"transformers": False, "official": True}  # whether positions go on past the time of a video


@pytest.mark.parametrize("past_time", DIALECTS.values(), ids=DIALECTS)
def test_an_image_in_text(past_time):
    kinds = np.array([TEXT] * 4 + [IMAGE] * 6 + [TEXT] * 3, np.uint8)
    t, h, w = mrope_positions(kinds, [(1, 4, 6)], [], merge_size=2, past_time=past_time).T
    assert t.tolist() == [0, 1, 2, 3] + [4] * 6 + [7, 8, 9]
    assert h.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9]
    assert w.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("outer", "starts"), [(True, [8, 15, 22]), (False, [7, 14, 21])])
@pytest.mark.parametrize("past_time", DIALECTS.values(), ids=DIALECTS)
def test_a_video_is_a_run_for_each_temporal_patch(outer, starts, past_time):
    group = [TEXT] * 4 + [VIDEO] * 4 + [TEXT]  # time in three tokens, start, four merged tokens, end
    kinds = np.array([TEXT] * (3 + outer) + group * 3 + [TEXT] * (1 + outer), np.uint8)
    positions = mrope_positions(kinds, [], split_frames([(3, 4, 4)]), merge_size=2, past_time=past_time)
    assert positions.dtype == np.int32
    blocks = positions[kinds == VIDEO].reshape(3, 4, 3)
    for start, block in zip(starts, blocks, strict=True):
        assert block[:, 0].tolist() == [start] * 4
        assert block[:, 1].tolist() == [start, start, start + 1, start + 1]
        assert block[:, 2].tolist() == [start, start + 1, start, start + 1]
    if outer:
        # The example of the reference: 34 tokens with three after the last group, the highest position 27.
        kinds = np.append(kinds, [TEXT] * 1).astype(np.uint8)
        positions = mrope_positions(kinds, [], split_frames([(3, 4, 4)]), merge_size=2)
        assert len(kinds) == 34 and positions[-1].tolist() == [27] * 3


@pytest.mark.parametrize(
    ("dialect", "seconds", "times", "after"),
    [
        ("transformers", None, [4, 5, 6], [6, 7, 8]),
        ("transformers", 1.0, [4, 6, 8], [6, 7, 8]),
        ("transformers", 0.5, [4, 5, 6], [6, 7, 8]),
        ("transformers", 0.99, [4, 5, 7], [6, 7, 8]),
        ("transformers", 1.5, [4, 7, 10], [6, 7, 8]),
        ("transformers", 1.99, [4, 7, 11], [6, 7, 8]),
        ("transformers", 2.0, [4, 8, 12], [6, 7, 8]),
        ("transformers", 1 / 3, [4, 4, 5], [6, 7, 8]),
        ("official", None, [4, 5, 6], [7, 8, 9]),
        ("official", 1.0, [4, 6, 8], [9, 10, 11]),
        ("official", 0.5, [4, 5, 6], [7, 8, 9]),
        ("official", 1.99, [4, 7, 11], [12, 13, 14]),
        ("official", 1 / 3, [4, 4, 5], [6, 7, 8]),
    ],
)
def test_a_video_in_one_run(dialect, seconds, times, after):
    """Three temporal patches of 2 x 2 merged tokens; without seconds between them (Qwen2-VL) they are counted."""
    kinds = np.array([TEXT] * 4 + [VIDEO] * 12 + [TEXT] * 3, np.uint8)
    steps = [None if seconds is None else steps_at_rate(3, 2, seconds)]
    past_time = DIALECTS[dialect]
    t, h, w = mrope_positions(kinds, [], [(3, 4, 4)], merge_size=2, video_steps=steps, past_time=past_time).T
    assert t.tolist() == [0, 1, 2, 3, *np.repeat(times, 4).tolist(), *after]
    assert h.tolist() == [0, 1, 2, 3, *[4, 4, 5, 5] * 3, *after]
    assert w.tolist() == [0, 1, 2, 3, *[4, 5, 4, 5] * 3, *after]


MIXED = {
    "transformers": (
        [0, 1, *[2] * 4, 4, 5, 6, *[7] * 4, *[9] * 4, 9, 10, 11, 12, 12, 14, 15],
        [0, 1, 2, 2, 3, 3, 4, 5, 6, *[7, 7, 8, 8] * 2, 9, 10, 11, 12, 12, 14, 15],
        [0, 1, 2, 3, 2, 3, 4, 5, 6, *[7, 8, 7, 8] * 2, 9, 10, 11, 12, 13, 14, 15],
    ),
    "official": (
        [0, 1, *[2] * 4, 4, 5, 6, *[7] * 4, *[9] * 4, 10, 11, 12, 13, 13, 15, 16],
        [0, 1, 2, 2, 3, 3, 4, 5, 6, *[7, 7, 8, 8] * 2, 10, 11, 12, 13, 13, 15, 16],
        [0, 1, 2, 3, 2, 3, 4, 5, 6, *[7, 8, 7, 8] * 2, 10, 11, 12, 13, 14, 15, 16],
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_images_around_a_video_a_second_apart(dialect):
    kinds = [TEXT] * 2 + [IMAGE] * 4 + [TEXT] * 3 + [VIDEO] * 8 + [TEXT] * 3 + [IMAGE] * 2 + [TEXT] * 2
    positions = mrope_positions(
        np.array(kinds, np.uint8),
        [(1, 4, 4), (1, 2, 4)],
        [(2, 4, 4)],
        merge_size=2,
        video_steps=[steps_at_rate(2, 2, 1.0)],
        past_time=DIALECTS[dialect],
    )
    assert positions.T.tolist() == list(MIXED[dialect])


def test_steps_at_any_times():
    times = np.array([0.3, 0.7, 1.3, 2.3, 9.05])
    assert steps_at_times(times, 2).tolist() == [0, 0, 2, 4, 17]
    assert steps_at_times(times, 2).dtype == np.int32
    assert steps_at_times(np.array([4.0]), 2).tolist() == [0]


def test_text_alone_and_nothing():
    assert mrope_positions(np.zeros(3, np.uint8), [], [], merge_size=2).tolist() == [[i] * 3 for i in range(3)]
    assert mrope_positions(np.zeros(0, np.uint8), [], [], merge_size=2).shape == (0, 3)


def test_intervals_are_truncated_after_multiplying():
    block = vision_block(4, (3, 4, 4), merge_size=2, steps=steps_at_rate(3, 2, 0.99))
    assert block[:, 0].tolist() == [4] * 4 + [5] * 4 + [7] * 4


def test_a_run_that_does_not_match_its_grid_is_refused():
    with pytest.raises(ValueError, match="grid"):
        mrope_positions(np.full(5, IMAGE, np.uint8), [(1, 4, 4)], [], merge_size=2)
