"""Evaluates labelled sets by KRR and finite networks on a whole test set, and baselines beside."""

from typing import Any, Callable, Sequence

import numpy as np
from absl import logging

from configs import schema
from data import sampling, store
from distillation import krr, label_solve, plan
from kernels import architectures, contract, library, registry

_WORDS = {
  'krr_test_accuracy': lambda value: f'KRR {100 * value:6.2f} %',
  'krr_test_mse': lambda value: f'MSE {value:.5f}',
  'train_loss': lambda value: f'loss {value:.5f}',
  'wall_seconds': lambda value: f'{value:6.0f} s',
}
HARD, SOLVED = 'real images, hard labels', 'real images, solved labels'
# The last training images set the finite network's hyper-parameters: so many, or a tenth of all if
# that is less, but one at least.
_HELD_OUT = 5000


def krr_test(
  kernel: contract.Kernel,
  images: np.ndarray,
  labels: np.ndarray,
  ridge: float,
  test: library.Library,
  classes: np.ndarray,
  tile: int,
  check: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
  """Accuracy and error 1/2 mean((P - y)^2) of KRR on the whole test set.

  Args:
    kernel: the NTK.
    images: support, [S, H, W, D]; labels: [S, C].
    ridge: relative to the mean of K_ss's diagonal.
    test: the test images; classes: int64 [N].
    tile: images a block, of the test set and of the support.
    check: called before every block; what it raises ends the evaluation.

  Returns:
    (accuracy, error). Raises krr.NotPositiveDefiniteError.
  """
  support = kernel.prepare(images)
  solution = krr.solve(support_block(kernel, support, tile, check), labels, ridge)
  correct, error = 0, 0.0
  for start, end in plan.ranges(len(classes), tile):
    check()
    y = sampling.centred_one_hot(classes[start:end], labels.shape[1])
    result = krr.residual(
      krr.predictions(kernel.block(support, test[start:end]), solution.alpha), y, len(classes)
    )
    correct += result.correct
    error += result.loss
  return correct / len(classes), error


def support_block(
  kernel: contract.Kernel,
  support: contract.Prepared,
  tile: int,
  check: Callable[[], None] = lambda: None,
) -> np.ndarray:
  """K_ss, float64 [S, S], symmetric: tiles on and above the diagonal, mirrored below it.

  Args:
    kernel: the NTK.
    support: S images, prepared by it.
    tile: images a tile has on each side.
    check: called before every tile; what it raises ends the computation.
  """
  k_ss = np.zeros((len(support), len(support)))
  ranges = [slice(start, end) for start, end in plan.ranges(len(support), tile)]
  tiles = [(support[part], part) for part in ranges]
  for i, (images, rows) in enumerate(tiles):
    for others, columns in tiles[i:]:
      check()
      k_ss[rows, columns] = kernel.block(images, others)
  return np.triu(k_ss) + np.triu(k_ss, 1).T


class Evaluation:
  """Evaluates any number of labelled sets in the same way."""

  def __init__(
    self,
    run: schema.Run,
    settings: schema.Evaluation,
    prepared: store.Prepared,
    threads: int,
    check: Callable[[], None] = lambda: None,
  ):
    """
    Args:
      run: `run` of a configuration: the kernel, the ridge, the seed.
      settings: `system.evaluation` of a configuration.
      prepared: the data set.
      threads: CPU threads for the kernel.
      check: called every second or so; what it raises ends the evaluation.
    """
    self._run, self._settings, self._prepared, self._check = run, settings, prepared, check
    self._kernel = registry.for_run(run, threads)
    self._test = library.Library(self._kernel, prepared.test_images)

  def krr(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """`krr_test_accuracy` and `krr_test_mse` of images [S, H, W, D] with labels [S, C]."""
    accuracy, error = krr_test(
      self._kernel,
      images,
      labels,
      self._run.ridge,
      self._test,
      self._prepared.test_labels,
      self._settings.krr_tile,
      self._check,
    )
    return {'krr_test_accuracy': accuracy, 'krr_test_mse': error}

  def finite_network(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Test accuracy of finite networks trained on images [S, H, W, D] with labels [S, C].

    Returns:
      `nn_test_accuracy` (mean over `nn_seeds` networks), `nn_test_accuracy_std` (n - 1 in the
      denominator; of several networks only), `nn_architecture` (where it is not the kernel's),
      `nn_width` (channels), `nn_steps` (updates), `nn_learning_rate_factor` and `nn_l2`,
      `nn_selected_on` (by what images these two were selected; None: there was one pair only) and,
      where they were selected, `nn_validation_accuracy`. Nothing where `nn_steps` is 0.
    """
    settings, prepared = self._settings, self._prepared
    if not settings.nn_steps:
      return {}
    # Here, because it imports Neural Tangents, and not every run trains a network.
    from distillation import finite_network

    count = max(1, min(_HELD_OUT, len(prepared.train_images) // 10))
    held_out = slice(len(prepared.train_images) - count, None)
    result = finite_network.evaluate(
      architectures.get(settings.nn_architecture or self._run.architecture),
      images,
      labels,
      (prepared.train_images[held_out], prepared.train_labels[held_out]),
      (prepared.test_images, prepared.test_labels),
      width=settings.nn_width,
      steps=settings.nn_steps,
      batch=settings.nn_batch,
      loss=settings.nn_loss,
      learning_rate_factors=settings.nn_learning_rate_factors,
      l2s=settings.nn_l2s,
      num_seeds=settings.nn_seeds,
      seed=self._run.seed,
      check=self._check,
    )
    row = {
      'nn_test_accuracy': float(np.mean(result.test_accuracies)),
      'nn_seeds': len(result.test_accuracies),
      'nn_width': settings.nn_width,
      'nn_steps': settings.nn_steps,
      'nn_learning_rate_factor': result.learning_rate_factor,
      'nn_l2': result.l2,
      'nn_selected_on': None,
    }
    other = settings.nn_architecture
    if other:
      row['nn_architecture'] = other if isinstance(other, str) else 'own architecture'
    if len(result.test_accuracies) > 1:
      row['nn_test_accuracy_std'] = float(np.std(result.test_accuracies, ddof=1))
    if result.validation_accuracy is not None:
      last = f'{count} training images' if count > 1 else 'training image'
      row['nn_selected_on'] = f'the last {last}'
      row['nn_validation_accuracy'] = result.validation_accuracy
    return row

  def real_images(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The `size` training images [S, H, W, D] that a run of this seed starts from, and their hard
    labels [S, C].

    Raises ValueError where `size` is no multiple of the number of classes, or more than there are.
    """
    chosen = sampling.class_balanced(
      self._run.seed, sampling.INITIAL_SUPPORT, 0, self._prepared.train_labels, size
    )
    return (
      np.asarray(self._prepared.train_images[chosen], np.float32),
      sampling.centred_one_hot(self._prepared.train_labels[chosen], self._prepared.num_classes),
    )

  def baselines(self, size: int) -> list[dict[str, Any]]:
    """Rows, told apart by `kind`, of `real_images(size)`: with hard labels, and with those that
    Label Solve gives them."""
    images, hard = self.real_images(size)
    rows = []
    for kind in (HARD, SOLVED):
      logging.info('Evaluating %d %s.', size, kind)
      labels = hard if kind == HARD else self._solved_labels(images)
      rows.append({'kind': kind, **self.krr(images, labels), **self.finite_network(images, labels)})
    return rows

  def _solved_labels(self, images: np.ndarray) -> np.ndarray:
    """Labels [S, C] of images [S, H, W, D] by Label Solve over the whole training set."""
    train, classes, num_classes = (
      self._prepared.train_images,
      self._prepared.train_labels,
      self._prepared.num_classes,
    )
    support = self._kernel.prepare(images)
    factor = np.empty((0, len(images) + num_classes))
    for start, end in plan.ranges(len(train), self._settings.krr_tile):
      self._check()
      y = sampling.centred_one_hot(classes[start:end], num_classes)
      factor = label_solve.combine(
        [factor, label_solve.factor(self._kernel.block(support, train[start:end]), y)]
      )
    k_ss = support_block(self._kernel, support, self._settings.krr_tile, self._check)
    return label_solve.solve(k_ss, factor, self._run.ridge)


def in_words(row: dict[str, Any]) -> str:
  """A row of metrics.jsonl, without what it lacks, in columns that stand under other rows'."""
  words = [form(row[key]) for key, form in _WORDS.items() if has(row, key)]
  if has(row, 'nn_test_accuracy'):
    words.append(f'finite network {network_in_words(row)}')
  return '  '.join([f'step {row["step"]:6d}', *words])


def has(row: dict[str, Any], key: str) -> bool:
  """Whether a row of metrics.jsonl or baselines.json has that number; old ones have fewer."""
  return isinstance(row.get(key), (int, float))


def network_in_words(row: dict[str, Any]) -> str:
  """'62.74 ± 0.31 % (width 128, 1000 updates)': other networks' accuracies cannot be compared."""
  std = 'nn_test_accuracy_std'
  deviation = f' ± {100 * row[std]:.2f}' if has(row, std) else ''
  return f'{100 * row["nn_test_accuracy"]:.2f}{deviation} % ({networks_in_words([row])})'


def networks_in_words(rows: Sequence[dict[str, Any]]) -> str:
  """'width 128, 1000 updates': each kind of finite network once, of rows that have one."""
  kinds = {}
  for row in rows:
    words = [row['nn_architecture']] if row.get('nn_architecture') else []
    if has(row, 'nn_width') and has(row, 'nn_steps'):
      words += [f'width {row["nn_width"]}', f'{row["nn_steps"]} updates']
    else:
      words.append('width not recorded')
    kinds[', '.join(words)] = None
  return '; '.join(kinds)
