"""A run in this process: compiled once a stage, over one device or eight, from given weights or random ones."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qwenvl_jax as qv
from qwenvl_jax.convert.to_native import convert
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.pipeline import BatchLoader
from qwenvl_jax.errors import CheckpointError, ConfigError, DataError
from qwenvl_jax.models import pretrained
from qwenvl_jax.train import loop
from qwenvl_jax.train.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics
from tests.checkpoint.test_fp8 import CONFIG, KERNELS, numbers, quantize
from tests.train.tiny_run import tiny_config, write_records, write_tiny_run

pytestmark = pytest.mark.usefixtures("promotion_as_usual")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, clip)
    return folder


def one_stage(folder, **changes) -> TrainConfig:
    config = tiny_config(folder)
    return dataclasses.replace(config, stages=(dataclasses.replace(config.stages[1], **changes),))


@pytest.mark.slow
def test_a_run_compiles_its_step_once(folder, tmp_path, caplog, capsys):
    """Steps with and without pixels, through a checkpoint, all have the shapes that the first was compiled for."""
    config = one_stage(folder, steps=6)
    lines = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        result = train(config, tmp_path / "out", on_step=lines.append)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert sum("jit(step)" in message for message in compiled) == 1
    assert result.step == result.steps == 6
    # What the first batch took was before the clock was started, after compiling.
    assert all(int(share) <= 100 for share in re.findall(r"waits for data (\d+)%", capsys.readouterr().err))
    assert lines == read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]

    # The model is a model of the public layout, with its processor, and knows what it was taught.
    model, processor = (
        qv.QwenVL.from_pretrained(result.model, dtype="float32"),
        qv.Processor.from_pretrained(result.model),
    )
    assert model.config == config.model
    assert processor.dialect == "official"

    # It is where another run begins.
    second = dataclasses.replace(config, init=str(result.model), checkpoint_every=100)
    second = dataclasses.replace(second, stages=(dataclasses.replace(second.stages[0], steps=1),))
    train(second, tmp_path / "second")
    assert "starting from the weights of" in (tmp_path / "second" / "train.log").read_text()
    assert read_metrics(tmp_path / "second" / "metrics.jsonl")[0]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_a_wait_beside_a_step_costs_what_the_devices_wait(folder, tmp_path, monkeypatch):
    """Batches that take 0.6 s to make, beside steps of half a second on the devices: a tenth is lost."""
    make, make_step = BatchLoader.__call__, loop._Run._compile

    def slowly(loader, number):
        time.sleep(0.6)
        return make(loader, number)

    def long_step(run, *arguments):
        compiled = make_step(run, *arguments)

        def computed(loss):
            time.sleep(0.5)
            return np.float32(1)

        late = jax.jit(lambda loss: jax.pure_callback(computed, jax.ShapeDtypeStruct((), jnp.float32), loss))

        def step(*given):
            state, output = compiled(*given)
            return state, dataclasses.replace(output, loss=late(output.loss))

        return step

    monkeypatch.setattr(BatchLoader, "__call__", slowly)
    monkeypatch.setattr(loop._Run, "_compile", long_step)
    config = one_stage(folder, steps=6)
    data = dataclasses.replace(config.stages[0].data, threads=0)
    stage = dataclasses.replace(config.stages[0], data=data)
    train(dataclasses.replace(config, stages=(stage,), checkpoint_every=100), tmp_path / "out")
    lines = read_metrics(tmp_path / "out" / "timings.jsonl")[1:-1]
    assert all(line["seconds"] > 0.55 for line in lines), lines
    assert 0.03 < np.median([line["wait"] for line in lines]) < 0.4, lines


@pytest.mark.slow
def test_only_what_is_trainable_moves_and_an_optimizer_is_carried_if_asked(folder, tmp_path):
    """Two stages for the mergers over one sample: carrying Adam's moments they are one longer stage, bit for bit."""
    text = (folder / "data.jsonl").read_text().splitlines()[0]
    (folder / "one.jsonl").write_text(text)
    stage = dataclasses.replace(
        tiny_config(folder).stages[0],
        steps=2,
        data=DataConfig(source=str(folder / "one.jsonl")),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
    )
    second = dataclasses.replace(stage, name="second")
    runs = {
        "long": (dataclasses.replace(stage, steps=4),),
        "carried": (stage, dataclasses.replace(second, carry_optimizer=True)),
        "fresh": (stage, second),
    }
    losses, weights = {}, {}
    for name, stages in runs.items():
        result = train(dataclasses.replace(tiny_config(folder), stages=stages), tmp_path / name)
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        model = qv.QwenVL.from_pretrained(result.model, dtype="float32")
        weights[name] = {
            ".".join(map(str, path)): np.asarray(variable.get_value())
            for path, variable in nnx.to_flat_state(nnx.state(model))
        }
    assert losses["carried"] == losses["long"]
    assert losses["fresh"][:3] == losses["long"][:3]
    assert losses["fresh"][3] != losses["long"][3]
    moved = {weight for weight, value in weights["long"].items() if not np.array_equal(value, weights["fresh"][weight])}
    assert {weight.split(".")[0] for weight in moved} == {"merger", "deepstack"}
    with pytest.raises(ConfigError, match="carry_optimizer needs a stage before it"):
        stages = (dataclasses.replace(stage, carry_optimizer=True),)
        train(dataclasses.replace(tiny_config(folder), stages=stages), tmp_path / "no")


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(folder, tmp_path):
    """Weights split over eight devices, rows and vision groups too."""
    batch = BatchShape(rows=8, length=80, groups=8, vision=((4, 24),))
    config = one_stage(folder, batch=batch, steps=3)
    train(config, tmp_path / "one")
    train(dataclasses.replace(config, mesh=MeshConfig()), tmp_path / "eight")
    one, eight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    assert [line["batch"] for line in one] == [line["batch"] for line in eight]
    np.testing.assert_allclose([line["loss"] for line in one], [line["loss"] for line in eight], rtol=1e-4)


def test_data_that_cannot_be_trained_on_is_refused_before_anything_else(folder, tmp_path):
    """Every stage's data is looked at first; a folder made for the run is removed again, one that was there stays."""
    records = [
        {"id": "short", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"id": "long", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c " * 99}]},
    ]
    path = write_records(tmp_path / "long.jsonl", records)
    config = tiny_config(folder)
    bad = dataclasses.replace(config.stages[1], data=DataConfig(source=str(path)))
    config = dataclasses.replace(config, stages=(config.stages[0], bad))
    with pytest.raises(DataError, match=r"stage s1: .*long\.jsonl:2 .long. has \d+ tokens.*batch\.length=160"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    missing = dataclasses.replace(bad, data=DataConfig(source=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match=r"stage s1: data file .*none\.jsonl cannot be read"):
        train(dataclasses.replace(config, stages=(config.stages[0], missing)), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "train.log"}


def test_settings_that_do_not_go_together(folder, tmp_path):
    config = tiny_config(folder)
    shape = config.model
    with pytest.raises(ConfigError, match="image_token_id"):
        train(dataclasses.replace(config, model=dataclasses.replace(shape, image_token_id=3)), tmp_path / "a")
    older = dataclasses.replace(shape, model_type="qwen2_5_vl")
    with pytest.raises(ConfigError, match="a qwen2_5_vl, but the processor is that of qwen3_vl and qwen3_vl_moe"):
        train(dataclasses.replace(config, model=older), tmp_path / "a")
    for name, value, refused in (
        ("temporal_patch_size", 1, r"\d+ values in a patch, the model \d+;"),
        ("spatial_merge_size", 1, "2 patches to the side of a merged token, the model 1;"),
        ("window_size", 112, r"0 merged tokens to the side of a window, the model \d+;"),
    ):
        other = dataclasses.replace(shape, vision=dataclasses.replace(shape.vision, **{name: value}))
        with pytest.raises(ConfigError, match=f"the processor has {refused}"):
            train(dataclasses.replace(config, model=other), tmp_path / "a")
    small = dataclasses.replace(shape, text=dataclasses.replace(shape.text, vocab_size=100))
    with pytest.raises(ConfigError, match="vocab_size=100 is smaller than the tokenizer"):
        train(dataclasses.replace(config, model=small), tmp_path / "b")
    with pytest.raises(ConfigError, match="must be multiples of 8, the devices that share a batch"):
        train(dataclasses.replace(config, mesh=MeshConfig()), tmp_path / "c")
    with pytest.raises(ConfigError, match="picks no weight"):
        train(one_stage(folder, trainable="adapters"), tmp_path / "d")


def test_weights_of_another_shape_are_refused(folder, tmp_path, tiny_checkpoint):
    config = dataclasses.replace(one_stage(folder, steps=1), init=str(tiny_checkpoint))
    with pytest.raises(CheckpointError, match="shape"):
        train(config, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["FP8", "native"])
def test_starts_from_weights_in_any_form(form, folder, tmp_path):
    """A folder in eight bits or in the native layout is a model to train: what is frozen stays the numbers it holds."""
    shape = tiny_config(folder).model
    public = tmp_path / "public"
    pretrained.save(qv.QwenVL(shape, rngs=nnx.Rngs(3)), public)
    stored, frozen = load_file(public / "model.safetensors"), {}
    for name in [name for name in stored if ".layers." in name]:
        frozen[name] = stored[name]
        if form == "FP8" and name.endswith(KERNELS):
            codes, scales = quantize(stored[name], (8, 16))
            stored |= {name: codes, f"{name}_scale_inv": scales}
            frozen[name] = numbers(codes, scales, (8, 16))
    start = public
    if form == "FP8":
        save_file(stored, public / "model.safetensors")
        config = json.loads((public / "config.json").read_text())
        (public / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    else:
        start = convert(public, tmp_path / "native")
    config = dataclasses.replace(one_stage(folder, steps=1, trainable="mergers"), model=str(start))
    trained = load_file(train(config, tmp_path / "out").model / "model.safetensors")
    assert len(frozen) == 22
    assert all(np.array_equal(trained[name], value.astype(np.float32)) for name, value in frozen.items())


def test_a_damaged_run_folder_is_told(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        train(one_stage(folder, steps=1), out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(one_stage(folder, steps=1), tmp_path / "file")


@pytest.mark.slow
def test_first_weights_lie_as_the_run_s_rules_say(folder, tmp_path):
    """One head of keys on two devices of `tensor`, which the usual rules refuse."""
    first = train(one_stage(folder, steps=1), tmp_path / "first")
    config = dataclasses.replace(one_stage(folder, steps=1), init=str(first.model))
    mesh = {"data": 1, "fsdp": 1, "tensor": 2}
    with pytest.raises(ConfigError, match=r"axis 'kv_heads' of size 1 cannot be split 2 ways"):
        train(dataclasses.replace(config, mesh=MeshConfig(**mesh)), tmp_path / "refused")
    overridden = MeshConfig(**mesh, override=("kv_heads=", "vision_rows="))
    losses = []
    for name, place in (("one", config.mesh), ("two", overridden)):
        result = train(dataclasses.replace(config, mesh=place), tmp_path / name)
        losses += [line["loss"] for line in read_metrics(result.out / "metrics.jsonl")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
