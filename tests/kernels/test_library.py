"""A library of images gives the bits that the images themselves give."""

import time
from concurrent import futures

import numpy as np
import pytest

from kernels import contract, registry
from kernels.library import Library


class _Counting(contract.Wrapper):
  """A kernel that counts the images it prepares."""

  def __init__(self, inner):
    super().__init__(inner)
    self.count = 0

  def prepare(self, x):
    self.count += len(x)
    return super().prepare(x)


@pytest.mark.parametrize('implementation', registry.available())
@pytest.mark.parametrize('architecture', ['convnet2', 'fc2'])
def test_same_bits_whatever_was_asked_for_before(implementation, architecture):
  rng = np.random.default_rng(0)
  # Several tiles of the JAX kernel's variances, of pairs always the same shape: compiled once.
  images, support = (rng.normal(size=(n, 9, 7, 2)).astype(np.float32) for n in (40, 3))
  kernel = _Counting(registry.make_kernel(architecture, implementation=implementation, threads=1))
  library = Library(kernel, images)
  for chosen in (
    np.array([5]),
    np.array([37, 3, 5, 11, 39, 7, 8]),
    slice(0, 13),
    np.arange(40)[::-1],
  ):
    block, gradient = kernel.inner.block_vjp(support, library[chosen], np.cos)
    expected_block, expected_gradient = kernel.inner.block_vjp(support, images[chosen], np.cos)
    assert block.tobytes() == expected_block.tobytes()
    assert gradient.tobytes() == expected_gradient.tobytes()
  assert kernel.count == len(images)


class _Slow(_Counting):
  """A kernel that takes its time, so that threads meet in it."""

  def prepare(self, x):
    time.sleep(0.05)
    return super().prepare(x)


def test_threads_that_ask_at_once_get_what_they_asked_for():
  images = np.random.default_rng(0).normal(size=(40, 5, 4, 1)).astype(np.float32)
  kernel = _Slow(registry.make_kernel('convnet1', implementation='jax', threads=1))
  library = Library(kernel, images)
  parts = [slice(0, 20), slice(10, 30), slice(20, 40), slice(0, 40)]
  with futures.ThreadPoolExecutor(len(parts)) as threads:
    found = list(threads.map(library.__getitem__, parts))
  for part, prepared in zip(parts, found):
    expected = kernel.inner.prepare(images[part])
    assert prepared.images.tobytes() == images[part].tobytes()
    for q, wanted in zip(prepared.variances, expected.variances, strict=True):
      assert q.tobytes() == wanted.tobytes()
  assert kernel.count == len(images)
