"""Hands the tasks of a phase out to workers and collects their pieces. Thread safe; knows nothing of kernels."""

import collections
import statistics
import threading
import time
from typing import Callable, NamedTuple

import numpy as np

from nodes.tasks import Task

MAX_ERRORS = 3
_DEADLINE_FACTOR = 5  # of the median time of that kind of task
_HISTORY = 64

Piece = dict[str, np.ndarray]


class TaskFailed(RuntimeError):
  """A task raised in a worker MAX_ERRORS times; the message is the worker's."""


class Lease(NamedTuple):
  """A task in a worker's hands until `deadline` (the board's clock)."""
  id: int
  task: Task
  worker: str
  start: float
  deadline: float


class WorkerCounts(NamedTuple):
  """What one worker has done: tasks and kernel pairs accepted, seconds from lease to answer (of leases that had not expired)."""
  tasks: int = 0
  pairs: int = 0
  seconds: float = 0.0


class TaskBoard:
  """One phase at a time: `post` it, let workers `lease` and `complete`, `collect` the pieces in plan order.

  A lease that passes its deadline is given out again; the first answer counts and later ones change nothing. A task whose computation
  raises is tried MAX_ERRORS times in all; expired leases do not count as errors.
  """

  def __init__(self, lease_seconds: float, clock: Callable[[], float] = time.monotonic):
    self._lease_seconds, self._clock = lease_seconds, clock
    self._changed = threading.Condition()
    self._tasks: dict[Task, Piece | None] = {}  # in plan order
    self._missing = 0
    self._pending: collections.deque[Task] = collections.deque()
    self._leases: dict[int, Lease] = {}
    self._errors: collections.Counter[Task] = collections.Counter()
    self._failure: str | None = None
    self._next_lease = 0
    self._durations: dict[str, collections.deque[float]] = collections.defaultdict(lambda: collections.deque(maxlen=_HISTORY))
    self._workers: dict[str, WorkerCounts] = {}
    self._expired = 0
    self._duplicates = 0

  def post(self, tasks: list[Task]) -> None:
    """Starts a phase; what was left of the one before is forgotten."""
    with self._changed:
      self._tasks, self._missing = dict.fromkeys(tasks), len(tasks)
      self._pending = collections.deque(tasks)
      self._leases.clear()
      self._errors.clear()
      self._failure = None
      self._changed.notify_all()

  def lease(self, worker: str, wait: float) -> Lease | None:
    """A task for `worker`, or None if there is none within `wait` seconds."""
    end = self._clock() + wait
    with self._changed:
      while True:
        now = self._clock()
        self._reclaim(now)
        while self._pending:
          task = self._pending.popleft()
          if self._tasks[task] is None:
            lease = Lease(self._next_lease, task, worker, now, now + self._seconds(task.phase))
            self._next_lease += 1
            self._leases[lease.id] = lease
            self._workers.setdefault(worker, WorkerCounts())
            return lease
        if now >= end:
          return None
        expiry = min((lease.deadline for lease in self._leases.values()), default=end)
        self._changed.wait(max(0.001, min(end, expiry) - now))

  def complete(self, task: Task, lease_id: int, worker: str, piece: Piece) -> bool:
    """Takes a piece. False where it was of no use: another answer came first, or the phase is over."""
    with self._changed:
      lease = self._leases.pop(lease_id, None)
      if task not in self._tasks or self._tasks[task] is not None:
        self._duplicates += 1
        return False
      self._tasks[task] = piece
      self._missing -= 1
      seconds = 0.0
      if lease is not None:
        seconds = self._clock() - lease.start
        self._durations[task.phase].append(seconds)
      counts = self._workers.get(worker, WorkerCounts())
      self._workers[worker] = WorkerCounts(counts.tasks + 1, counts.pairs + task.pairs, counts.seconds + seconds)
      self._changed.notify_all()
      return True

  def fail(self, task: Task, lease_id: int, message: str) -> None:
    """Takes note that computing `task` raised in a worker."""
    with self._changed:
      lease = self._leases.pop(lease_id, None)
      if lease is None or task not in self._tasks or self._tasks[task] is not None:
        return
      self._errors[task] += 1
      if self._errors[task] >= MAX_ERRORS:
        self._failure = (f'step {task.step}: the {task.phase} task {task.index} failed {MAX_ERRORS} times, '
                         f'last in worker {lease.worker}: {message}')
      else:
        self._pending.append(task)
      self._changed.notify_all()

  def collect(self, wait: float) -> list[Piece] | None:
    """The pieces in plan order, or None if some are missing after `wait` seconds.

    Raises:
      TaskFailed: a task has used up its tries.
    """
    with self._changed:
      self._changed.wait_for(lambda: not self._missing or self._failure, wait)
      if self._failure:
        raise TaskFailed(self._failure)
      return None if self._missing else list(self._tasks.values())

  def counters(self) -> dict[str, object]:
    """Totals since the board was made: `workers` {name: {tasks, pairs, seconds}}, `expired_leases`, `duplicate_answers`."""
    with self._changed:
      return {'workers': {name: counts._asdict() for name, counts in sorted(self._workers.items())},
              'expired_leases': self._expired, 'duplicate_answers': self._duplicates}

  def _seconds(self, phase: str) -> float:
    history = self._durations[phase]
    return max(self._lease_seconds, _DEADLINE_FACTOR * statistics.median(history)) if history else self._lease_seconds

  def _reclaim(self, now: float) -> None:
    for lease in [lease for lease in self._leases.values() if lease.deadline <= now]:
      del self._leases[lease.id]
      self._expired += 1
      self._pending.append(lease.task)
