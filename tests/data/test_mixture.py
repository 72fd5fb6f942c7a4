"""Mixtures of data sets with real videos: frame rates drawn for each sample, budgets, modalities, what does not fit."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.data.facts import processor_key
from qwenvl_jax.data.frames import public_opener
from qwenvl_jax.data.mixture import AtRates, MixturePart, MixtureReader, VideoBudget
from qwenvl_jax.data.packing import BatchShape, SampleFacts, misfit
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import open_source
from qwenvl_jax.errors import ConfigError, ConversationError, DataError, MediaError

SHAPE = BatchShape(rows=2, length=400, vision=((16, 24),))


def record(name: str, *parts) -> dict:
    said = {"role": "assistant", "content": "it leaves"}
    return {"id": name, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": name}]}, said]}


def video(**options) -> dict:
    return {"type": "video", "video": "clip.mp4", **options}


def write(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    write(folder / "text.jsonl", [record(f"t{n}") for n in range(6)])
    write(
        folder / "clips.jsonl",
        [
            record("free", video()),
            record("fixed", video(fps=1.0)),
            record("count", video(num_frames=4)),
            record("none"),
        ],
    )
    write(folder / "bad.jsonl", [record("gone", {"type": "video", "video": "gone.mp4"})])
    return folder


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def reader(processor):
    return MixtureReader(processor, processor_key(processor), seed=0)


def read(reader, *parts, shape=SHAPE, **options):
    return reader.read(parts, misfit=functools.partial(misfit, shape=shape), **options)


def frames_of(one: SampleFacts) -> int:
    return len(one.frames)


def test_a_record_at_each_rate(folder, processor, reader):
    """What sets its own rate or number of frames keeps it; text is there once."""
    mixture = read(reader, MixturePart("clips", str(folder / "clips.jsonl")), frame_rates=(2.0, 4.0, 8.0))
    (part,) = mixture.parts
    frames = [[frames_of(mixture.facts[entry]) for entry in row] for row in part.entries.tolist()]
    assert frames[0] == sorted(set(frames[0])) and len(frames[0]) == 3
    assert frames[1:] == [[frames[0][0]] * 3, [2] * 3, [0] * 3]
    assert len(mixture.facts) == 3 + 1 + 1 + 1
    # Each entry is the record as a conversation that asks for that rate.
    source = mixture.source
    for entry, rate in zip(part.entries[0].tolist(), (2.0, 4.0, 8.0), strict=True):
        assert source[entry].id == "free" and source[entry].messages[0]["content"][0]["fps"] == rate
        sample = processor.sample(source[entry].messages)
        assert len(sample.tokens) == mixture.facts[entry].tokens
    assert len({source[entry].content for entry in part.entries[0].tolist()}) == 3


def test_a_rate_that_does_not_fit_gives_way_to_the_next_lower(folder, reader):
    part = MixturePart("clips", str(folder / "clips.jsonl"))
    rates = (2.0, 3.0, 4.0, 8.0)
    whole = read(reader, part, frame_rates=rates, shape=dataclasses.replace(SHAPE, length=2000, vision=((99, 24),)))
    lengths = [whole.facts[entry].tokens for entry in whole.parts[0].entries[0].tolist()]
    assert lengths == sorted(set(lengths)) and whole.lowered == 0
    tight = dataclasses.replace(SHAPE, length=lengths[2] - 1, vision=((99, 24),))
    mixture = read(reader, part, frame_rates=rates, shape=tight)
    assert [mixture.facts[entry].tokens for entry in mixture.parts[0].entries[0].tolist()] == [
        lengths[0],
        lengths[1],
        lengths[1],
        lengths[1],
    ]
    assert mixture.lowered == 2 and not mixture.failures
    none = dataclasses.replace(SHAPE, length=lengths[0] - 1, vision=((99, 24),))
    left_out = read(reader, part, frame_rates=rates, shape=none, max_failed=0.9)
    assert "free" in left_out.failures[0].sample and left_out.samples == 4


def test_budget_lowers_the_resolution_and_then_the_rate(processor, folder, clip):
    """Frames get smaller until each has as few tokens as allowed; below that there are fewer."""
    base = {"type": "video", "video": str(clip), "fps": 4.0}

    def grid(**options):
        return processor.opener.open(base | options).grid

    t, h, w = grid()
    merged = h * w // 4
    assert merged > 2
    smaller = grid(max_video_tokens=t * (merged - 1))
    assert smaller[0] == t and smaller[1] * smaller[2] < h * w
    fewer = grid(max_video_tokens=t * merged // 2, min_frame_tokens=merged)
    assert fewer[1:] == (h, w) and fewer[0] == t // 2
    both = grid(max_video_tokens=t * merged // 2, min_frame_tokens=2)
    assert both[0] == t and both[1] * both[2] < h * w
    opened = processor.opener.open(base | {"max_video_tokens": t * merged // 2, "min_frame_tokens": merged})
    assert opened.choice is not None and "held to max_frames" in opened.choice.why[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_frame_is_smaller_than_asked_but_by_nature(clip, data):
    """Whatever the budget, sizes rounded and tokens pooled; and a frame more would not do."""
    opener = public_opener(data.draw(st.sampled_from(["qwen2_vl_7b", "qwen2_5_vl_7b", "qwen3_vl_4b"])))
    factor, tau = opener.video.factor, opener.video.temporal_patch_size
    cap = data.draw(st.integers(20, 900))
    side = data.draw(st.sampled_from([1, 2, 3]))
    part = {"type": "video", "video": str(clip), "fps": 8.0, "max_pixels": None, "pool": side, "max_video_tokens": cap}

    def tokens(options: dict) -> tuple[int, int]:
        opened = opener.open(part | options)
        height, width = (side * opener.video.patch_size // factor for side in opened.grid[1:])
        return opened.grid[0], -(-height // side) * -(-width // side)

    least = data.draw(st.integers(1, cap))
    groups, each = tokens({"min_frame_tokens": least})
    _, by_nature = tokens({"max_video_tokens": None, "num_frames": tau * groups, "fps": None})
    assert groups * each <= cap and (each >= min(least, by_nature) or groups == 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_frame_tokens": 4}, "give that too"),
        ({"min_frame_tokens": 40, "max_video_tokens": 30}, "above max_video_tokens=30"),
        ({"min_frame_tokens": 40, "max_video_tokens": 300, "max_frame_tokens": 30}, "above max_frame_tokens=30"),
        ({"min_frame_tokens": 4, "max_video_tokens": 300, "num_frames": 4}, "certain frames"),
        ({"min_frame_tokens": 4, "max_video_tokens": 300, "sampler": "timestamps", "timestamps": [1.0]}, "certain"),
        ({"min_frame_tokens": 1.5, "max_video_tokens": 300}, "whole"),
    ],
)
def test_budgets_that_contradict_are_refused(processor, clip, options, told):
    part = {"type": "video", "video": str(clip), **options}
    with pytest.raises(ConversationError, match=told):
        processor.measure([{"role": "user", "content": [part]}])


def test_frames_that_are_given_are_not_thinned(processor):
    part = {"type": "video", "video": [np.zeros((64, 64, 3), np.uint8)] * 4, "timestamps": [0.0, 1.0, 2.0, 3.0]}
    with pytest.raises((ConversationError, MediaError), match="min_frame_tokens"):
        processor.opener.open(part | {"max_video_tokens": 8, "min_frame_tokens": 4})


@pytest.mark.parametrize(
    ("budget", "changes"),
    [
        (VideoBudget(max_frames=4), lambda before, after: len(after) == 2 < len(before)),
        (VideoBudget(max_frame_tokens=3), lambda before, after: max(after) <= 12 < max(before)),
        (VideoBudget(max_video_tokens=12), lambda before, after: sum(after) <= 48 < sum(before)),
        (VideoBudget(max_video_tokens=12, min_frame_tokens=6), lambda before, after: after == (24, 24)),
    ],
)
def test_each_bound_of_a_budget(folder, reader, budget, changes):
    part = MixturePart("clips", str(folder / "clips.jsonl"))
    shape = dataclasses.replace(SHAPE, length=2000, vision=((99, 24),))
    before = read(reader, part, frame_rates=(4.0,), shape=shape)
    after = read(reader, part, frame_rates=(4.0,), shape=shape, budget=budget)
    assert changes(before.facts[0].frames, after.facts[0].frames)
    assert after.facts[3].frames == before.facts[3].frames == ()


def test_what_a_record_says_goes_before_the_budget(tmp_path, clip):
    parts = [
        video(max_video_tokens=77),
        video(max_pixels=9999),
        video(max_frames=6),
        video(num_frames=6),
        video(sampler="timestamps", timestamps=[0.5]),
        {"type": "image", "image": "a.png"},
    ]
    path = write(tmp_path / "r.jsonl", [record(str(n), part) for n, part in enumerate(parts)])
    source = AtRates(open_source(path), (3.0,), VideoBudget(500, 50, 5, 40))
    shown = [
        {
            key: value
            for key, value in source[n].messages[0]["content"][0].items()
            if key not in ("type", "video", "image")
        }
        for n in range(len(parts))
    ]
    assert shown == [
        {"max_video_tokens": 77, "max_frames": 40, "fps": 3.0},
        {"max_pixels": 9999, "max_frames": 40, "fps": 3.0},
        {"max_frames": 6, "max_video_tokens": 500, "max_frame_tokens": 50, "min_frame_tokens": 5, "fps": 3.0},
        {"num_frames": 6, "max_video_tokens": 500, "max_frame_tokens": 50},
        {"sampler": "timestamps", "timestamps": [0.5], "max_video_tokens": 500, "max_frame_tokens": 50},
        {},
    ]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_frames": 0}, r"video_budget\.max_frames=0"),
        ({"min_frame_tokens": 5}, r"needs video_budget\.max_video_tokens"),
        ({"min_frame_tokens": 5, "max_video_tokens": 4}, "at most"),
        ({"min_frame_tokens": 5, "max_video_tokens": 40, "max_frame_tokens": 4}, "at most"),
    ],
)
def test_budgets_that_cannot_be(values, told):
    with pytest.raises(ConfigError, match=told):
        VideoBudget(**values)


def test_modalities_have_their_shares(folder, reader):
    parts = (
        MixturePart("a", str(folder / "text.jsonl"), weight=1, modality="text"),
        MixturePart("b", str(folder / "text.jsonl"), weight=3, final_weight=1, modality="text"),
        MixturePart("c", str(folder / "clips.jsonl"), weight=9, modality="video"),
    )
    mixture = read(reader, *parts, modality_weights=(("video", 0.2), ("text", 0.8)))
    assert [part.weight for part in mixture.parts] == pytest.approx([0.2, 0.6, 0.2])
    assert [part.final_weight for part in mixture.parts] == [pytest.approx(0.4), pytest.approx(0.4), None]
    assert [part.weight for part in read(reader, *parts).parts] == [1, 3, 9]
    with pytest.raises(ConfigError, match=r"\['text', 'video'\].*\['text'\]"):
        read(reader, *parts, modality_weights=(("text", 1.0),))


def test_fewer_records_of_a_part(folder, reader):
    some = read(reader, MixturePart("a", str(folder / "text.jsonl"), max_samples=2))
    again = read(reader, MixturePart("a", str(folder / "text.jsonl"), max_samples=2))
    others = read(reader, MixturePart("c", str(folder / "text.jsonl"), max_samples=2))
    assert some.samples == 2 and some.digest == again.digest
    names = [{mixture.source[n].id for n in range(2)} for mixture in (some, others)]
    assert len(names[0]) == 2 and names[0] != names[1]
    with pytest.raises(ConfigError, match="max_samples=0"):
        MixturePart("a", "x", max_samples=0)


def test_parts_that_cannot_be(folder, reader):
    text = str(folder / "text.jsonl")
    with pytest.raises(ConfigError, match="a name each"):
        read(reader, MixturePart("a", text), MixturePart("a", text))
    with pytest.raises(ConfigError, match="a name each"):
        read(reader, MixturePart("a", text), MixturePart("", text))
    with pytest.raises(ConfigError, match="frame rates must be positive"):
        read(reader, MixturePart("a", text), frame_rates=(0.0,))
    with pytest.raises(DataError, match=r"gone\.mp4.*no sample of part 'bad' of the mixture"):
        read(reader, MixturePart("a", text), MixturePart("bad", str(folder / "bad.jsonl")), max_failed=0.5)
    with pytest.raises(DataError, match=r"gone\.mp4.*1 of 7 samples cannot be used"):
        read(reader, MixturePart("a", text), MixturePart("bad", str(folder / "bad.jsonl")), max_failed=0.1)


def test_digest_tells_mixtures_apart(folder, reader):
    clips, text = (MixturePart(name, str(folder / f"{name}.jsonl")) for name in ("clips", "text"))
    mixtures = [
        read(reader, clips),
        read(reader, clips, text),
        read(reader, text, clips),
        read(reader, clips, text, frame_rates=(1.0, 2.0)),
        read(reader, clips, text, frame_rates=(1.0,), budget=VideoBudget(max_frames=4)),
    ]
    assert len({mixture.digest for mixture in mixtures}) == len(mixtures)
    assert read(reader, clips, text).digest == mixtures[1].digest
