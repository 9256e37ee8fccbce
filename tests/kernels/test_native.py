"""The native kernel's own: instruction sets, threads, memory, and its absence."""

import hypothesis
import numpy as np
import pytest
from dense_oracle import dense_ntk
from hypothesis import strategies as st
from implementations import error

from kernels import architectures, checked, registry
from kernels.native import build
from kernels.native import kernel as native

IMAGE = {'convnet': (9, 8, 3), 'myrtle5': (8, 9, 1), 'fc2': (5, 4, 2)}

built = pytest.mark.skipif(not build.is_built(), reason='the native kernel is not built')


def _images(architecture, *counts, dtype='float32'):
  rng = np.random.default_rng(0)
  return [rng.standard_normal((n, *IMAGE[architecture])).astype(dtype) for n in counts]


def _kernel(architecture, dtype='float32', threads=2):
  return registry.make_kernel(architecture, implementation='native', dtype=dtype, threads=threads)


INSTRUCTION_SETS = native.supported_instruction_sets() if build.is_built() else []


@built
@pytest.mark.parametrize('instruction_set', INSTRUCTION_SETS)
@pytest.mark.parametrize('architecture', IMAGE)
def test_instruction_sets_agree(monkeypatch, architecture, instruction_set):
  x1, x2, cotangent = (
    *_images(architecture, 3, 18),
    np.random.default_rng(1).standard_normal((3, 18)),
  )
  expected = _kernel(architecture, 'float64').block_vjp(x1, x2, cotangent)
  monkeypatch.setenv('KIP_INSTRUCTION_SET', instruction_set)
  for dtype, block_tolerance, gradient_tolerance in (
    ('float32', 1e-6, 5e-6),
    ('float64', 1e-13, 1e-12),
  ):
    kernel = _kernel(architecture, dtype)
    assert kernel.instruction_set == instruction_set
    block, gradient = kernel.block_vjp(x1, x2, cotangent)
    assert error(block, expected[0]) <= block_tolerance
    assert error(gradient, expected[1]) <= gradient_tolerance


@built
@pytest.mark.parametrize('instruction_set', INSTRUCTION_SETS)
@pytest.mark.parametrize('architecture', IMAGE)
def test_identical_images_do_not_see_the_cusp(monkeypatch, architecture, instruction_set):
  monkeypatch.setenv('KIP_INSTRUCTION_SET', instruction_set)
  (x,) = _images(architecture, 17)
  expected = _kernel(architecture, 'float64').block_vjp(x, x.copy(), np.eye(17))
  block, gradient = _kernel(architecture).block_vjp(x, x.copy(), np.eye(17))
  assert error(block, expected[0]) <= 1e-6
  assert error(gradient, expected[1]) <= 5e-6


@built
@pytest.mark.parametrize('architecture', IMAGE)
def test_bits_do_not_depend_on_threads(architecture):
  x1, x2 = _images(architecture, 5, 70)
  results = []
  for threads in (1, 2, 3, 8):
    kernel = _kernel(architecture, threads=threads)
    results.append(
      [
        kernel.block(x1, x2),
        kernel.block(x2, x2),
        *kernel.block_vjp(x1, x2, np.ones((5, 70))),
        *kernel.block_vjp(x1, x2, lambda block: np.cos(block)),
      ]
    )
  for other in results[1:]:
    for value, expected in zip(other, results[0], strict=True):
      np.testing.assert_array_equal(value, expected)


@built
@pytest.mark.parametrize('architecture', IMAGE)
def test_blocks_are_the_same_whatever_is_computed_beside_them(architecture):
  x1, x2 = _images(architecture, 4, 37)
  kernel = _kernel(architecture)
  whole, prepared = kernel.block(x1, x2), kernel.prepare(x2)
  np.testing.assert_array_equal(kernel.block(x1, prepared), whole)
  np.testing.assert_array_equal(kernel.block(x1[1:3], prepared[5:21]), whole[1:3, 5:21])
  np.testing.assert_array_equal(kernel.block_vjp(x1, prepared, whole)[0], whole)


@built
@pytest.mark.parametrize('architecture', IMAGE)
def test_a_symmetric_block_is_the_block(architecture):
  (x,) = _images(architecture, 41)
  kernel = _kernel(architecture)
  block = kernel.block(x, x)
  np.testing.assert_array_equal(block, block.T)
  assert error(block, kernel.block(x, x.copy())) <= 1e-6


@built
@pytest.mark.parametrize('kept_bytes', [0, 2**30])
def test_a_cotangent_that_is_a_function(kept_bytes):
  network = architectures.get('convnet')
  kernel = checked.wrap(
    lambda dtype: native.NativeKernel(network, dtype, 2, derivatives_bytes=kept_bytes), 'float64'
  )
  x1, x2 = _images('convnet', 3, 20, dtype='float64')
  block, gradient = kernel.block_vjp(x1, x2, np.sin)
  expected = kernel.block_vjp(x1, x2, np.sin(block))
  np.testing.assert_array_equal(block, expected[0])
  np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=1e-13 * np.abs(expected[1]).max())


@built
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
  height=st.integers(1, 9),
  width=st.integers(1, 9),
  depth=st.integers(2, 5),
  convs=st.lists(st.integers(0, 2), max_size=3),
  readout=st.sampled_from(architectures.READOUTS),
  hidden=st.integers(0, 1),
  b_std=st.sampled_from([0.0, 0.1]),
  blank=st.booleans(),
  seed=st.integers(0, 2**32 - 1),
)
def test_any_size_and_network(height, width, depth, convs, readout, hidden, b_std, blank, seed):
  """Against all pixel pairs in long double.

  `blank`: one image is zero, where only K is defined without a bias.
  """
  # Else the mean of an image, which may be all cancellation, decides alone.
  hypothesis.assume(b_std or any(convs))
  pools = min(len(convs), min(height, width).bit_length() - 1)
  stages = [{'convs': n, 'pool': i < pools} for i, n in enumerate(convs)]
  architecture = architectures.get(
    {'stages': stages, 'readout': readout, 'hidden': hidden, 'b_std': b_std}
  )
  rng = np.random.default_rng(seed)
  x1, x2 = (
    rng.standard_normal((2, height, width, depth)),
    rng.standard_normal((3, height, width, depth)),
  )
  x2[0] = 0 if blank else x1[0]
  cotangent = rng.standard_normal((2, 3))
  block, gradient = _kernel(architecture, 'float64').block_vjp(x1, x2, cotangent)
  single_block, single_gradient = _kernel(architecture).block_vjp(
    x1.astype(np.float32), x2.astype(np.float32), cotangent
  )
  expected = np.array([[dense_ntk(architecture, a, b) for b in x2] for a in x1])
  assert error(block, expected) <= 1e-10
  assert error(single_block, expected) <= 1e-6
  assert np.isfinite(gradient).all() and error(single_gradient, gradient) <= 5e-6


@built
def test_zero_variances_are_neural_tangents():
  """Without a bias: dot is 1/4 where a variance is 0."""
  x1, x2 = _images('convnet', 1, 2, dtype='float64')
  x1[:, :5], x2[0, :, 3:] = 0, 0
  architecture = architectures.get(
    {'stages': [{'convs': 2, 'pool': True}, {'convs': 1, 'pool': False}], 'b_std': 0.0}
  )
  cotangent = np.array([[1.0, -0.5]])
  expected = registry.make_kernel(
    architecture, implementation='reference', dtype='float64'
  ).block_vjp(x1, x2, cotangent)
  for dtype, tolerances in (('float32', (1e-6, 5e-6)), ('float64', (1e-10, 1e-8))):
    block, gradient = _kernel(architecture, dtype).block_vjp(x1, x2, cotangent)
    assert error(block, expected[0]) <= tolerances[0]
    assert error(gradient, expected[1]) <= tolerances[1]


@built
def test_sums_in_rounds_are_the_sum():
  """The parts' gradients add up where one round of units (64 MB of pieces) does not do."""
  kernel = registry.make_kernel('conv1', implementation='native', dtype='float64', threads=2)
  rng = np.random.default_rng(0)
  x1, x2 = rng.standard_normal((64, 32, 32, 3)), rng.standard_normal((300, 32, 32, 3))
  cotangent = rng.standard_normal((64, 300))
  _, gradient = kernel.block_vjp(x1, x2, cotangent)
  parts = [
    kernel.block_vjp(x1, x2[j : j + 100], cotangent[:, j : j + 100])[1] for j in range(0, 300, 100)
  ]
  np.testing.assert_allclose(gradient, sum(parts), rtol=0, atol=1e-12 * np.abs(gradient).max())


@built
def test_unknown_instruction_set(monkeypatch):
  monkeypatch.setenv('KIP_INSTRUCTION_SET', 'mmx')
  with pytest.raises(ValueError, match='KIP_INSTRUCTION_SET: expected one of .*, got .mmx.'):
    _kernel('convnet')


def test_not_built(monkeypatch):
  monkeypatch.setattr(build, 'find', lambda instruction_set: None)
  monkeypatch.setattr(build, 'is_built', lambda: False)
  native.load.cache_clear()
  message = (
    'the native kernel is not built; build it by `python -m kernels.native.build` '
    r'\(needs x86-64 or 64-bit Arm, and a C\+\+17 compiler\)'
  )
  with pytest.raises(ValueError, match=message):
    _kernel('convnet')
  said = []
  monkeypatch.setattr(
    registry.logging, 'log_first_n', lambda level, message, times: said.append((message, times))
  )
  assert registry.make_kernel('convnet').implementation == 'jax'
  ((message, times),) = said
  assert times == 1 and 'using the JAX kernel' in message


@pytest.mark.parametrize(
  'machine, expected',
  [
    ('x86_64', ('avx512', 'avx2', 'portable')),
    ('aarch64', ('neon',)),  # Linux
    ('arm64', ('neon',)),  # macOS
    ('riscv64', ()),
  ],
)
def test_instruction_sets_of_a_machine(machine, expected):
  assert build.instruction_sets(machine) == expected


def test_no_compiler(monkeypatch, tmp_path):
  assert 'riscv64 is neither x86-64 nor 64-bit Arm' in build.build(tmp_path, machine='riscv64')
  assert not build.is_built(machine='riscv64')
  monkeypatch.setenv('CXX', '/nowhere/c++')
  assert 'no C++ compiler' in build.build(tmp_path)
  assert not list(tmp_path.iterdir())


@built
@pytest.mark.parametrize('compiler', ['/nowhere/c++', 'false', 'echo another compiler', 'c++'])
def test_a_library_is_found_whatever_compiler_there_is(monkeypatch, tmp_path, compiler):
  monkeypatch.setenv('CXX', compiler)
  if compiler == 'c++':
    monkeypatch.delenv('CXX')
    monkeypatch.setenv('PATH', str(tmp_path))  # has none
  assert build.is_built() and 'up to date' in build.build()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  assert 'cannot be written (Not a directory)' in build.build(tmp_path / 'file' / 'build')


@built
def test_a_changed_source_is_not_built(tmp_path):
  (tmp_path / 'ffi.cc').write_text('changed')
  assert not build.is_built(sources=tmp_path)


@built
def test_the_table_has_a_variance_per_relu_input_and_two_values_per_pooled_pixel():
  stages = [{'convs': 1, 'pool': True}, {'convs': 2, 'pool': False}, {'convs': 1, 'pool': True}]
  kernel = native.NativeKernel(architectures.get({'stages': stages, 'hidden': 2}), 'float32', 1)
  # A hidden layer follows the last pooling.
  variances, pooled = 7 * 6 + 3 * 3 * 3, 2 * (3 * 3 + 1)
  table, readouts = kernel.prepare(np.ones((2, 7, 6, 1), np.float32)).variances
  assert table.shape == (2, variances + pooled)
  assert readouts.shape == (2, 2) and readouts.dtype == np.float64


@built
@pytest.mark.parametrize('instruction_set', INSTRUCTION_SETS)
def test_subnormal_numbers_are_flushed(monkeypatch, instruction_set):
  monkeypatch.setenv('KIP_INSTRUCTION_SET', instruction_set)
  kernel = native.NativeKernel(architectures.get('fc1'), 'float32', 2)
  # Several vectors of images, for several threads; their squares are no subnormal float64.
  assert not kernel.prepare(np.full((70, 2, 2, 1), 1e-40, np.float32)).variances[1].any()
  assert kernel.prepare(np.full((70, 2, 2, 1), 1e-30, np.float32)).variances[1][:, 0].all()
