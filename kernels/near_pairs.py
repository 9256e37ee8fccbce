"""The pairs of images for which float32 is not enough, and which take float64.

Near are those whose squared distance is below NEAR times the mean of their squared norms, plus
NEAR_BIAS times the first layer's bias: rounding shows in their 1 - cosine, and near the cusp of
ReLU's derivative the gradient does not fade with the difference. Far are those whose squared norms,
with that bias, are in a ratio above FAR: their covariance is lost beside the larger variance.
Without biases lengths do not matter (see scale_free.py), but angles do.
"""

import numpy as np

NEAR = 0.01
NEAR_BIAS = 0.1
FAR = 50.0
LARGE = 1e15  # Mean squares above this: products of variances might overflow float32.

# For each row that has such pairs, the row and their columns.
Pairs = list[tuple[int, np.ndarray]]


def find(x1: np.ndarray, x2: np.ndarray, bias: float) -> Pairs:
  """Finds these pairs among x1 [A, H, W, D] and x2 [B, H, W, D].

  An image and itself are no such pair: they are exact.

  Args:
    bias: the first layer's variance of biases relative to that of weights.
  """
  a, b = x1.reshape(len(x1), -1), x2.reshape(len(x2), -1)
  if not bias:  # Values may be of any size.
    a, b = a.astype(np.float64), b.astype(np.float64)
  squares = [np.einsum('np,np->n', v, v) for v in (a, b)]
  # A little more than is needed, since these sums are float32's. Then each pair is judged alone:
  # no tile may change what is done.
  with np.errstate(over='ignore', invalid='ignore'):
    candidates = _needs_double(squares[0][:, None], squares[1], a @ b.T, a.shape[1], bias, 1.01)

  def is_one(i: int, j: int) -> bool:
    x, y = a[i].astype(np.float64), b[j].astype(np.float64)
    return not np.array_equal(x, y) and _needs_double(x @ x, y @ y, x @ y, len(x), bias)

  rows = [
    (i, [j for j in np.flatnonzero(candidates[i]) if is_one(i, j)])
    for i in np.flatnonzero(candidates.any(axis=1))
  ]
  return [(i, np.array(columns)) for i, columns in rows if columns]


def _needs_double(square1, square2, product, size: int, bias: float, slack: float = 1.0):
  """Whether pairs are near or far, from the sums of both images' squares and of their products."""
  if not bias:
    cosine = np.sqrt(square1) * np.sqrt(square2)
    return (np.abs(product) >= (1 - slack * NEAR / 2) * cosine) & (cosine > 0)
  bias = size * bias
  near = square1 + square2 - 2 * product
  near = near <= slack * (NEAR * (square1 + square2) / 2 + NEAR_BIAS * bias)
  larger, smaller = np.maximum(square1, square2) + bias, np.minimum(square1, square2) + bias
  return near | (slack * larger >= np.minimum(FAR * smaller, size * LARGE))


def without(cotangent: np.ndarray, pairs: Pairs) -> np.ndarray:
  """A cotangent [A, B] that is 0 at the pairs."""
  cotangent = np.array(cotangent) if pairs else cotangent
  for i, columns in pairs:
    cotangent[i, columns] = 0
  return cotangent
