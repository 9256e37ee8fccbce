"""Label Solve against the dense pseudo-inverse, in float64."""

import numpy as np
import pytest

from distillation import krr, label_solve

C = 3


def _problem(num_support, num_targets, repeated=()):
  """K_ss, K_ts and y_t; the support images `repeated` = (i, j) coincide."""
  rng = np.random.default_rng(num_support)
  features = rng.normal(size=(num_support + num_targets, 400)) / np.arange(1, 401)
  if repeated:
    features[repeated[1]] = features[repeated[0]]
  kernel = features @ features.T
  if repeated:
    kernel[repeated[1]] = kernel[repeated[0]]
    kernel[:, repeated[1]] = kernel[:, repeated[0]]
  y_t = np.eye(C)[rng.integers(0, C, num_targets)] - 1 / C
  return kernel[:num_support, :num_support], kernel[num_support:, :num_support], y_t


def _factor(k_ts, y_t, tile):
  return label_solve.combine(
    [label_solve.factor(k_ts[i : i + tile].T, y_t[i : i + tile]) for i in range(0, len(y_t), tile)]
  )


# The last one: many solutions.
@pytest.mark.parametrize(
  'num_support, num_targets', [(1, 1), (7, 40), (20, 301), (20, 21), (30, 13)]
)
@pytest.mark.parametrize('tile', [1, 6, 1000])
@pytest.mark.parametrize('ridge', [1e-6, 0.1])
def test_labels_are_the_pseudo_inverse_times_the_targets(num_support, num_targets, tile, ridge):
  k_ss, k_ts, y_t = _problem(num_support, num_targets)
  labels = label_solve.solve(k_ss, _factor(k_ts, y_t, tile), ridge)
  k = k_ss + ridge * np.trace(k_ss) / num_support * np.eye(num_support)
  expected = np.linalg.pinv(k_ts @ np.linalg.inv(k), rcond=1e-10) @ y_t
  np.testing.assert_allclose(labels, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize(
  'num_support, num_targets, tile', [(20, 300, 50), (100, 2000, 700), (20, 12, 5)]
)
@pytest.mark.parametrize('ridge', [1e-6, 1e-3])
def test_a_repeated_support_image_gets_the_same_labels_twice(num_support, num_targets, tile, ridge):
  """K_ts is blind to the difference of the two; what it sees is solved for without them, in a basis
  of sums."""
  k_ss, k_ts, y_t = _problem(num_support, num_targets, repeated=(3, 7))
  labels = label_solve.solve(k_ss, _factor(k_ts, y_t, tile), ridge)
  basis = np.delete(np.eye(num_support), 7, axis=1)
  basis[[3, 7], 3] = 2**-0.5
  k = krr.regularised(k_ss, ridge)
  expected = basis @ np.linalg.pinv(k_ts @ basis @ np.linalg.inv(basis.T @ k @ basis)) @ y_t
  np.testing.assert_allclose(labels, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
  np.testing.assert_allclose(labels[3], labels[7], rtol=0, atol=1e-7 * np.abs(expected).max())


def test_the_loss_comes_from_the_factor():
  k_ss, k_ts, y_t = _problem(6, 31)
  factor = _factor(k_ts, y_t, 4)
  assert factor.shape == (9, 9)
  hard = np.eye(C)[np.arange(6) % C] - 1 / C
  solved = label_solve.solve(k_ss, factor, 1e-3)
  losses = []
  for labels in (hard, solved, solved + 1e-3):
    alpha = krr.solve(k_ss, labels, 1e-3).alpha
    losses.append(label_solve.loss(factor, alpha, 31))
    assert losses[-1] == pytest.approx(0.5 * np.mean((k_ts @ alpha - y_t) ** 2), rel=1e-12)
  assert losses[1] < min(losses[0], losses[2])
