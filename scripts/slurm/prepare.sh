#!/usr/bin/env bash
# Prepare data as a SLURM job array. Every task does its share of one plan, the last to finish writes the manifest; how
# many there are changes nothing in the output. From the root of the checkout:
#
#   sbatch --array=0-7 --cpus-per-task=16 scripts/slurm/prepare.sh \
#     --input 'SlimPajama/train/chunk*/*' --split train --tokenizer llama --out data/slim
#
# The arguments are those of scripts/prepare.py (see the --help of that; --plan-only tells how many tasks have work).
# Relative paths start where you call sbatch. Tasks that were cancelled, requeued or killed go on where they stopped:
# submit the same again, with as many tasks as you like. To make sure that all is done before what needs it, let a
# single job of the same arguments follow; where nothing is left to do it only says so:
#
#   sbatch --dependency=afterany:JOBID scripts/slurm/prepare.sh ...the same arguments...
#
# Exit codes are those of prepare.py: 2 a setting, 3 a file, 75 stopped.
#
#   LIT_GROW_ROOT   root of the checkout, where sbatch is called from outside it
#   PYTHON          interpreter with lit-grow[prep] (default: .venv/bin/python of the checkout)
#   PREPARE         what runs (default: scripts/prepare.py), for example scripts/prepare_slimpajama.py
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# SLURM runs a copy of this file from a folder of its own, so where the file lies says nothing about the checkout.
find_root() {
  local dir
  if [ -n "${LIT_GROW_ROOT:-}" ]; then
    [ -f "$LIT_GROW_ROOT/scripts/prepare.py" ] || die "LIT_GROW_ROOT=$LIT_GROW_ROOT holds no scripts/prepare.py"
    printf '%s\n' "$LIT_GROW_ROOT"
    return
  fi
  for dir in "${SLURM_SUBMIT_DIR:-}" "$(dirname "${BASH_SOURCE[0]}")"; do
    [ -n "$dir" ] || continue
    dir=$(cd "$dir" && pwd)
    while [ "$dir" != / ]; do
      if [ -f "$dir/scripts/prepare.py" ]; then
        printf '%s\n' "$dir"
        return
      fi
      dir=$(dirname "$dir")
    done
  done
  die "no checkout of lit-grow at or above ${SLURM_SUBMIT_DIR:-this script}; call sbatch inside it, or set LIT_GROW_ROOT"
}

root=$(find_root)
root=$(cd "$root" && pwd)
# shellcheck source=scripts/help.sh
source "$root/scripts/help.sh"
python=${PYTHON:-$root/.venv/bin/python}
script=$root/${PREPARE:-scripts/prepare.py}
command -v "$python" >/dev/null || die "no $python; run bash scripts/demo.sh --smoke once to make .venv, or set PYTHON"
[ -f "$script" ] || die "no $script; PREPARE names a script inside the checkout"

printf '%s on %s: task %s of job %s, %s workers\n' "$(date '+%F %T')" "$(hostname -s)" \
  "${SLURM_ARRAY_TASK_ID:-(no array)}" "${SLURM_JOB_ID:-(no job)}" "${SLURM_CPUS_PER_TASK:-1}"
# exec: the signals of scancel, of a requeue and of the time limit reach prepare.py itself
exec "$python" "$script" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
