"""Label Solve: the labels with which a support set fits the training set best, by TSQR in float64
(Nguyen et al. 2021a, KIP, ICLR, https://arxiv.org/abs/2011.00050; Nguyen et al. 2021b, NeurIPS,
https://arxiv.org/abs/2107.13034).

    K = K_ss + (ridge * tr(K_ss) / S) I
    y* = (K_ts K^-1)^+ y_t, of all solutions the one of minimum norm

Groups of rows of [K_ts, y_t] are reduced to their R factors where they are computed, and those to
one, whose size does not depend on T: forming K_st K_ts would square a condition number of 1e6.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from distillation import krr

_CUT_OFF = 1e-12  # relative to the largest singular value of K_ts


def factor(
  k_st: Float[np.ndarray, 'S b'], y_t: Float[np.ndarray, 'b C']
) -> Float64[np.ndarray, 'rows S+C']:
  """R of the rows [K_bs, y_b] of a group of targets, [min(b, S + C), S + C].

  Args:
    k_st: kernel block K(support, group), [S, b].
    y_t: labels of the group, [b, C].
  """
  return combine([np.concatenate([np.asarray(k_st, np.float64).T, y_t], axis=1)])


@krr.one_thread
def combine(
  factors: Sequence[Float64[np.ndarray, '_ columns']],
) -> Float64[np.ndarray, 'rows columns']:
  """R of several groups together, from theirs in order.

  Args:
    factors: each [n_i, S + C].

  Returns:
    [min(n, S + C), S + C] for n = sum of n_i.
  """
  return np.linalg.qr(np.concatenate(factors), mode='r')  # pyright: ignore[reportReturnType]


@krr.one_thread
def loss(
  r: Float64[np.ndarray, 'rows columns'], alpha: Float64[np.ndarray, 'S C'], num_targets: int
) -> float:
  """1/2 mean((K_ts alpha - y_t)^2) over T * C entries.

  Args:
    r: R of [K_ts, y_t], [n, S + C].
    alpha: K^-1 y, [S, C].
    num_targets: T.
  """
  num_support, num_classes = alpha.shape
  residual = r[:, :num_support] @ alpha - r[:, num_support:]
  return 0.5 * float(np.sum(residual**2)) / (num_targets * num_classes)


@krr.one_thread
def solve(
  k_ss: Float[np.ndarray, 'S S'], r: Float64[np.ndarray, 'rows columns'], ridge: float
) -> Float64[np.ndarray, 'S C']:
  """Labels y*, [S, C].

  K_ts K^-1 itself is not formed: where support images coincide, K_ts has a null direction, and K^-1
  would blow the rounding in it up to 1e-10 of the largest singular value and more. Instead the SVD
  of K_ts' R factor gives all least-squares solutions alpha + N w of K_ts alpha = y_t (N: the null
  space), and w makes y = K (alpha + N w) least; the solution of least alpha would not.

  Args:
    k_ss: kernel of the support set, [S, S].
    r: R of [K_ts, y_t] over all targets, [n, S + C].
    ridge: relative to the mean of K_ss's diagonal.
  """
  num_support = len(k_ss)
  k = krr.regularised(k_ss, ridge)
  u, s, vt = np.linalg.svd(r[:num_support, :num_support])
  rank = int(np.sum(s > _CUT_OFF * s[0]))
  y = k @ (vt[:rank].T @ (u[:, :rank].T @ r[:num_support, num_support:] / s[:rank, None]))
  null = np.linalg.qr(k @ vt[rank:].T)[0]
  return y - null @ (null.T @ y)
