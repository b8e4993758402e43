#!/usr/bin/env bash
# The main job, from nothing to a report: install, corpus, base -> stack -> continue, the scratch run, the comparison.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash scripts/demo.sh [--smoke] [--fresh] [--out DIR]

Trains a small base model on Python's own standard library, stacks its layers, trains on, trains the same model from
scratch beside it, and writes out/demo/report.html. Takes minutes on two CPU cores; needs no GPU and no compiler.
Repeating the command continues where it stopped.

  --smoke    the same path at toy size, in out/smoke
  --fresh    remove what an earlier demo (or smoke) wrote there and start over
  --out DIR  write there instead; a path inside the checkout or an absolute one

  PYTHON             interpreter for a new .venv, 3.10 or newer (default python3)
  TORCH_INDEX_URL    package index for torch, when set
HELP
}

out=
name=demo
smoke=()
fresh=no
while [ $# -gt 0 ]; do
  case "$1" in
    --smoke) name=smoke smoke=(--config configs/smoke.yaml) ;;
    --fresh) fresh=yes ;;
    --out=?*) out=${1#--out=} ;;
    --out)
      out=${2:-}
      if [ -z "$out" ]; then
        printf 'error: --out needs a folder\n' >&2
        exit 2
      fi
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      printf 'error: unknown option %s\n\n' "$1" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done
out=${out:-out/$name}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

# step TEXT COMMAND...: one of the demo's steps; when it fails, its exit status is the demo's.
step() {
  local status=0
  printf '\n== %s\n' "$1"
  shift
  run_child "$@" || status=$?
  if [ "$status" -eq 75 ]; then stopped "$status"; fi
  [ "$status" -eq 0 ] || die "stopped with exit status $status: $*
If another version of the demo left $out, --fresh removes that and starts over" "$status"
}

if [ "$fresh" = yes ]; then rm -rf "$out"/{data,stacked,scratch,figures,tables} "$out"/report.{html,json}; fi
ensure_venv prep report

pretrain=("$VENV_PYTHON" -m pretrain --config configs/demo.yaml ${smoke[@]+"${smoke[@]}"} --data.train "$out/data")

step "corpus: Python's standard library" "$VENV_PYTHON" scripts/prepare.py --stdlib --vocab-size 2048 --out "$out/data"
step "base, stack, continue" "${pretrain[@]}" --out-dir "$out/stacked"
step "the same model from scratch" "${pretrain[@]}" --out-dir "$out/scratch" --scratch
if [ "$name" = smoke ]; then
  printf '\nAt this toy size the comparison only shows that everything runs: it is too short for growth to help.\n'
fi
step "comparison" "$VENV_PYTHON" -m grow report "$out/stacked" "$out/scratch" --out "$out"
