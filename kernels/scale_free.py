"""Kernels without biases, for images whose values may be of any size."""

from collections.abc import Callable

import numpy as np

from kernels.contract import Cotangent, Images, Linearised, Prepared, Wrapper


class ScaleFree(Wrapper):
  """A kernel without biases, for which K(a x, b y) = a b K(x, y).

  Powers of two, which change no digit, bring each image's largest value to between 1/2 and 1. So no
  variance under- or overflows, and none is lost beside that of an image very much brighter.
  """

  def prepare(self, x: np.ndarray) -> Prepared:
    """See `Kernel.prepare`; the exponents [N] of the powers are the last of the variances."""
    scaled, exponents = _scaled(x)
    return Prepared(x, [*self.inner.prepare(scaled).variances, exponents], self)

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """See `Kernel.block`."""
    (x1, e1), (x2, e2) = self._pair(x1, x2)
    return np.ldexp(self.inner.block(x1, x2), e1[:, None] + e2)

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Kernel.block_vjp`."""
    (x1, e1), (x2, e2) = self._pair(x1, x2)
    scaled = _of_scaled(cotangent, e1, e2) if callable(cotangent) else np.ldexp(cotangent, e2)
    block, gradient = self.inner.block_vjp(x1, x2, scaled)
    return np.ldexp(block, e1[:, None] + e2), gradient

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """See `Kernel.linearise`."""
    (x1, e1), (x2, e2) = self._pair(x1, x2)
    block, pull_back, nbytes = self.inner.linearise(x1, x2)
    return Linearised(
      np.ldexp(block, e1[:, None] + e2),
      lambda cotangent: pull_back(np.ldexp(cotangent, e2)),
      nbytes,
    )

  def _pair(self, x1, x2):
    first = self._scaled(x1)
    return first, first if x2 is x1 else self._scaled(x2)

  def _scaled(self, x: Images) -> tuple[Images, np.ndarray]:
    """The images of `_scaled`, and their exponents, from those prepared where x is."""
    if not isinstance(x, Prepared):
      return _scaled(x)
    *variances, exponents = x.variances
    return Prepared(_times_powers(x.images, -exponents), variances, self.inner), exponents


def _of_scaled(
  cotangent: Callable[[np.ndarray], np.ndarray], e1: np.ndarray, e2: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """The same cotangent, as a function of the scaled images' block."""
  return lambda block: np.ldexp(cotangent(np.ldexp(block, e1[:, None] + e2)), e2)


def _scaled(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Images with largest values between 1/2 and 1, and the powers [N] of 2 taken from them."""
  exponents = np.frexp(np.abs(x).max(axis=(1, 2, 3)))[1]
  return _times_powers(x, -exponents), exponents


def _times_powers(x: np.ndarray, exponents: np.ndarray) -> np.ndarray:
  return np.ldexp(x, exponents[:, None, None, None])
