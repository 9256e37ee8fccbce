"""What labelled images are worth: KRR and finite networks on a data set's whole test set, and the baselines to hold beside them."""

from typing import Any, Callable

from absl import logging
import numpy as np

from data import sampling
from data import store
from kernels import architectures
from kernels import krr
from kernels import label_solve
from kernels import ntk
from nodes import tasks

HARD, SOLVED = 'real images, hard labels', 'real images, solved labels'
# The last training images set the finite network's hyper-parameters: so many, or a tenth of all if
# that is less, but one at least.
_HELD_OUT = 5000


def krr_test(kernel: ntk.Kernel, images: np.ndarray, labels: np.ndarray, ridge: float, test: ntk.Library, classes: np.ndarray, tile: int,
             check: Callable[[], None] = lambda: None) -> tuple[float, float]:
  """Accuracy and error 1/2 mean((P - y)^2) of KRR on the whole test set.

  Args:
    kernel: the NTK.
    images: support, [S, H, W, D]; labels: [S, C].
    ridge: relative to the mean of K_ss's diagonal.
    test: the test images; classes: int64 [N].
    tile: test images a block.
    check: called before every block; what it raises ends the evaluation.

  Returns:
    (accuracy, error). Raises krr.NotPositiveDefiniteError.
  """
  support = kernel.prepare(images)
  solution = krr.solve(kernel.block(support, support), labels, ridge)
  correct, error = 0, 0.0
  for start, end in tasks.ranges(len(classes), tile):
    check()
    y = sampling.centred_one_hot(classes[start:end], labels.shape[1])
    result = krr.residual(krr.predictions(kernel.block(support, test[start:end]), solution.alpha), y, len(classes))
    correct += result.correct
    error += result.loss
  return correct / len(classes), error


class Evaluation:
  """Evaluates any number of labelled sets in the same way."""

  def __init__(self, run: dict[str, Any], settings: dict[str, Any], prepared: store.Prepared, threads: int,
               check: Callable[[], None] = lambda: None):
    """
    Args:
      run: `run` of a configuration: the kernel, the ridge, the seed.
      settings: `system.evaluation` of a configuration.
      prepared: the data set.
      threads: CPU threads for the kernel.
      check: called every second or so; what it raises ends the evaluation.
    """
    self._run, self._settings, self._prepared, self._check = run, settings, prepared, check
    self._kernel = ntk.for_run(run, threads)
    self._test = ntk.Library(self._kernel, prepared.test_images)

  def krr(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """`krr_test_accuracy` and `krr_test_mse` of images [S, H, W, D] with labels [S, C]."""
    accuracy, error = krr_test(self._kernel, images, labels, self._run['ridge'], self._test, self._prepared.test_labels,
                               self._settings['krr_tile'], self._check)
    return {'krr_test_accuracy': accuracy, 'krr_test_mse': error}

  def finite_network(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Test accuracy of finite networks trained on images [S, H, W, D] with labels [S, C].

    Returns:
      `nn_test_accuracy` (mean over `nn_seeds` networks), `nn_test_accuracy_std` (n - 1 in the denominator; of several networks only),
      `nn_learning_rate_factor` and `nn_l2`, `nn_selected_on` (by what images these two were selected; None: there was one pair only)
      and, where they were selected, `nn_validation_accuracy`. Nothing where `nn_steps` is 0.
    """
    settings, prepared = self._settings, self._prepared
    if not settings['nn_steps']:
      return {}
    from kernels import finite_network  # here, because it imports Neural Tangents, and not every run trains a network
    count = max(1, min(_HELD_OUT, len(prepared.train_images) // 10))
    held_out = slice(len(prepared.train_images) - count, None)
    result = finite_network.evaluate(
        architectures.get(settings['nn_architecture'] or self._run['architecture']), images, labels,
        (prepared.train_images[held_out], prepared.train_labels[held_out]), (prepared.test_images, prepared.test_labels),
        width=settings['nn_width'], steps=settings['nn_steps'], batch=settings['nn_batch'], loss=settings['nn_loss'],
        learning_rate_factors=settings['nn_learning_rate_factors'], l2s=settings['nn_l2s'], num_seeds=settings['nn_seeds'],
        seed=self._run['seed'], check=self._check)
    row = {'nn_test_accuracy': float(np.mean(result.test_accuracies)), 'nn_seeds': len(result.test_accuracies),
           'nn_learning_rate_factor': result.learning_rate_factor, 'nn_l2': result.l2, 'nn_selected_on': None}
    if len(result.test_accuracies) > 1:
      row['nn_test_accuracy_std'] = float(np.std(result.test_accuracies, ddof=1))
    if result.validation_accuracy is not None:
      last = f'{count} training images' if count > 1 else 'training image'
      row['nn_selected_on'] = f'the last {last}'
      row['nn_validation_accuracy'] = result.validation_accuracy
    return row

  def real_images(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The `size` training images [S, H, W, D] that a run of this seed starts from, and their hard labels [S, C].

    Raises ValueError where `size` is no multiple of the number of classes, or more than there are.
    """
    chosen = sampling.class_balanced(self._run['seed'], sampling.INITIAL_SUPPORT, 0, self._prepared.train_labels, size)
    return (np.asarray(self._prepared.train_images[chosen], np.float32),
            sampling.centred_one_hot(self._prepared.train_labels[chosen], self._prepared.num_classes))

  def baselines(self, size: int) -> list[dict[str, Any]]:
    """Rows, told apart by `kind`, of `real_images(size)`: with hard labels, and with those that Label Solve gives them."""
    images, hard = self.real_images(size)
    rows = []
    for kind in (HARD, SOLVED):
      logging.info('Evaluating %d %s.', size, kind)
      labels = hard if kind == HARD else self._solved_labels(images)
      rows.append({'kind': kind, **self.krr(images, labels), **self.finite_network(images, labels)})
    return rows

  def _solved_labels(self, images: np.ndarray) -> np.ndarray:
    """Labels [S, C] of images [S, H, W, D] by Label Solve over the whole training set."""
    train, classes, num_classes = self._prepared.train_images, self._prepared.train_labels, self._prepared.num_classes
    support = self._kernel.prepare(images)
    factor = np.empty((0, len(images) + num_classes))
    for start, end in tasks.ranges(len(train), self._settings['krr_tile']):
      self._check()
      y = sampling.centred_one_hot(classes[start:end], num_classes)
      factor = label_solve.combine([factor, label_solve.factor(self._kernel.block(support, train[start:end]), y)])
    return label_solve.solve(self._kernel.block(support, support), factor, self._run['ridge'])


def in_words(row: dict[str, Any]) -> str:
  """A row of metrics.jsonl on a line whose columns stand under those of other rows."""
  words = (f'step {row["step"]:6d}  KRR {100 * row["krr_test_accuracy"]:6.2f} %  MSE {row["krr_test_mse"]:.5f}  '
           f'loss {row["train_loss"]:.5f}  {row["wall_seconds"]:6.0f} s')
  return words + (f'  finite network {network_in_words(row)}' if 'nn_test_accuracy' in row else '')


def network_in_words(row: dict[str, Any]) -> str:
  """'62.74 %' or '62.74 ± 0.31 %'."""
  deviation = f' ± {100 * row["nn_test_accuracy_std"]:.2f}' if 'nn_test_accuracy_std' in row else ''
  return f'{100 * row["nn_test_accuracy"]:.2f}{deviation} %'
