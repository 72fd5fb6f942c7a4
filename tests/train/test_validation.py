"""Validation: what a model answers and its loss on data apart, without touching the training."""

import dataclasses
import signal
import threading

import jax
import numpy as np
import pytest

from qwenvl_jax.data.mixture import MixturePart
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError, DataError, MediaError
from qwenvl_jax.generate import Answer
from qwenvl_jax.train import validation as validation_module
from qwenvl_jax.train.config import TrainConfig
from qwenvl_jax.train.curriculum import prepare_stages
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.step import make_loss
from qwenvl_jax.train.validation import Validation, make_evaluation, prepare_validation
from tests.train.judged import judged_config, write_judged_run
from tests.train.test_profile import traced
from tests.train.test_step import ModelParts, single_device_mesh
from tests.train.test_tracking import scalars
from tests.train.tiny_run import command_line, killed, tiny_config

pytestmark = pytest.mark.usefixtures("promotion_as_usual")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("run")
    write_judged_run(folder, clip)
    return folder


def prepared(config: TrainConfig):
    processor = Processor.from_pretrained(config.processor)
    stages = prepare_stages(config, processor, lambda line: None)
    return stages[0], prepare_validation(config, stages, processor, lambda line: None)


def test_loss(folder, tmp_path):
    """That of the records themselves, each once; the words alone, and nothing is asked."""
    words = MixturePart("", str(folder / "held-words.jsonl"))
    stage, held_out = prepared(judged_config(folder, data=(words,), answers=0))
    ((one,),) = held_out
    assert (one.name, one.batches) == ("data", 1)
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    params = parts.random(0)
    validation = Validation(tmp_path / "validation.jsonl", 0, held_out=held_out, parts=parts, say=lambda line: None)
    line = validation.judge(stage, 2, params)
    validation.close()
    assert line == {"step": 2, "stage": "s1", "losses": line["losses"], "answers": []}
    assert read_metrics(tmp_path / "validation.jsonl") == [line]
    expected = float(make_loss(parts, stage.config)(params, one.loader(0).batch))
    np.testing.assert_allclose(line["losses"]["data"], expected, rtol=1e-5)


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_are_made_by_the_threads_of_the_stage(folder, tmp_path, threads):
    """With the losses of batches made one after the other; and closed when the run stops in their midst."""
    words = MixturePart("", str(folder / "held-words.jsonl"))
    stage, ((one,),) = prepared(judged_config(folder, data=(words,), answers=0))
    data = dataclasses.replace(stage.config.data, threads=threads)
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, data=data))
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    params, made_by = parts.random(0), []

    def load(number: int):
        made_by.append(threading.current_thread() is threading.main_thread())
        return one.loader(number // 4)

    several = dataclasses.replace(one, loader=load, batches=4)
    validation = Validation(tmp_path / "validation.jsonl", 0, held_out=[[several]], parts=parts, say=print)
    line = validation.judge(stage, 2, params)
    expected = float(make_loss(parts, stage.config)(params, one.loader(0).batch))
    np.testing.assert_allclose(line["losses"]["data"], expected, rtol=1e-5)
    assert made_by == [threads == 0] * 4
    assert validation.judge(stage, 4, params, iter([False, True]).__next__) is None
    validation.close()


def test_microbatches(folder):
    """The loss of the whole, with the activations of a part of it."""
    words = MixturePart("", str(folder / "held-words.jsonl"))
    config = judged_config(folder, data=(words,), answers=0)
    batch = BatchShape(rows=2, length=160, groups=2, vision=((8, 24),))
    config = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], batch=batch),))
    stage, ((one,),) = prepared(config)
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    params, batch = parts.random(0), one.loader(0).batch
    rooms, sums = [], []
    for count in (1, 2):
        config = dataclasses.replace(stage.config, microbatches=count)
        compiled = jax.jit(make_evaluation(parts, config)).lower(params, batch).compile()
        rooms.append(compiled.memory_analysis().temp_size_in_bytes)
        sums.append([float(value) for value in compiled(params, batch)])
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)
    assert sums[0][1] > 0 and rooms[1] < 0.7 * rooms[0]


def test_answers_are_given_as_the_stage_attends(folder, tmp_path, monkeypatch):
    words = MixturePart("", str(folder / "held-words.jsonl"))
    stage, ((one,),) = prepared(judged_config(folder, data=(words,), answers=1))
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    seen: list[str] = []
    monkeypatch.setattr(
        validation_module, "answers", lambda model, *_, **__: seen.append(model.execution.attention) or [Answer("", [])]
    )
    validation = Validation(tmp_path / "validation.jsonl", 0, held_out=[[one]], parts=parts, say=print)
    params = parts.random(0)
    for attention in ("splash", "plain"):
        validation._answers(one, dataclasses.replace(stage.config, attention=attention), 2, params, lambda: False)
    validation.close()
    assert seen == ["splash", "plain"]


def test_what_a_process_cannot_fetch_none_asks(folder, tmp_path):
    """Nor does it end the run: those that are asked together are left out, with a line where it is missing."""
    words = MixturePart("", str(folder / "held-words.jsonl"))
    stage, ((one,),) = prepared(judged_config(folder, data=(words,), answers=2))

    def missing():
        raise MediaError("gs://bucket/a.png is not there")

    gone = dataclasses.replace(one, asked=(dataclasses.replace(one.asked[0], fetch=missing), *one.asked[1:]))
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    params = parts.random(0)
    for held_out, of_others, lines in ((gone, "", 1), (one, "missing", 0)):
        told, asked = [], []

        def gather(name, text, asked=asked, of_others=of_others):
            asked.append((name, text))
            return [text, of_others]

        validation = Validation(
            tmp_path / "validation.jsonl",
            0,
            held_out=[[held_out]],
            parts=parts,
            say=print,
            tell=told.append,
            gather=gather,
        )
        assert validation._answers(held_out, stage.config, 2, params, lambda: False) == []
        assert len(told) == lines and all("is not asked: gs://bucket/a.png is not there" in line for line in told)
        assert asked == [("asked/2/data/0", "missing" if lines else "")]
        validation.close()


def test_what_cannot_be_decoded_is_not_asked(folder, tmp_path):
    """A picture may be found, and measured, and be damaged behind its head: the run goes on and says so."""
    words = MixturePart("", str(folder / "held-words.jsonl"))
    stage, ((one,),) = prepared(judged_config(folder, data=(words,), answers=1))
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    image = {"type": "image", "image": str(tmp_path / "damaged.png")}
    messages = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "nothing"}]
    damaged = dataclasses.replace(one, asked=(dataclasses.replace(one.asked[0], id="odd", messages=messages),))
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    told: list[str] = []
    validation = Validation(
        tmp_path / "validation.jsonl", 0, held_out=[[damaged]], parts=parts, say=print, tell=told.append
    )
    assert validation._answers(damaged, stage.config, 2, parts.random(0), lambda: False) == []
    validation.close()
    assert len(told) == 1 and "data: odd: not asked: " in told[0] and "damaged.png" in told[0]


def test_records_are_asked_with_their_own_settings(folder, tmp_path, monkeypatch):
    """All that a record tells the processor in training it tells when it is asked: the form of times, too."""
    words = MixturePart("", str(folder / "held-words.jsonl"))
    config = judged_config(folder, data=(words,), answers=1)
    data = dataclasses.replace(config.stages[0].data, hms_share=1.0)
    config = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], data=data),))
    stage, ((one,),) = prepared(config)
    assert one.asked[0].options["time_format"] == "hms"
    parts = ModelParts(tiny_config(folder).model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    seen: list[str] = []
    sample = Processor.sample
    monkeypatch.setattr(
        Processor,
        "sample",
        lambda self, *given, **named: seen.append(named["time_format"]) or sample(self, *given, **named),
    )
    validation = Validation(tmp_path / "validation.jsonl", 0, held_out=[[one]], parts=parts, say=print)
    assert len(validation._answers(one, stage.config, 2, parts.random(0), lambda: False)) == 1
    validation.close()
    assert seen == ["hms"]


@pytest.mark.slow
def test_loss_and_answers(folder, tmp_path, caplog):
    """Against the loss of the records themselves; asked twice, nothing is compiled twice."""
    config = judged_config(folder)
    stage, held_out = prepared(config)
    clips, words = held_out[0]
    # Each sample once: two clips in rows of 160 tokens, six short texts in one batch.
    assert [one.name for one in held_out[0]] == ["clips", "words"]
    assert sorted(e for one in range(words.batches) for row in words.loader.plan[one] for e in row) == list(range(6))
    parts = ModelParts(config.model, dtype="float32", param_dtype="float32", mesh=single_device_mesh())
    params = parts.random(0)
    said: list[str] = []
    validation = Validation(tmp_path / "validation.jsonl", 0, held_out=held_out, parts=parts, say=said.append)
    assert [validation.due(stage, step) for step in range(6)] == [False, False, True, False, True, True]
    first = validation.judge(stage, 2, params)
    assert not validation.due(stage, 2)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        again = validation.judge(stage, 4, params)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert not compiled
    validation.close()
    assert again == {**first, "step": 4}
    assert read_metrics(tmp_path / "validation.jsonl") == [first, again]
    assert words.batches == 1
    expected = float(make_loss(parts, stage.config)(params, words.loader(0).batch))
    np.testing.assert_allclose(first["losses"]["words"], expected, rtol=1e-5)
    assert f"words {first['losses']['words']:.4f}" in said[0]
    assert [(one["data"], one["id"], one["question"], one["truth"]) for one in first["answers"]] == [
        ("clips", "clip-0", "when does the red circle leave?", "at 0 seconds"),
        ("clips", "clip-1", "when does the blue circle leave?", "at 1 seconds"),
        ("words", "w0", "", "a blue circle"),
        ("words", "w1", "what ", "a blue circle"),
    ]
    assert clips.asked[0].messages[-1]["role"] == "assistant"  # what is asked leaves records as they are


@pytest.mark.slow
def test_training_is_not_touched(folder):
    """Killed in step 5 and started again: the losses, batches and weights of a run that nobody judged."""
    plain, out = folder / "plain", folder / "judged"
    done = command_line("train", folder / "plain.py", "--out", plain)
    assert done.returncode == 0, done.stderr
    dead = killed("SIGKILL:step:4", folder / "judged.py", out)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert [line["step"] for line in read_metrics(out / "validation.jsonl")] == [2]
    more = ("--track", "tensorboard", "--profile", "5-5")
    done = command_line("train", folder / "judged.py", "--out", out, *more)
    assert done.returncode == 0, done.stderr
    for file in ("config.json", "metrics.jsonl", "model/model.safetensors"):
        assert (out / file).read_bytes() == (plain / file).read_bytes()
    found = read_metrics(out / "validation.jsonl")
    assert [line["step"] for line in found] == [2, 4, 5]
    assert found[2]["losses"]["words"] < found[0]["losses"]["words"]
    assert not read_metrics(plain / "validation.jsonl")
    # Asked for by the second process, and level with the first; the trace is of the step asked for.
    assert [step for step, _ in scalars(out / "tensorboard", "loss")] == [1, 2, 3, 4, 5]
    losses = [(step, round(value, 5)) for step, value in scalars(out / "tensorboard", "validation/losses/words")]
    assert losses == [(line["step"], round(line["losses"]["words"], 5)) for line in found]
    assert traced(out / "profile") == [5]
    page = (out / "report.html").read_text()
    assert "<h3>validation loss</h3>" in page and "when does the red circle leave?" in page

    # Asked for when the run is done: it is judged where it ended, and the report tells of it.
    assert "validation, words" not in (plain / "report.html").read_text()
    done = command_line("train", folder / "judged.py", "--out", plain, "--profile", "1-2")
    assert done.returncode == 0 and "nothing is traced: --profile asks for steps 1 to 2" in done.stderr, done.stderr
    (line,) = read_metrics(plain / "validation.jsonl")
    assert (line["step"], line["losses"]) == (5, found[2]["losses"])
    assert "validation, words" in (plain / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"every": 0}, r"validation\.every=0 must be at least 1"),
        ({"batches": 0}, r"validation\.batches=0"),
        ({"answers": -1}, r"validation\.answers=-1 must be at least 0"),
        ({"max_new_tokens": 0}, r"validation\.max_new_tokens=0"),
        ({"data": (MixturePart("a", "x"), MixturePart("a", "y"))}, "no two the same"),
        ({"data": (MixturePart("a", "x", weight=2.0),)}, "'a' has weight=2.0, but data sets are judged one by one"),
    ],
)
def test_settings_that_mean_nothing(folder, changes, told):
    with pytest.raises(ConfigError, match=told):
        judged_config(folder, **changes)


def test_data_that_is_missing_is_told_before_the_first_step(folder):
    config = judged_config(folder, data=(MixturePart("gone", str(folder / "gone.jsonl")),))
    with pytest.raises(DataError, match=r"stage s1, validation: .*gone\.jsonl cannot be read"):
        prepared(config)
