#!/bin/sh
# Makes .venv from the pinned, hashed requirements.txt: finds or installs uv, lets it find or fetch Python 3.10. A second call costs
# nothing. With the argument `cuda` it adds JAX's CUDA 12 wheels.
set -eu
cd "$(dirname "$0")/.."
UV_VERSION=0.13.8
VENV=.venv
STAMP=$VENV/.installed
WANTED=$(cat requirements.txt tools/setup.sh | cksum)
CUDA_WANTED=$(cat requirements-cuda.txt | cksum)

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  fail "Launchpad has wheels for Linux on x86-64 only, this is $(uname -s) on $(uname -m)." \
       "See BUILD.md, 'Other platforms', for programs/local.py, which needs no Launchpad."

find_uv() {
  if command -v uv >/dev/null 2>&1; then UV=uv; return; fi
  UV=.uv/bin/uv
  [ -x $UV ] && return
  command -v python3 >/dev/null 2>&1 || fail "python3 is missing: install Python 3 (Debian, Ubuntu: apt-get install python3 python3-venv)."
  rm -rf .uv
  python3 -m venv .uv >.uv-log 2>&1 || { cat .uv-log >&2; rm -rf .uv .uv-log
    fail "python3 cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv), or install uv by hand: docs.astral.sh/uv"; }
  rm -f .uv-log
  .uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" || { rm -rf .uv
    fail "uv $UV_VERSION could not be installed: is the package index reachable (network, proxy, PIP_INDEX_URL)?"; }
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

if [ ! -f $STAMP ] || [ "$(head -n 1 $STAMP)" != "$WANTED" ]; then
  find_uv
  settle_home
  echo "setup: installing into $VENV (once)"
  rm -rf $VENV
  $UV venv --quiet --python 3.10 $VENV ||
    fail "no Python 3.10, which Launchpad's wheels need: none on PATH or in pyenv, and uv could not fetch one." \
         "Install it (pyenv install 3.10; Debian, Ubuntu: apt-get install python3.10 python3.10-venv) or give uv a network route, then call again."
  VIRTUAL_ENV=$VENV $UV pip install --quiet --no-deps --require-hashes -r requirements.txt ||
    fail "the packages of requirements.txt could not be installed: is the package index reachable (network, proxy, UV_DEFAULT_INDEX)?"
  echo "$WANTED" > $STAMP
fi
if [ "${1:-}" = cuda ] && ! grep -qx "cuda $CUDA_WANTED" $STAMP; then
  find_uv
  settle_home
  VIRTUAL_ENV=$VENV $UV pip install --quiet --no-deps --require-hashes -r requirements-cuda.txt ||
    fail "the packages of requirements-cuda.txt could not be installed: is the package index reachable, and are 5 GB of disk free?"
  echo "cuda $CUDA_WANTED" >> $STAMP
fi
