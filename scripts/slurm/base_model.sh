#!/usr/bin/env bash
# Train a model from its first step: the base of a growth, or the baseline from scratch. Requeue-safe: at the time limit,
# at SIGUSR1 and at SIGTERM the run saves, the job is queued again and goes on, to the same numbers.
# From the root of the checkout:
#
#   TRAIN_DATA_DIR=data/slim sbatch --partition=NAME scripts/slurm/base_model.sh [--section.key value ...]
#
# The values below are those of the paper's 6L2048H base. Options on sbatch's command line replace those in this file,
# variables of the environment those below, and settings at the end those of the run. OUT_DIR must stay the same from
# start to start: a folder with the time in its name would begin anew each time.
#SBATCH --job-name=base
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=7-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

MODEL_NAME=${MODEL_NAME:-6L2048H}
METHOD=${METHOD:-scratch}
OUT_DIR=${OUT_DIR:-out/$METHOD/$MODEL_NAME}
TRAIN_DATA_DIR=${TRAIN_DATA_DIR:-}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-32}
LEARNING_RATE=${LEARNING_RATE:-1e-3}
MIN_LR=${MIN_LR:-1e-4}
MAX_STEP=${MAX_STEP:-300000}
WARMUP_STEPS=${WARMUP_STEPS:-3000}
LOG_STEP_INTERVAL=${LOG_STEP_INTERVAL:-1}
EVAL_STEP_INTERVAL=${EVAL_STEP_INTERVAL:-5000}
SAVE_STEP_INTERVAL=${SAVE_STEP_INTERVAL:-5000}
WEIGHT_DECAY=${WEIGHT_DECAY:-1e-1}
BETA1=${BETA1:-0.9}
BETA2=${BETA2:-0.95}
GRAD_CLIP=${GRAD_CLIP:-1.0}

# SLURM runs a copy of this file from a folder of its own: the checkout is where sbatch was called, or LIT_GROW_ROOT
# shellcheck source=scripts/slurm/job.sh
source "${LIT_GROW_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}}/scripts/slurm/job.sh" || exit 2
needed TRAIN_DATA_DIR "the folder that scripts/prepare.py wrote"

train "$OUT_DIR" \
  --model.name "$MODEL_NAME" \
  --data.train "$TRAIN_DATA_DIR" \
  --stages "[{name: $METHOD, max_steps: $MAX_STEP}]" \
  --batch.global_batch_size "$GLOBAL_BATCH_SIZE" \
  --batch.micro_batch_size "$MICRO_BATCH_SIZE" \
  --optimizer.learning_rate "$LEARNING_RATE" \
  --optimizer.min_learning_rate "$MIN_LR" \
  --optimizer.weight_decay "$WEIGHT_DECAY" \
  --optimizer.beta1 "$BETA1" \
  --optimizer.beta2 "$BETA2" \
  --optimizer.grad_clip "$GRAD_CLIP" \
  --schedule.warmup_steps "$WARMUP_STEPS" \
  --logging.every_steps "$LOG_STEP_INTERVAL" \
  --validation.every_steps "$EVAL_STEP_INTERVAL" \
  --checkpoints.every_steps "$SAVE_STEP_INTERVAL" \
  "$@"
