"""The model of a checkpoint, in the public layout: of a run that was stopped early, or that goes on meanwhile."""

import ast
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.checkpoint import hf_config, peft
from qwenvl_jax.checkpoint.store import read_weights
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.convert import places
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.models.pretrained import Reader
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.parallel.rules import DEFAULT_RULES
from qwenvl_jax.train.adapters import AdaptedParts
from qwenvl_jax.train.config import AdapterConfig
from qwenvl_jax.train.run_folder import new_folder
from qwenvl_jax.train.state import ModelParts, Weights

FOLDER = "processor"  # of a run: what an export needs beside a checkpoint
_SHAPE = ("config.json", "generation_config.json")


def keep_facts(run: Path, shape: QwenVLConfig, processor: Processor, dtype: str) -> None:
    """Writes into a run's folder, if it is not there, what an export needs beside a checkpoint.

    Args:
      run: the folder.
      shape: of the model; `dtype` is that of its weights.
      processor: whose tokenizer and preprocessor settings belong to the model.

    Raises:
      CheckpointError: a shape that the public layout cannot say.
    """
    if (run / FOLDER / "config.json").exists():
        return
    # What an upload to a bucket left that was cut off: it ends with that file.
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    with new_folder(run / FOLDER) as folder:
        processor.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(hf_config.config_to_json(shape, dtype), indent=2) + "\n")
        if shape.eos_token_ids:
            ends = {"eos_token_id": list(shape.eos_token_ids)}
            (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def export_step(run: str | Path, dst: str | Path, step: str = "latest") -> Path:
    """Writes the model of one of a run's checkpoints in the public layout: all of it or nothing.

    Of the checkpoint the weights alone are read, of the data nothing. The base of a run with adapters is read again
    and has to be the one that they were learnt beside; it is quantized and merged on the first device, everything else
    stays on the host.

    Args:
      run: the run's folder; the run may be going on.
      dst: a new or empty folder; what a run with adapters learnt goes to its folder `adapter`, in PEFT's format.
      step: of the checkpoint, or "latest".

    Returns:
      `dst`.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read, or `dst` cannot be written.
    """
    if "://" in str(run):
        raise CheckpointError(
            f"{run} is in a bucket; copy its {FOLDER}/, config.json and checkpoints/{step} into a folder, and export "
            "that one."
        )
    run, dst = Path(run), Path(dst)
    number = _step_of(run, step)
    settings, shape = _settings(run), hf_config.read_config(run / FOLDER)
    adapter = AdapterConfig(**{f.name: settings[f"adapter.{f.name}"] for f in dataclasses.fields(AdapterConfig)})
    make = {name: settings[name] for name in ("dtype", "param_dtype")}
    # Where little is computed, the accelerators are left to the run.
    make |= {"mesh": single_device_mesh(None if adapter.rank else _host()), "rules": DEFAULT_RULES}
    if adapter.rank:
        parts: ModelParts = AdaptedParts(shape, adapter, seed=settings["seed"], **make)
    else:
        parts = ModelParts(shape, **make)
    places.check_new(dst, run)
    exported = parts.exported_weights().values()
    places.check_room(dst, sum(math.prod(info.shape) * info.dtype.itemsize for info in exported))

    wanted = {
        name: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=parts.shardings[name])
        for name, info in parts.weights.items()
    }
    params, record = read_weights(run / "checkpoints", number, wanted)
    source = record.get("source")

    def initial() -> Weights:
        if "source" not in record:
            raise CheckpointError(
                f"the checkpoint {run / 'checkpoints' / str(number)} does not say beside which model its adapters were "
                "learnt: an earlier version wrote it; start the run's `train` command again and take a later one."
            )
        if source is None:
            return parts.drawn(settings["seed"])
        return Reader(source, dtype=settings["param_dtype"], mesh=parts.mesh, rules=parts.rules)

    params = parts.made_again(initial, record) | params
    if missing := sorted(set(parts.names) - set(params)):
        raise CheckpointError(f"the checkpoint {run / 'checkpoints' / str(number)} lacks {missing[0]}; take another.")
    try:
        with new_folder(dst) as making:
            parts.save(params, making)
            for path in (run / FOLDER).iterdir():
                if path.name not in _SHAPE:
                    shutil.copyfile(path, making / path.name)
            if isinstance(parts, AdaptedParts):
                peft.write(parts.to_peft(params, source), making / "adapter", shape)
    except OSError as error:
        raise places.cannot_write(dst, error, "nothing was exported, choose another place") from error
    return dst


def _step_of(run: Path, step: str) -> int:
    """The number of a checkpoint that is there."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    if not steps:
        raise CheckpointError(f"{run} holds no checkpoint of a training run; --step goes with the folder of one.")
    if step == "latest":
        return steps[-1]
    if not step.isdigit() or int(step) not in steps:
        raise CheckpointError(
            f"{run} has no checkpoint of step {step}; there are those of {', '.join(map(str, steps))} (--step latest)."
        )
    return int(step)


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run that a model follows from, by name."""
    path = run / "config.json"
    if not (run / FOLDER / "config.json").is_file():
        raise CheckpointError(
            f"{run} has no {FOLDER}/config.json, which says the model's shape: the run began with an earlier version; "
            "start its `train` command again, which writes it."
        )
    names = {"dtype", "param_dtype", "seed"}
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: ast.literal_eval(text) for name, text in texts.items() if name in names or name.startswith("adapter.")
        }
    except (OSError, ValueError, SyntaxError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); put back the one that the run wrote.") from error


def _host() -> jax.Device | None:
    """The processor of this machine as a device, if JAX may use it."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None
