#!/bin/sh
# Makes .venv from the pinned, hashed requirements.txt: finds or installs uv, lets it find or fetch
# Python, of the version that $KIP_PYTHON names (3.10 to 3.13). Without that .venv keeps the version
# that it has; a new one takes 3.10 where Launchpad has a wheel, else the newest that is there. The
# argument `dev` adds what tests, linter and type checker need, `cuda` JAX's CUDA 12 wheels and CuPy.
# What is installed already is left alone.
set -eu
cd "$(dirname "$0")/.."
VENV=.venv
# A line with Python's version and checksums of requirements.txt and this file; one for each addition.
STAMP=$VENV/.installed
EXTRA=${1:-}

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

case $EXTRA in
  '' | dev | cuda) ;;
  *) fail "unknown argument '$EXTRA': allowed are dev, cuda and none." ;;
esac
case $(uname -s)-$(uname -m) in
  Linux-x86_64) HAS_COURIER=1 ;;
  *) HAS_COURIER= ;;
esac
case ${KIP_PYTHON:-} in
  '' | 3.11 | 3.12 | 3.13) ;;
  3.10) [ $HAS_COURIER ] || fail "KIP_PYTHON=3.10 is for Linux on x86-64, where Launchpad has a wheel" \
    "for it; here 3.11, 3.12 and 3.13 are allowed." ;;
  *) fail "unknown KIP_PYTHON=$KIP_PYTHON: allowed are 3.10, 3.11, 3.12 and 3.13." ;;
esac

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

# Python's version: what is asked for, what .venv has, or what suits this machine.
choose_python() {
  PYTHON=${KIP_PYTHON:-$(sed -n '1s/^\(3\.[0-9]*\) .*/\1/p' $STAMP 2>/dev/null || true)}
  [ -z "$PYTHON" ] || return 0
  PYTHON=3.10
  [ $HAS_COURIER ] && return
  find_uv
  for PYTHON in 3.13 3.12 3.11; do
    find_python && return
  done
  PYTHON=3.13  # for uv to fetch
}

find_python() {
  # pyenv's own commands would start the version of its choice.
  for folder in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$PYTHON".*/bin; do
    [ ! -x "$folder/python$PYTHON" ] || PATH=$folder:$PATH
  done
  $UV python find --quiet --no-python-downloads "$PYTHON" >/dev/null 2>&1
}

install() {
  find_uv
  settle_home
  echo "setup: installing $1 into $VENV (once)"
  [ "$1" != requirements.txt ] || make_venv
  pip_install -r "$1" ||
    fail "the packages of $1 could not be installed: is the package index reachable" \
         "(network, proxy, UV_DEFAULT_INDEX), and is there room on the disk ($2 GB)?"
}

pip_install() {
  VIRTUAL_ENV=$VENV $UV pip install --quiet --no-deps --require-hashes "$@"
}

make_venv() {
  rm -rf $VENV
  find_python || true
  $UV venv --quiet --python "$PYTHON" $VENV ||
    fail "no Python $PYTHON: none on PATH or in pyenv, and uv could not fetch one." \
         "Install it (pyenv install $PYTHON; Debian, Ubuntu: apt-get install python$PYTHON" \
         "python$PYTHON-venv), name another by KIP_PYTHON, or give uv a network route."
}

# Launchpad is Python but for Courier, and its wheel is of one version and machine: its Python files
# are taken from there, and packages/courier.
add_launchpad() {
  site=$(echo $VENV/lib/python*/site-packages)
  sed -n '/^dm-launchpad==/,/# via/{s/ ; .*/ \\/;p;}' requirements.txt > $VENV/launchpad.txt
  pip_install --target $VENV/launchpad --python-version 3.10 --python-platform x86_64-manylinux2014 \
    -r $VENV/launchpad.txt || fail "Launchpad's files could not be installed."
  mv $VENV/launchpad/launchpad $VENV/launchpad/dm_launchpad-*.dist-info "$site"
  rm -rf $VENV/launchpad
  echo ../../../../packages > "$site/kip.pth"
}

choose_python
WANTED="$PYTHON $(cat requirements.txt tools/setup.sh | cksum)"
if [ ! -f $STAMP ] || [ "$(head -n 1 $STAMP)" != "$WANTED" ]; then
  install requirements.txt 2
  [ "$PYTHON" = 3.10 ] || add_launchpad
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
