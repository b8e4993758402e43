# Sourced by the batch scripts of this folder: where things are, one training step by srun, and queueing again.
# shellcheck shell=bash
set -euo pipefail

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/help.sh
source "$root/scripts/help.sh"
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || die "no $python; run bash scripts/demo.sh --smoke once to make .venv, or set PYTHON"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Since SLURM 22.05 srun does not take this over from sbatch by itself, and every task would get one core
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# A SIGTERM to the batch shell itself (scancel, the time limit) must not end it before the run has saved.
heard=
trap 'heard=TERM' TERM

# needed VARIABLE MEANING: refuse to go on without it.
needed() {
  [ -n "${!1:-}" ] || die "$1 is not set: $2"
}

# train OUT_DIR [SETTINGS...]: one run, on all tasks of the job; queued again when it stopped before its end.
train() {
  local out=$1 status=0
  shift
  rm -f "$out/REQUEUE"
  printf '%s: job %s on %s, start %s\n' "$(date '+%F %T')" "${SLURM_JOB_ID:-(none)}" "${SLURM_JOB_NODELIST:-?}" \
    "$((${SLURM_RESTART_COUNT:-0} + 1))"
  srun --kill-on-bad-exit=1 "$python" -m pretrain --out_dir "$out" "$@" || status=$?
  if [ -e "$out/REQUEUE" ] || [ "$status" -eq 75 ]; then
    go_on_later "$out"
  fi
  return "$status"
}

# go_on_later OUT_DIR: queue this job again, unless somebody cancelled it. Does not return.
go_on_later() {
  rm -f "$1/REQUEUE"
  # SLURM sends SIGTERM to this shell too when it ends the job. A cancelled job could be queued again, but nobody wants it
  if [ -n "$heard" ]; then
    local job restarts
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    restarts=${job##* Restarts=}
    # Both leave the state COMPLETING; only of a job that somebody else has queued again another start is counted by now
    if [ "${restarts%% *}" = "$((${SLURM_RESTART_COUNT:-0} + 1))" ]; then
      echo "the job was queued again by somebody else; the run has saved and goes on by itself"
      exit 75
    elif [[ $job != *" Reason=TimeLimit "* ]]; then
      echo "the job was cancelled; the run has saved, submit it again to go on"
      exit 75
    fi
  fi
  if scontrol requeue "$SLURM_JOB_ID"; then
    sleep 60 # SLURM ends this script; an exit code of its own could overtake the requeue
  fi
  echo "the job cannot be queued again; submit it again to go on (docs/cluster.md, Without requeue)" >&2
  exit 75
}

# grow_once SRC DST ARGUMENTS...: grow the last checkpoint of SRC (a run, or a checkpoint) into DST if it is not there.
grow_once() {
  local src=$1 dst=$2
  shift 2
  if [ -e "$dst/MANIFEST.json" ]; then
    echo "$dst is there already"
  else
    srun --nodes=1 --ntasks=1 "$python" -m grow apply "$src" "$dst" "$@"
  fi
}
