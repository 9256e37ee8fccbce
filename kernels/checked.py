"""Checks around an implementation, and float64 where float32 is not enough."""

import functools
from collections.abc import Callable
from concurrent import futures

import numpy as np

from kernels import near_pairs
from kernels.contract import Cotangent, Images, Kernel, Linearised, Prepared, Wrapper, pixels
from kernels.scale_free import ScaleFree

_PEAK = 1e70  # Products of larger values might overflow float64.


def wrap(make: Callable[[str], Kernel], dtype: str) -> 'Checked':
  """Checks around the implementation that `make` makes for `dtype`, or for 'float64'.

  Made for 'float64' when float32 is first not enough.
  """

  def scaled(dtype: str) -> Kernel:
    kernel = make(dtype)
    return kernel if kernel.architecture.b_std else ScaleFree(kernel)

  @functools.cache
  def double() -> Checked:
    return Checked(scaled('float64'), double)

  kernel = scaled(dtype)
  is_delicate = (
    dtype == 'float32'
    and kernel.implementation != 'reference'
    and kernel.architecture.is_convolutional
    and kernel.architecture.has_relu
  )
  return Checked(kernel, double, is_delicate)


class Checked(Wrapper):
  """Checks and casts what goes into a kernel, and checks what comes out of it.

  Pairs of images for which float32 is not enough, and all that overflows in it, take float64.

  Raises:
    ValueError: by every method, for images that are not [N, H, W, D] with nothing empty, of unequal
      [H, W, D], too small for the network's poolings, with NaN or infinity, or so large that
      float64 overflows; for those prepared by another kernel; and for a cotangent of another shape.
  """

  def __init__(self, inner: Kernel, make_double: Callable[[], Kernel], is_delicate: bool = False):
    """`is_delicate`: whether some pairs of images need the kernel of `make_double`, in float64."""
    super().__init__(inner)
    self._double, self._is_delicate = functools.cache(make_double), is_delicate
    self._bias = (inner.architecture.b_std / inner.architecture.w_std) ** 2
    self._search = futures.ThreadPoolExecutor(1)  # Beside the kernel: a fast GPU would wait for it.

  def prepare(self, x: np.ndarray) -> Prepared:
    """See `Kernel.prepare`."""
    return self.inner.prepare(pixels(self._checked_images('x', x)))

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """See `Kernel.block`."""
    x1, x2 = self._checked_pair(x1, x2)
    near = self._search.submit(self._near, x1, x2)
    return self._finite_block(self.inner.block(x1, x2), x1, x2, near.result())

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Kernel.block_vjp`; a function gets the block as it is returned."""
    x1, x2 = self._checked_pair(x1, x2)
    near = self._search.submit(self._near, x1, x2)
    shape = len(x1), len(x2)
    if not callable(cotangent) and not near.result():
      value = self._checked_cotangent(shape, cotangent)
      block, gradient = self.inner.block_vjp(x1, x2, value)
      block = self._finite_block(block, x1, x2, [])
      return block, self._finite_gradient(gradient, x1, x2, [], value)
    known = []

    def rest(block: np.ndarray) -> np.ndarray:
      block = self._finite_block(block, x1, x2, near.result())
      value = cotangent(block) if callable(cotangent) else cotangent
      known[:] = block, self._checked_cotangent(shape, value)
      return near_pairs.without(known[1], near.result())

    _, gradient = self.inner.block_vjp(x1, x2, rest)
    block, value = known
    return block, self._finite_gradient(gradient, x1, x2, near.result(), value)

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """See `Kernel.linearise`."""
    x1, x2 = self._checked_pair(x1, x2)
    search = self._search.submit(self._near, x1, x2)
    block, pull_back, nbytes = self.inner.linearise(x1, x2)
    near = search.result()

    def checked_pull_back(cotangent: np.ndarray) -> np.ndarray:
      cotangent = self._checked_cotangent(block.shape, cotangent)
      gradient = pull_back(near_pairs.without(cotangent, near))
      return self._finite_gradient(gradient, x1, x2, near, cotangent)

    return Linearised(self._finite_block(block, x1, x2, near), checked_pull_back, nbytes)

  def _near(self, x1: Images, x2: Images) -> near_pairs.Pairs:
    return near_pairs.find(pixels(x1), pixels(x2), self._bias) if self._is_delicate else []

  def _finite_block(self, block, x1: Images, x2: Images, near: near_pairs.Pairs) -> np.ndarray:
    """The block with its `near` entries in float64; all of them, where float32 overflows."""
    with np.errstate(over='ignore'):  # `_finite` says so.
      block = self._mended_block(block, x1, x2, near)
    return self._finite(block, x1, x2, lambda a, b: self._double().block(a, b))

  def _finite_gradient(
    self, gradient, x1: Images, x2: Images, near: near_pairs.Pairs, cotangent: np.ndarray
  ) -> np.ndarray:
    """As `_finite_block`, for a gradient that lacks the `near` entries' part."""
    with np.errstate(over='ignore', invalid='ignore'):
      gradient = self._mended_gradient(gradient, x1, x2, near, cotangent)
    return self._finite(gradient, x1, x2, lambda a, b: self._double().block_vjp(a, b, cotangent)[1])

  def _finite(
    self,
    value: np.ndarray,
    x1: Images,
    x2: Images,
    in_double: Callable[[np.ndarray, np.ndarray], np.ndarray],
  ) -> np.ndarray:
    if not np.isfinite(value).all() and self.dtype == np.float32:
      with np.errstate(over='ignore'):
        value = in_double(pixels(x1), pixels(x2)).astype(np.float32)
    if not np.isfinite(value).all():
      raise self._too_large(pixels(x1), pixels(x2))
    return value

  def _too_large(self, *images: np.ndarray) -> ValueError:
    peak = max(np.abs(x).max() for x in images)
    return ValueError(
      f'images: values up to {peak:.3g} are too large for this kernel in '
      f'{self.dtype}; scale them down.'
    )

  def _mended_block(self, block, x1: Images, x2: Images, near: near_pairs.Pairs) -> np.ndarray:
    """The block with its `near` entries in float64."""
    block = np.array(block) if near else block
    for i, columns in near:
      columns = columns[columns > i] if x1 is x2 else columns
      if len(columns):
        row = self._double().block(pixels(x1)[i : i + 1], pixels(x2)[_padded(columns)])
        block[i, columns] = row[0, : len(columns)]
        if x1 is x2:
          block[columns, i] = block[i, columns]
    return block

  def _mended_gradient(
    self, gradient, x1: Images, x2: Images, near: near_pairs.Pairs, cotangent: np.ndarray
  ) -> np.ndarray:
    """A gradient that lacks the `near` entries' part, with that in float64."""
    gradient = np.array(gradient) if near else gradient
    for i, columns in near:
      row = np.zeros((1, len(_padded(columns))))
      row[0, : len(columns)] = cotangent[i, columns]
      images = pixels(x1)[i : i + 1], pixels(x2)[_padded(columns)]
      gradient[i] += self._double().block_vjp(*images, row)[1][0]
    return gradient

  def _checked_cotangent(self, shape: tuple[int, ...], value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, self.dtype)
    if value.shape != shape:
      raise ValueError(f'cotangent: expected shape {shape}, got {value.shape}.')
    return value

  def _checked_pair(self, x1: Images, x2: Images) -> tuple[Images, Images]:
    first = self._checked_images('x1', x1)
    second = first if x2 is x1 else self._checked_images('x2', x2)
    shapes = pixels(first).shape[1:], pixels(second).shape[1:]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f'x1 and x2: images must have the same [H, W, D], got {shapes[0]} and {shapes[1]}.'
      )
    return first, second

  def _checked_images(self, name: str, x: Images) -> Images:
    if isinstance(x, Prepared):
      if x.kernel is not self.inner:
        raise ValueError(f'{name}: was prepared by another kernel.')
      return x
    x = np.asarray(x, self.dtype)
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f'{name}: expected images [N, H, W, D] with nothing empty, got shape {x.shape}.'
      )
    if not np.isfinite(x).all():
      first = int(np.nonzero(~np.isfinite(x))[0][0])
      raise ValueError(f'{name}: contains NaN or infinity in image {first}.')
    self.architecture.check_image_size(*x.shape[1:3])
    if self._bias and float(np.abs(x).max()) > _PEAK:  # which float32 does not hold
      raise self._too_large(x)
    return x


def _padded(columns: np.ndarray) -> np.ndarray:
  """The columns, some of them twice, in a multiple of a vector's lanes: few shapes compile."""
  return np.resize(columns, -(-len(columns) // 8) * 8)
