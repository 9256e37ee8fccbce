"""Evaluates labelled sets, and baselines of real images, by KRR and by finite networks on a whole
test set."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Float32, Float64, Int

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
# The last training images that select the finite network's hyper-parameters; a tenth of all if that
# is less, but one at least.
_HELD_OUT = 5000


def krr_test(
  kernel: contract.Kernel,
  images: Float[np.ndarray, 'S H W D'],
  labels: Float[np.ndarray, 'S C'],
  ridge: float,
  test: library.Library,
  classes: Int[np.ndarray, ' N'],
  tile: int,
  check: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
  """Accuracy and error 1/2 mean((P - y)^2) of KRR on the whole test set.

  Args:
    kernel: the NTK or NNGP.
    images: support, [S, H, W, D].
    labels: of the support, [S, C].
    ridge: relative to the mean of K_ss's diagonal.
    test: the N test images.
    classes: of the test images, [N].
    tile: images a block, of the test set and of the support.
    check: called before every block; what it raises ends the evaluation.

  Returns:
    (accuracy, error).

  Raises:
    krr.NotPositiveDefiniteError: the support's kernel cannot be solved.
  """
  support = kernel.prepare(images)
  solution = krr.solve(support_block(kernel, support, tile, check), labels, ridge)
  correct, error = 0, 0.0
  for start, end in plan.ranges(len(classes), tile):
    check()
    y = sampling.centred_one_hot(classes[start:end], labels.shape[1])
    predictions = krr.predictions(kernel.block(support, test[start:end]), solution.alpha)
    result = krr.residual(predictions, y, len(classes))
    correct += result.correct
    error += result.loss
  return correct / len(classes), error


def support_block(
  kernel: contract.Kernel,
  support: contract.Prepared,
  tile: int,
  check: Callable[[], None] = lambda: None,
) -> Float64[np.ndarray, 'S S']:
  """K_ss, [S, S], symmetric: tiles on and above the diagonal, mirrored below it.

  Args:
    kernel: the NTK or NNGP.
    support: S images, prepared by it.
    tile: images on each side of a tile.
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
    """Makes the kernel.

    Args:
      run: gives kernel, ridge and seed.
      settings: how to evaluate.
      prepared: the data set.
      threads: CPU threads for the kernel.
      check: called every second or so; what it raises ends the evaluation.
    """
    self._run, self._settings, self._prepared, self._check = run, settings, prepared, check
    self._kernel = registry.for_run(run, threads)
    self._test = library.Library(self._kernel, prepared.test_images)

  def krr(
    self, images: Float[np.ndarray, 'S H W D'], labels: Float[np.ndarray, 'S C']
  ) -> dict[str, Any]:
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

  def finite_network(
    self, images: Float[np.ndarray, 'S H W D'], labels: Float[np.ndarray, 'S C']
  ) -> dict[str, Any]:
    """Test accuracy of finite networks trained on images [S, H, W, D] with labels [S, C].

    Returns:
      Nothing where `nn_steps` is 0; else
      nn_test_accuracy: mean over `nn_seeds` networks.
      nn_test_accuracy_std: n - 1 in the denominator; of several networks only.
      nn_architecture: where it is not the kernel's.
      nn_width, nn_steps: channels, and updates.
      nn_learning_rate_factor, nn_l2: those used.
      nn_selected_on: the images that selected these two; None where there was one pair only.
      nn_validation_accuracy: on those images, where there was more than one pair.
    """
    settings, prepared = self._settings, self._prepared
    if not settings.nn_steps:
      return {}
    # Here, because it imports JAX, which those who only read results do without.
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

  def real_images(
    self, size: int
  ) -> tuple[Float32[np.ndarray, 'S H W D'], Float64[np.ndarray, 'S C']]:
    """Training images that a run of this seed starts from, and their hard labels.

    Args:
      size: S.

    Raises:
      ValueError: `size` is no multiple of the number of classes, or more than there are.
    """
    chosen = sampling.class_balanced(
      self._run.seed, sampling.INITIAL_SUPPORT, 0, self._prepared.train_labels, size
    )
    return (
      np.asarray(self._prepared.train_images[chosen], np.float32),
      sampling.centred_one_hot(self._prepared.train_labels[chosen], self._prepared.num_classes),
    )

  def baselines(self, size: int) -> list[dict[str, Any]]:
    """Evaluates `real_images(size)` with hard labels (`kind` HARD) and solved ones (SOLVED)."""
    images, hard = self.real_images(size)
    rows = []
    for kind in (HARD, SOLVED):
      logging.info('Evaluating %d %s.', size, kind)
      labels = hard if kind == HARD else self._solved_labels(images)
      rows.append({'kind': kind, **self.krr(images, labels), **self.finite_network(images, labels)})
    return rows

  def _solved_labels(self, images: Float32[np.ndarray, 'S H W D']) -> Float64[np.ndarray, 'S C']:
    """Labels of images by Label Solve over the whole training set."""
    train, classes = self._prepared.train_images, self._prepared.train_labels
    num_classes = self._prepared.num_classes
    support = self._kernel.prepare(images)
    factor = np.empty((0, len(images) + num_classes))
    for start, end in plan.ranges(len(train), self._settings.krr_tile):
      self._check()
      y = sampling.centred_one_hot(classes[start:end], num_classes)
      block = self._kernel.block(support, train[start:end])
      factor = label_solve.combine([factor, label_solve.factor(block, y)])
    k_ss = support_block(self._kernel, support, self._settings.krr_tile, self._check)
    return label_solve.solve(k_ss, factor, self._run.ridge)


def in_words(row: dict[str, Any]) -> str:
  """A row of metrics.jsonl as text, in columns that line up with other rows'."""
  words = [form(row[key]) for key, form in _WORDS.items() if has(row, key)]
  if has(row, 'nn_test_accuracy'):
    words.append(f'finite network {network_in_words(row)}')
  return '  '.join([f'step {row["step"]:6d}', *words])


def has(row: dict[str, Any], key: str) -> bool:
  """Whether a row of metrics.jsonl or baselines.json has that number; older rows have fewer."""
  return isinstance(row.get(key), (int, float))


def network_in_words(row: dict[str, Any]) -> str:
  """Accuracy with its network, which it depends on: '62.74 ± 0.31 % (width 128, 1000 updates)'."""
  std = 'nn_test_accuracy_std'
  deviation = f' ± {100 * row[std]:.2f}' if has(row, std) else ''
  return f'{100 * row["nn_test_accuracy"]:.2f}{deviation} % ({networks_in_words([row])})'


def networks_in_words(rows: Sequence[dict[str, Any]]) -> str:
  """Each kind of finite network of several rows, once: 'width 128, 1000 updates'."""
  kinds = {}
  for row in rows:
    words = [row['nn_architecture']] if row.get('nn_architecture') else []
    if has(row, 'nn_width') and has(row, 'nn_steps'):
      words += [f'width {row["nn_width"]}', f'{row["nn_steps"]} updates']
    else:
      words.append('width not recorded')
    kinds[', '.join(words)] = None
  return '; '.join(kinds)
