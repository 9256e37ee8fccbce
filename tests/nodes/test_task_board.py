"""The board with a fake clock: leases, expiry, duplicates, errors, order."""

import threading
import time
from concurrent import futures

import numpy as np
import pytest

from nodes import task_board, tasks


class Clock:
  """Time that moves when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _tasks(n, step=0, phase=tasks.TARGETS):
  return [tasks.Task('run', 1, step, phase, i, (10 * i, 10 * i + 10), (0, 4)) for i in range(n)]


def _piece(i):
  return {'x': np.array(i)}


def _collect(board):
  """The pieces of all tasks in plan order, or None if one is missing. Raises TaskFailed."""
  if board._missing:
    return board.take(next(task for task, piece in board._tasks.items() if piece is None), 0)
  return [board.take(task, 0) for task in board._tasks]


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def board(clock):
  return task_board.TaskBoard(lease_seconds=30, clock=clock)


def test_pieces_come_back_in_plan_order(board):
  board.post(_tasks(4))
  leases = [board.lease(f'w{i}', 0) for i in range(4)]
  assert [lease.task.index for lease in leases] == [0, 1, 2, 3]
  assert board.lease('idle', 0) is None
  for i in (2, 0, 3):
    assert board.complete(leases[i].task, leases[i].id, 'a', _piece(i))
  assert _collect(board) is None
  board.complete(leases[1].task, leases[1].id, 'a', _piece(1))
  assert [int(piece['x']) for piece in _collect(board)] == [0, 1, 2, 3]


def test_an_expired_lease_is_given_out_again_and_the_first_answer_counts(board, clock):
  board.post(_tasks(1))
  slow = board.lease('slow', 0)
  clock.now += 29.9
  assert board.lease('fast', 0) is None
  clock.now += 0.2
  fast = board.lease('fast', 0)
  assert fast.task == slow.task and fast.id != slow.id
  assert board.complete(slow.task, slow.id, 'slow', _piece(1))
  assert not board.complete(fast.task, fast.id, 'fast', _piece(2))
  assert int(_collect(board)[0]['x']) == 1
  counters = board.counters()
  assert counters['expired_leases'] == 1 and counters['duplicate_answers'] == 1
  assert counters['workers']['slow'] == {'tasks': 1, 'pairs': 40, 'seconds': pytest.approx(30.1)}
  assert counters['workers']['fast']['tasks'] == 0


def test_the_same_answer_twice_changes_nothing(board, clock):
  board.post(_tasks(2))
  lease = board.lease('a', 0)
  clock.now += 2
  assert board.complete(lease.task, lease.id, 'a', _piece(1))
  assert not board.complete(lease.task, lease.id, 'a', _piece(9))
  assert board.counters()['workers']['a'] == {'tasks': 1, 'pairs': 40, 'seconds': 2.0}
  other = board.lease('a', 0)
  board.complete(other.task, other.id, 'a', _piece(2))
  assert [int(piece['x']) for piece in _collect(board)] == [1, 2]


def test_an_answer_of_an_earlier_phase_is_dropped(board):
  board.post(_tasks(1, step=0))
  old = board.lease('a', 0)
  board.post(_tasks(1, step=1))
  assert not board.complete(old.task, old.id, 'a', _piece(7))
  new = board.lease('a', 0)
  assert new.task.step == 1 and _collect(board) is None


def test_the_deadline_follows_the_usual_time(board, clock):
  board.post(_tasks(4))
  for _ in range(3):
    lease = board.lease('a', 0)
    clock.now += 20
    board.complete(lease.task, lease.id, 'a', _piece(0))
  lease = board.lease('a', 0)
  assert lease.deadline == clock.now + 100


def test_three_errors_stop_the_run_with_the_message(board):
  board.post(_tasks(2))
  for attempt in range(3):
    lease = next(
      lease for lease in iter(lambda: board.lease('w', 0), None) if lease.task.index == 0
    )
    board.fail(lease.task, lease.id, f'ValueError: attempt {attempt}')
  with pytest.raises(
    task_board.TaskFailed,
    match=r'step 0: the targets task 0 failed 3 times, last in worker w: ValueError: attempt 2',
  ):
    _collect(board)


def test_an_expired_lease_is_no_error(board, clock):
  board.post(_tasks(1))
  for i in range(10):
    assert board.lease(f'w{i}', 0) is not None
    clock.now += 31
  assert _collect(board) is None
  assert board.counters()['expired_leases'] == 9


def test_an_error_of_a_task_that_is_done_is_forgotten(board, clock):
  board.post(_tasks(1))
  slow = board.lease('slow', 0)
  clock.now += 31
  fast = board.lease('fast', 0)
  board.complete(fast.task, fast.id, 'fast', _piece(1))
  board.fail(slow.task, slow.id, 'too late')
  assert len(_collect(board)) == 1


def test_a_worker_that_asks_again_holds_nothing_any_more(board):
  """It died and was started again, or never got the answer."""
  board.post(_tasks(3))
  lost = board.lease('a', 0)
  again = board.lease('a', 0)
  assert again.task == lost.task and again.id != lost.id
  # A duplicated request: the first lease's answer is as good.
  assert board.complete(lost.task, lost.id, 'a', _piece(1))
  assert board.lease('b', 0).task.index == 1
  assert board.counters()['lost_leases'] == 1 and board.counters()['expired_leases'] == 0


def test_an_idle_worker_takes_over_from_a_slow_one(board, clock):
  board.post(_tasks(4))
  for _ in range(3):
    lease = board.lease('fast', 0)
    clock.now += 4
    board.complete(lease.task, lease.id, 'fast', _piece(lease.task.index))
  slow = board.lease('slow', 0)
  clock.now += 7.9
  assert board.lease('fast', 0) is None
  clock.now += 0.2
  second = board.lease('fast', 0)
  assert second.task == slow.task
  assert board.lease('third', 0) is None  # two at a task are enough
  assert board.complete(second.task, second.id, 'fast', _piece(3))
  assert not board.complete(slow.task, slow.id, 'slow', _piece(9))
  assert [int(piece['x']) for piece in _collect(board)] == [0, 1, 2, 3]
  assert board.counters()['second_leases'] == 1 and board.counters()['duplicate_answers'] == 1


def test_short_tasks_are_not_taken_over_for_a_hiccup(board, clock):
  board.post(_tasks(2))
  lease = board.lease('a', 0)
  clock.now += 0.01
  board.complete(lease.task, lease.id, 'a', _piece(0))
  board.lease('a', 0)
  clock.now += 0.9
  assert board.lease('b', 0) is None
  clock.now += 0.2
  assert board.lease('b', 0).task.index == 1


def test_without_history_nobody_is_slow(board, clock):
  board.post(_tasks(1))
  board.lease('a', 0)
  clock.now += 29
  assert board.lease('b', 0) is None


def test_the_deadline_follows_the_measured_speed_before_there_is_history(board, clock):
  board.post(_tasks(1))  # 40 pairs
  assert board.lease('a', 0, pairs_per_second=0.5).deadline == clock.now + 5 * 80


def test_a_task_that_kills_every_worker_stops_the_run(board):
  board.post(_tasks(2))
  for _ in range(task_board.MAX_LOST):
    assert _collect(board) is None
    assert board.lease('a', 0).task.index == 0
  board.lease('a', 0)
  with pytest.raises(
    task_board.TaskFailed,
    match='step 0: the targets task 0 was given to workers 20 times, last to a, and never',
  ):
    _collect(board)


def test_silence_counts_from_the_last_word_or_the_last_deadline(board, clock):
  board.post(_tasks(2))
  clock.now += 5
  assert board.silence() == 5
  lease = board.lease('a', 0)
  clock.now += 29
  assert board.silence() == 0
  clock.now += 11
  assert board.silence() == 10
  board.complete(lease.task, lease.id, 'a', _piece(0))
  assert board.silence() == 0


def test_a_stall_names_what_is_missing(board, clock):
  board.post(_tasks(3))
  lease = board.lease('a', 0)
  board.complete(lease.task, lease.id, 'a', _piece(0))
  board.lease('b', 0)
  clock.now += 12
  assert board.stall() == (12, '2 of 3 targets tasks missing; in work: 1 with b for 12 s')


def test_a_waiting_worker_takes_over_as_soon_as_a_task_is_slow(monkeypatch):
  monkeypatch.setattr(task_board, '_SLOW_SECONDS', 0.05)
  board = task_board.TaskBoard(lease_seconds=30)
  board.post(_tasks(2))
  first = board.lease('a', 0)
  board.complete(first.task, first.id, 'a', _piece(0))
  board.lease('a', 0)
  assert board.lease('b', 20).task.index == 1


def test_a_waiting_worker_wakes_when_work_arrives():
  board = task_board.TaskBoard(lease_seconds=30)
  got = []
  thread = threading.Thread(target=lambda: got.append(board.lease('a', 20)))
  thread.start()
  board.post(_tasks(1))
  thread.join(10)
  assert got[0].task.index == 0


@pytest.mark.parametrize('names', ['abcde', 'aabcd'])
def test_each_task_wakes_a_worker(names):
  """With the second names, the first call was lost on its way and made again."""
  board, num_workers = task_board.TaskBoard(lease_seconds=30), len(set(names))
  with futures.ThreadPoolExecutor(len(names)) as workers:
    waiting = [workers.submit(board.lease, name, 3) for name in names]
    while len(board._idle) < num_workers:
      time.sleep(0.01)
    start = time.monotonic()
    board.post(_tasks(num_workers))
    leases = [
      future.result() for _, future in zip(range(num_workers), futures.as_completed(waiting))
    ]
    assert time.monotonic() - start < 2  # long before their calls are over
  assert {lease.worker for lease in leases} == set(names) and {
    lease.task.index for lease in leases
  } == set(range(num_workers))


def _done(board, worker):
  lease = board.lease(worker, 0)
  board._clock.now += 0.1
  board.complete(lease.task, lease.id, worker, _piece(0))
  return lease.task.index


def test_second_halves_go_to_those_who_did_the_first_and_before_others(board):
  board.post(_tasks(6, phase=tasks.TARGET_BLOCKS))
  assert [_done(board, worker) for worker in 'abab'] == [0, 1, 2, 3]
  board.extend(_tasks(4, phase=tasks.TARGET_VJP), first=True)
  assert [_done(board, worker) for worker in 'bbaa'] == [1, 3, 0, 2]
  assert [_done(board, worker) for worker in 'ba'] == [4, 5]
  board.post(_tasks(2, step=1, phase=tasks.TARGET_BLOCKS))
  assert [_done(board, worker) for worker in 'ba'] == [0, 1]


def test_others_do_the_second_halves_of_a_worker_that_is_slow_or_gone(board, clock):
  board.post(_tasks(3, phase=tasks.TARGET_BLOCKS))
  assert [_done(board, 'a') for _ in range(3)] == [0, 1, 2]
  board.extend(_tasks(3, phase=tasks.TARGET_VJP), first=True)
  assert board.lease('b', 0) is None and _done(board, 'a') == 0
  clock.now += 1.1
  assert _done(board, 'b') == 1  # nothing was heard of a
  assert board.lease('a', 0).task.index == 2


def test_a_worker_that_waits_gets_what_another_leaves():
  board = task_board.TaskBoard(lease_seconds=30)
  board.post(_tasks(1, phase=tasks.TARGET_BLOCKS))
  first = board.lease('a', 0)
  board.complete(first.task, first.id, 'a', _piece(0))
  board.extend(_tasks(1, phase=tasks.TARGET_VJP))
  assert board.lease('b', 20).task.phase == tasks.TARGET_VJP


def test_who_holds_a_task_gets_another_ahead_while_there_is_one_for_everybody(board):
  board.post(_tasks(5))
  a, b = board.lease('a', 0), board.lease('b', 0)
  ahead = board.lease('a', 0, holding=[a.id])
  assert ahead.task.index == 2
  assert board.lease('b', 0, holding=[b.id]).task.index == 3
  # The last one is for who has nothing to do.
  assert board.lease('a', 0, holding=[a.id, ahead.id]) is None
  assert board.lease('c', 0).task.index == 4
  assert board.counters()['lost_leases'] == 0


def test_who_may_not_have_a_task_ahead_may_wait_for_one():
  """As a call does that got through twice."""
  board = task_board.TaskBoard(lease_seconds=30)
  board.post(_tasks(3))
  a, _ = board.lease('a', 0), board.lease('b', 0)
  assert board.lease('a', 0.05, holding=[a.id]) is None
  assert board.lease('c', 0).task.index == 2


def test_a_second_half_is_ahead_of_its_owner_alone(board):
  board.post(_tasks(3, phase=tasks.TARGET_BLOCKS))
  assert [_done(board, worker) for worker in 'aab'] == [0, 1, 2]
  board.extend(_tasks(3, phase=tasks.TARGET_VJP), first=True)
  a = board.lease('a', 0)
  assert board.lease('a', 0, holding=[a.id]).task.index == 1
  b = board.lease('b', 0)
  assert (
    b.task.index == 2
    and board.lease('b', 0, holding=[b.id]) is None
    and board.lease('c', 0) is None
  )


def test_a_task_ahead_that_a_worker_says_nothing_of_is_given_to_others(board):
  board.post(_tasks(3))
  a = board.lease('a', 0)
  ahead = board.lease('a', 0, holding=[a.id])
  assert board.lease('a', 0, holding=[a.id]).task == ahead.task  # it never got the answer
  assert board.lease('a', 0).task == a.task  # it was started again
  assert board.lease('b', 0).task == ahead.task
  assert board.counters()['lost_leases'] == 3


def test_a_task_ahead_is_in_work_when_the_one_before_is_done(board, clock):
  board.post(_tasks(3))
  a = board.lease('a', 0)
  ahead = board.lease('a', 0, holding=[a.id])
  clock.now += 4
  board.complete(a.task, a.id, 'a', _piece(0))
  clock.now += 29
  assert board.lease('b', 0).task.index == 2
  assert board.lease('c', 0).task == ahead.task  # slow: twice the usual four seconds are over
  clock.now += 2
  board.complete(ahead.task, ahead.id, 'a', _piece(1))
  assert board.counters()['workers']['a']['seconds'] == 4 + 31


@pytest.mark.parametrize(
  'num_support, num_targets, tile, group, part',
  [(1, 1, 1, 1, 1), (7, 33, 3, 10, 5), (10, 100, 50, 7, 10), (12, 5, 4, 9, 7)],
)
def test_the_plan_covers_every_pair_once(num_support, num_targets, tile, group, part):
  def covered(phase, columns):
    count = np.zeros((num_support, columns), int)
    for (t0, t1), (s0, s1) in tasks.plan(phase, num_support, (0, num_targets), tile, group, part):
      count[s0:s1, t0:t1] += 1
    return count

  for phase in (tasks.TARGETS, tasks.TARGET_BLOCKS, tasks.TARGET_VJP):
    assert (covered(phase, num_targets) == 1).all()
  for part in (part, 0):
    assert (covered(tasks.SUPPORT_VJP, num_support) == 1).all()
  upper = covered(tasks.SUPPORT_BLOCKS, num_support)
  assert (np.maximum(upper, upper.T) == 1).all()


@pytest.mark.parametrize('size', [1, 1000, 2 * tasks.PART_BYTES // 8 + 5])
def test_pieces_survive_the_wire(size):
  piece = {
    'gradient': np.arange(size, dtype=np.float32),
    'alpha_bar': np.random.default_rng(0).normal(size=size),
    'loss': np.float64(0.1),
  }
  parts, checksum = tasks.encode(piece)
  assert all(len(part) <= tasks.PART_BYTES for part in parts)
  back = tasks.decode(parts, checksum)
  assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in piece.items()}
  assert back['gradient'].dtype == np.float32
  with pytest.raises(ValueError, match='checksum'):
    tasks.decode([b'\0' + parts[0][1:], *parts[1:]], checksum)
