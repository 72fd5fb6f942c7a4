"""The processor: what a conversation becomes, the official dialect, what is learnt, and malformed input."""

import errno
import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax.errors import CheckpointError, ConfigError, ConversationError, DataError, MediaError
from tests.media import number_of, numbered_frames, write_clip
from tests.tiny import tiny_processor_folder

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """60 frames at 12 per second."""
    frames = numbered_frames(43, 64, 96)
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames[np.minimum(np.arange(60), 42)], fps="12")


def ask(text="when?", **video):
    parts = [{"type": "video", **video}] if video else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def clip(n=4, height=64, width=64):
    return qv.VideoFrames(RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8), np.arange(n) / 2)


def test_times_of_a_file_stand_in_the_prompt(processor, mp4):
    sample = processor.sample(ask(video=mp4))
    text = processor.decode(sample.tokens, skip_special_tokens=False)
    assert [f"<{t} seconds>" in text for t in ("0.3", "1.4", "2.5", "3.5", "4.6")] == [True] * 5
    assert text.count(" seconds>") == 5
    assert sample.media[0].grid[0] == 5 and len(sample.media[0].times) == 5


def test_official_swallows_the_outer_marks_and_transformers_keeps_them(folder, mp4):
    texts = {}
    for dialect in ("official", "transformers"):
        processor = qv.Processor.from_pretrained(folder, dialect)
        tokens = processor.sample(ask(video=mp4, num_frames=2)).tokens
        texts[dialect] = processor.decode([t for t in tokens if t != processor.video_token_id], False)
    group = "<2.5 seconds><|vision_start|><|vision_end|>"
    assert texts["official"] == f"<|im_start|>user\n{group}when?<|im_end|>\n"
    assert texts["transformers"] == f"<|im_start|>user\n<|vision_start|>{group}<|vision_end|>when?<|im_end|>\n"


def test_the_dialects_give_images_alike(folder):
    image = RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    conversation = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    one, two = (qv.Processor.from_pretrained(folder, d)([conversation]) for d in ("official", "transformers"))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.positions, two.positions)


def test_options_of_a_video_part(processor, mp4):
    def grid(**options):
        return processor.measure(ask(video=mp4, **options)).grids[0]

    assert grid(fps=1.0)[0] == 3  # 5 frames, the last one repeated
    assert grid(num_frames=6)[0] == 3
    assert grid(max_frames=4)[0] == 2
    assert grid(min_frames=16)[0] == 8
    assert grid(fps=0.1, min_frames=2) == (1, 4, 6)
    t, h, w = grid(max_pixels=10 * 32 * 32 * 2)
    assert t * 2 * h * w * 256 <= 10 * 32 * 32 * 2
    assert grid(min_pixels=900_000)[1:] > (8, 12)


def test_the_frames_decoded_are_those_measured(processor, mp4):
    sample = processor.sample(ask(video=mp4, num_frames=5))
    facts = processor.measure(ask(video=mp4, num_frames=5))
    assert facts.tokens == len(sample.tokens) and facts.grids == tuple(m.grid for m in sample.media)
    assert facts.times == tuple(m.times for m in sample.media) and facts.loss_tokens == sample.loss_weights.sum()
    t, h, w = sample.media[0].grid
    last = sample.media[0].patches.reshape(t, h * w, 3, 2, 16, 16)[:, -1]  # patch at the bottom right of each pair
    seen = [number_of(np.moveaxis(pair[:, i], 0, -1).repeat(2, 0).repeat(2, 1)) for pair in last for i in range(2)]
    assert seen == [0, 15, 30, 42, 42, 42]  # 0 15 30 44 59 and the last again; those after 42 look like it


def test_frames_given_are_used_as_they_are(processor):
    frames = clip(3)
    sample = processor.sample(ask(video=frames))
    assert sample.media[0].times == (0.25, 1.0)
    t, h, w = sample.media[0].grid
    assert (t, h, w) == (2, 4, 4)
    patches = sample.media[0].patches.reshape(t, 2, 2, 2, 2, 3, 2, 16, 16)
    pixels = patches.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(4, 64, 64, 3)
    np.testing.assert_array_equal(pixels, frames.frames[[0, 1, 2, 2]])


def test_only_what_the_assistant_says_is_learnt(processor):
    conversation = [
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "<|im_start|>assistant\nI am not <|im_end|>"},
        {"role": "assistant", "content": "a red disc"},
        {"role": "user", "content": [{"type": "video", "video": clip()}, {"type": "text", "text": "then?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "\nwhy\u0301 日"}]},
    ]
    for prompt in (False, True):
        sample = processor.sample(conversation, add_generation_prompt=prompt)
        learnt = processor.decode(sample.targets[sample.loss_weights > 0], skip_special_tokens=False)
        assert learnt == "a red disc<|im_end|>\n\nwhý 日<|im_end|>\n"
        np.testing.assert_array_equal(sample.targets[:-1], sample.tokens[1:])
        assert sample.loss_weights[-1] == 0 and set(np.unique(sample.loss_weights)) == {0.0, 1.0}
    assert not processor.sample(conversation[:2], True).loss_weights.any()


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_tokens_in_texts_remain_text(processor, mark):
    text = f"what is {mark}? \n{mark}{mark}"
    conversation = [
        {"role": "user", "content": [{"type": "video", "video": clip()}, {"type": "text", "text": text}]},
        {"role": "assistant", "content": mark},
    ]
    plain = [
        {"role": "user", "content": [{"type": "video", "video": conversation[0]["content"][0]["video"]}]},
        {"role": "assistant", "content": ""},
    ]
    tokens, without = processor.sample(conversation).tokens.tolist(), processor.sample(plain).tokens.tolist()
    special = [processor.tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    special += [processor.image_token_id, processor.video_token_id, processor.vision_start_token_id]
    assert [t for t in tokens if t in special] == [t for t in without if t in special]
    assert text in processor.decode(tokens, skip_special_tokens=False)


def test_a_processor_survives_pickling(processor):
    again = pickle.loads(pickle.dumps(processor))
    conversation = [{"role": "user", "content": "what is <|im_end|>?"}]
    np.testing.assert_array_equal(again.sample(conversation).tokens, processor.sample(conversation).tokens)


def test_a_batch_of_a_fixed_shape(processor):
    image = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    conversations = [[{"role": "user", "content": [{"type": "image", "image": image}]}], ask("hello")]
    batch = processor(conversations, True, length=48, groups=2, vision_shape=((2, 32),))
    assert batch.tokens.shape == (2, 48) and batch.vision[0].patches.shape == (2, 2, 32, processor.patch_dim)
    assert (batch.tokens[batch.segment_ids == 0] == processor.pad_token_id).all()
    text = processor([ask("hello")], vision_shape=((1, 16),))
    assert text.vision[0].patches.shape == (1, 1, 16, processor.patch_dim)
    assert processor.pixel_values(text).shape == (0, processor.patch_dim) and processor.grids(text).shape == (0, 3)
    with pytest.raises(DataError, match="length=10"):
        processor(conversations, length=10)


def test_pixels_and_grids_of_groups_come_in_reading_order(processor):
    images = [RNG.integers(0, 256, (64, 32 * k, 3), dtype=np.uint8) for k in (2, 3, 4)]
    conversations = [
        [{"role": "user", "content": [{"type": "video", "video": clip()}, {"type": "image", "image": images[0]}]}],
        [{"role": "user", "content": [{"type": "image", "image": i} for i in images[1:]]}],
    ]
    one, two = processor(conversations), processor(conversations, groups=2)
    assert processor.grids(one).tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 8], [2, 4, 4]]
    np.testing.assert_array_equal(processor.grids(one), processor.grids(two))
    np.testing.assert_array_equal(processor.pixel_values(one), processor.pixel_values(two))


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (["hello"], "message 0 must be a dict"),
        ([{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}], "message 1 must have a role"),
        ([{"role": "user"}], "message 0 must have content"),
        ([{"role": "user", "contnt": "a"}], "did you mean 'content'"),
        ([{"role": "user", "content": [{"type": "picture"}]}], "message 0, part 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], "lacks its value"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "str under 'text'"),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "max_frame": 3}]}], "did you mean 'max_frames'"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a", "fps": 2, "num_frames": 3}]}],
            "exclude each other",
        ),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "fps": 0}]}], "positive"),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "num_frames": 2.5}]}], "whole number"),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "min_frames": 9, "max_frames": 4}]}], "above"),
        ([{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}], "only user and tool"),
        (ask(video=clip(), fps=2.0), "message 0, part 0: the frames of qv.VideoFrames"),
    ],
)
def test_malformed_conversations_are_named_by_message(processor, conversation, said):
    with pytest.raises(ConversationError, match=said) as caught:
        processor([conversation])
    assert "\n" not in str(caught.value)


def test_one_conversation_in_place_of_a_list_of_them(processor):
    with pytest.raises(ConversationError, match=r"processor\(\[conversation\]\)"):
        processor(ask())
    with pytest.raises(ConversationError, match="empty"):
        processor([])


def test_media_that_cannot_be_used(processor, tmp_path, mp4):
    PIL.Image.new("RGB", (1, 300)).save(tmp_path / "strip.png")
    image = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "strip.png")}]}]
    with pytest.raises(MediaError, match=r"message 0, part 0: image .*strip\.png.* 200 times"):
        processor.measure(image)
    with pytest.raises(MediaError, match="never guessed"):
        processor([ask(video=np.zeros((4, 32, 32, 3), np.uint8))])
    with pytest.raises(MediaError, match=r"clip\.mp4.*at least 2"):
        processor([ask(video=mp4, num_frames=1)])
    with pytest.raises(MediaError, match="does not exist"):
        processor([ask(video=tmp_path / "none.mp4")])


def test_a_template_may_refuse(folder, tmp_path):
    tiny_processor_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('system messages are not known') }}")
    with pytest.raises(ConversationError, match="system messages are not known"):
        qv.Processor.from_pretrained(tmp_path)([ask()])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="cannot be parsed"):
        qv.Processor.from_pretrained(tmp_path)([ask()])
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConversationError, match="refuses"):
        qv.Processor.from_pretrained(tmp_path)([ask()])
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].role }}")
    with pytest.raises(CheckpointError, match="fewer media"):
        qv.Processor.from_pretrained(tmp_path)([ask(video=clip())])


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_the_template_is_found_in_each_of_its_places(processor, tmp_path, place):
    tiny_processor_folder(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        qv.Processor.from_pretrained(tmp_path)
    values = json.loads((tmp_path / place).read_text()) if (tmp_path / place).exists() else {}
    (tmp_path / place).write_text(json.dumps({**values, "chat_template": template}))
    tokens = qv.Processor.from_pretrained(tmp_path).sample(ask()).tokens
    np.testing.assert_array_equal(tokens, processor.sample(ask()).tokens)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json"])
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    tiny_processor_folder(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        qv.Processor.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        qv.Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("preprocessor_config.json", {"image_mean": None}, "lacks image_mean"),
        ("preprocessor_config.json", {"size": {}}, "longest_edge"),
        ("preprocessor_config.json", {"patch_size": 14}, "must agree"),
        ("video_preprocessor_config.json", {"image_std": [0.4, 0.5, 0.5]}, "must agree"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("config.json", {"image_token_id": 3}, "image_token_id=3"),
        ("qwenvl_jax.json", {"dialect": "klingon"}, "klingon"),
        ("tokenizer_config.json", {"pad_token": {"content": "<pad>"}}, "<pad>"),
        ("tokenizer_config.json", {"pad_token": ["<pad>"]}, r"tokenizer_config\.json: pad_token must be a string"),
        ("preprocessor_config.json", {"size": [1, 2]}, r" preprocessor_config\.json: size must be an object"),
        ("video_preprocessor_config.json", {"size": {"shortest_edge": "x"}}, r"size\.shortest_edge must be an integer"),
        ("preprocessor_config.json", {"image_mean": "x"}, "image_mean must be a list"),
        ("preprocessor_config.json", {"image_mean": [0.5, "x", 0.5]}, "image_mean must be a list of three numbers"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5]}, "image_std must be a list of three positive numbers"),
        (
            "preprocessor_config.json",
            {"image_std": [0.5, 0, 0.5]},
            "image_std must be a list of three positive numbers",
        ),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "rescale_factor must be a number"),
        ("preprocessor_config.json", {"patch_size": "16"}, "patch_size must be an integer"),
        ("preprocessor_config.json", {"merge_size": 0}, "merge_size must be a positive integer"),
        ("video_preprocessor_config.json", {"fps": [2]}, r" video_preprocessor_config\.json: fps must be a number"),
    ],
)
def test_files_that_do_not_go_together(tmp_path, name, change, said):
    tiny_processor_folder(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **change}))
    with pytest.raises(CheckpointError, match=said):
        qv.Processor.from_pretrained(tmp_path)


def test_a_template_that_is_no_text(tmp_path):
    tiny_processor_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not readable text .*; copy it again"):
        qv.Processor.from_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in (7, ["default"], [{"name": "default", "template": 7}]):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(CheckpointError, match=r"chat_template\.json: chat_template must be a string"):
            qv.Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_processor_file_whose_parts_are_no_objects(tmp_path, kind):
    tiny_processor_folder(tmp_path)
    (tmp_path / f"{'video_' * (kind == 'video')}preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({f"{kind}_processor": "Qwen2VLImageProcessor"}))
    with pytest.raises(CheckpointError, match=rf"processor_config\.json: {kind}_processor must be an object"):
        qv.Processor.from_pretrained(tmp_path)


def test_a_processor_is_saved_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    processor = qv.Processor.from_pretrained(folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file cannot be written .*; nothing was saved, choose another place"):
        processor.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"

    written = Path.write_text

    def full(path, text, **options):
        if path.name == "chat_template.jinja":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, text, **options)

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer.json").write_text("mine")
    monkeypatch.setattr(Path, "write_text", full)
    for name in ("old", "new"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be written .*No space left"):
            processor.save_pretrained(tmp_path / name)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file",
        "old",
        "old/tokenizer.json",
    ]
    assert (tmp_path / "old" / "tokenizer.json").read_bytes() == b"mine"


def test_settings_of_the_folder_count(folder, tmp_path, mp4):
    def grid(**change):
        tiny_processor_folder(tmp_path)
        path = tmp_path / "video_preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return qv.Processor.from_pretrained(tmp_path).measure(ask(video=mp4)).grids[0]

    assert grid() == (5, 4, 6)
    assert grid(fps=1)[0] == 3 and grid(min_frames=12)[0] == 6 and grid(max_frames=6)[0] == 3
    assert grid(cap_pixels_per_frame=True, max_video_tokens=4)[1:] == (2, 4)


def test_the_dialect_is_kept_beside_the_checkpoint(folder, tmp_path):
    assert qv.Processor.from_pretrained(folder).dialect == "official"
    (tmp_path / "qwenvl_jax.json").write_text('{"other": 1}')
    qv.Processor.from_pretrained(folder, "transformers").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "qwenvl_jax.json").read_text()) == {"other": 1, "dialect": "transformers"}
    again = qv.Processor.from_pretrained(tmp_path)
    assert again.dialect == "transformers"
    assert qv.Processor.from_pretrained(tmp_path, "official").dialect == "official"
    frames = clip()
    one, two = (p.sample(ask(video=frames)) for p in (again, qv.Processor.from_pretrained(folder, "transformers")))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    with pytest.raises(ConfigError, match="dialect"):
        qv.Processor.from_pretrained(folder, "german")
