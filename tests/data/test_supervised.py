"""Workers that die or hang are replaced, and the batches are those of a run in which nothing happened."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenvl_jax.data.pipeline import batches
from qwenvl_jax.data.supervised import _LAST_SECONDS, MOST_REPLACEMENTS, Supervised
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import DataConfig
from tests.data.host import loader_of
from tests.data.mixed import mixed_config

ROOT = Path(__file__).parents[2]
STEPS = 8


def supervised(make, steps=6, **options):
    said: list[str] = []
    options = {"timeout": 5.0, "remember": str, "describe": lambda step: f"<{step}>", "say": said.append} | options
    return Supervised(make, 0, steps, **options), said


class TestLogic:
    """With iterators in this process that fail as Grain's do."""

    def test_goes_on_with_the_step_that_was_lost(self):
        begun = []

        def make(step, end, last):
            begun.append((step, end, last))
            for n in range(step, end):
                if n == 3 and len(begun) == 1:
                    raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs")
                yield n

        iterator, said = supervised(make)
        assert list(iterator) == list(range(6))
        assert begun == [(0, 6, ""), (3, 4, "2"), (4, 6, "3")]
        assert len(said) == 1 and "step 4: a worker was killed by SIGKILL" in said[0]

    def test_a_step_that_is_always_lost_is_given_up(self):
        def make(step, end, last):
            del last
            yield from range(step, min(end, 2))
            raise RuntimeError("Worker process was terminated unexpectedly with exit code 11. Search the logs above")

        iterator, said = supervised(make)
        assert [next(iterator), next(iterator)] == [0, 1]
        with pytest.raises(DataError, match=r"step 3: .* lost 4 times in a row .*exit code 11.*in it stand <2>"):
            next(iterator)
        assert len(said) == MOST_REPLACEMENTS

    def test_what_hangs_is_lost(self):
        begun = []

        def make(step, end, last):
            begun.append(last)
            for n in range(step, end):
                if n == 2 and len(begun) == 1:
                    time.sleep(1.5)
                yield n

        iterator, said = supervised(make, steps=4, timeout=0.5)
        assert list(iterator) == [0, 1, 2, 3]
        assert len(said) == 1 and "gave nothing for 0.5 s" in said[0]

    @pytest.mark.parametrize(
        ("code", "told"), [(-7, "SIGBUS, as happens where /dev/shm"), (-11, "SIGSEGV;"), (3, "3;")]
    )
    def test_says_how_a_worker_ended(self, code, told):
        def make(step, end, last):
            if not last and end == 6:
                raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search the logs")
            yield from range(step, end)

        iterator, said = supervised(make)
        assert next(iterator) == 0
        assert told in said[0]

    def test_the_start_has_more_time(self):
        def make(step, end, last):
            del last
            time.sleep(0.3)
            yield from range(step, end)

        iterator, said = supervised(make, timeout=0.01)
        assert next(iterator) == 0 and not said

    def test_other_errors_are_not_retried(self):
        def make(step, end, last):
            yield step
            raise ValueError(end, last)

        iterator, said = supervised(make)
        assert next(iterator) == 0
        with pytest.raises(ValueError):
            next(iterator)
        assert not said


def test_no_time_at_all_is_refused():
    with pytest.raises(ConfigError, match=r"data\.worker_timeout=0"):
        DataConfig(worker_timeout=0)


class Fragile:
    """A loader that does something to its worker process at one step, as often as asked."""

    def __init__(self, loader, step: int, times: int, folder: Path, deed):
        self.plan, self._loader, self._step, self._times = loader.plan, loader, step, times
        self._folder, self._deed = folder, deed

    def __call__(self, step: int):
        done = len(list(self._folder.glob("done-*")))
        if step == self._step and done < self._times:
            (self._folder / f"done-{done}").touch()
            self._deed()
        return self._loader(step)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self():
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt_self():
    os.kill(os.getpid(), signal.SIGINT)


def terminate_self():
    os.kill(os.getpid(), signal.SIGTERM)


def leave():
    os._exit(3)


@pytest.fixture(scope="module")
def undisturbed(mixed_folder):
    return [planned.hash for planned in batches(loader_of(mixed_config(mixed_folder)), STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "workers", "timeout", "told"),
    [
        (kill_self, 1, 600.0, "was killed by SIGKILL"),
        (leave, 2, 600.0, "ended with exit code 3"),
        (stop_self, 2, 40.0, "gave nothing for 40 s"),
    ],
)
def test_a_lost_worker_changes_nothing(mixed_folder, undisturbed, tmp_path, deed, workers, timeout, told):
    said: list[str] = []
    loader = Fragile(loader_of(mixed_config(mixed_folder)), 5, 1, tmp_path, deed)
    found = batches(loader, STEPS, threads=1, workers=workers, prefetch=1, worker_timeout=timeout, say=said.append)
    assert [planned.hash for planned in found] == undisturbed
    assert len(said) == 1 and told in said[0]
    assert not [process for process in multiprocessing.active_children() if "prefetch" in process.name]


@pytest.mark.slow
@pytest.mark.parametrize("deed", [interrupt_self, terminate_self])
def test_requests_to_end_are_not_for_workers(mixed_folder, undisturbed, tmp_path, deed):
    """They get them with their run, which decides: Ctrl-C in a terminal, SIGTERM from a scheduler."""
    said: list[str] = []
    loader = Fragile(loader_of(mixed_config(mixed_folder)), 3, 1, tmp_path, deed)
    found = batches(loader, STEPS, threads=0, workers=1, say=said.append)
    assert [planned.hash for planned in found] == undisturbed
    assert not said and (tmp_path / "done-0").exists()


@pytest.mark.slow
def test_a_sample_that_kills_its_workers_is_named(mixed_folder, tmp_path):
    loader = Fragile(loader_of(mixed_config(mixed_folder)), 1, 99, tmp_path, leave)
    iterator = batches(loader, STEPS, threads=1, workers=1, prefetch=1)
    next(iterator)
    with pytest.raises(DataError, match=r"step 2: the workers .* lost 4 times in a row.*in it stand .*\.jsonl:\d+"):
        next(iterator)
    assert not [process for process in multiprocessing.active_children() if "prefetch" in process.name]


def children_of(pid: int) -> set[int]:
    """The processes that a process started, and those that they did."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WORK = """
import sys
from qwenvl_jax.data.pipeline import batches
from tests.data.host import loader_of
from tests.data.mixed import mixed_config

if __name__ == "__main__":
    iterator = batches(loader_of(mixed_config(sys.argv[1])), 10**6, workers=2, threads=1)
    for planned in iterator:
        print(planned.hash, flush=True)
"""


@pytest.mark.slow
def test_a_program_that_never_closes_its_batches_ends_at_once(mixed_folder, tmp_path):
    """Workers go on for a while when they are asked to end; not for the program that started them."""
    (tmp_path / "work.py").write_text(WORK.replace("print(planned.hash, flush=True)", "break"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "work.py"), str(mixed_folder)]
    assert subprocess.run(command, env=environment, timeout=_LAST_SECONDS - 20, check=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_no_worker_outlives_a_killed_run(mixed_folder, tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "work.py"), str(mixed_folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline()
        workers = children_of(process.pid)
        assert len(workers) >= 2
        process.kill()
    for _ in range(300):
        if not any(map(running, workers)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{[pid for pid in workers if running(pid)]} outlive the run")
