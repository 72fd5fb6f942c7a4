"""How a demo model was made, in the metadata of its own weights file: what ships can be made again."""

import importlib.metadata
import os
import pathlib
import platform

import safetensors
import safetensors.numpy

from qwenvl_jax import __version__

WEIGHTS = "model.safetensors"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_KEYS = ("command", "seed", "versions")


def command(full: bool, seed: int) -> str:
    """The command line that runs a demo with these settings."""
    return "qwenvl-jax demo" + (" --full" if full else "") + (f" --seed {seed}" if seed else "")


def versions() -> str:
    """Versions of this package, of Python and of what the numbers depend on."""
    parts = [f"qwenvl_jax {__version__}", f"Python {platform.python_version()}"]
    return ", ".join(parts + [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES])


def write(folder: str | os.PathLike, *, seed: int, full: bool) -> None:
    """Adds command, seed and versions to the metadata of a folder's weights; the tensors stay as they are."""
    path = pathlib.Path(folder) / WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    values = {"format": "pt", "command": command(full, seed), "seed": str(seed), "versions": versions()}
    unfinished = path.with_name(f".{path.name}.unfinished")
    safetensors.numpy.save_file(tensors, unfinished, metadata=values)
    unfinished.chmod(0o644)  # safetensors writes files that only their owner may read
    unfinished.replace(path)


def read(folder: str | os.PathLike) -> dict[str, str]:
    """Command, seed and versions that a folder's weights were made with; empty where they do not say."""
    with safetensors.safe_open(pathlib.Path(folder) / WEIGHTS, framework="numpy") as file:
        metadata = file.metadata() or {}
    return {key: metadata[key] for key in _KEYS if key in metadata}
