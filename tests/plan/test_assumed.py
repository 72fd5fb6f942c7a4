"""What a plan takes for granted of a stage's data, against arithmetic written out."""

import dataclasses

import pytest

from qwenvl_jax.data.mixture import MixturePart, VideoBudget
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.flops import Work
from qwenvl_jax.plan.assumed import assume
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import DataConfig, StageConfig

MODEL = PRESETS["qwen3_vl_4b"]


def stage(data: DataConfig, **batch) -> StageConfig:
    shape = BatchShape(**{"rows": 8, "length": 2048, "groups": 4, "vision": "auto"} | batch)
    return StageConfig("s", steps=10, data=data, batch=shape)


def test_vision_rows_by_the_caps_of_the_stage():
    """Of the 4,096 tokens of a group half are of images, a quarter of videos: 8,192 and 4,096 patches."""
    data = DataConfig(
        source="x",
        modality_weights=(("image", 2.0), ("text", 1.0), ("video", 1.0)),
        max_image_tokens=512,
        video_budget=VideoBudget(max_frame_tokens=128),
    )
    found = assume(stage(data), MODEL)
    assert found.shape.vision == ((8, 512), (4, 2048))
    assert found.work == Work(
        tokens=8 * 2048,
        vision_tokens=4 * 3072,
        text_pairs=8 * 2048 * 2049 // 2,
        patches=4 * 12288,
        frame_pairs=4 * (4096 * 512 + 8192 * 2048),
    )
    assert "3.0 patches for each token" in found.notes[1] and "((8, 512), (4, 2048))" in found.notes[1]
    # Rows that are there because a mesh wants multiples stay empty.
    spread = assume(stage(data), MODEL, multiple=3)
    assert spread.shape.vision == ((9, 512), (6, 2048))
    assert spread.work == found.work


def test_pooled_videos_have_more_patches_for_a_token():
    budget = VideoBudget(max_frame_tokens=128, pool=2)
    found = assume(stage(DataConfig(source="x", modality_weights=(("video", 1.0),), video_budget=budget)), MODEL)
    assert found.shape.vision == ((32, 2048),)


@pytest.mark.parametrize(
    ("data", "vision"),
    [
        # Without weights of modalities those of the parts count; without a name a part is of images.
        (
            DataConfig(mixture=(MixturePart("a", "a", modality="text"), MixturePart("b", "b")), max_image_tokens=512),
            ((4, 2048),),
        ),
        # Without a cap an image is as large as a row allows.
        (DataConfig(source="x"), ((2, 8192),)),
        (DataConfig(source="x", modality_weights=(("text", 1.0),)), ()),
    ],
)
def test_data_that_says_less(data, vision):
    assert assume(stage(data), MODEL).shape.vision == vision


def test_given_vision_rows_are_full():
    found = assume(stage(DataConfig(source="x"), vision=((3, 64), (2, 128))), PRESETS["qwen2_5_vl_3b"])
    assert found.shape == stage(DataConfig(source="x"), vision=((3, 64), (2, 128))).batch
    assert (found.work.patches, found.work.frame_pairs) == (4 * 448, 4 * (3 * 64**2 + 2 * 128**2))
    assert found.work.window_pairs == 4 * 448 * 64  # windows of 112 pixels are 8 x 8 patches
    assert found.classes == 1
    text = assume(dataclasses.replace(stage(DataConfig(source="x")), batch=BatchShape()), MODEL)
    assert text.work.patches == 0 and len(text.notes) == 1
