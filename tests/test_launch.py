"""`launch/local.sh` starts a run again when a restart can help, and only then."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.train.metrics import read_metrics
from tests.train.several import write_several_run
from tests.train.tiny_run import environment

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
        "STEADY_SECONDS": "2",
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
        ("trap 'exit 7' TERM; kill -HUP $PPID; while :; do sleep 0.1; done", 5, 7, 1),  # its terminal was closed
        # Restarts are counted anew after a life of two seconds.
        ("exit 1,sleep 2; exit 1,exit 3,exit 0", 1, 3, 3),
    ],
)
def test_lives(tmp_path, ends, restarts, status, lives):
    assert _launch(tmp_path, ends, restarts) == (status, ["-m qwenvl_jax train c.py --out a b"] * lives)


def test_it_tells_how_it_is_used():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "PROCESSES=2 launch/local.sh configs/demo/s1.py" in done.stdout
    for name in ("RESTARTS", "STEADY_SECONDS", "GRACE_SECONDS", "CPU_DEVICES"):
        assert name in done.stdout


def _several(folder: Path, script: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs the script in two processes over a stand-in for Python, which knows `$life`, from 1, and its number."""
    stand_in = folder / "python"
    stand_in.write_text(
        "#!/bin/bash\n"
        f'lives={folder}/lives-$JAX_PROCESS_ID; echo "$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS" >> $lives\n'
        f"life=$(wc -l < $lives)\n{script}\n"
    )
    stand_in.chmod(0o755)
    given = {"QWENVL_JAX_PYTHON": str(stand_in), "PROCESSES": "2", "PAUSE_SECONDS": "0", **settings}
    return subprocess.run(
        [SCRIPT, "c.py"], env=os.environ | given, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_dead_process_is_named_and_all_start_again(tmp_path):
    """The other one hangs, as one may that waits for the dead, and is killed."""
    script = "case $life-$JAX_PROCESS_ID in 1-1) kill -9 $$ ;; 1-0) sleep 100 ;; esac"
    done = _several(tmp_path, script, GRACE_SECONDS="1")
    assert done.returncode == 0
    # The shell has words of its own for those that a signal ended.
    assert [line for line in done.stderr.splitlines() if ": process " in line] == [
        "launch/local.sh: process 1 of 2 was ended by SIGKILL",
        "launch/local.sh: process 0 of 2 was ended by SIGKILL",
    ]
    lives = [(tmp_path / f"lives-{index}").read_text().splitlines() for index in range(2)]
    assert lives[0] == lives[1]
    assert [line.split()[0] for line in lives[0]] == ["2", "2"]
    # A port of its own for each life: the old one may still be taken.
    assert all(line.split()[1].startswith("127.0.0.1:") for line in lives[0])


def test_a_mistake_is_not_started_again(tmp_path):
    done = _several(tmp_path, "exit 2")
    assert done.returncode == 2
    assert (tmp_path / "lives-0").read_text().count("\n") == 1
    assert sorted(done.stderr.splitlines()) == [
        f"launch/local.sh: process {index} of 2 ended with status 2" for index in range(2)
    ]


def test_all_processes_are_told_to_stop(tmp_path):
    """As by a scheduler; each ends in its own time, longer than dead ones would be waited for."""
    script = "trap 'sleep 2; exit 130' TERM; [[ $JAX_PROCESS_ID == 1 ]] && { sleep 1; kill -TERM $PPID; }\n"
    done = _several(tmp_path, script + "while :; do sleep 0.1; done", GRACE_SECONDS="1")
    assert done.returncode == 130
    assert done.stderr.count("ended with status 130") == 2


def test_a_stop_between_two_lives_is_not_forgotten(tmp_path):
    done = _several(tmp_path, "(sleep 1; kill -TERM $PPID) & exit 1", PROCESSES="1", PAUSE_SECONDS="2")
    assert (done.returncode, (tmp_path / "lives-").read_text().count("\n")) == (1, 1)


def test_gpus_are_shared_evenly(tmp_path):
    """By a stand-in for the program that lists them, or by the variable that says which there are."""
    lister = tmp_path / "bin" / "nvidia-smi"
    lister.parent.mkdir()
    lister.write_text('#!/bin/bash\nfor i in 0 1 2 3; do echo "GPU $i: H100 (UUID: GPU-$i)"; done\n')
    lister.chmod(0o755)
    here = {"PATH": f"{lister.parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}
    script = f'echo "${{JAX_LOCAL_DEVICE_IDS:-all}}" >> {tmp_path}/gpus-$JAX_PROCESS_ID'
    for given, shares in (
        ({}, ["0,1", "2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "5,7"}, ["0", "1"]),
        ({"JAX_PLATFORMS": "cpu"}, ["all", "all"]),
    ):
        assert _several(tmp_path, script, **here | given).returncode == 0
        assert [(tmp_path / f"gpus-{index}").read_text().splitlines()[-1] for index in range(2)] == shares
    done = _several(tmp_path, script, **here, PROCESSES="3")
    assert (done.returncode, done.stderr) == (
        2,
        "launch/local.sh: PROCESSES=3 cannot share 4 GPUs evenly; take a number that divides them\n",
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_devices_of_the_cpu_have_threads_to_spare(tmp_path):
    """One of several exchanges at once may need the thread that another holds; JAX starts one a device, or core."""
    (tmp_path / "count.py").write_text(
        "import jax, pathlib\n"
        "devices = len(jax.devices())\n"
        "names = [name.read_text() for name in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "print(devices, sum(name.startswith('tf_XLAEigen') for name in names))\n"
    )
    script = f"{sys.executable} {tmp_path}/count.py > {tmp_path}/pool"
    for given, wanted in (({"NPROC": ""}, max(64, os.cpu_count())), ({"NPROC": "20"}, 20)):
        done = _several(tmp_path, script, PROCESSES="1", CPU_DEVICES="4", **given)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "pool").read_text().split() == ["4", str(wanted)]


def test_a_number_of_processes_that_is_none(tmp_path):
    done = _several(tmp_path, "exit 0", PROCESSES="two")
    assert (done.returncode, done.stderr) == (
        2,
        "launch/local.sh: PROCESSES=two must be a whole number, at least 1\n",
    )


@pytest.mark.slow
def test_a_killed_process_and_the_run_goes_on(tmp_path, clip):
    """Two real processes, one killed in its third step: the script names it, and the run goes on to its end."""
    config = write_several_run(tmp_path, clip)
    kill = tmp_path / "python"
    # The first life of process 1 is armed.
    kill.write_text(
        f"#!/bin/bash\nif [[ $JAX_PROCESS_ID == 1 && ! -e {tmp_path}/armed ]]; then touch {tmp_path}/armed\n"
        f'exec {sys.executable} -m tests.train.killed SIGKILL:step:3:1 "${{@:4}}"; fi\nexec {sys.executable} "$@"\n'
    )
    kill.chmod(0o755)
    given = {"QWENVL_JAX_PYTHON": str(kill), "PROCESSES": "2", "PAUSE_SECONDS": "0"}
    done = subprocess.run(
        [SCRIPT, config, "--out", tmp_path / "out", "--checkpoint_every", "1"],
        env=environment(**given),
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "launch/local.sh: process 1 of 2 was ended by SIGKILL" in done.stderr
    assert "continuing after step " in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "out" / "model" / "config.json").is_file()
