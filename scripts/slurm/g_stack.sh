#!/usr/bin/env bash
# Train on from a grown checkpoint (G_stack, arXiv 2405.15319): GROWN is made from BASE first if it is not there yet.
# Requeue-safe as base_model.sh is. From the root of the checkout:
#
#   TRAIN_DATA_DIR=data/slim BASE=out/scratch/6L2048H/checkpoints/stage-01/step-0000005000 \
#     sbatch --partition=NAME scripts/slurm/g_stack.sh [--section.key value ...]
#
# The values below are those of the paper's 24L2048H. BASE is a run (its last checkpoint) or one checkpoint, which the
# old script chose by --resume_id; data goes on where the base stopped. Options, variables and settings are replaced as
# base_model.sh says, whose further variables are read, too.
#SBATCH --job-name=g_stack
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=7-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

MODEL_NAME=${MODEL_NAME:-24L2048H}
METHOD=${METHOD:-stacking}
OUT_DIR=${OUT_DIR:-out/$METHOD/$MODEL_NAME}
BASE=${BASE:-}
GROWN=${GROWN:-out/grown/$MODEL_NAME}
OPERATOR=${OPERATOR:-stack}
FACTOR=${FACTOR:-4}
TRAIN_DATA_DIR=${TRAIN_DATA_DIR:-}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
LEARNING_RATE=${LEARNING_RATE:-3e-4}
MIN_LR=${MIN_LR:-3e-5}
MAX_STEP=${MAX_STEP:-300000}
WARMUP_STEPS=${WARMUP_STEPS:-3000}

# shellcheck source=scripts/slurm/job.sh
source "${LIT_GROW_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}}/scripts/slurm/job.sh" || exit 2
needed TRAIN_DATA_DIR "the folder that scripts/prepare.py wrote"
if [ ! -e "$GROWN/MANIFEST.json" ]; then
  needed BASE "the run or checkpoint to grow, as $GROWN is not there yet"
  grow_once "$BASE" "$GROWN" --operator "$OPERATOR" --factor "$FACTOR"
fi

# the same training as a base's, from other weights
set -- --init_from "$GROWN" "$@"
source "$root/scripts/slurm/base_model.sh"
