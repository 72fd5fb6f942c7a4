"""Runs `qwenvl-jax train` in this process and has a signal end it at a chosen moment.

    python -m tests.train.killed MOMENT CONFIG --out OUT ...

MOMENT: `SIGKILL:step:5` when the fifth line of the metrics is written; `SIGKILL:save:2` while the second checkpoint of
this process is being written, after its arrays and before it is whole; `SIGKILL:export:1` when the model is written but
not yet in its place. SIGTERM likewise. `SIGKILL:step:5:1` does so in process 1 of several alone.
"""

import os
import signal
import sys

import orbax.checkpoint as ocp

from qwenvl_jax import cli
from qwenvl_jax.models import pretrained
from qwenvl_jax.train import metrics


def main(moment: str, *arguments: str) -> int:
    """Arms the signal and runs the command."""
    name, kind, number, *process = moment.split(":")
    if process and process != [os.environ.get("JAX_PROCESS_ID")]:
        return cli.main(["train", *arguments])
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == int(number):
            os.kill(os.getpid(), signal.Signals[name])

    def after(owner, attribute: str) -> None:
        original = getattr(owner, attribute)

        def with_signal(*arguments, **keywords):
            result = original(*arguments, **keywords)
            if result is not None or attribute != "flush":
                reached()
            return result

        setattr(owner, attribute, with_signal)

    if kind == "step":
        after(metrics.MetricsLog, "flush")
    elif kind == "save":
        after(ocp.StandardCheckpointHandler, "finalize")
    else:
        after(pretrained, "save")
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
