"""What a worker's threads share."""

import threading
import types
from concurrent import futures

import numpy as np

from kernels import contract
from nodes import kernel_worker, tasks

S, T, H, W, D, C = 2, 3, 4, 4, 1, 2


class _Kernel:
  """One whose blocks are of ones, and keeps as much as is asked."""

  dtype, kept_bytes = np.dtype('float32'), 10**9

  def linearise(self, x1, x2):
    return contract.Linearised(
      np.ones((S, T)), lambda cotangent: np.full((S, H, W, D), cotangent.sum()), 8
    )


def _task(step, phase, generation=1):
  return tasks.Task('run', generation, step, phase, 0, (0, T), (0, S))


class _Meeting(int):
  """A number that, when it is compared, lets another thread go first, for as long as that one may
  need."""

  def __new__(cls, value, reached, over):
    number = super().__new__(cls, value)
    number.reached, number.over = reached, over
    return number

  def __eq__(self, other):
    self.reached.set()
    self.over.wait(0.5)
    return int(self) == other

  __hash__ = int.__hash__


def test_one_thread_forgets_while_another_uses():
  """The thread that fetches a task's inputs drops what is of other steps, while the kernel's is
  busy with it."""
  worker = kernel_worker.KernelWorker(None, 'w', 1, '', threading.Event())
  worker._kernel, worker._augment = _Kernel(), False
  worker._run = {'plan': {'target_tile': T}, 'seed': 0, 'targets_per_step': T}
  worker._prepared = types.SimpleNamespace(train_labels=np.arange(T) % C, num_classes=C)
  worker._train = np.zeros((T, H, W, D), np.float32)
  support = contract.Prepared(np.zeros((S, H, W, D), np.float32), [], None)
  targets = kernel_worker._Targets(support, np.zeros((T, C)))
  inputs = {'alpha': np.ones((S, C)), 'residual': np.ones((T, C))}
  reached, over = threading.Event(), threading.Event()

  block = worker._first_half(_task(1, tasks.TARGET_BLOCKS), support, targets)
  next_task = _task(2, tasks.TARGET_BLOCKS, _Meeting(1, reached, over))
  with futures.ThreadPoolExecutor(1) as ahead:
    forgetting = ahead.submit(worker._forget_others, next_task)
    assert reached.wait(60)
    gradient = worker._second_half(_task(1, tasks.TARGET_VJP), support, inputs)
    over.set()
    forgetting.result(60)
  assert block.shape == (S, T)
  assert gradient.shape == (S, H, W, D) and gradient.min() == gradient.max() == S * T * C
