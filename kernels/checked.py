"""Checks around an implementation, and float64 where float32 is not enough."""

import functools
from concurrent import futures
from typing import Callable

import numpy as np

from kernels import contract, scale_free
from kernels.contract import Images, Kernel, Linearised, Prepared

# Pairs of images that float32 cannot do take float64. Those nearly coincide whose squared distance
# is below _NEAR times the mean of their squared norms, plus _NEAR_BIAS times the first layer's
# bias: rounding then shows in their 1 - c, and near the cusp of ReLU's dot the gradient does not
# fade with the difference. Where squared norms, with that bias, are in a ratio above _FAR, the
# covariance is lost beside the larger variance. Without biases lengths do not matter (see
# ScaleFree), but angles.
_NEAR = 0.01
_NEAR_BIAS = 0.1
_FAR = 50.0
_LARGE = 1e15  # mean squares above this: products of variances might overflow float32
_PEAK = 1e70  # and of values above this, float64


class Checked:
  """Checks and casts what goes into an implementation, and checks what comes out of it; has float64
  for the pairs that float32 cannot do."""

  def __init__(
    self, kernel: Kernel, make_double: Callable[[], Kernel] | None = None, is_delicate: bool = False
  ):
    """`make_double`: the same kernel in float64; `is_delicate`: whether it is ever needed."""
    self._kernel, self._make_double, self._is_delicate = (
      kernel,
      make_double and functools.cache(make_double),
      is_delicate,
    )
    self._bias = (kernel.architecture.b_std / kernel.architecture.w_std) ** 2
    self._search = futures.ThreadPoolExecutor(1)  # beside the kernel: a fast GPU would wait for it
    self.implementation, self.architecture, self.dtype = (
      kernel.implementation,
      kernel.architecture,
      kernel.dtype,
    )
    self.instruction_set, self.device = (
      getattr(kernel, 'instruction_set', ''),
      getattr(kernel, 'device', ''),
    )
    self.kept_bytes = getattr(kernel, 'kept_bytes', contract.KEPT_BYTES)

  def prepare(self, x):
    return self._kernel.prepare(self._checked_images('x', x))

  def block(self, x1, x2):
    x1, x2 = self._images(x1, x2)
    near = self._search.submit(self._near, x1, x2)
    return self._finite_block(self._kernel.block(x1, x2), x1, x2, near.result())

  def block_vjp(self, x1, x2, cotangent):
    x1, x2 = self._images(x1, x2)
    near = self._search.submit(self._near, x1, x2)
    checked = functools.partial(self._cotangent, (len(x1), len(x2)))
    if not callable(cotangent) and not near.result():
      value = checked(cotangent)
      block, gradient = self._kernel.block_vjp(x1, x2, value)
      return (
        self._finite_block(block, x1, x2, []),
        self._finite_gradient(gradient, x1, x2, [], value),
      )
    mended = value = None

    def rest(block):
      nonlocal mended, value
      mended = self._finite_block(block, x1, x2, near.result())
      value = checked(cotangent(mended) if callable(cotangent) else cotangent)
      return _without(value, near.result())

    gradient = self._kernel.block_vjp(x1, x2, rest)[1]
    return mended, self._finite_gradient(gradient, x1, x2, near.result(), value)

  def linearise(self, x1, x2):
    x1, x2 = self._images(x1, x2)
    search = self._search.submit(self._near, x1, x2)
    block, pull_back, nbytes = scale_free.linearised(self._kernel, x1, x2)
    near = search.result()

    def checked_pull_back(cotangent):
      cotangent = self._cotangent(block.shape, cotangent)
      gradient = pull_back(_without(cotangent, near))
      return self._finite_gradient(gradient, x1, x2, near, cotangent)

    return Linearised(self._finite_block(block, x1, x2, near), checked_pull_back, nbytes)

  def _near(self, x1, x2) -> list[tuple[int, np.ndarray]]:
    """Pairs that float32 is not enough for: rows that have some, and their columns. An image and
    itself are none: they are exact."""
    if not self._is_delicate:
      return []
    a, b = (_pixels(x).reshape(len(x), -1) for x in (x1, x2))
    if not self._bias:
      a, b = (v.astype(np.float64) for v in (a, b))  # of any size, see ScaleFree
    squares = [np.einsum('np,np->n', v, v) for v in (a, b)]
    # A little more than asked for: these sums are float32's. Then each pair is judged alone: no
    # tile may change what is done.
    with np.errstate(over='ignore', invalid='ignore'):
      candidates = self._needs_double(squares[0][:, None], squares[1], a @ b.T, a.shape[1], 1.01)

    def is_near(i, j):
      x, y = a[i].astype(np.float64), b[j].astype(np.float64)
      return not np.array_equal(x, y) and self._needs_double(x @ x, y @ y, x @ y, len(x))

    rows = [
      (i, [j for j in np.flatnonzero(candidates[i]) if is_near(i, j)])
      for i in np.flatnonzero(candidates.any(axis=1))
    ]
    return [(i, np.array(columns)) for i, columns in rows if columns]

  def _needs_double(self, square1, square2, product, size, slack=1.0):
    """Whether pairs are near or far; from the sums of two images' squares and of their products."""
    if not self._bias:
      cosine = np.sqrt(square1) * np.sqrt(square2)
      return (np.abs(product) >= (1 - slack * _NEAR / 2) * cosine) & (cosine > 0)
    bias = size * self._bias
    near = square1 + square2 - 2 * product
    near = near <= slack * (_NEAR * (square1 + square2) / 2 + _NEAR_BIAS * bias)
    larger, smaller = np.maximum(square1, square2) + bias, np.minimum(square1, square2) + bias
    return near | (slack * larger >= np.minimum(_FAR * smaller, size * _LARGE))

  def _finite_block(self, block, x1, x2, near):
    """The block with its `near` entries by float64; all of them, where float32 overflows."""
    with np.errstate(over='ignore'):  # `_finite` says so
      block = self._mended(block, x1, x2, near)
    return self._finite(block, x1, x2, lambda *images: self._make_double().block(*images))

  def _finite_gradient(self, gradient, x1, x2, near, cotangent):
    """As `_finite_block`, of a gradient that lacks the `near` entries' part."""
    with np.errstate(over='ignore', invalid='ignore'):
      gradient = self._mended_gradient(gradient, x1, x2, near, cotangent)
    return self._finite(
      gradient, x1, x2, lambda *images: self._make_double().block_vjp(*images, cotangent)[1]
    )

  def _finite(self, value, x1, x2, in_double):
    if not np.isfinite(value).all() and self.dtype == np.float32:
      with np.errstate(over='ignore'):
        value = in_double(_pixels(x1), _pixels(x2)).astype(np.float32)
    if not np.isfinite(value).all():
      raise self._too_large(_pixels(x1), _pixels(x2))
    return value

  def _too_large(self, *images):
    peak = max(np.abs(x).max() for x in images)
    return ValueError(
      f'images: values up to {peak:.3g} are too large for this kernel in '
      f'{self.dtype}; scale them down.'
    )

  def _mended(self, block, x1, x2, near):
    """The block with its `near` entries by float64."""
    block = np.array(block) if near else block
    for i, columns in near:
      columns = columns[columns > i] if x1 is x2 else columns
      if len(columns):
        block[i, columns] = self._make_double().block(
          _pixels(x1)[i : i + 1], _pixels(x2)[_padded(columns)]
        )[0, : len(columns)]
        if x1 is x2:
          block[columns, i] = block[i, columns]
    return block

  def _mended_gradient(self, gradient, x1, x2, near, cotangent):
    """A gradient that lacks the `near` entries' part, with that by float64."""
    gradient = np.array(gradient) if near else gradient
    for i, columns in near:
      row = np.zeros((1, len(_padded(columns))))
      row[0, : len(columns)] = cotangent[i, columns]
      gradient[i] += self._make_double().block_vjp(
        _pixels(x1)[i : i + 1], _pixels(x2)[_padded(columns)], row
      )[1][0]
    return gradient

  def _cotangent(self, shape, value):
    value = np.asarray(value, self.dtype)
    if value.shape != shape:
      raise ValueError(f'cotangent: expected shape {shape}, got {value.shape}.')
    return value

  def _images(self, x1, x2):
    first = self._checked_images('x1', x1)
    images = [first, first if x2 is x1 else self._checked_images('x2', x2)]
    shapes = [_pixels(x).shape[1:] for x in images]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f'x1 and x2: images must have the same [H, W, D], got {shapes[0]} and {shapes[1]}.'
      )
    return images

  def _checked_images(self, name, x):
    if isinstance(x, Prepared):
      if x.kernel is not self._kernel:
        raise ValueError(f'{name}: was prepared by another kernel.')
      return x
    x = np.asarray(x, self.dtype)
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f'{name}: expected images [N, H, W, D] with nothing empty, got shape {x.shape}.'
      )
    if not np.isfinite(x).all():
      raise ValueError(
        f'{name}: contains NaN or infinity in image {int(np.nonzero(~np.isfinite(x))[0][0])}.'
      )
    self.architecture.check_image_size(*x.shape[1:3])
    if self._bias and np.abs(x).max() > _PEAK:
      raise self._too_large(x)
    return x


def _pixels(x: Images) -> np.ndarray:
  return x.images if isinstance(x, Prepared) else x


def _without(cotangent: np.ndarray, near: list[tuple[int, np.ndarray]]) -> np.ndarray:
  """The cotangent, 0 at some entries."""
  cotangent = np.array(cotangent) if near else cotangent
  for i, columns in near:
    cotangent[i, columns] = 0
  return cotangent


def _padded(columns: np.ndarray) -> np.ndarray:
  """As many columns as vectors have lanes, or a multiple: some twice. Few shapes are few
  compilations, too."""
  return np.resize(columns, -(-len(columns) // 8) * 8)
