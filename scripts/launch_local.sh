#!/usr/bin/env bash
# One run on all GPUs of this machine, or on N processes of its CPU, by torchrun. Repeat the command to go on.
#
#   bash scripts/launch_local.sh --config FILE [--section.key value ...]
#
# Ctrl-C, SIGTERM and SIGUSR1 let the run save and end with 75, whatever time that takes; a second Ctrl-C or SIGTERM
# ends it at once. Exit codes: 0 done, 75 stopped with all steps saved, else torchrun's 1 (the message says why).
#
#   PROCESSES      how many (default: as many as there are GPUs, else 1)
#   MAX_RESTARTS   how often all are started again from the last checkpoint when one dies (default 0)
#   PYTHON         interpreter with lit-grow (default: .venv/bin/python of the checkout)
#
# The settings of a run: pretrain --help
set -euo pipefail

# shellcheck source=scripts/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# torchrun would pass a signal on and kill what has not ended 30 s later; and from a terminal all would hear it twice.
# So it has a process group of its own, and the processes are asked to stop without it. A process that does not listen
# yet ignores that, as it inherits: it is asked again until it does.
asked='' early=''
# shellcheck disable=SC2317 # the traps call it
ask() {
  local agent=${!-}
  if [ -z "$agent" ]; then
    exit 75 # nothing has begun
  elif [ -n "$asked" ] && [ "$1" = urgent ]; then
    pkill -INT -P "$agent" 2>/dev/null || true # urgent once, and torchrun passes on TERM: urgent twice
    kill -TERM "$agent" 2>/dev/null || true
  elif ! pkill -USR1 -P "$agent" 2>/dev/null; then
    early=yes # there are no processes yet
    kill -TERM "$agent" 2>/dev/null || true
  fi
  asked=yes
}
trap 'ask urgent' INT TERM
trap 'ask warning' USR1

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || die "no $python; run bash scripts/demo.sh --smoke once to make .venv, or set PYTHON"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
processes=${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
PRETRAIN_STOPPED=$(mktemp)
export PRETRAIN_STOPPED # the first process says there that it stopped, which torchrun's exit code does not tell
rm -f "$PRETRAIN_STOPPED"
trap 'rm -f "$PRETRAIN_STOPPED"' EXIT

set -m
(
  trap '' USR1
  exec "$python" -m torch.distributed.run --nnodes=1 --nproc-per-node="$processes" \
    --max-restarts="${MAX_RESTARTS:-0}" --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m pretrain "$@"
) &
agent=$!
set +m
status=0
[ -n "$asked" ] || wait "$agent" || status=$?
if [ -n "$asked" ]; then # which ended `wait`, not what was waited for
  while kill -0 "$agent" 2>/dev/null; do
    sleep 1 || true
    pkill -USR1 -P "$agent" 2>/dev/null || true
  done
  status=0
  wait "$agent" || status=$?
fi
if [ -e "$PRETRAIN_STOPPED" ] || { [ -n "$early" ] && [ "$status" -ne 0 ]; }; then exit 75; fi
exit "$status"
