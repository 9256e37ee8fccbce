"""Kernel ridge-regression: the S x S solve, the residual of a tile of targets, and the gradients of
both, in float64 (Nguyen et al. 2021a, KIP, ICLR, section 2, https://arxiv.org/abs/2011.00050).

    K = K_ss + (ridge * tr(K_ss) / S) I
    alpha = K^-1 y_s
    P = K_ts alpha
    loss = 1/2 mean((P - y_t)^2)

Given alpha, the rows of the targets are independent: a tile's residual, loss and cotangent need
nothing but its own kernel block.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import threadpoolctl
from jaxtyping import Float, Float64

# Decorates what calls BLAS or LAPACK, whose bits depend on their number of threads. Programs set
# one thread for the whole process (programs/placement.py); notebooks and other callers need not.
one_thread = threadpoolctl.ThreadpoolController().wrap(limits=1)


class NotPositiveDefiniteError(ArithmeticError):
  """K_ss + ridge has no Cholesky factor."""


class Solution(NamedTuple):
  """A solved support set.

  Attributes:
    alpha: K^-1 y_s, [S, C].
    factor: lower Cholesky factor of K, [S, S].
    ridge: the relative ridge it was solved with.
  """

  alpha: Float64[np.ndarray, 'S C']
  factor: Float64[np.ndarray, 'S S']
  ridge: float


class Residual(NamedTuple):
  """Contribution of `b` targets to a step.

  Attributes:
    loss: their share of the loss.
    correct: how many of their images are predicted right (arg-max).
    scaled: cotangent of the predictions, (P - y_t) / (T C), [b, C].
  """

  loss: float
  correct: int
  scaled: Float64[np.ndarray, 'b C']


def regularised(k_ss: Float[np.ndarray, 'S S'], ridge: float) -> Float64[np.ndarray, 'S S']:
  """K = K_ss + (ridge * tr(K_ss) / S) I, [S, S]."""
  k_ss = np.asarray(k_ss, np.float64)
  return k_ss + ridge * np.trace(k_ss) / len(k_ss) * np.eye(len(k_ss))


@one_thread
def solve(k_ss: Float[np.ndarray, 'S S'], y_s: Float[np.ndarray, 'S C'], ridge: float) -> Solution:
  """Solves K alpha = y_s by Cholesky.

  Args:
    k_ss: kernel of the support set, [S, S].
    y_s: labels, [S, C].
    ridge: relative to the mean of K_ss's diagonal.

  Raises:
    NotPositiveDefiniteError: the message gives the smallest eigenvalue and what to change.
  """
  k = regularised(k_ss, ridge)
  if not np.isfinite(k).all():
    raise NotPositiveDefiniteError(
      'K_ss contains NaN or infinity: the support images have diverged; lower run.learning_rate.'
    )
  try:
    factor = scipy.linalg.cholesky(k, lower=True)
  except np.linalg.LinAlgError as error:
    smallest = scipy.linalg.eigvalsh(k, subset_by_index=[0, 0])[0]
    raise NotPositiveDefiniteError(
      f'K_ss + ridge is not positive definite: smallest eigenvalue {smallest:.3e} with a mean '
      f'diagonal of {np.trace(k) / len(k):.3e}. Raise run.ridge, use run.kernel_dtype=float64, '
      'or make sure that no support image is repeated.'
    ) from error
  alpha = scipy.linalg.cho_solve((factor, True), np.asarray(y_s, np.float64))
  return Solution(alpha, factor, ridge)


@one_thread
def predictions(
  k_st: Float[np.ndarray, 'S b'], alpha: Float64[np.ndarray, 'S C']
) -> Float64[np.ndarray, 'b C']:
  """P = K_ts alpha, [b, C], of a kernel block K(support, targets), [S, b].

  Rows of both that belong to a part of the support give that part's share of P.
  """
  return np.asarray(k_st, np.float64).T @ alpha


def residual(
  predictions: Float64[np.ndarray, 'b C'], y_t: Float[np.ndarray, 'b C'], num_targets: int
) -> Residual:
  """Loss and cotangent of the predictions of `b` targets.

  Args:
    predictions: [b, C].
    y_t: labels, [b, C].
    num_targets: T, all targets of the step: the loss is a mean over T * C entries.
  """
  errors = predictions - y_t
  scaled = errors / (num_targets * y_t.shape[1])
  return Residual(
    loss=0.5 * float(np.sum(errors * scaled)),
    correct=int(np.sum(predictions.argmax(axis=1) == y_t.argmax(axis=1))),
    scaled=scaled,
  )


@one_thread
def alpha_bar(
  k_st: Float[np.ndarray, 'S b'], scaled: Float64[np.ndarray, 'b C']
) -> Float64[np.ndarray, 'S C']:
  """Contribution of a block [S, b] to the cotangent of alpha: K_st (P - y_t) / (T C), [S, C]."""
  return np.asarray(k_st, np.float64) @ scaled


@one_thread
def cotangent(
  alpha: Float[np.ndarray, 'S C'], scaled: Float[np.ndarray, 'b C']
) -> Float[np.ndarray, 'S b']:
  """Cotangent of the block K(support, tile), [S, b], from alpha and the tile's `scaled`.

  Its dtype is theirs, which is the kernel's where they have been sent to workers.
  """
  return alpha @ scaled.T


@one_thread
def pull_back(
  solution: Solution, alpha_bar: Float64[np.ndarray, 'S C']
) -> tuple[Float64[np.ndarray, 'S S'], Float64[np.ndarray, 'S C']]:
  """Cotangents of K_ss and y_s from that of alpha.

  Args:
    solution: of the support set.
    alpha_bar: cotangent of alpha, [S, C], summed over all targets.

  Returns:
    The cotangent [S, S] to give to the vjp of K(X1, X_s) in its **first** argument, over all of
    K_ss: twice the symmetrised cotangent of K_ss, since both arguments move; and the cotangent of
    y_s, [S, C].
  """
  y_bar = scipy.linalg.cho_solve((solution.factor, True), alpha_bar)
  k_bar = -y_bar @ solution.alpha.T
  k_bar += solution.ridge / len(k_bar) * np.trace(k_bar) * np.eye(len(k_bar))
  return k_bar + k_bar.T, y_bar
