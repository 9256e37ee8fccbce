"""Inputs of tasks: parts of a step's published arrays, and targets from a worker's own data."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from configs import schema
from data import augment, sampling, store
from distillation import plan, step
from distillation.pieces import Targets
from kernels.contract import Kernel, Prepared
from kernels.library import Library

# Returns a part of an array that a step has published: (name, index).
Fetch = Callable[[str, tuple[slice, ...]], np.ndarray]


class Training:
  """The training set, from which a run's targets are made. Thread safe."""

  def __init__(self, run: schema.Run, prepared: store.Prepared, kernel: Kernel, threads: int = 1):
    """Makes targets from prepared data.

    Args:
      run: with its seed, batch size and augmentation.
      prepared: the data; with raw images where targets are augmented.
      kernel: prepares images.
      threads: CPU threads for augmentation.
    """
    self._run, self._prepared, self._threads = run, prepared, threads
    self._library = Library(kernel, prepared.train_images)
    self._batch = functools.lru_cache(maxsize=2)(
      lambda of_step: step.target_batch(of_step, run, prepared)
    )

  def targets(self, of_step: int, tile: plan.Range) -> Targets:
    """Makes a tile of a step's batch."""
    batch = self._batch(of_step)
    chosen = batch[slice(*tile)]
    labels = self._labels(chosen)
    if self._run.augmentation.is_on:
      images = augment.target_images(
        self._run, self._prepared, of_step, batch, *tile, self._threads
      )
      return Targets(images, labels)
    return Targets(self._library[chosen], labels)

  def plain(self, tile: plan.Range) -> Targets:
    """Images [start, stop) of the training set and their labels, not augmented."""
    rows = slice(*tile)
    return Targets(self._prepared.train_images[rows], self._labels(rows))

  def _labels(self, chosen: Any) -> np.ndarray:
    return sampling.centred_one_hot(self._prepared.train_labels[chosen], self._prepared.num_classes)


class StepInputs:
  """The published arrays of one step, each part fetched once. Thread safe.

  Attributes:
    in_parts: whether tasks are about parts of the support set.
  """

  def __init__(self, run: schema.Run, num_support: int, kernel: Kernel, fetch: Fetch):
    self._num_support, self._kernel, self._fetch = num_support, kernel, fetch
    self.in_parts = run.plan.split_support(num_support) > 0
    self._lock = threading.RLock()
    self._known: dict[Any, Any] = {}  # by name and rows

  def support(self, rows: plan.Range, given: np.ndarray | None = None) -> Prepared:
    """Prepares support images, `given` or fetched: these rows if `in_parts`, else all, once."""
    if not self.in_parts:
      return self._once('images', lambda: self._prepared((0, self._num_support)))[slice(*rows)]
    return self._once(('images', rows), lambda: self._prepared(rows, given))

  def published(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
    """Fetches a part of an array."""
    key = name, tuple((part.start, part.stop) for part in where)
    return self._once(key, lambda: self._fetch(name, where))

  def _prepared(self, rows: plan.Range, given: np.ndarray | None = None) -> Prepared:
    return self._kernel.prepare(self._fetch('images', (slice(*rows),)) if given is None else given)

  def _once(self, key: Any, make: Callable[[], Any]) -> Any:
    """Calls `make` the first time that a key is asked for; returns its result."""
    with self._lock:
      if key not in self._known:
        self._known[key] = make()
      return self._known[key]


class TaskInputs:
  """The inputs of one task (`pieces.Inputs`)."""

  def __init__(
    self,
    task: plan.Task,
    of_step: StepInputs,
    training: Training,
    attached: Mapping[str, np.ndarray],
    ahead: futures.Executor | None = None,
  ):
    """Fetches nothing before it is asked for.

    Args:
      task: the task.
      of_step: shared by the step's tasks.
      training: makes targets.
      attached: parts of published arrays that were sent with the task.
      ahead: makes the next tile of targets while one is used; None: makes each when asked for.
    """
    self._task, self._of_step, self._training = task, of_step, training
    self._attached, self._ahead = attached, ahead
    self._first: Targets | None = None

  def prefetch(self, tiles: Sequence[plan.Range]) -> None:
    """Fetches, or makes, what the task needs first; `tiles` are those of its target range."""
    self.support(self._task.support_range)
    if self._of_step.in_parts and self._task.phase in plan.SUPPORT_PHASES:
      for columns in tiles:
        self.support(columns)
    if self._task.phase == plan.TARGETS:
      self.published('alpha')
    if self._task.phase in (plan.TARGETS, plan.TARGET_BLOCKS):
      self._first = self._training.targets(self._task.step, tiles[0])

  def support(self, rows: plan.Range) -> Prepared:
    """See `pieces.Inputs`, as for the methods below."""
    is_own = rows == self._task.support_range
    return self._of_step.support(rows, self._attached.get('images') if is_own else None)

  def published(self, name: str) -> np.ndarray:
    if name in self._attached:
      return self._attached[name]
    return self._of_step.published(name, plan.part(self._task, name))

  def targets(self, tiles: Sequence[plan.Range]) -> Iterator[Targets]:
    make = functools.partial(self._training.targets, self._task.step)
    targets, self._first = self._first or make(tiles[0]), None
    for tile in tiles[1:]:
      coming = self._ahead.submit(make, tile) if self._ahead else None
      yield targets
      targets = coming.result() if coming else make(tile)
    yield targets

  def training(self, tiles: Sequence[plan.Range]) -> Iterator[Targets]:
    return map(self._training.plain, tiles)
