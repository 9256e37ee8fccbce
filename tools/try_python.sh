#!/bin/sh
# Tries Python $1 beside the one of .venv, in a copy of the committed tree: the demo, the bits of its
# first steps, and processes that are killed.
set -eu
cd "$(dirname "$0")/.."
here=$PWD
tree=$(mktemp -d)
trap 'rm -rf -- "$tree"' EXIT
git archive HEAD | tar -x -C "$tree"
make native
[ ! -d kernels/native/build ] || cp -R kernels/native/build "$tree/kernels/native/"

cd "$tree"
KIP_PYTHON=$1 make demo
python=.venv/bin/python
$python -c "import sys; assert sys.version.startswith('$1.'), sys.version"
export PYTHONPATH=.
$python tests/chaos --workdir=runs/chaos --kind='one pass' --steps=30 --kills=1

cd "$here"
.venv/bin/python launch.py --config=configs/digits.py --lp_launch_type=local_mp \
  --config.run.num_steps=10 --config.system.evaluation.nn_steps=0 --workdir="$tree/runs/here"
.venv/bin/python - "$tree/runs/here" "$tree/runs/demo" <<'END'
import sys
from tools import same_bits

here, there = map(same_bits.bits, sys.argv[1:])
steps = [f'{step:08}.npz {array}' for step in (0, 10) for array in ('images', 'labels')]
differing = [what for what in steps if here[what] != there[what]]
sys.exit(f'other bits: {differing}' if differing else print('the same bits:', *steps, sep='\n  '))
END
