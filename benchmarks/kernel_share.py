"""Measures how much of a step is the kernel.

    python -m benchmarks.kernel_share --data=FOLDER

ConvNet, CIFAR-10 (standardised; the folder holds its parquet files), 10 support images, 5000
targets a step: a coordinator and its workers as processes that talk over Courier, nothing
evaluated. Each worker notes the seconds that it spends in its kernel and in its residuals; in the
rest it waits, sends and fetches. The first steps, which start up, do not count; checkpoints do.
"""

import argparse
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [_ROOT]  # workers run this file itself

from artifacts import run_directory

_NOTES = 'KIP_KERNEL_NOTES'  # environment variable: folder for the workers' notes
_FIRST = 2  # steps that do not count


def _timed_kernel(kernel, path: str):
  """Wraps a kernel so that calls are noted: when they end, their seconds, the cotangent's of these.

  Calls of `prepare` are not: they overlap with others.
  """
  from kernels import contract

  class Timed(contract.Wrapper):
    def block(self, x1, x2):
      return note(self.inner.block, x1, x2, None)

    def block_vjp(self, x1, x2, cotangent):
      return note(self.inner.block_vjp, x1, x2, cotangent)

  def note(method, x1, x2, cotangent):
    elsewhere = 0.0

    def timed(block):
      nonlocal elsewhere
      start = time.perf_counter()
      value = cotangent(block)
      elsewhere += time.perf_counter() - start
      return value

    arguments = () if cotangent is None else (timed if callable(cotangent) else cotangent,)
    start = time.perf_counter()
    result = method(x1, x2, *arguments)
    with open(path, 'a', encoding='utf-8') as file:
      file.write(f'{time.time()} {time.perf_counter() - start} {elsewhere}\n')
    return result

  return Timed(kernel)


def _work() -> int:
  """Runs a worker's process as launch.py does, but for the notes."""
  from programs import placement, supervisor

  if not supervisor.is_child():
    os.environ.update(placement.launcher_environment())
  from kernels import registry
  from programs import hosts, start

  make, path = registry.for_run, os.path.join(os.environ[_NOTES], f'notes.{os.getpid()}')
  registry.for_run = lambda run, threads: _timed_kernel(make(run, threads), path)
  start.parse(sys.argv)
  return hosts.run_role('worker')


def measure(data: str, workers: int, steps: int, folder: str) -> dict[str, float]:
  """Runs `steps` steps after the first ones; returns seconds a step and shares of the time."""
  last = _FIRST + steps
  workdir = f'--workdir={folder}/run'
  settings = {
    'run.data.name': 'cifar10',
    'run.data.dir': data,
    'run.num_steps': last,
    'system.num_workers': workers,
    'system.snapshot_steps': (_FIRST,),
    'system.final_evaluation_timeout': 1.0,
    'system.evaluation.nn_steps': 0,
  }
  coordinator = subprocess.Popen(
    [
      sys.executable,
      'launch.py',
      '--role=coordinator',
      '--host=localhost',
      workdir,
      '--config=configs/base.py',
      *(f'--config.{name}={value}' for name, value in settings.items()),
    ],
    cwd=_ROOT,
  )
  nodes = [
    subprocess.Popen(
      [
        sys.executable,
        os.path.abspath(__file__),
        '--role=worker',
        workdir,
        f'--name=worker{i}',
        '--threads=1',
      ],
      cwd=_ROOT,
      env={**os.environ, _NOTES: folder},
    )
    for i in range(workers)
  ]
  try:
    if coordinator.wait():
      sys.exit('the run failed: see above.')
  finally:
    for process in (coordinator, *nodes):
      process.terminate()
      process.wait()
  begin, end = (
    os.path.getmtime(run_directory.RunDirectory(f'{folder}/run').snapshot(step))
    for step in (_FIRST, last)
  )
  notes = [
    tuple(map(float, line.split()))
    for path in glob.glob(f'{folder}/notes.*')
    for line in pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  ]
  kernel, residual = (sum(note[i] for note in notes if begin < note[0] <= end) for i in (1, 2))
  seconds = end - begin
  return {
    'seconds_a_step': seconds / steps,
    'kernel_share': (kernel - residual) / workers / seconds,
    'residual_share': residual / workers / seconds,
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--data', required=True, help="folder with CIFAR-10's train.parquet and test.parquet"
  )
  parser.add_argument('--workers', type=int, default=2, help='processes, of one thread each')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--json', default='benchmarks/kernel_share.json')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    result = measure(os.path.abspath(args.data), args.workers, args.steps, folder)
  result.update(workers=args.workers, steps=args.steps, load=os.getloadavg()[0])
  print(
    f"{result['seconds_a_step']:.3f} s a step; of the workers' time "
    f'{result["kernel_share"]:.1%} kernel, {result["residual_share"]:.1%} residuals'
  )
  with open(args.json, 'w', encoding='utf-8') as file:
    json.dump(result, file, indent=1)


if __name__ == '__main__':
  if '--role=worker' in sys.argv:
    sys.exit(_work())
  main()
