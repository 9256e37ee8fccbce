"""The CUDA kernel's own: threads and blocks, parts of a block, memory, NVRTC.

A CPU plays the GPU's part (see emulator.py).
"""

import emulator
import kernel_cases
import numpy as np
import nvrtc
import pytest
from implementations import emulated, error

from kernels import architectures, registry
from kernels.cuda import kernel as cuda
from kernels.cuda import plan as planning
from kernels.native import build

IMAGE = {'convnet2': (9, 7, 2), 'fc2': (5, 4, 2), 'pool_first_global_hidden': (6, 5, 1)}
GROUPS = (14, 15, 1)  # 64 threads, of which 32 are enough for the second level

compiled = pytest.mark.skipif(not build.compiler(), reason='no C++ compiler')


def _kernel(name, dtype='float32', **machine):
  case = kernel_cases.CASES.get(name)
  return emulated(case.architecture if case else name, dtype, **machine)


def _images(shape, *counts):
  rng = np.random.default_rng(0)
  return [*(rng.standard_normal((n, *shape)) for n in counts), rng.standard_normal(counts)]


@compiled
@pytest.mark.parametrize(
  'architecture, shape, threads',
  [*((name, shape, 32) for name, shape in IMAGE.items()), ('convnet2', GROUPS, 64)],
)
def test_real_threads_and_blocks_give_the_same(architecture, shape, threads):
  """A missing barrier would show as another value."""
  x1, x2, cotangent = _images(shape, 2, 3)
  expected = _kernel(architecture, 'float64').block_vjp(x1, x2, cotangent)
  results = [
    _kernel(architecture, 'float64', threads=threads, blocks=blocks).block_vjp(x1, x2, cotangent)
    for blocks in (1, 2)
  ]
  for one, two, value in zip(*results, expected):
    np.testing.assert_array_equal(one, two)
    assert error(one, value) <= 1e-12


@compiled
@pytest.mark.parametrize('architecture', IMAGE)
def test_parts_of_a_block_and_kept_derivatives_give_the_same_bits(architecture):
  x1, x2, cotangent = _images(IMAGE[architecture], 2, 7)
  block, gradient = _kernel(architecture).block_vjp(x1, x2, cotangent)
  for kept_bytes in (1, 9000):  # one column at a time; some
    kernel = _kernel(architecture, kept_bytes=kept_bytes)
    for value, expected in zip(kernel.block_vjp(x1, x2, cotangent), (block, gradient)):
      np.testing.assert_array_equal(value, expected)
    value, pulled = kernel.block_vjp(x1, x2, np.sin)
    np.testing.assert_allclose(value, block, rtol=1e-6)
    assert error(pulled, _kernel(architecture).block_vjp(x1, x2, np.sin)[1]) <= 1e-6


@compiled
def test_parts_of_the_second_images():
  x, y, cotangent = _images(IMAGE['convnet2'], 6, 5)
  kernel = _kernel('convnet2')
  expected = kernel.block(x, x), kernel.block(x, y), *kernel.block_vjp(x, y, cotangent)
  kernel = _kernel('convnet2', table_bytes=1)  # One at a time.
  parts = kernel.block(x, x), kernel.block(x, y), *kernel.block_vjp(x, y, cotangent)
  for value, whole in zip(parts, expected):
    np.testing.assert_array_equal(value, whole)


@compiled
def test_what_does_not_fit_in_shared_memory_gives_the_same_bits():
  x1, x2, cotangent = _images(IMAGE['convnet2'], 2, 3)
  results = [
    _kernel('convnet2', shared_bytes=size).block_vjp(x1, x2, cotangent) for size in (2**20, 0)
  ]
  for fits, does_not in zip(*results):
    np.testing.assert_array_equal(fits, does_not)


@compiled
@pytest.mark.parametrize(
  'stages, shape',
  [
    # More convolutions than are unrolled.
    ([{'convs': 6, 'pool': True}, {'convs': 1, 'pool': False}], (8, 6, 1)),
    ([{'convs': 1, 'pool': True}], (4, 5, 9)),  # more channels
  ],
)
def test_unusual_networks(stages, shape):
  x1, x2, cotangent = _images(shape, 2, 3)
  block, gradient = emulated({'stages': stages}, 'float64').block_vjp(x1, x2, cotangent)
  peer = 'native' if build.is_built() else 'jax'
  expected = registry.make_kernel(
    {'stages': stages}, implementation=peer, dtype='float64'
  ).block_vjp(x1, x2, cotangent)
  assert error(block, expected[0]) <= 1e-12
  assert error(gradient, expected[1]) <= 1e-10


@compiled
def test_groups_of_threads_that_do_not_fill_a_block():
  """At 14x14, 49 patches: three groups of 64, and a warp that is idle."""
  x1, x2, cotangent = _images((28, 28, 1), 1, 2)
  network = architectures.get({'stages': [{'convs': 1, 'pool': True}, {'convs': 2, 'pool': True}]})
  whole, one = (
    emulated(network, 'float64', threads=threads).block_vjp(x1, x2, cotangent)
    for threads in (224, 1)
  )
  for value, expected in zip(whole, one):
    assert error(value, expected) <= 1e-12


@pytest.mark.parametrize('width', [16, 32, 64])
def test_threads_do_not_meet_in_a_bank_of_shared_memory(width):
  columns, stride = width // 2, planning.exchange_stride(width, 2)
  banks = [(lane // columns * 4 * stride + lane % columns) % 32 for lane in range(32)]
  assert stride > columns and len(set(banks)) == 32


def test_without_a_gpu(monkeypatch):
  monkeypatch.setattr(cuda, 'is_available', lambda: False)
  cuda.current_gpu.cache_clear()
  with pytest.raises(
    ValueError,
    match='the CUDA kernel needs CuPy and a GPU with its driver; `make cuda` installs CuPy',
  ):
    registry.make_kernel('convnet', implementation='cuda')
  assert 'cuda' not in registry.available()


@compiled
def test_auto_takes_a_gpu_and_names_it(monkeypatch):
  monkeypatch.setattr(cuda, 'is_available', lambda: True)
  monkeypatch.setattr(cuda, 'current_gpu', emulator.Emulator)
  kernel = registry.make_kernel('convnet')
  assert (kernel.implementation, kernel.device) == ('cuda', 'emulator')


NVRTC = nvrtc.library()


@pytest.mark.skipif(
  NVRTC is None, reason='NVRTC is not installed (nvidia-cuda-nvrtc-cu12: `make cuda`)'
)
@pytest.mark.parametrize('gpu', ['sm_75', 'sm_90'])
@pytest.mark.parametrize(
  'architecture, shape, dtype',
  [
    ('convnet', (32, 32, 3), 'float32'),
    ('myrtle5', (9, 7, 2), 'float64'),
    ('fc2', (8, 8, 1), 'float32'),
    ({'stages': [{'convs': 1, 'pool': True}], 'hidden': 1, 'b_std': 0.0}, (8, 8, 1), 'float32'),
  ],
)
def test_nvrtc_compiles_the_source(architecture, shape, dtype, gpu):
  plan = planning.make_plan(
    architectures.get(architecture), shape, dtype, 'ntk', planning.THREADS, 2**16
  )
  assert NVRTC is not None
  cubin, log = nvrtc.compile_source(
    NVRTC, plan.source, [*cuda.OPTIONS, f'--gpu-architecture={gpu}']
  )
  assert cubin.startswith(b'\x7fELF') and 'warning' not in log
