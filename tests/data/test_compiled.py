"""What numba compiles is kept: a second process compiles nothing, and what is kept does not grow."""

import os
import subprocess
import sys

# Prints how many of the loops came from what is kept, and how many were compiled.
CODE = """
import numpy as np
from qwenvl_jax.data import image, laying, laying_loops, resampling
assert laying.frames_fit({4: 3}, [(2, 8)]) and not laying.frames_fit({4: 5}, [(2, 8)])
frames = laying.Frames([[4], [4, 4]])
one, two = np.ones(2, np.int64), np.arange(2)
rows = laying.lay_samples(two, one, one, frames, most=9, exempt=0, rows=1, length=2, groups=1, vision=[(2, 8)])
assert rows.tolist() == [0, 0]
image.resize(np.zeros((8, 8, 3), np.uint8), 4, 4)
loops = [laying_loops.lay_frames, laying_loops.lay_samples, resampling.horizontal, resampling.vertical]
print(*(sum(sum(getattr(loop.stats, kind).values()) for loop in loops) for kind in ("cache_hits", "cache_misses")))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    kept = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        kept.append((ran.stdout.split(), sorted(path.name for path in tmp_path.rglob("*.nbc"))))
    (first, files), (second, files_after) = kept
    assert first == ["0", str(len(files))] and len(files) >= 4
    assert second == [str(len(files)), "0"] and files_after == files
