"""`launch/local.sh` starts a run again when a restart can help, and only then."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch/local.sh"


def _launch(folder: Path, ends: str, restarts: int) -> tuple[int, list[str]]:
    """Runs the script over a stand-in for Python that ends as told, life after life: (status, arguments of each life).

    Args:
      ends: a shell command for each life, such as "exit 1".
    """
    stand_in = folder / "python"
    stand_in.write_text(
        f'#!/bin/bash\necho "$@" >> {folder}/lives\n'
        f'case "$(wc -l < {folder}/lives)" in\n'
        + "".join(f"{number}) {end} ;;\n" for number, end in enumerate(ends.split(","), 1))
        + "esac\n"
    )
    stand_in.chmod(0o755)
    environment = os.environ | {
        "QWENVL_JAX_PYTHON": str(stand_in),
        "RESTARTS": str(restarts),
        "PAUSE_SECONDS": "0",
    }
    result = subprocess.run(
        [SCRIPT, "c.py", "--out", "a b"],
        env=environment,
        capture_output=True,
        timeout=60,
        # A shell cannot trap what was ignored when it began, as Ctrl-C is in a process that was put in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    return result.returncode, (folder / "lives").read_text().splitlines()


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "lives"),
    [
        ("exit 0", 5, 0, 1),
        ("exit 2", 5, 2, 1),
        ("exit 130", 5, 130, 1),
        ("kill -9 $$,exit 1,exit 0", 5, 0, 3),
        ("kill -9 $$,kill -9 $$,kill -9 $$", 2, 137, 3),
        # Told to stop, the script tells the run, waits for its end, and starts no other.
        ("trap 'exit 7' TERM; kill -TERM $PPID; while :; do sleep 0.1; done", 5, 7, 1),
        ("trap 'exit 7' TERM; kill -INT $PPID; while :; do sleep 0.1; done", 5, 7, 1),
    ],
)
def test_lives(tmp_path, ends, restarts, status, lives):
    assert _launch(tmp_path, ends, restarts) == (status, ["-m qwenvl_jax train c.py --out a b"] * lives)
