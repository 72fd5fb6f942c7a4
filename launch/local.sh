#!/usr/bin/env bash
# Trains on this machine in one process, and starts it again when it dies, until it is done.
#
#     launch/local.sh configs/demo/s1.py --out runs/s1
#     RESTARTS=20 CPU_DEVICES=4 launch/local.sh configs/demo/s1.py --mesh.fsdp 4
#
# All arguments go to `qwenvl-jax train`. A run continues from its latest checkpoint as if nothing had happened, so a
# process that was killed (out of memory, a lost machine that came back) costs only the steps since then. What a restart
# cannot mend ends this script with the same status: a mistake in the arguments, a file or a setting (2), an interruption
# (130), and a run that dies RESTARTS times (5 by default). CPU_DEVICES=N makes JAX see the CPU as N devices.
set -uo pipefail
set -m # the run gets a process group of its own: Ctrl-C reaches it once, through `stop`, and it writes a checkpoint

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$here/.venv/bin/python"
[[ -x "$python" ]] || python=python3
if [[ -n "${CPU_DEVICES:-}" ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$CPU_DEVICES"
fi

child=
stopped=
stop() {
  stopped=yes
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null
}
trap stop INT TERM

for ((life = 0; life <= ${RESTARTS:-5}; life++)); do
  "${QWENVL_JAX_PYTHON:-$python}" -m qwenvl_jax train "$@" &
  child=$!
  wait "$child"
  status=$?
  # A signal to this script ends `wait` early; the run is then writing its checkpoint.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  child=
  case "$status" in
    0 | 2 | 130) exit "$status" ;;
  esac
  [[ -z "$stopped" ]] || exit "$status"
  echo "launch/local.sh: the run ended with status $status" >&2
  sleep "${PAUSE_SECONDS:-2}"
done
exit "$status"
