"""Label Solve: the labels with which a support set fits the training set best (K1, K2), by TSQR in
float64.

    y* = (K_ts K^-1)^+ y_t      K = K_ss + (ridge * tr(K_ss) / S) I      of all solutions, the one of minimum norm

Groups of rows of [K_ts, y_t] are reduced to their R factors where they are computed, and those to
one, whose size does not depend on T: forming K_st K_ts would square a condition number of 1e6.
NumPy on one thread, so that no bit depends on the machine's cores.
"""

from typing import Sequence

import numpy as np
import threadpoolctl

from distillation import krr

_CUT_OFF = 1e-12  # relative to the largest singular value of K_ts


def factor(k_st: np.ndarray, y_t: np.ndarray) -> np.ndarray:
  """R of the rows [K_bs, y_b] of a group of targets, float64 [min(b, S + C), S + C].

  Args:
    k_st: block K(support, group), [S, b].
    y_t: labels of the group, [b, C].
  """
  return combine([np.concatenate([np.asarray(k_st, np.float64).T, y_t], axis=1)])


def combine(factors: Sequence[np.ndarray]) -> np.ndarray:
  """R of the groups together, from theirs in order: float64 [min(n, S + C), S + C] where they have
  n rows."""
  with threadpoolctl.threadpool_limits(1):
    return np.linalg.qr(np.concatenate(factors), mode='r')


def loss(r: np.ndarray, alpha: np.ndarray, num_targets: int) -> float:
  """1/2 mean((K_ts alpha - y_t)^2) over T * C entries.

  Args:
    r: R of [K_ts, y_t].
    alpha: K^-1 y, [S, C].
    num_targets: `T`.
  """
  with threadpoolctl.threadpool_limits(1):
    num_support, num_classes = alpha.shape
    residual = r[:, :num_support] @ alpha - r[:, num_support:]
    return 0.5 * float(np.sum(residual**2)) / (num_targets * num_classes)


def solve(k_ss: np.ndarray, r: np.ndarray, ridge: float) -> np.ndarray:
  """The labels y*, float64 [S, C].

  K_ts K^-1 itself is not formed: where support images coincide, K_ts has a null direction, and K^-1
  would blow the rounding in it up to 1e-10 of the largest singular value and more. Instead the SVD
  of K_ts' R factor gives all least-squares solutions alpha + N w of K_ts alpha = y_t (N: the null
  space), and w makes y = K (alpha + N w) least; the solution of least alpha would not.

  Args:
    k_ss: NTK of the support set, [S, S].
    r: R of [K_ts, y_t] over all targets, [n, S + C].
    ridge: lambda, relative to the mean of K_ss's diagonal.
  """
  num_support = len(k_ss)
  k = krr.regularised(k_ss, ridge)
  with threadpoolctl.threadpool_limits(1):
    u, s, vt = np.linalg.svd(r[:num_support, :num_support])
    rank = int(np.sum(s > _CUT_OFF * s[0]))
    y = k @ (vt[:rank].T @ (u[:, :rank].T @ r[:num_support, num_support:] / s[:rank, None]))
    null = np.linalg.qr(k @ vt[rank:].T)[0]
    return y - null @ (null.T @ y)
