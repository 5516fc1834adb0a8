# Sourced by the tools: gives them .venv with scshards and the pinned set in it.
#
#   source tools/env.sh
#   use_env test,check        # the extras of setup.cfg that the tool needs
#   use_minimum test          # .venv-minimum in its place: the oldest versions that setup.cfg allows
#
# Makes .venv with a Python 3.11 or newer ($PYTHON, or the first that runs) unless a good one is there,
# and installs into it only what is not there yet: .venv/scshards-env remembers what was. Afterwards
# $PY is the environment's Python. Nothing outside that folder is touched.

ENV_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ENV_NAME=.venv ENV_CONSTRAINTS=$ENV_ROOT/tools/constraints.txt
PY=$ENV_ROOT/$ENV_NAME/bin/python

env_say() { printf 'env: %s\n' "$*" >&2; }

env_fail() {
  env_say "$*"
  exit 1
}

env_is_new_enough() {
  "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null
}

# The Python to make .venv with, in $FOUND_PYTHON.
env_find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    env_is_new_enough "$PYTHON" || env_fail "PYTHON=$PYTHON does not run, or is older than 3.11"
    FOUND_PYTHON=$PYTHON
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    # Being on the PATH is not enough: version managers leave names there that do not run.
    if env_is_new_enough "$candidate"; then
      FOUND_PYTHON=$(command -v "$candidate")
      return
    fi
  done
  env_fail "no Python 3.11 or newer was found: install one, or name it with PYTHON=/path/to/python"
}

env_make() {
  env_find_python
  env_say "making $ENV_NAME with $FOUND_PYTHON ($("$FOUND_PYTHON" -V))"
  "$FOUND_PYTHON" -m venv --clear "$ENV_ROOT/$ENV_NAME" ||
    env_fail "'$FOUND_PYTHON -m venv' failed (on Debian it needs the package python3-venv)"
}

# What pins the contents of the environment, as one hash; a moved checkout counts as another one.
env_hash() {
  (
    cd "$ENV_ROOT"
    { pwd; cat setup.cfg pyproject.toml tools/constraints.txt tools/minimum.py; } |
      "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
  )
}

use_env() {
  local wanted=$1 stamp=$ENV_ROOT/$ENV_NAME/scshards-env hash="" had_hash="" had_path="" had=""
  if [ -f "$stamp" ]; then
    { read -r had_hash; read -r had; read -r had_path; } <"$stamp" || true
    # The scripts of a .venv name its folder: one that was moved or copied is made anew.
    [ "$had_path" = "$ENV_ROOT" ] || had_path=moved
  fi
  if [ "$had_path" = moved ] || ! env_is_new_enough "$PY" || ! "$PY" -m pip --version >/dev/null 2>&1; then
    env_make
    had_hash="" had=""
  fi
  hash=$(env_hash)
  local extra all=$had missing=no
  for extra in ${wanted//,/ }; do
    case ",$all," in
      *",$extra,"*) ;;
      *) all=${all:+$all,}$extra missing=yes ;;
    esac
  done
  if [ "$hash" = "$had_hash" ] && [ $missing = no ]; then
    return
  fi
  env_say "installing scshards[$all] into $ENV_NAME (minutes on the first run)"
  local log=$ENV_ROOT/$ENV_NAME/pip.log start=$SECONDS
  rm -f "$stamp"
  if ! "$PY" -m pip install --disable-pip-version-check --progress-bar off \
    -c "$ENV_CONSTRAINTS" -e "$ENV_ROOT${all:+[$all]}" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    env_fail "pip could not install scshards[$all]; all it said is in $log"
  fi
  printf '%s\n' "$hash" "$all" "$ENV_ROOT" >"$stamp"
  env_say "installed in $((SECONDS - start)) s"
}

use_minimum() {
  ENV_NAME=.venv-minimum
  PY=$ENV_ROOT/$ENV_NAME/bin/python
  env_is_new_enough "$PY" || env_make
  ENV_CONSTRAINTS=$ENV_ROOT/$ENV_NAME.txt
  "$PY" "$ENV_ROOT/tools/minimum.py" >"$ENV_CONSTRAINTS"
  use_env "$1"
}
