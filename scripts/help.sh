# Sourced by shell scripts: `--help` prints the comment that a script begins with and the variables that it reads.
# shellcheck shell=bash
case ${1-} in
  -h | --help)
    sed -n '1{/^#!/d;};/^#/!q;/^#SBATCH/d;/^# shellcheck/d;s/^# \{0,1\}//p' "$0"
    variables=$(sed -n 's/^\([A-Z0-9_]*\)=${\1:-\(.*\)}$/  \1=\2/p' "$0")
    if [ -n "$variables" ]; then
      printf '\nVariables of the environment, with their defaults:\n\n%s\n' "$variables"
      printf '  PYTHON=.venv/bin/python of the checkout\n  LIT_GROW_ROOT=the checkout, which is where sbatch is called\n'
    fi
    exit 0
    ;;
esac
