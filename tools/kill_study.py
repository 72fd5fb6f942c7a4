"""Kills a training run by SIGKILL at random moments, again and again, and compares the outcome with a run left alone.

    .venv/bin/python -m tools.kill_study [--kills 50] [--seed N] [--out FOLDER]

The run is that of `tests/train/tiny_run.py` over a real MP4, with more steps. Of the kills a fifth falls inside a save,
that is while an unfinished checkpoint lies in the folder, a fifth while worker processes make batches, and the others
anywhere between the start of the process and its last steps. Each killed run is started again by the same command; what
it wrote in the end must be, byte for byte, what the undisturbed run wrote: metrics (losses, hashes of batches), the
arrays of the last checkpoint (weights, optimizer, random key), and the model. Exit status 1 if anything differs.

Processes are forked from this one, which has imported everything and started nothing, so that a life costs seconds.
"""

import argparse
import os
import pickle
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_SECONDS = 300.0  # of a life
KINDS = ("any moment", "inside a save", "workers alive")


def main() -> int:
    """Carries the study out; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; by default another one each time")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; by default one that is removed")
    options = parser.parse_args()
    # Before JAX is imported: one device, and programs that run for seconds are not worth optimizing.
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=0")
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return Study(folder, options.steps, random.Random(seed)).carry_out(options.kills)


class Study:
    """The runs in a folder.

    Args:
      folder: for the data and the runs.
      steps: of a run.
      draw: of the moments.
    """

    def __init__(self, folder: Path, steps: int, draw: random.Random):
        from tests.train.tiny_run import write_tiny_run

        self.folder, self.steps, self.draw = folder, steps, draw
        clip = folder / "source.mp4"
        _make_clip(clip)
        self.config = write_tiny_run(folder, clip)

    def carry_out(self, kills: int) -> int:
        """Kills as often as asked, with as many runs as that takes."""
        began = time.monotonic()
        whole = self.folder / "whole"
        if self.live(whole, ()) != 0:
            print("the undisturbed run failed", flush=True)
            return 1
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        left = [KINDS[max(number % 5 - 2, 0)] for number in range(kills)]
        self.draw.shuffle(left)
        total, runs, good = dict.fromkeys(KINDS, 0), 0, 0
        while left:
            out, dead = self.folder / f"run-{runs}", 0
            runs += 1
            finished = False
            while not finished:
                kind = left[-1] if left else ""
                workers = ("--data.workers", "2") if kind == "workers alive" else ()
                status = self.live(out, workers, self._moment(kind, out) if kind else None)
                finished = status == 0
                if status == -signal.SIGKILL:
                    total[left.pop()] += 1
                    dead += 1
                    print(f"{sum(total.values())}: {kind}, after {_lines(out)} of {self.steps} steps", flush=True)
                elif status:
                    print(f"{out}: a life ended with status {status}; see {out}.log", flush=True)
                    return 1
            odd = different(out, whole)
            print(f"run {runs}: {dead} kills, {'different: ' + odd if odd else 'equal'}", flush=True)
            if odd:
                return 1
            good += dead
            shutil.rmtree(out)
        minutes = (time.monotonic() - began) / 60
        kinds = ", ".join(f"{count} {kind}" for kind, count in total.items())
        print(f"{good} of {sum(total.values())} kills resumed bit-equal ({kinds}; {runs} runs, {minutes:.0f} minutes)")
        return 0

    def live(self, out: Path, arguments: tuple[str, ...], moment: Callable[[int], bool] | None = None) -> int:
        """One process of a run, killed once `moment(pid)` says so; its status, negative for a signal."""
        pid = os.fork()
        if pid == 0:
            self._train(out, arguments)
        began, killed = time.monotonic(), False
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            late = time.monotonic() - began > LIMIT_SECONDS
            if not killed and ((moment is not None and moment(pid)) or late):
                os.kill(pid, signal.SIGKILL)
                killed = True
            time.sleep(0.0005)

    def _train(self, out: Path, arguments: tuple[str, ...]) -> None:
        """What a forked process does; it never returns."""
        import jax

        from qwenvl_jax import cli

        # Programs are compiled once for all lives.
        jax.config.update("jax_compilation_cache_dir", str(self.folder / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        first = self.steps // 3
        steps = ("--stages.s0.steps", str(first), "--stages.s1.steps", str(self.steps - first))
        command = ("train", str(self.config), "--out", str(out), "--checkpoint_every", "3", *steps, *arguments)
        status = 1
        try:
            status = cli.main(command)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def _moment(self, kind: str, out: Path) -> Callable[[int], bool]:
        """Says when to kill."""
        began, known, delay = time.monotonic(), _lines(out), self.draw.random()
        since: list[float] = []

        def after(reached: bool, seconds: float) -> bool:
            """Whether so many seconds have passed since something was reached first."""
            if reached and not since:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] >= seconds

        def any_moment(pid: int) -> bool:
            # Half of them before this life's first step, half within its steps.
            if delay < 0.5:
                return time.monotonic() - began >= delay * 16
            return after(_lines(out) > known, (delay - 0.5) * 4)

        def inside_a_save(pid: int) -> bool:
            unfinished = any("tmp" in path.name for path in _listed(out / "checkpoints"))
            if not unfinished:
                since.clear()  # it was quicker; the next one then
            return after(unfinished, delay * 0.05) and unfinished

        def workers_alive(pid: int) -> bool:
            # Both of them, and after this life's first step.
            if not (since or _lines(out) > known):
                return False
            return after(True, delay * 1.5) and len(_children(pid)) >= 2

        return {"any moment": any_moment, "inside a save": inside_a_save, "workers alive": workers_alive}[kind]


def _make_clip(path: Path) -> None:
    import imageio_ffmpeg

    arguments = "-nostdin -loglevel error -y -f lavfi -i testsrc=size=96x64:rate=12:duration=2 -pix_fmt yuv420p"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments.split(), str(path)], check=True)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _lines(out: Path) -> int:
    """Steps in the metrics of a run."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _children(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    found = []
    for task in _listed(Path(f"/proc/{pid}/task")):
        try:
            direct = [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [one for child in direct for one in (child, *_children(child))]
    return found


def different(out: Path, whole: Path) -> str:
    """What in a run is not as in the other; empty if all is."""
    names = ["metrics.jsonl", *(f"model/{path.name}" for path in sorted((whole / "model").iterdir()))]
    for name in names:
        if (out / name).read_bytes() != (whole / name).read_bytes():
            return name
    ours, theirs = _arrays(out), _arrays(whole)
    if ours.keys() != theirs.keys():
        return "the arrays of the checkpoint"
    return next((name for name, value in theirs.items() if ours[name] != value), "")


def _arrays(out: Path) -> dict[str, tuple]:
    """Type, shape and bytes of each array of the last checkpoint; read elsewhere, so that JAX does not start here."""
    code = (
        "import sys, pickle, jax, numpy as np, orbax.checkpoint as ocp\n"
        "tree = ocp.StandardCheckpointer().restore(sys.argv[1])\n"
        "leaves = jax.tree_util.tree_leaves_with_path(tree)\n"
        "found = {jax.tree_util.keystr(p): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for p, x in leaves}\n"
        "sys.stdout.buffer.write(pickle.dumps(found))\n"
    )
    last = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name))
    command = [sys.executable, "-c", code, str((last / "state").absolute())]
    return pickle.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout)


if __name__ == "__main__":
    # What every life needs, imported once. None of it starts a thread or a backend.
    import qwenvl_jax.train.loop  # noqa: F401

    sys.exit(main())
