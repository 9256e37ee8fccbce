"""The coordinator's side of a step: what is sent with tasks, and waiting for pieces."""

import numpy as np
import pytest

from distillation import pieces, plan
from nodes import messages
from nodes.errors import Stopped
from nodes.exchange import Served
from nodes.messages import Life
from nodes.task_board import TaskBoard

LIFE = Life('run', 1)


FORMS = {'x': pieces.Form(np.dtype(np.int64), (30,))}
PIECE = {'x': np.arange(30)}


def _served(in_halves=True, watch=lambda waited: None):
  board = TaskBoard(30, 1, in_halves)
  dtype = np.dtype('float32')
  return board, Served(board, LIFE, dtype, in_halves, lambda task: FORMS, watch, 0.01, 100)


def _leased(phase=plan.TARGETS):
  """An exchange, and a task with its lease by worker 'w'."""
  board, served = _served()
  served.publish('images', np.zeros((4, 1, 1, 1)))
  [task] = _tasks(phase, ((0, 1), (0, 4)))
  served.post([task])
  [(_, lease, _)] = _answer(served)['tasks']
  return board, served, task, lease


def _send(served, task, lease, parts, order=None, checksum=b'', worker='w', life=LIFE):
  """What `receive` returns for each part; `parts` are (content, count)."""
  return [
    served.receive(worker, life, task, lease, i, len(parts), parts[i], checksum)
    for i in order or range(len(parts))
  ]


def _answer(served, worker='w'):
  answer = served.lease(worker, 1.0, [], 0.0)
  assert answer is not None
  return answer


def _attached(answer):
  """The arrays sent with each task of an answer, by name."""
  return [
    {name: value for i in places for name, value in messages.unpack(answer['inputs'][i]).items()}
    for _, _, places in answer['tasks']
  ]


def _tasks(phase, *ranges):
  return [plan.Task(0, phase, i, *places) for i, places in enumerate(ranges)]


def test_rows_are_packed_once_for_all_workers():
  images = np.arange(6.0).reshape(6, 1, 1, 1)
  _, served = _served()
  served.publish('images', images)
  served.post(
    _tasks(plan.TARGET_BLOCKS, *(((i, i + 1), rows) for i in range(3) for rows in ((0, 3), (3, 6))))
  )
  first, second = _answer(served, 'a'), _answer(served, 'b')
  expected = [images[:3].tolist(), images[3:].tolist()]
  for answer in (first, second):
    assert [found['images'].tolist() for found in _attached(answer)] == expected
  for a, b in zip(first['inputs'], second['inputs']):
    assert a is b


def test_an_array_that_both_tasks_need_is_sent_once():
  _, served = _served()
  served.publish('images', np.zeros((4, 1, 1, 1)))
  served.post(_tasks(plan.TARGET_BLOCKS, ((0, 1), (0, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 4))))
  answer = _answer(served)
  assert [places for _, _, places in answer['tasks']] == [[0], [0]]
  assert len(answer['inputs']) == 1


@pytest.mark.parametrize('in_halves', [True, False])
def test_a_task_of_k_ss_brings_its_part_of_the_cotangent(in_halves):
  """In the kernel's dtype, and nothing else."""
  cotangent = np.arange(36.0).reshape(6, 6) / 7
  _, served = _served(in_halves)
  served.publish('images', np.zeros((6, 1, 1, 1)))
  served.publish('cotangent', cotangent)
  served.post(_tasks(plan.SUPPORT_VJP, ((4, 6), (0, 4))))
  [found] = _attached(_answer(served))
  assert list(found) == ['cotangent'] and found['cotangent'].dtype == np.float32
  assert found['cotangent'].tolist() == cotangent[:4, 4:].astype(np.float32).tolist()


def test_in_one_pass_images_are_fetched():
  _, served = _served(in_halves=False)
  served.publish('images', np.arange(6.0))
  served.post(_tasks(plan.SUPPORT_BLOCKS, ((0, 4), (0, 4))))
  assert _attached(_answer(served)) == [{}]
  packed = served.fetch(LIFE, 0, 'images', 1, 3)
  assert packed is not None and messages.unpack(packed)['images'].tolist() == [1, 2]


def test_a_new_step_drops_what_is_left_of_another():
  _, served, task, lease = _leased()
  parts, checksum = messages.encode(PIECE, 100)
  assert _send(served, task, lease, parts, [0], checksum) == [None]
  served.publish('images', np.ones((4, 1, 1, 1)))
  assert served.fetch(LIFE, 0, 'images', 0, 4) is None
  assert _send(served, task, lease, parts, [1, 2, 3], checksum) == [None] * 3


def test_parts_may_arrive_twice_and_in_any_order():
  _, served, task, lease = _leased()
  parts, checksum = messages.encode(PIECE, 100)
  assert len(parts) == 4
  *before, piece, after = _send(served, task, lease, parts, [1, 1, 2, 1, 3, 0, 0], checksum)
  assert not any(before) and after is None
  assert piece is not None and piece['x'].tolist() == list(range(30))


@pytest.mark.parametrize('other', ['worker', 'lease', 'task'])
def test_nobody_answers_by_a_lease_that_is_not_theirs(other):
  """Nothing is kept, and the lease stays good."""
  board, served, task, lease = _leased()
  parts, checksum = messages.encode(PIECE, 100)
  wrong = {
    'worker': (task, lease, 'v'),
    'lease': (task, lease + 1, 'w'),
    'task': (task._replace(support_range=(0, 10**9)), lease, 'w'),
  }[other]
  found = _send(served, *wrong[:2], parts, checksum=checksum, worker=wrong[2])
  assert found == [None] * len(parts)
  board.report_error(*wrong[:2], 'of no weight') if other != 'worker' else None
  assert _send(served, task, lease, parts, checksum=checksum)[-1] is not None


@pytest.mark.parametrize(
  'part, parts, data, error',
  [
    (0, 4, bytes(99), messages.Malformed),
    (0, 4, bytes(10**6), messages.Malformed),
    (3, 4, bytes(100), messages.Malformed),
    (4, 4, bytes(100), messages.Malformed),
    (-1, 4, bytes(100), messages.Malformed),
    (0, 3, bytes(100), messages.Malformed),
    (0, 10**9, bytes(100), messages.Malformed),
    (0, 0, bytes(100), messages.Malformed),
    (0, 4, 'x' * 100, messages.Malformed),
    (None, 4, bytes(100), TypeError),
    ([], 4, bytes(100), TypeError),
    (0, 4, None, (TypeError, messages.Malformed)),
  ],
)
def test_parts_that_no_piece_has_are_errors_of_the_caller(part, parts, data, error):
  _, served, task, lease = _leased()
  with pytest.raises(error):
    served.receive('w', LIFE, task, lease, part, parts, data, b'')
  good, checksum = messages.encode(PIECE, 100)
  assert _send(served, task, lease, good, checksum=checksum)[-1] is not None


@pytest.mark.parametrize(
  'name, start, stop, error',
  [
    ('images', 0, 7, messages.Malformed),
    ('images', -1, 6, messages.Malformed),
    ('images', 3, 3, messages.Malformed),
    ('images', '0', 6, TypeError),
    ('residual', 0, 6, messages.Malformed),  # its rows come one after the other
    ('cotangent', 0, 6, messages.Malformed),
    ('alpha', 0, 6, messages.Malformed),  # not yet published
    ('_lock', 0, 6, messages.Malformed),
  ],
)
def test_what_is_not_there_to_fetch_is_an_error_of_the_caller(name, start, stop, error):
  _, served = _served()
  for published in ('images', 'residual', 'cotangent'):
    served.publish(published, np.zeros((6, 6)))
  served.post(_tasks(plan.TARGETS, ((0, 1), (0, 4))))
  with pytest.raises(error):
    served.fetch(LIFE, 0, name, start, stop)
  assert served.fetch(LIFE, 0, 'images', 0, 6) is not None


def test_rows_that_nobody_needs_are_not_kept():
  """Whatever is asked for, the memory does not grow beyond two cuts of the array."""
  _, served = _served()
  images = np.zeros((64, 1, 16, 16))
  served.publish('images', images)
  served.post(_tasks(plan.TARGETS, ((0, 1), (0, 4))))
  kept = {}
  for start in range(64):
    for stop in range(start + 1, 65):
      first = served.fetch(LIFE, 0, 'images', start, stop) or b''
      if first is served.fetch(LIFE, 0, 'images', start, stop):
        kept[start, stop] = len(first)
  assert sum(kept.values()) <= 2 * (images.nbytes + 128 * 64) and len(kept) > 1


def test_waiting_ends_with_the_piece_or_with_what_watch_raises():
  [task] = _tasks(plan.TARGETS, ((0, 1), (0, 4)))
  waits = []

  def watch(waited):
    waits.append(waited)
    if len(waits) == 3:
      board.complete(task, 0, 'w', {'x': np.ones(1)})
    if len(waits) == 5:
      raise Stopped()

  board, served = _served(in_halves=False, watch=watch)
  served.publish('images', np.zeros(4))
  served.post([task])
  assert served.take(task)['x'].tolist() == [1]
  assert waits == [False, True, True]
  other = task._replace(index=1, target_range=(1, 2))
  served.post([other])
  with pytest.raises(Stopped):
    served.take(other)
