"""What the demo's conversations ask and teach, against what the processor really puts into the prompt."""

import json
import os

import numpy as np
import pytest

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import open_source
from qwenvl_jax.demo import records, warmup
from qwenvl_jax.demo.clips import COLOURS, HELD_OUT, describe_clip, make_clips
from qwenvl_jax.demo.report import seen_frames
from qwenvl_jax.demo.vocabulary import write_processor_folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(write_processor_folder(tmp_path_factory.mktemp("processor")))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"), "train", 10, 0)


def test_times_and_sizes_are_those_of_the_prompt(processor, clips):
    for path, clip in clips:
        sample = processor.sample(records.ask(path, clip.events[0]), add_generation_prompt=True)
        (media,) = sample.media
        np.testing.assert_allclose(media.times, records.sight(clip).times, atol=1e-6)
        assert media.grid[1] * media.grid[2] in (16, 24)
        text = processor.decode(sample.tokens)
        assert all(f"<{time:.1f} seconds>" in text for time in media.times)


def test_what_is_taught_can_be_read_off_the_frames(processor, clips):
    """An answer's start is the first time in the prompt whose frames show the colour, its end the last."""
    for path, clip in clips[:5]:
        sighting = records.sight(clip)
        (media,) = processor.sample(records.ask(path, clip.events[0]), add_generation_prompt=True).media
        for e, event in enumerate(clip.events):
            distance = np.abs(seen_frames(media).astype(int) - COLOURS[event.colour]).max(axis=-1)
            seen_t = (distance < 45).sum(axis=(2, 3)).max(axis=1) > 12
            np.testing.assert_array_equal(seen_t, sighting.visible[:, e])
            start, end = sighting.span(e)
            printed = [float(f"{time:.1f}") for time in np.array(media.times)[seen_t]]
            assert (start, end) == (printed[0], printed[-1])


def test_what_can_be_seen_is_nearly_always_within_half_a_second_of_the_truth():
    """Times of patches stand two sampled frames apart, so that an answer read off them is wrong by more but rarely."""
    errors = []
    for index in range(100):
        clip = describe_clip(1, index, "evaluation")
        for e, event in enumerate(clip.events):
            start, end = records.sight(clip).span(e)
            errors.append((abs(start - event.start), abs(end - event.end)))
    assert np.max(errors) < 0.7 and (np.array(errors) <= 0.5).mean(axis=0).min() > 0.9


def test_a_training_conversation_asks_for_every_event_and_learns_its_answers_alone(processor, clips):
    path, clip = clips[0]
    messages = records.conversation(clip, path, np.random.default_rng(0))
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(clip.events)
    answers = [records.parse_answer(message["content"]) for message in messages[1::2]]
    assert {name for name, _, _ in answers} == {event.name for event in clip.events}
    orders = {
        tuple(m["content"] for m in records.conversation(clip, path, np.random.default_rng(s))[1::2]) for s in range(9)
    }
    assert len(orders) > 1
    sample = processor.sample(messages)
    learnt = processor.decode(sample.targets[sample.loss_weights > 0])
    assert all(message["content"] in learnt for message in messages[1::2])
    assert not any(records.question(event.name) in learnt for event in clip.events)


def test_a_description_names_what_each_patch_shows(clips):
    path, clip = clips[1]
    plain, described = (
        records.conversation(clip, path, np.random.default_rng(0), describe=describe) for describe in (False, True)
    )
    assert described[:-2] == plain and described[-2] == {"role": "user", "content": records.DESCRIBE}
    parts = described[-1]["content"].split("<")[1:]
    sighting = records.sight(clip)
    for part, time, visible in zip(parts, sighting.times, sighting.visible, strict=True):
        shown = (event for event, there in zip(clip.events, visible, strict=True) if there)
        seen = sorted(shown, key=lambda event: event.start)
        assert part == f"{time:.1f} seconds>" + ("".join(f" {event.name}" for event in seen) or " nothing")


def test_records_are_written_as_the_training_reads_them(clips, tmp_path):
    pairs = list(records.training_conversations(clips, 0, passes=2, longest=9.0))
    kept = [clip.index for _, clip in clips if clip.duration <= 9.0]
    assert 0 < len(kept) < len(clips) and len(pairs) == 2 * len(kept) == len({name for name, _ in pairs})
    source = open_source(records.write_records(tmp_path / "data" / "train.jsonl", pairs))
    assert len(source) == len(pairs)
    for number, (name, messages) in enumerate(pairs):
        record = source[number]
        assert record.id == name and record.messages[1:] == messages[1:]
        assert os.path.samefile(record.messages[0]["content"][0]["video"], messages[0]["content"][0]["video"])


def test_answers_are_json_and_are_read_back():
    text = records.answer("red ring", 3.44, 10)
    assert json.loads(text) == {"event": "red ring", "start": 3.4, "end": 10.0}
    assert records.parse_answer(text) == ("red ring", 3.4, 10.0)
    for broken in ("", "{", "[1, 2]", '{"event": "a", "start": 1}', '{"event": "a", "start": NaN, "end": 2}', "3"):
        assert records.parse_answer(broken) is None


def test_the_warm_up_tells_what_the_frames_show_and_no_held_out_pair():
    for index in range(40):
        messages = warmup.text_conversation(5, index)
        clip, text = describe_clip(5, index, "train"), messages[0]["content"]
        told = text[: text.index("When does")].split("<")[1:]
        sighting = records.sight(clip)
        for line, time, visible in zip(told, sighting.times, sighting.visible, strict=True):
            assert line.startswith(f"{time:.1f} seconds> ")
            names = {event.name for event, seen in zip(clip.events, visible, strict=True) if seen}
            assert all(f" {name}" in line for name in names) and ("nothing" in line) == (not names)
        assert not any(" ".join(pair) in text for pair in HELD_OUT.items())
        assert messages == warmup.text_conversation(5, index)
        assert [records.parse_answer(m["content"]) is not None for m in messages] == [False, True] * len(clip.events)
