"""What the environment says of the processes of a run; the variables of Slurm are those that srun was seen to set."""

import subprocess
import sys

import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.clusters import arguments, check_alone, slurm_devices
from tests.train.several import environment as cpu_environment
from tests.train.several import free_port

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {}),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {
                "coordinator_address": "a:1",
                "num_processes": 2,
                "process_id": 1,
                "cluster_detection_method": "deactivate",
            },
        ),
        (TASK, {"cluster_detection_method": "slurm", "local_device_ids": None}),
        (TASK | {"PMI_SIZE": "4"}, {"cluster_detection_method": "slurm", "local_device_ids": None}),
        (TASK | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, {"cluster_detection_method": "slurm"}),
        (TASK | {"SLURM_NTASKS": "1"}, None),
        # The script of a job of one task, and a shell on its node.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, {}),
        (OPEN_MPI_4, {"cluster_detection_method": "ompi"}),
        (OPEN_MPI_4 | TASK, {"cluster_detection_method": "ompi"}),  # mpirun has srun start its daemons
        (
            OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            {"cluster_detection_method": "ompi", "local_device_ids": []},
        ),
        ({"WORLD_SIZE": "1"}, {}),
        (POD, None),
        (POD | {"TPU_WORKER_HOSTNAMES": "a,b", "JOB_COMPLETION_INDEX": "0"}, {}),
    ],
)
def test_what_jax_is_told(environment, found):
    assert arguments(environment) == found


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
            "Slurm's job 7 is for 2 tasks, but srun did not start this process",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "must be host:port of process 0, as 10.0.0.2:8476"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "start it with `srun qwenvl-jax train"),
        (TASK | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two' must be a whole number"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "SLURM_STEP_TASKS_PER_NODE='2' does not tell of node 1"),
        # Open MPI 5 no longer says where the first process is.
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 says that mpirun started several processes"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2 says that mpiexec started several"),
        ({"WORLD_SIZE": "8"}, "unset WORLD_SIZE to train in this process alone"),
        # Where process 0 is, and nothing else: each pod or task would train the whole run.
        (POD | {"JAX_COORDINATOR_ADDRESS": "a:1"}, "but JAX_NUM_PROCESSES and JAX_PROCESS_ID not"),
        (TASK | {"SLURM_NTASKS": "1", "JAX_COORDINATOR_ADDRESS": "a:1"}, "a run of several processes needs all three"),
        (POD | {"JOB_COMPLETION_INDEX": "1"}, "this is pod 1 of an indexed Job.*pip install kubernetes"),
    ],
)
def test_what_does_not_go_together_or_would_train_alone(environment, told):
    with pytest.raises(ConfigError, match=told):
        arguments(environment)


def test_a_host_of_a_slice_without_its_chips():
    check_alone({"TPU_WORKER_HOSTNAMES": "localhost"})
    with pytest.raises(ConfigError, match="TPU_WORKER_HOSTNAMES=a,b names several hosts of a TPU slice"):
        check_alone({"TPU_WORKER_HOSTNAMES": "a,b"})


@pytest.mark.parametrize(
    ("tasks", "local", "seen", "devices"),
    [
        ("1", 0, "0,1,2,3", []),  # --ntasks=1 --gpus-per-node=4
        ("4", 2, "0,1,2,3", [2]),  # --ntasks=4 --gpus-per-node=4
        ("2", 1, "0,1,2,3", [2, 3]),  # --ntasks=2 --gpus-per-node=4
        ("2", 1, "2,3", []),  # --ntasks=2 --gpus-per-task=2
        ("4", 2, "2", []),  # --ntasks=4 --gpus-per-task=1
        ("2", 1, None, None),
        ("1", 0, None, []),
    ],
)
def test_the_gpus_of_a_task(tasks, local, seen, devices):
    given = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(local), "SLURM_GPUS_ON_NODE": "4"}
    assert slurm_devices(given if seen is None else given | {"CUDA_VISIBLE_DEVICES": seen}) == devices


def test_gpus_that_cannot_be_shared_evenly():
    given = {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    with pytest.raises(ConfigError, match="3 tasks of Slurm cannot share 4 GPUs of a node evenly"):
        slurm_devices(given)


def _joined(script: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs `join` in a process of its own, then the script."""
    command = [sys.executable, "-c", f"from qwenvl_jax.train.processes import join\n{script}"]
    return subprocess.run(
        command, env=cpu_environment(**variables), capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.slow
def test_the_first_process_does_not_come():
    """Nothing that this one was told is wrong: it says what it waits for, and ends so that a launcher tries again."""
    address = f"localhost:{free_port()}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    impatient = "import qwenvl_jax.train.processes as p\np._JOIN_SECONDS, p._PATIENCE_SECONDS = 2, 0.1\n"
    done = _joined(impatient + "join()", **several)
    assert done.returncode not in (0, 2, 130), done.stderr
    assert f"qwenvl-jax: process 1 waits for process 0 at {address}; it ends after 2 s" in done.stderr


def test_an_address_and_no_more():
    done = _joined("join()", JAX_COORDINATOR_ADDRESS="localhost:1")
    assert "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES and JAX_PROCESS_ID not" in done.stderr


def test_a_program_that_used_jax_before_is_left_alone():
    done = _joined("import jax\njax.devices()\njoin()\nprint('alone')", SLURM_JOB_ID="7", SLURM_NTASKS="2")
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr


@pytest.mark.parametrize(("count", "told"), [("2", "JAX was used here before it could join"), ("1", "")])
def test_a_program_that_used_jax_before_is_one_of_several(count, told):
    several = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": "0"}
    done = _joined("import jax\njax.devices()\njoin()", **several)
    assert told in done.stderr and (done.returncode == 0) == (not told), done.stderr


def test_sigterm_ends_a_process_that_joined():
    """Before its first step, too, though JAX listens to the signal once it has joined."""
    several = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "1",
        "JAX_PROCESS_ID": "0",
    }
    script = "import os, signal, time\njoin()\ntry:\n  os.kill(os.getpid(), signal.SIGTERM)\n  time.sleep(60)\n"
    done = _joined(script + "except KeyboardInterrupt:\n  print('interrupted', flush=True)", **several)
    assert done.stdout == "interrupted\n", done.stderr


def test_joined_cpus_take_no_program_from_a_cache(tmp_path):
    """One that was read back exchanges in any order, and with two processes Gloo ends both; alone the cache is used."""
    several = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "1",
        "JAX_PROCESS_ID": "0",
    }
    work = "import jax\njoin()\njax.jit(lambda x: x + 1)(1)"
    cached = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert _joined(work, **several, **cached).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert _joined(work, **cached).returncode == 0
    assert list(tmp_path.iterdir()) != []
