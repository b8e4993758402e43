#!/usr/bin/env bash
# Grow a checkpoint, as a job of one task: BASE, a run (its last checkpoint) or a checkpoint, becomes GROWN.
# From the root of the checkout:
#
#   BASE=out/scratch/6L2048H GROWN=out/grown/24L2048H sbatch --partition=NAME scripts/slurm/grow.sh [--seed 1 ...]
#
# Arguments go to `grow apply`; without OPERATOR and FACTOR give them there. Where GROWN is whole already nothing is done.
#SBATCH --job-name=grow
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

BASE=${BASE:-}
GROWN=${GROWN:-}
OPERATOR=${OPERATOR:-stack}
FACTOR=${FACTOR:-4}

# shellcheck source=scripts/slurm/job.sh
source "${LIT_GROW_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}}/scripts/slurm/job.sh" || exit 2
needed BASE "the run or checkpoint to grow"
needed GROWN "the checkpoint to make"

grow_once "$BASE" "$GROWN" --operator "$OPERATOR" --factor "$FACTOR" "$@"
