"""Kernel blocks and their gradients: `make_kernel` picks an implementation; all obey the contract of `Kernel`."""

from concurrent import futures
import dataclasses
import functools
import importlib
import os
import threading
from typing import Any, Callable, Mapping, NamedTuple, Protocol

from absl import logging
import numpy as np

from kernels import architectures

# Module and class of each; imported when asked for, because Neural Tangents takes seconds to import and only one of them needs it.
_CLASSES = {'cuda': ('kernels.cuda.kernel', 'CudaKernel'), 'native': ('kernels.native.kernel', 'NativeKernel'),
            'jax': ('kernels.band', 'JaxKernel'), 'reference': ('kernels.reference', 'ReferenceKernel')}
IMPLEMENTATIONS = ('auto', *_CLASSES)
DTYPES = ('float32', 'float64')
KINDS = ('ntk', 'nngp')
PARAMETERIZATIONS = ('ntk', 'standard')

KEPT_BYTES = 2 ** 31  # of memory, where derivatives are kept there, for all that is linearised and not yet pulled back

Cotangent = np.ndarray | Callable[[np.ndarray], np.ndarray]

# Images whose squared distance is below this part of the mean of their squared norms nearly coincide. After a pooling, float32 cannot tell
# their 1 - c from rounding, and near the cusp of ReLU's dot the gradient does not fade with the difference: these few pairs take float64.
_NEAR = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Images with what a kernel needs to know of each of them on its own; made by `Kernel.prepare`, indexed like an array of images.

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
    pull_back: from a cotangent [A, B] to the gradient of sum(block * cotangent) with respect to x1, [A, H, W, D].
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
    instruction_set, device: of the CPU, and the GPU's model, where the implementation chooses one; else ''.
    kept_bytes: for which there is room in all that has been linearised and not yet pulled back. The caller keeps count.
  """
  implementation: str
  architecture: architectures.Architecture
  dtype: np.dtype
  instruction_set: str
  device: str
  kept_bytes: int

  def prepare(self, x: np.ndarray) -> Prepared:
    """Images x [N, H, W, D] in the form in which they may be given again and again, to this kernel, in place of an array."""

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """The NTK between every image of x1 [A, H, W, D] and of x2 [B, H, W, D]: [A, B]. Half the work, and symmetric, where x1 is x2."""

  def block_vjp(self, x1: Images, x2: Images, cotangent: Cotangent) -> tuple[np.ndarray, np.ndarray]:
    """The block, and the gradient of sum(block * cotangent) with respect to x1.

    Args:
      x1: [A, H, W, D].
      x2: [B, H, W, D], held constant.
      cotangent: [A, B], or a function from the finished block [A, B] to it.

    Returns:
      block [A, B] and gradient [A, H, W, D].
    """

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """`block_vjp` in two halves, for a cotangent that is known much later. An implementation that has none of its own computes twice."""


def make_kernel(architecture, *, implementation: str = 'auto', dtype: str = 'float32', threads: int | None = None, kind: str = 'ntk',
                parameterization: str = 'ntk', width: int = 1024) -> Kernel:
  """An evaluator of `architecture`'s kernel.

  Args:
    architecture: a name, a dict of stages or an `architectures.Architecture`; see `architectures.get`.
    implementation: 'reference' is Neural Tangents, 'jax' runs wherever JAX does, 'native' is C++ for CPUs
      (`python -m kernels.native.build`), 'cuda' CUDA C++ for NVIDIA's GPUs (`make cuda`);
      'auto' is the fastest one this machine can run that can do what is asked.
    dtype: 'float32' or 'float64'.
    threads: how many CPU threads to use; by default as many as this process may. No result depends on it.
    kind: 'ntk', or 'nngp'.
    parameterization: 'ntk', or 'standard' (https://arxiv.org/abs/2001.07301): 'reference' alone.
    width: of every hidden layer, which the NTK in standard parameterisation depends on.

  Raises:
    ValueError: for an unknown architecture, implementation or dtype, and by the returned object for images that are not
      [N, H, W, D] with N >= 1 and equal H, W, D, that are too small for the network's poolings, or that contain NaN or infinity.
  """
  architecture = architectures.get(architecture)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation: expected one of {", ".join(IMPLEMENTATIONS)}, got {implementation!r}.')
  if dtype not in DTYPES:
    raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, got {dtype!r}.')
  check_variant(implementation, kind, parameterization)
  threads = threads or len(os.sched_getaffinity(0))
  if implementation == 'auto':
    implementation = _fastest() if parameterization == 'ntk' else 'reference'
  module, name = _CLASSES[implementation]
  extra = (parameterization, width) if implementation == 'reference' else ()
  make = lambda dtype: getattr(importlib.import_module(module), name)(architecture, dtype, threads, kind, *extra)
  pools = architecture.readout == 'global_average_pool' or any(stage.pool for stage in architecture.stages)
  return Checked(make(dtype), lambda: Checked(make('float64')), pools and dtype == 'float32' and implementation != 'reference')


def for_run(run: Mapping[str, Any], threads: int) -> Kernel:
  """The kernel that a run's configuration asks for."""
  return make_kernel(run['architecture'], implementation=run['implementation'], dtype=run['kernel_dtype'], threads=threads,
                     kind=run['kernel'], parameterization=run['parameterization'], width=run['standard_width'])


def check_variant(implementation: str, kind: str, parameterization: str) -> None:
  """Raises ValueError where there is no such kernel, or `implementation` cannot do it."""
  if kind not in KINDS:
    raise ValueError(f'kernel: expected one of {", ".join(KINDS)}, got {kind!r}.')
  if parameterization not in PARAMETERIZATIONS:
    raise ValueError(f'parameterization: expected one of {", ".join(PARAMETERIZATIONS)}, got {parameterization!r}.')
  if parameterization != 'ntk' and implementation not in ('auto', 'reference'):
    raise ValueError(f'implementation: {implementation!r} knows NTK parameterisation alone; parameterization={parameterization!r} needs '
                     'reference (or auto).')


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
    logging.log_first_n(logging.WARNING, 'There is a GPU, but no CuPy for the CUDA kernel (`make cuda` installs it); using the JAX '
                        'kernel.', 1)
    return 'jax'
  if build.is_built():
    return 'native'
  logging.log_first_n(logging.WARNING, 'The native kernel is not built (`python -m kernels.native.build` does that); '
                      'using the JAX kernel.', 1)
  return 'jax'


class Library:
  """A fixed set of images of which parts are used again and again: each image's variances are computed once, when first asked for.

  Thread safe.
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
          self._variances = [np.empty((len(self._images),) + q.shape[1:], q.dtype) for q in fresh.variances]
        for kept, q in zip(self._variances, fresh.variances):
          kept[new] = q
        self._known[new] = True
    return Prepared(np.asarray(self._images[chosen], self._kernel.dtype), [q[chosen] for q in self._variances], self._maker)


class Checked:
  """Checks and casts what goes into an implementation, and has float64 for pairs of images that nearly coincide, once for all of them."""

  def __init__(self, kernel: Kernel, make_double: Callable[[], Kernel] | None = None, is_delicate: bool = False):
    """`make_double`: the same kernel in float64; `is_delicate`: whether it is ever needed."""
    self._kernel, self._make_double, self._is_delicate = kernel, make_double and functools.cache(make_double), is_delicate
    self._search = futures.ThreadPoolExecutor(1)  # beside the kernel: a fast GPU would wait for it
    self.implementation, self.architecture, self.dtype = kernel.implementation, kernel.architecture, kernel.dtype
    self.instruction_set, self.device = getattr(kernel, 'instruction_set', ''), getattr(kernel, 'device', '')
    self.kept_bytes = getattr(kernel, 'kept_bytes', KEPT_BYTES)

  def prepare(self, x):
    return self._kernel.prepare(self._checked_images('x', x))

  def block(self, x1, x2):
    x1, x2 = self._images(x1, x2)
    near = self._search.submit(self._near, x1, x2)
    return self._mended(self._kernel.block(x1, x2), x1, x2, near.result())

  def block_vjp(self, x1, x2, cotangent):
    x1, x2 = self._images(x1, x2)
    near = self._search.submit(self._near, x1, x2)
    checked = functools.partial(self._cotangent, (len(x1), len(x2)))
    if not callable(cotangent) and not near.result():
      return self._kernel.block_vjp(x1, x2, checked(cotangent))
    mended = value = None

    def rest(block):
      nonlocal mended, value
      mended = self._mended(block, x1, x2, near.result())
      value = checked(cotangent(mended) if callable(cotangent) else cotangent)
      return _without(value, near.result())
    gradient = self._kernel.block_vjp(x1, x2, rest)[1]
    return mended, self._mended_gradient(gradient, x1, x2, near.result(), value)

  def linearise(self, x1, x2):
    x1, x2 = self._images(x1, x2)
    search = self._search.submit(self._near, x1, x2)
    if hasattr(self._kernel, 'linearise'):
      block, pull_back, nbytes = self._kernel.linearise(x1, x2)
    else:
      block, pull_back = self._kernel.block(x1, x2), lambda cotangent: self._kernel.block_vjp(x1, x2, cotangent)[1]
      nbytes = _pixels(x2).nbytes
    near = search.result()

    def checked_pull_back(cotangent):
      cotangent = self._cotangent(block.shape, cotangent)
      return self._mended_gradient(pull_back(_without(cotangent, near)), x1, x2, near, cotangent)
    return Linearised(self._mended(block, x1, x2, near), checked_pull_back, nbytes)

  def _near(self, x1, x2) -> list[tuple[int, np.ndarray]]:
    """Pairs that float32 is not enough for: rows that have some, and their columns. An image and itself are none: they are exact."""
    if not self._is_delicate:
      return []
    a, b = (_pixels(x).reshape(len(x), -1) for x in (x1, x2))
    squares = (np.einsum('np,np->n', a, a)[:, None] + np.einsum('np,np->n', b, b)) / 2
    candidates = squares - a @ b.T <= 1.01 * _NEAR * squares  # a little more than asked for: these sums are float32's
    rows = [(i, [j for j in np.flatnonzero(candidates[i]) if _nearly_coincide(a[i].astype(np.float64), b[j].astype(np.float64))])
            for i in np.flatnonzero(candidates.any(axis=1))]
    return [(i, np.array(columns)) for i, columns in rows if columns]

  def _mended(self, block, x1, x2, near):
    """The block with its `near` entries by float64."""
    block = np.array(block) if near else block
    for i, columns in near:
      columns = columns[columns > i] if x1 is x2 else columns
      if len(columns):
        block[i, columns] = self._make_double().block(_pixels(x1)[i:i + 1], _pixels(x2)[_padded(columns)])[0, :len(columns)]
        if x1 is x2:
          block[columns, i] = block[i, columns]
    return block

  def _mended_gradient(self, gradient, x1, x2, near, cotangent):
    """A gradient that lacks the `near` entries' part, with that by float64."""
    gradient = np.array(gradient) if near else gradient
    for i, columns in near:
      row = np.zeros((1, len(_padded(columns))))
      row[0, :len(columns)] = cotangent[i, columns]
      gradient[i] += self._make_double().block_vjp(_pixels(x1)[i:i + 1], _pixels(x2)[_padded(columns)], row)[1][0]
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
      raise ValueError(f'x1 and x2: images must have the same [H, W, D], got {shapes[0]} and {shapes[1]}.')
    return images

  def _checked_images(self, name, x):
    if isinstance(x, Prepared):
      if x.kernel is not self._kernel:
        raise ValueError(f'{name}: was prepared by another kernel.')
      return x
    x = np.asarray(x, self.dtype)
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(f'{name}: expected images [N, H, W, D] with nothing empty, got shape {x.shape}.')
    if not np.isfinite(x).all():
      raise ValueError(f'{name}: contains NaN or infinity in image {int(np.nonzero(~np.isfinite(x))[0][0])}.')
    self.architecture.check_image_size(*x.shape[1:3])
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
  """As many columns as vectors have lanes, or a multiple: some twice. Few shapes are few compilations, too."""
  return np.resize(columns, -(-len(columns) // 8) * 8)


def _nearly_coincide(a: np.ndarray, b: np.ndarray) -> bool:
  """Of two images [P] in float64; not where they are the same. Each pair is judged alone: no tile may change what is done."""
  return 0 < np.square(a - b).sum() <= _NEAR * (np.square(a).sum() + np.square(b).sum()) / 2
