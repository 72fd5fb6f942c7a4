#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet (launch/jobset.yaml).
#
#     NAME=qwen IMAGE=REPOSITORY/qwenvl_jax ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 \
#       launch/gke.sh train CONFIG --out gs://BUCKET/DIR [--key value ...]
#     NAME=qwen launch/gke.sh log       # of the first pod, as it grows
#     NAME=qwen launch/gke.sh status    # whether it runs, how often it was started
#     NAME=qwen launch/gke.sh delete    # stops it, with a checkpoint, and removes it; `train` again continues
#     ... launch/gke.sh print CONFIG ...    # what `train` would send, and sends nothing
#
# IMAGE is made from launch/Dockerfile and has CONFIG in it. The cluster, which kubectl points to, has JobSet 0.10 or newer
# and node pools of that accelerator and topology; `gcloud container clusters get-credentials` points kubectl to it.
#
# Variables, with their defaults:
#   NAME               of the JobSet, to be given; up to 40 small letters, digits and dashes
#   IMAGE, ACCELERATOR (tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x), TOPOLOGY   to be given to `train`
#   SLICES=1           so many slices of that topology in one run
#   CHIPS_PER_HOST=4   of the machine type; 8 for ct5lp-hightpu-8t and ct6e-standard-8t, 1 for -1t
#   NAMESPACE=default  SERVICE_ACCOUNT=default (of Kubernetes; see HOST_NETWORK)
#   HOST_NETWORK=true  of several slices, between which it is faster; false of one. With it GKE takes pods for their node:
#                      the service account of the node pools needs to read and write the bucket, and the pools the scope
#                      cloud-platform; without it SERVICE_ACCOUNT does
#   DATA_BUCKET=       a bucket that pods see at /data, by Cloud Storage FUSE, and QWENVL_DATA, if it is not set, as that
#   RESTARTS=20        after a pod died; preemptions are not counted
#   GRACE_SECONDS=300  between SIGTERM and SIGKILL
#
# LIBTPU_INIT_ARGS, XLA_FLAGS, JAX_COMPILATION_CACHE_DIR, QWENVL_DATA, WANDB_PROJECT, WANDB_NAME and WANDB_MODE hold on the
# pods too where they are set here, whatever is in them; other variables do not.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Variables that the run gets as they are here; no secrets, which anybody could read in the manifest.
passed=(LIBTPU_INIT_ARGS XLA_FLAGS JAX_COMPILATION_CACHE_DIR QWENVL_DATA WANDB_PROJECT WANDB_NAME WANDB_MODE)
say() { echo "launch/gke.sh: $*" >&2; }
fail() { say "$*"; exit 2; }
# What is older, as on macOS, reads empty lists and quotes otherwise.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "bash $BASH_VERSION is too old, 4.4 is wanted; on macOS: brew install bash"
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
given() { # name, example
  [[ -n "${!1:-}" ]] || fail "$1 is not set; for example $1=$2"
}
number() { # name
  [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} must be a whole number, at least 1"
}

command="${1:-}"
case "$command" in
  --help | -h) usage; exit 0 ;;
  train | print | log | status | delete) shift ;;
  *) usage >&2; fail "what to do? train, print, log, status or delete" ;;
esac
given NAME qwen
# shellcheck disable=SC2153 # variables in capitals come from the environment
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "NAME=$NAME must be up to 40 small letters, digits and dashes, and begin with a letter"
NAMESPACE="${NAMESPACE:-default}"
[[ "$command" == print ]] || command -v kubectl >/dev/null ||
  fail "kubectl is not installed; see https://kubernetes.io/docs/tasks/tools"
kube() { kubectl --namespace="$NAMESPACE" "$@"; }
label=jobset.sigs.k8s.io

case "$command" in
  log)
    kube logs --follow --tail=100 \
      --selector="$label/jobset-name=$NAME,$label/job-index=0,batch.kubernetes.io/job-completion-index=0"
    exit
    ;;
  status) kube get jobset "$NAME"; kube get pods --selector="$label/jobset-name=$NAME"; exit ;;
  delete) kube delete jobset "$NAME"; exit ;;
esac

given IMAGE europe-docker.pkg.dev/PROJECT/REPOSITORY/qwenvl_jax
given ACCELERATOR tpu-v5p-slice
given TOPOLOGY 4x4x4
[[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "TOPOLOGY=$TOPOLOGY must be as 4x4 or 4x4x4"
[[ "${1:-}" == *.py ]] || fail "which config? For example: launch/gke.sh $command configs/pretrain/s1.py --out gs://BUCKET/s1"
# A pod's disk goes with it.
[[ " $* " == *" --out gs://"* || " $* " == *" --out=gs://"* ]] || fail "give --out gs://BUCKET/DIR: pods share no disk"
SLICES="${SLICES:-1}" CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}" RESTARTS="${RESTARTS:-20}"
GRACE_SECONDS="${GRACE_SECONDS:-300}" SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}"
number SLICES
HOST_NETWORK="${HOST_NETWORK:-$( ((SLICES > 1)) && echo true || echo false)}"
[[ "$HOST_NETWORK" == true || "$HOST_NETWORK" == false ]] || fail "HOST_NETWORK=$HOST_NETWORK must be true or false"
DATA_BUCKET="${DATA_BUCKET:-}"
[[ "$DATA_BUCKET" =~ ^[-._a-z0-9]*$ ]] || fail "DATA_BUCKET=$DATA_BUCKET must be the name of a bucket, without gs://"
[[ -z "$DATA_BUCKET" ]] || QWENVL_DATA="${QWENVL_DATA:-/data}"
number CHIPS_PER_HOST
number RESTARTS
number GRACE_SECONDS
chips=$((${TOPOLOGY//x/*}))
((chips % CHIPS_PER_HOST == 0)) ||
  fail "TOPOLOGY=$TOPOLOGY has $chips chips, which is no multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST"
HOSTS=$((chips / CHIPS_PER_HOST))

dollar='\x24'
quoted() { # as YAML's double quotes want it
  local text="${1//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//\$/"$dollar"}" # so that nothing is filled into it below
  printf '"%s"' "${text//$'\n'/\\n}"
}
ARGUMENTS='['
for argument; do ARGUMENTS+="$(quoted "$argument"), "; done
ARGUMENTS="${ARGUMENTS%, }]"
ENVIRONMENT=''
for name in "${passed[@]}"; do
  [[ -z "${!name:-}" ]] || ENVIRONMENT+="- {name: $name, value: $(quoted "${!name}")}"$'\n                    '
done

# shellcheck disable=SC2034 # filled in below, by name
FUSE=false DATA_MOUNT='' DATA_VOLUME=''
# shellcheck disable=SC2034
if [[ -n "$DATA_BUCKET" ]]; then
  FUSE=true
  DATA_MOUNT='- {name: data, mountPath: /data, readOnly: true}'
  DATA_VOLUME="- name: data
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    readOnly: true
                    volumeAttributes: {bucketName: $(quoted "$DATA_BUCKET"), mountOptions: implicit-dirs, hostNetworkPodKSA: \"$HOST_NETWORK\"}"
fi

manifest="$(<"$here/jobset.yaml")"
for name in NAME NAMESPACE IMAGE ACCELERATOR TOPOLOGY SERVICE_ACCOUNT; do
  manifest="${manifest//"\${$name}"/"$(quoted "${!name}")"}"
done
for name in RESTARTS SLICES HOSTS GRACE_SECONDS CHIPS_PER_HOST HOST_NETWORK FUSE DATA_MOUNT DATA_VOLUME ARGUMENTS \
  ENVIRONMENT; do
  manifest="${manifest//"\${$name}"/"${!name}"}"
done

if [[ "$command" == print ]]; then
  echo "$manifest"
  exit
fi
kube create -f - <<<"$manifest" ||
  fail "nothing was started; of a run that is there already: NAME=$NAME launch/gke.sh status, or delete"
say "$((SLICES * HOSTS)) pods are asked for. The log: NAME=$NAME NAMESPACE=$NAMESPACE launch/gke.sh log"
say "nodes are paid for as long as they are there: pools that scale down lose them when the run ends; others are to be resized"
say "to end the run: NAME=$NAME NAMESPACE=$NAMESPACE launch/gke.sh delete"
