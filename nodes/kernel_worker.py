"""Leases tasks, computes kernel blocks and their cotangent pieces, and hands them back."""

from concurrent import futures
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
    self._ahead = futures.ThreadPoolExecutor(1)
    self._inputs: dict[Any, Any] = {}
    self._inputs_of = None  # (generation, step)
    self._kept: dict[Any, list[ntk.Linearised | None]] = {}  # of the same step's first halves, tile by tile

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
      answer = None
      while not self._stop_event.is_set():
        answer = answer or self._coordinator.lease(self._name, hello)
        if answer and 'stop' in answer:
          logging.info('%s ends: %s', self._name, answer['stop'])
          return
        if answer:
          answer = self._work(tasks.Task(*answer['task']), answer['lease'], answer['inputs'])
    except Stopping:
      return

  def _prepare(self) -> str:
    """Data and kernel; gives what `Coordinator.lease` wants to know."""
    description = json.loads(self._coordinator.describe())
    self._run, self._run_id = description['run'], description['run_id']
    self._augment = self._run['augmentation']['fraction'] > 0
    self._prepared = store.fetch(description['data_key'], self._cache, self._coordinator.read_data, raw=self._augment)
    self._kernel = ntk.for_run(self._run, self._threads)
    self._num_support = self._run['images_per_class'] * self._prepared.num_classes
    self._two_halves = tasks.support_per_task(self._run, self._num_support) > 0
    self._train = ntk.Library(self._kernel, self._prepared.train_images)
    return json.dumps({'fingerprint': self._fingerprint(), 'pairs_per_second': self._calibrate()})

  def _work(self, task: tasks.Task, lease: int, inputs: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Computes a task's piece and hands it back; gives the coordinator's answer, which may be the next task."""
    answer = None
    if task.run_id != self._run_id:
      raise CoordinatorLost('another run answers in its place.', was_there=True)
    try:
      parts, checksum = tasks.encode(self._compute(task, inputs))
      for i, part in enumerate(parts):
        answer = self._coordinator.complete(self._name, list(task), lease, i, len(parts), part, checksum)
    except tasks.Stale:
      pass
    except (CoordinatorLost, Stopping):
      raise
    except Exception as error:  # whatever it is: the coordinator tries the task elsewhere, then stops the run with this message
      logging.exception('%s failed at %s', self._name, task)
      self._coordinator.fail(self._name, list(task), lease, f'{type(error).__name__}: {error}')
    return answer

  def _compute(self, task: tasks.Task, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The piece of a task: `block`, `gradient`, `factor`, or all a group of targets contributes."""
    self._turn_to(task)
    support = self._support(task, task.support_range)
    if task.phase == tasks.TARGETS:
      return self._targets(task, support)
    if task.phase == tasks.LABEL_SOLVE:
      return {'factor': self._factor(task.target_range, support)}
    if self._two_halves:
      if task.phase in (tasks.SUPPORT_BLOCKS, tasks.TARGET_BLOCKS):
        return {'block': self._first_half(task, support)}
      return {'gradient': self._second_half(task, support, inputs)}
    other = support if task.target_range == task.support_range else self._support(task, task.target_range)
    if task.phase == tasks.SUPPORT_BLOCKS:
      return {'block': self._kernel.block(support, other)}
    return {'gradient': self._kernel.block_vjp(support, other, inputs['cotangent'])[1]}

  def _turn_to(self, task: tasks.Task) -> None:
    """Forgets what belongs to other steps."""
    if self._inputs_of != (task.generation, task.step):
      self._inputs, self._kept, self._inputs_of = {}, {}, (task.generation, task.step)

  def _support(self, task: tasks.Task, images: tasks.Range) -> ntk.Prepared:
    """Support images, in the form that spares their variances being computed for every block. Where tasks are about parts of the support,
    this worker fetches no others."""
    if self._two_halves:
      return self._cached(('images', images), lambda: self._kernel.prepare(self._fetch(task, 'images', images)))
    return self._cached('images', lambda: self._kernel.prepare(self._fetch(task, 'images', (0, self._num_support))))[slice(*images)]

  def _tiles(self, task: tasks.Task) -> list[tasks.Range]:
    """Of a task's target range: they are summed in this order."""
    first, last = task.target_range
    return [(first + start, first + stop) for start, stop in tasks.ranges(last - first, self._run['plan']['target_tile'])]

  def _target_images(self, task: tasks.Task, start: int, stop: int) -> 'ntk.Images':
    batch = self._batch(task.step)
    if self._augment:
      return augment.target_images(self._run, self._prepared, task.step, batch, start, stop, self._threads)
    return self._train[batch[start:stop]]

  def _target_tiles(self, task: tasks.Task):
    """Yields (start, stop, images) of each tile; while it is used, the images of the next are made: a GPU need not wait for them."""
    make = lambda tile: self._ahead.submit(self._target_images, task, *tile)
    tiles = self._tiles(task)
    coming = make(tiles[0])
    for tile, following in zip(tiles, [*tiles[1:], None]):
      images = coming.result()
      coming = following and make(following)
      yield *tile, images

  def _targets(self, task: tasks.Task, support: ntk.Prepared) -> dict[str, np.ndarray]:
    """Rows of K_ts, their residual and their cotangent in one pass, tile by tile, summed in order in float64."""
    alpha = self._cached('alpha', lambda: self._fetch(task, 'alpha', task.support_range))
    batch = self._batch(task.step)
    loss, correct, alpha_bar = 0.0, 0, np.zeros_like(alpha)
    gradient = np.zeros(support.images.shape, np.float64)
    for start, stop, x_t in self._target_tiles(task):
      y_t = sampling.centred_one_hot(self._prepared.train_labels[batch[start:stop]], self._prepared.num_classes)
      residual = None

      def cotangent(block, y_t=y_t):
        nonlocal residual
        residual = krr.residual(block, alpha, y_t, len(batch))
        return krr.cotangent(alpha, residual.scaled)

      gradient += self._kernel.block_vjp(support, x_t, cotangent)[1]
      loss += residual.loss
      correct += residual.correct
      alpha_bar += residual.alpha_bar
    return {'loss': np.float64(loss), 'correct': np.int64(correct), 'alpha_bar': alpha_bar, 'gradient': gradient.astype(self._kernel.dtype)}

  def _first_half(self, task: tasks.Task, support: ntk.Prepared) -> np.ndarray:
    """The block of a task; what its derivatives need is kept for the second half, as far as there is room."""
    blocks, kept = [], []
    free = tasks.KEPT_BYTES - sum(tile.nbytes for tiles in self._kept.values() for tile in tiles if tile)
    for columns in self._tiles(task):
      tile = self._linearise(task, support, columns)
      blocks.append(tile.block)
      kept.append(tile if tile.nbytes <= free else None)
      free -= tile.nbytes if kept[-1] else 0
    self._kept[self._ranges(task)] = kept
    return np.concatenate(blocks, axis=1)

  def _second_half(self, task: tasks.Task, support: ntk.Prepared, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The gradient by the task's support images, tile by tile, summed in order in float64."""
    gradient, first = np.zeros(support.images.shape, np.float64), task.target_range[0]
    tiles = self._tiles(task)
    for (start, stop), tile in zip(tiles, self._kept.pop(self._ranges(task), None) or [None] * len(tiles)):
      tile = tile or self._linearise(task, support, (start, stop))
      part = slice(start - first, stop - first)
      gradient += tile.pull_back(inputs['cotangent'][:, part] if task.phase == tasks.SUPPORT_VJP else
                                 krr.cotangent(inputs['alpha'], inputs['residual'][part]))
    return gradient.astype(self._kernel.dtype)

  def _linearise(self, task: tasks.Task, support: ntk.Prepared, columns: tasks.Range) -> ntk.Linearised:
    of_support = task.phase in tasks.SUPPORT_PHASES
    return self._kernel.linearise(support, self._support(task, columns) if of_support else self._target_images(task, *columns))

  def _ranges(self, task: tasks.Task) -> tuple[bool, tasks.Range, tasks.Range]:
    return task.phase in tasks.SUPPORT_PHASES, task.target_range, task.support_range

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

  def _fetch(self, task: tasks.Task, name: str, rows: tasks.Range) -> np.ndarray:
    """Rows of what the coordinator publishes for a step. Raises Stale where the step is over."""
    value = self._coordinator.fetch(task.generation, task.step, name, *rows)
    if value is None:
      raise tasks.Stale()
    return value

  def _cached(self, name: Any, make: Callable[[], Any]) -> Any:
    if name not in self._inputs:
      self._inputs[name] = make()
    return self._inputs[name]

  def _fingerprint(self) -> dict[str, str]:
    """All that can change the bits of a result, apart from the run's configuration."""
    from jax import version  # alone: a worker with the CUDA kernel has no use for JAX's part of the GPU
    versions = {'numpy': np.__version__, 'jax': version.__version__, 'python': platform.python_version()}
    return {'implementation': self._kernel.implementation, 'dtype': str(self._kernel.dtype),
            'instruction_set': self._kernel.instruction_set,
            'device': self._kernel.device or _device(), 'data': self._prepared.content, **versions}

  def _calibrate(self) -> float:
    """Pairs a second, of a single pair, of a few, of a full tile: as far as they are cheap. Compiles on the way."""
    images = self._prepared.train_images
    if self._run['method'] == 'label_solve':
      compute = self._kernel.block
    else:
      compute = lambda x1, x2: self._kernel.block_vjp(x1, x2, lambda block: block)
    rows = tasks.support_per_task(self._run, self._num_support) or self._num_support
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


def _device() -> str:
  """That JAX computes on."""
  import jax
  device = jax.devices()[0]
  return _cpu_model() if device.platform == 'cpu' else device.device_kind


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next((line.split(':', 1)[1].strip() for line in file if line.startswith('model name')), platform.machine())
  except OSError:
    return platform.processor() or platform.machine()
