"""Kernel ridge-regression: the S x S solve, the residual of a target tile, and the pull-back of
both (K1, section 2; float64 throughout).

    K = K_ss + (ridge * tr(K_ss) / S) I      alpha = K^-1 y_s      P = K_ts alpha      loss = 1/2 mean((P - y_t)^2)

Given alpha the target rows are independent, so a tile's residual, loss and cotangent need nothing
but its own block. NumPy and SciPy on one thread, so that no bit depends on the machine's cores.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import threadpoolctl

# Once, because it looks through all loaded libraries for milliseconds.
_BLAS = threadpoolctl.ThreadpoolController()


class NotPositiveDefiniteError(ArithmeticError):
  """K_ss + ridge has no Cholesky factor."""


class Solution(NamedTuple):
  """A solved support set.

  Attributes:
    alpha: K^-1 y_s, [S, C].
    factor: lower Cholesky factor of K, [S, S].
    ridge: the relative ridge it was solved with.
  """

  alpha: np.ndarray
  factor: np.ndarray
  ridge: float


class Residual(NamedTuple):
  """What `b` targets contribute.

  Attributes:
    loss: its share of the loss.
    correct: how many of its images are predicted right (arg-max).
    scaled: R, the cotangent of the predictions, [b, C].
  """

  loss: float
  correct: int
  scaled: np.ndarray


def regularised(k_ss: np.ndarray, ridge: float) -> np.ndarray:
  """K = K_ss + (ridge * tr(K_ss) / S) I, float64 [S, S]."""
  k_ss = np.asarray(k_ss, np.float64)
  return k_ss + ridge * np.trace(k_ss) / len(k_ss) * np.eye(len(k_ss))


def solve(k_ss: np.ndarray, y_s: np.ndarray, ridge: float) -> Solution:
  """Solves K alpha = y_s.

  Args:
    k_ss: NTK of the support set, [S, S].
    y_s: labels, [S, C].
    ridge: lambda, relative to the mean of K_ss's diagonal.

  Raises:
    NotPositiveDefiniteError: the message gives the smallest eigenvalue and what to change.
  """
  k = regularised(k_ss, ridge)
  with _BLAS.limit(limits=1):
    if not np.isfinite(k).all():
      raise NotPositiveDefiniteError(
        'K_ss contains NaN or infinity: the support images have diverged; lower run.learning_rate.'
      )
    try:
      factor = scipy.linalg.cholesky(k, lower=True)
    except np.linalg.LinAlgError as error:
      smallest = scipy.linalg.eigvalsh(k, subset_by_index=[0, 0])[0]
      raise NotPositiveDefiniteError(
        f'K_ss + ridge is not positive definite: smallest eigenvalue {smallest:.3e} with a mean diagonal of {np.trace(k) / len(k):.3e}. '
        'Raise run.ridge, use run.kernel_dtype=float64, or make sure that no support image is repeated.'
      ) from error
    return Solution(
      scipy.linalg.cho_solve((factor, True), np.asarray(y_s, np.float64)), factor, ridge
    )


def predictions(k_st: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  """P = K_ts alpha, [b, C], of a block K(support, targets), [S, b]; or what a part of the support,
  rows of both, adds to it."""
  with _BLAS.limit(limits=1):
    return np.asarray(k_st, np.float64).T @ alpha


def residual(predictions: np.ndarray, y_t: np.ndarray, num_targets: int) -> Residual:
  """Loss and cotangent of the predictions, [b, C], of `b` targets.

  Args:
    predictions: [b, C].
    y_t: labels, [b, C].
    num_targets: `T`, all targets of the step: the loss is a mean over T * C entries.
  """
  errors = predictions - y_t
  scaled = errors / (num_targets * y_t.shape[1])
  return Residual(
    loss=0.5 * float(np.sum(errors * scaled)),
    correct=int(np.sum(predictions.argmax(axis=1) == y_t.argmax(axis=1))),
    scaled=scaled,
  )


def alpha_bar(k_st: np.ndarray, scaled: np.ndarray) -> np.ndarray:
  """K_st R, what a block [S, b] adds to the cotangent of alpha, [S, C]."""
  with _BLAS.limit(limits=1):
    return np.asarray(k_st, np.float64) @ scaled


def cotangent(alpha: np.ndarray, scaled: np.ndarray) -> np.ndarray:
  """Of the block K(support, tile), [S, b], from alpha [S, C] and the tile's `scaled` [b, C]."""
  with _BLAS.limit(limits=1):
    return alpha @ scaled.T


def pull_back(solution: Solution, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """From the cotangent of alpha to those of K_ss and y_s.

  Args:
    solution: of the support set.
    alpha_bar: [S, C], summed over all targets.

  Returns:
    The cotangent [S, S] to give to the vjp of K(X1, X_s) in its **first** argument, over all of
    K_ss: twice the symmetrised cotangent of K_ss, since both arguments move; and the cotangent of
    y_s, [S, C].
  """
  with _BLAS.limit(limits=1):
    y_bar = scipy.linalg.cho_solve((solution.factor, True), alpha_bar)
    k_bar = -y_bar @ solution.alpha.T
    k_bar += solution.ridge / len(k_bar) * np.trace(k_bar) * np.eye(len(k_bar))
    return k_bar + k_bar.T, y_bar
