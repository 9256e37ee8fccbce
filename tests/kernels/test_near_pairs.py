"""Float32 where it is hardest: images that nearly coincide, are multiples, dim, or very unequal.

Each network against Neural Tangents in float64, by the tolerances that README states.
"""

import functools

import kernel_cases
import numpy as np
import pytest
from implementations import FAST, ORACLE, TOLERANCES, error, make

from kernels import architectures, contract

pytestmark = pytest.mark.usefixtures('compiled_as_for_users')

NETWORKS = kernel_cases.NEAR_NETWORKS
SHAPE = (8, 8, 2)
BLOCK, GRADIENT = TOLERANCES['float32']


def _noise(epsilon):
  return lambda x, y, noise: (x, x + epsilon * noise)


# name -> (x1 [3, H, W, D], y and noise, both alike) -> (x1, x2)
PAIRS = {
  'independent': lambda x, y, noise: (x, y),
  'identical': lambda x, y, noise: (x, x),
  **{f'{epsilon:g} noise': _noise(epsilon) for epsilon in (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2)},
  '1.5x': lambda x, y, noise: (x, 1.5 * x),
  '1.05x': lambda x, y, noise: (x, 1.05 * x),
  'opposite': lambda x, y, noise: (x, -x),
  'pixels x 0.01': lambda x, y, noise: (0.01 * x, 0.01 * y),
  'pixels x 0.001': lambda x, y, noise: (0.001 * x, 0.001 * y),
  'pixels / 255': lambda x, y, noise: (_pixels(x), _pixels(y)),
  'one is dim': lambda x, y, noise: (x, 1e-6 * y),
  'one is bright': lambda x, y, noise: (x, 1e4 * y),
  'a corner is dim': lambda x, y, noise: (x * _corner(1e-12), y),
  'constant': lambda x, y, noise: (_constant(x, 0.2), _constant(y, 0.3)),
  'constant in part': lambda x, y, noise: (_half(x, 0.2), _half(y, 0.3)),
}

# Without biases the kernel has a cusp where images are multiples of each other, and no gradient
# there; and at pixels a million times as dim as others it has one that depends on their direction
# alone, which distances between patches do not tell.
NO_GRADIENT_WITHOUT_BIAS = ('1.5x', '1.05x', 'a corner is dim')


def _pixels(x):
  return np.clip(np.round(128 + 50 * x), 0, 255) / 255


def _corner(scale):
  factors = np.ones(SHAPE)
  factors[:3, :3] = scale
  return factors


def _constant(x, level):
  return np.broadcast_to(level * (1 + np.arange(len(x)))[:, None, None, None], x.shape)


def _half(x, level):
  return np.where(np.arange(x.shape[1])[:, None, None] < 5, _constant(x, level), x)


def _images(pairs):
  rng = np.random.RandomState(0)
  x, y, noise = (rng.standard_normal((3,) + SHAPE) for _ in range(3))
  x1, x2 = (np.asarray(v, np.float32) for v in PAIRS[pairs](x, y, noise))
  return x1, x2.copy(), rng.standard_normal((3, 3))


@functools.cache
def _kernel(network, implementation, dtype, kind='ntk'):
  return make(implementation, NETWORKS[network], dtype, kind=kind)


@functools.cache
def _expected(network, pairs, kind='ntk'):
  return _kernel(network, ORACLE, 'float64', kind).block_vjp(*_images(pairs))


@pytest.mark.parametrize('pairs', PAIRS)
@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('implementation', FAST)
def test_float32_keeps_its_tolerances(implementation, network, pairs):
  expected = _expected(network, pairs)
  block, gradient = _kernel(network, implementation, 'float32').block_vjp(*_images(pairs))
  assert error(block, expected[0]) <= BLOCK
  assert np.isfinite(gradient).all()
  if architectures.get(NETWORKS[network]).b_std or pairs not in NO_GRADIENT_WITHOUT_BIAS:
    assert error(gradient, expected[1]) <= GRADIENT


@pytest.mark.parametrize('pairs', ['0.01 noise', '0.2 noise', 'pixels / 255'])
@pytest.mark.parametrize('network', ['fc3', 'conv3'])
@pytest.mark.parametrize('implementation', FAST)
def test_nngp_too(implementation, network, pairs):
  expected = _expected(network, pairs, 'nngp')
  block, gradient = _kernel(network, implementation, 'float32', 'nngp').block_vjp(*_images(pairs))
  assert error(block, expected[0]) <= BLOCK
  assert error(gradient, expected[1]) <= GRADIENT


@pytest.mark.parametrize('network', [name for name in NETWORKS if 'without_bias' in name])
@pytest.mark.parametrize('dtype', contract.DTYPES)
@pytest.mark.parametrize('implementation', FAST)
def test_without_biases_the_size_of_images_does_not_matter(implementation, dtype, network):
  """Sizes whose squares, or products of variances, would under- or overflow."""
  x, y, cotangent = _images('independent')
  kernel = _kernel(network, implementation, dtype)
  block, gradient = kernel.block_vjp(x, y, cotangent)
  scale = 2.0 ** (-90 if dtype == 'float32' else -700)
  small, small_gradient = kernel.block_vjp(np.asarray(x, dtype) * scale, y, cotangent)
  large, large_gradient = kernel.linearise(x, np.asarray(y, dtype) / scale)[:2]
  np.testing.assert_array_equal(small, block * scale)
  np.testing.assert_array_equal(small_gradient, gradient)
  np.testing.assert_array_equal(large, block / scale)
  assert error(large_gradient(cotangent) * scale, gradient) <= 1e-6
  prepared = kernel.prepare(np.asarray(y, dtype) / scale)
  np.testing.assert_array_equal(kernel.block(x, prepared[1:]), large[:, 1:])


@pytest.mark.parametrize('network', ['fc1', 'conv3', 'convnet2', 'global_hidden'])
@pytest.mark.parametrize('implementation', FAST)
def test_what_overflows_float32_is_computed_in_float64_or_refused(implementation, network):
  x, y, cotangent = _images('independent')
  kernel, double = (_kernel(network, implementation, dtype) for dtype in ('float32', 'float64'))
  for scale in (1e4, 1e8, 1e12, 1e16):
    x1, x2 = np.float32(scale) * x, np.float32(scale) * y
    block, gradient = kernel.block_vjp(x1, x2, cotangent)
    expected = double.block_vjp(x1, x2, cotangent)
    assert error(block, expected[0]) <= BLOCK and error(gradient, expected[1]) <= GRADIENT
  message = r'images: values up to \d\.\d+e\+{} are too large for this kernel in {}; scale them'
  with pytest.raises(ValueError, match=message.format(25, 'float32')):
    kernel.block(x * np.float32(1e25), y * np.float32(1e25))
  with pytest.raises(ValueError, match=message.format(90, 'float64')):
    double.block(x.astype(np.float64) * 1e90, y)
