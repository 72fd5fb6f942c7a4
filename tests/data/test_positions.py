"""Rotary positions against worked examples of the reference."""

import numpy as np
import pytest

from qwenvl_jax.data.positions import IMAGE, TEXT, VIDEO, mrope_positions, split_frames, steps_at_rate, vision_block


def test_an_image_in_text():
    kinds = np.array([TEXT] * 4 + [IMAGE] * 6 + [TEXT] * 3, np.uint8)
    t, h, w = mrope_positions(kinds, [(1, 4, 6)], [], merge_size=2).T
    assert t.tolist() == [0, 1, 2, 3] + [4] * 6 + [7, 8, 9]
    assert h.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9]
    assert w.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("outer", "starts"), [(True, [8, 15, 22]), (False, [7, 14, 21])])
def test_a_video_is_a_run_for_each_temporal_patch(outer, starts):
    group = [TEXT] * 4 + [VIDEO] * 4 + [TEXT]  # time in three tokens, start, four merged tokens, end
    kinds = np.array([TEXT] * (3 + outer) + group * 3 + [TEXT] * (1 + outer), np.uint8)
    positions = mrope_positions(kinds, [], split_frames([(3, 4, 4)]), merge_size=2)
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


def test_text_alone_and_nothing():
    assert mrope_positions(np.zeros(3, np.uint8), [], [], merge_size=2).tolist() == [[i] * 3 for i in range(3)]
    assert mrope_positions(np.zeros(0, np.uint8), [], [], merge_size=2).shape == (0, 3)


def test_intervals_are_truncated_after_multiplying():
    block = vision_block(4, (3, 4, 4), merge_size=2, steps=steps_at_rate(3, 2, 0.99))
    assert block[:, 0].tolist() == [4] * 4 + [5] * 4 + [7] * 4


def test_a_run_that_does_not_match_its_grid_is_refused():
    with pytest.raises(ValueError, match="grid"):
        mrope_positions(np.full(5, IMAGE, np.uint8), [(1, 4, 4)], [], merge_size=2)
