"""Memory and open files of a loader that makes 10,000 batches: those that it has after the first 2,000."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.long_run import EVERY
from tests.data.mixed import read_lines, write_mixed

ROOT = Path(__file__).parents[2]
STEPS = 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays(tmp_path, clip, workers):
    """Text, pictures and MP4s, with room to keep a few of them: what is decoded comes and goes all the time."""
    write_mixed(tmp_path, clip)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.data.long_run", str(tmp_path), str(STEPS), str(workers)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = read_lines(done.stdout)
    assert [line["step"] for line in lines] == list(range(EVERY, STEPS + 1, EVERY))
    # The last line may be written when the workers have ended.
    lines = [line for line in lines if line["step"] >= 2000 and len(line["memory"]) == 1 + workers]
    assert len(lines) > 12
    for process in range(1 + workers):
        memory = [line["memory"][process] for line in lines]
        assert max(memory) <= 1.05 * memory[0], memory
        # Batches on their way between processes are open files too, a few or as many as may wait, by who is faster:
        # what is left open is seen where fewest are, beside the most that there were before.
        files = [line["files"][process] for line in lines]
        assert min(files[-6:]) <= max(files[:6]) + 8, files
