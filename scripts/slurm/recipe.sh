#!/usr/bin/env bash
# The whole recipe as a chain of jobs: base -> grow -> target -> evaluate. Each starts when the one before is done; one
# that is queued again at its time limit holds back those behind it. Called on the login node, from the root:
#
#   TRAIN_DATA_DIR=data/slim bash scripts/slurm/recipe.sh --partition=NAME [options of sbatch for every job ...]
#
# Settings of the paper's recipe are the defaults; variables of the environment replace them:
#
#   TRAIN_DATA_DIR  the folder that scripts/prepare.py wrote (no default)
#   NAME            folder of all that is made, under out/ (default recipe)
#   BASE_MODEL      size of the base (6L2048H)         TARGET_MODEL    size of the grown model (24L2048H)
#   BASE_STEPS      steps of the base (5000)           TARGET_STEPS    steps of the grown model (300000)
#   BASE_LR         learning rate of the base (1e-3)   TARGET_LR       and of the grown model (3e-4); both end at a tenth
#   OPERATOR        see `grow operators` (stack)       FACTOR          growth factor (4)
#   SETTINGS        further settings of both runs, e.g. "--batch.global_batch_size 512"
#   TRAIN_SBATCH    further options of sbatch for the two trainings, e.g. "--nodes=2"
#   ONE_TASK_SBATCH further options of sbatch for growth and evaluation, e.g. "--gres=none"
set -euo pipefail

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

root=${LIT_GROW_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export LIT_GROW_ROOT=$root
# shellcheck source=scripts/help.sh
source "$root/scripts/help.sh"
[ -n "${TRAIN_DATA_DIR:-}" ] || die "TRAIN_DATA_DIR is not set: the folder that scripts/prepare.py wrote"
command -v sbatch >/dev/null || die "no sbatch here; call this where you submit jobs"
out=out/${NAME:-recipe}
read -ra settings <<<"${SETTINGS:-}"
read -ra for_training <<<"${TRAIN_SBATCH:-}"
read -ra for_one_task <<<"${ONE_TASK_SBATCH:-}"
mkdir -p "$out"

tenth() { awk -v rate="$1" 'BEGIN { printf "%g", rate / 10 }'; }

base_lr=${BASE_LR:-1e-3} target_lr=${TARGET_LR:-3e-4}
common=(--parsable --export=ALL --output="$out/%x-%j.log" "$@")
scripts=$root/scripts/slurm

base=$(
  MODEL_NAME=${BASE_MODEL:-6L2048H} METHOD=base OUT_DIR=$out/base MAX_STEP=${BASE_STEPS:-5000} \
    LEARNING_RATE=$base_lr MIN_LR=$(tenth "$base_lr") \
    sbatch "${common[@]}" ${for_training[@]+"${for_training[@]}"} "$scripts/base_model.sh" \
    ${settings[@]+"${settings[@]}"}
)
printf 'base %s\n' "${base%%;*}" # each at once: where a later one is refused, those before wait in the queue
grow=$(
  BASE=$out/base GROWN=$out/grown \
    sbatch "${common[@]}" --dependency="afterok:${base%%;*}" --kill-on-invalid-dep=yes \
    ${for_one_task[@]+"${for_one_task[@]}"} "$scripts/grow.sh"
)
printf 'grow %s\n' "${grow%%;*}"
target=$(
  MODEL_NAME=${TARGET_MODEL:-24L2048H} METHOD=target OUT_DIR=$out/target GROWN=$out/grown \
    MAX_STEP=${TARGET_STEPS:-300000} LEARNING_RATE=$target_lr MIN_LR=$(tenth "$target_lr") \
    sbatch "${common[@]}" --dependency="afterok:${grow%%;*}" --kill-on-invalid-dep=yes \
    ${for_training[@]+"${for_training[@]}"} "$scripts/g_stack.sh" ${settings[@]+"${settings[@]}"}
)
printf 'target %s\n' "${target%%;*}"
evaluate=$(
  RUN=$out/target \
    sbatch "${common[@]}" --dependency="afterok:${target%%;*}" --kill-on-invalid-dep=yes \
    ${for_one_task[@]+"${for_one_task[@]}"} "$scripts/evaluate.sh"
)
printf 'evaluate %s\n' "${evaluate%%;*}"
