"""`qwenvl-jax data build`: what it writes is read by tensorflow-datasets, and trains as the files that it came from."""

import dataclasses
import errno
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from qwenvl_jax import cli
from qwenvl_jax.data import build as build_module
from qwenvl_jax.data import building as building_module
from qwenvl_jax.data.build import build
from qwenvl_jax.data.building import Building
from qwenvl_jax.data.built import BuiltSource, read_item
from qwenvl_jax.data.facts import facts_digest, measure_each, processor_key
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packing import BatchShape, Plan
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import Reading, Subset, open_source
from qwenvl_jax.errors import ConfigError, DataError, SourceError
from qwenvl_jax.train.curriculum import prepare_stages
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import ROOT, tiny_config, write_records, write_tiny_run

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


def test_what_storage_does_is_no_failure_of_a_record(files, model, tmp_path):
    """Media that cannot be written out, and shards that have gone, stop a run; a damaged record is only left out."""
    processor, built = Processor.from_pretrained(model), tmp_path / "built"
    build(files, built, model=str(model), embed_media=True, max_failed=0.2)
    source = open_source(built, Reading.of(processor))
    facts = tuple(one for one in measure_each(source, processor, processor_key=processor_key(processor)))

    def step(source):
        samples = SampleCache(source, processor, kept=Kept(0))
        return BatchLoader(Plan(facts, SHAPE, seed=0), samples, processor)(0)

    whole = step(source)
    assert not whole.failed
    shutil.rmtree(built / "media-cache")
    (built / "media-cache").write_text("")
    refused = r"media-cache: embedded media are .* cannot be written \(.*\); make room or give leave"
    # The clip of the last record, with boxes in pixels, is looked at as the record is read.
    for fails in (lambda: source[1].fetch(), lambda: source[5], lambda: step(source)):
        with pytest.raises(SourceError, match=refused):
            fails()
    (built / "media-cache").unlink()
    assert step(source).hash == whole.hash

    (shard,) = built.glob("*.array_record-*")
    data = shard.read_bytes()
    shard.rename(tmp_path / "away")
    with pytest.raises(SourceError, match=r"built cannot be read \(open\(\) failed: No such file .*copy it again"):
        step(open_source(built, Reading.of(processor)))

    def damaged(frame: int):
        # Two frames of zstd to a record, then those that tell where records lie.
        at = [found.start() for found in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data)][frame] + 8
        shard.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        return open_source(built, Reading.of(processor))

    with pytest.raises(SourceError, match=r"built cannot be read \(Corrupted .*copy it again"):
        damaged(-1)[1]
    source = damaged(2)
    for index in range(6):
        if index == 1:
            with pytest.raises(DataError, match=r"built\[1\] is damaged \(Corrupted .*copy the folder again") as caught:
                source[index]
            assert not isinstance(caught.value, SourceError)
        else:
            assert source[index].id


@pytest.mark.parametrize(
    ("error", "of_item"),
    [
        (RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch (...), chunk at 9; at byte 90"), True),
        (RuntimeError("Corrupted Riegeli/records file: ...; Failed to read RiegeliPostscript"), False),
        (RuntimeError("read() failed: Input/output error; reading a; at byte 90"), False),
        (RuntimeError("open() failed: Permission denied; opening a"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (ValueError("bytes that are no such message"), True),
    ],
)
def test_whose_fault_an_item_is_that_cannot_be_read(tmp_path, error, of_item):
    class Items:
        def __getitem__(self, index):
            raise error

    with pytest.raises(DataError) as caught:
        read_item(Items(), 7, tmp_path)
    assert isinstance(caught.value, SourceError) != of_item
    assert str(tmp_path) in str(caught.value)


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def many(tmp_path, clip):
    """A JSONL file of more records than are measured at a time, every tenth with a clip, and one that fails."""
    shutil.copy(clip, tmp_path / "clip.mp4")
    parts = [[video("clip.mp4", fps=2.0)] if number % 10 == 0 else [] for number in range(building_module.PART + 45)]
    parts[7] = [video("gone.mp4")]
    records = [{"id": f"r{number}", "messages": conversation("what?", *part)} for number, part in enumerate(parts)]
    return write_records(tmp_path / "many.jsonl", records)


KILLED = """\
import os, signal, sys
from qwenvl_jax.data import build as build_module
from qwenvl_jax.data.building import Building

source, destination, model, work, after = sys.argv[1:]
do = getattr(Building, work)

def killed(self, *arguments):
    if arguments[-1] == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    do(self, *arguments)

setattr(Building, work, killed)
build_module.build([source], destination, model=model, embed_media=True, shards=12)
"""


@pytest.mark.parametrize(
    "work",
    ["write_records", *(pytest.param(work, marks=pytest.mark.slow) for work in ("measure", "write_media"))],
)
def test_a_build_that_was_killed_goes_on(many, model, tmp_path, monkeypatch, work):
    """What is done is not done again, and the data set is that of a build that nobody killed."""
    built, after = tmp_path / "built", {"measure": 1, "write_records": 7, "write_media": 0}[work]
    arguments = [str(many), str(built), str(model), work, str(after)]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT).returncode == -signal.SIGKILL
    assert not built.exists()
    folder = tmp_path / ".built.building"
    done = {path.name: path.stat().st_ino for path in folder.glob("records/*-of-00012")}
    assert len(done) == {"measure": 0, "write_records": 7, "write_media": 12}[work]

    for path in tmp_path.glob("many.jsonl.facts-*"):
        path.unlink()
    measured = []
    measure = Processor.measure
    monkeypatch.setattr(Processor, "measure", lambda *a, **k: measured.append(a) or measure(*a, **k))
    build([many], built, model=str(model), embed_media=True, shards=12)
    # The record that fails is looked at again.
    assert len(measured) == (45 + 1 if work == "measure" else 1)
    assert not folder.exists()
    kept = {path.name.partition("record-")[2]: path.stat().st_ino for path in built.glob("*.array_record-*")}
    assert {name: kept[name] for name in done} == done
    for path in tmp_path.glob("many.jsonl.facts-*"):
        path.unlink()
    build([many], tmp_path / "at once", model=str(model), embed_media=True, shards=12)
    assert tree(built) == tree(tmp_path / "at once")


@pytest.mark.parametrize("embed_media", [False, True])
def test_what_changed_since_the_build_was_killed_is_made_again(many, model, tmp_path, run_ffmpeg, embed_media):
    """Media by their size and time, shards by what is in them, lines by the file."""

    def killed(destination):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "_assemble", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build([many], destination, model=str(model), embed_media=embed_media, shards=2)

    def again(destination):
        build([many], destination, model=str(model), embed_media=embed_media, shards=2)
        return tree(destination)

    killed(tmp_path / "a")
    run_ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=12:duration=3", "-pix_fmt", "yuv420p", many.parent / "clip.mp4"
    )
    found = again(tmp_path / "a")
    assert found == again(tmp_path / "b")
    killed(tmp_path / "c")
    many.write_text(many.read_text().replace("what?", "when?", 1))
    assert again(tmp_path / "c") == again(tmp_path / "d") != found


def test_a_build_that_failed_leaves_no_data_set(files, model, tmp_path, monkeypatch):
    """But what was measured, for the next one, and nothing after that."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*1 of 7 samples cannot be used, --max-failed 0\.02 allows 0"):
        build(files, tmp_path / "built", model=str(model))

    def full(*_):
        raise OSError(28, "No space left on device", "built")

    monkeypatch.setattr(build_module, "_list", full)
    with pytest.raises(OSError, match="No space"):
        build(files, tmp_path / "built", model=str(model), max_failed=0.2)
    assert {path.name for path in tmp_path.iterdir()} - before == {".built.building"}
    monkeypatch.undo()
    build(files, tmp_path / "built", model=str(model), max_failed=0.2)
    assert {path.name for path in tmp_path.iterdir()} - before == {"built"}


def test_two_builds_of_one_data_set(files, model, tmp_path):
    """The second is refused as long as the first one runs."""
    with (
        build_module._held(tmp_path / "built"),
        pytest.raises(ConfigError, match="built is being built by another process"),
    ):
        build(files, tmp_path / "built", model=str(model), max_failed=0.2)


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam", reason="apache-beam, of the extra `beam`, is not installed")


IN_PROCESSES = ["direct_running_mode=multi_processing", "direct_num_workers=2"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["direct_running_mode=multi_threading", "direct_num_workers=2"], marks=pytest.mark.slow),
        pytest.param(IN_PROCESSES, marks=pytest.mark.slow),
    ],
)
def test_beam_builds_the_same(many, model, tmp_path, beam, options):
    """Every file, byte for byte, also with more than ten shards, and with those of different lengths."""
    build([many], tmp_path / "here", model=str(model), embed_media=True, shards=12)
    for path in tmp_path.glob("many.jsonl.facts-*"):
        path.unlink()
    arguments = ["data", "build", str(many), str(tmp_path / "beam"), "--model", str(model), "--embed-media"]
    arguments += ["--shards", "12", "--beam", "DirectRunner"]
    assert cli.main([*arguments, *(word for option in options for word in ("--beam-option", option))]) == 0
    assert tree(tmp_path / "beam") == tree(tmp_path / "here")
    records = tfds.builder_from_directory(tmp_path / "beam").as_data_source("train")
    assert [record["id"].decode() for record in records] == [f"r{i}" for i in range(len(records) + 1) if i != 7]
    assert not (tmp_path / ".beam.building").exists()


@pytest.mark.parametrize("runner", [None, "DirectRunner"])
def test_a_medium_that_changes_meanwhile_stops_the_build(files, model, tmp_path, monkeypatch, request, runner):
    if runner:
        request.getfixturevalue("beam")
    look = Building.number_media

    def change(self, shard_bytes):
        found = look(self, shard_bytes)
        path = tmp_path / "second/square.png"
        path.write_bytes(path.read_bytes() + b"\0")
        return found

    monkeypatch.setattr(Building, "number_media", change)
    options = {"model": str(model), "embed_media": True, "max_failed": 0.2, "beam": runner}
    with pytest.raises(DataError, match=r"b\.jsonl:1: the record or its media changed while the data set was built"):
        build(files, tmp_path / "built", **options)
    assert not (tmp_path / "built").exists()
    monkeypatch.undo()
    build(files, tmp_path / "built", **options)
    media = tfds.builder_from_directory(tmp_path / "built/media").as_data_source("train")
    assert (tmp_path / "second/square.png").read_bytes() in [medium["data"] for medium in media]


def test_mistakes_with_beam(files, model, tmp_path, beam, monkeypatch):
    def built(**options):
        return build(files, tmp_path / "built", model=str(model), max_failed=0.2, **options)

    with pytest.raises(ConfigError, match="--beam NoRunner: Beam has no such runner"):
        built(beam="NoRunner")
    with pytest.raises(ConfigError, match="--beam-option direct_workers: Beam has no such option"):
        built(beam="DirectRunner", beam_options=["direct_workers=2"])
    monkeypatch.setattr(Building, "write_records", lambda *_: 1 / 0)
    with pytest.raises(DataError, match=r"--beam DirectRunner: the pipeline failed \(.*division by zero"):
        built(beam="DirectRunner")
    with pytest.raises(DataError, match="must lie on a file system that all of its workers share"):
        Building(tmp_path / "elsewhere")


def test_mistakes(files, model, tmp_path, monkeypatch):
    def built(**options):
        return build(files, tmp_path / "built", model=str(model), max_failed=0.2, **options)

    with pytest.raises(ConfigError, match="--shards 0 must be at least 1"):
        built(shards=0)
    with pytest.raises(ConfigError, match="--shards 9 is more than the 7 records"):
        built(shards=9)
    with pytest.raises(ConfigError, match="--beam-option is for --beam; name a runner"):
        built(beam_options=["direct_num_workers=2"])
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
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DataError, match=r"--beam needs Apache Beam .*pip install 'qwenvl_jax\[beam\]'"):
        build(files, tmp_path / "on beam", model=str(model), beam="DirectRunner")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.public_api", None)
    with pytest.raises(DataError, match=r"pip install 'qwenvl_jax\[tfds\]'"):
        open_source(tmp_path / "built")
