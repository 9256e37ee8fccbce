"""Finite networks and their empirical NTK: against Neural Tangents, and against the kernels of
infinite width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.precision  # noqa: F401
from distillation.network import Network, empirical_ntk
from kernels import architectures, registry

pytestmark = pytest.mark.usefixtures('compiled_as_for_users')

SHAPE = (5, 7, 2)
FLAT = architectures.get({'stages': [{'convs': 1, 'pool': True}], 'hidden': 1})
POOLED = architectures.get(
  {
    'stages': [{'convs': 2, 'pool': True}, {'convs': 0, 'pool': True}],
    'readout': 'global_average_pool',
    'w_std': 1.2,
    'b_std': 0.3,
  }
)


def _images(n, shape=SHAPE):
  return np.random.default_rng(n).normal(size=(n, *shape))


@pytest.mark.parametrize('architecture, parameterization', [(FLAT, 'standard'), (POOLED, 'ntk')])
def test_same_key_same_network_as_neural_tangents(architecture, parameterization):
  """The same weights bit for bit; from the same weights the same outputs and the same NTK."""
  reference = pytest.importorskip('kernels.reference')
  network = Network(architecture, 6, 3, parameterization)
  init_fn, apply_fn, _ = reference.network(
    architecture, width=6, outputs=3, parameterization=parameterization
  )
  key, images = jax.random.key(3), _images(4)
  parameters, theirs = network.initial(key, SHAPE), init_fn(key, (-1, *SHAPE))[1]
  for ours, expected in zip(parameters, [pair for pair in theirs if pair], strict=True):
    for a, b in zip(ours, expected, strict=True):
      np.testing.assert_array_equal(a, b, strict=True)

  def summed(theirs, x, **_):
    return apply_fn(theirs, x).sum(axis=1, keepdims=True) / 3**0.5

  ntk_fn = reference.nt.empirical_ntk_fn(summed, vmap_axes=0, trace_axes=(-1,))

  @jax.jit
  def all_outputs(parameters, theirs, x):
    return network(parameters, x), apply_fn(theirs, x), ntk_fn(x, None, theirs)

  ours, expected, theta = all_outputs(parameters, theirs, images)
  np.testing.assert_allclose(ours, expected, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(empirical_ntk(network, parameters, images), theta, rtol=1e-12)


def test_weights_of_a_key_are_the_same_on_every_version_of_jax():
  """Golden values, by Neural Tangents on JAX 0.5.3."""
  (w, b), *_, (last, _) = Network(POOLED, 6, 3).initial(jax.random.key(3), SHAPE)
  assert (w.shape, b.shape, last.shape) == ((3, 3, 2, 6), (1, 1, 1, 6), (6, 3))
  assert w.dtype == b.dtype == jnp.float64
  np.testing.assert_allclose(w[2, 1, 1, :3], [-0.2047046311, 0.0021130111, 0.6543191681], rtol=1e-7)
  np.testing.assert_allclose(b[0, 0, 0, :3], [-0.7752686323, 0.0533961194, 0.1443895273], rtol=1e-7)
  np.testing.assert_allclose(last[1], [-0.0972737759, 1.0368451342, -0.1041533426], rtol=1e-7)


def test_any_number_of_gradients_at_a_time_gives_the_same_ntk():
  network = Network(architectures.get('fc1'), 6, 3)
  parameters, images = network.initial(jax.random.key(0), SHAPE), _images(7)
  whole = empirical_ntk(network, parameters, images)
  assert whole.shape == (7, 7) and np.linalg.eigvalsh(whole)[0] > 0
  one = sum(p.nbytes for p in jax.tree.leaves(parameters))
  for gradient_bytes in (1, 3 * one):  # tiles of one image, and of three
    theta = empirical_ntk(network, parameters, images, gradient_bytes)
    np.testing.assert_allclose(theta, whole, rtol=1e-12)


@pytest.mark.parametrize('parameterization', ['ntk', 'standard'])
def test_the_empirical_ntk_of_wide_networks_is_the_kernel(parameterization):
  """Its mean over a dozen networks; one alone is up to a third off."""
  if parameterization == 'standard':
    pytest.importorskip('kernels.reference')
  images, width = _images(3, (4, 4, 2)), 256
  network = Network(POOLED, width, 1, parameterization)
  shapes = jax.eval_shape(lambda key: network.initial(key, (4, 4, 2)), jax.random.key(0))
  rng = np.random.default_rng(0)

  def draw(w, b):  # by NumPy: JAX would compile for every shape
    scales = (1.0, 1.0)
    if parameterization == 'standard':
      scales = POOLED.w_std / np.prod(w.shape[:-1]) ** 0.5, POOLED.b_std
    w, b = [jnp.asarray(scale * rng.normal(size=p.shape)) for scale, p in zip(scales, (w, b))]
    return w, b

  thetas = [empirical_ntk(network, [draw(*layer) for layer in shapes], images) for _ in range(12)]
  kernel = registry.make_kernel(
    POOLED, dtype='float64', parameterization=parameterization, width=width
  )
  expected = kernel.block(images, images)
  np.testing.assert_allclose(np.mean(thetas, axis=0), expected, rtol=0.03)
