#!/usr/bin/env bash
# Trains on a cluster that XPK made (https://github.com/AI-Hypercomputer/xpk, `pip install xpk`).
#
#     NAME=qwen CLUSTER=my-cluster TYPE=v5p-128 IMAGE=REPOSITORY/qwenvl_jax \
#       launch/xpk.sh train CONFIG --out gs://BUCKET/DIR [--key value ...]
#     CLUSTER=my-cluster launch/xpk.sh list
#     NAME=qwen CLUSTER=my-cluster launch/xpk.sh delete    # stops it, with a checkpoint; `train` again continues
#
# IMAGE is made from launch/Dockerfile and has CONFIG in it. XPK prints where the log is, and `kubectl logs` has it too. A run
# whose process dies is started again, RESTARTS times, preemptions included; a mistake (status 2) ends it.
#
# Variables, with their defaults:
#   NAME, CLUSTER      to be given; IMAGE and TYPE (v5p-128, v6e-256, ...) too, to `train`
#   SLICES=1           so many slices of that type in one run
#   PROJECT=  ZONE=    gcloud's own settings
#   RESTARTS=100       GRACE_SECONDS=300, between SIGTERM and SIGKILL
#   XPK_FLAGS=         more for `xpk workload create`, such as "--spot --priority=high"
#
# LIBTPU_INIT_ARGS, XLA_FLAGS, JAX_COMPILATION_CACHE_DIR, QWENVL_DATA, WANDB_PROJECT, WANDB_NAME and WANDB_MODE hold on the
# pods too where they are set here, whatever is in them; other variables do not.
set -uo pipefail

# Variables that the run gets as they are here; no secrets, which anybody could read on the command line and in the manifest.
passed=(LIBTPU_INIT_ARGS XLA_FLAGS JAX_COMPILATION_CACHE_DIR QWENVL_DATA WANDB_PROJECT WANDB_NAME WANDB_MODE)
say() { echo "launch/xpk.sh: $*" >&2; }
fail() { say "$*"; exit 2; }
# What is older, as on macOS, reads empty lists and quotes otherwise.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "bash $BASH_VERSION is too old, 4.4 is wanted; on macOS: brew install bash"
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
given() { # name, example
  [[ -n "${!1:-}" ]] || fail "$1 is not set; for example $1=$2"
}

command="${1:-}"
case "$command" in
  --help | -h) usage; exit 0 ;;
  train | list | delete) shift ;;
  *) usage >&2; fail "what to do? train, list or delete" ;;
esac
given CLUSTER my-cluster
[[ "$command" == list ]] || given NAME qwen
command -v xpk >/dev/null || fail "xpk is not installed; pip install xpk"
at=(--cluster="$CLUSTER")
[[ -z "${PROJECT:-}" ]] || at+=(--project="$PROJECT")
[[ -z "${ZONE:-}" ]] || at+=(--zone="$ZONE")

case "$command" in
  list) xpk workload list "${at[@]}"; exit ;;
  delete) xpk workload delete --workload="$NAME" "${at[@]}"; exit ;;
esac

given TYPE v5p-128
given IMAGE europe-docker.pkg.dev/PROJECT/REPOSITORY/qwenvl_jax
[[ "${1:-}" == *.py ]] || fail "which config? For example: launch/xpk.sh train configs/pretrain/s1.py --out gs://BUCKET/s1"
# A pod's disk goes with it.
[[ " $* " == *" --out gs://"* || " $* " == *" --out=gs://"* ]] || fail "give --out gs://BUCKET/DIR: pods share no disk"
read -ra flags <<<"${XPK_FLAGS:-}"
environment=()
for variable in "${passed[@]}"; do
  [[ -n "${!variable:-}" ]] || continue
  # XPK writes a value between double quotes into YAML as it gets it.
  value="${!variable//\\/\\\\}"
  environment+=(--env="$variable=${value//\"/\\\"}")
done
# XPK starts a run again after statuses from 127 on, which signals leave; 1 is that of a process whose others are gone.
xpk workload create --workload="$NAME" "${at[@]}" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds="${GRACE_SECONDS:-300}" "${environment[@]}" "${flags[@]}" \
  --command="qwenvl-jax train$(printf ' %q' "$@")" ||
  fail "xpk says above why; what may be left of it: CLUSTER=$CLUSTER launch/xpk.sh list, and delete"
say "XPK's nodes are paid for until the cluster is deleted or its pools are resized, whether something runs or not"
say "to end the run: NAME=$NAME CLUSTER=$CLUSTER launch/xpk.sh delete"
