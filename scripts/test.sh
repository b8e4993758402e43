#!/usr/bin/env bash
# Make .venv with the test extras if it is not there yet, then run pytest.
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash scripts/test.sh [pytest arguments]

Makes .venv (with $PYTHON, else python3), installs lit-grow with the versions of constraints.txt, and runs pytest with
the arguments given, for example: tests/grow -k stack, or -m slow. Without arguments the default suite runs. Without -m
the tests are spread over the cores, four at most; -n 0 runs them one after the other.

  PYTHON             interpreter for a new .venv, 3.10 or newer
  TORCH_INDEX_URL    package index for torch, when set
  LIT_GROW_DATA      folder of the real data that some tests read (default ../shared/data); they are skipped without it
HELP
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
ensure_venv prep report test
export OMP_NUM_THREADS=1
if [[ " $* " == *" -m "* ]]; then # marked tests start processes themselves
  exec "$VENV_PYTHON" -m pytest "$@"
fi
exec "$VENV_PYTHON" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
