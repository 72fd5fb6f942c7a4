"""Records in the formats that people have: what each becomes, and what is refused."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest

from qwenvl_jax.data.coordinates import BELOW_THOUSAND, RESIZED_PIXELS, THOUSANDTHS, Sizes
from qwenvl_jax.data.records import FORMATS, Telling, check_format, find_format, record_options, to_conversation
from qwenvl_jax.errors import ConfigError, DataError, MediaError, QwenVLError


def png(height=4, width=6) -> tuple[np.ndarray, str]:
    """Pixels, and the `data:` URL of an image that has them."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return pixels, "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def text(words):
    return {"type": "text", "text": words}


VIDEO = {"type": "video", "video": "a.mp4"}
BOXES = {"video": "a.mp4", "event": "a dog", "coordinates": "pixels", "width": 200, "height": 100}


def asked(question, answer, video=VIDEO):
    return [
        {"role": "user", "content": [video, text(question)]},
        {"role": "assistant", "content": answer},
    ]


def test_messages_of_our_own_form_stay_as_they_are():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{**VIDEO, "fps": 2.0, "max_frames": 8}, {"type": "image", "image": "b.png"}]},
        {
            "role": "assistant",
            "content": " x ",
            "reasoning_content": "y",
            "tool_calls": [{"name": "f", "arguments": {}}],
        },
    ]
    assert to_conversation({"id": 3, "messages": messages, "source": "web"}) == messages


def test_messages_of_openai():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "b"]}'}}
    bare = {"type": "function", "function": {"name": "g", "arguments": ""}}
    record = {
        "messages": [
            {"role": "developer", "content": "be brief", "name": None},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "b/c.png", "detail": "low"}, "max_pixels": 4096},
                    {"type": "image_url", "image_url": "file:///data/a%20b.png"},
                    {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 1.0},
                    text("what?"),
                ],
            },
            {"role": "assistant", "content": None, "refusal": None, "thinking": "hm", "tool_calls": [call, bare]},
            {"role": "tool", "tool_call_id": "c", "content": [text("yes")]},
            {"role": "assistant", "content": "no", "reasoning": "so", "tool_calls": None},
        ]
    }
    before = json.dumps(record)
    assert to_conversation(record) == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "b/c.png", "max_pixels": 4096},
                {"type": "image", "image": "/data/a b.png"},
                {"type": "video", "video": "a.mp4", "fps": 1.0},
                text("what?"),
            ],
        },
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {**call, "function": {"name": "f", "arguments": {"a": [1, "b"]}}},
                {**bare, "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": [text("yes")]},
        {"role": "assistant", "content": "no", "reasoning_content": "so"},
    ]
    assert json.dumps(record) == before


@pytest.mark.parametrize("kind", ["image_url", "image", "images"])
def test_an_image_within_the_record(kind):
    pixels, url = png()
    if kind == "images":
        record = {"images": [url], "conversations": [{"from": "human", "value": "<image>what"}]}
    else:
        part = {"type": kind, kind: {"url": url} if kind == "image_url" else url}
        record = {"messages": [{"role": "user", "content": [part, text("what")]}]}
    (message,) = to_conversation(record)
    part, words = message["content"]
    assert part["type"] == "image" and words == text("what")
    np.testing.assert_array_equal(np.asarray(part["image"]), pixels)


@pytest.mark.parametrize("format", ["auto", "llava", "qwen"])
def test_turns_with_marks(format):
    record = {
        "system": "be brief",
        "images": ["1.png", {"image": "2.png", "max_pixels": 4096}],
        "video": "a.mp4",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is <video> \n"},
            {"from": "gpt", "value": " a <image> "},
            {"from": "user", "value": "and\n<image>"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "yes"},
            {"from": "assistant", "value": "no"},
        ],
    }
    assert to_conversation(record, format) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "image": "1.png"}, text("what is"), VIDEO]},
        {"role": "assistant", "content": " a <image> "},
        {"role": "user", "content": [text("and"), {"type": "image", "image": "2.png", "max_pixels": 4096}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": "tool", "content": [text("yes")]},
        {"role": "assistant", "content": "no"},
    ]


def test_temporal_grounding():
    record = {"video": {"video": "a.mp4", "fps": 1.0}, "event": "it opens", "start": 3, "end": 3725.96}
    part = {**VIDEO, "fps": 1.0}
    question = 'When does "it opens" happen in the video? Give its start and its end.'
    assert to_conversation(record) == asked(question, "From <3.0 seconds> to <3726.0 seconds>.", part)
    hms = to_conversation({**record, "question": "when?"}, telling=Telling("hms"))
    assert hms == asked("when?", "From <00:00:03.0> to <01:02:06.0>.", part)


@pytest.mark.parametrize(
    ("convention", "box", "point"),
    [
        (THOUSANDTHS, [250, 500, 1000, 1000], [500, 0]),
        (BELOW_THOUSAND, [250, 500, 999, 999], [500, 0]),
        (RESIZED_PIXELS, [56, 56, 224, 112], [112, 0]),
    ],
)
@pytest.mark.parametrize("unit", ["pixels", "pixels of the file", "unit", "thousandths"])
def test_spatiotemporal_grounding(convention, box, point, unit):
    """The same places, however the record counts them, as each generation says them."""
    scale = {"unit": (1, 1), "thousandths": (1000, 1000)}.get(unit, (200, 100))
    record = {
        "video": "a.mp4",
        "event": "a dog",
        "coordinates": unit.split()[0],
        "boxes": [
            {"start": 1, "end": 2.5, "box": [0.25 * scale[0], 0.5 * scale[1], scale[0], scale[1]]},
            {"time": 4, "point": [0.5 * scale[0], 0]},
        ],
    }
    if unit == "pixels":
        record |= {"width": 200, "height": 100}
    shown = []

    def sizes(part):
        shown.append(part)
        return Sizes((100, 200), (112, 224))

    question, answer = to_conversation(record, telling=Telling("seconds", convention, sizes))
    assert question["content"][0] == VIDEO and '"a dog"' in question["content"][1]["text"]
    assert json.loads(answer["content"]) == [
        {"start": "<1.0 seconds>", "end": "<2.5 seconds>", "bbox_2d": box},
        {"time": "<4.0 seconds>", "point_2d": point},
    ]
    needed = unit == "pixels of the file" or convention is RESIZED_PIXELS
    assert bool(shown) == needed and all(part == VIDEO for part in shown)


def test_dense_captions():
    captions = [{"start": 0, "end": 1.25, "caption": "a dog "}, {"start": 1, "end": 2, "caption": "a \u732b"}]
    question = "Describe what happens in the video, each part with its start and its end."
    expected = asked(question, "<0.0 seconds> to <1.2 seconds>: a dog\n<1.0 seconds> to <2.0 seconds>: a \u732b")
    assert to_conversation({"video": "a.mp4", "captions": captions}) == expected
    spans = {"timestamps": [[0, 1.25], [1, 2]], "sentences": ["a dog ", "a \u732b"], "duration": 3}
    assert to_conversation({"video": "a.mp4", **spans}) == expected


def test_options_of_a_record():
    tools = [{"name": "f"}]
    assert record_options({"messages": []}) == record_options({"tools": None, "chat_template_kwargs": {}}) == {}
    for given in (tools, json.dumps(tools)):
        options = record_options({"tools": given, "chat_template_kwargs": {"enable_thinking": False}, "id": 1})
        assert options == {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(DataError, match="tools must be JSON"):
        record_options({"tools": "f()"})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "got the keys none"),
        (
            {"question": "a", "answer": "b"},
            r"got the keys question, answer; known formats .* messages \(messages\); llava",
        ),
        ({"video": "a.mp4", "event": "b", "start": 1}, r"temporal_grounding \(video\+event\+start\+end\)"),
        ({"messages": [], "conversations": []}, "those of messages and of llava"),
        ({**BOXES, "boxes": [], "start": 1, "end": 2}, "of temporal_grounding and of spatiotemporal_grounding"),
    ],
)
def test_records_of_no_format_or_of_several(record, said):
    with pytest.raises(DataError, match=said) as caught:
        find_format(record)
    assert "\n" not in str(caught.value)
    if len(record) > 3:  # the ambiguous one can be meant either way
        assert to_conversation(record, "temporal_grounding")[1]["content"].startswith("From")


def test_names_of_formats():
    for name in ("auto", *FORMATS):
        check_format(name)
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        check_format("lava")


def turn(value, who="human"):
    return {"from": who, "value": value}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": {}}, 'expected "messages" with at least one message'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "message 0, part 0 must",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "https://x/y.png"}]}]},
            "no file",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "data:video/mp4;base64,AA"}]}]},
            "no file",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png,AA"}]}]}, "no base64"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:;base64,?"}]}]},
            "not an image in",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "data:;base64,AAAA"}]}]}, "of 3 bytes"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "call 0: arguments must",
        ),
        ({"conversations": []}, 'expected "conversations" with at least one turn'),
        ({"conversations": ["a"]}, "turn 0 must be"),
        ({"conversations": [turn("a"), turn("b", "boss")]}, "turn 1 must be .* out of human"),
        ({"conversations": [turn(["a"])]}, "turn 0 must be"),
        ({"conversations": [turn("<image>a")]}, "1 <image> marks, the record has 0 images"),
        ({"image": "b.png", "conversations": [turn("a"), turn("<image>", "gpt")]}, "0 <image> marks, the record has 1"),
        ({"video": "b.mp4", "conversations": [turn("<image>a")]}, "1 <image> marks, the record has 0"),
        ({"videos": ["b", "c"], "conversations": [turn("<video>a")]}, "1 <video> marks, the record has 2"),
        ({"image": "b", "images": ["b"], "conversations": [turn("<image>a")]}, "both 'image' and 'images'"),
        ({"image": {"path": "b"}, "conversations": [turn("<image>a")]}, 'path under "image"'),
        ({"conversations": [turn("f()", "function_call")]}, "turn 0 must be JSON"),
        ({"video": "a", "event": " ", "start": 0, "end": 1}, "'event' must be a text"),
        ({"video": None, "event": "b", "start": 0, "end": 1}, 'path under "video"'),
        ({"video": "a", "event": "b", "start": -1, "end": 1}, "'start' of the event must be a time"),
        ({"video": "a", "event": "b", "start": 0, "end": float("nan")}, "'end' of the event must be a time"),
        ({"video": "a", "event": "b", "start": 2, "end": 1}, "starts at 2.0 and ends at 1.0"),
        ({**BOXES, "boxes": []}, "'boxes' must be a list"),
        ({**BOXES, "boxes": [{"box": [0, 0, 1, 1]}]}, "'start' of entry 0 of 'boxes'"),
        ({**BOXES, "boxes": [{"time": 1}]}, "'box' of entry 0 of 'boxes' must be"),
        ({**BOXES, "boxes": [{"time": 1, "box": [0, 0, 1]}]}, r"must be \[x1, y1, x2, y2\]"),
        ({**BOXES, "boxes": [{"time": 1, "point": [0, True]}]}, r"must be \[x, y\]"),
        ({**BOXES, "boxes": [{"time": 1, "box": [5, 0, 1, 1]}]}, "left top corner first"),
        ({**BOXES, "boxes": [{"time": 1, "box": [5, 0, 201, 1]}]}, "leave the picture"),
        ({**BOXES, "width": None, "boxes": [{"time": 1, "box": [0, 0, 1, 1]}]}, "'height' and 'width'"),
        ({**BOXES, "coordinates": None, "boxes": [{"time": 1, "box": [0, 0, 1, 1]}]}, "'coordinates' must say"),
        (
            {**BOXES, "width": None, "height": None, "boxes": [{"time": 1, "box": [0, 0, 1, 1]}]},
            "with the model's processor",
        ),
        ({"video": "a", "captions": [3]}, "'captions' must be a list"),
        ({"video": "a", "captions": [{"start": 0, "end": 1}]}, "'caption' must be a text"),
        ({"video": "a", "timestamps": [[0, 1]], "sentences": []}, "the same length"),
        ({"video": "a", "timestamps": [0], "sentences": ["b"]}, r"hold \[start, end\]"),
        ({"video": "a", "captions": [{"start": 0, "end": 1, "caption": "b"}], "question": ""}, "'question' must be"),
    ],
)
def test_malformed_records(record, said):
    with pytest.raises(QwenVLError, match=said) as caught:
        to_conversation(record)
    assert "\n" not in str(caught.value) and isinstance(caught.value, DataError | MediaError)
