"""Exports: the tensors that went in, all or nothing, and words on who serves them."""

import dataclasses
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from qwenvl_jax import cli
from qwenvl_jax.convert import places
from qwenvl_jax.convert.advice import advice
from qwenvl_jax.convert.to_native import convert
from qwenvl_jax.convert.to_public import export
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.models import pretrained
from tests.checkpoint.shape import GENERATIONS, TINY_MOE, random_model
from tests.convert.conftest import bit_equal, contents, stored_tensors
from tests.convert.test_to_native import _start, calls
from tests.support import generations


@pytest.mark.support("loads", "exports")
@pytest.mark.parametrize("generation", generations(GENERATIONS))
def test_every_generation_there_and_back(generation, tmp_path):
    """Public, native, public: bit-equal; and the native form loads as the public one does."""
    pretrained.save(random_model(GENERATIONS[generation]), tmp_path / "public", max_shard_bytes=100_000)
    convert(tmp_path / "public", tmp_path / "native", verify=True)
    export(tmp_path / "native", tmp_path / "back", verify=True)
    assert bit_equal(stored_tensors(tmp_path / "public"), stored_tensors(tmp_path / "back"))
    one, two = (pretrained.load(tmp_path / form, dtype="float32") for form in ("public", "native"))
    assert one.config == two.config == GENERATIONS[generation]
    one, two = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (one, two))
    assert all(np.array_equal(one[key].get_value(), two[key].get_value()) for key in one)


@pytest.mark.parametrize("width", [14, 10])
def test_experts_whose_order_a_shape_may_not_tell(width, tmp_path):
    """Stored in the order that transformers 5 holds: the same model, exported in that order; where twice the width is
    the model's, it is what such a shape means, read and written."""
    moe = dataclasses.replace(TINY_MOE.text.moe, moe_intermediate_size=width)
    config = dataclasses.replace(TINY_MOE, text=dataclasses.replace(TINY_MOE.text, moe=moe))
    pretrained.save(random_model(config), tmp_path / "public")
    stored = stored_tensors(tmp_path / "public")
    if width == 14:
        for name in [name for name in stored if ".experts." in name]:
            stored[name] = np.ascontiguousarray(stored[name].swapaxes(1, 2))
    shutil.copytree(tmp_path / "public", tmp_path / "held")
    save_file(stored, tmp_path / "held" / "model.safetensors")
    convert(tmp_path / "held", tmp_path / "native", verify=True)
    export(tmp_path / "native", tmp_path / "back", verify=True)
    assert bit_equal(stored_tensors(tmp_path / "held"), stored_tensors(tmp_path / "back"))
    models = [pretrained.load(tmp_path / form, dtype="float32") for form in ("public", "native", "back")]
    weights = [dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in models]
    assert all(np.array_equal(weights[0][key].get_value(), w[key].get_value()) for w in weights for key in w)


def test_processor_files_go_along(public, undisturbed, tmp_path):
    export(undisturbed, tmp_path / "back")
    before, after = contents(public), contents(tmp_path / "back")
    small = {name for name in before if "safetensors" not in name}
    assert {"tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "qwenvl_jax.json"} <= small
    assert {name: after[name] for name in small} == {name: before[name] for name in small}
    assert set(after) - small == {"model.safetensors"}


def test_a_run(public, tmp_path, capsys):
    """A run's folder means its model; one that is not done has none."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / "config.json").write_text('{"steps": "3"}')
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "is a training run that is not done" in capsys.readouterr().err
    shutil.copytree(public, run / "model")
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--verify"]) == 0
    assert bit_equal(stored_tensors(public), stored_tensors(tmp_path / "out"))
    out = capsys.readouterr().out
    assert f"  vllm serve {tmp_path / 'out'}\n  transformers serve {tmp_path / 'out'}\n" in out
    assert "Its dialect is transformers." in out


def test_killed_at_any_moment(undisturbed, tmp_path):
    """Either the export is there and whole, or its place is as it was; the next one completes it."""
    total, _ = calls(_start("COUNT", 0, "export", undisturbed, tmp_path / "whole"))
    for moment in [1, *random.Random(1).sample(range(2, total - 1), 3), total - 1, total]:
        dst = tmp_path / "out"
        process = _start("SIGKILL", moment, "export", undisturbed, dst)
        calls(process)
        assert process.returncode == -signal.SIGKILL
        if moment < total:  # then all that is missing is the wait for the disk
            export(undisturbed, dst, verify=moment == total - 1)
        assert contents(dst) == contents(tmp_path / "whole")
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
        shutil.rmtree(dst)


def test_another_export_clears_what_was_left(public, undisturbed, tmp_path):
    other = tmp_path / "other"
    pretrained.save(random_model(seed=1), other)
    for left, src in ((public, other), (undisturbed, other), (other, undisturbed)):
        process = _start("SIGKILL", 5, "export", left, tmp_path / "out")
        calls(process)
        assert (tmp_path / ".out.partial").is_dir()
        export(src, tmp_path / "out", verify=True)
        assert not (tmp_path / ".out.partial").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_disk_that_fills_up(undisturbed, tmp_path, monkeypatch):
    """What was written stays, the error says where, and the next try needs only the rest."""
    from qwenvl_jax.checkpoint import safetensors_file

    def full(fd, data, offset, write=safetensors_file.write_at):
        if offset > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(fd, data, offset)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"left on device.*run the same command"):
        patch.setattr(safetensors_file, "write_at", full)
        export(undisturbed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = sum(path.stat().st_blocks * 512 for path in (tmp_path / ".out.partial").iterdir())
    size = sum(array.nbytes for array in stored_tensors(export(undisturbed, tmp_path / "whole")).values())
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, left, size - left))
    export(undisturbed, tmp_path / "out", verify=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_places_that_are_refused(public, undisturbed, tmp_path):
    with pytest.raises(CheckpointError, match="holds something else already"):
        export(undisturbed, public)
    half = Path(shutil.copytree(undisturbed, tmp_path / "half"))
    (half / "native" / "index.json").unlink()
    with pytest.raises(CheckpointError, match="half conversion"):
        export(half, tmp_path / "out")
    stopped = _start("SIGSTOP", 4, "export", undisturbed, tmp_path / "out")
    try:
        while not (tmp_path / ".out.partial" / ".model.safetensors.partial").exists():
            assert stopped.poll() is None
        with pytest.raises(CheckpointError, match="another process exports to"):
            export(undisturbed, tmp_path / "out")
    finally:
        stopped.kill()
        stopped.communicate()
    assert not (tmp_path / "out").exists()


def test_verify_comes_before_the_folder(undisturbed, tmp_path, monkeypatch):
    from qwenvl_jax.checkpoint import safetensors_file

    write = safetensors_file.Writer.write

    def one_bit(self, name, block, *place):
        block = block.copy()
        block.reshape(-1).view(np.uint8)[0] ^= name.endswith("layers.1.mlp.up_proj.weight")
        write(self, name, block, *place)

    monkeypatch.setattr(safetensors_file.Writer, "write", one_bit)
    with pytest.raises(CheckpointError, match=r"differs from .* in model.language_model.layers.1.mlp.up_proj.weight;"):
        export(undisturbed, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen2_vl"])
def test_advice(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    official = advice(tmp_path)
    assert "Both need tokenizer.json and preprocessor_config.json too" in official
    assert "Its dialect is official. With videos, transformers 5" in official
    (tmp_path / "qwenvl_jax.json").write_text('{"dialect": "transformers"}')
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).touch()
    assert "transformers 5 gives it what it knows." in advice(tmp_path) and "Both need" not in advice(tmp_path)
    # Frames of a file and the position after a video differ where the dialects do, in docs/dialects.md.
    older = model_type.startswith("qwen2")
    for told in (official, advice(tmp_path)):
        assert ("do_sample_frames" in told and "the start of the video plus its longer side" in told) == older
    (tmp_path / "qwenvl_jax.json").write_text('{"dialect": "klingon"}')
    with pytest.raises(CheckpointError, match="dialect 'klingon'"):
        advice(tmp_path)


def test_conversion_needs_little(public, tmp_path):
    """Neither torch nor transformers nor JAX is loaded for it."""
    code = "import sys; from qwenvl_jax.convert.to_native import convert; convert(*sys.argv[1:]); "
    code += "print([name for name in ('torch', 'transformers', 'jax', 'numba') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code, public, tmp_path / "out"], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
    assert pretrained.load(tmp_path / "out").config.model_type == "qwen3_vl"
