"""A run's data settings reach the samples: the format of the records, and the share that tell times as H:M:S."""

import dataclasses
import json

import fsspec
import numpy as np
import pytest

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import DataConfig
from qwenvl_jax.train.curriculum import prepare_stages
from tests.train.tiny_run import tiny_config, write_records, write_tiny_run

RECORD = {"id": "a", "video": {"video": "clip.mp4", "fps": 2.0}, "event": "b", "start": 0.5, "end": 1.5}
CAPTIONS = {"captions": [{"start": 0, "end": 1, "caption": "c"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, clip)
    turns = [{"from": "human", "value": "<video>when"}, {"from": "gpt", "value": "now"}]
    llava = {"id": "b", "video": RECORD["video"], "conversations": turns}
    write_records(folder / "data.jsonl", [RECORD, llava])
    write_records(folder / "both.jsonl", [{**RECORD, **CAPTIONS}])
    return folder


def prepared(folder, seed=0, **options):
    """The processor, and the stages of a run whose second stage has these data settings."""
    config = tiny_config(folder)
    data = DataConfig(**{"source": str(folder / "data.jsonl"), **options})
    stages = (config.stages[0], dataclasses.replace(config.stages[1], data=data))
    processor = Processor.from_pretrained(config.processor)
    return processor, prepare_stages(
        dataclasses.replace(config, stages=stages, seed=seed), processor, lambda line: None
    )


def learnt(processor, stage) -> set[str]:
    """What the batches of a stage teach."""
    said = set()
    for step in range(stage.config.steps):
        batch = stage.loader(step).batch
        targets = np.asarray(batch.targets)[np.asarray(batch.loss_weights) > 0]
        said |= set(processor.decode(targets, skip_special_tokens=False).split("<|im_end|>\n"))
    return said - {""}


def test_formats_and_times_of_each_stage(folder):
    processor, (first, second) = prepared(folder, hms_share=1.0)
    assert learnt(processor, first) == {"From <0.5 seconds> to <1.5 seconds>.", "now"}
    assert learnt(processor, second) == {"From <00:00:00.5> to <00:00:01.5>.", "now"}
    assert first.digest != second.digest


def test_the_seed_of_the_run_chooses(folder):
    answers = set()
    for seed in range(6):
        processor, (_, second) = prepared(folder, seed=seed, hms_share=0.5)
        answers |= learnt(processor, second) - {"now"}
    assert len(answers) == 2


def test_the_format_of_a_stage(folder):
    both = str(folder / "both.jsonl")
    with pytest.raises(DataError, match=r"stage s1: .*both\.jsonl:1: .*set the data's format"):
        prepared(folder, source=both)
    processor, (_, second) = prepared(folder, source=both, format="dense_captions")
    assert learnt(processor, second) == {"<0.0 seconds> to <1.0 seconds>: c"}
    for options in ({"format": "lava"}, {"hms_share": 2.0}):
        with pytest.raises(ConfigError, match=f"stage s1: {next(iter(options))}"):
            prepared(folder, **options)


def test_coordinates_are_those_of_the_model(folder):
    place = {"event": "b", "coordinates": "pixels", "boxes": [{"time": 1, "box": [12, 16, 48, 64]}]}
    source = write_records(folder / "boxes.jsonl", [{"video": RECORD["video"], **place}])
    processor, (_, second) = prepared(folder, source=str(source))
    (answer,) = learnt(processor, second)
    assert json.loads(answer) == [{"time": "<1.0 seconds>", "bbox_2d": [125, 250, 500, 1000]}]


def test_media_of_a_stage_that_may_be_fetched(folder, clip):
    store = fsspec.filesystem("memory")
    store.pipe("/clips/clip.mp4", clip.read_bytes())
    remote = {**RECORD, "video": {"video": "memory://clips/clip.mp4", "fps": 2.0}}
    write_records(folder / "here.jsonl", [RECORD])
    there = str(write_records(folder / "there.jsonl", [remote]))
    for prefixes in ((), ("memory://other/",)):
        with pytest.raises(DataError, match=r"stage s1: .*clip\.mp4 is not on this machine, and fetching it is not"):
            prepared(folder, source=there, remote_media=prefixes)
    with pytest.raises(ConfigError, match="stage s1: remote_media must be a list"):
        prepared(folder, source=there, remote_media=("clips",))
    _, (_, fetched) = prepared(folder, source=there, remote_media=("memory://clips/",))
    _, (_, local) = prepared(folder, source=str(folder / "here.jsonl"))
    assert fetched.loader(0).failed == () and fetched.loader(0).hash == local.loader(0).hash
    store.store.clear()
