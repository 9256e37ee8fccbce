"""The coordinator's side of a step: what is sent with tasks, and waiting for pieces."""

import numpy as np
import pytest

from distillation import plan
from nodes import messages
from nodes.errors import Stopped
from nodes.exchange import Served
from nodes.messages import Life
from nodes.task_board import TaskBoard

LIFE = Life('run', 1)


def _served(in_halves=True, watch=lambda waited: None):
  board = TaskBoard(30, 1, in_halves)
  return board, Served(board, LIFE, np.dtype('float32'), in_halves, watch, 0.01)


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
  _, served = _served()
  served.publish('images', np.zeros((4, 1, 1, 1)))
  [task] = _tasks(plan.TARGET_BLOCKS, ((0, 1), (0, 4)))
  served.post([task])
  [(_, lease, _)] = _answer(served)['tasks']
  assert served.receive(LIFE, task, lease, 0, 2, b'a') is None
  served.publish('images', np.ones((4, 1, 1, 1)))
  assert served.fetch(LIFE, 0, 'images', 0, 4) is None
  assert served.receive(LIFE, task, lease, 1, 2, b'b') is None


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
