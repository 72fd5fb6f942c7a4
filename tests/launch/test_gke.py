"""`launch/gke.sh` and `launch/xpk.sh` over stand-ins for kubectl and xpk."""

import re
import tomllib

import pytest
import yaml

from tests.launch.commands import PASSED, Commands
from tests.train.tiny_run import ROOT

GKE, XPK = ROOT / "launch/gke.sh", ROOT / "launch/xpk.sh"
TPUS = {"NAME": "qwen", "IMAGE": "repo/qwenvl_jax", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x4"}
CLUSTER = {"NAME": "qwen", "IMAGE": "repo/qwenvl_jax", "CLUSTER": "mine", "TYPE": "v5p-128"}
RUN = ("configs/demo/s1.py", "--out", "gs://bucket/run")


# Values that YAML, shells and the script itself could take apart.
ODD = {name: f"--{name} --b='c d' \"e\" \\ ${{ARGUMENTS}} & f: #g" for name in PASSED}


@pytest.fixture
def commands(tmp_path):
    found = Commands(tmp_path / "bin")
    found.add("kubectl", f"[[ $2 != create ]] || cat > {tmp_path}/sent")
    found.add("xpk")
    return found


def test_what_is_sent_is_one_job_set(commands, tmp_path):
    odd = ("--name", 'a "b" \\ ${NAME} & c', "--seed", "7")
    done = commands.run(GKE, "train", *RUN, *odd, **TPUS, SLICES="2", RESTARTS="9", NAMESPACE="lab")
    assert done.returncode == 0, done.stderr
    assert commands.calls() == ["kubectl --namespace=lab create -f -"]
    sent = yaml.safe_load((tmp_path / "sent").read_text())
    assert (sent["kind"], sent["metadata"]["name"], sent["metadata"]["namespace"]) == ("JobSet", "qwen", "lab")
    assert sent["spec"]["failurePolicy"]["maxRestarts"] == 9
    [slices] = sent["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    # 64 chips, four a host.
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 16, 16, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    [container] = pod["containers"]
    assert container["command"] == ["qwenvl-jax", "train"]
    assert container["args"] == [*RUN, *odd]
    assert container["image"] == "repo/qwenvl_jax"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert "32 pods are asked for" in done.stderr
    assert "to end the run: NAME=qwen NAMESPACE=lab launch/gke.sh delete" in done.stderr
    assert "${" not in (tmp_path / "sent").read_text().split("apiVersion", 1)[1].replace("${NAME} & c", "")


def test_the_network_of_the_host_is_for_several_slices(commands):
    """With it pods have the account of their node, not their own."""
    for given, network in (({}, False), ({"SLICES": "2"}, True), ({"SLICES": "2", "HOST_NETWORK": "false"}, False)):
        job = yaml.safe_load(commands.run(GKE, "print", *RUN, **TPUS, **given).stdout)["spec"]["replicatedJobs"][0]
        pod = job["template"]["spec"]["template"]
        assert pod["spec"]["hostNetwork"] is network
        assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}
        assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["shared-memory"]


def test_a_bucket_with_data_is_mounted(commands):
    for given, data in (({}, "/data"), ({"QWENVL_DATA": "/data/built"}, "/data/built")):
        done = commands.run(GKE, "print", *RUN, **TPUS, **given, DATA_BUCKET="my-data")
        pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
        [container] = pod["spec"]["containers"]
        assert {"name": "QWENVL_DATA", "value": data} in container["env"]
        assert {"name": "data", "mountPath": "/data", "readOnly": True} in container["volumeMounts"]
        (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "data")
        assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" and volume["csi"]["readOnly"]
        assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-data"


def test_what_is_installed_is_what_runs_on_tpus_need():
    """Built data sets are read with tensorflow-datasets, and the guide's trackers write."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("Dockerfile", "tpu_vm.sh"):
        (extras,) = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "launch" / name).read_text())
        assert set(extras.split(",")) == {"tpu", "gcs", "tfds", "tensorboard", "wandb"} <= set(known)


def test_variables_are_passed_to_pods(commands):
    """Those of the list that are set, whole, and no secrets."""
    mine = {"name": "PYTHONUNBUFFERED", "value": "1"}
    for given in ({}, {"LIBTPU_INIT_ARGS": "--a=1 --b=2"}, ODD):
        done = commands.run(GKE, "print", *RUN, "--name", "${ENVIRONMENT}", **TPUS, **given, WANDB_API_KEY="secret")
        job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
        [container] = job["template"]["spec"]["containers"]
        assert container["env"] == [mine, *({"name": name, "value": value} for name, value in given.items())]
        assert container["args"] == [*RUN, "--name", "${ENVIRONMENT}"]


def test_variables_are_passed_by_xpk(commands):
    assert commands.run(XPK, "train", *RUN, **CLUSTER, LIBTPU_INIT_ARGS="--a=1 --b=2", QWENVL_DATA="/d").returncode == 0
    assert " --env=LIBTPU_INIT_ARGS=--a=1 --b=2 --env=QWENVL_DATA=/d --command=" in commands.calls()[0]
    # As xpk gets them, one argument each, and as it writes them into its manifest.
    commands.add("xpk", f'printf "%s\\n" "$@" > {commands.folder}/arguments')
    assert commands.run(XPK, "train", *RUN, **CLUSTER, **ODD, WANDB_API_KEY="secret").returncode == 0
    got = (commands.folder / "arguments").read_text().splitlines()
    pairs = [line.removeprefix("--env=").split("=", 1) for line in got if line.startswith("--env")]
    assert {name: yaml.safe_load(f'value: "{value}"')["value"] for name, value in pairs} == ODD


def test_a_mistake_is_not_repeated_and_an_interruption_not_counted(commands):
    """The statuses of `qwenvl-jax train`: of those that a rule names, only a mistake fails the set."""
    spec = yaml.safe_load(commands.run(GKE, "print", *RUN, **TPUS).stdout)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    statuses, disrupted = job["podFailurePolicy"]["rules"]
    assert statuses["onExitCodes"]["values"] == [2, 130, 143]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    first, then = spec["failurePolicy"]["rules"]
    assert (first["action"], then["action"]) == ("RestartJobSetAndIgnoreMaxRestarts", "FailJobSet")

    def counted(message):
        return not any(re.search(pattern, message) for pattern in first["onJobFailureMessagePatterns"])

    # In the words of Kubernetes' job controller.
    said = "Container train for pod lab/qwen-slice-0-3-x failed with exit code {} matching FailJob rule at index 0"
    assert [counted(said.format(status)) for status in (2, 130, 143)] == [True, False, False]
    assert not counted("Pod lab/qwen has condition DisruptionTarget matching FailJob rule at index 1")


def test_the_other_commands_of_gke(commands):
    for command in ("log", "status", "delete"):
        assert commands.run(GKE, command, NAME="qwen").returncode == 0
    assert commands.calls() == [
        "kubectl --namespace=default logs --follow --tail=100 --selector=jobset.sigs.k8s.io/jobset-name=qwen,"
        "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
        "kubectl --namespace=default get jobset qwen",
        "kubectl --namespace=default get pods --selector=jobset.sigs.k8s.io/jobset-name=qwen",
        "kubectl --namespace=default delete jobset qwen",
    ]
    assert "NAME=qwen launch/gke.sh delete" in commands.run(GKE, "--help").stdout


def test_a_refusal_says_what_may_be_there(commands):
    commands.add("kubectl", "exit 1")
    done = commands.run(GKE, "train", *RUN, **TPUS)
    assert done.returncode == 2
    assert done.stderr.endswith("of a run that is there already: NAME=qwen launch/gke.sh status, or delete\n")
    commands.add("xpk", "exit 1")
    done = commands.run(XPK, "train", *RUN, **CLUSTER)
    assert done.returncode == 2
    assert done.stderr.endswith("what may be left of it: CLUSTER=mine launch/xpk.sh list, and delete\n")


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (("train", *RUN), {"NAME": ""}, "NAME is not set; for example NAME=qwen"),
        (("train", *RUN), {"NAME": "Qwen_3"}, "NAME=Qwen_3 must be up to 40 small letters, digits and dashes"),
        (("train", *RUN), {"IMAGE": ""}, "IMAGE is not set; for example IMAGE="),
        (("train", *RUN), {"ACCELERATOR": ""}, "ACCELERATOR is not set; for example ACCELERATOR=tpu-v5p-slice"),
        (("train", *RUN), {"TOPOLOGY": ""}, "TOPOLOGY is not set; for example TOPOLOGY=4x4x4"),
        (("train", *RUN), {"TOPOLOGY": "64"}, "TOPOLOGY=64 must be as 4x4 or 4x4x4"),
        (("train", *RUN), {"TOPOLOGY": "2x1"}, "TOPOLOGY=2x1 has 2 chips, which is no multiple of CHIPS_PER_HOST=4"),
        (("train", *RUN), {"HOST_NETWORK": "yes"}, "HOST_NETWORK=yes must be true or false"),
        (("train", *RUN), {"DATA_BUCKET": "gs://mine"}, "DATA_BUCKET=gs://mine must be the name of a bucket, without"),
        (("train", *RUN), {"SLICES": "0"}, "SLICES=0 must be a whole number, at least 1"),
        (("train",), {}, "which config? For example: launch/gke.sh train"),
        (("print", "c.py", "--out", "runs/a"), {}, "give --out gs://BUCKET/DIR: pods share no disk"),
        ((), {}, "what to do? train, print, log, status or delete"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_sent(commands, arguments, variables, told):
    done = commands.run(GKE, *arguments, **TPUS | variables)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert commands.calls() == []


def test_xpk_is_told_all(commands):
    variables = CLUSTER | {"PROJECT": "p", "ZONE": "z", "XPK_FLAGS": "--spot --priority=high"}
    done = commands.run(XPK, "train", *RUN, "--name", "a b", **variables)
    assert done.returncode == 0, done.stderr
    assert commands.calls() == [
        "xpk workload create --workload=qwen --cluster=mine --project=p --zone=z --tpu-type=v5p-128 --num-slices=1 "
        "--docker-image=repo/qwenvl_jax --max-restarts=100 --restart-on-exit-codes=1 "
        "--termination-grace-period-seconds=300 --spot --priority=high "
        "--command=qwenvl-jax train configs/demo/s1.py --out gs://bucket/run --name a\\ b"
    ]
    assert "to end the run: NAME=qwen CLUSTER=mine launch/xpk.sh delete" in done.stderr
    for command in ("list", "delete"):
        assert commands.run(XPK, command, **CLUSTER).returncode == 0
    assert commands.calls()[1:] == [
        "xpk workload list --cluster=mine",
        "xpk workload delete --workload=qwen --cluster=mine",
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (("train", *RUN), {"CLUSTER": ""}, "CLUSTER is not set; for example CLUSTER=my-cluster"),
        (("delete",), {"NAME": ""}, "NAME is not set; for example NAME=qwen"),
        (("train", *RUN), {"TYPE": ""}, "TYPE is not set; for example TYPE=v5p-128"),
        (("train", *RUN), {"IMAGE": ""}, "IMAGE is not set; for example IMAGE="),
        (("train", "--out", "gs://a"), {}, "which config? For example: launch/xpk.sh train"),
        (("train", "c.py"), {}, "give --out gs://BUCKET/DIR: pods share no disk"),
        ((), {}, "what to do? train, list or delete"),
    ],
)
def test_what_xpk_needs_is_named(commands, arguments, variables, told):
    done = commands.run(XPK, *arguments, **CLUSTER | variables)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert commands.calls() == []
