"""A Slurm of its own on this machine, from Debian's packages: `apt install slurm-wlm munge`.

    python -m tests.launch.one_machine_slurm FOLDER

sets one up in FOLDER, says which variable its commands need, and keeps it up until Ctrl-C or SIGTERM. Its daemons have
their own folder and ports, and run as whoever starts them, so that another Slurm on the machine does not matter.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# What Debian installs for root is not on everybody's path.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")

# Cgroups may be out of reach in a container, so processes are known by their group. A job that is cancelled has
# KillWait seconds between SIGTERM and SIGKILL. Two tasks may run at once however few processors there are.
CONFIG = """\
ClusterName=one
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait}
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0
{more}NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN {node}
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> list[str]:
    """Those of the needed programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextlib.contextmanager
def one_machine_slurm(
    folder: Path, kill_wait: int = 60, more: str = "", node: str = "", cpus: int = 4
) -> Iterator[dict[str, str]]:
    """Keeps the daemons up; gives the environment for commands that use them.

    Args:
      folder: new, with a short path: it holds a socket.
      kill_wait: seconds between SIGTERM and SIGKILL of a cancelled job.
      more: lines of slurm.conf.
      node: more of the node's line there.
      cpus: as many processors as Slurm believes in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            folder=folder,
            host=host,
            user=getpass.getuser(),
            ports=_free_ports(2),
            kill_wait=kill_wait,
            more=more,
            node=node,
            cpus=cpus,
        )
    )
    environment = os.environ | {"PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    names = ("socket", "pid-file", "log-file", "seed-file")
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in names]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host],
    ]
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(_kept(command, environment, folder / f"{command[0]}.said"))
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _up(environment), folder)
        stack.callback(_end_jobs, environment)
        yield environment


@contextlib.contextmanager
def _kept(command: list[str], environment: dict[str, str], said: Path) -> Iterator[None]:
    with said.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_jobs(environment: dict[str, str]) -> None:
    """Kills what still runs: tasks outlive the daemons."""
    user = f"--user={getpass.getuser()}"
    kill = ["scancel", "--signal=KILL", user]  # the tasks; with --full the script and what it started
    for command in (kill, [*kill, "--full"], ["scancel", user]):
        subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    deadline = time.monotonic() + 20
    listing = ["squeue", "--noheader"]
    while time.monotonic() < deadline and subprocess.run(listing, env=environment, capture_output=True).stdout:
        time.sleep(0.5)


def _up(environment: dict[str, str]) -> bool:
    command = ["sinfo", "--noheader", "--format=%t"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() in ("idle", "mix", "alloc")


def _wait(for_what, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not for_what():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"Slurm does not come up in {folder}:\n{logs}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def submit(environment: dict[str, str], *arguments: object, cwd: Path) -> int:
    """Runs `sbatch` and returns the number of the job."""
    command = ["sbatch", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    found = re.search(r"Submitted batch job (\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"sbatch: {done.stdout}{done.stderr}")
    return int(found[1])


def facts(environment: dict[str, str], job: int) -> dict[str, str]:
    """What `scontrol show job` says, such as JobState, ExitCode ("status:signal") and Restarts."""
    command = ["scontrol", "--oneliner", "show", "job", str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))


if __name__ == "__main__":
    with one_machine_slurm(Path(sys.argv[1]).resolve()) as given:
        print(f"export SLURM_CONF={given['SLURM_CONF']}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.pause()
