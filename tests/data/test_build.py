"""`qwenvl-jax data build`: what it writes is read by tensorflow-datasets, and trains as the files that it came from."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from qwenvl_jax import cli
from qwenvl_jax.data import build as build_module
from qwenvl_jax.data.build import build
from qwenvl_jax.data.built import BuiltSource
from qwenvl_jax.data.facts import facts_digest, measure_each, processor_key
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packing import BatchShape, Plan
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import Reading, Subset, open_source
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.curriculum import prepare_stages
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import tiny_config, write_records, write_tiny_run

tfds = pytest.importorskip(
    "tensorflow_datasets.public_api", reason="tensorflow-datasets, of the extras `tfds` and `test`, is not installed"
)

SHAPE = BatchShape(rows=2, length=240, vision=((16, 24),))


def conversation(question: str, *parts: dict) -> list[dict]:
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return [user, {"role": "assistant", "content": "it leaves"}]


def video(path: str, **options) -> dict:
    return {"type": "video", "video": path, **options}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_processor_folder(folder)
    return folder


@pytest.fixture
def files(tmp_path, clip, run_ffmpeg):
    """Two JSONL files in folders of their own, with clips of one name and other content, and a record that fails."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    shutil.copy(clip, first / "clip.mp4")
    run_ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=12:duration=2", "-pix_fmt", "yuv420p", second / "clip.mp4"
    )
    shutil.copy(clip, second / "again.mp4")
    PIL.Image.new("RGB", (64, 64), "red").save(second / "square.png")
    boxes = [{"time": 0.5, "box": [12, 16, 48, 32]}]
    write_records(
        first / "a.jsonl",
        [
            {"messages": conversation("no pixels")},
            {"id": "gone", "messages": conversation("what leaves?", video("gone.mp4"))},
            {"id": "slow", "messages": conversation("when does it leave?", video("clip.mp4", fps=2.0))},
            {"messages": conversation("and now?", video("clip.mp4", fps=4.0))},
        ],
    )
    write_records(
        second / "b.jsonl",
        [
            {"id": "still", "messages": conversation("what is it?", {"type": "image", "image": "square.png"})},
            {"id": "other", "messages": conversation("when?", video("clip.mp4", fps=2.0))},
            {"id": "boxes", "video": "again.mp4", "event": "it", "coordinates": "pixels", "boxes": boxes},
        ],
    )
    return str(first / "a.jsonl"), str(second / "b.jsonl")


class NothingMeasured:
    """A processor that may make samples, but not measure them."""

    def __init__(self, processor):
        self._processor = processor

    def __getattr__(self, name):
        if name == "measure":
            raise AssertionError("the facts did not come with the data")
        return getattr(self._processor, name)


def trained_on(source, processor, reading=None, measuring=None) -> tuple[list[str], str, BatchLoader]:
    """The hashes of some steps over a source, the digest of its data, and the loader."""
    records = open_source(source, reading or Reading.of(processor))
    facts = measure_each(records, measuring or processor, processor_key=processor_key(processor))
    used = [i for i, one in enumerate(facts) if not isinstance(one, Failure)]
    records, facts = Subset(records, used), tuple(facts[i] for i in used)
    samples = SampleCache(records, processor, kept=Kept(1 << 30))
    loader = BatchLoader(Plan(facts, SHAPE, seed=0), samples, processor)
    planned = [loader(step) for step in range(6)]
    assert not any(step.failed for step in planned)
    return [step.hash for step in planned], facts_digest(facts, records), loader


@pytest.mark.parametrize("embed_media", [False, True])
def test_batches_are_those_of_the_files(files, model, tmp_path, embed_media):
    """The same hashes, without measuring again; embedded, also when the files have gone."""
    processor = Processor.from_pretrained(model)
    hashes, digest, _ = trained_on(files, processor)
    told = Reading.of(processor, hms_share=0.9, seed=3)
    other = trained_on(files, processor, told)[:2]
    assert hashes != other[0]
    done = build(files, tmp_path / "built", model=str(model), embed_media=embed_media, max_failed=0.2)
    assert (done.records, len(done.failures)) == (6, 1)
    if embed_media:
        # Three contents: the clip under two names, the other clip of its name, the picture.
        assert done.media[0] == 3
        shutil.rmtree(tmp_path / "first")
        shutil.rmtree(tmp_path / "second")
    measuring = NothingMeasured(processor)
    found, same, loader = trained_on(tmp_path / "built", processor, measuring=measuring)
    assert (found, same) == (hashes, digest)
    again = pickle.loads(pickle.dumps(loader))
    assert [step.hash for step in batches(again, 6, first=2)] == hashes[2:]
    assert trained_on(tmp_path / "built", processor, told)[:2] == other


def test_embedded_media_are_written_when_they_are_wanted(files, model, tmp_path):
    """Planning needs no file; what is missing or cut is written again."""
    processor = Processor.from_pretrained(model)
    built = tmp_path / "built"
    build(files, built, model=str(model), embed_media=True, max_failed=0.2)
    source = open_source(built, Reading())  # without sizes: nothing of `boxes` has to be looked at
    record = source[1]
    assert record.id == "slow" and not (built / "media-cache").exists()
    record.fetch()
    (file,) = (built / "media-cache").iterdir()
    whole = (tmp_path / "first/clip.mp4").read_bytes()
    assert file.read_bytes() == whole and str(file) == record.messages[0]["content"][0]["video"]
    file.write_bytes(whole[:100])
    source[1].fetch()
    assert file.read_bytes() == whole
    hashes, _, _ = trained_on(built, processor)
    assert len(list((built / "media-cache").iterdir())) == 3
    shutil.rmtree(built / "media-cache")
    assert trained_on(built, processor)[0] == hashes


def test_tensorflow_datasets_reads_it(files, model, tmp_path, capsys):
    """Through its public functions, and without TensorFlow."""
    built = tmp_path / "built"
    arguments = ["data", "build", *files, str(built), "--model", str(model), "--embed-media", "--shards", "2"]
    assert cli.main([*arguments, "--max-failed", "0.2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{built}: 6 records, 3 media files of ") and "1 left out" in out and out.count("\n") == 1
    assert err == ""
    records = tfds.builder_from_directory(built).as_data_source()["train"]
    assert len(list(built.glob("*.array_record-*-of-00002"))) == 2 and len(records) == 6
    lines = [line for file in files for line in Path(file).read_bytes().splitlines() if b"gone" not in line]
    assert [record["record"] for record in records] == lines
    assert [record["id"] for record in records] == [b"0", b"slow", b"3", b"still", b"other", b"boxes"]
    assert records[1]["where"].decode() == f"{files[0]}:3"
    processor = Processor.from_pretrained(model)
    source = open_source(files, Reading.of(processor))
    for record, index in zip(records, (0, 2, 3, 4, 5, 6), strict=True):
        facts = processor.measure(source[index].messages)
        assert (record["tokens"], record["loss_tokens"]) == (facts.tokens, facts.loss_tokens)
        assert np.prod(record["frames"], axis=1).sum() == sum(np.prod(grid) for grid in facts.grids)
    media = tfds.builder_from_directory(built / "media").as_data_source("train")
    ((path, (number, digest, size)),) = json.loads(records[4]["media"]).items()
    assert path == str(tmp_path / "second/clip.mp4")
    assert media[number]["data"] == Path(path).read_bytes() and len(media[number]["data"]) == size
    assert media[number]["sha256"].decode() == digest and media[number]["name"] == b"clip.mp4"
    assert "tensorflow" not in sys.modules


def test_bytes_of_any_kind_come_back(model, tmp_path):
    """Embedded files that end in zeros are not cut."""
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "square.bmp")
    data = (tmp_path / "square.bmp").read_bytes() + b"\0" * 9
    (tmp_path / "square.bmp").write_bytes(data)
    image = {"type": "image", "image": "square.bmp"}
    path = write_records(tmp_path / "data.jsonl", [{"messages": conversation("what?", image)}])
    build([path], tmp_path / "built", model=str(model), embed_media=True)
    media = tfds.builder_from_directory(tmp_path / "built/media").as_data_source("train")
    assert media[0]["data"] == data


def test_records_that_fail_are_listed(files, model, tmp_path):
    build(files, tmp_path / "built", model=str(model), max_failed=0.2)
    (line,) = (tmp_path / "built/quarantine.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["sample"] == f"{files[0]}:2 (gone)"
    assert failure["reason"].startswith(f"{files[0]}:2: ") and "gone.mp4 does not exist" in failure["reason"]


def test_stages_take_it(tmp_path, clip):
    """The same digest and hashes as from the file; with another processor the data is measured again, and told."""
    write_tiny_run(tmp_path, clip)
    config = tiny_config(tmp_path)
    processor = Processor.from_pretrained(tmp_path / "processor")
    build([tmp_path / "data.jsonl"], tmp_path / "built", model=str(tmp_path / "processor"), embed_media=True)

    def stages(source, processor=processor):
        said: list[str] = []
        data = dataclasses.replace(config.stages[0].data, source=str(source))
        stage = dataclasses.replace(config.stages[0], data=data)
        (found,) = prepare_stages(dataclasses.replace(config, stages=(stage,)), processor, said.append)
        return found.digest, [found.loader(step).hash for step in range(3)], said

    digest, hashes, _ = stages(tmp_path / "data.jsonl")
    found = stages(tmp_path / "built")
    assert found[:2] == (digest, hashes)
    assert not any("another processor" in line for line in found[2])
    assert not list(tmp_path.glob("built.facts-*"))

    tiny_processor_folder(tmp_path / "other", video_pixels=(2048, 4096))
    other = Processor.from_pretrained(tmp_path / "other")
    found = stages(tmp_path / "built", other)
    assert found[:2] == stages(tmp_path / "data.jsonl", other)[:2] and found[0] != digest
    assert f"s0: {tmp_path / 'built'} was built for another processor, so its samples are measured again" in found[2]
    assert list(tmp_path.glob("built.facts-*"))


def test_inspect_and_stats_take_its_processor(files, model, tmp_path, capsys):
    build(files, tmp_path / "built", model=str(model), embed_media=True, max_failed=0.2)
    assert cli.main(["data", "inspect", str(tmp_path / "built"), "--index", "2", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert cli.main(["data", "inspect", files[0], "--index", "3", "--json", "--model", str(model)]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert built["id"] == plain["id"] == "3" and files[0] in built["where"]
    for name in ("tokens", "learnt", "pieces", "ids", "taught", "media"):
        assert built[name] == plain[name], name
    assert cli.main(["data", "stats", str(tmp_path / "built"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["records"], stats["usable"], stats["videos"], stats["images"]) == (6, 6, 4, 1)
    key = processor_key(Processor.from_pretrained(tmp_path / "built/processor"))
    assert key == BuiltSource(tmp_path / "built", Reading()).processor_key


def test_nothing_is_left_of_a_build_that_failed(files, model, tmp_path, monkeypatch):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*1 of 7 samples cannot be used, --max-failed 0\.02 allows 0"):
        build(files, tmp_path / "built", model=str(model))

    def full(*_):
        raise OSError(28, "No space left on device", "built")

    monkeypatch.setattr(build_module, "_finish", full)
    with pytest.raises(OSError, match="No space"):
        build(files, tmp_path / "built", model=str(model), max_failed=0.2)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_medium_that_changes_meanwhile_stops_the_build(files, model, tmp_path, monkeypatch):
    look = build_module._embed

    def embed(lines):
        found = look(lines)
        path = tmp_path / "second/square.png"
        path.write_bytes(path.read_bytes() + b"\0")
        return found

    monkeypatch.setattr(build_module, "_embed", embed)
    with pytest.raises(DataError, match=r"square\.png changed while the data set was built"):
        build(files, tmp_path / "built", model=str(model), embed_media=True, max_failed=0.2)
    assert not (tmp_path / "built").exists()


def test_mistakes(files, model, tmp_path, monkeypatch):
    def built(**options):
        return build(files, tmp_path / "built", model=str(model), max_failed=0.2, **options)

    with pytest.raises(ConfigError, match="--shards 0 must be at least 1"):
        built(shards=0)
    with pytest.raises(ConfigError, match="--shards 9 is more than the 7 records"):
        built(shards=9)
    with pytest.raises(ConfigError, match="--max-failed 2 must be a share"):
        build(files, tmp_path / "built", model=str(model), max_failed=2)
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        build(files, tmp_path / "first", model=str(model))
    with pytest.raises(DataError, match="is not a data set of `qwenvl-jax data build`"):
        open_source(tmp_path / "first")
    (tmp_path / "built").mkdir()
    built()
    metadata = tmp_path / "built/metadata.json"
    text = metadata.read_text()
    metadata.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match="has version 2, this package reads 1; build it again"):
        open_source(tmp_path / "built")
    metadata.write_text(text)
    (shard,) = (tmp_path / "built").glob("*.array_record-*")
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"built cannot be read \(.*copy it again"):
        open_source(tmp_path / "built")[0]
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.public_api", None)
    with pytest.raises(DataError, match=r"pip install 'qwenvl_jax\[tfds\]'"):
        open_source(tmp_path / "built")
