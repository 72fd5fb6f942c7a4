#!/usr/bin/env bash
# Trains under Slurm, one process for each task of the job, and goes on after its time limit, preemption and failures.
#
#     sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0 --cpus-per-task=32 --time=24:00:00 \
#       launch/slurm.sh CONFIG --out DIR
#     sbatch --ntasks=2 --time=2:00:00 launch/slurm.sh configs/demo/s1.py --out runs/s1 --mesh.fsdp 2 --batch.groups 2
#
# Arguments before the script are Slurm's, those after it go to `qwenvl-jax train`. DIR is on a disk that all nodes see, or
# in a bucket. The log is qwenvl-JOB.log where sbatch was called; the run's own files are in DIR. Without --cpus-per-task a
# task has one CPU, which cannot decode for eight GPUs, and where memory is counted by CPUs the memory of one.
#
#   - Before the time limit (300 s, --signal) every task gets SIGTERM and saves a checkpoint; then the job requeues itself.
#     If it has not saved by then Slurm ends it for good: for longer steps and saves, sbatch --signal=TERM@900.
#   - When Slurm preempts the job or a node fails, or at `scontrol requeue JOB`, Slurm requeues it (--requeue); it saves
#     first if it is given the time: the partition's GraceTime, or KillWait seconds.
#   - `scancel JOB` ends it for good, with a checkpoint; `scancel --signal=TERM JOB` has it save and go on at once in line.
#   - Where tasks die, all are started again in the same job, RESTARTS times, counted anew after a life of STEADY_SECONDS.
#   - A mistake in the arguments, a file or a setting (status 2) ends the job.
#
# Variables: QWENVL_JAX_PYTHON, the Python with qwenvl_jax (.venv/bin/python where sbatch was called, else python3);
# RESTARTS (5); STEADY_SECONDS (3600); REQUEUES (100), how often the job is started again at most; WAIT_SECONDS (600), after the end of the first
# task, until others that hang are killed.
#
#SBATCH --job-name=qwenvl
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -uo pipefail

say() { echo "launch/slurm.sh: $*" >&2; }

# Outside of a job this file can be read in place; in one, Slurm has copied it elsewhere.
if [[ -z "${SLURM_JOB_ID:-}" || "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,/^$/{/^#SBATCH/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  [[ "${1:-}" == --help || "${1:-}" == -h ]] && exit 0
  say "this is no job of Slurm; give the script to sbatch, as above"
  exit 2
fi
if (($# == 0)); then
  say "which config? For example: sbatch --ntasks=2 launch/slurm.sh configs/demo/s1.py --out runs/s1 --mesh.fsdp 2 --batch.groups 2"
  exit 2
fi

python="${QWENVL_JAX_PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}"
[[ -n "${QWENVL_JAX_PYTHON:-}" || -x "$python" ]] || python=python3
# srun no longer takes this from the job by itself.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export PYTHONUNBUFFERED=1

# The script itself gets SIGTERM only when Slurm ends the job: cancelled, preempted or requeued.
ended=
trap 'ended=yes' TERM
say "job $SLURM_JOB_ID, ${SLURM_NTASKS:-1} tasks on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"

for ((life = 0; life <= ${RESTARTS:-5}; life++)); do
  # Tasks save together and end one after the other: the first to end must not have Slurm kill the rest. Where one dies
  # the others end by themselves within a minute; those that hang are killed after WAIT_SECONDS.
  srun --kill-on-bad-exit=0 --wait="${WAIT_SECONDS:-600}" "$python" -m qwenvl_jax train "$@" &
  step=$! begun=$SECONDS
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  status=$?
  if [[ -n "$ended" ]]; then
    say "Slurm ends the job; if it was neither cancelled nor is requeued (its time limit came before a checkpoint), submit it again"
    break
  fi
  case "$status" in
    0 | 2) exit "$status" ;;
    130 | 143) # interrupted, and not because the job ends: the time limit is near
      if ((${SLURM_RESTART_COUNT:-0} >= ${REQUEUES:-100})); then
        say "the job was started $((SLURM_RESTART_COUNT + 1)) times (REQUEUES=${REQUEUES:-100}); submit it again to continue"
        exit "$status"
      fi
      say "stopped before its end; job $SLURM_JOB_ID requeues itself and continues"
      if scontrol requeue "$SLURM_JOB_ID"; then
        for ((seconds = 0; seconds < 60; seconds++)); do # in which Slurm ends this script
          [[ -z "$ended" ]] || exit "$status"
          sleep 1
        done
      fi
      say "the job could not be requeued; submit it again to continue"
      exit "$status"
      ;;
  esac
  say "the tasks ended with status $status"
  ((SECONDS - begun < ${STEADY_SECONDS:-3600})) || life=0
  sleep "${PAUSE_SECONDS:-2}"
done
exit "$status"
