"""The process that compiles."""

import os
import subprocess
import sys

from qwenvl_jax.plan import compiling

ASKS = """\
import os, subprocess, sys, time
command = [sys.executable, "-m", "qwenvl_jax.plan.child", sys.argv[1], str(os.getpid())]
subprocess.Popen(command)
print("asked", flush=True)
time.sleep(600)
"""


def test_it_ends_with_the_process_that_asks(tmp_path):
    """Killed before the other has begun its work, which here never ends: nobody writes the request."""
    os.mkfifo(tmp_path / compiling.REQUEST)
    parent = subprocess.Popen([sys.executable, "-c", ASKS, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout.readline() == b"asked\n"
    parent.kill()
    # Both hold the pipe: it is closed once the last of them has ended.
    _, said = parent.communicate(timeout=300)
    assert said == b""
