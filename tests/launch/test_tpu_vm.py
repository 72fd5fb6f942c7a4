"""`launch/tpu_vm.sh` over a stand-in for gcloud, whose hosts are folders: what the script does there is done."""

import shutil
import signal
import subprocess

import pytest

from tests.launch.commands import PASSED, Commands
from tests.train.tiny_run import ROOT

SLICE = {"NAME": "qwen", "ZONE": "us-east5-a", "POLL_SECONDS": "0.2", "SETUP": "true", "PAUSE_SECONDS": "0"}
TRAIN = ("train", "configs/demo/s1.py", "--out", "gs://bucket/a b")
AT = "--zone=us-east5-a"
REMINDER = "to give it back: NAME=qwen ZONE=us-east5-a launch/tpu_vm.sh delete"

# It has the states of a file, the last one for ever; the hosts do what is asked of them, unless they are deaf. As over
# ssh, they know no variables of the script.
GCLOUD = """\
case "$4" in
  describe)
    state=$(head -n 1 {folder}/states)
    (($(wc -l < {folder}/states) == 1)) || sed -i 1d {folder}/states
    [[ "$state" != NONE ]] || {{ echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }}
    [[ "$state" != REFUSED ]] || {{ echo "ERROR: (gcloud) you are not logged in" >&2; exit 1; }}
    echo "$state" ;;
  create) {create} ;;
  scp)
    for argument; do [[ "$argument" != *.tar.gz ]] || archive=$argument; done
    for host in {folder}/host*; do cp "$archive" $host; done ;;
  ssh)
    [[ ! -e {folder}/deaf ]] || exit 255
    for argument; do [[ "$argument" != --command=* ]] || asked="${{argument#--command=}}"; done
    failed=0
    for host in {folder}/host*; do
      cd $host && env -i PATH="$PATH" HOME=$host QWENVL_JAX_PYTHON={folder}/python PAUSE_SECONDS=0 bash -c "$asked" ||
        failed=$?
      [[ " $* " == *" --worker=all "* ]] || break
    done
    exit $failed ;;
esac
"""


class Slice:
    """The script in a small copy of the project, gcloud, and the host.

    Args:
      states: of the resource, as gcloud tells them one after the other.
      python: what qwenvl_jax does on the host, in Bash; it knows how often it was started, as $life.
      create: what gcloud does when it is asked for a slice.
      hosts: how many it has, the first in the folder "host", then "host-1".
    """

    def __init__(self, folder, states, python="exit 0", create="true", hosts=1):
        self.folder, self.script = folder, folder / "project" / "launch" / "tpu_vm.sh"
        for name in ("launch", ".venv", "runs"):
            (folder / "project" / name).mkdir(parents=True)
        for name in ("tpu_vm.sh", "local.sh"):
            shutil.copy(ROOT / "launch" / name, folder / "project" / "launch")
        self.commands = Commands(folder / "bin")
        self.commands.add("gcloud", GCLOUD.format(folder=folder, create=create))
        (folder / "states").write_text("\n".join(states) + "\n")
        for name in ["host", *(f"host-{index}" for index in range(1, hosts))]:
            (folder / name).mkdir()
        file = folder / "python"
        file.write_text(f'#!/bin/bash\necho "$@" >> {folder}/lives\nlife=$(wc -l < {folder}/lives)\n{python}\n')
        file.chmod(0o755)
        self.variables = SLICE | {"TYPE": "v5p-64"}

    def run(self, *arguments, **variables):
        return self.commands.run(self.script, *arguments, **self.variables | variables)

    def begin(self, *arguments):
        """The script in a process of its own, when the run has begun."""
        given = self.commands.environment(**self.variables)
        process = subprocess.Popen([self.script, *arguments], env=given, stderr=subprocess.PIPE, text=True)
        lines = []
        while "the run is going on" not in (line := process.stderr.readline()):
            lines.append(line)
            assert line, lines
        return process

    def lives(self):
        return (self.folder / "lives").read_text().splitlines()

    def called(self, what):
        begin = f"gcloud compute tpus queued-resources {what} "
        return [line for line in self.commands.calls() if line.startswith(begin)]


def test_from_nothing_to_the_end(tmp_path):
    one = Slice(tmp_path, ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = one.run(*TRAIN, "--mesh.fsdp", "32", PROJECT="p", SPOT="yes", CREATE_FLAGS="--network=n --tags=t")
    assert done.returncode == 0, done.stderr
    assert one.called("create") == [
        f"gcloud compute tpus queued-resources create qwen {AT} --project=p --accelerator-type=v5p-64 "
        "--runtime-version=v2-alpha-tpuv5 --node-id=qwen --spot --network=n --tags=t --async"
    ]
    assert "qwen: --node=all --worker=all" in one.called("scp")[0]
    assert one.lives() == ["-m qwenvl_jax train configs/demo/s1.py --out gs://bucket/a b --mesh.fsdp 32"]
    told = done.stderr
    assert "qwen is WAITING_FOR_RESOURCES" in told and "the run ended with status 0" in told
    assert told.splitlines()[-1].endswith("NAME=qwen ZONE=us-east5-a PROJECT=p launch/tpu_vm.sh delete")
    there = {path.name for path in (tmp_path / "host" / "qwenvl_jax").iterdir()}
    assert "launch" in there and not {".venv", "runs"} & there


@pytest.mark.parametrize(
    ("python", "status", "lives"),
    [
        ("exit 2", 2, 1),
        ("((life > 1)) || exit 130; exit 0", 0, 2),  # a host is shut down, and tells the run to save
        ("((life < 3)) && kill -9 $$; exit 0", 0, 3),  # the host starts its process again by itself
        ("exit 1", 1, 3),
    ],
)
def test_the_status_is_that_of_the_run(tmp_path, python, status, lives):
    one = Slice(tmp_path, ["ACTIVE"], python)
    done = one.run(*TRAIN, RESTARTS="2")
    assert (done.returncode, len(one.lives())) == (status, lives), done.stderr
    assert f"the run ended with status {status}" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(REMINDER)
    assert not one.called("create")


def test_a_preempted_slice_is_asked_for_again(tmp_path):
    """The host is gone in the middle of the run; on the next one it goes on."""
    gone = f"((life > 1)) || {{ touch {tmp_path}/deaf; sleep 100; }}; exit 0"
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    one = Slice(tmp_path, states, gone, create=f"rm -r {tmp_path}/deaf {tmp_path}/host/*")
    done = one.run(*TRAIN)
    assert done.returncode == 0, done.stderr
    assert "the run was interrupted" in done.stderr and "asking for the slice again" in done.stderr
    assert one.called("delete") == [f"gcloud compute tpus queued-resources delete qwen {AT} --force --quiet"]
    assert len(one.called("create")) == 1
    assert len(one.lives()) == 2


def test_a_slice_that_somebody_deleted_is_not_asked_for_again(tmp_path):
    """It would be paid for, by one who believes it is gone."""
    one = Slice(tmp_path, ["NONE", "ACTIVE", "DELETING", "NONE"], f"touch {tmp_path}/deaf; sleep 100")
    done = one.run(*TRAIN)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "launch/tpu_vm.sh: qwen was deleted, and not from here: the run has ended"
    assert len(one.called("create")) == 1


def test_a_slice_that_does_not_come(tmp_path):
    one = Slice(tmp_path, ["FAILED", "NONE", "FAILED"])
    done = one.run(*TRAIN, RECREATIONS="1")
    assert done.returncode == 1
    assert "qwen is FAILED again (RECREATIONS=1)" in done.stderr
    assert len(one.called("create")) == 1
    assert done.stderr.splitlines()[-1].endswith(REMINDER)


def test_a_request_that_is_refused_says_what_may_be_left(tmp_path):
    one = Slice(tmp_path, ["NONE"], create="echo quota >&2; exit 1")
    done = one.run(*TRAIN)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-3:] == [
        "quota",
        "launch/tpu_vm.sh: the slice could not be asked for; gcloud says why above",
        f"launch/tpu_vm.sh: a slice is paid for as long as it is there; {REMINDER}",
    ]


def test_train_again_watches_and_stop_stops(tmp_path):
    """The connection may be lost: the run goes on, and the same command finds it."""
    one = Slice(tmp_path, ["ACTIVE"], "trap 'exit 130' TERM; while :; do sleep 0.1; done")
    first = one.begin(*TRAIN)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    second = one.begin(*TRAIN)
    other = one.run("train", "configs/demo/s2.py", *TRAIN[2:])
    assert other.returncode == 2
    busy = "the slice is busy with another run, configs/demo/s1.py --out gs://bucket/a\\ b; stop that one first"
    assert busy in other.stderr
    assert one.run("stop").returncode == 0
    assert "the run ended with status 130" in second.communicate(timeout=30)[1]
    assert second.returncode == 130
    assert len(one.lives()) == len(one.called("scp")) == 1


# A machine that is started anew: the process, what starts it and what waits for that are gone without a word.
REBOOT = "read -r _ _ _ shell _ < /proc/$PPID/stat; kill -9 $shell $PPID $$"


@pytest.mark.parametrize("left", ["what was installed", "nothing"])
def test_a_host_that_was_started_anew_gets_the_run_again(tmp_path, left):
    """The first host runs all the while; it is not installed again, nor started."""
    emptied = f"rm -rf {tmp_path}/host-1/qwenvl_jax;" if left == "nothing" else ""
    python = (
        f"host=$(basename $(dirname $PWD)); echo $host >> {tmp_path}/begun\n"
        f"if [[ $host == host ]]; then until [[ -e {tmp_path}/over ]]; do sleep 0.1; done; exit 0; fi\n"
        f"(($(grep -c host-1 {tmp_path}/begun) > 1)) || {{ {emptied} {REBOOT}; }}\n"
        f"touch {tmp_path}/over\n"
    )
    one = Slice(tmp_path, ["ACTIVE"], python, hosts=2)
    done = one.run(*TRAIN, SETUP=f"basename $HOME >> {tmp_path}/installed")
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("launch/tpu_vm.sh: ") for line in done.stderr.splitlines()]
    assert told.count("a host has lost the run: it is started there again") == 1
    assert told.count("installing on the hosts where the run is not going on") == 1
    assert "the run ended with status 0" in told and "the run was interrupted" not in told
    assert (tmp_path / "installed").read_text().split() == ["host", "host-1", "host-1"]
    assert sorted((tmp_path / "begun").read_text().split()) == ["host", "host-1", "host-1"]
    assert not one.called("create")


def test_a_mistake_on_one_host_ends_the_others(tmp_path):
    """They could not go on; the status is that of the mistake."""
    python = "[[ $PWD != */host-1/* ]] || exit 2\ntrap 'exit 130' TERM; while :; do sleep 0.1; done"
    one = Slice(tmp_path, ["ACTIVE"], python, hosts=2)
    done = one.run(*TRAIN)
    assert done.returncode == 2
    assert "a host ended with status 2; the others are told to stop" in done.stderr
    assert "the run ended with status 2" in done.stderr


def test_the_run_goes_on_until_its_last_host_has_ended(tmp_path):
    python = f"[[ $PWD != */host/* ]] || exit 0\nsleep 2; touch {tmp_path}/over"
    done = Slice(tmp_path, ["ACTIVE"], python, hosts=2).run(*TRAIN)
    assert (done.returncode, (tmp_path / "over").exists()) == (0, True), done.stderr


def test_variables_are_passed(tmp_path):
    """Those of the list that are set, whole; a run with others is another one."""
    odd = {name: f"--{name} --b='c d' \"e\" \\ $HOME & f" for name in PASSED}
    wanted = {**odd, "WANDB_API_KEY": "secret"}
    shown = "; ".join(f'printf "%s\\n" "{name}=${{{name}-}}" >> {tmp_path}/seen' for name in wanted)
    one = Slice(tmp_path, ["ACTIVE"], f"{shown}\ntrap 'exit 130' TERM; while :; do sleep 0.1; done")
    one.variables |= wanted
    first = one.begin(*TRAIN)
    other = one.run(*TRAIN, XLA_FLAGS="--a --b")
    assert other.returncode == 2
    assert "the slice is busy with another run, LIBTPU_INIT_ARGS=--LIBTPU_INIT_ARGS\\ --b=" in other.stderr
    assert one.run("stop").returncode == 0
    first.communicate(timeout=30)
    assert first.returncode == 130
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen == [*(f"{name}={value}" for name, value in odd.items()), "WANDB_API_KEY="]
    assert one.lives() == ["-m qwenvl_jax train configs/demo/s1.py --out gs://bucket/a b"]


def test_gcloud_that_does_not_answer(tmp_path):
    """Is told at once; later it may be the network."""
    done = Slice(tmp_path / "a", ["REFUSED"]).run(*TRAIN)
    assert done.returncode == 1
    told = "ERROR: (gcloud) you are not logged in\nlaunch/tpu_vm.sh: gcloud does not tell of qwen; see above\n"
    assert done.stderr == told
    assert Slice(tmp_path / "b", ["PROVISIONING", "REFUSED", "ACTIVE"]).run(*TRAIN).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (TRAIN, {"NAME": ""}, "NAME is not set; name the slice, for example NAME=qwen"),
        (TRAIN, {"ZONE": ""}, "ZONE is not set; for example ZONE=us-east5-a"),
        (TRAIN, {"TYPE": ""}, "TYPE is not set; the kind of slice, for example TYPE=v5p-64"),
        (TRAIN, {"TYPE": "v9-8"}, "TYPE=v9-8: no image is known for it; set RUNTIME"),
        (TRAIN, {"SLICES": "none"}, "SLICES=none must be a whole number, at least 1"),
        (("train",), {}, "which config? For example: launch/tpu_vm.sh train configs/pretrain/s1.py"),
        (("train", "c.py", "--out", "runs/a"), {}, "give --out gs://BUCKET/DIR: the hosts share no disk"),
        ((), {}, "what to do? train, log, stop or delete"),
        (("trian",), {}, "what to do? train, log, stop or delete"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_asked_for(tmp_path, arguments, variables, told):
    one = Slice(tmp_path, ["NONE"])
    done = one.run(*arguments, **variables)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert not one.commands.calls()


def test_several_slices_and_their_end(tmp_path):
    one = Slice(tmp_path, ["NONE", "ACTIVE"])
    assert one.run(*TRAIN, SLICES="4", TYPE="v5litepod-256").returncode == 0
    assert "--runtime-version=v2-alpha-tpuv5-lite --node-count=4 --node-prefix=qwen --async" in one.called("create")[0]
    assert one.run("delete").returncode == 0
    assert one.commands.calls()[-1] == f"gcloud compute tpus queued-resources delete qwen {AT} --force --quiet"
    assert "launch/tpu_vm.sh train CONFIG --out gs://" in one.run("--help").stdout
