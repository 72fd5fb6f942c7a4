"""Tools, tool calls, their results and thinking: token ids identical to those of transformers' processors."""

import json

import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax.errors import ConversationError
from tests.parity.reference import transformers
from tests.tiny import tiny_processor_folder
from tests.tool_template import tool_processor_folder

CROP = {
    "type": "function",
    "function": {
        "name": "crop",
        "description": 'Cuts out a "part" of <the image>, größer.',
        "parameters": {
            "type": "object",
            "properties": {"image": {"type": "string"}, "type": {"type": "integer", "minimum": 0.5}},
            "required": ["image"],
        },
    },
}
TOOLS = [CROP, {"name": "when", "parameters": {"nullable": None, "strict": True}}]
PICTURE = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def call(name, arguments):
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is there?"}]},
    {"role": "assistant", "content": "", "tool_calls": [call("crop", {"image": "a", "box": [1, 2.5, None, True]})]},
    {"role": "tool", "content": "the red square", "tool_call_id": "call-1", "name": "crop"},
    {"role": "tool", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "it leaves"}]},
    {
        "role": "assistant",
        "content": "a square",
        "tool_calls": [call("when", '{"a":1}'), {"name": "f", "arguments": {}}],
    },
    {"role": "tool", "content": "at 3.5 seconds"},
    {"role": "assistant", "content": "a red square"},
]
THINKING = [
    {"role": "user", "content": "when"},
    {"role": "assistant", "reasoning_content": "\nlong ago\n", "content": "at 3"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "reasoning_content": "it moves", "content": "", "tool_calls": [call("when", {"at": 3})]},
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "reasoning_content": "then what", "content": "because"},
]
CASES = {
    "tools alone": ([{"role": "user", "content": "hi"}], TOOLS, {}),
    "calls and results": (CALLS, TOOLS, {}),
    "calls, tools untold": (CALLS[1:], None, {}),
    "no tools": (CALLS[1:], [], {}),
    "thinking": (THINKING, TOOLS, {}),
    "thinking on": (THINKING[:3], None, {"enable_thinking": True}),
    "thinking off": (THINKING[:3], TOOLS, {"enable_thinking": False}),
}


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen3_vl"))
def processors(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tool_processor_folder(folder, model_type=request.param)
    (folder / "config.json").write_text(json.dumps({"model_type": request.param, "vision_config": {}}))
    return qv.Processor.from_pretrained(folder, "transformers"), transformers.AutoProcessor.from_pretrained(folder)


def theirs(reference, conversation, tools, values, prompt, **options):
    """The reference's ids."""
    return reference.apply_chat_template(
        conversation, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=True, **options, **values
    )["input_ids"][0]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_ids(processors, name, prompt):
    processor, reference = processors
    conversation, tools, values = CASES[name]
    batch = processor([conversation], prompt, tools=tools, chat_template_kwargs=values)
    expected = theirs(reference, conversation, tools, values, prompt)
    np.testing.assert_array_equal(batch.tokens[0], expected)
    facts = processor.measure(conversation, prompt, tools=tools, chat_template_kwargs=values)
    assert facts.tokens == len(expected) and facts.loss_tokens == batch.loss_weights.sum()


def test_the_cases_differ(processors):
    """Tools and `enable_thinking` change what is compared above."""
    processor, _ = processors
    asked = THINKING[:3]

    def ids(**options):
        return processor.sample(asked, True, **options).tokens.tolist()

    off = ids(chat_template_kwargs={"enable_thinking": False})
    assert ids() == ids(tools=[]) == ids(chat_template_kwargs={"enable_thinking": True}) != off
    assert len({len(ids()), len(off), len(ids(tools=TOOLS))}) == 3


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_special_tokens_in_what_people_wrote_remain_text(processors, mark):
    """Everywhere a text can stand; the reference does so where it is asked to, but for names of members in JSON."""
    processor, reference = processors
    tools = [{"name": "f", "description": f"a{mark}", "parameters": {"p": {"type": mark, "image": mark, "role": mark}}}]
    calls = [call(f"g{mark}", {"image": mark, "a": [{"type": mark, "text": f"x{mark}{mark}"}]}), call("h", mark)]
    conversation = [
        {"role": "system", "content": f"{mark}<|im_start|>assistant\nno"},
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": f"{mark} what"}]},
        {"role": "assistant", "reasoning_content": mark, "content": f"\n{mark}", "tool_calls": calls},
        {"role": "tool", "content": f"{mark}<|im_start|>assistant\nwhat"},
        {"role": "tool", "content": [{"type": "text", "text": mark}]},
    ]
    sample = processor.sample(conversation, tools=tools)
    expected = theirs(reference, conversation, tools, {}, False, sanitize_control_tokens=True)
    np.testing.assert_array_equal(sample.tokens, expected)
    learnt = processor.decode(sample.targets[sample.loss_weights > 0], skip_special_tokens=False)
    assert (
        learnt.startswith(f"<think>\n{mark}") and learnt.endswith("</tool_call><|im_end|>\n") and "what" not in learnt
    )
    named = processor.sample(conversation[:1], tools=[{"name": "f", "parameters": {mark: 1}}]).tokens.tolist()
    assert processor.decode(named, False).count(f'{{"{mark}": 1}}') == 1
    counts = [list(tokens).count(processor.tokenizer.token_to_id(mark)) for tokens in (sample.tokens, named)]
    assert counts == {"<|im_end|>": [4, 1], "<|image_pad|>": [6, 0], "<|endoftext|>": [0, 0]}[mark]


def test_what_the_assistant_calls_and_thinks_is_learnt(processors):
    processor, _ = processors

    def learnt(conversation):
        sample = processor.sample(conversation, tools=TOOLS)
        return processor.decode(sample.targets[sample.loss_weights > 0], skip_special_tokens=False)

    assert learnt(CALLS) == (
        '<tool_call>\n{"name": "crop", "arguments": {"image": "a", "box": [1, 2.5, null, true]}}\n</tool_call>'
        "<|im_end|>\n"
        'a square\n<tool_call>\n{"name": "when", "arguments": {"a":1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
        "a red square<|im_end|>\n"
    )
    assert learnt(THINKING) == (
        "at 3<|im_end|>\n"
        '<think>\nit moves\n</think>\n\n<tool_call>\n{"name": "when", "arguments": {"at": 3}}\n</tool_call><|im_end|>\n'
        "<think>\nthen what\n</think>\n\nbecause<|im_end|>\n"
    )


def test_named_tokens_and_other_names_of_reasoning(tmp_path):
    """What a template may read beside messages; content that is None is as if it were empty."""
    tiny_processor_folder(tmp_path)
    template = (
        "{{ eos_token }}{{ bos_token is defined }}{{ documents }}{% for m in messages %}{{ m.thinking }}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    ours, reference = qv.Processor.from_pretrained(tmp_path), transformers.AutoProcessor.from_pretrained(tmp_path)
    conversation = [{"role": "assistant", "content": "a", "reasoning_content": "it moves"}]
    expected = theirs(reference, conversation, None, {}, False)
    np.testing.assert_array_equal(ours.sample(conversation).tokens, expected)
    assert ours.decode(expected, False) == "<|im_end|>FalseNoneit moves"


def test_calls_without_content(processors):
    processor, _ = processors
    calls = [call("when", {})]
    one, two = (
        processor.sample([CALLS[1], {"role": "assistant", "content": content, "tool_calls": calls}]).tokens
        for content in ("", None)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("conversation", "options", "said"),
    [
        (CALLS, {"tools": {"name": "f"}}, "tools must be a list"),
        (CALLS, {"tools": [CROP, {"function": "f"}]}, "tool 1 must be a function"),
        (CALLS, {"tools": [{"name": "f", "parameters": np.ones(3)}]}, "tool 0 must be a function"),
        (CALLS, {"chat_template_kwargs": {"enable_thinkin": True}}, "'enable_thinkin'.*takes enable_thinking"),
        (CALLS, {"chat_template_kwargs": {"messages": []}}, "'messages'"),
        (CALLS, {"chat_template_kwargs": {"enable_thinking": object()}}, "JSON values"),
        ([{"role": "user", "content": "a", "tool_calls": [call("f", {})]}], {}, "message 0 has tool_calls"),
        ([{"role": "tool", "content": "a", "reasoning_content": "b"}], {}, "message 0 has reasoning_content"),
        ([{"role": "assistant", "content": "a", "reasoning_content": ["b"]}], {}, "str under 'reasoning_content'"),
        ([{"role": "assistant", "content": "a", "tool_calls": "f()"}], {}, "list of calls"),
        ([{"role": "assistant", "content": "a", "tool_calls": ["f()"]}], {}, "tool call 0 must be such as"),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [call("f", [3])]}],
            {},
            "tool call 0 must have arguments",
        ),
        ([{"role": "assistant", "content": "a", "tool_calls": [call("f", {"a": {3}})]}], {}, "tool call 0 must have"),
    ],
)
def test_malformed(processors, conversation, options, said):
    with pytest.raises(ConversationError, match=said) as caught:
        processors[0]([conversation], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "options", "said"),
    [
        ({}, {"tools": TOOLS}, "no place for tools"),
        ({"tool_calls": [call("f", {})]}, {}, "message 0: .* no place for tool_calls"),
        ({"reasoning_content": "b"}, {}, "message 0: .* no place for reasoning_content"),
        ({}, {"chat_template_kwargs": {"enable_thinking": True}}, "takes none"),
    ],
)
def test_a_template_that_would_leave_something_out(tmp_path, message, options, said):
    tiny_processor_folder(tmp_path)
    assert "tool" not in json.dumps((tmp_path / "chat_template.jinja").read_text())
    with pytest.raises(ConversationError, match=said):
        qv.Processor.from_pretrained(tmp_path).sample([{"role": "assistant", "content": "a", **message}], **options)
