"""The small files of a result: the public form of conversations, and the public numbers of pixels and frames."""

import json
from importlib import resources

import numpy as np
import PIL.Image
import pytest

from qwenvl_jax.data import chat
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.settings import MediaConfig
from qwenvl_jax.errors import ConversationError
from tests.parity.reference import transformers

TEMPLATE = resources.files("qwenvl_jax.assemble").joinpath("chat_template.jinja").read_text()
IMAGE, VIDEO = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
)


def _user(*parts):
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if p not in ("image", "video") else {"type": p, p: "f"} for p in parts],
    }


CASES = {
    "text": ([{"role": "user", "content": "Hi\n"}], {}, "<|im_start|>user\nHi\n<|im_end|>\n"),
    "prompt": (
        [_user("image", "Describe")],
        {"add_generation_prompt": True},
        f"<|im_start|>user\n{IMAGE}Describe<|im_end|>\n<|im_start|>assistant\n",
    ),
    "turns": (
        [
            {"role": "system", "content": "be brief"},
            _user("video", "when", "image"),
            {"role": "assistant", "content": " 3 s"},
        ],
        {},
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{VIDEO}when{IMAGE}<|im_end|>\n"
        "<|im_start|>assistant\n 3 s<|im_end|>\n",
    ),
    "numbered": (
        [_user("image", "a", "video"), _user("image")],
        {"add_vision_id": True},
        f"<|im_start|>user\nPicture 1: {IMAGE}aVideo 1: {VIDEO}<|im_end|>\n"
        f"<|im_start|>user\nPicture 2: {IMAGE}<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_template(case):
    conversation, options, expected = CASES[case]
    assert chat.render(TEMPLATE, conversation, **{"add_generation_prompt": False, **options}) == expected


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([{"role": "user", "content": "a"}], {"tools": [{"name": "f"}]}),
        ([{"role": "tool", "content": "a"}], {}),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}], {}),
    ],
)
def test_template_refuses_what_it_has_no_form_for(messages, options):
    with pytest.raises(ConversationError, match="no form for tools"):
        chat.render(TEMPLATE, messages, add_generation_prompt=False, **options)


def test_public_numbers(assembled):
    processor = Processor.from_pretrained(assembled[0])
    assert processor.image == MediaConfig(min_pixels=65536, max_pixels=16777216)
    assert processor.video == MediaConfig(4096, 25165824, fps=2, min_frames=4, max_frames=768)
    assert processor.pixel_table[0, [0, 255]].tolist() == [-1.0, 1.0]


def test_tokenizer_is_the_language_model_s(assembled, ingredients):
    """Byte for byte; its settings too, but for the template and the tokens that end and pad."""
    source = ingredients["untied"][0]
    assert (assembled[0] / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ours, theirs = (json.loads((f / "tokenizer_config.json").read_text()) for f in (assembled[0], source))
    changed = {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
    assert changed == {"chat_template", "eos_token", "processor_class"}
    assert (ours["eos_token"], "chat_template" in ours) == ("<|im_end|>", False)


def test_the_reference_s_processor_reads_it(assembled):
    """Same prompt, ids and pixels as ours."""
    ours = Processor.from_pretrained(assembled[0], dialect="transformers")
    theirs = transformers.AutoProcessor.from_pretrained(assembled[0])
    assert type(theirs).__name__ == "Qwen3VLProcessor"
    image = np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "describe the image"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == chat.render(TEMPLATE, messages, add_generation_prompt=True)
    found = theirs(text=[text], images=[PIL.Image.fromarray(image)], return_tensors="np")
    batch = ours([messages], add_generation_prompt=True)
    np.testing.assert_array_equal(batch.tokens[0], found["input_ids"][0])
    np.testing.assert_array_equal(ours.pixel_values(batch), found["pixel_values"])
