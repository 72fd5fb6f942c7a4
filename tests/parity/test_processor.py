"""Token ids, positions, patches and grids, identical to those of transformers' Qwen3VLProcessor."""

import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax.data.video import probe, read_frames
from tests.media import numbered_frames, write_clip
from tests.parity.reference import transformers
from tests.tiny import tiny_processor_folder

pytestmark = pytest.mark.support("exact", model_type=("qwen3_vl", "qwen3_vl_moe"))  # they share it

TICK = 1000  # the reference knows times as index / fps only: a fine grid lets it tell any
RNG = np.random.default_rng(11)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_processor_folder(folder)
    return qv.Processor.from_pretrained(folder, "transformers"), transformers.AutoProcessor.from_pretrained(folder)


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(n, height, width):
    times = np.sort(np.round(RNG.random(n) * 9, 3))
    return qv.VideoFrames(RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8), times)


def user(*parts):
    def part(value):
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return (
            {"type": "video", "video": value}
            if isinstance(value, qv.VideoFrames)
            else {"type": "image", "image": value}
        )

    return {"role": "user", "content": [part(value) for value in parts]}


CONVERSATIONS = {
    "text": [user("Hällo, 12.5 seconds!\n\n what appears?")],
    "text with a system message": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "\n\nyes "},
        {"role": "user", "content": [{"type": "text", "text": "why\u0301"}]},
    ],
    "one image": [user(picture(97, 131), "describe the image")],
    "several images": [
        user(picture(60, 200), picture(300, 111), "two"),
        {"role": "assistant", "content": "yes"},
        user("and", PIL.Image.fromarray(picture(33, 20)).convert("L")),
    ],
    "transparent image": [user(PIL.Image.fromarray(RNG.integers(0, 256, (70, 70, 4), dtype=np.uint8)), "what")],
    "video of odd count at irregular times": [user(clip(5, 70, 100), "when does it appear?")],
    "large video": [user(clip(6, 260, 200), "when")],
    "mixed": [
        user("a", clip(4, 64, 96), "b", picture(50, 77), clip(7, 120, 50)),
        {"role": "assistant", "content": "the red square appears at 1.25 seconds"},
        user(picture(40, 40), "and then?"),
    ],
}


def reference_inputs(reference, conversations, add_generation_prompt):
    """What the reference makes of the conversations, padded on the right."""
    parts = [p for c in conversations for m in c if isinstance(m["content"], list) for p in m["content"]]
    videos = [p["video"] for p in parts if p["type"] == "video"]
    metadata = [
        transformers.video_utils.VideoMetadata(
            total_num_frames=10 * TICK, fps=TICK, frames_indices=[round(t * TICK) for t in v.timestamps]
        )
        for v in videos
    ]
    return reference(
        text=[
            reference.apply_chat_template(c, tokenize=False, add_generation_prompt=add_generation_prompt)
            for c in conversations
        ],
        images=[p["image"] for p in parts if p["type"] == "image"] or None,
        videos=[v.frames.transpose(0, 3, 1, 2) for v in videos] or None,
        video_metadata=metadata or None,
        do_sample_frames=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )


def reference_positions(processor, inputs):
    """[B, T, 3] by the reference model's own `get_rope_index`."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen3VLConfig(**{name: getattr(processor, name) for name in names})
    model = transformers.Qwen3VLModel.__new__(transformers.Qwen3VLModel)
    object.__setattr__(model, "config", config)
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return model.get_rope_index(**{key: inputs.get(key) for key in keys})[0].permute(1, 2, 0).numpy()


def check(processors, conversations, add_generation_prompt):
    processor, reference = processors
    inputs = reference_inputs(reference, conversations, add_generation_prompt)
    batch = processor(conversations, add_generation_prompt)
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"].numpy())
    np.testing.assert_array_equal(batch.segment_ids, inputs["attention_mask"].numpy())
    np.testing.assert_array_equal(batch.positions, reference_positions(processor, inputs))
    kinds = [kind for kind in ("image", "video") if f"{kind}_grid_thw" in inputs]
    grids = [inputs[f"{kind}_grid_thw"].numpy() for kind in kinds]
    pixels = [inputs[{"image": "pixel_values", "video": "pixel_values_videos"}[kind]].numpy() for kind in kinds]
    np.testing.assert_array_equal(processor.grids(batch), np.concatenate([np.empty((0, 3), np.int64), *grids]))
    assert processor.grids(batch).dtype == np.int64
    ours = processor.pixel_values(batch)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, np.concatenate([np.empty((0, processor.patch_dim), np.float32), *pixels]))


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_one_conversation(processors, name, add_generation_prompt):
    check(processors, [CONVERSATIONS[name]], add_generation_prompt)


def test_a_batch_padded_to_different_lengths(processors):
    check(processors, list(CONVERSATIONS.values()), True)


@pytest.mark.parametrize("fps", ["12", "30000/1001"])
def test_frames_of_a_file_are_those_the_reference_samples(processors, tmp_path, fps):
    processor, reference = processors
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(42, 64, 96), fps=fps)
    info = probe(path)
    conversation = [{"role": "user", "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": "?"}]}]
    every = np.stack(list(read_frames(info, np.arange(42)))).transpose(0, 3, 1, 2)
    inputs = reference(
        text=[reference.apply_chat_template(conversation, tokenize=False)],
        videos=[every],
        video_metadata=[transformers.video_utils.VideoMetadata(total_num_frames=42, fps=info.fps)],
        return_tensors="pt",
    )
    batch = processor([conversation])
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"].numpy())
    np.testing.assert_array_equal(processor.pixel_values(batch), inputs["pixel_values_videos"].numpy())


def test_the_reference_reads_what_was_saved(processors, tmp_path):
    processor, reference = processors
    processor.save_pretrained(tmp_path / "saved")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    check((qv.Processor.from_pretrained(tmp_path / "saved"), again), [CONVERSATIONS["mixed"]], True)
    reference.save_pretrained(tmp_path / "theirs")
    check((qv.Processor.from_pretrained(tmp_path / "theirs", "transformers"), again), [CONVERSATIONS["mixed"]], False)
