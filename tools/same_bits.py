"""Compares the bits of small runs at two commits: `.venv/bin/python tools/same_bits.py OLD [NEW]`.

Each kind of run is made at both commits on this machine, with all the packages that are installed
here; with `--python=FILE` at NEW by another interpreter, with the packages of its own. Exit status
0 if support images, labels and every figure of metrics.jsonl but times are equal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

SHARED = (
  '--config=configs/digits.py',
  '--config.run.num_steps=8',
  '--config.system.snapshot_steps=1,4',
  '--config.system.evaluation.nn_steps=20',
  '--config.system.num_workers=2',
)
SOLVE = ('--config.run.method=label_solve', '--config.run.num_steps=1')
AUGMENTED = ('--config.run.augmentation.fraction=0.5', '--config.run.augmentation.rotation=10.0')
RUNS = {
  'KIP in one pass': AUGMENTED,
  'KIP in two halves': ('--config.run.plan.support_per_task=4', *AUGMENTED),
  'Label Solve': SOLVE,
  'KIP in one pass, JAX kernel': ('--config.run.implementation=jax',),
  'KIP in two halves, JAX kernel, float64': (
    '--config.run.plan.support_per_task=7',
    '--config.run.implementation=jax',
    '--config.run.kernel_dtype=float64',
  ),
}
TIMES = ('wall_seconds', 'kernel_pairs_per_second')


def results(commit: str, python: str, folder: str) -> dict[str, dict[str, bytes]]:
  """The bits of every run at a commit, by name."""
  tree = tempfile.mkdtemp(dir=folder)
  archive = subprocess.run(['git', 'archive', commit], check=True, capture_output=True)
  subprocess.run(['tar', '-x', '-C', tree], input=archive.stdout, check=True)
  subprocess.run([python, '-m', 'kernels.native.build'], cwd=tree, check=True)
  found = {}
  for number, (name, flags) in enumerate(RUNS.items()):
    workdir = os.path.join(tree, 'runs', str(number))
    command = [python, '-m', 'programs.local', f'--workdir={workdir}', *SHARED, *flags]
    cache = f'--config.system.cache_dir={tree}/cache'
    subprocess.run([*command, cache], cwd=tree, check=True, stdout=subprocess.DEVNULL)
    found[name] = bits(workdir)
  return found


def bits(workdir: str) -> dict[str, bytes]:
  """Reads the bits of what a run has made, by file and array."""
  found = {}
  snapshots = os.path.join(workdir, 'snapshots')
  for path in (
    *(os.path.join(snapshots, name) for name in sorted(os.listdir(snapshots))),
    os.path.join(workdir, 'distilled.npz'),
  ):
    with np.load(path) as file:
      for array in ('images', 'labels'):
        found[f'{os.path.basename(path)} {array}'] = file[array].tobytes()
  with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
    for row in map(json.loads, file):
      figures = {key: value for key, value in row.items() if key not in TIMES}
      found[f'row {row["step"]}'] = json.dumps(figures, sort_keys=True).encode()
  return found


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('old')
  parser.add_argument('new', nargs='?', default='HEAD')
  parser.add_argument('--python', default=sys.executable)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    before = results(arguments.old, sys.executable, folder)
    after = results(arguments.new, os.path.abspath(arguments.python), folder)
  same = True
  for name in RUNS:
    differing = [
      what
      for what in before[name].keys() | after[name].keys()
      if before[name].get(what) != after[name].get(what)
    ]
    same = same and not differing
    print(
      f'{name}: {len(before[name])} values',
      f'differ in {sorted(differing)}' if differing else 'equal',
    )
  return 0 if same else 1


if __name__ == '__main__':
  sys.exit(main())
