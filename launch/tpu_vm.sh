#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for a slice, installs this folder on its hosts, starts the run on all of them and watches.
#
#     NAME=qwen ZONE=us-east5-a TYPE=v5p-64 launch/tpu_vm.sh train CONFIG --out gs://BUCKET/DIR [--key value ...]
#     NAME=qwen ZONE=us-east5-a launch/tpu_vm.sh log       # of the first host, as it grows
#     NAME=qwen ZONE=us-east5-a launch/tpu_vm.sh stop      # a checkpoint is written, and the run ends
#     NAME=qwen ZONE=us-east5-a launch/tpu_vm.sh delete    # gives the slice back: until then it is paid for
#
# `train` may be interrupted and called again: it goes on with what is there. It ends when the run ends, with its status (0
# done, 2 a mistake, 130 after `stop`). Where a process dies, every host starts its own again (launch/local.sh, RESTARTS
# times); on a host that was started anew the run is installed and started again, and on all where one was shut down; a
# slice that was preempted is asked for again, RECREATIONS times; one that was deleted is not. The log is ~/qwenvl_jax/run.log on each host.
#
# Variables, with their defaults:
#   NAME, ZONE         of the queued resource, to be given
#   TYPE               of a slice, such as v5p-64 or v6e-256, to be given to `train`
#   SLICES=1           so many slices of that type in one run
#   SPOT=              yes: cheaper, and may be preempted at any time
#   PROJECT=           gcloud's own setting
#   RUNTIME=           the image of the hosts, by TYPE for v4, v5p, v5litepod and v6e
#   CREATE_FLAGS=      more for `gcloud compute tpus queued-resources create`, such as "--reserved --network=NET"
#   SSH_FLAGS=         more for its `ssh` and `scp`, such as "--tunnel-through-iap"
#   SETUP=             what installs qwenvl_jax in the folder on a host; by default uv, with a Python of its own
#   RESTARTS=5  RECREATIONS=20  POLL_SECONDS=60
#
# LIBTPU_INIT_ARGS, XLA_FLAGS, JAX_COMPILATION_CACHE_DIR, QWENVL_DATA, WANDB_PROJECT, WANDB_NAME and WANDB_MODE hold on the
# hosts too where they are set here, whatever is in them; other variables do not. A run that is going on keeps its own, and
# `train` with others is told that the slice is busy.
set -uo pipefail

# Variables that the run gets as they are here; no secrets, which anybody could read on the command line.
passed=(LIBTPU_INIT_ARGS XLA_FLAGS JAX_COMPILATION_CACHE_DIR QWENVL_DATA WANDB_PROJECT WANDB_NAME WANDB_MODE)
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
say() { echo "launch/tpu_vm.sh: $*" >&2; }
fail() { say "$*"; exit 2; }
# What is older, as on macOS, reads empty lists and quotes otherwise.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "bash $BASH_VERSION is too old, 4.4 is wanted; on macOS: brew install bash"
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# ---- on a host, where `ssh` calls this script

on_host() { # begun, start (with the run: NAME=VALUE of its variables, the arguments of `train`) | status | stop | log
  cd "$here" || exit 1
  local pid
  pid="$(cat run.pid 2>/dev/null)"
  grep -qs launch/local.sh "/proc/$pid/cmdline" || pid='' # its end, or another process that has its number now
  case "$1" in
    begun)
      if [[ -z "$pid" ]]; then echo none
      elif [[ "$(printf '%q ' "${@:2}")" == "$(cat run.arguments)" ]]; then echo same
      else echo "another run, $(cat run.arguments)"
      fi
      ;;
    start)
      shift
      [[ -z "$pid" ]] || return 0
      rm -f run.status run.pid run.stopped
      printf '%q ' "$@" >run.arguments
      while [[ "$1" =~ ^[A-Z_]+= ]]; do export "${1?}"; shift; done
      # Beyond the end of the connection.
      # shellcheck disable=SC2016
      nohup setsid bash -c 'launch/local.sh "$@" & echo $! >run.pid; wait $!; echo $? >run.status' _ "$@" \
        >>run.log 2>&1 </dev/null &
      # Whoever asks next is to find it.
      for ((tenths = 0; tenths < 50; tenths++)); do [[ ! -s run.pid ]] || break; sleep 0.1; done
      ;;
    status)
      # How a run ended is written a moment after it has.
      [[ -s run.status || -n "$pid" || ! -e run.pid ]] || sleep 1
      if [[ "$(cat run.status 2>/dev/null)" == 130 && ! -e run.stopped ]]; then
        echo none # nobody asked for it but a host of the slice that was taken away or started anew
      elif [[ -s run.status ]]; then cat run.status
      elif [[ -n "$pid" ]]; then echo running
      else echo none
      fi
      ;;
    stop)
      touch run.stopped
      [[ -z "$pid" ]] || kill -TERM "$pid"
      ;;
    log) tail -n 100 -F run.log ;;
  esac
}
if [[ "${1:-}" == on-host ]]; then
  shift
  on_host "$@"
  exit
fi

# ---- here

command="${1:-}"
case "$command" in
  --help | -h) usage; exit 0 ;;
  train | log | stop | delete) shift ;;
  *) usage >&2; fail "what to do? train, log, stop or delete" ;;
esac
[[ -n "${NAME:-}" ]] || fail "NAME is not set; name the slice, for example NAME=qwen"
[[ -n "${ZONE:-}" ]] || fail "ZONE is not set; for example ZONE=us-east5-a"
command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

at=(--zone="$ZONE")
[[ -z "${PROJECT:-}" ]] || at+=(--project="$PROJECT")
read -ra ssh_flags <<<"${SSH_FLAGS:-}"
read -ra create_flags <<<"${CREATE_FLAGS:-}"
tpus() { gcloud compute tpus queued-resources "$1" "$NAME" "${at[@]}" "${@:2}"; }
ssh_to() { tpus ssh --node="$1" --worker="$2" "${ssh_flags[@]}" --command="$3"; }
on_all() { ssh_to all all "$1"; }
host=qwenvl_jax/launch/tpu_vm.sh
ask_all() { on_all "if [ -x $host ]; then $host on-host $1; else echo none; fi"; } # a line from each

state() { # NONE where there is no such resource, nothing where gcloud does not say
  local told errors
  errors="$(mktemp)"
  if told="$(tpus describe --format='value(state.state)' 2>"$errors")"; then
    echo "$told"
  elif grep -qi 'NOT_FOUND\|not found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
  fi
  rm -f "$errors"
}

case "$command" in
  log) ssh_to 0 0 "$host on-host log"; exit ;;
  stop) on_all "$host on-host stop"; exit ;;
  delete) tpus delete --force --quiet; exit ;;
esac

[[ -n "${TYPE:-}" ]] || fail "TYPE is not set; the kind of slice, for example TYPE=v5p-64"
[[ "${1:-}" == *.py ]] || fail "which config? For example: launch/tpu_vm.sh train configs/pretrain/s1.py --out gs://BUCKET/s1"
# Hosts share no disk.
[[ " $* " == *" --out gs://"* || " $* " == *" --out=gs://"* ]] || fail "give --out gs://BUCKET/DIR: the hosts share no disk"
slices="${SLICES:-1}"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$slices must be a whole number, at least 1"
runtime="${RUNTIME:-}"
if [[ -z "$runtime" ]]; then
  case "$TYPE" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "TYPE=$TYPE: no image is known for it; set RUNTIME (gcloud compute tpus versions list --zone=$ZONE)" ;;
  esac
fi
setup="${SETUP:-python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv \
&& python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs,tfds,tensorboard,wandb]'}"
poll="${POLL_SECONDS:-60}"
run=() # as the hosts are told
for name in "${passed[@]}"; do
  [[ -z "${!name:-}" ]] || run+=("$name=${!name}")
done
run+=("$@")

remind() {
  say "a slice is paid for as long as it is there; to give it back: NAME=$NAME ZONE=$ZONE${PROJECT:+ PROJECT=$PROJECT} launch/tpu_vm.sh delete"
}

create() {
  local nodes=(--node-id="$NAME")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$NAME")
  [[ "${SPOT:-}" != yes ]] || nodes+=(--spot)
  say "asking for $slices x $TYPE in $ZONE"
  trap remind EXIT # whatever becomes of the request
  tpus create --accelerator-type="$TYPE" --runtime-version="$runtime" "${nodes[@]}" "${create_flags[@]}" --async ||
    fail "the slice could not be asked for; gcloud says why above"
}

acquire() { # returns when the slice is there
  local last='' found
  while :; do
    found="$(state)"
    [[ -n "$found$known" ]] || { say "gcloud does not tell of $NAME; see above"; exit 1; }
    known=yes
    [[ -z "$found" || "$found" == "$last" ]] || say "$NAME is $found"
    last="$found"
    case "$found" in
      ACTIVE) there=yes; trap remind EXIT; return ;;
      NONE)
        # With `delete` in another terminal, say, it was given back for good.
        [[ -z "$there" ]] || { trap - EXIT; say "$NAME was deleted, and not from here: the run has ended"; exit 1; }
        create
        ;;
      FAILED | SUSPENDED)
        ((recreations-- > 0)) || { say "$NAME is $found again (RECREATIONS=${RECREATIONS:-20})"; exit 1; }
        say "asking for the slice again"
        if tpus delete --force --quiet; then there=''; else say "it could not be deleted; trying again"; fi
        ;;
      '' | DELETING) ;;
      *) there=yes ;;
    esac
    [[ "$found" == NONE ]] || sleep "$poll"
  done
}

install() { # on the hosts where the run is not going on
  local archive
  archive="$(mktemp -d)/qwenvl_jax.tar.gz"
  tar -czf "$archive" -C "$here" --exclude=./.git --exclude='./.venv*' --exclude=./runs --exclude=./run.* \
    --exclude=__pycache__ . || fail "this folder could not be packed"
  tpus scp "$archive" "$NAME:" --node=all --worker=all "${ssh_flags[@]}" &&
    on_all "[ \"\$($host on-host status 2>/dev/null)\" = running ] || { mkdir -p qwenvl_jax &&
      tar -xzf qwenvl_jax.tar.gz -C qwenvl_jax && cd qwenvl_jax && { $setup; }; }"
  local status=$?
  rm -rf "$(dirname "$archive")"
  return "$status"
}

start() { # installs where the run is not going on, and starts it there
  local begun other
  begun="$(ask_all "begun$(printf ' %q' "${run[@]}")")" || return 1
  if other="$(grep -m 1 '^another run, ' <<<"$begun")"; then
    fail "the slice is busy with ${other% }; stop that one first"
  elif ! grep -qx same <<<"$begun"; then
    say "installing on all hosts"
    install || return 1
  elif grep -qx none <<<"$begun"; then
    say "installing on the hosts where the run is not going on"
    install || return 1
  fi
  on_all "RESTARTS=${RESTARTS:-5} $host on-host start$(printf ' %q' "${run[@]}")" || return 1
  say "the run is going on; its log: NAME=$NAME ZONE=$ZONE launch/tpu_vm.sh log"
}

watch() { # returns when the run has to be started again, on some hosts or all
  local heard all status
  heard_is() { grep -qxE "$1" <<<"$heard"; }
  while sleep "$poll"; do
    all=yes
    heard="$(ask_all status | grep -xE 'none|running|[0-9]+' | sort -u)" || all='' # some do not answer
    if heard_is running; then
      if heard_is 2; then
        say "a host ended with status 2; the others are told to stop"
        on_all "$host on-host stop"
      elif heard_is none && ! heard_is '0|130'; then
        say "a host has lost the run: it is started there again"
        return
      elif [[ -z "$all" && "$(state)" != ACTIVE ]]; then
        break
      fi
    elif heard_is '0|2|130' || { heard_is '[0-9]+' && ! heard_is none; }; then
      # A mistake or a stop on one host is why the others failed.
      for status in 2 130 $(grep -xE '[0-9]+' <<<"$heard" | sort -rn); do
        ! heard_is "$status" || break
      done
      say "the run ended with status $status"
      exit "$status"
    elif heard_is none || [[ "$(state)" != ACTIVE ]]; then # started anew, or gone
      break
    fi
  done
  say "the run was interrupted"
}

recreations="${RECREATIONS:-20}"
known='' there='' tries=0
while :; do
  acquire
  if ! start; then
    ((++tries < 5)) || { say "the run could not be started on all hosts; see above"; exit 1; }
    sleep "$poll" # a new host takes a while to know our key
    continue
  fi
  tries=0
  watch
done
