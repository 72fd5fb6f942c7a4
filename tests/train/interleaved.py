"""`qwenvl-jax train` with two devices a process, which stand in turns along the mesh: what `test_processes.py` starts.

    python -m tests.train.interleaved CONFIG --out FOLDER

On a slice of TPUs a process has a block of it, whose devices do not follow one another along a long axis either.
"""

import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import numpy as np

from qwenvl_jax.cli import main
from qwenvl_jax.parallel import mesh


def in_turns(devices, shape):
    """The first of each process, then the second of each."""
    of_process: dict[int, list] = {}
    for device in devices:
        of_process.setdefault(device.process_index, []).append(device)
    return np.asarray(list(zip(*of_process.values(), strict=True))).reshape(shape)


if __name__ == "__main__":
    mesh._arranged = in_turns
    sys.exit(main(["train", *sys.argv[1:]]))
