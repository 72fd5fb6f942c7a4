"""Qwen2-VL and Qwen2.5-VL: token ids, positions, patches and grids, identical to those of transformers' processors."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

import qwenvl_jax as qv
from qwenvl_jax.data.positions import IMAGE, TEXT, VIDEO, mrope_positions, steps_at_rate
from qwenvl_jax.data.sampling import stepped_indices
from qwenvl_jax.data.video import probe, read_frames
from qwenvl_jax.errors import MediaError
from tests.media import numbered_frames, write_clip
from tests.parity.reference import transformers
from tests.support import generations
from tests.tiny import CLIP_MEAN, CLIP_STD, tiny_processor_folder

TICK = 1000  # the reference knows a clip as a number of frames at a rate: a fine grid lets it have any duration
TOKENS_PER_SECOND = 2
GENERATIONS = ("qwen2_vl", "qwen2_5_vl")
MODELS = {
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLModel),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLModel),
}
RNG = np.random.default_rng(13)


def write_folder(folder, model_type: str, **options):
    """A processor's folder with what config.json of the public models says about time."""
    tiny_processor_folder(folder, model_type=model_type, **options)
    vision = {"tokens_per_second": TOKENS_PER_SECOND} if model_type == "qwen2_5_vl" else {}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vision_config": vision}))


def load(folder):
    """The folder's processor, ours and the reference's."""
    return qv.Processor.from_pretrained(folder, "transformers"), transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module", params=generations(GENERATIONS))
def processors(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, request.param, older_files=True)
    ours, reference = load(folder)
    assert type(reference).__name__ == ours.generation.processor_class
    assert type(reference.video_processor).__name__ == ours.generation.video_processor
    return ours, reference


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(n, height, width, duration):
    """Frames spread evenly over a clip."""
    frames = RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return qv.VideoFrames(frames, np.arange(n) * duration / n, duration)


def user(*parts):
    def part(value):
        if isinstance(value, str):
            return {"type": "text", "text": value}
        kind = "video" if isinstance(value, qv.VideoFrames) else "image"
        return {"type": kind, kind: value}

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
    "video": [user(clip(4, 70, 100, 2.0), "when does it appear?")],
    "video of odd count": [user(clip(5, 70, 100, 2.5), "when does it appear?")],
    "video of one frame": [user(clip(1, 70, 100, 3.0), "what")],
    "one temporal group": [user(clip(2, 56, 56, 9.0), "what")],
    "long video of small frames": [user(clip(24, 56, 56, 48.0), "when")],
    "large video": [user(clip(6, 300, 420, 6.0), "when")],
    "1.99 fps": [user(clip(12, 56, 84, 12 / 1.99), "when")],
    "2.02 fps": [user(clip(12, 56, 84, 12 / 2.02), "when")],
    "a third of a frame a second": [user(clip(8, 56, 84, 24.0), "when")],
    "video, then image": [user(clip(16, 56, 56, 32.0), picture(60, 60), "which")],
    "image larger than a long video": [user(picture(200, 300), clip(20, 56, 56, 40.0), picture(300, 200), "?")],
    "two videos": [user(clip(10, 56, 84, 20.0), clip(7, 84, 56, 2.3), "which is longer?")],
    "mixed": [
        {"role": "system", "content": "you see"},
        user("a", clip(4, 64, 96, 1.3), "b", picture(50, 77), clip(7, 120, 50, 11.0)),
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
            total_num_frames=v.duration * TICK, fps=TICK, frames_indices=[round(t * TICK) for t in v.timestamps]
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


def reference_positions(model_type, inputs, tokens_per_second=TOKENS_PER_SECOND):
    """[B, T, 3] by the reference model's own `get_rope_index`."""
    make_config, make_model = MODELS[model_type]
    vision = {"tokens_per_second": tokens_per_second} if model_type == "qwen2_5_vl" else {}
    model = make_model.__new__(make_model)
    object.__setattr__(model, "config", make_config(vision_config=vision))
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    seconds = {"second_per_grid_ts": inputs.get("second_per_grid_ts")} if model_type == "qwen2_5_vl" else {}
    return model.get_rope_index(**{key: inputs.get(key) for key in keys}, **seconds)[0].permute(1, 2, 0).numpy()


def check_batch(processor, inputs, batch):
    """That a batch is what the reference's inputs are."""
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"].numpy())
    np.testing.assert_array_equal(batch.segment_ids, inputs["attention_mask"].numpy())
    positions = reference_positions(processor.generation.model_types[0], inputs)
    np.testing.assert_array_equal(batch.positions, positions)
    kinds = [kind for kind in ("image", "video") if f"{kind}_grid_thw" in inputs]
    grids = [inputs[f"{kind}_grid_thw"].numpy() for kind in kinds]
    pixels = [inputs[{"image": "pixel_values", "video": "pixel_values_videos"}[kind]].numpy() for kind in kinds]
    np.testing.assert_array_equal(processor.grids(batch), np.concatenate([np.empty((0, 3), np.int64), *grids]))
    ours = processor.pixel_values(batch)
    assert ours.dtype == np.float32 and all(p.dtype == np.float32 for p in pixels)
    np.testing.assert_array_equal(ours, np.concatenate([np.empty((0, processor.patch_dim), np.float32), *pixels]))


def check(processors, conversations, add_generation_prompt):
    processor, reference = processors
    inputs = reference_inputs(reference, conversations, add_generation_prompt)
    check_batch(processor, inputs, processor(conversations, add_generation_prompt))


@pytest.mark.support("exact")
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_one_conversation(processors, name, add_generation_prompt):
    check(processors, [CONVERSATIONS[name]], add_generation_prompt)


@pytest.mark.support("exact")
def test_a_batch_padded_to_different_lengths(processors):
    check(processors, list(CONVERSATIONS.values()), True)


def test_the_system_speaks_where_a_conversation_does_not_let_it(processors):
    processor, _ = processors
    texts = [
        processor.decode(processor.sample(CONVERSATIONS[name]).tokens, skip_special_tokens=False)
        for name in ("text", "text with a system message")
    ]
    assert texts[0].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHällo")
    assert texts[1].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")


@pytest.mark.support("exact")
def test_each_byte_becomes_the_references_float(processors):
    """Every byte in every channel: images that are not resized show them all."""
    processor, reference = processors
    levels = np.arange(256 * 3, dtype=np.int64).reshape(3, 256) % 256
    image = np.zeros((56, 84, 3), np.uint8)
    image.reshape(-1, 3)[:256] = levels.T
    values = reference.image_processor([image], return_tensors="np")["pixel_values"]
    conversation = [user(image)]
    np.testing.assert_array_equal(processor.pixel_values(processor([conversation])), values)
    table = (np.arange(256)[None] / 255 - np.array(CLIP_MEAN)[:, None]) / np.array(CLIP_STD)[:, None]
    np.testing.assert_allclose(processor.pixel_table, table, rtol=1e-5, atol=1e-6)


def ask(path, **options):
    return [
        {"role": "user", "content": [{"type": "video", "video": str(path), **options}, {"type": "text", "text": "?"}]}
    ]


@pytest.mark.parametrize("rate", ["12", "30000/1001"])
@pytest.mark.parametrize(
    "options", [{"fps": 2.0}, {}, {"fps": 4.7}, {"num_frames": 7}, {"fps": 3.0, "max_frames": 6, "min_frames": 2}]
)
def test_frames_of_a_file_are_those_the_reference_samples(processors, tmp_path, rate, options):
    processor, reference = processors
    path = write_clip(tmp_path / "clip.mp4", numbered_frames(42, 60, 96), fps=rate)
    info = probe(path)
    every = np.stack(list(read_frames(info, np.arange(42)))).transpose(0, 3, 1, 2)
    inputs = reference(
        text=[reference.apply_chat_template(ask(path), tokenize=False)],
        videos=[every],
        video_metadata=[transformers.video_utils.VideoMetadata(total_num_frames=42, fps=info.fps)],
        do_sample_frames=True,
        return_tensors="pt",
        **(options or {"fps": 2.0}),
    )
    check_batch(processor, inputs, processor([ask(path, **options)]))


def reference_indices(reference, total, rate, **options):
    """What the reference samples, or None where it fails."""
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=total, fps=rate)
    try:
        indices = reference.video_processor.sample_frames(metadata, **options).tolist()
    except (ValueError, ZeroDivisionError):
        return None
    # Where it counts a step too many it asks for the frame after the last one, and fails when it takes it.
    return indices[:-1] if indices[-1] == total else indices


def test_sampling_is_that_of_the_reference(processors):
    """Every short clip at several rates, and long ones at random."""
    _, reference = processors
    rng = np.random.default_rng(2)
    cases = [(n, rate, {"fps": fps}) for n in range(1, 130) for rate in (12, 30000 / 1001) for fps in (1, 2, 7.5)]
    cases += [(n, 30, {"num_frames": k}) for n in range(1, 40) for k in range(1, n + 2)]
    cases += [(int(n), 25, {"num_frames": int(k)}) for n, k in rng.integers((800, 1), (40_000, 769), (1500, 2))]
    cases += [(int(n), 24, {"fps": 2, "min_frames": 2, "max_frames": 5}) for n in rng.integers(5, 400, 20)]
    refused = 0
    for n, rate, options in cases:
        expected = reference_indices(reference, n, rate, **options)
        if expected is None:
            with pytest.raises(MediaError, match="no fewer than 2"):
                stepped_indices(n, rate, **options)
            refused += 1
        else:
            assert stepped_indices(n, rate, **options).tolist() == expected, (n, rate, options)
    assert 0 < refused < len(cases) / 4


@pytest.mark.parametrize("capped", [{}, {"cap_pixels_per_frame": True}, {"max_video_tokens": 200}])
def test_a_cap_on_the_whole_video(tmp_path, capped):
    tiny_processor_folder(tmp_path, model_type="qwen2_5_vl", video_pixels=(3136, 90_000))
    file = tmp_path / "video_preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **capped}))
    processor, reference = load(tmp_path)
    for n in (2, 9, 40):
        conversation = [user(clip(n, 210, 330, n / 2), "?")]
        inputs = reference_inputs(reference, [conversation], False)
        assert processor.measure(conversation).grids == tuple(map(tuple, inputs["video_grid_thw"].tolist()))
    for tokens in (30, 400, 3000):
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "cap_pixels_per_frame": True, "max_video_tokens": tokens})
        )
        processor, reference = load(tmp_path)
        for n in (2, 9, 40):
            conversation = [user(clip(n, 210, 330, n / 2), "?")]
            inputs = reference_inputs(reference, [conversation], False)
            assert processor.measure(conversation).grids == tuple(map(tuple, inputs["video_grid_thw"].tolist()))


@pytest.mark.parametrize("model_type", GENERATIONS)
@pytest.mark.parametrize("options", [{"older_files": True}, {}, {"video_pixels": (3136, 20_000)}])
def test_folders_of_every_form_and_what_each_side_saves_of_them(tmp_path, model_type, options):
    write_folder(tmp_path, model_type, **options)
    processor, reference = load(tmp_path)
    assert (processor.video.max_pixels, processor.image.max_pixels) == (
        options.get("video_pixels", (0, 65536))[1],
        65536,
    )
    conversation = [CONVERSATIONS["mixed"]]
    check((processor, reference), conversation, True)
    processor.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.json").exists()
    check(load(tmp_path / "ours"), conversation, True)
    again = qv.Processor.from_pretrained(tmp_path / "ours")
    assert (again.dialect, again.window) == ("transformers", processor.window)
    reference.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "processor_config.json").is_file()
    check((qv.Processor.from_pretrained(tmp_path / "theirs", "transformers"), reference), conversation, False)


@pytest.mark.parametrize("tokens_per_second", [2, 4, 25, 7])
def test_time_positions_are_those_of_the_reference(tokens_per_second):
    """At any rate, knife-edges of float32 among them."""
    rng = np.random.default_rng(4)
    rates = [1.99, 2.0, 2.02, 30000 / 1001, 12 / 7, 1 / 3, *rng.uniform(0.1, 30, 200)]
    total, h, w = 40, 4, 6
    kinds = np.array([TEXT] * 3 + [VIDEO] * (total * h * w // 4) + [TEXT] * 2, np.uint8)
    for rate in rates:
        seconds = 2 / rate
        inputs = {
            "input_ids": torch.zeros((1, len(kinds)), dtype=torch.long),
            "mm_token_type_ids": torch.from_numpy(kinds.astype(np.int64))[None],
            "video_grid_thw": torch.tensor([[total, h, w]]),
            "second_per_grid_ts": torch.tensor([seconds]),
        }
        expected = reference_positions("qwen2_5_vl", inputs, tokens_per_second)[0]
        steps = [steps_at_rate(total, tokens_per_second, seconds)]
        got = mrope_positions(kinds, [], [(total, h, w)], merge_size=2, video_steps=steps)
        np.testing.assert_array_equal(got, expected, str(rate))


def test_any_order_of_media(processors):
    """Random chains of text, images and videos, as `get_rope_index` sees them, several samples in a padded batch."""
    processor, _ = processors
    model_type = processor.generation.model_types[0]
    rng = np.random.default_rng(6)
    for _ in range(30):
        samples, images, videos, seconds = [], [], [], []
        for _ in range(3):
            kinds, own = [TEXT] * int(rng.integers(1, 5)), {IMAGE: [], VIDEO: [], "steps": []}
            for _ in range(int(rng.integers(0, 4))):
                kind = int(rng.integers(1, 3))
                grid = (int(rng.integers(1, 9)) if kind == VIDEO else 1, *(2 * rng.integers(1, 5, 2)).tolist())
                own[kind].append(grid)
                (images if kind == IMAGE else videos).append(grid)
                if kind == VIDEO:
                    seconds.append(float(np.float32(rng.uniform(0.05, 3))))
                    absolute = processor.generation.absolute_time
                    own["steps"].append(steps_at_rate(grid[0], 2, seconds[-1]) if absolute else None)
                kinds += [kind] * (grid[0] * grid[1] * grid[2] // 4) + [TEXT] * int(rng.integers(1, 4))
            samples.append((np.array(kinds, np.uint8), own))
        length = max(len(kinds) for kinds, _ in samples)
        padded = np.stack([np.pad(kinds, (0, length - len(kinds))) for kinds, _ in samples]).astype(np.int64)
        mask = np.stack([np.arange(length) < len(kinds) for kinds, _ in samples])
        inputs = {
            "input_ids": torch.zeros((3, length), dtype=torch.long),
            "mm_token_type_ids": torch.from_numpy(padded),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "image_grid_thw": torch.tensor(images) if images else None,
            "video_grid_thw": torch.tensor(videos) if videos else None,
            "second_per_grid_ts": torch.tensor(seconds) if seconds else None,
        }
        expected = reference_positions(model_type, inputs)
        for row, (kinds, own) in enumerate(samples):
            got = mrope_positions(kinds, own[IMAGE], own[VIDEO], merge_size=2, video_steps=own["steps"])
            np.testing.assert_array_equal(got, expected[row, : len(kinds)])
