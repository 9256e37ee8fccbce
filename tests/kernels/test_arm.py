"""The native kernel for 64-bit Arm, compiled by GCC and by Clang, on an emulated processor."""

import pathlib

import arm
import kernel_cases
import numpy as np
import pytest
from implementations import CUSP_TOLERANCES, TOLERANCES, error

from kernels import architectures, checked
from kernels.native import build
from kernels.native import kernel as native

GOLDEN = np.load(pathlib.Path(__file__).with_name('golden.npz'))

# With the first compiler all but what takes seconds, images as large as CIFAR-10's; with the second
# what differs most.
CASES = {
  'gcc': [name for name in kernel_cases.CASES if name != 'convnet_smooth'],
  'clang': ['fc2_flat', 'convnet2_odd_flat', 'convnet_near', 'myrtle5', 'merged_stages_hidden'],
}

pytestmark = pytest.mark.skipif(
  'neon' in build.instruction_sets(), reason='this is 64-bit Arm: test_native.py'
)


@pytest.fixture(scope='module', params=arm.COMPILERS)
def processor(request, tmp_path_factory):
  if missing := arm.missing(request.param):
    pytest.skip(f'needs {missing}')
  folder = tmp_path_factory.mktemp('arm')
  emulated = arm.Processor(request.param, folder)
  yield emulated
  emulated.close()


def make(processor, architecture, dtype='float32', threads=2, kind='ntk'):
  network = architectures.get(architecture)
  return checked.wrap(
    lambda dtype: native.NativeKernel(network, dtype, threads, kind, library=processor), dtype
  )


def test_the_library_is_neon(processor):
  assert processor.instruction_set == 'neon'
  assert processor.vector_bytes == 16


# In a loop: a case takes a tenth of a second, and two processes that share the cases would each
# wait for the compiler.
def test_blocks_and_gradients_equal_golden_values(processor):
  for name in CASES[processor.compiler]:
    case = kernel_cases.CASES[name]
    x, y, cotangent = kernel_cases.images(case)
    # In two parts, neither of which fills its vectors; the second keeps its derivatives.
    cut = max(1, len(y) * 3 // 4)
    for dtype in case.dtypes:
      kernel = make(processor, case.architecture, dtype)
      block, gradient = kernel.block_vjp(x, y[:cut], cotangent[:, :cut])
      if cut < len(y):
        rest, more = kernel.block_vjp(x, y[cut:], lambda block: cotangent[:, cut:])  # noqa: B023
        block, gradient = np.hstack([block, rest]), gradient + more
      tolerances = (CUSP_TOLERANCES if case.images == 'flat' else TOLERANCES)[dtype]
      assert block.dtype == gradient.dtype == dtype
      assert error(block, GOLDEN[f'{name}/block']) <= tolerances[0], (name, dtype)
      assert error(gradient, GOLDEN[f'{name}/gradient']) <= tolerances[1], (name, dtype)


def test_nngp_equals_golden_values(processor):
  for name in kernel_cases.NNGP:
    case = kernel_cases.CASES[name]
    x, y, cotangent = kernel_cases.images(case._replace(images='random'))
    block, gradient = make(processor, case.architecture, kind='nngp').block_vjp(x, y, cotangent)
    assert error(block, GOLDEN[f'{name}/nngp_block']) <= TOLERANCES['float32'][0], name
    assert error(gradient, GOLDEN[f'{name}/nngp_gradient']) <= TOLERANCES['float32'][1], name


@pytest.mark.parametrize('architecture', ['convnet2', 'fc2'])
def test_bits_depend_neither_on_threads_nor_on_what_is_computed_beside_them(
  processor, architecture
):
  x = np.random.default_rng(0).standard_normal((11, 5, 6, 3)).astype(np.float32)
  kernel, threaded = (make(processor, architecture, threads=threads) for threads in (1, 3))
  whole, symmetric = kernel.block(x[:5], x), kernel.block(x, x)
  np.testing.assert_array_equal(threaded.block(x[:5], x), whole)
  np.testing.assert_array_equal(kernel.block(x[1:3], x[2:9]), whole[1:3, 2:9])
  np.testing.assert_array_equal(symmetric, symmetric.T)
  assert error(symmetric[:5], whole) <= 1e-6
  for one, other in zip(kernel.block_vjp(x[:5], x, whole), threaded.block_vjp(x[:5], x, whole)):
    np.testing.assert_array_equal(other, one)


def test_subnormal_numbers_are_flushed(processor):
  """During a call; stand_in.cc checks that they are there again after each one."""
  kernel = native.NativeKernel(architectures.get('fc1'), 'float32', 2, library=processor)
  # Several vectors of images, for both threads; their squares are no subnormal float64.
  assert not kernel.prepare(np.full((70, 2, 2, 1), 1e-40, np.float32)).variances[1].any()
  assert kernel.prepare(np.full((70, 2, 2, 1), 1e-30, np.float32)).variances[1][:, 0].all()
