"""Records of any data set of tensorflow-datasets that random access is possible in (ArrayRecord).

Its features are those of a record in one of the formats: `{"id": Text(), "messages": Sequence({"role": Text(),
"content": Text()})}`, say, or the same with "messages" as JSON in a text, or a single text that is the whole record in
JSON. Such a data set brings no facts.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data.built import INFO, import_tfds, open_split, read_item
from qwenvl_jax.data.sources import Reading, Record, join, read_record
from qwenvl_jax.errors import DataError

# What is a list in the formats, for which features may have JSON in a text.
_LISTS = {"messages", "conversations", "boxes", "captions", "timestamps", "sentences", "images", "videos"}


class TfdsSource:
    """The records of a folder that tensorflow-datasets made, those of its split "train" or of its only one.

    Args:
      folder: of the data set, the one with `dataset_info.json`; media paths in records are relative to it.
      reading: how its records become conversations.

    Raises:
      DataError: the folder is damaged, has several splits and none is "train", is not in a format with random access,
        or tensorflow-datasets is not installed; a record cannot be read (raised on access).
    """

    def __init__(self, folder: Path, reading: Reading):
        self.folder, self.base, self._reading = folder, folder, reading
        self._items = open_split(folder)
        self._features = features_of(self._items)

    def __reduce__(self):
        # A worker process opens the files for itself.
        return TfdsSource, (self.folder, self._reading)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        value = to_record(self._item(index), self._features)
        place = functools.partial(join, self.folder)
        return read_record(value, self.where(index), index, place, self._reading)

    def _item(self, index: int) -> Any:
        return read_item(self._items, index, self.folder)

    def text(self, index: int) -> bytes:
        """A record in JSON.

        Raises:
          DataError: it has pictures as pixels.
        """
        value = to_record(self._item(index), self._features)
        if not isinstance(value, str):
            raise DataError(f"{self.where(index)} has pictures as pixels; write them as files, and their paths here.")
        return value.encode()

    def where(self, index: int) -> str:
        """Folder and number of a record."""
        return f"{self.folder}[{index}]"

    @property
    def state_file(self) -> Path:
        """What is written anew when the data set is."""
        return self.folder / INFO


def features_of(items: Any) -> Any:
    """The features of a data source of tensorflow-datasets; None for other objects."""
    return getattr(getattr(items, "dataset_info", None), "features", None)


def to_record(item: Any, features: Any) -> Any:
    """A record as a data set holds it, as the text in JSON that its file would have had.

    Args:
      item: of a data source of tensorflow-datasets.
      features: of the data set.

    Returns:
      The text; or, if there are pictures as pixels, the mapping.
    """
    value = _plain(item, features, import_tfds().features)
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1 and isinstance(text := next(iter(value.values())), str):
        return text
    value = {key: _list_in(one) if key in _LISTS else one for key, one in value.items()}
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:  # pixels
        return value


def _plain(value: Any, feature: Any, kinds: Any) -> Any:
    """A value of a feature as JSON has it; pixels stay arrays."""
    if isinstance(feature, kinds.FeaturesDict):
        return {key: _plain(value[key], feature[key], kinds) for key in feature}
    if isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.FeaturesDict):
        # It comes as a mapping of lists.
        columns = {key: value[key] for key in feature.feature}
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return [_plain(row, feature.feature, kinds) for row in rows]
    if isinstance(feature, kinds.Sequence):
        return [_plain(one, feature.feature, kinds) for one in value]
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(feature, kinds.Image | kinds.Video):
        return value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _list_in(value: Any) -> Any:
    """The list that a text is in JSON; other values, and texts that are none, stay for the format to judge."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, list) else value
