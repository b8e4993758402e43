#!/usr/bin/env bash
# The validation loss of a run's last checkpoint, or of the checkpoint RUN, as a job of one task; also in RUN's
# validation.json if RUN is a run. From the root of the checkout:
#
#   RUN=out/stacking/24L2048H sbatch --partition=NAME scripts/slurm/evaluate.sh [--data.validation DIR ...]
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

RUN=${RUN:-}

# shellcheck source=scripts/slurm/job.sh
source "${LIT_GROW_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}}/scripts/slurm/job.sh" || exit 2
needed RUN "the run or checkpoint to measure"

found=$(srun --nodes=1 --ntasks=1 "$python" -m pretrain validate "$RUN" --json "$@")
printf '%s\n' "$found"
if [ -d "$RUN/checkpoints" ]; then printf '%s\n' "$found" >"$RUN/validation.json"; fi
