"""What a preset or a model's folder is, without loading it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from qwenvl_jax.checkpoint import hf, native, tensors
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.checkpoint.source import read_config
from qwenvl_jax.convert import places
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.presets import PRESETS, preset


def info(name: str | Path) -> dict[str, Any]:
    """Facts about a model.

    Args:
      name: a preset, a folder in the public or the native layout, a training run's folder, or a hub id, of which only
        the small files are fetched.

    Returns:
      name; model_type; parameters, a tied head counted once; vision_parameters, of tower and mergers; config, the
      nested dataclasses as dictionaries; context, in tokens; checkpoint_bytes, of the files of weights, for a preset
      those of its parameters in bfloat16, None where no file tells.

    Raises:
      CheckpointError, ConfigError: there is no such model, or it is not supported.
    """
    if str(name) in PRESETS:
        config = preset(str(name))
        size: int | None = 2 * hf.parameter_count(config)[0]
    else:
        folder = _folder(name)
        config, _ = read_config(folder)
        size = _bytes(folder)
    parameters, vision = hf.parameter_count(config)
    return {
        "name": str(name),
        "model_type": config.model_type,
        "parameters": parameters,
        "vision_parameters": vision,
        "config": dataclasses.asdict(config),
        "context": config.text.max_position_embeddings,
        "checkpoint_bytes": size,
    }


def _folder(name: str | Path) -> Path:
    if not Path(name).expanduser().exists() and "/" not in str(name):
        try:
            preset(str(name))
        except ConfigError as error:
            raise ConfigError(f"{str(name)!r} is no folder, and {error}") from None
    folder = places.model_folder(name, weights=False)
    if native.is_native(folder) and not (folder / native.FOLDER / native.INDEX).is_file():
        raise CheckpointError(f"{folder} is a half conversion; run `qwenvl-jax convert` again to complete it.")
    return folder


def _bytes(folder: Path) -> int | None:
    """Bytes of the tensors of a folder: from its files if they are there, else from the index."""
    if native.is_native(folder):
        return sum(path.stat().st_size for path in (folder / native.FOLDER).glob("*.safetensors"))
    files = list(folder.glob("*.safetensors"))
    if files:
        return sum(path.stat().st_size for path in files)
    if (folder / tensors.INDEX).is_file():
        total = (read_json(folder / tensors.INDEX).get("metadata") or {}).get("total_size")
        return total if isinstance(total, int) else None
    return None


def show(name: str | Path, *, as_json: bool = False) -> None:
    """Prints `info` as JSON or as a table.

    Raises:
      CheckpointError, ConfigError: see `info`.
    """
    facts = info(name)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    text, vision = facts["config"]["text"], facts["config"]["vision"]
    size = facts["checkpoint_bytes"]
    rows = {
        "model type": facts["model_type"],
        "parameters": f"{facts['parameters']:,}",
        "  tower and mergers": f"{facts['vision_parameters']:,}",
        "context": f"{facts['context']:,} tokens",
        "checkpoint": "no files here" if size is None else f"{size / 1e9:,.2f} GB ({size:,} bytes)",
        "decoder": _spelled(text),
        "tower": _spelled(vision),
    }
    rows |= {key: value for key, value in facts["config"].items() if key not in ("text", "vision", "model_type")}
    print(facts["name"])
    for key, value in rows.items():
        print(f"  {key:<28}{value}")


def _spelled(section: dict[str, Any]) -> str:
    """The settings of a section, one a line under its name."""
    return "".join(f"\n    {key:<26}{value}" for key, value in section.items())
