#!/usr/bin/env bash
# Trains on this machine, in one process or several, and starts the run again when one dies, until it is done.
#
#     launch/local.sh configs/demo/s1.py --out runs/s1
#     RESTARTS=20 CPU_DEVICES=4 launch/local.sh configs/demo/s1.py --out runs/s1-of-4 --mesh.fsdp 4 --batch.groups 4
#     PROCESSES=2 launch/local.sh configs/demo/s1.py --out runs/s1-of-2 --mesh.fsdp 2 --batch.groups 2
#
# All arguments go to `qwenvl-jax train`. A run continues from its latest checkpoint as if nothing had happened, so a
# process that was killed (out of memory, a lost machine that came back) costs only the steps since then. What a restart
# cannot mend ends this script with the same status: a mistake in the arguments, a file or a setting (2), an interruption
# (130), and a run that dies RESTARTS times (5 by default; after a life of STEADY_SECONDS, an hour, they are counted anew).
# CPU_DEVICES=N makes JAX see the CPU as N devices. A terminal that is closed ends the run, with a checkpoint: for one that
# is to outlast it, put `nohup` before the script, or use tmux.
#
# PROCESSES=N shares the run among N processes, as on N hosts, and the GPUs of this machine, if it has any, evenly among
# them (JAX_LOCAL_DEVICE_IDS). Where one dies the others cannot go on: they end by themselves, or are killed after
# GRACE_SECONDS (60 by default), and all are started again.
set -uo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
set -m # each process gets a group of its own: Ctrl-C reaches it once, through `stop`, and it writes a checkpoint

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$here/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ -n "${CPU_DEVICES:-}" ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$CPU_DEVICES"
fi
if [[ "${JAX_PLATFORMS:-}" == cpu ]]; then
  # The CPU's devices run in one pool of threads, one for each core or device. Where some wait in several exchanges at
  # once none may be left for those that they wait for. NPROC is the size of the pool.
  cores="$(getconf _NPROCESSORS_ONLN)"
  export NPROC="${NPROC:-$((cores > 64 ? cores : 64))}"
fi
processes="${PROCESSES:-1}"
if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local.sh: PROCESSES=$processes must be a whole number, at least 1" >&2
  exit 2
fi

gpus=0
if ((processes > 1)) && [[ -z "${JAX_LOCAL_DEVICE_IDS:-}" && "${JAX_PLATFORMS:-}" != cpu ]]; then
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    IFS=, read -ra seen <<<"$CUDA_VISIBLE_DEVICES"
    gpus=${#seen[@]}
  else
    gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')"
  fi
  if ((gpus % processes)); then
    echo "launch/local.sh: PROCESSES=$processes cannot share $gpus GPUs evenly; take a number that divides them" >&2
    exit 2
  fi
fi

children=()
stopped=
# shellcheck disable=SC2317,SC2329 # called by the trap
stop() {
  stopped=yes
  ((${#children[@]} == 0)) || kill -TERM "${children[@]}" 2>/dev/null
}
trap stop INT TERM HUP

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

start() { # index, then the arguments
  local index="$1"
  shift
  if ((processes > 1)); then
    export JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$index"
    ((gpus == 0)) || JAX_LOCAL_DEVICE_IDS="$(seq -s , $((index * gpus / processes)) $(((index + 1) * gpus / processes - 1)))"
    ((gpus == 0)) || export JAX_LOCAL_DEVICE_IDS
  fi
  "${QWENVL_JAX_PYTHON:-$python}" -m qwenvl_jax train "$@" &
  children[index]=$!
}

tell() { # index, status
  local who="the run" how="ended with status $2"
  ((processes == 1)) || who="process $1 of $processes"
  (($2 <= 128 || $2 == 130)) || how="was ended by SIG$(kill -l "$2")"
  echo "launch/local.sh: $who $how" >&2
}

for ((life = 0; life <= ${RESTARTS:-5}; life++)); do
  if ((processes > 1)); then
    JAX_COORDINATOR_ADDRESS="127.0.0.1:$(free_port)"
    export JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_BIND_ADDRESS="$JAX_COORDINATOR_ADDRESS"
  fi
  for ((index = 0; index < processes; index++)); do start "$index" "$@"; done
  status=0 # of the first that dies
  begun=$SECONDS
  while ((${#children[@]} > 0)); do
    for index in "${!children[@]}"; do
      if kill -0 "${children[index]}" 2>/dev/null; then continue; fi
      wait "${children[index]}" 2>/dev/null # the shell's own words on how it ended
      code=$?
      unset "children[index]"
      ((code == 0)) || tell "$index" "$code"
      if ((status == 0 && code != 0)); then
        status=$code
        deadline=$((SECONDS + ${GRACE_SECONDS:-60}))
      fi
    done
    if ((status != 0 && status != 130 && SECONDS >= deadline && ${#children[@]} > 0)); then
      kill -KILL -- "${children[@]/#/-}" 2>/dev/null # the groups, with what they started
    fi
    sleep 0.2
  done
  case "$status" in
    0 | 2 | 130) exit "$status" ;;
  esac
  ((SECONDS - begun < ${STEADY_SECONDS:-3600})) || life=0
  [[ -n "$stopped" ]] || sleep "${PAUSE_SECONDS:-2}"
  [[ -z "$stopped" ]] || exit "$status"
done
exit "$status"
