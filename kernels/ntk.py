"""Kernel blocks and their gradients: `make_kernel` picks an implementation; all obey the contract
of `Kernel`."""

import dataclasses
import functools
import importlib
import os
import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Protocol

import numpy as np
from absl import logging

from kernels import architectures

if TYPE_CHECKING:
  from configs import schema

# Module and class of each; imported when asked for, because Neural Tangents takes seconds to import
# and only one of them needs it.
_CLASSES = {
  'cuda': ('kernels.cuda.kernel', 'CudaKernel'),
  'native': ('kernels.native.kernel', 'NativeKernel'),
  'jax': ('kernels.band', 'JaxKernel'),
  'reference': ('kernels.reference', 'ReferenceKernel'),
}
IMPLEMENTATIONS = ('auto', *_CLASSES)
DTYPES = ('float32', 'float64')
KINDS = ('ntk', 'nngp')
PARAMETERIZATIONS = ('ntk', 'standard')

# Of memory, where derivatives are kept there, for all that is linearised and not yet pulled back.
KEPT_BYTES = 2**31

Cotangent = np.ndarray | Callable[[np.ndarray], np.ndarray]

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


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Images with what a kernel needs to know of each of them on its own; made by `Kernel.prepare`,
  indexed like an array of images.

  Attributes:
    images: [N, H, W, D].
    variances: the kernel's own, a list of arrays [N, ...].
    kernel: the one that made it.
  """

  images: np.ndarray
  variances: list[np.ndarray]
  kernel: Any

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: 'slice | np.ndarray') -> 'Prepared':
    return Prepared(self.images[index], [q[index] for q in self.variances], self.kernel)


Images = np.ndarray | Prepared


class Linearised(NamedTuple):
  """A block, and what its gradient needs.

  Attributes:
    block: [A, B].
    pull_back: from a cotangent [A, B] to the gradient of sum(block * cotangent) with respect to x1,
      [A, H, W, D].
    nbytes: what it holds in memory.
  """

  block: np.ndarray
  pull_back: Callable[[np.ndarray], np.ndarray]
  nbytes: int


class Kernel(Protocol):
  """What `make_kernel` returns. Arrays are NumPy's; `A`, `B` any positive numbers of images.

  Attributes:
    implementation: the implementation's name, 'auto' resolved.
    architecture: the network.
    dtype: of images, blocks and gradients.
    instruction_set, device: of the CPU, and the GPU's model, where the implementation chooses one;
      else ''.
    kept_bytes: for which there is room in all that has been linearised and not yet pulled back. The
      caller keeps count.
  """

  implementation: str
  architecture: architectures.Architecture
  dtype: np.dtype
  instruction_set: str
  device: str
  kept_bytes: int

  def prepare(self, x: np.ndarray) -> Prepared:
    """Images x [N, H, W, D] in the form in which they may be given again and again, to this kernel,
    in place of an array."""

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """The NTK between every image of x1 [A, H, W, D] and of x2 [B, H, W, D]: [A, B]. Half the work,
    and symmetric, where x1 is x2."""

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """The block, and the gradient of sum(block * cotangent) with respect to x1.

    Args:
      x1: [A, H, W, D].
      x2: [B, H, W, D], held constant.
      cotangent: [A, B], or a function from the finished block [A, B] to it.

    Returns:
      block [A, B] and gradient [A, H, W, D].
    """

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """`block_vjp` in two halves, for a cotangent that is known much later. An implementation that
    has none of its own computes twice."""


def make_kernel(
  architecture,
  *,
  implementation: str = 'auto',
  dtype: str = 'float32',
  threads: int | None = None,
  kind: str = 'ntk',
  parameterization: str = 'ntk',
  width: int = 1024,
) -> Kernel:
  """An evaluator of `architecture`'s kernel.

  Args:
    architecture: a name, a dict of stages or an `architectures.Architecture`; see
      `architectures.get`.
    implementation: 'reference' is Neural Tangents, 'jax' runs wherever JAX does, 'native' is C++
      for CPUs (`python -m kernels.native.build`), 'cuda' CUDA C++ for NVIDIA's GPUs (`make cuda`);
      'auto' is the fastest one this machine can run that can do what is asked.
    dtype: 'float32' or 'float64'.
    threads: how many CPU threads to use; by default as many as this process may. No result depends
      on it.
    kind: 'ntk', or 'nngp'.
    parameterization: 'ntk', or 'standard' (https://arxiv.org/abs/2001.07301): 'reference' alone.
    width: of every hidden layer, which the NTK in standard parameterisation depends on.

  Raises:
    ValueError: for an unknown architecture, implementation or dtype, and by the returned object for
      images that are not [N, H, W, D] with N >= 1 and equal H, W, D, that are too small for the
      network's poolings, or that contain NaN or infinity.
  """
  architecture = architectures.get(architecture)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation: expected one of {", ".join(IMPLEMENTATIONS)}, got {implementation!r}.'
    )
  if dtype not in DTYPES:
    raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, got {dtype!r}.')
  check_variant(implementation, kind, parameterization)
  threads = threads or len(os.sched_getaffinity(0))
  if implementation == 'auto':
    implementation = _fastest() if parameterization == 'ntk' else 'reference'
  module, name = _CLASSES[implementation]
  extra = (parameterization, width) if implementation == 'reference' else ()

  def make(dtype):
    implementation_of = getattr(importlib.import_module(module), name)
    kernel = implementation_of(architecture, dtype, threads, kind, *extra)
    return kernel if architecture.b_std else ScaleFree(kernel)

  has_relu = architecture.hidden > 0 or any(stage.convs for stage in architecture.stages)
  is_delicate = (
    has_relu
    and architecture.is_convolutional
    and dtype == 'float32'
    and implementation != 'reference'
  )
  return Checked(make(dtype), lambda: Checked(make('float64')), is_delicate)


def for_run(run: 'schema.Run', threads: int) -> Kernel:
  """The kernel that a run's configuration asks for."""
  return make_kernel(
    run.architecture,
    implementation=run.implementation,
    dtype=run.kernel_dtype,
    threads=threads,
    kind=run.kernel,
    parameterization=run.parameterization,
    width=run.standard_width,
  )


def check_variant(implementation: str, kind: str, parameterization: str) -> None:
  """Raises ValueError where there is no such kernel, or `implementation` cannot do it."""
  if kind not in KINDS:
    raise ValueError(f'kernel: expected one of {", ".join(KINDS)}, got {kind!r}.')
  if parameterization not in PARAMETERIZATIONS:
    raise ValueError(
      f'parameterization: expected one of {", ".join(PARAMETERIZATIONS)}, got {parameterization!r}.'
    )
  if parameterization != 'ntk' and implementation not in ('auto', 'reference'):
    raise ValueError(
      f'implementation: {implementation!r} knows NTK parameterisation alone; parameterization={parameterization!r} needs '
      'reference (or auto).'
    )


def available() -> list[str]:
  """The implementations that this machine can run, 'auto' apart."""
  from kernels.cuda import kernel as cuda
  from kernels.native import build

  missing = {'cuda': not cuda.is_available(), 'native': not build.is_built()}
  return [name for name in _CLASSES if not missing.get(name)]


def _fastest() -> str:
  from kernels.cuda import kernel as cuda

  if cuda.is_available():
    return 'cuda'
  import jax

  from kernels.native import build

  if jax.default_backend() != 'cpu':
    logging.log_first_n(
      logging.WARNING,
      'There is a GPU, but no CuPy for the CUDA kernel (`make cuda` installs it); using the JAX '
      'kernel.',
      1,
    )
    return 'jax'
  if build.is_built():
    return 'native'
  logging.log_first_n(
    logging.WARNING,
    'The native kernel is not built (`python -m kernels.native.build` does that); '
    'using the JAX kernel.',
    1,
  )
  return 'jax'


class Library:
  """A fixed set of images of which parts are used again and again. Thread safe.

  Each image's variances are computed once, when they are first asked for.
  """

  def __init__(self, kernel: Kernel, images: np.ndarray):
    """`images` [N, H, W, D] may be memory-mapped; only what is asked for is read."""
    self._kernel, self._images = kernel, images
    self._known = np.zeros(len(images), bool)
    self._variances: list[np.ndarray] | None = None
    self._maker = None
    self._lock = threading.Lock()

  def __getitem__(self, index: 'slice | np.ndarray') -> Prepared:
    chosen = np.arange(len(self._images))[index]
    with self._lock:
      new = np.unique(chosen[~self._known[chosen]])
      if len(new):
        fresh = self._kernel.prepare(self._images[new])
        if self._variances is None:
          self._maker = fresh.kernel
          self._variances = [
            np.empty((len(self._images),) + q.shape[1:], q.dtype) for q in fresh.variances
          ]
        for kept, q in zip(self._variances, fresh.variances):
          kept[new] = q
        self._known[new] = True
    return Prepared(
      np.asarray(self._images[chosen], self._kernel.dtype),
      [q[chosen] for q in self._variances],
      self._maker,
    )


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
    block, pull_back, nbytes = _linearised(self._kernel, x1, x2)
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
    self.kept_bytes = getattr(kernel, 'kept_bytes', KEPT_BYTES)

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
    block, pull_back, nbytes = _linearised(self._kernel, x1, x2)
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


def _linearised(kernel, x1: Images, x2: Images) -> Linearised:
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
