"""Follows the coordinator's snapshots: KRR and finite-network accuracy on the whole test set, to the log and to metrics.jsonl."""

import json
import threading
import time
from typing import Any

from absl import logging
import numpy as np

from data import sampling
from data import store
from kernels import krr
from kernels import ntk
from nodes import export
from nodes import run_directory
from nodes import tasks
from nodes.remote import CoordinatorLost
from nodes.remote import Stopping

_TRIES, _PAUSE = 3, 2.0  # of evaluating, before the coordinator hears that it is no use; seconds between them
_BEAT = 5.0  # seconds between signs of life
_HELD_OUT = 5000  # the last training images, or a tenth of them if that is less: the finite network's learning rate is set on them


def krr_test(kernel: ntk.Kernel, images: np.ndarray, labels: np.ndarray, ridge: float, test: ntk.Library, classes: np.ndarray, tile: int,
             stop=lambda: False) -> tuple[float, float] | None:
  """Accuracy and error 1/2 mean((P - y)^2) of KRR on the whole test set.

  Args:
    kernel: the NTK.
    images: support, [S, H, W, D]; labels: [S, C].
    ridge: relative to the mean of K_ss's diagonal.
    test: the test images; classes: int64 [N].
    tile: test images a block.
    stop: looked at before every block.

  Returns:
    (accuracy, error), or None where `stop()` became true. Raises krr.NotPositiveDefiniteError.
  """
  support = kernel.prepare(images)
  solution = krr.solve(kernel.block(support, support), labels, ridge)
  correct, error = 0, 0.0
  for start, end in tasks.ranges(len(classes), tile):
    if stop():
      return None
    y = sampling.centred_one_hot(classes[start:end], labels.shape[1])
    result = krr.residual(kernel.block(support, test[start:end]), solution.alpha, y, len(classes))
    correct += result.correct
    error += result.loss
  return correct / len(classes), error


class Evaluator:
  """Writes one row a snapshot. What it missed while it was away it evaluates when it is back; it never holds the others up."""

  def __init__(self, coordinator: Any, workdir: str, threads: int, cache: str, stop: threading.Event):
    """
    Args:
      coordinator: a `remote.Retrying` coordinator.
      workdir: the run directory.
      threads: CPU threads for the kernel.
      cache: this machine's folder of prepared data.
      stop: set when the process is to stop.
    """
    self._coordinator, self._threads, self._cache, self._stop_event = coordinator, threads, cache, stop
    self._directory = run_directory.RunDirectory(workdir)
    self._next_beat = 0.0

  def run(self) -> None:
    """Evaluates until told to stop. Raises CoordinatorLost where the run's coordinator is not there any more."""
    for attempt in range(_TRIES):
      try:
        self._follow()
        return
      except Stopping:
        return
      except CoordinatorLost:
        raise
      except Exception as error:  # whatever it is: the coordinator must not wait for rows that will not come
        logging.exception('the evaluator failed')
        if attempt + 1 == _TRIES:
          self._coordinator.broken('evaluator', f'{type(error).__name__}: {error}')
          raise
      time.sleep(_PAUSE)

  def _stopping(self) -> bool:
    """What evaluations ask now and then: so the coordinator hears that there is somebody to wait for."""
    if time.monotonic() > self._next_beat:
      self._coordinator.heartbeat('evaluator')
      self._next_beat = time.monotonic() + _BEAT
    return self._stop_event.is_set()

  def _follow(self) -> None:
    description = json.loads(self._coordinator.describe())
    self._run, self._settings = description['run'], description['system']['evaluation']
    self._prepared = store.fetch(description['data_key'], self._cache, self._coordinator.read_data)
    self._kernel = ntk.make_kernel(self._run['architecture'], implementation=self._run['implementation'],
                                   dtype=self._run['kernel_dtype'], threads=self._threads)
    self._test = ntk.Library(self._kernel, self._prepared.test_images)
    done = [row['step'] for row in self._directory.read_metrics()]
    while not self._stop_event.is_set():
      answer = self._coordinator.next_snapshot(done)
      if answer and 'stop' in answer:
        return
      if answer:
        if answer['run_id'] != description['run_id']:
          raise CoordinatorLost('another run answers in its place.', was_there=True)
        row = self._evaluate(answer)
        if row is None:
          return
        self._directory.append_metrics(row)
        done.append(row['step'])
        self._coordinator.evaluated(json.dumps(row))

  def _evaluate(self, snapshot: dict[str, Any]) -> dict[str, Any] | None:
    step, images, labels = snapshot['step'], snapshot['images'], snapshot['labels']
    if snapshot['final']:
      distilled = export.load(self._directory.distilled)  # what the user gets is what is reported
      images, labels = distilled.images, distilled.labels
    result = krr_test(self._kernel, images, labels, self._run['ridge'], self._test, self._prepared.test_labels,
                      self._settings['krr_tile'], self._stopping)
    if result is None:
      return None
    row = {'step': step, 'krr_test_accuracy': result[0], 'krr_test_mse': result[1], **json.loads(snapshot['metrics'])}
    if self._settings['nn_steps'] and (step == 0 or snapshot['final'] or step in self._settings['nn_snapshots']):
      row['nn_test_accuracy'] = self._finite_network(images, labels)
      if row['nn_test_accuracy'] is None:
        return None
    logging.info('evaluated step %d: KRR test accuracy %.2f %%, test MSE %.5f%s', step, 100 * row['krr_test_accuracy'],
                 row['krr_test_mse'], f', finite network {100 * row["nn_test_accuracy"]:.2f} %' if 'nn_test_accuracy' in row else '')
    if snapshot['final']:
      self._draw(images)
    return row

  def _finite_network(self, images: np.ndarray, labels: np.ndarray) -> float | None:
    from kernels import finite_network  # here, because it imports Neural Tangents, and not every run trains a network
    train = self._prepared.train_images
    return finite_network.test_accuracy(
        self._kernel.architecture, images, labels, train[len(train) - min(_HELD_OUT, len(train) // 10):],
        self._prepared.test_images, self._prepared.test_labels, width=self._settings['nn_width'], steps=self._settings['nn_steps'],
        batch=self._settings['nn_batch'], learning_rate_factor=self._settings['nn_learning_rate_factor'],
        l2=self._settings['nn_l2'], seed=self._run['seed'], stop=self._stopping)

  def _draw(self, images: np.ndarray) -> None:
    from nodes import pictures  # here, because matplotlib takes seconds to import
    with np.load(self._directory.snapshot(0), allow_pickle=False) as file:
      before = file['images']
    pictures.before_and_after(self._directory.picture, before, images, self._prepared.transform, self._prepared.num_classes)
