"""Runs `qwenvl-jax train` in this process and has a command of the shell disturb it.

    python -m tests.train.disturbed STEP COMMAND CONFIG --out OUT ...

The command is carried out when the line of that step is written to the metrics.
"""

import subprocess
import sys

from qwenvl_jax import cli
from qwenvl_jax.train import metrics


def main(step: str, command: str, *arguments: str) -> int:
    """Arms the command and trains."""
    original = metrics.MetricsLog.flush

    def flush(log):
        line = original(log)
        if line is not None and line["step"] == int(step):
            subprocess.run(command, shell=True, check=True)
        return line

    metrics.MetricsLog.flush = flush
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
