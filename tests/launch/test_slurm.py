"""`launch/slurm.sh` in a real Slurm, set up for it on this machine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenvl_jax.train.metrics import read_metrics
from tests.launch.one_machine_slurm import facts, missing, one_machine_slurm, submit
from tests.train.several import environment, write_several_run
from tests.train.tiny_run import ROOT

# One Slurm at a time: JAX derives the port of a run from the job's number, which begins at 1 in each.
pytestmark = pytest.mark.xdist_group("slurm")

SCRIPT = ROOT / "launch/slurm.sh"
STEPS = 5


def _script(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs the script by itself."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | variables
    return subprocess.run([SCRIPT, *arguments], env=given, capture_output=True, text=True, check=False, timeout=60)


def test_outside_of_a_job_it_tells_how_it_is_used():
    assert _script("--help").returncode == 0
    assert "sbatch --nodes=4 --ntasks-per-node=1" in _script("--help").stdout
    done = _script("configs/demo/s1.py")
    assert (done.returncode, done.stderr) == (
        2,
        "launch/slurm.sh: this is no job of Slurm; give the script to sbatch, as above\n",
    )


def test_a_job_without_a_config():
    done = _script(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR="/nowhere")
    assert done.returncode == 2
    assert "launch/slurm.sh: which config? For example: sbatch" in done.stderr


def _lives(folder: Path, statuses: str, **variables: str) -> tuple[int, list[str], str]:
    """Runs the script over stand-ins for Slurm's commands: (status, what was called, what it said).

    Args:
      statuses: a shell command for each call of srun, such as "exit 1".
    """
    (folder / "srun").write_text(
        f'#!/bin/bash\necho "srun $SRUN_CPUS_PER_TASK $*" >> {folder}/calls\n'
        f'case "$(grep -c ^srun {folder}/calls)" in\n'
        + "".join(f"{number}) {each} ;;\n" for number, each in enumerate(statuses.split(","), 1))
        + "esac\n"
    )
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "scontrol $*" >> {folder}/calls\nkill -TERM $PPID\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(folder)}
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "PAUSE_SECONDS": "0", "QWENVL_JAX_PYTHON": "py"}
    done = _script("c.py", "--out", "a b", **{**job, **paths, **variables})
    return done.returncode, (folder / "calls").read_text().splitlines(), done.stderr


TRAIN = "--kill-on-bad-exit=0 --wait=600 py -m qwenvl_jax train c.py --out a b"


@pytest.mark.parametrize(
    ("statuses", "variables", "status", "calls"),
    [
        ("exit 0", {}, 0, [f"srun  {TRAIN}"]),
        ("exit 0", {"SLURM_CPUS_PER_TASK": "8"}, 0, [f"srun 8 {TRAIN}"]),
        ("exit 2", {}, 2, [f"srun  {TRAIN}"]),
        ("exit 137,exit 1,exit 0", {}, 0, [f"srun  {TRAIN}"] * 3),
        ("exit 134,exit 134,exit 134", {"RESTARTS": "2"}, 134, [f"srun  {TRAIN}"] * 3),
        # Counted anew after a life of two seconds.
        (
            "exit 134,sleep 2; exit 134,exit 135,exit 0",
            {"RESTARTS": "1", "STEADY_SECONDS": "2"},
            135,
            [f"srun  {TRAIN}"] * 3,
        ),
        ("exit 130", {}, 130, [f"srun  {TRAIN}", "scontrol requeue 7"]),
        ("exit 143", {}, 143, [f"srun  {TRAIN}", "scontrol requeue 7"]),
        # The job itself is ended: Slurm knows what follows.
        ("kill -TERM $PPID; sleep 0.5; exit 130", {}, 130, [f"srun  {TRAIN}"]),
        ("kill -TERM $PPID; sleep 0.5; exit 1", {}, 1, [f"srun  {TRAIN}"]),
        ("exit 130", {"SLURM_RESTART_COUNT": "3", "REQUEUES": "3"}, 130, [f"srun  {TRAIN}"]),
    ],
)
def test_lives(tmp_path, statuses, variables, status, calls):
    assert _lives(tmp_path, statuses, **variables)[:2] == (status, calls)


def test_a_job_that_ends_before_its_tasks_have_saved_says_what_to_do(tmp_path):
    told = _lives(tmp_path, "kill -TERM $PPID; sleep 0.5; exit 1")[2]
    assert "its time limit came before a checkpoint), submit it again" in told


def test_a_job_that_was_started_too_often_says_so(tmp_path):
    told = _lives(tmp_path, "exit 130", SLURM_RESTART_COUNT="3", REQUEUES="3")[2]
    assert "the job was started 4 times (REQUEUES=3); submit it again to continue" in told


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment for commands of a Slurm on this machine."""
    if absent := missing():
        pytest.skip(f"Slurm's {', '.join(absent)} are not installed (apt install slurm-wlm munge)")
    with one_machine_slurm(tmp_path_factory.mktemp("slurm")) as given:
        yield given


@pytest.fixture(scope="module")
def config(tmp_path_factory, clip):
    return write_several_run(tmp_path_factory.mktemp("several"), clip)


class Job:
    """A run in two tasks of Slurm, in a folder of its own, with checkpoints of all steps.

    Args:
      moment: of task 1 when it first starts, see `tests.train.killed`.
    """

    def __init__(self, slurm: dict[str, str], config: Path, name: str, *arguments: object, moment: str = ""):
        self.slurm, self.folder = slurm, config.parent / name
        self.folder.mkdir()
        self.out, self.log, self.armed = (self.folder / part for part in ("out", "log", "armed"))
        python = self.folder / "python"
        python.write_text(
            f"#!/bin/bash\nif [[ -n '{moment}' && $SLURM_PROCID == 1 && ! -e {self.armed} ]]; then\n"
            f'  echo $$ > {self.armed}; exec {sys.executable} -m tests.train.killed {moment} "${{@:4}}"\n'
            f'fi\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        given = environment(QWENVL_JAX_PYTHON=str(python), PAUSE_SECONDS="0")
        given |= {name: slurm[name] for name in ("PATH", "SLURM_CONF")}
        command = ["--ntasks=2", f"--output={self.log}", SCRIPT, config, "--out", self.out, *arguments]
        self.number = submit(given, *command, "--checkpoint_every", "1", cwd=ROOT)

    def call(self, *command: object) -> None:
        subprocess.run([*map(str, command)], env=self.slurm, check=True, capture_output=True)

    def facts(self) -> dict[str, str]:
        return facts(self.slurm, self.number)

    def until(self, what, seconds: float = 1500):
        """Waits until `what` gives something, and returns it."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.5)
        return found

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "nothing"

    def end(self) -> dict[str, str]:
        """What is known of the job when it has ended."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.until(lambda: (found := self.facts())["JobState"] in ends and found)

    def wait_until_still(self) -> None:
        """Waits until SIGSTOP has reached task 1."""

        def still():
            number = self.armed.read_text().strip() if self.armed.exists() else ""
            return number and Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "T"

        self.until(still)

    def hurry(self) -> None:
        """Has the job, requeued, start now, and not after the minutes that Slurm gives a node to become clean."""
        self.until(lambda: self.facts()["JobState"] == "PENDING")
        self.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def check_is(self, whole: "Job") -> None:
        """The same numbers, bit for bit."""
        assert read_metrics(self.out / "metrics.jsonl") == read_metrics(whole.out / "metrics.jsonl")
        ours, theirs = (job.out / "model" / "model.safetensors" for job in (self, whole))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="module")
def whole(slurm, config):
    """A job that nobody disturbed."""
    job = Job(slurm, config, "whole")
    found = job.end()
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "0"), job.said()
    assert f"launch/slurm.sh: job {job.number}, 2 tasks on" in job.said()
    return job


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_tasks_are_one_run(whole):
    lines = read_metrics(whole.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    record = json.loads(next((whole.out / "checkpoints").glob("5/progress/*")).read_text())
    assert record["mesh"]["processes"] == record["mesh"]["fsdp"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "command", "told"),
    [
        # As before the time limit: the tasks alone are told.
        ("limit", ["scancel", "--signal=TERM"], "requeues itself and continues"),
        ("requeued", ["scontrol", "requeue"], "DUE TO JOB REQUEUE"),
    ],
)
def test_an_interrupted_job_goes_on(slurm, config, whole, name, command, told):
    """From the checkpoint of the step it was in, to the same end."""
    job = Job(slurm, config, name, moment="SIGSTOP:step:2")
    job.wait_until_still()
    job.call(*command, job.number)
    job.call("kill", "-CONT", job.armed.read_text().strip())
    job.hurry()
    found = job.end()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), job.said()
    stopped = re.findall(r"stopped after step (\d) of 5", job.said())
    assert stopped in (["2"], ["3"]), job.said()
    assert told in job.said()
    assert f"continuing after step {stopped[0]} of 5" in job.said()
    assert "2 tasks on" in job.said() and ", start 2" in job.said()
    job.check_is(whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cancelled_job_saves_and_stays_away(slurm, config):
    job = Job(slurm, config, "cancelled", moment="SIGSTOP:step:2")
    job.wait_until_still()
    job.call("scancel", job.number)
    found = job.end()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), job.said()
    done = len(read_metrics(job.out / "metrics.jsonl"))
    assert done in (2, 3)
    job.until(lambda: f"stopped after step {done} of 5" in job.said())
    assert (job.out / "checkpoints" / str(done)).is_dir()
    assert ", start 2" not in job.said()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_task_and_the_job_goes_on(slurm, config, whole):
    """Within the job: Slurm gives it no other start."""
    job = Job(slurm, config, "killed", moment="SIGKILL:step:3")
    found = job.end()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), job.said()
    assert "launch/slurm.sh: the tasks ended with status 137" in job.said()
    assert "continuing after step " in job.said()
    job.check_is(whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_mistake_ends_the_job(slurm, config):
    job = Job(slurm, config, "mistake", "--seed", "x")
    found = job.end()
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), job.said()
    assert "the tasks ended with status" not in job.said()
