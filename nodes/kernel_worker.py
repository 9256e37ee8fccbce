"""The worker: leases tasks, computes their pieces, and submits them."""

import json
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging

from artifacts import run_directory
from data import store
from distillation import inputs, pieces, plan
from distillation.step import Piece
from kernels import registry
from nodes import hardware, messages
from nodes.client import CoordinatorLost, Stopping
from nodes.messages import Life
from nodes.prefetch import Prefetched, Prefetcher

T = TypeVar('T')


class Stale(Exception):
  """A task's step is over."""


class Leased(NamedTuple):
  """A task that this worker has, and its inputs."""

  life: Life
  task: plan.Task
  lease: int
  inputs: Prefetched


class KernelWorker:
  """A worker. Whatever it keeps from task to task it could fetch or compute again.

  While the kernel computes, one thread submits the previous piece and receives the next task, and
  another prefetches that task's inputs.
  """

  def __init__(self, coordinator: Any, name: str, threads: int, cache: str, stop: threading.Event):
    """Makes the worker; `run` talks to the coordinator.

    Args:
      coordinator: a `client.Retrying`.
      name: unique among the run's workers.
      threads: CPU threads for the kernel.
      cache: this machine's folder of prepared data.
      stop: set when the process is to stop.
    """
    self._coordinator, self._name, self._threads = coordinator, name, threads
    self._cache, self._stop = cache, stop
    self._submit_pool = futures.ThreadPoolExecutor(1)
    self._prefetcher: Prefetcher | None = None

  def run(self) -> None:
    """Works until told to stop.

    Raises CoordinatorLost where the run's coordinator is gone, and whatever kept the worker from
    starting, after it is reported.
    """
    try:
      try:
        hello = self._prepare()
      except (CoordinatorLost, Stopping):
        raise
      except Exception as error:
        # Any type: the user follows the run at the coordinator, and must see there what is wrong.
        self._coordinator.report_unusable(self._name, f'{type(error).__name__}: {error}')
        raise
      self._take_part(hello)
    except Stopping:
      return
    finally:
      self._submit_pool.shutdown()
      if self._prefetcher:
        self._prefetcher.close()

  def _prepare(self) -> str:
    """Gets data and kernel ready; returns the `hello` for `Coordinator.lease`."""
    description = json.loads(self._coordinator.describe())
    saved = run_directory.Saved.from_dict(description)
    self._run, self._run_id = saved.config.run, description['run_id']
    raw = self._run.augmentation.is_on
    prepared = store.fetch(saved.data_key, self._cache, self._coordinator.read_data, raw=raw)
    self._kernel = registry.for_run(self._run, self._threads)
    self._num_support = self._run.images_per_class * prepared.num_classes
    self._linearised = pieces.Linearisations(self._kernel.kept_bytes)
    training = inputs.Training(self._run, prepared, self._kernel, self._threads)
    self._prefetcher = Prefetcher(self._run, self._num_support, self._kernel, training, self._fetch)
    rate = hardware.pairs_per_second(
      self._kernel, prepared.train_images, self._run, self._num_support
    )
    fingerprint = hardware.fingerprint(self._kernel, prepared)
    return json.dumps({'fingerprint': fingerprint, 'pairs_per_second': rate})

  def _take_part(self, hello: str) -> None:
    """Computes task after task, one of them in advance where there are enough."""
    in_hand: list[Leased] = []
    coming: futures.Future[list[Leased]] | None = None  # with the answer to the last piece
    while not self._stop.is_set():
      if coming and not in_hand:
        in_hand, coming = coming.result(), None
      if not in_hand:
        answer = self._coordinator.lease(self._name, hello)
        if answer and 'stop' in answer:
          logging.info('%s ends: %s', self._name, answer['stop'])
          return
        in_hand = self._received(answer)
        continue
      leased = in_hand.pop(0)
      piece = self.compute(leased)
      if coming:
        in_hand += coming.result()
      holding = [other.lease for other in in_hand]
      coming = self._submit_pool.submit(self._submit, leased, piece, holding)

  def compute(self, leased: Leased) -> Piece | None:
    """Computes a task's piece; returns None where it is stale or failed, which is reported.

    Raises CoordinatorLost where another run's coordinator has taken the place of this run's.
    """
    if leased.life.run_id != self._run_id:
      raise CoordinatorLost('another run answers in its place.')
    return self._or_report(leased, lambda: self._piece(leased))

  def _piece(self, leased: Leased) -> Piece:
    task = leased.task
    found = leased.inputs.get()
    self._linearised.begin((leased.life, task.step))
    return pieces.compute(task, self._run, self._num_support, self._kernel, found, self._linearised)

  def _submit(self, leased: Leased, piece: Piece | None, holding: list[int]) -> list[Leased]:
    """Submits a piece; returns further tasks, given that this worker still holds `holding`."""
    if piece is None:
      return []
    return self._received(self._or_report(leased, lambda: self._send(leased, piece, holding)))

  def _send(self, leased: Leased, piece: Piece, holding: list[int]) -> dict[str, Any] | None:
    parts, checksum = messages.encode(piece)
    about = self._name, list(leased.life), list(leased.task), leased.lease
    answer = None
    for i, part in enumerate(parts):
      answer = self._coordinator.complete(*about, i, len(parts), part, checksum, holding)
    return answer

  def _received(self, answer: dict[str, Any] | None) -> list[Leased]:
    """Unpacks the tasks of an answer, and begins to fetch their inputs."""
    if answer is None:
      return []
    assert self._prefetcher is not None
    life, attached = Life(*answer['life']), [messages.unpack(data) for data in answer['inputs']]
    leased = []
    for fields, lease, places in answer['tasks']:
      task = messages.task_from(fields)
      with_task = {name: value for i in places for name, value in attached[i].items()}
      leased.append(Leased(life, task, lease, self._prefetcher.begin(life, task, with_task)))
    return leased

  def _fetch(self, life: Life, step: int, name: str, start: int, stop: int) -> np.ndarray:
    """Fetches rows of an array that a step has published. Raises Stale where the step is over."""
    data = self._coordinator.fetch(list(life), step, name, start, stop)
    if data is None:
      raise Stale()
    return messages.unpack(data)[name]

  def _or_report(self, leased: Leased, function: Callable[[], T]) -> T | None:
    """Calls a function about a task; returns None where the task is stale or the function fails.

    A failure is reported: the coordinator has the task tried again, and in the end fails the run.
    """
    try:
      return function()
    except Stale:
      return None
    except (CoordinatorLost, Stopping):
      raise
    except Exception as error:  # any type: the coordinator decides
      logging.exception('%s failed at %s', self._name, leased.task)
      self._coordinator.report_task_error(
        self._name, list(leased.task), leased.lease, f'{type(error).__name__}: {error}'
      )
      return None
