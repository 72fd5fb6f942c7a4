"""Which processes carry out a run together, as their environment says: our own variables, Slurm, MPI, Kubernetes, TPUs.

`jax.distributed.initialize` knows these clusters. Here is what it leaves open: the devices that a task of Slurm takes,
and processes that were started as several where nothing says how they find each other. Each would train the whole run,
in the same folder.
"""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from qwenvl_jax.errors import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_OURS = (ADDRESS, COUNT, INDEX)
# What `srun` tells a task.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"
# What GKE tells pods with TPUs.
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# Launchers that say how many processes there are, but not where the first one is.
_COUNTS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "WORLD_SIZE": "a launcher of another framework",
}
_REMEDY = f"set {ADDRESS}=host:port (of process 0), {COUNT} and {INDEX} for each process"


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; empty where it looks for itself, None for a run of one process.

    Args:
      environment: variables of this process.

    Raises:
      ConfigError: variables that are no numbers or do not go together; one of several processes that cannot find the
        others.
    """
    given = {name: environment[name] for name in _OURS if environment.get(name)}
    if ADDRESS in given and not re.fullmatch(r".+:\d+", given[ADDRESS]):
        raise ConfigError(f"{ADDRESS}={given[ADDRESS]} must be host:port of process 0, as 10.0.0.2:8476.")
    if COUNT in given or INDEX in given:
        return _ours(given)
    if _OPEN_MPI_4 in environment:
        # JAX gives each process on a host one device; one that is alone there has them all.
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        return {"cluster_detection_method": "ompi"} | ({"local_device_ids": []} if alone else {})
    if _of_slurm(environment):
        return _slurm(environment)
    for name, launcher in _COUNTS.items():
        if _number(name, environment, 1) > 1:
            raise ConfigError(
                f"{name}={environment[name]} says that {launcher} started several processes, but not how they find "
                f"each other; {_REMEDY}, or unset {name} to train in this process alone."
            )
    if not _in_a_pod(environment):
        return {}
    if "JOB_COMPLETION_INDEX" not in environment:
        _check_address(environment)
        return None  # a pod by itself
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            f"this is pod {environment['JOB_COMPLETION_INDEX']} of an indexed Job, and the others are found with the "
            f"package kubernetes, which is not installed (pip install kubernetes); or {_REMEDY}."
        )
    return {"cluster_detection_method": "k8s"}


def check_alone(environment: Mapping[str, str]) -> None:
    """Checks that a process for which JAX found no cluster is a run by itself.

    Raises:
      ConfigError: it is on one of several hosts of a TPU slice, or was told where process 0 is.
    """
    _check_address(environment)
    for name in _TPU_HOSTS:
        if "," in environment.get(name, ""):
            raise ConfigError(
                f"{name}={environment[name]} names several hosts of a TPU slice, but JAX finds no TPU on this one; "
                "pip install 'qwenvl_jax[tpu]', and give the pod its chips (google.com/tpu)."
            )


def _check_address(environment: Mapping[str, str]) -> None:
    """Refuses a process that nothing tells of others but where process 0 is."""
    if environment.get(ADDRESS):
        raise ConfigError(
            f"{ADDRESS} is set, but {COUNT} and {INDEX} not; a run of several processes needs all three where no "
            "cluster says who is who."
        )


def _ours(given: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in _OURS if name not in given]
    if missing:
        raise ConfigError(
            f"{' and '.join(given)} are set, but {' and '.join(missing)} not; a run of several processes needs all "
            "three."
        )
    count, index = _number(COUNT, given), _number(INDEX, given)
    if not 0 <= index < count:
        raise ConfigError(f"{INDEX}={index} must be from 0 to {count - 1}, since {COUNT}={count}.")
    # Given in full, so that no cluster is looked for and each process keeps all devices that it sees.
    found = {"num_processes": count, "process_id": index, "coordinator_address": given[ADDRESS]}
    return found | {"cluster_detection_method": "deactivate"}


def _of_slurm(environment: Mapping[str, str]) -> bool:
    """Whether this is a task of Slurm.

    Raises:
      ConfigError: it is the script of a job of several tasks, not one of them.
    """
    if all(name in environment for name in _SLURM):
        return True
    # Without a number of tasks srun starts one a node.
    tasks = max(_number(name, environment, 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    if "SLURM_JOB_ID" in environment and tasks > 1:
        raise ConfigError(
            f"Slurm's job {environment['SLURM_JOB_ID']} is for {tasks} tasks, but srun did not start this process, so "
            "that it would train alone; start it with `srun qwenvl-jax train ...`, as launch/slurm.sh does, or unset "
            "SLURM_JOB_ID to train in this process alone."
        )
    return False


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    if _number("SLURM_NTASKS", environment) == 1:
        _check_address(environment)
        return None
    devices = {} if environment.get("JAX_LOCAL_DEVICE_IDS") else {"local_device_ids": slurm_devices(environment)}
    return {"cluster_detection_method": "slurm"} | devices


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that it sees a task of Slurm takes.

    JAX gives each task one of them, by its number on the node. That leaves GPUs idle where there are fewer tasks, and
    names some that are not there where Slurm binds GPUs to tasks (`--gpus-per-task`). Here a task that is alone on its
    node takes what it sees; so does one that sees less than the job has there, since Slurm bound it; tasks that see all
    of them share them evenly.

    Returns:
      Their numbers among those that the task sees; empty for all; None where Slurm does not say which it sees.

    Raises:
      ConfigError: tasks that cannot share them evenly.
    """
    tasks = _tasks_here(environment)
    if tasks == 1:
        return []
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return None
    seen = len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name])
    if seen < _number("SLURM_GPUS_ON_NODE", environment, seen):
        return []
    if seen % tasks:
        raise ConfigError(
            f"{tasks} tasks of Slurm cannot share {seen} GPUs of a node evenly (CUDA_VISIBLE_DEVICES="
            f"{environment['CUDA_VISIBLE_DEVICES']}); give --gpus-per-task, or a --ntasks-per-node that divides {seen}."
        )
    share, place = seen // tasks, _number("SLURM_LOCALID", environment)
    return list(range(place * share, (place + 1) * share))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks on this node, of "2(x3),1": two on each of three nodes, one on the fourth."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    each = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    nodes = [int(tasks) for tasks, times in each for _ in range(int(times or 1))]
    node = _number("SLURM_NODEID", environment, 0)
    if not node < len(nodes):
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE={text!r} does not tell of node {node}, where this task runs; start the run "
            "with srun, in the environment that Slurm gives."
        )
    return nodes[node]


def _in_a_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is a pod of Kubernetes without TPUs; pods with TPUs are told of each other by GKE."""
    return "KUBERNETES_SERVICE_HOST" in environment and not any(name in environment for name in _TPU_HOSTS)


def _number(name: str, environment: Mapping[str, str], default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be a whole number.") from None
