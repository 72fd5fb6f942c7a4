"""Runs `qwenvl-jax train` in this process and has a signal end it at a chosen moment.

    python -m tests.train.killed MOMENT CONFIG --out OUT ...

MOMENT: `SIGKILL:step:5` when the fifth line of the metrics is written; `SIGKILL:save:2` while the second checkpoint of
this process is being written, after its arrays and before it is whole; `SIGKILL:export:1` when the model is written but
not yet in its place; `SIGKILL:batch:3` at the third batch that the model is judged by, `SIGKILL:token:9` at the ninth
token of answers, the first of each left out. SIGTERM likewise, and it is heard before the run goes on;
`SIGTERM:again:5` comes a second time while what the first one asked for is written.
`SIGKILL:step:5:1` does so in process 1 of several alone.
"""

import os
import signal
import sys
import time

import orbax.checkpoint as ocp

from qwenvl_jax import cli
from qwenvl_jax.models import pretrained
from qwenvl_jax.train import metrics, validation


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
            time.sleep(1)  # a thread passes the signal on

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
    elif kind == "again":
        after(metrics.MetricsLog, "flush")
        finalize = ocp.StandardCheckpointHandler.finalize

        def finalize_with_signal(*arguments, **keywords):
            finalize(*arguments, **keywords)
            if count >= int(number):
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(1)

        ocp.StandardCheckpointHandler.finalize = finalize_with_signal
    elif kind == "save":
        after(ocp.StandardCheckpointHandler, "finalize")
    elif kind == "batch":
        after(validation, "shard_batch")
    elif kind == "token":
        after(sys.modules["qwenvl_jax.generate"], "read_token")
    else:
        after(pretrained, "write")
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
