"""A tensor from one place to another in slices, its digest taken on the way.

While one slice is written the next is read and the digest of this one is computed: the three take threads of their own.
Two slices are in memory at a time, and the copies that turning them around takes.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwenvl_jax.checkpoint import hf, source
from qwenvl_jax.convert.progress import Progress

Write = Callable[[int, np.ndarray], None]


class Streamer:
    """Moves tensors one after another.

    Args:
      progress: told of the bytes.
    """

    def __init__(self, progress: Progress | None = None):
        self._progress, self._threads = progress, ThreadPoolExecutor(2)

    def __enter__(self) -> "Streamer":
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(cancel_futures=True)

    def move(self, tensor: source.Tensor, entry: hf.Entry, write: Write | None = None) -> str:
        """Reads a tensor from its first to its last slice.

        Args:
          tensor: what to read.
          entry: its line of the table.
          write: takes each slice of the public form: its first row, and the rows; None only takes the digest.

        Returns:
          The SHA-256, in hex, of the bytes of the public form.
        """
        digest = hashlib.sha256()
        cuts = list(source.spans(entry, tensor.dtype.itemsize))
        reading = self._threads.submit(tensor.rows, *cuts[0])
        for i, (start, _) in enumerate(cuts):
            rows = reading.result()
            if i + 1 < len(cuts):
                reading = self._threads.submit(tensor.rows, *cuts[i + 1])
            hashing = self._threads.submit(digest.update, rows.reshape(-1).view(np.uint8).data)
            if write is not None:
                write(start, rows)
            hashing.result()
            if self._progress is not None:
                self._progress.moved(rows.nbytes)
        return digest.hexdigest()
