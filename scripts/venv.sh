# Sourced by demo.sh, study.sh and test.sh, which have gone to the root of the checkout: one way to make .venv, one way
# to stop.
# shellcheck shell=bash

VENV=.venv
VENV_PYTHON=$VENV/bin/python
STAMP=$VENV/lit-grow.stamp           # what is installed: the fingerprint of its description, then the extras
UNFINISHED=$VENV/lit-grow.unfinished # exists while pip works; found at the start, it means that pip was cut off

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

# --- signals: the command that is running gets them, finishes in its own way, and then the script ends

child=
signal_name=
trap 'signal_name=INT' INT # a terminal sends it to the command as well
trap 'signal_name=TERM; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi' TERM

# run_child COMMAND...: the exit status of COMMAND; does not return when a signal came meanwhile.
run_child() {
  local status=0 latest
  if [ -n "$signal_name" ]; then stopped 0; fi
  (
    trap - INT # a shell starts background commands deaf to it
    exec "$@"
  ) &
  child=$!
  wait "$child" || status=$?
  # A signal to this shell ends `wait` early, with its own number or with -1.
  while [ "$status" -lt 0 ] || [ "$status" -gt 128 ]; do
    if kill -0 "$child" 2>/dev/null; then
      status=0
      wait "$child" || status=$?
    else
      latest=0
      wait "$child" || latest=$?
      [ "$latest" -eq 127 ] || status=$latest # 127: this shell has told the status already
      break
    fi
  done
  child=
  if [ -n "$signal_name" ]; then stopped "$status"; fi
  return "$status"
}

# stopped STATUS: say how to go on and leave with 75 if the command saved its work, else with the shell's code.
stopped() {
  printf '\nstopped; repeat the same command to continue where it stopped\n' >&2
  if [ "$1" -eq 75 ]; then exit 75; fi
  if [ "$signal_name" = TERM ]; then exit 143; fi
  exit 130
}

# --- the virtual environment

_check_python() {
  local hint="set PYTHON to one, for example PYTHON=python3.12"
  command -v "$1" >/dev/null 2>&1 || die "no $1 here; lit-grow needs Python 3.10 or newer: $hint"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "$1 is $("$1" --version 2>&1 | head -n 1); lit-grow needs Python 3.10 or newer: $hint"
  "$1" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$1 has no venv with pip in it; on Debian and Ubuntu install it with: apt-get install python3-venv"
}

_fingerprint() {
  {
    pwd -P
    cat setup.py pyproject.toml constraints.txt
  } | cksum
}

# _phase TEXT COMMAND...: one line on stderr with the seconds it took; the command's own words only if it fails.
_phase() {
  local text=$1 start=$SECONDS status=0 log
  shift
  printf '%s ... ' "$text" >&2
  log=$VENV/lit-grow.log
  run_child "$@" >"$log" 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then
    printf 'failed\n' >&2
    cat "$log" >&2
    die "this failed, see above: $*" 1
  fi
  printf '%s s\n' "$((SECONDS - start))" >&2
}

_make_venv() {
  local python=${PYTHON:-python3}
  _check_python "$python"
  rm -rf "$VENV"
  mkdir "$VENV"
  : >"$UNFINISHED"
  _phase "making $VENV with $("$python" --version 2>&1)" "$python" -m venv "$VENV"
}

_pip_install() {
  _phase "$1" "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "${@:2}"
}

# ensure_venv EXTRA...: .venv holds lit-grow, editable, with these extras at the versions of constraints.txt.
ensure_venv() {
  local fingerprint stamped='' installed='' wanted='' extra
  fingerprint=$(_fingerprint)
  if [ -x "$VENV_PYTHON" ] && [ ! -e "$UNFINISHED" ]; then
    if [ -e "$STAMP" ]; then { read -r stamped && read -r installed; } <"$STAMP" || true; fi
    for extra in "$@"; do
      case " $installed " in *" $extra "*) ;; *) stamped= ;; esac
    done
    if [ "$stamped" = "$fingerprint" ]; then return; fi
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || _make_venv
  else
    _make_venv
  fi
  for extra in $installed "$@"; do
    case " $wanted " in *" $extra "*) ;; *) wanted="${wanted:+$wanted }$extra" ;; esac
  done
  : >"$UNFINISHED"
  rm -f "$STAMP"
  _pip_install "installing setuptools" setuptools
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    _pip_install "installing torch from TORCH_INDEX_URL" --index-url "$TORCH_INDEX_URL" --no-deps torch
  fi
  _pip_install "installing lit-grow with $wanted (minutes the first time)" --no-build-isolation --editable ".[${wanted// /,}]"
  printf '%s\n' "$fingerprint" "$wanted" >"$STAMP"
  rm -f "$UNFINISHED"
}
