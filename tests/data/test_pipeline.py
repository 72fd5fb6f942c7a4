"""Sources of records, their facts, the cache of samples, and batches through Grain."""

import collections
import concurrent.futures
import dataclasses
import json
import re
import resource
import threading

import jax
import numpy as np
import pytest

from qwenvl_jax.data import pipeline, video
from qwenvl_jax.data.facts import facts_digest, measure_source, processor_key
from qwenvl_jax.data.ffmpeg_child import EndedError
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packing import BatchShape, Plan
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import JsonlSource, open_source
from qwenvl_jax.errors import ConfigError, DataError, SourceError
from tests.tiny import tiny_processor_folder

SHAPE = BatchShape(rows=2, length=160, vision=((8, 24),))


def conversation(clip: str | None, question: str) -> list[dict]:
    video = [{"type": "video", "video": clip, "fps": 2.0}] if clip else []
    return [
        {"role": "user", "content": [*video, {"type": "text", "text": question}]},
        {"role": "assistant", "content": "it leaves"},
    ]


@pytest.fixture
def data(tmp_path, clip):
    """A JSONL file over one clip that lies beside it."""
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    records = [{"id": f"r{i}", "messages": conversation("clip.mp4", f"question {i}")} for i in range(3)]
    records.append({"messages": conversation(None, "no pixels")})
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint)


def loader_of(source, processor, kept=None) -> BatchLoader:
    samples = SampleCache(source, processor, kept=kept or Kept(1 << 30))
    return BatchLoader(Plan(measure_source(source, processor), SHAPE, seed=0), samples, processor)


def test_records_of_a_file(data, clip):
    source = open_source(str(data))
    assert [source[i].id for i in range(len(source))] == ["r0", "r1", "r2", "3"]
    assert source[1].where == f"{data}:3"
    assert source[1].messages[0]["content"][0]["video"] == str(data.parent / "clip.mp4")
    both = open_source((str(data), str(data)))
    assert len(both) == 8
    assert both[5].where == source[1].where


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (b'{"messages": [{"role": "user", "content": "a"}]}\n{"mess', r"data\.jsonl:2: not JSON"),
        (b'{"messages": []}', r"data\.jsonl:1: expected"),
        (b"[1, 2]", r"data\.jsonl:1: expected"),
        (b'{"messages": [3]}', r"data\.jsonl:1: "),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', r"data\.jsonl:1: not JSON"),
        (b'{"messages": [{"role": "user", "content": [{"type": "video", "video": "no.mp4"}]}]}', r"jsonl:1: .*no\.mp4"),
        (b"\n \n", r"data\.jsonl holds no records"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, processor, lines, told):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines)
    with pytest.raises(DataError, match=told):
        measure_source(open_source(path), processor)


def test_sources_that_are_none():
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read"):
        open_source("missing.jsonl")
    with pytest.raises(DataError, match="int"):
        open_source(3)
    with pytest.raises(DataError, match="empty"):
        open_source([])


def test_any_object_is_a_source(processor, clip):
    """Mappings, or their JSON text as an ArrayRecord source yields it."""
    record = {"id": "a", "messages": conversation(str(clip), "question")}
    source = open_source([record, json.dumps(record).encode()])
    facts = measure_source(source, processor)
    assert facts[0].tokens == facts[1].tokens
    assert facts[0].frames == facts[1].frames == (24, 24)


def test_facts_are_those_of_the_samples(data, processor):
    source = JsonlSource(data)
    for i, known in enumerate(measure_source(source, processor)):
        sample = processor.sample(source[i].messages)
        assert known.tokens == len(sample.tokens)
        assert known.loss_tokens == sample.loss_weights.sum()
        assert sum(known.frames) == sum(len(media.patches) for media in sample.media)
        assert f"{data}:" in known.name


def test_facts_are_kept_and_checked(data, processor, monkeypatch):
    """Measured once; measured again when the record, its media or the processor changed; a damaged file is no harm."""
    key = processor_key(processor)
    source = JsonlSource(data)
    first = measure_source(source, processor, processor_key=key, cache=data)
    (kept,) = data.parent.glob("data.jsonl.facts-*.json")

    measured = []

    class Counting:
        def measure(self, messages):
            measured.append(messages)
            return processor.measure(messages)

    assert measure_source(source, Counting(), processor_key=key, cache=data) == first
    assert not measured
    clip = data.parent / "clip.mp4"
    clip.write_bytes(clip.read_bytes() + b"\0" * 8)
    assert measure_source(source, Counting(), processor_key=key, cache=data) == first
    assert len(measured) == 3
    measure_source(source, Counting(), processor_key="another", cache=data)
    assert len(measured) == 7
    kept.write_text('{"cut')
    assert measure_source(source, Counting(), processor_key=key, cache=data) == first
    assert len(measured) == 11
    assert {path.suffix for path in data.parent.iterdir()} == {".json", ".jsonl", ".mp4"}


def test_digest_of_the_data(data, processor):
    source = JsonlSource(data)
    facts = measure_source(source, processor)
    digest = facts_digest(facts, source)
    assert digest == facts_digest(facts, JsonlSource(data))
    data.write_text(data.read_text().replace("question 1", "question 9"))
    assert digest != facts_digest(facts, JsonlSource(data))


def test_batches_have_one_shape_and_a_hash(data, processor):
    """Whatever stands in a step, shapes are the same; the hash tells what stands in it, and where."""
    loader = loader_of(JsonlSource(data), processor)
    steps = [loader(n) for n in range(6)]
    shapes = {str(jax.tree.map(np.shape, step.batch)) for step in steps}
    assert len(shapes) == 1
    assert len({step.hash for step in steps}) == 6
    assert all(step.tokens == (step.batch.segment_ids > 0).sum() for step in steps)
    assert loader_of(JsonlSource(data), processor)(3).hash == steps[3].hash


def test_hash_tells_pixels(data, processor, run_ffmpeg):
    before = loader_of(JsonlSource(data), processor)(0)
    source = "testsrc2=size=96x64:rate=12:duration=2"
    run_ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", data.parent / "clip.mp4")
    after = loader_of(JsonlSource(data), processor)(0)
    np.testing.assert_array_equal(before.batch.tokens, after.batch.tokens)
    assert before.hash != after.hash


def test_a_batch_of_text_alone_keeps_the_vision_rows(tmp_path, processor):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": conversation(None, "text")}))
    batch = loader_of(JsonlSource(path), processor)(0).batch
    assert batch.vision[0].patches.shape == (1, 8, 24, processor.patch_dim)


@pytest.mark.parametrize("threads", [0, 2])
def test_iterator_begins_anywhere(data, processor, threads):
    loader = loader_of(JsonlSource(data), processor)
    whole = [step.hash for step in batches(loader, 7, threads=threads)]
    assert len(whole) == 7
    assert whole == [loader(n).hash for n in range(7)]
    again = loader_of(JsonlSource(data), processor)
    assert [step.hash for step in batches(again, 7, first=3, threads=threads)] == whole[3:]
    assert list(batches(again, 7, first=7, threads=threads)) == []


def test_batches_for_a_tower_with_windows_tell_them(data, tmp_path):
    """The order of patches is the processor's own, so training sees what is served."""
    tiny_processor_folder(tmp_path / "model", model_type="qwen2_5_vl", image_pixels=(3136, 20_000))
    windowed = Processor.from_pretrained(tmp_path / "model")
    source = JsonlSource(data)
    shape = BatchShape(rows=1, length=160, vision=((4, 120),))
    samples = SampleCache(source, windowed, kept=Kept(1 << 30))
    plan = Plan(measure_source(source, windowed), shape, seed=0)
    planned = BatchLoader(plan, samples, windowed)(0).batch
    (first, *_), *_ = plan[0]
    (rows,) = planned.vision
    assert rows.windows.max() > 1 and ((rows.windows > 0) == (rows.segment_ids > 0)).all()
    alone = windowed([source[first].messages])
    np.testing.assert_array_equal(
        windowed.pixel_values(planned)[: len(windowed.pixel_values(alone))], windowed.pixel_values(alone)
    )


class CountingProcessor:
    """A processor that notes what it decodes."""

    def __init__(self, processor):
        self._processor, self.decoded = processor, []

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def sample(self, messages, read):
        def counted(part, decode):
            return read(part, lambda: (self.decoded.append(part), decode())[1])

        return self._processor.sample(messages, read=counted)


def test_a_clip_is_decoded_once_if_it_fits(data, processor):
    """Once for all records that show it alike, in all sources; without room, every time, with the same batches."""
    counting, kept = CountingProcessor(processor), Kept(1 << 30)
    first = loader_of(JsonlSource(data), counting, kept=kept)
    hashes = [first(n).hash for n in range(4)]
    assert len(counting.decoded) == 1
    other = loader_of(JsonlSource(data), counting, kept=kept)
    assert [other(n).hash for n in range(4)] == hashes
    assert len(counting.decoded) == 1
    data.write_text(data.read_text().replace('"fps": 2.0', '"fps": 4.0', 1))
    faster = loader_of(JsonlSource(data), counting, kept=kept)
    assert [faster(n).hash for n in range(4)] != hashes
    assert len(counting.decoded) == 2

    data.write_text(data.read_text().replace('"fps": 4.0', '"fps": 2.0'))
    none = loader_of(JsonlSource(data), counting, kept=Kept(0))
    assert [none(n).hash for n in range(4)] == hashes
    assert len(counting.decoded) > 4


def test_kept_values_share_their_room():
    """The oldest go first, a making that fails is not kept, and two threads wait for one making."""
    kept, made = Kept(10), []

    def get(key, size):
        return kept.get(key, lambda: made.append(key) or key * 2, lambda value: size)

    assert [get(key, 4) for key in "abab"] == ["aa", "bb", "aa", "bb"]
    get("c", 4)
    assert (kept.peek("a"), kept.peek("b"), kept.peek("c")) == (None, "bb", "cc")
    get("big", 11)
    assert kept.peek("big") is None
    with pytest.raises(ZeroDivisionError):
        kept.get("d", lambda: 1 / 0, len)
    assert get("d", 1) == "dd"

    begun, go_on = threading.Event(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        slow = pool.submit(kept.get, "e", lambda: (begun.set(), go_on.wait(), made.append("e"))[0], lambda value: 1)
        begun.wait()
        second = pool.submit(get, "e", 1)
        go_on.set()
        assert slow.result() is second.result() is None
    assert made.count("e") == 1


def test_keeping_one_more_value_does_not_look_at_all_the_others():
    looked = 0

    class Counting(collections.OrderedDict):
        def items(self):
            nonlocal looked
            for item in super().items():
                looked += 1
                yield item

    kept = Kept(1000)
    kept._futures = Counting()
    for i in range(3000):
        kept.get(i, lambda i=i: i, lambda value: 1)
    assert kept.peek(1999) is None and kept.peek(2000) == 2000
    assert looked <= 3000


def test_media_kept_on_disk(data, processor, tmp_path):
    """Written whole, read back equal, decoded again when damaged."""
    key, folder = processor_key(processor), tmp_path / "cache"

    def load(counting):
        cache = SampleCache(JsonlSource(data), counting, kept=Kept(0), folder=folder, processor_key=key)
        return cache[0]

    counting = CountingProcessor(processor)
    first = load(counting)
    (file,) = folder.iterdir()
    again = load(counting)
    assert len(counting.decoded) == 1
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.sample.media[0].patches, first.sample.media[0].patches)
    file.write_bytes(file.read_bytes()[:100])
    assert load(counting).digest == first.digest
    assert len(counting.decoded) == 2
    assert list(folder.iterdir()) == [file]


@pytest.mark.parametrize(("times", "fails"), [(1, False), (2, True)])
def test_an_ffmpeg_that_was_asked_to_end_is_asked_once_more(data, processor, monkeypatch, times, fails):
    """SIGTERM comes to all processes of a job, and the run may want this batch before it stops."""
    whole, ended = SampleCache(JsonlSource(data), processor, kept=Kept(0))[0], []
    read = video.stream_through

    def stream_through(*given):
        if len(ended) < times:
            ended.append(1)
            raise EndedError("clip.mp4: ffmpeg was ended by SIGTERM; start the same command again.")
        return read(*given)

    monkeypatch.setattr(video, "stream_through", stream_through)
    samples = SampleCache(JsonlSource(data), processor, kept=Kept(0))
    if fails:
        with pytest.raises(DataError, match=r"data\.jsonl:1: .*ended by SIGTERM"):
            samples[0]
    else:
        assert samples[0].digest == whole.digest and len(samples[0].sample.media) == 1


def test_a_cache_on_disk_that_cannot_be_written_costs_no_sample(data, processor, tmp_path, caplog):
    """The batches are those of a run without it, and it is told once."""
    source, folder = JsonlSource(data), tmp_path / "file" / "cache"
    (tmp_path / "file").write_text("no folder")
    samples = SampleCache(source, processor, kept=Kept(0), folder=folder, processor_key="key")
    loader = BatchLoader(Plan(measure_source(source, processor), SHAPE, seed=0), samples, processor)
    planned = [loader(step) for step in range(3)]
    assert not any(step.failed for step in planned)
    assert [step.hash for step in planned] == [loader_of(source, processor)(step).hash for step in range(3)]
    (line,) = caplog.messages
    assert line.startswith(f"data.cache_dir={folder} cannot be written (Not a directory): media that it lacks")


def test_what_found_no_room_in_the_cache_leaves_nothing_there(tmp_path, caplog):
    array, path = np.arange(100_000), tmp_path / "cache" / "key.npy"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert pipeline._on_disk(path, lambda: array) is array
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(path.parent.iterdir()) == []
    assert "cannot be written (File too large)" in caplog.text
    assert pipeline._on_disk(path, lambda: array) is array
    assert list(path.parent.iterdir()) == [path]


def test_a_source_that_cannot_be_read_is_no_failure_of_a_sample(data, processor):
    """Whether it is found as the record is read, or as its media are fetched."""
    source = JsonlSource(data)

    class Fetching:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return dataclasses.replace(source[index], fetch=self.fetch)

        def fetch(self):
            raise SourceError("the disk has gone")

    facts = measure_source(source, processor)
    loader = BatchLoader(Plan(facts, SHAPE, seed=0), SampleCache(Fetching(), processor, kept=Kept(0)), processor)
    with pytest.raises(SourceError, match="the disk has gone"):
        loader(0)
    data.unlink()
    with pytest.raises(SourceError, match="cannot be read any more"):
        BatchLoader(loader.plan, SampleCache(source, processor, kept=Kept(0)), processor)(0)


def test_errors_reach_the_caller_by_name(data, processor):
    """A clip that is damaged after it was measured, and a record that is not what was measured."""
    source = JsonlSource(data)
    loader = loader_of(source, processor)
    (data.parent / "clip.mp4").write_bytes(b"no video")
    for planned in batches(loader, 3):
        assert planned.failed
        for failure in planned.failed:
            assert re.search(r"data\.jsonl:\d: .*clip\.mp4", failure.reason)
            assert failure.sample.startswith(failure.reason.partition(": ")[0])
    changed = loader_of(open_source([{"messages": conversation(None, "text")}]), processor)
    facts = [dataclasses.replace(changed.plan.facts[0], tokens=5)]
    changed.plan = Plan(facts, SHAPE, seed=0)
    assert all("was measured as 5 tokens" in failure.reason for failure in changed(0).failed)
    assert changed(0).tokens == 0 and len(changed(0).failed) > 0


def test_vision_rows_hold_whole_merged_tokens(data, processor):
    source = JsonlSource(data)
    plan = Plan(measure_source(source, processor), BatchShape(rows=2, length=160, vision=((8, 26),)), seed=0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        BatchLoader(plan, SampleCache(source, processor, kept=Kept(0)), processor)
