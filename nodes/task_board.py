"""Hands the tasks of a phase out to workers and collects their pieces. Thread safe; knows nothing
of kernels."""

import collections
import math
import statistics
import threading
import time
from typing import Callable, Container, NamedTuple

import numpy as np

from nodes.tasks import SUPPORT_PHASES, Range, Task

MAX_ERRORS = 3
MAX_LOST = 20  # leases of one task that came to nothing
_DEADLINE_FACTOR = 5  # of the usual time of that kind of task
# A task that takes longer than both is given to an idle worker too.
_SLOW_FACTOR, _SLOW_SECONDS = 2, 1.0
_AWAY_SECONDS = 1.0  # without a word, after which others take a worker's tasks
_LOOK = 0.5  # seconds between an idle worker's looks at what time alone may bring up
_HISTORY = 64

Piece = dict[str, np.ndarray]


class TaskFailed(RuntimeError):
  """A task raised in a worker MAX_ERRORS times, or was lost MAX_LOST times; the message tells the
  cause."""


class Lease(NamedTuple):
  """A task in a worker's hands until `deadline` (the board's clock)."""

  id: int
  task: Task
  worker: str
  start: float
  deadline: float


class WorkerCounts(NamedTuple):
  """What one worker has done: tasks and kernel pairs accepted, seconds from lease to answer."""

  tasks: int = 0
  pairs: int = 0
  seconds: float = 0.0


class TaskBoard:
  """`post` tasks, `extend` them, let workers `lease` and `complete`, `take` the pieces in plan
  order.

  A worker says what it holds when it asks for more: a task of which it says nothing is lost. So is
  one that passes its deadline; such tasks are given out again, and when nothing else is left, so is
  a task that takes unusually long. The first answer counts and later ones change nothing. A task
  whose computation raises is tried MAX_ERRORS times in all; lost leases are counted apart.

  Who holds a task already may have another ahead, as long as there is one left for each of the
  others.

  A step in two halves: the second half of a task goes to who did the first, and is cheap there; to
  others when that one is slow or gone.
  """

  def __init__(self, lease_seconds: float, clock: Callable[[], float] = time.monotonic):
    self._lease_seconds, self._clock = lease_seconds, clock
    self._patience = min(lease_seconds, _SLOW_SECONDS)
    self._lock = threading.RLock()
    self._piece = threading.Condition(self._lock)  # what who takes the pieces waits for
    # What each worker that has no work waits for: each its own, so that few wake in vain.
    self._idle: dict[str, threading.Condition] = {}
    self._tasks: dict[Task, Piece | None] = {}  # in plan order; {} once it is taken
    self._missing = 0
    self._awaited: Task | None = None
    self._pending: dict[str | None, dict[Task, None]] = {}  # by owner, in plan order
    # Who did the first half of a task on these ranges.
    self._owners: dict[tuple[bool, Range, Range], str] = {}
    self._leases: dict[int, Lease] = {}
    self._held: dict[str, dict[int, Lease]] = {}  # by worker, the one in work first
    self._late: dict[int, Lease] = {}  # lost, but an answer may come yet
    self._errors: collections.Counter[Task] = collections.Counter()
    self._lost: collections.Counter[Task] = collections.Counter()
    self._failure: str | None = None
    self._next_lease = 0
    self._durations: dict[str, collections.deque[float]] = collections.defaultdict(
      lambda: collections.deque(maxlen=_HISTORY)
    )
    self._usual: dict[str, float] = {}  # their medians
    self._workers: dict[str, WorkerCounts] = {}
    self._heard: dict[str, float] = {}
    self._last_progress = self._last_sign = clock()
    self._totals = collections.Counter()

  def post(self, tasks: list[Task]) -> None:
    """Starts a phase; what was left of the one before is forgotten."""
    with self._lock:
      for of_this_phase in (
        self._tasks,
        self._pending,
        self._leases,
        self._held,
        self._late,
        self._errors,
        self._lost,
        self._owners,
      ):
        of_this_phase.clear()
      self._missing, self._failure = 0, None
      self._last_progress = self._last_sign = self._clock()
      self.extend(tasks)

  def extend(self, tasks: list[Task], first: bool = False) -> None:
    """Adds tasks to those posted; `first`: given out before these."""
    with self._lock:
      self._tasks.update(dict.fromkeys(tasks))
      self._missing += len(tasks)
      for task in reversed(tasks) if first else tasks:
        self._put(task, first)

  def lease(
    self, worker: str, wait: float, pairs_per_second: float = 0.0, holding: Container[int] = ()
  ) -> Lease | None:
    """A task for `worker`, which is `holding` these leases, or None if there is none within `wait`
    seconds. `pairs_per_second` is its speed, where known."""
    end = self._clock() + wait
    with self._lock:
      self._workers.setdefault(worker, WorkerCounts())
      for lease in [
        lease for lease in reversed(self._held.get(worker, {}).values()) if lease.id not in holding
      ]:
        self._take_back(lease, 'lost_leases')
      while True:
        now = self._last_sign = self._heard[worker] = self._clock()
        if now >= self._oldest() + self._lease_seconds:
          for lease in [lease for lease in self._leases.values() if lease.deadline <= now]:
            self._take_back(lease, 'expired_leases')
        task = self._next(worker, now)
        if task is not None:
          if self._pending.get(None):
            self._wake()
          usual = self._usual.get(task.phase) or (
            task.pairs / pairs_per_second if pairs_per_second else 0.0
          )
          lease = Lease(
            self._next_lease,
            task,
            worker,
            now,
            now + max(self._lease_seconds, _DEADLINE_FACTOR * usual),
          )
          self._next_lease += 1
          self._leases[lease.id] = self._held.setdefault(worker, {})[lease.id] = lease
          return lease
        if now >= end:
          return None
        waiting = self._idle[worker] = threading.Condition(self._lock)
        waiting.wait(min(end - now, _LOOK))
        if self._idle.get(worker) is waiting:
          del self._idle[worker]

  def complete(self, task: Task, lease_id: int, worker: str, piece: Piece) -> bool:
    """Takes a piece. False where it was of no use: another answer came first, or the phase is
    over."""
    with self._lock:
      self._last_sign = self._heard[worker] = now = self._clock()
      lease = self._release(lease_id) or self._late.pop(lease_id, None)
      if task not in self._tasks or self._tasks[task] is not None:
        self._totals['duplicate_answers'] += 1
        return False
      self._tasks[task] = piece
      self._missing -= 1
      self._owners[_ranges(task)] = worker
      self._last_progress = now
      seconds = 0.0
      if lease is not None:
        seconds = now - lease.start
        durations = self._durations[task.phase]
        durations.append(seconds)
        self._usual[task.phase] = statistics.median(durations)
        self._turn_to_next(lease.worker, now)
      counts = self._workers.get(worker, WorkerCounts())
      self._workers[worker] = WorkerCounts(
        counts.tasks + 1, counts.pairs + task.pairs, counts.seconds + seconds
      )
      if task == self._awaited:
        self._piece.notify_all()
      return True

  def fail(self, task: Task, lease_id: int, message: str) -> None:
    """Takes note that computing `task` raised in a worker."""
    with self._lock:
      self._last_sign = self._clock()
      lease = self._release(lease_id)
      if lease is None or task not in self._tasks or self._tasks[task] is not None:
        return
      self._errors[task] += 1
      if self._errors[task] >= MAX_ERRORS:
        self._fail(
          f'{_name(task)} failed {MAX_ERRORS} times, last in worker {lease.worker}: {message}'
        )
      else:
        self._put(task)

  def take(self, task: Task, wait: float) -> Piece | None:
    """The piece of a task, which the board then forgets, or None if it is not there within `wait`
    seconds.

    Raises:
      TaskFailed: a task has used up its tries.
    """
    with self._piece:
      self._awaited = task
      self._piece.wait_for(lambda: self._tasks[task] is not None or self._failure, wait)
      if self._failure:
        raise TaskFailed(self._failure)
      piece = self._tasks[task]
      if piece is not None:
        self._tasks[task] = {}
      return piece

  def silence(self) -> float:
    """Seconds for which no worker has asked or answered, and none was computing within its
    deadline."""
    with self._lock:
      return max(
        0.0,
        self._clock()
        - max([self._last_sign, *(lease.deadline for lease in self._leases.values())]),
      )

  def stall(self) -> tuple[float, str]:
    """Seconds since the phase last got on, and what it waits for."""
    with self._lock:
      now, missing = self._clock(), [task for task, piece in self._tasks.items() if piece is None]
      held = [
        f'{lease.task.index} with {lease.worker} for {now - lease.start:.0f} s'
        for lease in self._leases.values()
        if self._tasks[lease.task] is None
      ]
      what = (
        f'{len(missing)} of {len(self._tasks)} {missing[0].phase} tasks missing'
        if missing
        else 'nothing missing'
      )
      return (
        now - self._last_progress,
        f'{what}; in work: {", ".join(held[:4]) or "none"}{" ..." if len(held) > 4 else ""}',
      )

  def counters(self) -> dict[str, object]:
    """Totals since the board was made: `workers` {name: {tasks, pairs, seconds}}, and what became
    of leases and answers."""
    with self._lock:
      return {
        'workers': {name: counts._asdict() for name, counts in sorted(self._workers.items())},
        **{
          name: self._totals[name]
          for name in ('lost_leases', 'expired_leases', 'second_leases', 'duplicate_answers')
        },
      }

  def _next(self, worker: str, now: float) -> Task | None:
    """What to give out: the worker's own; else what is nobody's; else what nobody will have soon;
    else the task that has been in work unusually long, if nobody else tries it too."""
    task = self._pop(worker)
    if task is None and self._has_enough(worker):
      task = self._pop(None)
    if task is not None or worker in self._held:
      return task
    for owner in [
      owner for owner, waiting in self._pending.items() if waiting and now >= self._away_at(owner)
    ]:
      task = self._pop(owner)
      if task is not None:
        return task
    slow = (
      [lease for lease in self._open() if now >= self._slow_at(lease)]
      if now >= self._oldest() + self._patience
      else []
    )
    if not slow:
      return None
    self._totals['second_leases'] += 1
    return min(slow, key=lambda lease: lease.start).task

  def _has_enough(self, worker: str) -> bool:
    """Whether `worker` may have what is nobody's: ahead only if that is left for others too, and no
    sooner done by them."""
    waiting, held = self._pending.get(None, {}), self._held.get(worker)
    return not held or (
      len(waiting) >= len(self._held)
      and next(iter(held.values())).task.pairs <= next(iter(waiting)).pairs
    )

  def _put(self, task: Task, first: bool = False) -> None:
    """Makes a task pending, and wakes who may do it."""
    owner = self._owners.get(_ranges(task))
    waiting = self._pending.setdefault(owner, {})
    if first:
      self._pending[owner] = {task: None, **waiting}
    else:
      waiting[task] = None
    self._wake(owner)

  def _wake(self, worker: str | None = None) -> None:
    """Wakes a worker that waits for work: this one, or the first."""
    waiting = self._idle.pop(next(iter(self._idle), None) if worker is None else worker, None)
    if waiting:
      waiting.notify()

  def _pop(self, owner: str | None) -> Task | None:
    waiting = self._pending.get(owner, {})
    while waiting:
      task = next(iter(waiting))
      del waiting[task]
      if self._tasks[task] is None:
        return task
    return None

  def _away_at(self, owner: str) -> float:
    """When a worker is no longer expected to ask for its next task soon."""
    held = self._held.get(owner)
    return self._slow_at(next(iter(held.values()))) if held else self._heard[owner] + _AWAY_SECONDS

  def _open(self) -> list[Lease]:
    """Leases of tasks that are not done and in one worker's hands only."""
    holders = collections.Counter(lease.task for lease in self._leases.values())
    return [
      lease
      for lease in self._leases.values()
      if self._tasks[lease.task] is None and holders[lease.task] == 1
    ]

  def _oldest(self) -> float:
    """The start of the oldest lease. Nothing happens to a lease before `_patience` has passed;
    looking at each of them takes time."""
    return next(iter(self._leases.values())).start if self._leases else math.inf

  def _slow_at(self, lease: Lease) -> float:
    usual = self._usual.get(lease.task.phase)
    return lease.start + max(_SLOW_SECONDS, _SLOW_FACTOR * usual) if usual else lease.deadline

  def _release(self, lease_id: int) -> Lease | None:
    lease = self._leases.pop(lease_id, None)
    if lease is not None:
      held = self._held[lease.worker]
      del held[lease_id]
      if not held:
        del self._held[lease.worker]
    return lease

  def _turn_to_next(self, worker: str, now: float) -> None:
    """The task that the worker had ahead is in work from now on."""
    for lease in list(self._held.get(worker, {}).values())[:1]:
      del self._leases[lease.id]  # to the end, as they stand in order of `start`
      self._leases[lease.id] = self._held[worker][lease.id] = lease._replace(
        start=now, deadline=now + lease.deadline - lease.start
      )

  def _take_back(self, lease: Lease, why: str) -> None:
    self._late[lease.id] = self._release(lease.id)
    task = lease.task
    if self._tasks[task] is not None:
      return
    self._totals[why] += 1
    self._lost[task] += 1
    if self._lost[task] >= MAX_LOST:
      self._fail(
        f'{_name(task)} was given to workers {MAX_LOST} times, last to {lease.worker}, and never came back: computing it '
        'kills them (see their output) or takes longer than system.lease_seconds.'
      )
    elif not any(other.task == task for other in self._leases.values()):
      self._put(task, first=True)

  def _fail(self, message: str) -> None:
    self._failure = message
    self._piece.notify_all()


def _ranges(task: Task) -> tuple[bool, Range, Range]:
  return task.phase in SUPPORT_PHASES, task.target_range, task.support_range


def _name(task: Task) -> str:
  return f'step {task.step}: the {task.phase} task {task.index}'
