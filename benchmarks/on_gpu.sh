#!/bin/sh
# Tests and measures on a GPU machine that is there for minutes and has no network: BUILD.md, 'On a
# GPU machine for minutes'.
#
#   benchmarks/on_gpu.sh prepare                        # here: what it may lack, in .gpu-packages
#   benchmarks/on_gpu.sh run [--minutes=9] [ITEM...]    # there: all items in order, or those named
#   benchmarks/on_gpu.sh item ITEM                      # there: one of them, without a limit
#
# An item that fails, or takes longer than it may, does not end the others. In $OUT (runs/on_gpu)
# are summary.txt, whose last line is the command for what is left, and a log for each kind of item.
# Exit status of `run`: 0 all is done, 1 something has failed or is left.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PACKAGES=.gpu-packages
RUNS=runs/on_gpu
OUT=${OUT:-$RUNS}
# The most valuable first.
ITEMS='tests launch gpu-convnet gpu-myrtle5 gpu-cntk_gap gpu-myrtle10 gpu-convnet-64x64x3'
ITEMS="$ITEMS scale finite"
LEAST=20  # seconds below which no item is begun

fail() { printf 'on_gpu: %s\n' "$@" >&2; exit 2; }

# Seconds that an item may take.
limit() {
  case $1 in
    tests) echo 150 ;;
    launch) echo 300 ;;
    scale) echo 120 ;;
    finite) echo 180 ;;
    *) echo 75 ;;
  esac
}

# Small packages that runs and tests import, by the hashes of a set-up; that machine's own JAX,
# NumPy, CuPy and what is built on them must stay.
prepare() {
  UV=$(command -v uv || echo .uv/bin/uv)
  rm -rf $PACKAGES
  mkdir $PACKAGES
  for name in ml-collections dm-tree portpicker protobuf tensorboardx termcolor; do
    sed -n "/^$name==/,/# via/p" requirements.txt
  done > $PACKAGES/requirements.txt
  sed -n '/^beartype==/,/# via/p' requirements-dev.txt >> $PACKAGES/requirements.txt
  sed -n '/^dm-launchpad==/,/# via/{s/ ; .*/ \\/;p;}' requirements.txt > $PACKAGES/launchpad.txt
  install --python-version 3.12 --python-platform x86_64-manylinux_2_28 --target $PACKAGES \
    -r $PACKAGES/requirements.txt
  install --python-version 3.10 --python-platform x86_64-manylinux2014 --target $PACKAGES/whole \
    -r $PACKAGES/launchpad.txt
  mv $PACKAGES/whole/launchpad $PACKAGES/whole/dm_launchpad-*.dist-info $PACKAGES
  rm -rf $PACKAGES/whole
  du -sh $PACKAGES
}

install() { $UV pip install --quiet --no-deps --require-hashes --only-binary :all: "$@"; }

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q UUID; }

item() {
  export PYTHONPATH="$PWD/$PACKAGES:$PWD/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  case $1 in
    tests)
      $PYTHON -m pytest -q -o addopts= -n $((($(nproc) + 1) / 2)) --dist=worksteal --durations=3 \
        -k cuda tests/kernels/test_ntk.py tests/kernels/test_near_pairs.py ;;
    launch) $PYTHON -m benchmarks.launches --workdir=$RUNS/launches ;;
    gpu-convnet) gpu --architectures=convnet --cases='1x250x1 1x1250x1' ;;
    gpu-convnet-64x64x3) gpu --architectures=convnet --image=64x64x3 --cases= ;;
    gpu-*) gpu --architectures="${1#gpu-}" --cases= ;;
    scale)
      $PYTHON -m kernels.native.build
      if has_gpu; then set -- --cases=9,13,8; else set -- --cases=0 --seconds=2; fi
      $PYTHON -m benchmarks.scale --folder=$RUNS/scale "$@" ;;
    finite)
      if has_gpu; then width=1024 updates=5000; else width=32 updates=3; fi
      finite "$RUNS/launches/digits-0/distilled.npz" --config=configs/digits.py
      finite "$RUNS/launches/images-0/distilled.npz" --config=configs/base.py \
        --config.run.data.name=$RUNS/launches/images.npz ;;
    *) fail "unknown item '$1': expected one of $ITEMS." ;;
  esac
}

versions() {
  $PYTHON -c "import sys; from importlib import metadata; print(sys.version, *sorted(
    f'{it.name} {it.version}' for it in metadata.distributions()
    if it.name.startswith(('cupy', 'jax', 'numpy'))), sep='\n')"
}

gpu() { $PYTHON -m benchmarks.gpu --implementations=cuda --json=$RUNS/gpu.json "$@"; }

# Evaluates a set by KRR and by one network of $width and $updates; says how long it took.
finite() {
  [ -f "$1" ] || fail "$1 is missing: the item launch makes it."
  begin=$(date +%s)
  XLA_PYTHON_CLIENT_PREALLOCATE=false $PYTHON -m programs.evaluate --dataset="$@" \
    --config.system.evaluation.nn_width=$width --config.system.evaluation.nn_steps=$updates
  echo "$(($(date +%s) - begin)) s"
}

run() {
  minutes=9
  case ${1:-} in --minutes=*) minutes=${1#*=}; shift ;; esac
  [ $# -gt 0 ] || set -- $ITEMS
  for name; do
    case " $ITEMS " in
      *" $name "*) ;;
      *) fail "unknown item '$name': expected one of $ITEMS." ;;
    esac
  done
  end=$(($(date +%s) + 60 * minutes))
  mkdir -p "$OUT" $RUNS
  summary=$OUT/summary.txt
  { nvidia-smi -L 2>/dev/null || echo 'no GPU'; nproc; versions; } > "$summary"
  left=
  for name; do
    begin=$(date +%s)
    seconds=$((end - begin))
    [ $seconds -le "$(limit "$name")" ] || seconds=$(limit "$name")
    if [ $seconds -lt $LEAST ]; then
      left="$left $name"
      continue
    fi
    log=$OUT/${name%%-*}.log
    echo "== $name" >> "$log"
    status=0
    timeout --kill-after=10 $((seconds - 10)) "$0" item "$name" >> "$log" 2>&1 || status=$?
    case $status in
      0) result=done ;;
      124 | 137) result='out of time' ;;
      *) result="failed with status $status" ;;
    esac
    [ $status = 0 ] || left="$left $name"
    echo "$name: $result, $(($(date +%s) - begin)) s; $log" >> "$summary"
    tail -n 15 "$log" | cut -c 1-200
  done
  [ -z "$left" ] || echo "left: benchmarks/on_gpu.sh run$left" >> "$summary"
  cat "$summary"
  [ -z "$left" ]
}

case ${1:-} in
  prepare) prepare ;;
  run) shift; run "$@" ;;
  item) item "${2:-}" ;;
  *) fail "expected prepare, run or item; see the head of this file." ;;
esac
