"""Launches runs on this machine as users do, and compares the bits of their results.

    python -m benchmarks.launches

launch.py with all its processes, workers and evaluator on the GPU if there is one: KIP and
Label Solve on digits, and KIP on made-up images of CIFAR-10's size, each by two workers, KIP also
by two of which one is killed in the middle, and all by one. Without a GPU there are a few small
steps of each.

Exit status: 0 all have finished with a report, and those of a kind gave the same bits; 1 else.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil

from artifacts import run_directory
from distillation import evaluation
from programs import placement, processes, supervisor
from tools import same_bits

LONGEST = 120.0  # seconds of a run
SHAPE, CLASSES = (32, 32, 3), 10  # of the made-up images, as CIFAR-10's
DIGITS = ('--config=configs/digits.py',)
IMAGES = ('--config=configs/base.py', '--config.run.data.name={folder}/images.npz')
SOLVE = ('--config.run.method=label_solve', '--config.run.num_steps=1')
STEPS = {
  'digits': ('--config.run.num_steps=400',),
  'images': (
    '--config.run.num_steps=60',
    '--config.run.targets_per_step=5000',
    '--config.run.plan.target_tile=1250',
    '--config.system.evaluation.nn_steps=500',
  ),
}
SMALL_STEPS = {
  'digits': (
    '--config.run.num_steps=12',
    '--config.run.targets_per_step=100',
    '--config.run.plan.target_tile=25',
    '--config.system.evaluation.nn_steps=5',
  ),
  'images': (
    '--config.run.num_steps=4',
    '--config.run.targets_per_step=20',
    '--config.run.plan.target_tile=5',
    '--config.system.evaluation.nn_steps=2',
    '--config.system.evaluation.nn_width=16',
  ),
}


def write_images(path: str, counts: tuple[int, int]) -> None:
  """Writes a data set of so many training and test images: for each class a smooth pattern, under
  noise."""
  rng = np.random.default_rng(0)
  patterns = np.kron(rng.normal(size=(CLASSES, 4, 4, 3)), np.ones((1, 8, 8, 1)))
  arrays = {}
  for name, count in zip(('train', 'test'), counts):
    labels = np.arange(count) % CLASSES
    images = 128 + 4 * patterns[labels] + 45 * rng.normal(size=(count, *SHAPE))
    arrays[f'x_{name}'] = np.clip(images, 0, 255).astype(np.uint8)
    arrays[f'y_{name}'] = labels
  np.savez(path, **arrays)


def launch(workdir: str, flags: tuple[str, ...], workers: int, kill: bool) -> float:
  """Runs launch.py to its end; returns the seconds it took.

  Args:
    workdir: its run directory; the output goes to a file beside it.
    flags: of the run.
    workers: how many.
    kill: kill a worker after a quarter of the steps.

  Raises:
    RuntimeError: it took too long, failed, made no report, or was over before the kill.
  """
  command = [
    sys.executable,
    'launch.py',
    '--lp_launch_type=local_mp',
    *flags,
    f'--workdir={workdir}',
    f'--config.system.num_workers={workers}',
    '--config.system.log_seconds=0.1',
  ]
  begin = time.monotonic()
  with open(f'{workdir}.log', 'wb') as log:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
  try:
    if kill:
      print(f'  killed a worker at step {_kill_a_worker(process, workdir)}')
    status = process.wait(LONGEST)
  except subprocess.TimeoutExpired:
    raise RuntimeError(f'{workdir}: not over after {LONGEST:.0f} s.') from None
  finally:
    if process.poll() is None:
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(supervisor.LAUNCHER_NOTICE)
      process.kill()
  if status or not os.path.exists(os.path.join(workdir, 'report.html')):
    raise RuntimeError(f'{workdir}: status {status}, or no report.')
  return time.monotonic() - begin


def _kill_a_worker(process: subprocess.Popen, workdir: str) -> int:
  """Kills the first worker of a run after a quarter of its steps; returns the step it was at."""
  directory, end = run_directory.RunDirectory(workdir), time.monotonic() + LONGEST
  while time.monotonic() < end and process.poll() is None:
    status = directory.read_status()
    if status and status['state'] == run_directory.RUNNING:
      step, num_steps = status['step'], status['num_steps']
      if num_steps / 4 <= step < num_steps and (worker := _worker(process.pid)):
        os.kill(worker, signal.SIGKILL)
        return step
    time.sleep(0.005)
  raise RuntimeError(f'{workdir}: over before a worker was killed.')


def _worker(launcher: int) -> int | None:
  """The process that works as the first worker; None while there is none."""
  for wrapper in psutil.Process(launcher).children():
    with contextlib.suppress(psutil.NoSuchProcess):
      if f'{processes.WORKER}_0/0' in wrapper.cmdline():
        for process in wrapper.children(recursive=True):
          if supervisor.PARENT in process.environ():
            return process.pid
  return None


def describe(workdir: str) -> None:
  """Prints what the coordinator says of the workers and of the last steps, and the last row."""
  with open(f'{workdir}.log', encoding='utf-8', errors='replace') as file:
    lines = file.read().splitlines()
  steps = [line for line in lines if ' pairs/s by ' in line]
  for line in [line for line in lines if ' joined: ' in line] + steps[-1:]:
    print(f'  {line}')
  for row in run_directory.RunDirectory(workdir).read_metrics()[-1:]:
    print(f'  {evaluation.in_words(row)}', flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', default='runs/launches', help='for all runs; made anew')
  folder = os.path.abspath(parser.parse_args().workdir)
  shutil.rmtree(folder, ignore_errors=True)
  os.makedirs(folder)
  found = placement.find_gpus('auto')
  print(found.remark, flush=True)
  steps = STEPS if found.names else SMALL_STEPS
  write_images(os.path.join(folder, 'images.npz'), (10_000, 1000) if found.names else (200, 50))
  images = tuple(flag.format(folder=folder) for flag in IMAGES)
  # Each run of a kind: name, workers, whether one is killed; finite networks are trained on the
  # first one's set (on_gpu.sh).
  two, one = ('two workers', 2, False), ('one worker', 1, False)
  killed = ('two workers, one killed', 2, True)
  kinds = {
    'digits': ((*DIGITS, *steps['digits']), (two, killed, one)),
    'solve': ((*DIGITS, *steps['digits'], *SOLVE), (two, one)),
    'images': ((*images, *steps['images']), (two, killed, one)),
  }
  problems = []
  for kind, (flags, runs) in kinds.items():
    expected = None
    for number, (name, workers, kill) in enumerate(runs):
      workdir = os.path.join(folder, f'{kind}-{number}')
      print(f'{kind}, {name}', flush=True)
      try:
        seconds = launch(workdir, flags, workers, kill)
      except RuntimeError as error:
        problems.append(str(error))
        print(error, *_last_lines(f'{workdir}.log'), sep='\n  ', flush=True)
        continue
      print(f'  {seconds:.1f} s')
      describe(workdir)
      bits = same_bits.bits(workdir)
      expected = expected or bits
      differing = [
        key for key in expected.keys() | bits.keys() if expected.get(key) != bits.get(key)
      ]
      if differing:
        problems.append(f'{kind}, {name}: other bits of {", ".join(sorted(differing))}')
  print(*problems or ['all runs of a kind gave the same bits'], sep='\n')
  return 1 if problems else 0


def _last_lines(path: str) -> list[str]:
  with open(path, encoding='utf-8', errors='replace') as file:
    return file.read().splitlines()[-15:]


if __name__ == '__main__':
  sys.exit(main())
