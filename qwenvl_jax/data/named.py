"""The processor that a user names: of a folder, a hub id or a preset's public checkpoint, or the one kept with data."""

from pathlib import Path

from qwenvl_jax.data.built import PROCESSOR
from qwenvl_jax.data.frames import DEFAULT_MODEL
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.presets import PRESETS


def named_processor(model: str | None, source: str | Path | None = None) -> Processor:
    """The processor of a model.

    Args:
      model: a folder, a hub id, or a preset, whose public checkpoint is taken from the hub. None takes the processor
        kept in the data set `source`, or if it has none, that of `DEFAULT_MODEL`.
      source: a data set.

    Raises:
      CheckpointError: there is no such model, or it cannot be reached.
    """
    if model is not None:
        return Processor.from_pretrained(public_id(model) if model in PRESETS else model)
    kept = None if source is None else Path(source) / PROCESSOR
    if kept is not None and kept.is_dir():
        return Processor.from_pretrained(kept)
    try:
        return Processor.from_pretrained(public_id(DEFAULT_MODEL))
    except CheckpointError as error:
        raise CheckpointError(f"--model is not given, and {error}") from error


def public_id(preset: str) -> str:
    """The hub id of a preset's public checkpoint, such as "Qwen/Qwen2.5-VL-7B-Instruct"."""
    family, _, size = preset.partition("_vl_")
    family = family.removeprefix("qwen").replace("_", ".")
    return f"Qwen/Qwen{family}-VL-{size.upper().replace('_', '-')}-Instruct"
