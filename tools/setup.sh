#!/bin/sh
# Makes .venv from the pinned, hashed requirements.txt: finds or installs uv, lets it find or fetch
# Python 3.10. The argument `dev` adds what tests, linter and type checker need, `cuda` JAX's CUDA 12
# wheels and CuPy. What is installed already is left alone.
set -eu
cd "$(dirname "$0")/.."
VENV=.venv
STAMP=$VENV/.installed  # a line of checksums for requirements.txt and this file, one for each addition
EXTRA=${1:-}
WANTED=$(cat requirements.txt tools/setup.sh | cksum)

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

case $EXTRA in
  '' | dev | cuda) ;;
  *) fail "unknown argument '$EXTRA': allowed are dev, cuda and none." ;;
esac
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  fail "Launchpad has wheels for Linux on x86-64 only, this is $(uname -s) on $(uname -m)." \
       "See BUILD.md, 'Other platforms', for programs/local.py, which needs no Launchpad."

find_uv() {
  if command -v uv >/dev/null 2>&1; then UV=uv; return; fi
  UV=.uv/bin/uv
  [ -x $UV ] && return
  command -v python3 >/dev/null 2>&1 ||
    fail "python3 is missing: install Python 3 (Debian, Ubuntu: apt-get install python3 python3-venv)."
  rm -rf .uv
  python3 -m venv .uv >.uv-log 2>&1 || {
    cat .uv-log >&2
    rm -rf .uv .uv-log
    fail "python3 cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)," \
         "or install uv by hand: docs.astral.sh/uv"
  }
  rm -f .uv-log
  .uv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: \
    --require-hashes -r tools/uv.txt || {
    rm -rf .uv
    fail "uv could not be installed:" \
         "is the package index reachable (network, proxy, PIP_INDEX_URL)?"
  }
}

# uv keeps packages, and Pythons that it fetches, below the user's home, where that can be written.
settle_home() {
  home=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
  cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$home/.cache}/uv}
  python=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$home/.local/share}/uv/python}
  mkdir -p "$cache" "$python" 2>/dev/null && [ -w "$cache" ] && [ -w "$python" ] && return
  export UV_CACHE_DIR="$PWD/.uv-home/cache" UV_PYTHON_INSTALL_DIR="$PWD/.uv-home/python"
  echo "setup: $cache or $python cannot be written: uv keeps its files in .uv-home"
}

install() {
  find_uv
  settle_home
  echo "setup: installing $1 into $VENV (once)"
  [ "$1" != requirements.txt ] || make_venv
  VIRTUAL_ENV=$VENV $UV pip install --quiet --no-deps --require-hashes -r "$1" ||
    fail "the packages of $1 could not be installed: is the package index reachable" \
         "(network, proxy, UV_DEFAULT_INDEX), and is there room on the disk ($2 GB)?"
}

make_venv() {
  rm -rf $VENV
  $UV venv --quiet --python 3.10 $VENV ||
    fail "no Python 3.10, which Launchpad's wheels need:" \
         "none on PATH or in pyenv, and uv could not fetch one. Install it (pyenv install 3.10;" \
         "Debian, Ubuntu: apt-get install python3.10 python3.10-venv), or give uv a network route."
}

if [ ! -f $STAMP ] || [ "$(head -n 1 $STAMP)" != "$WANTED" ]; then
  install requirements.txt 2
  echo "$WANTED" > $STAMP
fi
case $EXTRA in
  dev) room=0.4 ;;
  cuda) room=5 ;;
  *) exit 0 ;;
esac
WANTED="$EXTRA $(cksum < requirements-$EXTRA.txt)"
if ! grep -qx "$WANTED" $STAMP; then
  install requirements-$EXTRA.txt $room
  echo "$WANTED" >> $STAMP
fi
