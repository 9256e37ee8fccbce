"""Leases tasks, computes kernel blocks and their cotangent pieces, and hands them back."""

import json
import platform
import threading
import time
from typing import Any, Callable

from absl import logging
import numpy as np

from data import augment
from data import sampling
from data import store
from kernels import krr
from kernels import label_solve
from kernels import ntk
from nodes import tasks
from nodes.remote import CoordinatorLost
from nodes.remote import Stopping

_CALIBRATION_SECONDS = 80.0  # by the rate so far, which a single pair makes look far too slow


class KernelWorker:
  """One worker. Holds nothing between tasks that it could not fetch again."""

  def __init__(self, coordinator: Any, name: str, threads: int, cache: str, stop: threading.Event):
    """
    Args:
      coordinator: a `remote.Retrying` coordinator.
      name: unique among the run's workers.
      threads: CPU threads for the kernel.
      cache: this machine's folder of prepared data.
      stop: set when the process is to stop.
    """
    self._coordinator, self._name, self._threads, self._cache, self._stop_event = coordinator, name, threads, cache, stop
    self._inputs: dict[str, np.ndarray] = {}
    self._inputs_of = None  # (generation, step)

  def run(self) -> None:
    """Works until told to stop. Raises CoordinatorLost where the run's coordinator is not there any more."""
    try:
      try:
        hello = self._prepare()
      except (CoordinatorLost, Stopping):
        raise
      except Exception as error:  # whatever it is: the user must hear of it where the run is followed
        self._coordinator.broken(self._name, f'{type(error).__name__}: {error}')
        raise
      while not self._stop_event.is_set():
        answer = self._coordinator.lease(self._name, hello)
        if answer and 'stop' in answer:
          logging.info('%s ends: %s', self._name, answer['stop'])
          return
        if answer:
          self._work(tasks.Task(*answer['task']), answer['lease'])
    except Stopping:
      return

  def _prepare(self) -> str:
    """Data and kernel; gives what `Coordinator.lease` wants to know."""
    description = json.loads(self._coordinator.describe())
    self._run, self._run_id = description['run'], description['run_id']
    self._augment = self._run['augmentation']['fraction'] > 0
    self._prepared = store.fetch(description['data_key'], self._cache, self._coordinator.read_data, raw=self._augment)
    self._kernel = ntk.for_run(self._run, self._threads)
    self._train = ntk.Library(self._kernel, self._prepared.train_images)
    return json.dumps({'fingerprint': self._fingerprint(), 'pairs_per_second': self._calibrate()})

  def _work(self, task: tasks.Task, lease: int) -> None:
    if task.run_id != self._run_id:
      raise CoordinatorLost('another run answers in its place.', was_there=True)
    try:
      parts, digest = tasks.encode(self._compute(task))
      for i, part in enumerate(parts):
        self._coordinator.complete(self._name, list(task), lease, i, len(parts), part, digest)
    except tasks.Stale:
      return
    except (CoordinatorLost, Stopping):
      raise
    except Exception as error:  # whatever it is: the coordinator tries the task elsewhere, then stops the run with this message
      logging.exception('%s failed at %s', self._name, task)
      self._coordinator.fail(self._name, list(task), lease, f'{type(error).__name__}: {error}')

  def _compute(self, task: tasks.Task) -> dict[str, np.ndarray]:
    """The piece of a task: `block`, `gradient`, `factor`, or all a group of targets contributes."""
    (t0, t1), (s0, s1) = task.target_range, task.support_range
    images = self._images(task)
    if task.phase == tasks.SUPPORT_BLOCKS:
      x1 = images[s0:s1]
      return {'block': self._kernel.block(x1, x1 if (t0, t1) == (s0, s1) else images[t0:t1])}
    if task.phase == tasks.SUPPORT_VJP:
      return {'gradient': self._kernel.block_vjp(images[s0:s1], images[t0:t1], self._input(task, 'cotangent')[s0:s1, t0:t1])[1]}
    if task.phase == tasks.LABEL_SOLVE:
      return {'factor': self._factor(task.target_range, images)}
    return self._targets(task, images, self._input(task, 'alpha'))

  def _images(self, task: tasks.Task) -> ntk.Prepared:
    """The support set, in the form that spares its variances being computed for every block."""
    images = self._input(task, 'images')
    return self._cached('prepared', lambda: self._kernel.prepare(images))

  def _targets(self, task: tasks.Task, images: ntk.Prepared, alpha: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of K_ts, their residual and their cotangent in one pass, tile by tile, summed in order in float64."""
    num_targets, tile = self._run['targets_per_step'], self._run['plan']['target_tile']
    batch = self._batch(task.step)
    loss, correct, alpha_bar = 0.0, 0, np.zeros_like(alpha)
    gradient = np.zeros(images.images.shape, np.float64)
    first = task.target_range[0]
    for start, stop in tasks.ranges(task.target_range[1] - first, tile):
      chosen = batch[first + start:first + stop]
      x_t = self._train[chosen] if not self._augment else augment.target_images(
          self._run, self._prepared, task.step, batch, first + start, first + stop, self._threads)
      y_t = sampling.centred_one_hot(self._prepared.train_labels[chosen], self._prepared.num_classes)
      residual = None

      def cotangent(block, y_t=y_t):
        nonlocal residual
        residual = krr.residual(block, alpha, y_t, num_targets)
        return residual.cotangent

      gradient += self._kernel.block_vjp(images, x_t, cotangent)[1]
      loss += residual.loss
      correct += residual.correct
      alpha_bar += residual.alpha_bar
    return {'loss': np.float64(loss), 'correct': np.int64(correct), 'alpha_bar': alpha_bar, 'gradient': gradient.astype(self._kernel.dtype)}

  def _factor(self, target_range: tasks.Range, images: ntk.Prepared) -> np.ndarray:
    """R of the rows of [K_ts, y_t] of training images, never augmented."""
    first, last = target_range
    blocks = [self._kernel.block(images, self._prepared.train_images[first + start:first + stop])
              for start, stop in tasks.ranges(last - first, self._run['plan']['target_tile'])]
    y_t = sampling.centred_one_hot(self._prepared.train_labels[first:last], self._prepared.num_classes)
    return label_solve.factor(np.concatenate(blocks, axis=1), y_t)

  def _batch(self, step: int) -> np.ndarray:
    return self._cached(('batch', step), lambda: sampling.targets(
        self._run['seed'], step, self._prepared.train_labels, self._run['targets_per_step']))

  def _input(self, task: tasks.Task, name: str) -> np.ndarray:
    """What the coordinator publishes for a step, fetched once. Raises Stale where the step is over."""
    if self._inputs_of != (task.generation, task.step):
      self._inputs, self._inputs_of = {}, (task.generation, task.step)

    def fetch():
      value = self._coordinator.fetch(task.generation, task.step, name)
      if value is None:
        raise tasks.Stale()
      return value
    return self._cached(name, fetch)

  def _cached(self, name: Any, make: Callable[[], Any]) -> Any:
    if name not in self._inputs:
      self._inputs[name] = make()
    return self._inputs[name]

  def _fingerprint(self) -> dict[str, str]:
    """All that can change the bits of a result, apart from the run's configuration."""
    import jax
    device = jax.devices()[0]
    versions = {'numpy': np.__version__, 'jax': jax.__version__, 'python': platform.python_version()}
    return {'implementation': self._kernel.implementation, 'dtype': str(self._kernel.dtype),
            'instruction_set': getattr(self._kernel, 'instruction_set', ''),
            'device': _cpu_model() if device.platform == 'cpu' else device.device_kind, 'data': self._prepared.content, **versions}

  def _calibrate(self) -> float:
    """Pairs a second, of a single pair, of a few, of a full tile: as far as they are cheap. Compiles on the way."""
    images = self._prepared.train_images
    if self._run['method'] == 'label_solve':
      compute = self._kernel.block
    else:
      compute = lambda x1, x2: self._kernel.block_vjp(x1, x2, lambda block: block)
    rows = self._run['images_per_class'] * self._prepared.num_classes
    columns = min(self._run['plan']['target_tile'], len(images))
    rate = 0.0
    for a, b in ((1, 1), (rows, min(16, columns)), (rows, columns)):
      if rate and a * b > rate * _CALIBRATION_SECONDS:
        break
      x1, x2 = images[:a], images[len(images) - b:]
      compute(x1, x2)
      start = time.perf_counter()
      compute(x1, x2)
      rate = a * b / (time.perf_counter() - start)
    return rate


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next((line.split(':', 1)[1].strip() for line in file if line.startswith('model name')), platform.machine())
  except OSError:
    return platform.processor() or platform.machine()
