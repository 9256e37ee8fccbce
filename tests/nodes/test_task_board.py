"""The board with a fake clock: leases, expiry, duplicates, errors, order."""

import threading
import time
from concurrent import futures

import numpy as np
import pytest

from distillation import plan
from nodes import task_board


class Clock:
  """Time that moves when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _tasks(n, step=0, phase=plan.TARGETS):
  return [plan.Task(step, phase, i, (10 * i, 10 * i + 10), (0, 4)) for i in range(n)]


def _piece(i):
  return {'x': np.array(i)}


class Board(task_board.TaskBoard):
  """A board that knows what was posted last, and what was taken of it."""

  def __init__(self, **kwargs):
    super().__init__(**{'lease_seconds': 30, **kwargs})
    self.posted, self.taken = [], {}

  def post(self, tasks):
    super().post(tasks)
    self.posted, self.taken = tasks, {}

  def leased(self, worker, wait=0.0, **kwargs) -> task_board.Lease:
    """`lease`, where there is a task."""
    lease = self.lease(worker, wait, **kwargs)
    assert lease is not None
    return lease

  def is_complete(self) -> bool:
    """Whether the pieces of all tasks posted last are there; takes those that are."""
    for task in self.posted:
      if task not in self.taken and (piece := self.take(task, 0)) is not None:
        self.taken[task] = piece
    return len(self.taken) == len(self.posted)

  def contents(self) -> list[int]:
    """The contents of the pieces of all tasks posted last, in plan order."""
    assert self.is_complete()
    return [int(self.taken[task]['x']) for task in self.posted]


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def board(clock):
  return Board(clock=clock)


@pytest.fixture
def halves(clock):
  """One for steps in two halves."""
  return Board(clock=clock, in_halves=True)


def test_pieces_come_back_in_plan_order(board):
  board.post(_tasks(4))
  leases = [board.leased(f'w{i}') for i in range(4)]
  assert [lease.task.index for lease in leases] == [0, 1, 2, 3]
  assert board.lease('idle', 0) is None
  for i in (2, 0, 3):
    assert board.complete(leases[i].task, leases[i].id, 'a', _piece(i))
  assert not board.is_complete()
  board.complete(leases[1].task, leases[1].id, 'a', _piece(1))
  assert board.contents() == [0, 1, 2, 3]


def test_an_expired_lease_is_given_out_again_and_the_first_answer_counts(board, clock):
  board.post(_tasks(1))
  slow = board.leased('slow')
  clock.now += 29.9
  assert board.lease('fast', 0) is None
  clock.now += 0.2
  fast = board.leased('fast')
  assert fast.task == slow.task and fast.id != slow.id
  assert board.complete(slow.task, slow.id, 'slow', _piece(1))
  assert not board.complete(fast.task, fast.id, 'fast', _piece(2))
  assert board.contents() == [1]
  counters = board.counters()
  assert counters['expired_leases'] == 1 and counters['duplicate_answers'] == 1
  assert counters['workers']['slow'] == {'tasks': 1, 'pairs': 40, 'seconds': pytest.approx(30.1)}
  assert counters['workers']['fast']['tasks'] == 0


def test_the_same_answer_twice_changes_nothing(board, clock):
  board.post(_tasks(2))
  lease = board.leased('a')
  clock.now += 2
  assert board.complete(lease.task, lease.id, 'a', _piece(1))
  assert not board.complete(lease.task, lease.id, 'a', _piece(9))
  assert board.counters()['workers']['a'] == {'tasks': 1, 'pairs': 40, 'seconds': 2.0}
  other = board.leased('a')
  board.complete(other.task, other.id, 'a', _piece(2))
  assert board.contents() == [1, 2]


def test_an_answer_of_an_earlier_phase_is_dropped(board):
  board.post(_tasks(1, step=0))
  old = board.leased('a')
  board.post(_tasks(1, step=1))
  assert not board.complete(old.task, old.id, 'a', _piece(7))
  new = board.leased('a')
  assert new.task.step == 1 and not board.is_complete()


def test_the_deadline_follows_the_usual_time(board, clock):
  board.post(_tasks(4))
  for _ in range(3):
    lease = board.leased('a')
    clock.now += 20
    board.complete(lease.task, lease.id, 'a', _piece(0))
  lease = board.leased('a')
  assert lease.deadline == clock.now + 100


def test_three_errors_stop_the_run_with_the_message(board):
  board.post(_tasks(2))
  for attempt in range(3):
    lease = next(
      lease for lease in iter(lambda: board.lease('w', 0), None) if lease.task.index == 0
    )
    board.report_error(lease.task, lease.id, f'ValueError: attempt {attempt}')
  with pytest.raises(
    task_board.TaskFailed,
    match=r'step 0: the targets task 0 failed 3 times, last in worker w: ValueError: attempt 2',
  ):
    board.is_complete()


def test_an_expired_lease_is_no_error(board, clock):
  board.post(_tasks(1))
  for i in range(10):
    assert board.lease(f'w{i}', 0) is not None
    clock.now += 31
  assert not board.is_complete()
  assert board.counters()['expired_leases'] == 9


def test_an_error_of_a_task_that_is_done_is_forgotten(board, clock):
  board.post(_tasks(1))
  slow = board.leased('slow')
  clock.now += 31
  fast = board.leased('fast')
  board.complete(fast.task, fast.id, 'fast', _piece(1))
  board.report_error(slow.task, slow.id, 'too late')
  assert board.is_complete()


def test_a_worker_that_asks_again_holds_nothing_any_more(board):
  """It died and was started again, or never got the answer."""
  board.post(_tasks(3))
  lost = board.leased('a')
  again = board.leased('a')
  assert again.task == lost.task and again.id != lost.id
  # A duplicated request: the first lease's answer is as good.
  assert board.complete(lost.task, lost.id, 'a', _piece(1))
  assert board.leased('b').task.index == 1
  assert board.counters()['lost_leases'] == 1 and board.counters()['expired_leases'] == 0


def test_an_idle_worker_takes_over_from_a_slow_one(board, clock):
  board.post(_tasks(4))
  for _ in range(3):
    lease = board.leased('fast')
    clock.now += 4
    board.complete(lease.task, lease.id, 'fast', _piece(lease.task.index))
  slow = board.leased('slow')
  clock.now += 7.9
  assert board.lease('fast', 0) is None
  clock.now += 0.2
  second = board.leased('fast')
  assert second.task == slow.task
  assert board.lease('third', 0) is None  # two at a task are enough
  assert board.complete(second.task, second.id, 'fast', _piece(3))
  assert not board.complete(slow.task, slow.id, 'slow', _piece(9))
  assert board.contents() == [0, 1, 2, 3]
  assert board.counters()['second_leases'] == 1 and board.counters()['duplicate_answers'] == 1


def test_short_tasks_are_not_taken_over_for_a_hiccup(board, clock):
  board.post(_tasks(2))
  lease = board.leased('a')
  clock.now += 0.01
  board.complete(lease.task, lease.id, 'a', _piece(0))
  board.leased('a')
  clock.now += 0.9
  assert board.lease('b', 0) is None
  clock.now += 0.2
  assert board.leased('b').task.index == 1


def test_without_history_nobody_is_slow(board, clock):
  board.post(_tasks(1))
  board.leased('a')
  clock.now += 29
  assert board.lease('b', 0) is None


def test_the_deadline_follows_the_measured_speed_before_there_is_history(board, clock):
  board.post(_tasks(1))  # 40 pairs
  assert board.leased('a', pairs_per_second=0.5).deadline == clock.now + 5 * 80


def test_a_task_that_kills_every_worker_stops_the_run(board):
  board.post(_tasks(2))
  for _ in range(task_board.MAX_LOST):
    assert not board.is_complete()
    assert board.leased('a').task.index == 0
  board.leased('a')
  with pytest.raises(
    task_board.TaskFailed,
    match='step 0: the targets task 0 was given to workers 20 times, last to a, and never',
  ):
    board.is_complete()


def test_silence_counts_from_the_last_word_or_the_last_deadline(board, clock):
  board.post(_tasks(2))
  clock.now += 5
  assert board.silence() == 5
  lease = board.leased('a')
  clock.now += 29
  assert board.silence() == 0
  clock.now += 11
  assert board.silence() == 10
  board.complete(lease.task, lease.id, 'a', _piece(0))
  assert board.silence() == 0


def test_a_stall_names_what_is_missing(board, clock):
  board.post(_tasks(3))
  lease = board.leased('a')
  board.complete(lease.task, lease.id, 'a', _piece(0))
  board.leased('b')
  clock.now += 12
  assert board.stall() == (12, '2 of 3 targets tasks missing; in work: 1 with b for 12 s')


def test_a_waiting_worker_takes_over_as_soon_as_a_task_is_slow():
  board = Board(slow_seconds=0.05)
  board.post(_tasks(2))
  first = board.leased('a')
  board.complete(first.task, first.id, 'a', _piece(0))
  board.leased('a')
  assert board.leased('b', 20).task.index == 1


def test_a_waiting_worker_wakes_when_work_arrives():
  board = Board()
  got = []
  thread = threading.Thread(target=lambda: got.append(board.leased('a', 20)))
  thread.start()
  board.post(_tasks(1))
  thread.join(10)
  assert got[0].task.index == 0


@pytest.mark.parametrize('names', ['abcde', 'aabcd'])
def test_each_task_wakes_a_worker(names):
  """With the second names, the first call was lost on its way and made again."""
  board, num_workers = Board(), len(set(names))
  with futures.ThreadPoolExecutor(len(names)) as workers:
    waiting = [workers.submit(board.lease, name, 3) for name in names]
    time.sleep(0.5)  # until they wait
    start = time.monotonic()
    board.post(_tasks(num_workers))
    leases = [
      future.result() for _, future in zip(range(num_workers), futures.as_completed(waiting))
    ]
    assert time.monotonic() - start < 2  # long before their calls are over
  assert {lease.worker for lease in leases if lease} == set(names)
  assert {lease.task.index for lease in leases if lease} == set(range(num_workers))


def _done(board, clock, worker):
  lease = board.leased(worker)
  clock.now += 0.1
  board.complete(lease.task, lease.id, worker, _piece(0))
  return lease.task.index


def test_second_halves_go_to_those_who_did_the_first_and_before_others(halves, clock):
  halves.post(_tasks(6, phase=plan.TARGET_BLOCKS))
  assert [_done(halves, clock, worker) for worker in 'abab'] == [0, 1, 2, 3]
  halves.post(_tasks(4, phase=plan.TARGET_VJP))
  assert [_done(halves, clock, worker) for worker in 'bbaa'] == [1, 3, 0, 2]
  assert [_done(halves, clock, worker) for worker in 'ba'] == [4, 5]
  halves.post(_tasks(2, step=1, phase=plan.TARGET_BLOCKS))
  assert [_done(halves, clock, worker) for worker in 'ba'] == [0, 1]


def test_others_do_the_second_halves_of_a_worker_that_is_slow_or_gone(halves, clock):
  halves.post(_tasks(3, phase=plan.TARGET_BLOCKS))
  assert [_done(halves, clock, 'a') for _ in range(3)] == [0, 1, 2]
  halves.post(_tasks(3, phase=plan.TARGET_VJP))
  assert halves.lease('b', 0) is None and _done(halves, clock, 'a') == 0
  clock.now += 1.1
  assert _done(halves, clock, 'b') == 1  # nothing was heard of a
  assert halves.leased('a').task.index == 2


def test_a_worker_that_waits_gets_what_another_leaves():
  board = Board(in_halves=True)
  board.post(_tasks(1, phase=plan.TARGET_BLOCKS))
  first = board.leased('a')
  board.complete(first.task, first.id, 'a', _piece(0))
  board.post(_tasks(1, phase=plan.TARGET_VJP))
  assert board.leased('b', 20).task.phase == plan.TARGET_VJP


def test_who_holds_a_task_gets_another_ahead_while_there_is_one_for_everybody(board):
  board.post(_tasks(5))
  a, b = board.leased('a'), board.leased('b')
  ahead = board.leased('a', holding=[a.id])
  assert ahead.task.index == 2
  assert board.leased('b', holding=[b.id]).task.index == 3
  # The last one is for a worker that has nothing to do.
  assert board.lease('a', 0, holding=[a.id, ahead.id]) is None
  assert board.leased('c').task.index == 4
  assert board.counters()['lost_leases'] == 0


def test_who_may_not_have_a_task_ahead_may_wait_for_one():
  """As a call does that got through twice."""
  board = Board()
  board.post(_tasks(3))
  a, _ = board.leased('a'), board.leased('b')
  assert board.lease('a', 0.05, holding=[a.id]) is None
  assert board.leased('c').task.index == 2


def test_a_second_half_is_ahead_of_its_owner_alone(halves, clock):
  halves.post(_tasks(3, phase=plan.TARGET_BLOCKS))
  assert [_done(halves, clock, worker) for worker in 'aab'] == [0, 1, 2]
  halves.post(_tasks(3, phase=plan.TARGET_VJP))
  a = halves.leased('a')
  assert halves.leased('a', holding=[a.id]).task.index == 1
  b = halves.leased('b')
  assert (
    b.task.index == 2
    and halves.lease('b', 0, holding=[b.id]) is None
    and halves.lease('c', 0) is None
  )


def test_a_task_ahead_that_a_worker_says_nothing_of_is_given_to_others(board):
  board.post(_tasks(3))
  a = board.leased('a')
  ahead = board.leased('a', holding=[a.id])
  assert board.leased('a', holding=[a.id]).task == ahead.task  # it never got the answer
  assert board.leased('a').task == a.task  # it was started again
  assert board.leased('b').task == ahead.task
  assert board.counters()['lost_leases'] == 3


def test_a_task_ahead_is_in_work_when_the_one_before_is_done(board, clock):
  board.post(_tasks(3))
  a = board.leased('a')
  ahead = board.leased('a', holding=[a.id])
  clock.now += 4
  board.complete(a.task, a.id, 'a', _piece(0))
  clock.now += 29
  assert board.leased('b').task.index == 2
  assert board.leased('c').task == ahead.task  # slow: twice the usual four seconds are over
  clock.now += 2
  board.complete(ahead.task, ahead.id, 'a', _piece(1))
  assert board.counters()['workers']['a']['seconds'] == 4 + 31


@pytest.mark.parametrize(
  'num_support, num_workers, first',
  [
    (2, 2, 'SbSb'),  # every worker begins with K_ss, then goes on
    (1, 7, 'bbbbbbSb'),  # three workers of seven, with two tasks each, have images before K_ss
    (8, 3, 'SbSb'),
  ],
)
def test_tasks_of_k_ss_go_out_among_those_of_targets(clock, num_support, num_workers, first):
  board = Board(clock=clock, num_workers=num_workers, in_halves=True)
  board.post(
    [*_tasks(num_support, phase=plan.SUPPORT_BLOCKS), *_tasks(9, phase=plan.TARGET_BLOCKS)]
  )
  phases = [board.leased(f'w{i}').task.phase for i in range(len(first))]
  assert ''.join('S' if phase == plan.SUPPORT_BLOCKS else 'b' for phase in phases) == first
