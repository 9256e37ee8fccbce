"""Kernels without biases, for images whose values may be of any size."""

import numpy as np

from kernels.contract import Images, Kernel, Linearised, Prepared


class ScaleFree:
  """A kernel without biases, K(a x, b y) = a b K(x, y), of images whose values may be of any size.

  Powers of two, which change no digit, bring each image's largest value to between 1/2 and 1. So no
  variance under- or overflows, and none is lost beside that of an image very much brighter.
  """

  def __init__(self, kernel: Kernel):
    self._kernel = kernel

  def __getattr__(self, name):
    return getattr(self._kernel, name)

  def prepare(self, x):
    scaled, exponents = _scaled(x)
    return Prepared(x, [*self._kernel.prepare(scaled).variances, exponents], self)

  def block(self, x1, x2):
    (x1, e1), (x2, e2) = self._pair(x1, x2)
    return np.ldexp(self._kernel.block(x1, x2), e1[:, None] + e2)

  def block_vjp(self, x1, x2, cotangent):
    (x1, e1), (x2, e2) = self._pair(x1, x2)
    if callable(cotangent):
      inner = lambda block: np.ldexp(cotangent(np.ldexp(block, e1[:, None] + e2)), e2)
    else:
      inner = np.ldexp(cotangent, e2)
    block, gradient = self._kernel.block_vjp(x1, x2, inner)
    return np.ldexp(block, e1[:, None] + e2), gradient

  def linearise(self, x1, x2):
    (x1, e1), (x2, e2) = self._pair(x1, x2)
    block, pull_back, nbytes = linearised(self._kernel, x1, x2)
    return Linearised(
      np.ldexp(block, e1[:, None] + e2),
      lambda cotangent: pull_back(np.ldexp(cotangent, e2)),
      nbytes,
    )

  def _pair(self, x1, x2):
    first = self._scaled(x1)
    return first, first if x2 is x1 else self._scaled(x2)

  def _scaled(self, x):
    if not isinstance(x, Prepared):
      return _scaled(x)
    *variances, exponents = x.variances
    return Prepared(_times_powers(x.images, -exponents), variances, self._kernel), exponents


def linearised(kernel, x1: Images, x2: Images) -> Linearised:
  """`Kernel.linearise`, also of an implementation that has none of its own."""
  if hasattr(kernel, 'linearise'):
    return kernel.linearise(x1, x2)
  pull_back = lambda cotangent: kernel.block_vjp(x1, x2, cotangent)[1]
  return Linearised(kernel.block(x1, x2), pull_back, _pixels(x2).nbytes)


def _scaled(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Images with largest values between 1/2 and 1, and the powers [N] of 2 that they lack."""
  exponents = np.frexp(np.abs(x).max(axis=(1, 2, 3)))[1]
  return _times_powers(x, -exponents), exponents


def _times_powers(x: np.ndarray, exponents: np.ndarray) -> np.ndarray:
  return np.ldexp(x, exponents[:, None, None, None])


def _pixels(x: Images) -> np.ndarray:
  return x.images if isinstance(x, Prepared) else x
