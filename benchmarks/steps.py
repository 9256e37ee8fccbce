"""Runs on data in the shape of CIFAR-10, and a clock, for the benchmarks of whole steps."""

import collections
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

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
  """Makes a run on noise, in a folder of its own in `folder`, which is its cache too.

  Args:
    folder: of all runs of the benchmark.
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
  """Kernel entries of a step of the run in a directory."""
  run = directory.read_saved().config.run
  return plan.pairs_per_step(run, run.images_per_class * CLASSES)


def check_finished(directory: run_directory.RunDirectory) -> None:
  """Raises RuntimeError unless the run has finished."""
  status = directory.read_status()
  if status is None or status['state'] != run_directory.FINISHED:
    raise RuntimeError(f'the run of the benchmark failed: {status and status.get("message")}')


def _write_data(path: str, num_images: int) -> None:
  """Writes noise in the shape of CIFAR-10."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, count in (('train', num_images), ('test', 100)):
    arrays[f'x_{name}'] = rng.integers(0, 256, (count, *IMAGE), np.uint8)
    arrays[f'y_{name}'] = np.arange(count) % CLASSES
  np.savez(path, **arrays)


class Clock:
  """Seconds spent in functions, by name, in all and step by step."""

  def __init__(self):
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._laps: dict[int, dict[str, float]] = {}  # by step, the seconds when it began

  def timed(self, name: str, function: Callable) -> Callable:
    """Wraps a function so that its seconds are counted."""

    def run(*args, **kwargs):
      start = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        self._seconds[name] += time.perf_counter() - start

    return run

  def watch(self, name: str, owner: Any, attribute: str) -> None:
    """Times a function of a module, or a method of a class, from now on."""
    setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

  @contextlib.contextmanager
  def lapped(self, module: Any, function: str, step: Callable[..., int]) -> Iterator[None]:
    """Lets calls of a module's function begin the laps of their step, `step(*args)`."""
    original = getattr(module, function)

    def run(*args, **kwargs):
      now = {**self._seconds, 'step': time.perf_counter()}
      self._laps.setdefault(step(*args), now)
      return original(*args, **kwargs)

    setattr(module, function, run)
    try:
      yield
    finally:
      setattr(module, function, original)

  def medians(self, warm_up: int) -> dict[str, float]:
    """Seconds a step, by name, after the first `warm_up` steps; 'step' is the whole of it."""
    laps = [self._laps[step] for step in sorted(self._laps) if step >= warm_up]
    return {
      name: statistics.median(
        b.get(name, 0.0) - a.get(name, 0.0) for a, b in itertools.pairwise(laps)
      )
      for name in laps[-1]
    }
