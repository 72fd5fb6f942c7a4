"""Data sets that tensorflow-datasets made serve as they are, and those without facts only as long as they are small."""

import dataclasses
import json
import shutil

import numpy as np
import PIL.Image
import pytest

from qwenvl_jax import cli
from qwenvl_jax.data.build import build
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import Reading, open_source
from qwenvl_jax.data.tfds_source import TfdsSource
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import DataConfig
from qwenvl_jax.train.curriculum import prepare_stages
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import tiny_config, write_tiny_run

tfds = pytest.importorskip(
    "tensorflow_datasets.public_api", reason="tensorflow-datasets, of the extras `tfds` and `test`, is not installed"
)
TEXT = tfds.features.Text()


def make(folder, features, records, splits=("train",), file_format="array_record"):
    """A data set by a builder of tensorflow-datasets; returns its folder."""

    class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "clips"
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            yield from enumerate(records)

    builder = Clips(data_dir=folder, file_format=file_format)
    builder.download_and_prepare(download_dir=folder / "downloads")
    return builder.data_path


@pytest.fixture
def run(tmp_path, clip):
    """A tiny run's folder, and its records as a data set whose messages are JSON; paths are relative to it."""
    write_tiny_run(tmp_path, clip)
    records = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    records = [{"id": record["id"], "messages": json.dumps(record["messages"])} for record in records]
    made = make(tmp_path / "tfds", {"id": TEXT, "messages": TEXT}, records)
    shutil.copy(clip, made / "clip.mp4")
    return tmp_path, made


def stages(folder, source, processor=None, **data):
    """The first stage over this data: its digest, and the hashes of its batches."""
    config = tiny_config(folder)
    stage = dataclasses.replace(config.stages[0], data=DataConfig(source=source, **data))
    processor = processor or Processor.from_pretrained(folder / "processor")
    (found,) = prepare_stages(dataclasses.replace(config, stages=(stage,)), processor, lambda line: None)
    return [step.hash for step in found.batches(0)]


def test_batches_are_those_of_the_records(run, monkeypatch):
    """From the folder, from its data source, and from a data set built of it."""
    folder, made = run
    hashes = stages(folder, str(folder / "data.jsonl"))
    assert stages(folder, str(made)) == hashes
    assert list(made.parent.glob("*.facts-*"))
    build([made], folder / "built", model=str(folder / "processor"), embed_media=True)
    assert stages(folder, str(folder / "built"), measure_at_most=0) == hashes
    # Media paths of objects are used as they are.
    monkeypatch.chdir(folder)
    items = tfds.builder_from_directory(made).as_data_source("train")
    assert stages(folder, items) == hashes


@pytest.mark.slow  # worker processes
@pytest.mark.parametrize("kind", ["folder", "data source"])
def test_workers_read_it(run, monkeypatch, kind):
    folder, made = run
    monkeypatch.chdir(folder)
    source = str(made) if kind == "folder" else tfds.builder_from_directory(made).as_data_source("train")
    assert stages(folder, source, workers=1) == stages(folder, str(folder / "data.jsonl"))


def test_features_become_records(tmp_path):
    """Sequences of turns, numbers, lists, a whole record in one text, pixels."""
    turns = tfds.features.Sequence({"from": TEXT, "value": TEXT})
    talk = [{"from": "human", "value": "wo ist é?"}, {"from": "gpt", "value": "[1, 2]"}]
    said = open_source(make(tmp_path / "a", {"id": TEXT, "conversations": turns}, [{"id": "x", "conversations": talk}]))
    assert isinstance(said, TfdsSource) and len(said) == 1
    messages = said[0].messages
    assert said[0].id == "x" and said[0].content and said[0].where.endswith("1.0.0[0]")
    plain = json.dumps({"id": "x", "conversations": talk}, ensure_ascii=False)
    (tmp_path / "plain.jsonl").write_text(plain)
    assert messages == open_source(tmp_path / "plain.jsonl")[0].messages
    assert json.loads(said.text(0)) == json.loads(plain)

    whole = open_source(make(tmp_path / "b", {"json": TEXT}, [{"json": plain}]))
    assert whole[0].messages == messages and whole.text(0) == plain.encode()

    spans = tfds.features.Tensor(shape=(None, 2), dtype=np.float64)
    features = {"video": TEXT, "timestamps": spans, "sentences": tfds.features.Sequence(TEXT), "n": np.int64}
    captions = {"video": "v.mp4", "timestamps": [[0.5, 2.0], [2.0, 3.25]], "sentences": ["one", "two"], "n": 7}
    source = open_source(make(tmp_path / "c", features, [captions]))
    assert json.loads(source.text(0)) == captions
    assert "3.2" in source[0].messages[1]["content"] and "two" in source[0].messages[1]["content"]
    assert source[0].messages[0]["content"][0]["video"] == str(source.folder / "v.mp4")

    PIL.Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    features = {"image": tfds.features.Image(), "conversations": turns}
    talk = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    pixels = open_source(make(tmp_path / "d", features, [{"image": tmp_path / "red.png", "conversations": talk}]))
    shown = pixels[0].messages[0]["content"][0]["image"]
    assert np.asarray(shown).shape == (48, 64, 3) and pixels[0].content == ""
    tiny_processor_folder(tmp_path / "model")
    processor = Processor.from_pretrained(tmp_path / "model")
    assert processor.measure(pixels[0].messages).grids
    with pytest.raises(DataError, match=r"1\.0\.0\[0\] has pictures as pixels; write them as files"):
        pixels.text(0)


def test_inspect_and_stats(run, capsys):
    folder, made = run
    model = str(folder / "processor")
    for command in ("inspect", "stats"):
        assert cli.main(["data", command, str(made), "--model", model, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["id"] == "clip-0" if command == "inspect" else found["records"] == 4 == found["usable"]


def test_more_than_may_be_measured_is_refused(run, monkeypatch):
    """For files, folders and objects without facts, and for facts of another processor, but not if few are missing."""
    folder, made = run
    model = folder / "processor"
    refused = r"stage s0: .*of 4 samples more than data\.measure_at_most=3 have no facts .*`qwenvl-jax data build`"
    build([folder / "data.jsonl"], folder / "built", model=str(model))
    tiny_processor_folder(folder / "other", video_pixels=(2048, 4096))
    other = Processor.from_pretrained(folder / "other")
    for path in folder.glob("data.jsonl.facts-*"):
        path.unlink()
    monkeypatch.chdir(folder)
    items = tfds.builder_from_directory(made).as_data_source("train")
    for source in (str(folder / "data.jsonl"), str(made), items):
        with pytest.raises(DataError, match=refused):
            stages(folder, source, measure_at_most=3)
        if source is not items:
            stages(folder, source, measure_at_most=4)
            # Measured once, it has facts.
            stages(folder, source, measure_at_most=0)
    # To build it anew as it was built would bring no others.
    refused = r"of 4 samples more than data\.measure_at_most=3 .*\(--model\).*hms_share.*raise it to have them measured"
    with pytest.raises(DataError, match=refused):
        stages(folder, str(folder / "built"), other, measure_at_most=3)
    with pytest.raises(DataError, match=refused):
        stages(folder, str(folder / "built"), measure_at_most=3, hms_share=1.0)
    stages(folder, str(folder / "built"), measure_at_most=0)
    stages(folder, str(folder / "built"), other, measure_at_most=4)
    # A record more, and only that is measured.
    with (folder / "data.jsonl").open("a") as file:
        file.write((folder / "data.jsonl").read_text().splitlines()[-1].replace("describe", "tell") + "\n")
    stages(folder, str(folder / "data.jsonl"), measure_at_most=1)
    with pytest.raises(ConfigError, match=r"data\.measure_at_most=-1 must be at least 0"):
        DataConfig(measure_at_most=-1)


def test_mistakes(run, tmp_path, monkeypatch):
    folder, made = run
    record = {"id": "x", "messages": "no JSON"}
    odd = make(tmp_path / "odd", {"id": TEXT, "messages": TEXT}, [record], splits=("a", "b"))
    with pytest.raises(DataError, match=r"has the splits a, b; call the one to train on 'train'"):
        open_source(odd)
    only = open_source(make(tmp_path / "only", {"id": TEXT, "messages": TEXT}, [record], splits=("a",)))
    with pytest.raises(DataError, match=r'1\.0\.0\[0\]: expected "messages" with at least one message'):
        only[0]
    (shard,) = made.glob("*.array_record-*")
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    with pytest.raises(DataError, match=r"1\.0\.0 cannot be read \(.*copy it again"):
        open_source(made)[0]
    shard.write_bytes(whole)
    model = str(folder / "processor")
    build([made], folder / "built", model=model)
    with pytest.raises(DataError, match=r"built is no data set of tensorflow-datasets, or was built already"):
        build([folder / "built"], folder / "again", model=model)
    assert open_source(made, Reading())[0].id == "clip-0"
