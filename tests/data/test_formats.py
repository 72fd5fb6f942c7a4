"""Data files of each format, from the examples of docs/formats.md to what is learnt."""

import dataclasses
import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax.data.facts import facts_digest, measure_source, processor_key
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.pipeline import SampleCache
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.records import FORMATS, find_format
from qwenvl_jax.data.sources import Reading, open_source
from qwenvl_jax.errors import ConfigError, DataError
from tests.tool_template import TOOL_TEMPLATE, tool_processor_folder

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text()
EXAMPLES = dict(re.findall(r"^## (\w+)\n.*?^```json\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE))

# What the assistant is taught by the page's examples, by Qwen3-VL; the clip is 96 x 64, and so is what the model sees.
END = "<|im_end|>\n"
LEARNT = {
    "messages": "<think>\ntoo small\n</think>\n\n"
    f'<tool_call>\n{{"name": "crop", "arguments": {{"box": [0, 0, 500, 500]}}}}\n</tool_call>{END}the red square{END}',
    "llava": f"the red square{END}",
    "qwen": f"the blue circle{END}",
    "temporal_grounding": f"From <0.5 seconds> to <1.5 seconds>.{END}",
    "spatiotemporal_grounding": '[{"start": "<0.0 seconds>", "end": "<1.0 seconds>", "bbox_2d": [125, 250, 500, 500]}, '
    f'{{"time": "<1.5 seconds>", "point_2d": [250, 500]}}]{END}',
    "dense_captions": "<0.0 seconds> to <0.5 seconds>: a green triangle moves\n"
    f"<0.5 seconds> to <2.0 seconds>: the blue circle leaves{END}",
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    found = {}
    for model_type in ("qwen2_5_vl", "qwen3_vl"):
        folder = tmp_path_factory.mktemp(model_type)
        tool_processor_folder(folder, model_type=model_type)
        found[model_type] = Processor.from_pretrained(folder)
    return found


@pytest.fixture
def data(tmp_path, clip):
    """The page's examples as one file, with their media beside it."""
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "square.png")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{example}\n" for example in EXAMPLES.values()))
    return path


def reading(processor, **options):
    return Reading(coordinates=processor.generation.coordinates, sizes=processor.picture_sizes, **options)


def learnt(processor, sample) -> str:
    return processor.decode(sample.targets[sample.loss_weights > 0], skip_special_tokens=False)


def test_the_page_shows_every_format():
    assert list(EXAMPLES) == list(FORMATS) == list(LEARNT)
    for name, example in EXAMPLES.items():
        assert find_format(json.loads(example)) == ("llava" if name == "qwen" else name)


def test_from_file_to_targets(processors, data):
    """One file with a record of each format: facts as measured, texts as learnt, media found beside the file."""
    processor = processors["qwen3_vl"]
    source = open_source(data, reading(processor))
    facts = measure_source(source, processor)
    samples = SampleCache(source, processor, kept=Kept(1 << 30))
    for index, (name, expected) in enumerate(LEARNT.items()):
        sample = samples[index].sample
        assert learnt(processor, sample) == expected
        assert (facts[index].tokens, facts[index].loss_tokens) == (len(sample.tokens), sample.loss_weights.sum())
        assert len(sample.media) == (2 if name == "llava" else 1)
    told = processor.decode(samples[0].sample.tokens, skip_special_tokens=False)
    assert '"description": "Cuts out a part."' in told and "<tool_response>\na red square\n</tool_response>" in told


def test_asking_with_tools(tiny_checkpoint, tmp_path):
    """The page's line of Python; the prompt is the one that training would show."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    record = json.loads(EXAMPLES["messages"])
    processor = Processor.from_pretrained(folder)
    seen = []

    def watched(*args, **options):
        seen.append(processor(*args, **options))
        return seen[-1]

    watched.__dict__.update(eos_token_id=processor.eos_token_id, pad_token_id=processor.pad_token_id)
    watched.decode = processor.decode
    names = {"qv": qv, "model": qv.QwenVL.from_pretrained(folder), "processor": watched}
    names |= {"conversation": [{"role": "user", "content": "hi"}], "tools": record["tools"]}
    (line,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(line.replace(", chat_template_kwargs", ", max_new_tokens=1, chat_template_kwargs"), names)
    assert len(names["answers"]) == 1
    told = processor.decode(np.asarray(seen[0].tokens)[0], skip_special_tokens=False)
    assert '"description": "Cuts out a part."' in told and "<think>\n\n</think>" in told


def test_a_model_that_counts_pixels_of_what_it_sees(processors, data):
    processor = processors["qwen2_5_vl"]
    height, width = processor.picture_sizes({"type": "video", "video": str(data.parent / "clip.mp4")}).resized
    assert (height, width) == (56, 84) and processor.generation.coordinates.parts is None
    record = open_source(data, reading(processor))[list(FORMATS).index("spatiotemporal_grounding")]
    first, second = json.loads(record.messages[1]["content"])
    assert first["bbox_2d"] == [round(width * 12 / 96), round(height * 16 / 64), width // 2, height // 2]
    assert second["point_2d"] == [width // 4, height // 2]


def test_times_in_two_forms(processors, data):
    """The same in prompt and answer of a record, measured as sampled, and part of what is kept and compared."""
    processor = processors["qwen3_vl"]
    sources = {share: open_source(data, reading(processor, hms_share=share, seed=4)) for share in (0.0, 0.5, 1.0)}
    at = list(FORMATS).index("temporal_grounding")
    record = sources[1.0][at]
    sample = processor.sample(record.messages, **record.options)
    text = processor.decode(sample.tokens, skip_special_tokens=False)
    assert text.endswith(f"From <00:00:00.5> to <00:00:01.5>.{END}") and "<00:00:00.3><|vision_start|>" in text
    assert " seconds>" not in text
    facts = {share: measure_source(source, processor) for share, source in sources.items()}
    assert facts[1.0][at].tokens == len(sample.tokens) != facts[0.0][at].tokens
    forms = ["hms" if sources[0.5][i].options.get("time_format") else "seconds" for i in range(len(FORMATS))]
    assert set(forms) == {"seconds", "hms"}
    for i, form in enumerate(forms):
        same = sources[1.0 if form == "hms" else 0.0]
        assert dataclasses.replace(sources[0.5][i], where="") == dataclasses.replace(same[i], where="")
    digests = {facts_digest(facts[share], sources[share]) for share in sources}
    assert len(digests) == 3 and len({source[at].content for source in sources.values()}) == 2
    other = open_source(data, reading(processor, hms_share=0.5, seed=5))
    assert [other[i].options.get("time_format", "seconds") for i in range(len(FORMATS))] != forms


def test_facts_that_are_kept_are_those_of_the_reading(processors, data):
    processor, key = processors["qwen3_vl"], processor_key(processors["qwen3_vl"])
    for share in (0.0, 1.0, 0.0):
        source = open_source(data, reading(processor, hms_share=share))
        kept = measure_source(source, processor, processor_key=key, cache=data)
        assert kept == measure_source(source, processor)


def test_a_record_keeps_its_digest_where_nothing_is_made_of_it(data):
    """So that runs over messages go on: the digest is that of the line alone."""
    line = data.read_text().splitlines()[0]
    assert open_source(data)[0].content == hashlib.sha256(line.encode()).hexdigest()


def test_sources_survive_pickling(processors, data):
    source = open_source(data, reading(processors["qwen2_5_vl"], hms_share=0.5))
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(len(again))] == [source[i] for i in range(len(source))]


def test_a_format_that_is_asked_for(data):
    line = {
        "video": "clip.mp4",
        "event": "a",
        "start": 0,
        "end": 1,
        "captions": [{"start": 0, "end": 1, "caption": "b"}],
    }
    data.write_text(json.dumps(line))
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: .* of temporal_grounding and of dense_captions; set the data's"
    ):
        open_source(data)[0]
    answers = [
        open_source(data, Reading(format=name))[0].messages[1]["content"]
        for name in ("temporal_grounding", "dense_captions")
    ]
    assert answers == ["From <0.0 seconds> to <1.0 seconds>.", "<0.0 seconds> to <1.0 seconds>: b"]
    with pytest.raises(DataError, match=r"data\.jsonl:1: expected \"messages\""):
        open_source(data, Reading(format="messages"))[0]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('[\n{"messages": []}]', r"jsonl:1: not JSON .* jq -c"),
        ('[{"messages": []}]', r"jsonl:1: expected a record .* jq -c"),
        ('{"id": 1, "prompt": "a"}', r"jsonl:1: .* known format, got the keys id, prompt"),
        ('{"conversations": [{"from": "human", "value": "<video>a"}]}', r"jsonl:1: .*1 <video> marks"),
        ('{"video": "none.mp4", "event": "a", "start": 0, "end": 1}', r"jsonl:1: .*none\.mp4 does not exist"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [3]}', r"jsonl:1: tool 0 must be a function"),
        (
            '{"video": "none.mp4", "event": "a", "coordinates": "pixels", "boxes": [{"time": 0, "point": [0, 0]}]}',
            r"jsonl:1: .*none\.mp4 does not exist",
        ),
    ],
)
def test_bad_records_name_file_and_line(processors, tmp_path, lines, told):
    (tmp_path / "data.jsonl").write_text(lines)
    processor = processors["qwen3_vl"]
    with pytest.raises(DataError, match=told) as caught:
        measure_source(open_source(tmp_path / "data.jsonl", reading(processor)), processor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"format": "lava"}, {"hms_share": 1.5}, {"hms_share": True}])
def test_readings_that_are_none(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Reading(**options)


def test_records_in_memory(processors):
    """Media that are objects, in any format."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    record = {
        "image": pixels,
        "conversations": [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a"}],
    }
    processor = processors["qwen3_vl"]
    source = open_source([record], reading(processor))
    assert source[0].messages[0]["content"][0]["image"] is pixels and not source[0].content
    assert measure_source(source, processor)[0].frames == (16,)
    assert learnt(processor, processor.sample(source[0].messages)) == f"a{END}"
