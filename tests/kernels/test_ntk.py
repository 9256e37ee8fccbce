"""All implementations by golden values of Neural Tangents, by a dense oracle, and by properties."""

import functools
import pathlib

import hypothesis
import kernel_cases
import numpy as np
import pytest
from dense_oracle import dense_ntk
from hypothesis import strategies as st
from implementations import CUSP_TOLERANCES, FAST, NAMES, TOLERANCES, error, make

from kernels import architectures, checked, contract, fit_polynomials, registry
from kernels.band import budget, layers, offsets
from kernels.band.kernel import JaxKernel

GOLDEN = np.load(pathlib.Path(__file__).with_name('golden.npz'))

kernel = functools.cache(make)


def case_kernel(implementation, name, dtype, threads=1):
  return kernel(
    implementation, architectures.get(kernel_cases.CASES[name].architecture), dtype, threads
  )


def runs():
  every = []
  for name, case in kernel_cases.CASES.items():
    for implementation in NAMES:
      for dtype in case.dtypes:
        if implementation != 'reference' or (case.cheap and dtype == 'float64'):
          every.append(
            pytest.param(implementation, name, dtype, id=f'{implementation}-{name}-{dtype}')
          )
  return every


@pytest.mark.parametrize('implementation, name, dtype', runs())
def test_block_and_gradient_equal_golden_values(implementation, name, dtype):
  case = kernel_cases.CASES[name]
  block, gradient = case_kernel(implementation, name, dtype).block_vjp(*kernel_cases.images(case))
  tolerances = (CUSP_TOLERANCES if case.images == 'flat' else TOLERANCES)[dtype]
  assert block.dtype == gradient.dtype == dtype
  assert error(block, GOLDEN[f'{name}/block']) <= tolerances[0]
  assert error(gradient, GOLDEN[f'{name}/gradient']) <= tolerances[1]


@pytest.mark.parametrize(
  'implementation, name',
  [
    *((implementation, name) for implementation in FAST for name in kernel_cases.NNGP),
    *(('reference', name) for name in kernel_cases.NNGP if kernel_cases.CASES[name].cheap),
  ],
)
def test_nngp_equals_golden_values(implementation, name):
  case = kernel_cases.CASES[name]
  x, y, cotangent = kernel_cases.images(case._replace(images='random'))
  for dtype in contract.DTYPES if implementation != 'reference' else ('float64',):
    k = make(implementation, case.architecture, dtype, kind='nngp')
    block, gradient = k.block_vjp(x, y, cotangent)
    assert error(block, GOLDEN[f'{name}/nngp_block']) <= TOLERANCES[dtype][0]
    assert error(gradient, GOLDEN[f'{name}/nngp_gradient']) <= TOLERANCES[dtype][1]


@pytest.mark.parametrize(
  'name',
  ['fc2_flat', 'convnet_flat', 'convnet2_odd_flat', 'myrtle5_flat', 'pool_first_global_hidden'],
)
@pytest.mark.parametrize('implementation', FAST)
def test_equals_the_dense_oracle_where_images_coincide(implementation, name):
  case = kernel_cases.CASES[name]
  x, y, _ = kernel_cases.images(case._replace(images='flat', counts=(3, 4)))
  expected = np.array(
    [[dense_ntk(architectures.get(case.architecture), a, b) for b in y] for a in x]
  )
  assert error(case_kernel(implementation, name, 'float64').block(x, y), expected) <= 1e-10
  assert error(case_kernel(implementation, name, 'float32').block(x, y), expected) <= 1e-6


SMALL = ('fc2', 'convnet2_odd_flat')


@pytest.mark.parametrize('name', SMALL + ('pool_first_global_hidden', 'no_bias'))
@pytest.mark.parametrize('implementation', FAST)
def test_block_of_parts_is_parts_of_block(implementation, name):
  case = kernel_cases.CASES[name]
  k = case_kernel(implementation, name, 'float32')
  rng = np.random.RandomState(0)
  # Numbers for which the JAX kernel has one shape of tile: compiled once.
  x, y = rng.standard_normal((9,) + case.shape), rng.standard_normal((45,) + case.shape)
  cotangent = rng.standard_normal((9, 45))
  block, gradient = k.block_vjp(x, y, cotangent)
  np.testing.assert_allclose(k.block(x, y), block, rtol=1e-6)
  np.testing.assert_allclose(k.block(x[3:], y[34:]), block[3:, 34:], rtol=2e-6)
  pieces = [k.block_vjp(x, y[a:b], cotangent[:, a:b])[1] for a, b in ((0, 34), (34, 45))]
  assert error(sum(pieces), gradient) <= 2e-6
  prepared = k.prepare(y)
  assert np.array_equal(k.block(x, prepared), k.block(x, y))
  np.testing.assert_allclose(k.block(prepared[34:], x), block.T[34:], rtol=2e-6)
  assert error(k.block_vjp(x, prepared[:34], cotangent[:, :34])[1], pieces[0]) <= 1e-6


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('implementation', FAST)
def test_a_function_as_cotangent_sees_the_block_and_gives_the_same_gradient(implementation, name):
  case = kernel_cases.CASES[name]
  k = case_kernel(implementation, name, 'float32')
  x, y, _ = kernel_cases.images(case)
  block, gradient = k.block_vjp(x, y, np.sin(k.block_vjp(x, y, np.zeros((3, 4)))[0]))
  value, pulled = k.block_vjp(x, y, np.sin)
  assert np.array_equal(value, block)
  if implementation == 'native':
    # It keeps derivatives for a function, and contracts them in another order.
    assert error(pulled, gradient) <= 1e-6
  else:
    assert np.array_equal(pulled, gradient)


@pytest.mark.parametrize('name', SMALL)
def test_tiles_that_keep_nothing_for_a_cotangent_give_the_same_bits(name):
  case = kernel_cases.CASES[name]
  network = architectures.get(case.architecture)
  x, y, _ = kernel_cases.images(case)
  expected = case_kernel('jax', name, 'float32').block_vjp(x, y, np.sin)
  nothing = budget.CPU._replace(kept_bytes=0)
  k = checked.wrap(lambda dtype: JaxKernel(network, dtype, 1, budget=nothing), 'float32')
  for value, kept in zip(k.block_vjp(x, y, np.sin), expected):
    assert np.array_equal(value, kept)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('implementation', FAST)
def test_symmetric_block(implementation, name):
  case = kernel_cases.CASES[name]
  k = case_kernel(implementation, name, 'float32')
  x = np.random.RandomState(1).standard_normal((13,) + case.shape)
  x[7] = x[2]
  block = k.block(x, x)
  assert np.array_equal(block, block.T)
  np.testing.assert_allclose(block, k.block(x, x.copy()), rtol=2e-6)
  assert np.linalg.eigvalsh(block.astype(np.float64)).min() >= -2e-6 * np.abs(block).max() * len(x)


@pytest.mark.parametrize('implementation', FAST)
def test_images_that_nearly_coincide_among_others(implementation):
  case = kernel_cases.CASES['convnet2_odd_flat']
  rng = np.random.RandomState(2)
  # One shape: compiled once.
  x, y = (rng.standard_normal((n,) + case.shape).astype(np.float32) for n in (5, 5))
  x[3] = x[1] + np.float32(1e-3) * rng.standard_normal(case.shape)
  y[0], y[2], y[4] = x[0], x[0] + np.float32(1e-4), x[2] * np.float32(1.01)
  k, exact = (
    case_kernel(implementation, 'convnet2_odd_flat', dtype) for dtype in ('float32', 'float64')
  )
  for other in (x, y):
    expected = exact.block_vjp(x, other, np.cos)
    block, gradient = k.block_vjp(x, other, np.cos)
    linearised = k.linearise(x, other)
    assert error(block, expected[0]) <= 1e-6 and error(gradient, expected[1]) <= 5e-6
    np.testing.assert_allclose(k.block(x, other), block, rtol=2e-6)
    np.testing.assert_allclose(linearised.block, block, rtol=2e-6)
    assert error(linearised.pull_back(np.cos(block)), gradient) <= 1e-6
  assert np.array_equal(k.block(x, x), k.block(x, x).T)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('implementation', FAST)
def test_bits_do_not_depend_on_threads(implementation, name):
  case = kernel_cases.CASES[name]
  rng = np.random.RandomState(2)
  x, y, cotangent = (
    rng.standard_normal((9,) + case.shape),
    rng.standard_normal((150,) + case.shape),
    rng.standard_normal((9, 150)),
  )
  results = [
    case_kernel(implementation, name, 'float32', threads).block_vjp(x, y, cotangent)
    for threads in (1, 3)
  ]
  for one, three in zip(*results):
    assert np.array_equal(one, three)


@pytest.mark.parametrize('dtype', contract.DTYPES)
@pytest.mark.parametrize('name', ['fc2', 'convnet', 'no_bias', 'pool_first_global_hidden'])
@pytest.mark.parametrize('implementation', FAST)
def test_gradients_are_finite_at_the_edges(implementation, name, dtype):
  shape = kernel_cases.CASES[name].shape
  x = np.stack([np.zeros(shape), np.ones(shape), -np.ones(shape), 1e-3 * np.ones(shape)])
  block, gradient = case_kernel(implementation, name, dtype).block_vjp(x, x, np.ones((4, 4)))
  assert np.isfinite(block).all() and np.isfinite(gradient).all()


PROPERTIES = hypothesis.settings(max_examples=5, deadline=None, derandomize=True)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('implementation', FAST)
@PROPERTIES
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_permuting_images_permutes_the_results(implementation, name, seed):
  case, rng = kernel_cases.CASES[name], np.random.RandomState(seed)
  k = case_kernel(implementation, name, 'float32')
  x, y, cotangent = (
    rng.standard_normal((4,) + case.shape),
    rng.standard_normal((9,) + case.shape),
    rng.standard_normal((4, 9)),
  )
  p, q = rng.permutation(4), rng.permutation(9)
  block, gradient = k.block_vjp(x, y, cotangent)
  permuted, pulled = k.block_vjp(x[p], y[q], cotangent[np.ix_(p, q)])
  np.testing.assert_allclose(permuted, block[np.ix_(p, q)], rtol=1e-6)
  assert error(pulled, gradient[p]) <= 1e-6


@pytest.mark.parametrize('name', SMALL + ('no_bias', 'pool_first_global_hidden'))
@pytest.mark.parametrize('implementation', FAST)
@PROPERTIES
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_vjp_is_finite_differences(implementation, name, seed):
  case, rng = kernel_cases.CASES[name], np.random.RandomState(seed)
  k = case_kernel(implementation, name, 'float64')
  x, y, direction = (rng.standard_normal((n,) + case.shape) for n in (3, 4, 3))
  cotangent, step = rng.standard_normal((3, 4)), 1e-4
  slope = np.sum(
    (k.block(x + step * direction, y) - k.block(x - step * direction, y)) * cotangent
  ) / (2 * step)
  gradient = k.block_vjp(x, y, cotangent)[1]
  scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
  assert abs(np.sum(gradient * direction) - slope) <= 1e-7 * scale


@pytest.mark.parametrize(
  'size, radius, pools', [(8, 7, 0), (9, 8, 2), (32, 15, 3), (7, 1, 1), (28, 7, 3)]
)
def test_an_axis_holds_every_pixel_pair_of_its_band_once(size, radius, pools):
  sizes = [(size, radius)] + [(size >> i, max(0, radius >> i)) for i in range(1, pools + 1)]
  for axis, (n, r) in zip(offsets.make_axes(sizes), sizes):
    pairs = [
      (y, partner) for row in axis.partner() for y, partner in enumerate(row) if partner >= 0
    ]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) >= {(y, z) for y in range(n) for z in range(n) if abs(y - z) <= r}


@pytest.mark.parametrize(
  'function, coefficients',
  [(fit_polynomials.angle, layers.ANGLE), (fit_polynomials.excess, layers.EXCESS)],
)
def test_polynomials_are_the_fitted_ones(function, coefficients):
  fitted, worst = fit_polynomials.minimax(function, fit_polynomials.DEGREE)
  np.testing.assert_allclose(coefficients, fitted, rtol=1e-6)
  assert worst < 3e-8


def test_auto_is_a_fast_implementation():
  assert registry.make_kernel('fc1').implementation in FAST


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      dict(implementation='fast'),
      r"implementation: expected one of auto, cuda, native, jax, reference, got 'fast'\.",
    ),
    (dict(dtype='float16'), r"dtype: expected one of float32, float64, got 'float16'\."),
  ],
)
def test_unknown_settings(arguments, message):
  with pytest.raises(ValueError, match=message):
    registry.make_kernel('fc1', **arguments)


def test_bad_images():
  k, x = kernel('jax', 'convnet', 'float32'), np.zeros((2, 8, 8, 1))
  with pytest.raises(
    ValueError,
    match=r'x1: expected images \[N, H, W, D\] with nothing empty, got shape \(8, 8, 1\)\.',
  ):
    k.block(x[0], x)
  with pytest.raises(ValueError, match=r'x2: contains NaN or infinity in image 1\.'):
    k.block(x, np.array([x[0], x[0] + np.nan]))
  with pytest.raises(
    ValueError,
    match=r'x1 and x2: images must have the same \[H, W, D\], got \(8, 8, 1\) and \(8, 9, 1\)\.',
  ):
    k.block(x, np.zeros((2, 8, 9, 1)))
  with pytest.raises(
    ValueError, match='3 2x2 poolings leave nothing of a 8x7 image; at least 8x8 is needed'
  ):
    k.block(x[:, :, :7], x[:, :, :7])
  with pytest.raises(ValueError, match=r'cotangent: expected shape \(2, 2\), got \(2, 1\)\.'):
    k.block_vjp(x, x, np.zeros((2, 1)))
  with pytest.raises(ValueError, match='x2: was prepared by another kernel'):
    k.block(x, kernel('jax', 'convnet2', 'float32').prepare(x))
