"""Leases tasks, computes kernel blocks and their cotangent pieces, and hands them back."""

import functools
import itertools
import json
import platform
import threading
import time
from concurrent import futures
from typing import Any, Callable, NamedTuple

import numpy as np
from absl import logging

from artifacts import run_directory
from data import augment, sampling, store
from distillation import krr, label_solve
from kernels import contract, library, registry
from nodes import tasks
from nodes.client import CoordinatorLost, Stopping

_CALIBRATION_SECONDS = 80.0  # by the rate so far, which a single pair makes look far too slow


class _Targets(NamedTuple):
  """A tile of the step's targets: images [b, H, W, D], centred labels [b, C]."""

  images: contract.Images
  labels: np.ndarray


class _Given(NamedTuple):
  """A task in this worker's hand, and what came with it."""

  task: tasks.Task
  lease: int
  inputs: dict[str, np.ndarray]


class KernelWorker:
  """One worker. Holds nothing between tasks that it could not fetch again.

  While the kernel computes a task, two threads of its own hand in the one before, which brings the
  one after, and fetch and make what that begins with.
  """

  def __init__(self, coordinator: Any, name: str, threads: int, cache: str, stop: threading.Event):
    """
    Args:
      coordinator: a `client.Retrying` coordinator.
      name: unique among the run's workers.
      threads: CPU threads for the kernel.
      cache: this machine's folder of prepared data.
      stop: set when the process is to stop.
    """
    self._coordinator, self._name, self._threads, self._cache, self._stop_event = (
      coordinator,
      name,
      threads,
      cache,
      stop,
    )
    self._talk, self._ahead = futures.ThreadPoolExecutor(1), futures.ThreadPoolExecutor(1)
    self._begun: dict[tasks.Task, futures.Future] = {}  # what the tasks in hand begin with
    self._lock = threading.RLock()  # of `_inputs` and `_kept`, which the threads share
    self._inputs: dict[Any, Any] = {}  # (generation, step, name) -> value
    # (generation, step, ranges) -> of a first half, tile by tile.
    self._kept: dict[Any, list[contract.Linearised | None]] = {}
    # Step, start, stop: with which this worker began its last step.
    self._first_tile: tuple[int, int, int] | None = None
    self._foreseen: tuple[Any, Any] = (None, None)  # that tile of the next step, and its targets
    self._batch = functools.lru_cache(maxsize=2)(self._sampled)

  def run(self) -> None:
    """Works until told to stop. Raises CoordinatorLost where the run's coordinator is not there any
    more."""
    try:
      try:
        hello = self._prepare()
      except (CoordinatorLost, Stopping):
        raise
      except Exception as error:
        # Whatever it is: the user must hear of it where the run is followed.
        self._coordinator.broken(self._name, f'{type(error).__name__}: {error}')
        raise
      self._take_part(hello)
    except Stopping:
      return
    finally:
      for thread in (self._talk, self._ahead):
        thread.shutdown()

  def _take_part(self, hello: str) -> None:
    """Computes task after task. Where there is enough to do, the next one is at hand when one is
    done."""
    in_hand: list[_Given] = []
    coming: futures.Future | None = None  # what the answer to the last piece brings
    while not self._stop_event.is_set():
      if coming and not in_hand:
        in_hand, coming = coming.result(), None
      if not in_hand:
        answer = self._coordinator.lease(self._name, hello)
        if answer and 'stop' in answer:
          logging.info('%s ends: %s', self._name, answer['stop'])
          return
        in_hand = self._given(answer)
        continue
      given = in_hand.pop(0)
      piece = self._work(given)
      if coming:
        in_hand += coming.result()
      coming = self._talk.submit(self._hand_in, given, piece, [other.lease for other in in_hand])

  def _prepare(self) -> str:
    """Data and kernel; gives what `Coordinator.lease` wants to know."""
    description = json.loads(self._coordinator.describe())
    saved = run_directory.Saved.from_dict(description)
    self._run, self._run_id = saved.config.run, description['run_id']
    self._augment = self._run.augmentation.is_on
    self._prepared = store.fetch(
      saved.data_key, self._cache, self._coordinator.read_data, raw=self._augment
    )
    self._kernel = registry.for_run(self._run, self._threads)
    self._num_support = self._run.images_per_class * self._prepared.num_classes
    self._two_halves = self._run.plan.split_support(self._num_support) > 0
    self._train = library.Library(self._kernel, self._prepared.train_images)
    return json.dumps({'fingerprint': self._fingerprint(), 'pairs_per_second': self._calibrate()})

  def _hand_in(
    self, given: _Given, piece: dict[str, np.ndarray] | None, holding: list[int]
  ) -> list[_Given]:
    """Hands in the piece of a task, if there is one; what the coordinator gives for it to who is
    then `holding` these leases."""

    def send():
      parts, checksum = tasks.encode(piece)
      for i, part in enumerate(parts):
        answer = self._coordinator.complete(
          self._name, list(given.task), given.lease, i, len(parts), part, checksum, holding
        )
      return answer

    return self._given(None if piece is None else self._or_fail(given, send))

  def _given(self, answer: dict[str, Any] | None) -> list[_Given]:
    """The tasks of an answer, and begins with what they begin with."""
    if answer is None:
      return []
    inputs = [tasks.unpack(data) for data in answer['inputs']]
    given = [
      _Given(tasks.Task(*task), lease, dict(itertools.chain(*(inputs[i].items() for i in indices))))
      for task, lease, indices in answer['tasks']
    ]
    for task, _, inputs in given:
      self._begun[task] = self._ahead.submit(self._begin, task, inputs)
    return given

  def _begin(self, task: tasks.Task, inputs: dict[str, np.ndarray]) -> _Targets | None:
    """Fetches what a task needs; gives the targets of its first tile."""
    self._forget_others(task)
    self._support(task, task.support_range, inputs.get('images'))
    if self._two_halves and task.phase in tasks.SUPPORT_PHASES:
      for columns in self._tiles(task):
        self._support(task, columns)
    if task.phase == tasks.TARGETS:
      self._alpha(task)
    return (
      self._first_targets(task.step, *self._tiles(task)[0])
      if task.phase in (tasks.TARGETS, tasks.TARGET_BLOCKS)
      else None
    )

  def _beginning(self, task: tasks.Task, inputs: dict[str, np.ndarray]) -> _Targets | None:
    """What `_begin` gives, begun ahead or now."""
    return (self._begun.pop(task, None) or self._ahead.submit(self._begin, task, inputs)).result()

  def _work(self, given: _Given) -> dict[str, np.ndarray] | None:
    """A task's piece; None where it is not wanted any more, or could not be computed, and the
    coordinator knows."""
    if given.task.run_id != self._run_id:
      raise CoordinatorLost('another run answers in its place.', was_there=True)
    return self._or_fail(given, lambda: self._compute(given.task, given.inputs))

  def _or_fail(self, given: _Given, function: Callable[[], Any]) -> Any:
    """What a function about a task gives; None where that is not wanted any more, or fails, and the
    coordinator knows."""
    try:
      return function()
    except tasks.Stale:
      return None
    except (CoordinatorLost, Stopping):
      raise
    except Exception as error:
      # Whatever it is: the coordinator tries the task elsewhere, then stops the run with this
      # message.
      logging.exception('%s failed at %s', self._name, given.task)
      self._coordinator.fail(
        self._name, list(given.task), given.lease, f'{type(error).__name__}: {error}'
      )
      return None

  def _compute(self, task: tasks.Task, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The piece of a task: `block`, `gradient`, `factor`, or all a group of targets contributes."""
    first = self._beginning(task, inputs)
    support = self._support(task, task.support_range)
    if task.phase == tasks.TARGETS:
      return self._targets(task, support, first)
    if task.phase == tasks.LABEL_SOLVE:
      return {'factor': self._factor(task.target_range, support)}
    if self._two_halves:
      if task.phase in (tasks.SUPPORT_BLOCKS, tasks.TARGET_BLOCKS):
        return {'block': self._first_half(task, support, first)}
      return {'gradient': self._second_half(task, support, inputs)}
    other = (
      support if task.target_range == task.support_range else self._support(task, task.target_range)
    )
    if task.phase == tasks.SUPPORT_BLOCKS:
      return {'block': self._kernel.block(support, other)}
    return {'gradient': self._kernel.block_vjp(support, other, inputs['cotangent'])[1]}

  def _forget_others(self, task: tasks.Task) -> None:
    """Drops what belongs to other steps."""
    with self._lock:
      for values in (self._inputs, self._kept):
        for key in [key for key in values if key[:2] != (task.generation, task.step)]:
          del values[key]

  def _support(
    self, task: tasks.Task, images: tasks.Range, given: np.ndarray | None = None
  ) -> contract.Prepared:
    """Support images, in the form that spares their variances being computed for every block. Where
    tasks are about parts of the support, this worker fetches no others, and none that are
    `given`."""
    if self._two_halves:
      return self._cached(
        task,
        ('images', images),
        lambda: self._kernel.prepare(
          self._fetch(task, 'images', images) if given is None else given
        ),
      )
    return self._cached(
      task,
      'images',
      lambda: self._kernel.prepare(self._fetch(task, 'images', (0, self._num_support))),
    )[slice(*images)]

  def _alpha(self, task: tasks.Task) -> np.ndarray:
    return self._cached(task, 'alpha', lambda: self._fetch(task, 'alpha', task.support_range))

  def _tiles(self, task: tasks.Task) -> list[tasks.Range]:
    """Of a task's target range: they are summed in this order."""
    first, last = task.target_range
    return [
      (first + start, first + stop)
      for start, stop in tasks.ranges(last - first, self._run.plan.target_tile)
    ]

  def _first_targets(self, *tile: int) -> _Targets:
    """Of a task's first tile: step, start, stop. A worker that begins every step at the same place,
    as one alone does, makes the targets there a step ahead: at the beginning of a step there is no
    kernel to do it beside."""
    targets = self._foreseen[1] if self._foreseen[0] == tile else self._make_targets(*tile)
    step, *place = tile
    if not self._first_tile or self._first_tile[0] != step:
      if self._first_tile == (step - 1, *place):
        self._ahead.submit(self._foresee, step + 1, *place)
      self._first_tile = tile
    return targets

  def _foresee(self, *tile: int) -> None:
    self._foreseen = tile, self._make_targets(*tile)

  def _make_targets(self, step: int, start: int, stop: int) -> _Targets:
    batch = self._batch(step)
    chosen = batch[start:stop]
    labels = sampling.centred_one_hot(
      self._prepared.train_labels[chosen], self._prepared.num_classes
    )
    if self._augment:
      return _Targets(
        augment.target_images(self._run, self._prepared, step, batch, start, stop, self._threads),
        labels,
      )
    return _Targets(self._train[chosen], labels)

  def _target_tiles(self, task: tasks.Task, first: _Targets):
    """Yields the targets of each tile; while they are used, the next ones are made: a GPU need not
    wait for them."""
    targets = first
    for following in [*self._tiles(task)[1:], None]:
      coming = following and self._ahead.submit(self._make_targets, task.step, *following)
      yield targets
      targets = coming and coming.result()

  def _targets(
    self, task: tasks.Task, support: contract.Prepared, first: _Targets
  ) -> dict[str, np.ndarray]:
    """Rows of K_ts, their residual and their cotangent in one pass, tile by tile, summed in order
    in float64."""
    alpha = self._alpha(task)
    loss, correct, alpha_bar = 0.0, 0, np.zeros_like(alpha)
    gradient = np.zeros(support.images.shape, np.float64)
    for x_t, y_t in self._target_tiles(task, first):
      residual = None

      def cotangent(block, y_t=y_t):
        nonlocal residual, alpha_bar
        block = block.astype(np.float64)
        residual = krr.residual(krr.predictions(block, alpha), y_t, self._run.targets_per_step)
        alpha_bar += krr.alpha_bar(block, residual.scaled)
        return krr.cotangent(alpha, residual.scaled)

      gradient += self._kernel.block_vjp(support, x_t, cotangent)[1]
      loss += residual.loss
      correct += residual.correct
    return {
      'loss': np.float64(loss),
      'correct': np.int64(correct),
      'alpha_bar': alpha_bar,
      'gradient': gradient.astype(self._kernel.dtype),
    }

  def _first_half(
    self, task: tasks.Task, support: contract.Prepared, first: _Targets | None
  ) -> np.ndarray:
    """The block of a task; what its derivatives need is kept for the second half, as far as there
    is room."""
    blocks, kept = [], []
    with self._lock:
      used = sum(tile.nbytes for tiles in self._kept.values() for tile in tiles if tile)
    free = self._kernel.kept_bytes - used
    if task.phase == tasks.SUPPORT_BLOCKS:
      tiles = (self._support(task, columns) for columns in self._tiles(task))
    else:
      tiles = (targets.images for targets in self._target_tiles(task, first))
    for images in tiles:
      tile = self._kernel.linearise(support, images)
      blocks.append(tile.block)
      kept.append(tile if tile.nbytes <= free else None)
      free -= tile.nbytes if kept[-1] else 0
    with self._lock:
      self._kept[self._key(task)] = kept
    return np.concatenate(blocks, axis=1)

  def _second_half(
    self, task: tasks.Task, support: contract.Prepared, inputs: dict[str, np.ndarray]
  ) -> np.ndarray:
    """The gradient by the task's support images, tile by tile, summed in order in float64."""
    gradient, first = np.zeros(support.images.shape, np.float64), task.target_range[0]
    tiles = self._tiles(task)
    of_support = task.phase == tasks.SUPPORT_VJP
    with self._lock:
      kept = self._kept.pop(self._key(task), None) or [None] * len(tiles)
    for (start, stop), tile in zip(tiles, kept):
      tile = tile or self._kernel.linearise(
        support,
        (
          self._support(task, (start, stop))
          if of_support
          else self._make_targets(task.step, start, stop).images
        ),
      )
      part = slice(start - first, stop - first)
      gradient += tile.pull_back(
        inputs['cotangent'][:, part]
        if of_support
        else krr.cotangent(inputs['alpha'], inputs['residual'][part])
      )
    return gradient.astype(self._kernel.dtype)

  def _key(self, task: tasks.Task) -> tuple:
    """Of both halves of a task."""
    return (
      task.generation,
      task.step,
      task.phase in tasks.SUPPORT_PHASES,
      task.target_range,
      task.support_range,
    )

  def _factor(self, target_range: tasks.Range, images: contract.Prepared) -> np.ndarray:
    """R of the rows of [K_ts, y_t] of training images, never augmented."""
    first, last = target_range
    blocks = [
      self._kernel.block(images, self._prepared.train_images[first + start : first + stop])
      for start, stop in tasks.ranges(last - first, self._run.plan.target_tile)
    ]
    y_t = sampling.centred_one_hot(
      self._prepared.train_labels[first:last], self._prepared.num_classes
    )
    return label_solve.factor(np.concatenate(blocks, axis=1), y_t)

  def _sampled(self, step: int) -> np.ndarray:
    return sampling.targets(
      self._run.seed, step, self._prepared.train_labels, self._run.targets_per_step
    )

  def _fetch(self, task: tasks.Task, name: str, rows: tasks.Range) -> np.ndarray:
    """Rows of what the coordinator publishes for a step. Raises Stale where the step is over."""
    data = self._coordinator.fetch(task.generation, task.step, name, *rows)
    if data is None:
      raise tasks.Stale()
    return tasks.unpack(data)[name]

  def _cached(self, task: tasks.Task, name: Any, make: Callable[[], Any]) -> Any:
    """What tasks of its step share."""
    key = (task.generation, task.step, name)
    with self._lock:
      if key not in self._inputs:
        self._inputs[key] = make()
      return self._inputs[key]

  def _fingerprint(self) -> dict[str, str]:
    """All that can change the bits of a result, apart from the run's configuration."""
    # Alone: a worker with the CUDA kernel has no use for JAX's part of the GPU.
    from jax import version

    versions = {
      'numpy': np.__version__,
      'jax': version.__version__,
      'python': platform.python_version(),
    }
    return {
      'implementation': self._kernel.implementation,
      'dtype': str(self._kernel.dtype),
      'instruction_set': self._kernel.instruction_set,
      'device': self._kernel.device or _device(),
      'data': self._prepared.content,
      **versions,
    }

  def _calibrate(self) -> float:
    """Pairs a second, of a single pair, of a few, of a full tile: as far as they are cheap.
    Compiles on the way."""
    images = self._prepared.train_images
    if self._run.method == 'label_solve':
      compute = self._kernel.block
    else:
      compute = lambda x1, x2: self._kernel.block_vjp(x1, x2, lambda block: block)
    rows = self._run.plan.split_support(self._num_support) or self._num_support
    columns = min(self._run.plan.target_tile, len(images))
    rate = 0.0
    for a, b in ((1, 1), (rows, min(16, columns)), (rows, columns)):
      if rate and a * b > rate * _CALIBRATION_SECONDS:
        break
      x1, x2 = images[:a], images[len(images) - b :]
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
      return next(
        (line.split(':', 1)[1].strip() for line in file if line.startswith('model name')),
        platform.machine(),
      )
  except OSError:
    return platform.processor() or platform.machine()
