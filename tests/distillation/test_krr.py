"""KRR's explicit formulas against JAX's derivatives of the whole problem, in float64."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import threadpoolctl

import kernels.precision  # noqa: F401
from distillation import krr

RIDGE = 1e-3


def _problem(num_support, num_targets, num_classes):
  rng = np.random.default_rng(num_support)
  features = rng.normal(size=(num_support + num_targets, 2 * num_support))
  kernel = features @ features.T / num_support
  return (
    kernel[:num_support, :num_support],
    kernel[:num_support, num_support:],
    rng.normal(size=(num_support, num_classes)),
    rng.normal(size=(num_targets, num_classes)),
  )


def _loss(k_ss, k_st, y_s, y_t):
  k = k_ss + RIDGE * jnp.trace(k_ss) / len(k_ss) * jnp.eye(len(k_ss))
  return 0.5 * jnp.mean((k_st.T @ jnp.linalg.solve(k, y_s) - y_t) ** 2)


@pytest.mark.parametrize('sizes', [(1, 1, 2), (5, 7, 3), (12, 31, 10)])
@pytest.mark.parametrize('tile', [1, 3, 100])
def test_tiles_add_up_to_the_gradient_of_the_loss(sizes, tile):
  k_ss, k_st, y_s, y_t = _problem(*sizes)
  loss, (d_ss, d_st, d_y) = jax.value_and_grad(_loss, argnums=(0, 1, 2))(k_ss, k_st, y_s, y_t)

  solution = krr.solve(k_ss, y_s, RIDGE)
  blocks = [k_st[:, i : i + tile] for i in range(0, len(y_t), tile)]
  pieces = [
    krr.residual(krr.predictions(block, solution.alpha), y_t[tile * i : tile * (i + 1)], len(y_t))
    for i, block in enumerate(blocks)
  ]
  alpha_bar = np.zeros_like(solution.alpha)
  for block, piece in zip(blocks, pieces):
    alpha_bar += krr.alpha_bar(block, piece.scaled)
  cotangent, y_bar = krr.pull_back(solution, alpha_bar)

  np.testing.assert_allclose(sum(piece.loss for piece in pieces), loss, rtol=1e-12)
  k_st_bar = np.concatenate(
    [krr.cotangent(solution.alpha, piece.scaled) for piece in pieces], axis=1
  )
  np.testing.assert_allclose(k_st_bar, d_st, rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(y_bar, d_y, rtol=1e-9, atol=1e-13)
  np.testing.assert_allclose(cotangent, d_ss + d_ss.T, rtol=1e-8, atol=1e-12)


def test_parts_of_the_support_add_up_to_the_predictions():
  _, k_st, alpha, _ = _problem(7, 5, 3)
  parts = krr.predictions(k_st[:2], alpha[:2]) + krr.predictions(k_st[2:], alpha[2:])
  np.testing.assert_allclose(parts, k_st.T @ alpha, rtol=1e-13)


def test_accuracy_counts_the_largest_output():
  block = np.eye(3)
  y = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
  predictions = krr.predictions(block, np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]))
  assert krr.residual(predictions, y, 3).correct == 2


def test_a_singular_kernel_is_refused_with_its_smallest_eigenvalue():
  with pytest.raises(
    krr.NotPositiveDefiniteError, match=r'smallest eigenvalue -\d.*Raise run.ridge'
  ):
    krr.solve(np.array([[1.0, 2.0], [2.0, 1.0]]), np.ones((2, 1)), 1e-6)


def test_nan_is_refused():
  with pytest.raises(krr.NotPositiveDefiniteError, match='NaN'):
    krr.solve(np.array([[1.0, np.nan], [np.nan, 1.0]]), np.ones((2, 1)), 1e-6)


def test_shapes_and_types_are_checked_in_tests():
  """The hook of tests/conftest.py is on."""
  with pytest.raises(jaxtyping.TypeCheckError):
    krr.predictions(np.ones((3, 2)), np.ones((2, 1)))
  with pytest.raises(jaxtyping.TypeCheckError):
    krr.alpha_bar(np.ones((3, 2), int), np.ones((2, 1)))
  assert krr.alpha_bar(np.ones((3, 2), np.float32), np.ones((2, 1))).dtype == np.float64


def test_blas_has_one_thread_in_every_call_and_as_many_as_before_afterwards():
  def counts():
    libraries = threadpoolctl.threadpool_info()
    return {library['num_threads'] for library in libraries if library['user_api'] == 'blas'}

  with threadpoolctl.threadpool_limits(2):
    assert krr.one_thread(counts)() == {1}
    assert counts() == {2}
