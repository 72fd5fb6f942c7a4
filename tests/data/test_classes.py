"""Which class each token is of: its data set, and whether its sample shows a video, an image or text alone."""

import dataclasses

import numpy as np

from qwenvl_jax.data.classes import SampleClass
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.train.curriculum import prepare_stages
from tests.data.mixed import mixed_config


def stage_of(config):
    processor = Processor.from_pretrained(config.processor)
    (stage,) = prepare_stages(config, processor, lambda line: None)
    return stage


def test_of_a_mixture(mixed_folder):
    """Over real text, pictures and clips: each token has the class of the record that it comes from."""
    stage = stage_of(mixed_config(mixed_folder))
    names = [("text", "text"), ("pictures", "image"), ("clips", "video")]
    assert stage.classes == tuple(SampleClass(*name) for name in names)
    planned = stage.loader(0)
    classes, segments = planned.batch.classes, planned.batch.segment_ids
    assert classes.dtype == np.int32
    failed = {failure.sample for failure in planned.failed}
    for b, row in enumerate(stage.loader.plan[0]):
        kept = [entry for entry in row if stage.loader.plan.facts[entry].name not in failed]
        for number, entry in enumerate(row, 1):
            if entry not in kept:
                continue
            # Named `file.jsonl:line (record)`.
            expected = ("text", "picture", "clip").index(
                stage.loader.plan.facts[entry].name.split("(")[1].split("-")[0]
            )
            assert set(classes[b, segments[b] == number]) == {expected + 1}
    assert (classes[segments == 0] == 0).all()
    assert set(np.unique(classes)) == {0, 1, 2, 3}


def test_batches_are_the_same_on_every_mesh(mixed_folder):
    """Rows that round up those of a group for its devices stay empty: samples are packed and placed without them."""
    config = mixed_config(mixed_folder)
    shape = dataclasses.replace(config.stages[0].batch, vision="auto")
    config = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], batch=shape),))
    processor, said = Processor.from_pretrained(config.processor), []
    (alone,) = prepare_stages(config, processor, lambda line: None)
    (shared,) = prepare_stages(config, processor, said.append, vision_rows_multiple=7)
    (chosen,) = {stage.loader.plan.shape.vision for stage in (alone, shared)}
    assert any(rows % 7 for rows, _ in chosen)
    assert any(line.endswith("empty rows up to a multiple of 7 for this mesh") for line in said)
    for step in range(3):
        one, other = alone.loader(step), shared.loader(step)
        assert (one.hash, one.tokens) == (other.hash, other.tokens)
        for name in ("tokens", "positions", "segment_ids", "targets", "classes"):
            np.testing.assert_array_equal(getattr(one.batch, name), getattr(other.batch, name))
        assert (one.batch.vision_index < 0).tolist() == (other.batch.vision_index < 0).tolist()
        for (rows, _), few, many in zip(chosen, one.batch.vision, other.batch.vision, strict=True):
            assert few.patches.shape[1] == rows and many.patches.shape[1] == -(-rows // 7) * 7
            np.testing.assert_array_equal(few.patches, many.patches[:, :rows])
            np.testing.assert_array_equal(few.segment_ids, many.segment_ids[:, :rows])
            assert not many.segment_ids[:, rows:].any()


def test_of_a_single_data_set(mixed_folder):
    """The records of one file are told apart by what they show."""
    config = mixed_config(mixed_folder)
    data = dataclasses.replace(config.stages[0].data, mixture=(), source=str(mixed_folder / "data.jsonl"))
    stage = stage_of(dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], data=data),)))
    assert stage.classes == (SampleClass("data", "text"), SampleClass("data", "video"))
    batch = stage.loader(0).batch
    sees = np.zeros(batch.tokens.shape, bool)
    for b in range(len(sees)):
        for number in range(1, batch.segment_ids[b].max() + 1):
            of_sample = batch.segment_ids[b] == number
            sees[b, of_sample] = (batch.vision_index[b, of_sample] >= 0).any()
    assert sees.any()
    np.testing.assert_array_equal(batch.classes, np.where(batch.segment_ids == 0, 0, 1 + sees))


def test_a_batch_of_prompts_has_none(tiny_checkpoint):
    processor = Processor.from_pretrained(tiny_checkpoint)
    assert processor([[{"role": "user", "content": "hello"}]], add_generation_prompt=True).classes is None
