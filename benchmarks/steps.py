"""What the benchmarks of whole steps share: runs on data in the shape of CIFAR-10, and a clock."""

import collections
import contextlib
import os
import statistics
import time

import numpy as np

import kernels.precision  # noqa: F401
from artifacts import run_directory
from configs import base, validation
from data import store
from distillation import plan

IMAGE, CLASSES = (32, 32, 3), 10


def make_run(
  folder: str, num_images: int, num_steps: int, plan: dict[str, int], **run
) -> run_directory.RunDirectory:
  """A run on noise, in a folder of its own in `folder`, which is its cache too.

  Args:
    folder: where.
    num_images: training images, of 10 classes.
    num_steps: updates.
    plan: fields of `run.plan`.
    **run: fields of `run`.
  """
  data = os.path.join(folder, 'noise.npz')
  if not os.path.exists(data):
    _write_data(data, num_images)
  config = base.get_config()
  config.run.update({'num_steps': num_steps, **run})
  config.run.data.name = data
  config.run.plan.update(plan)
  config.system.update({'num_workers': 1, 'snapshot_steps': (0,), 'final_evaluation_timeout': 0.01})
  config = validation.validate(config.to_dict())
  directory = run_directory.RunDirectory(os.path.join(folder, f'run_{len(os.listdir(folder))}'))
  directory.open(config, store.prepare(config.run.data, folder).key)
  return directory


def pairs(directory: run_directory.RunDirectory) -> int:
  """Kernel entries of one of its steps."""
  run = directory.read_saved().config.run
  return plan.pairs_per_step(run, run.images_per_class * CLASSES)


def _write_data(path: str, num_images: int) -> None:
  """Noise in the shape of CIFAR-10."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, count in (('train', num_images), ('test', 100)):
    arrays[f'x_{name}'] = rng.integers(0, 256, (count, *IMAGE), np.uint8)
    arrays[f'y_{name}'] = np.arange(count) % CLASSES
  np.savez(path, **arrays)


class Clock:
  """Seconds spent in functions, by name, and how far they had come at the beginning of each
  step."""

  def __init__(self):
    self._seconds = collections.Counter()
    self._laps = {}

  def timed(self, name, function):
    def run(*args, **kwargs):
      start = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        self._seconds[name] += time.perf_counter() - start

    return run

  def watch(self, name, owner, attribute):
    """Times a function that a module or a class holds, from now on."""
    setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

  @contextlib.contextmanager
  def lapped(self, module, function, number):
    """Each call of a module's function begins a lap; `number(*args)` is its step."""
    original = getattr(module, function)

    def run(*args, **kwargs):
      self.lap(number(*args))
      return original(*args, **kwargs)

    setattr(module, function, run)
    try:
      yield
    finally:
      setattr(module, function, original)

  def lap(self, step):
    self._laps.setdefault(step, collections.Counter(self._seconds, step=time.perf_counter()))

  def medians(self, warm_up):
    """Seconds a step, by name, after the first `warm_up` steps; 'step' is all of it."""
    laps = [self._laps[step] for step in sorted(self._laps) if step >= warm_up]
    return {
      name: statistics.median(b[name] - a[name] for a, b in zip(laps, laps[1:]))
      for name in laps[-1]
    }
