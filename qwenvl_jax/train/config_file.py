"""Config files: Python with `get_config()`, and optionally `prepare(config)`, which makes what the config needs."""

import dataclasses
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import TrainConfig
from qwenvl_jax.train.overrides import apply_overrides


def load_config_file(path: str | Path) -> tuple[TrainConfig, Callable[[TrainConfig], object]]:
    """Runs a config file.

    Returns:
      (what its `get_config()` returns, a function that calls its `prepare`, if it has one, with a config).

    Raises:
      ConfigError: there is no such file, it has no `get_config()`, that returns something else, or fails.
    """
    path = Path(path)
    file = _load(path)
    config = _call(path, file, "get_config")
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path}: get_config() must return a TrainConfig; got {type(config).__name__}.")
    return config, lambda config: _call(path, file, "prepare", config) if "prepare" in file else None


def prepared_config(path: str | Path, overrides: Sequence[str] = (), model: str | None = None) -> TrainConfig:
    """A config file's config as a command line changes it, what it needs being made by the file's `prepare`.

    Args:
      path: see `load_config_file`.
      overrides: `--name value ...` arguments; see `qwenvl_jax.train.overrides`.
      model: in place of the config's: a preset's name (its shape, random weights), or the folder or hub id of a
        pretrained model, whose processor is then used too.

    Raises:
      ConfigError: what is wrong with the file or a setting.
    """
    written, prepare = load_config_file(path)
    config = apply_overrides(written, overrides)
    if model in PRESETS:
        config = dataclasses.replace(config, model=PRESETS[model])
    elif model is not None:
        # A pretrained model brings its own processor, unless the command line names another.
        processor = config.processor if config.processor != written.processor else None
        config = dataclasses.replace(config, model=model, processor=processor)
    prepare(config)
    return config


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; give one such as configs/demo/s0.py.")
    try:
        file = runpy.run_path(str(path))
    except QwenVLError:
        raise
    except Exception as error:
        raise _failed(path, error) from error
    if not callable(file.get("get_config")):
        raise ConfigError(f"{path} has no get_config(); define one that returns a qwenvl_jax.train.config.TrainConfig.")
    return file


def _call(path: Path, file: dict[str, Any], name: str, *arguments):
    try:
        return file[name](*arguments)
    except QwenVLError:
        raise
    except Exception as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: Exception) -> ConfigError:
    """What a config file's own mistake is, and in which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f"{path}:{line}" if line else str(path)
    return ConfigError(
        f"{place}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; correct it."
    )
