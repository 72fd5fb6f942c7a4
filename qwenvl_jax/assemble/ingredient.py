"""An ingredient: a folder of public weights whose every tensor is either taken or named as dropped."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.checkpoint.source import FLOATS
from qwenvl_jax.checkpoint.tensors import TensorFiles
from qwenvl_jax.errors import CheckpointError

_LISTED = 3  # names spelled out in an error for each kind of fault


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the model to be built.

    Attributes:
      name: in the public layout of the result.
      shape: of the public tensor.
      make: reads its sources and gives the tensor, of any float dtype; called once.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Tensors of an ingredient that have no place in the result: their common name, how many, and their weights."""

    name: str
    tensors: int
    weights: int


class Ingredient:
    """A folder in the public layout, its headers read and its contents left on disk.

    Attributes:
      name: what the user called it, a folder or a hub id.
      folder: where it is.
      config: the object in its config.json.
      files: its tensors.
    """

    def __init__(self, name: str | Path):
        """Opens a folder, or downloads a hub id.

        Raises:
          CheckpointError: no such folder, no config.json, or no safetensors that can be read.
        """
        self.name, self.folder = str(name), folders.resolve(name)
        self.config = read_json(self.folder / "config.json")
        self.files = TensorFiles(self.folder)

    @property
    def where(self) -> str:
        """config.json, as errors name it."""
        return str(self.folder / "config.json")

    def read(self, name: str) -> np.ndarray:
        """The tensor of that stored name."""
        return self.files.headers[name].read()

    def match(self, wanted: Mapping[str, tuple[int, ...]], drop: Callable[[str], str | None]) -> list[Dropped]:
        """Checks that the files hold these tensors, and besides them only such as may be dropped.

        Args:
          wanted: shape by stored name.
          drop: for a tensor that is not wanted, the name of the group it is dropped with, or None to refuse it.

        Returns:
          What is dropped, in groups.

        Raises:
          CheckpointError: tensors are missing, unexpected, misshaped or not of floating point; all of them in one line.
        """
        groups: dict[str, list[int]] = {}
        unexpected, faulty = [], []
        for name, stored in sorted(self.files.headers.items()):
            if name in wanted:
                if stored.dtype not in FLOATS:
                    faulty.append(f"{name} is {stored.dtype}, not one of {'/'.join(FLOATS)}")
                elif stored.shape != wanted[name]:
                    faulty.append(f"{name} is {list(stored.shape)}, config.json asks for {list(wanted[name])}")
            elif (group := drop(name)) is not None:
                groups.setdefault(group, []).append(math.prod(stored.shape))
            else:
                unexpected.append(name)
        missing = [name for name in wanted if name not in self.files.headers]
        kinds = (("missing", missing), ("unexpected", unexpected), ("misshaped", faulty))
        found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]
        if found:
            raise CheckpointError(
                f"{self.folder}: the tensors do not fit config.json: {'; '.join(found)}; fetch the folder again, or "
                "give another."
            )
        return [Dropped(name, len(sizes), sum(sizes)) for name, sizes in groups.items()]

    def check_count(self, count: int, what: str) -> None:
        """Refuses a number of layers or experts that the files cannot hold, before the names of all are spelled out."""
        if count > len(self.files.headers):
            raise CheckpointError(
                f"{self.folder}: config.json asks for {count} {what}, but the files hold only "
                f"{len(self.files.headers)} tensors; use the config.json that belongs to the weights."
            )


def number(values: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """A positive integer of a config.json; a list of two equal ones counts as one, null as the default.

    Raises:
      CheckpointError: it is something else.
    """
    value = values.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {key} must be a positive integer, but is {json.dumps(value)}; mend the file.")
    return value


def only(values: Mapping[str, Any], allowed: Mapping[str, tuple], where: str) -> None:
    """Refuses a key that holds another value than these; the first is meant where the key is missing or null.

    Raises:
      CheckpointError: names the key.
    """
    for key, options in allowed.items():
        value = options[0] if values.get(key) is None else values[key]
        if value not in options:
            accepted = " or ".join(json.dumps(option) for option in options)
            raise CheckpointError(
                f"{where}: {key} = {json.dumps(value)} cannot be carried over, only {accepted}; give another model."
            )


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
