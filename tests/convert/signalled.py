"""Runs `qwenvl-jax` in this process and sends it a signal at a chosen change of the disk.

    python -m tests.convert.signalled SIGKILL 37 convert SRC DST

Before the 37th call that writes, syncs, renames or removes a file the signal comes. With the name COUNT, no signal is
sent. The last line printed is the number of such calls and of bytes written, up to the signal or the end.
"""

import os
import signal
import sys

from qwenvl_jax import cli

CALLS = ("pwrite", "fsync", "replace", "unlink", "ftruncate", "mkdir")


def main(name: str, number: str, *arguments: str) -> int:
    """Arms the calls and runs the command."""
    count = size = 0

    def arm(call: str) -> None:
        original = getattr(os, call)

        def counted(*args, **kwargs):
            nonlocal count, size
            count += 1
            if name != "COUNT" and count == int(number):
                print(count, size, flush=True)
                os.kill(os.getpid(), signal.Signals[name])
            size += len(args[1]) if call == "pwrite" else 0
            return original(*args, **kwargs)

        setattr(os, call, counted)

    for call in CALLS:
        arm(call)
    status = cli.main(arguments)
    if name == "COUNT":
        print(count, size)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
