#!/usr/bin/env bash
# The study of docs/study.md: every comparison of configs/study, then the tables. Repeating it goes on where it stopped.
set -euo pipefail

# Rates before what uses them.
ORDER=(rates operators connection recipes confirm timing factor hops noise-and-moments large enough-tokens)

usage() {
  cat <<HELP
usage: bash scripts/study.sh [--text PATH] [NAME...]

Trains the comparisons NAME with \`grow compare\`, from settings in configs/study and into out/study, and writes
their results to benchmarks/results/study.json and docs/study.md. All of them without NAME:

  ${ORDER[*]}

Repeating the command continues where it stopped; a second shell may take other names, or seeds of the same
comparison: grow compare --config configs/study/NAME.yaml --seed 2

  --text PATH  file or folder of plain text to train on (default: books in \$LIT_GROW_DATA, or in ../shared/data)

  PYTHON             interpreter for a new .venv, 3.10 or newer (default python3)
  TORCH_INDEX_URL    package index for torch, when set
HELP
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

text=${LIT_GROW_DATA:-../shared/data}/books
names=()
while [ $# -gt 0 ]; do
  case "$1" in
    --text)
      text=${2:-}
      [ -n "$text" ] || die "--text needs a file or a folder"
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) die "unknown option $1; --help lists them" ;;
    *)
      [ -e "configs/study/$1.yaml" ] || die "no comparison $1; there are ${ORDER[*]}"
      names+=("$1")
      ;;
  esac
  shift
done
if [ ${#names[@]} -eq 0 ]; then names=("${ORDER[@]}"); fi

ensure_venv prep report
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # these models are too small for more threads to pay

if [ ! -e out/study/data/manifest.json ] && [ ! -e "$text" ]; then
  die "no text at $text; name some with --text, e.g. a folder of books"
fi
run_child "$VENV_PYTHON" scripts/prepare.py --input "$text" --out out/study/data --vocab-size 1024 --document-bytes 20000 ||
  exit $?
for name in "${names[@]}"; do
  printf '\n== %s\n' "$name"
  status=0
  run_child "$VENV_PYTHON" -m grow compare --config "configs/study/$name.yaml" || status=$?
  if [ "$status" -eq 75 ]; then stopped "$status"; fi
  [ "$status" -eq 0 ] || exit "$status"
done
run_child "$VENV_PYTHON" -m benchmarks.study
