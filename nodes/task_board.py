"""Leases tasks to workers and collects their pieces. Knows nothing of kernels."""

import collections
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from distillation import plan
from distillation.plan import Range, Task
from distillation.step import Piece

IN_HAND = 2  # tasks that a worker may have: one in work and one ahead
MAX_ERRORS = 3
MAX_LOST = 20  # leases of one task that end without an answer
_DEADLINE_FACTOR = 5  # deadline over the usual time of that kind of task
_SLOW_FACTOR = 2  # a task is slow, and leased to an idle worker too, after so many usual times
_AWAY_SECONDS = 1.0  # of silence after which others take the tasks that a worker owns
_LOOK = 0.5  # seconds after which a waiting worker looks for tasks that have become slow
_HISTORY = 64  # durations of a kind of task whose median is the usual time


class TaskFailed(RuntimeError):
  """A task raised in a worker MAX_ERRORS times, or was lost MAX_LOST times; says why."""


class Lease(NamedTuple):
  """A task in a worker's hands until `deadline` (the board's clock)."""

  id: int
  task: Task
  worker: str
  start: float
  deadline: float


class WorkerCounts(NamedTuple):
  """Work of one worker: tasks and kernel pairs accepted, seconds from lease to answer."""

  tasks: int = 0
  pairs: int = 0
  seconds: float = 0.0


class TaskBoard:
  """The tasks of a step: `post` them, `lease` and `complete` each, `take` its piece. Thread safe.

  A worker names the leases that it holds when it asks for more: others of its leases are lost. So
  is one that passes its deadline. Lost tasks are leased again; when nothing else is left, so is a
  task that takes unusually long. The first answer counts and later ones change nothing. A task
  whose computation raises is tried MAX_ERRORS times in all; lost leases are counted apart.

  A busy worker may prefetch one more task if enough remain for the others.

  In a step in two halves the worker that did the first half of a task owns the second, which is
  cheap for it; others get it when that worker is slow or gone.

  Attributes:
    pairs_taken: kernel entries of the pieces that were taken.
  """

  def __init__(
    self,
    lease_seconds: float,
    num_workers: int = 1,
    in_halves: bool = False,
    clock: Callable[[], float] = time.monotonic,
    slow_seconds: float = 1.0,
  ):
    """
    Args:
      lease_seconds: deadline of a task, at least.
      num_workers: that the run is meant to have.
      in_halves: whether steps have two halves.
      clock: gives seconds.
      slow_seconds: a task is not slow before.
    """
    self._lease_seconds, self._num_workers = lease_seconds, num_workers
    self._in_halves, self._clock = in_halves, clock
    self._slow_seconds, self._patience = slow_seconds, min(lease_seconds, slow_seconds)
    self._lock = threading.RLock()
    self._piece = threading.Condition(self._lock)  # for which `take` waits
    # By idle worker: one condition per worker avoids a thundering herd.
    self._idle: dict[str, threading.Condition] = {}
    self._tasks: dict[Task, Piece | None] = {}  # in plan order; {} once it is taken
    self._step = -1
    self._awaited: Task | None = None
    self._pending: dict[str | None, dict[Task, None]] = {}  # by owner, in the order of leasing
    # The workers that did the first halves, by `_ranges` of their tasks.
    self._owners: dict[tuple[bool, Range, Range], str] = {}
    self._leases: dict[int, Lease] = {}
    self._held: dict[str, dict[int, Lease]] = {}  # by worker, the one in work first
    self._late: dict[int, Lease] = {}  # lost, but its answer may still come
    self._errors: collections.Counter[Task] = collections.Counter()
    self._lost: collections.Counter[Task] = collections.Counter()
    self._failure: str | None = None
    self._next_lease = 0
    self._durations: dict[str, collections.deque[float]] = collections.defaultdict(
      lambda: collections.deque(maxlen=_HISTORY)
    )
    self._usual: dict[str, float] = {}  # medians of `_durations`, by phase
    self._workers: dict[str, WorkerCounts] = {}
    self._heard: dict[str, float] = {}
    self._last_progress = self._last_sign = clock()
    self._totals = collections.Counter()
    self.pairs_taken = 0

  def post(self, tasks: Sequence[Task]) -> None:
    """Adds tasks; those of another step replace what was there.

    Tasks that end a step's work on a group of targets are leased before those that begin another.
    """
    with self._lock:
      if tasks[0].step != self._step:
        self.clear()
        self._step = tasks[0].step
      self._tasks.update(dict.fromkeys(tasks))
      goes_first = tasks[0].phase in plan.VJP_PHASES
      for task in reversed(tasks) if goes_first else self._arranged(tasks):
        self._put(task, goes_first)

  def clear(self) -> None:
    """Forgets all tasks."""
    with self._lock:
      of_a_step = self._tasks, self._pending, self._leases, self._held, self._late
      for values in (*of_a_step, self._errors, self._lost, self._owners):
        values.clear()
      self._step, self._failure = -1, None
      self._last_progress = self._last_sign = self._clock()

  def lease(
    self, worker: str, wait: float, pairs_per_second: float = 0.0, holding: Container[int] = ()
  ) -> Lease | None:
    """Leases a task; returns None if there is none within `wait` seconds.

    Args:
      worker: its name.
      wait: seconds.
      pairs_per_second: its speed, where known.
      holding: leases that it still has.
    """
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
          return self._leased(task, worker, now, pairs_per_second)
        if now >= end:
          return None
        waiting = self._idle[worker] = threading.Condition(self._lock)
        waiting.wait(min(end - now, _LOOK))
        if self._idle.get(worker) is waiting:
          del self._idle[worker]

  def complete(self, task: Task, lease_id: int, worker: str, piece: Piece) -> bool:
    """Takes a piece; returns False if another answer came first, or the step is over."""
    with self._lock:
      self._last_sign = self._heard[worker] = now = self._clock()
      lease = self._release(lease_id) or self._late.pop(lease_id, None)
      if task not in self._tasks or self._tasks[task] is not None:
        self._totals['duplicate_answers'] += 1
        return False
      self._tasks[task] = piece
      if self._in_halves:
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

  def has(self, lease_id: int, task: Task, worker: str) -> bool:
    """Whether a worker has a task by this lease, or had it and may still answer."""
    with self._lock:
      lease = self._leases.get(lease_id) or self._late.get(lease_id)
      return lease is not None and (lease.task, lease.worker) == (task, worker)

  def drop(self, worker: str) -> None:
    """Takes all its tasks back from a worker, whose answers are of no use."""
    with self._lock:
      for lease in reversed(list(self._held.get(worker, {}).values())):
        self._take_back(lease, 'lost_leases')

  def report_error(self, task: Task, lease_id: int, message: str) -> None:
    """Records that computing `task` raised in a worker; it is tried again, or the run fails."""
    with self._lock:
      self._last_sign = self._clock()
      lease = self._leases.get(lease_id)
      if lease is None or lease.task != task:
        return
      self._release(lease_id)
      if self._tasks[task] is not None:
        return
      self._errors[task] += 1
      if self._errors[task] >= MAX_ERRORS:
        self._end_failed(
          f'{_name(task)} failed {MAX_ERRORS} times, last in worker {lease.worker}: {message}'
        )
      else:
        self._put(task)

  def take(self, task: Task, wait: float) -> Piece | None:
    """Takes the piece of a task, once; returns None if it is not there within `wait` seconds.

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
        self.pairs_taken += task.pairs
      return piece

  def silence(self) -> float:
    """Seconds since any worker called, or since the last deadline of a lease, if that is later."""
    with self._lock:
      signs = [self._last_sign, *(lease.deadline for lease in self._leases.values())]
      return max(0.0, self._clock() - max(signs))

  def stall(self) -> tuple[float, str]:
    """Seconds since the last piece came, and the pieces that are missing, in words."""
    with self._lock:
      now, missing = self._clock(), [task for task, piece in self._tasks.items() if piece is None]
      held = [
        f'{lease.task.index} with {lease.worker} for {now - lease.start:.0f} s'
        for lease in self._leases.values()
        if self._tasks[lease.task] is None
      ]
      what = 'nothing missing'
      if missing:
        phase = missing[0].phase
        number, total = (sum(t.phase == phase for t in some) for some in (missing, self._tasks))
        what = f'{number} of {total} {phase} tasks missing'
      more = ' ...' if len(held) > 4 else ''
      return now - self._last_progress, f'{what}; in work: {", ".join(held[:4]) or "none"}{more}'

  def counters(self) -> dict[str, Any]:
    """Totals since the board was made.

    Returns:
      `workers` {name: {tasks, pairs, seconds}}, and the numbers of `lost_leases`, `expired_leases`,
      `second_leases`, `duplicate_answers`; `pairs`, kernel entries that were taken.
    """
    names = 'lost_leases', 'expired_leases', 'second_leases', 'duplicate_answers'
    with self._lock:
      workers = {name: counts._asdict() for name, counts in sorted(self._workers.items())}
      totals = {name: self._totals[name] for name in names}
      return {'workers': workers, **totals, 'pairs': self.pairs_taken}

  def _arranged(self, tasks: Sequence[Task]) -> list[Task]:
    """Arranges a step's first tasks in the order in which they are leased.

    K_ss is needed first, so its tasks are the first of their workers. But they take long to send,
    with many images, so the other workers' tasks, for which these all wait, are leased before.
    """
    support = [task for task in tasks if task.phase == plan.SUPPORT_BLOCKS]
    others = [task for task in tasks if task.phase != plan.SUPPORT_BLOCKS]
    early = IN_HAND * (max(0, self._num_workers - len(support)) // 2) if support else len(others)
    late = others[early:]
    alternating = itertools.chain(*zip(support, late))
    return [*others[:early], *alternating, *support[len(late) :], *late[len(support) :]]

  def _leased(self, task: Task, worker: str, now: float, pairs_per_second: float) -> Lease:
    usual = self._usual.get(task.phase)
    if usual is None:
      usual = task.pairs / pairs_per_second if pairs_per_second else 0.0
    deadline = now + max(self._lease_seconds, _DEADLINE_FACTOR * usual)
    lease = Lease(self._next_lease, task, worker, now, deadline)
    self._next_lease += 1
    self._leases[lease.id] = self._held.setdefault(worker, {})[lease.id] = lease
    return lease

  def _next(self, worker: str, now: float) -> Task | None:
    """Finds the task to lease.

    It is one that the worker owns; else one without an owner; else, for an idle worker, one whose
    owner is slow or gone; else one that has been in work unusually long, once more.
    """
    task = self._pop(worker)
    if task is None and self._has_enough(worker):
      task = self._pop(None)
    if task is not None or worker in self._held:
      return task
    owners = [owner for owner, waiting in self._pending.items() if owner is not None and waiting]
    for owner in owners:
      if now >= self._away_at(owner) and (task := self._pop(owner)) is not None:
        return task
    if now < self._oldest() + self._patience:
      return None
    slow = [lease for lease in self._open() if now >= self._slow_at(lease)]
    if not slow:
      return None
    self._totals['second_leases'] += 1
    return min(slow, key=lambda lease: lease.start).task

  def _has_enough(self, worker: str) -> bool:
    """Whether there are enough tasks without an owner for `worker` to lease one.

    A busy worker may, if there is one for each busy worker, unless its own task is larger than the
    next one: others would do that sooner.
    """
    waiting, held = self._pending.get(None, {}), self._held.get(worker)
    if not held:
      return True
    if len(waiting) < len(self._held):
      return False
    return next(iter(held.values())).task.pairs <= next(iter(waiting)).pairs

  def _put(self, task: Task, first: bool = False) -> None:
    """Makes a task pending, `first` or last of its owner's, and wakes a worker for it."""
    owner = self._owners.get(_ranges(task))
    waiting = self._pending.setdefault(owner, {})
    if first:
      self._pending[owner] = {task: None, **waiting}
    else:
      waiting[task] = None
    self._wake(owner)

  def _wake(self, worker: str | None = None) -> None:
    """Wakes `worker`, or the first that waits."""
    name = next(iter(self._idle), None) if worker is None else worker
    waiting = self._idle.pop(name, None) if name is not None else None
    if waiting:
      waiting.notify()

  def _pop(self, owner: str | None) -> Task | None:
    """Removes the first pending task of an owner that is not done."""
    waiting = self._pending.get(owner, {})
    while waiting:
      task = next(iter(waiting))
      del waiting[task]
      if self._tasks[task] is None:
        return task
    return None

  def _away_at(self, owner: str) -> float:
    """Time from which a worker is not expected to ask for its own tasks soon."""
    held = self._held.get(owner)
    if held:
      return self._slow_at(next(iter(held.values())))
    return self._heard[owner] + _AWAY_SECONDS

  def _open(self) -> list[Lease]:
    """Leases of tasks that are not done and that only one worker has."""
    holders = collections.Counter(lease.task for lease in self._leases.values())
    return [
      lease
      for lease in self._leases.values()
      if self._tasks[lease.task] is None and holders[lease.task] == 1
    ]

  def _oldest(self) -> float:
    """Start of the oldest lease: until `_patience` has passed since, none need be looked at."""
    return next(iter(self._leases.values())).start if self._leases else math.inf

  def _slow_at(self, lease: Lease) -> float:
    """Time from which a leased task is slow."""
    usual = self._usual.get(lease.task.phase)
    return lease.start + max(self._slow_seconds, _SLOW_FACTOR * usual) if usual else lease.deadline

  def _release(self, lease_id: int) -> Lease | None:
    """Ends a lease; returns it, or None if it has ended before."""
    lease = self._leases.pop(lease_id, None)
    if lease is not None:
      held = self._held[lease.worker]
      del held[lease_id]
      if not held:
        del self._held[lease.worker]
    return lease

  def _turn_to_next(self, worker: str, now: float) -> None:
    """Begins the time of the task that the worker had ahead: it is in work from now on."""
    for lease in list(self._held.get(worker, {}).values())[:1]:
      del self._leases[lease.id]  # to the end, as they stand in order of `start`
      self._leases[lease.id] = self._held[worker][lease.id] = lease._replace(
        start=now, deadline=now + lease.deadline - lease.start
      )

  def _take_back(self, lease: Lease, why: str) -> None:
    """Ends a lease without an answer, counts it as `why`, and makes its task pending again."""
    self._release(lease.id)
    self._late[lease.id], task = lease, lease.task
    if self._tasks[task] is not None:
      return
    self._totals[why] += 1
    self._lost[task] += 1
    if self._lost[task] >= MAX_LOST:
      self._end_failed(
        f'{_name(task)} was given to workers {MAX_LOST} times, last to {lease.worker}, and never '
        'came back: computing it kills them (see their output) or takes longer than '
        'system.lease_seconds.'
      )
    elif not any(other.task == task for other in self._leases.values()):
      self._put(task, first=True)

  def _end_failed(self, message: str) -> None:
    """Makes `take` raise TaskFailed."""
    self._failure = message
    self._piece.notify_all()


def _ranges(task: Task) -> tuple[bool, Range, Range]:
  """The key that both halves of a task share."""
  return task.phase in plan.SUPPORT_PHASES, task.target_range, task.support_range


def _name(task: Task) -> str:
  return f'step {task.step}: the {task.phase} task {task.index}'
