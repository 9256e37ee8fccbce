"""What can be said of the JAX kernel on a GPU without one: by what is handed to XLA for it, and by
its tiles."""

import functools
import re

import jax
import numpy as np
import pytest
from jax import export

from kernels import architectures, band, contract, registry

SHAPE = (8, 8, 2)


def _programs(architecture):
  """(name, function, arguments) of all that the kernel compiles."""
  image = lambda n: jax.ShapeDtypeStruct((n, *SHAPE), np.float32)
  variances = lambda n: jax.eval_shape(functools.partial(band._variances, architecture), image(n))
  tile = image(2), variances(2), image(3), variances(3)
  forward = functools.partial(band._tile_forward, architecture, 'ntk')
  sources = jax.eval_shape(forward, *tile)[1]
  yield 'forward', forward, tile
  yield (
    'backward',
    functools.partial(band._tile_backward, architecture, 'ntk'),
    (*tile, sources, jax.ShapeDtypeStruct((2, 3), np.float32)),
  )
  yield 'variances', functools.partial(band._variances, architecture), (image(2),)
  yield (
    'variances_vjp',
    lambda x, q_bar: jax.vjp(functools.partial(band._variances, architecture), x)[1](q_bar),
    (image(2), variances(2)),
  )


@pytest.mark.parametrize(
  'architecture',
  ['convnet', 'myrtle5', 'fc2', {'stages': [{'convs': 1, 'pool': True}], 'hidden': 1}],
  ids=['convnet', 'myrtle5', 'fc2', 'hidden'],
)
def test_no_atomics_and_no_tf32(architecture):
  """XLA adds up a scatter by atomics, in any order, and takes a float32 product of less than the
  highest precision to TF32."""
  for name, function, arguments in _programs(architectures.get(architecture)):
    text = export.export(jax.jit(function), platforms=['cuda'])(*arguments).mlir_module()
    assert not re.search(r'scatter|rng|stablehlo\.custom_call @(?!Sharding)', text), name
    for product in re.findall(r'stablehlo\.(?:dot|convolution).*', text):
      assert product.count('HIGHEST') == 2, (name, product)


@pytest.fixture
def on_gpu(monkeypatch):
  """Kernels made now believe that they are on a GPU; on CPU they compute the same, up to
  rounding."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  yield
  band._compiler_options.cache_clear()


@pytest.mark.parametrize(
  'architecture, size, counts, expected',
  [
    ('convnet', (32, 32), (10, 250), (5, 256)),
    ('convnet', (32, 32), (500, 250), (125, 16)),
    ('convnet', (32, 32), (50, 50), (25, 64)),
    ('convnet', (8, 8), (10, 250), (10, 256)),
    ('myrtle10', (32, 32), (10, 250), (2, 256)),
    ('fc1', (32, 32), (10, 5000), (10, 8192)),
  ],
)
def test_tiles_fill_a_gpu_within_its_budget(on_gpu, architecture, size, counts, expected):
  kernel = band.JaxKernel(architectures.get(architecture), 'float32', 1)
  images = [contract.Prepared(np.empty((n, *size, 3), np.float32), [], kernel) for n in counts]
  a, b = kernel._tile_shape(*images)
  assert (a, b) == expected
  if architecture != 'fc1':
    assert a * b * size[0] * size[1] <= band._GPU_ENTRIES
  assert a * b * kernel._bytes_per_pair(images[0].images.shape) <= band._GPU.tile_bytes


def test_the_same_values_in_a_gpus_tiles(on_gpu, monkeypatch):
  monkeypatch.setattr(band, '_GPU_ENTRIES', 8 * 8 * 128)
  rng = np.random.default_rng(0)
  x1, x2, cotangent = (
    rng.normal(size=(5, *SHAPE)),
    rng.normal(size=(33, *SHAPE)),
    rng.normal(size=(5, 33)),
  )
  kernel = registry.make_kernel('convnet2', implementation='jax', dtype='float64')
  assert kernel._kernel._tile_shape(*(kernel._kernel.prepare(x) for x in (x1, x2))) == (3, 16)
  block, gradient = kernel.block_vjp(x1, x2, lambda block: cotangent)
  symmetric = kernel.block(x2, x2)
  monkeypatch.undo()
  band._compiler_options.cache_clear()
  other = registry.make_kernel('convnet2', implementation='jax', dtype='float64')
  expected = other.block_vjp(x1, x2, cotangent)
  np.testing.assert_allclose(block, expected[0], rtol=1e-12)
  np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=1e-12 * np.abs(expected[1]).max())
  np.testing.assert_allclose(symmetric, other.block(x2, x2), rtol=1e-12)
