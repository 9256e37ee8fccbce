"""The JAX kernel's programs and tiles for a GPU, on a machine without one."""

import functools
import re

import jax
import numpy as np
import pytest
from jax import export

from kernels import architectures, checked
from kernels.band import budget, tile, variances
from kernels.band.kernel import JaxKernel

SHAPE = (8, 8, 2)


def _programs(architecture):
  """(name, function, arguments) of all that the kernel compiles."""
  x1, x2 = (jax.ShapeDtypeStruct((n, *SHAPE), np.float32) for n in (2, 3))
  own = functools.partial(variances.variances, architecture)
  q1, q2 = jax.eval_shape(own, x1), jax.eval_shape(own, x2)
  images = x1, q1, x2, q2
  forward = functools.partial(tile.forward, architecture, 'ntk')
  sources = jax.eval_shape(forward, *images)[1]
  backward = functools.partial(tile.backward, architecture, 'ntk')
  yield 'forward', forward, images
  yield 'backward', backward, (*images, sources, jax.ShapeDtypeStruct((2, 3), np.float32))
  yield 'variances', own, (x1,)
  own_vjp = functools.partial(variances.variances_vjp, architecture)
  yield 'variances_vjp', own_vjp, (x1, q1)


@pytest.mark.parametrize(
  'architecture',
  ['convnet', 'myrtle5', 'fc2', {'stages': [{'convs': 1, 'pool': True}], 'hidden': 1}],
  ids=['convnet', 'myrtle5', 'fc2', 'hidden'],
)
def test_no_atomics_and_no_tf32(architecture):
  """Nothing whose bits may vary on a GPU.

  XLA adds up a scatter by atomics, in any order, and takes a float32 product of less than the
  highest precision to TF32.
  """
  for name, function, arguments in _programs(architectures.get(architecture)):
    text = export.export(jax.jit(function), platforms=['cuda'])(*arguments).mlir_module()
    assert not re.search(r'scatter|rng|stablehlo\.custom_call @(?!Sharding)', text), name
    for product in re.findall(r'stablehlo\.(?:dot|convolution).*', text):
      assert product.count('HIGHEST') == 2, (name, product)


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
def test_tiles_fill_a_gpu_within_its_budget(architecture, size, counts, expected):
  network = architectures.get(architecture)
  a, b = budget.tile_shape(budget.GPU, network, (*size, 3), 4, *counts)
  assert (a, b) == expected
  if architecture != 'fc1':
    assert a * b * size[0] * size[1] <= budget.GPU.entries
  assert a * b * budget.bytes_per_pair(network, size[0], size[1], 4) <= budget.GPU.tile_bytes


def test_the_same_values_in_a_gpus_tiles():
  """By the GPU's options too, which XLA knows on a CPU."""
  rng = np.random.default_rng(0)
  x1, x2 = rng.normal(size=(5, *SHAPE)), rng.normal(size=(33, *SHAPE))
  cotangent = rng.normal(size=(5, 33))
  network = architectures.get('convnet1')

  def kernel(budget):
    return checked.wrap(lambda dtype: JaxKernel(network, dtype, 1, budget=budget), 'float64')

  small = budget.GPU._replace(entries=8 * 8 * 128)
  gpu, cpu = kernel(small), kernel(budget.CPU)
  assert budget.tile_shape(small, network, SHAPE, 8, 5, 33) == (3, 16)
  block, gradient = gpu.block_vjp(x1, x2, lambda block: cotangent)
  expected = cpu.block_vjp(x1, x2, cotangent)
  np.testing.assert_allclose(block, expected[0], rtol=1e-12)
  np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=1e-12 * np.abs(expected[1]).max())
  np.testing.assert_allclose(gpu.block(x2, x2), cpu.block(x2, x2), rtol=1e-12)
