"""Fetches and prepares the first inputs of leased tasks while the kernel computes others."""

from collections.abc import Callable, Mapping
from concurrent import futures

import numpy as np

from configs import schema
from distillation import inputs, plan
from kernels.contract import Kernel
from nodes.messages import Life

# Returns rows of an array that a step has published: (life, step, name, start, stop).
Fetch = Callable[[Life, int, str, int, int], np.ndarray]


class Prefetched:
  """The inputs of one task, the first of them on their way."""

  def __init__(self, found: inputs.TaskInputs, begun: 'futures.Future[None]'):
    self._found, self._begun = found, begun

  def get(self) -> inputs.TaskInputs:
    """Waits for the first inputs, and returns all. Raises what fetching them raised."""
    self._begun.result()
    return self._found


class Prefetcher:
  """Prepares the inputs of task after task in a thread of its own."""

  def __init__(
    self, run: schema.Run, num_support: int, kernel: Kernel, training: inputs.Training, fetch: Fetch
  ):
    """
    Args:
      run: with its plan.
      num_support: `S`.
      kernel: prepares images.
      training: makes targets.
      fetch: fetches from the coordinator.
    """
    self._run, self._num_support, self._kernel = run, num_support, kernel
    self._training, self._fetch = training, fetch
    self._pool = futures.ThreadPoolExecutor(1)
    self._step: tuple[Life, int] | None = None
    self._of_step: inputs.StepInputs | None = None

  def begin(self, life: Life, task: plan.Task, attached: Mapping[str, np.ndarray]) -> Prefetched:
    """Begins to fetch a task's inputs; those `attached` came with it."""
    if self._of_step is None or self._step != (life, task.step):
      self._step = life, task.step
      self._of_step = inputs.StepInputs(
        self._run, self._num_support, self._kernel, self._fetcher(life, task.step)
      )
    found = inputs.TaskInputs(task, self._of_step, self._training, attached, self._pool)
    tiles = plan.tiles(task, self._run.plan.target_tile)
    return Prefetched(found, self._pool.submit(found.prefetch, tiles))

  def close(self) -> None:
    """Ends the thread, once it has fetched what it began."""
    self._pool.shutdown()

  def _fetcher(self, life: Life, step: int) -> inputs.Fetch:
    """Makes the function by which a step's inputs are fetched."""

    def fetch(name: str, where: tuple[slice, ...]) -> np.ndarray:
      [rows] = where
      return self._fetch(life, step, name, rows.start, rows.stop)

    return fetch
