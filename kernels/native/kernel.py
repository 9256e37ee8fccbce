"""NTK blocks by the native C++ kernel, called through XLA's foreign function interface."""

import ctypes
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.ffi
import numpy as np

import kernels.precision  # noqa: F401
from kernels import architectures
from kernels.contract import Cotangent, Images, Kernel, Linearised, Prepared, prepared
from kernels.native import build

# Below this, the derivatives of all pairs are kept until the cotangent is known; above, the forward
# pass is run twice.
DERIVATIVES_BYTES = 2**28

# The libraries' functions, and their symbols.
HANDLERS = {
  'tables': 'KipTables',
  'block': 'KipBlock',
  'vjp': 'KipVjp',
  'derivatives': 'KipDerivatives',
  'pull_back': 'KipPullBack',
}

_NOT_BUILT = (
  'implementation: the native kernel is not built; build it by '
  '`python -m kernels.native.build` (needs x86-64 or 64-bit Arm, and a C++17 compiler).'
)


class Library(Protocol):
  """The functions compiled for an instruction set: `load`, or a stand-in in tests.

  Attributes:
    instruction_set: its name.
    vector_bytes: of a vector.
  """

  instruction_set: str
  vector_bytes: int

  def call(
    self,
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    arguments: Sequence[np.ndarray | jax.Array],
    attributes: dict[str, np.ndarray | np.generic],
  ) -> Sequence[np.ndarray | jax.Array]:
    """Calls the function `name` of HANDLERS; returns arrays like `results`."""
    ...


class _Loaded:
  """A library in this process. XLA calls its functions."""

  def __init__(self, instruction_set: str, path: pathlib.Path):
    library = ctypes.CDLL(str(path))
    library.kip_best_instruction_set.restype = ctypes.c_char_p
    self.instruction_set = instruction_set
    self.vector_bytes = library.kip_vector_bytes()
    self.best_instruction_set = library.kip_best_instruction_set().decode()
    self._cpu = jax.devices('cpu')[0]
    for name, symbol in HANDLERS.items():
      capsule = jax.ffi.pycapsule(getattr(library, symbol))
      jax.ffi.register_ffi_target(self._target(name), capsule, platform='cpu')

  def call(self, name, results, arguments, attributes):
    """See `Library.call`."""
    with jax.default_device(self._cpu):
      return jax.ffi.ffi_call(self._target(name), results)(*arguments, **attributes)

  def _target(self, name: str) -> str:
    return f'kip_{self.instruction_set}_{name}'


def supported_instruction_sets() -> list[str]:
  """The instruction sets that this machine has, the best one first.

  Raises:
    ValueError: the kernel is not built.
  """
  names = list(build.instruction_sets())
  if not names:
    raise ValueError(_NOT_BUILT)
  return names[names.index(load(names[-1]).best_instruction_set) :]


def best_instruction_set() -> str:
  """$KIP_INSTRUCTION_SET, or the best one that this machine has.

  Raises:
    ValueError: this machine lacks $KIP_INSTRUCTION_SET, or the kernel is not built.
  """
  supported = supported_instruction_sets()
  forced = os.environ.get('KIP_INSTRUCTION_SET') or supported[0]
  if forced not in supported:
    raise ValueError(
      f'KIP_INSTRUCTION_SET: expected one of {", ".join(supported)} on this machine, '
      f'got {forced!r}.'
    )
  return forced


@functools.cache
def load(instruction_set: str) -> _Loaded:
  """Loads the library for an instruction set, and registers its functions with XLA.

  Raises:
    ValueError: it is not built.
  """
  path = build.find(instruction_set)
  if path is None:
    raise ValueError(_NOT_BUILT)
  return _Loaded(instruction_set, path)


@functools.cache
def _identity(instruction_set: str) -> str:
  path = build.find(instruction_set)
  return build.identity(path) if path else ''


class NativeKernel(Kernel):
  """NTK (or NNGP) blocks in C++: O(A·B·H·W·offsets) time, `threads` threads.

  No result depends on their number. Best with B a multiple of 16: the images of x2 lie across the
  lanes of vectors.
  """

  implementation = 'native'

  def __init__(
    self,
    architecture: architectures.Architecture,
    dtype: str,
    threads: int,
    kind: str = 'ntk',
    derivatives_bytes: int = DERIVATIVES_BYTES,
    library: Library | None = None,
  ):
    """`derivatives_bytes`: how much `linearise` may keep; `library`: by default the best one."""
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    self._library = library or load(best_instruction_set())
    self.instruction_set = self._library.instruction_set
    self.compiled = _identity(self.instruction_set)
    self._derivatives_bytes = derivatives_bytes
    self._lanes = self._library.vector_bytes // self.dtype.itemsize
    self._network = dict(
      convs=np.array(architecture.convs_by_level, np.int64),
      all_offsets=np.int64(architecture.readout == 'global_average_pool'),
      hidden=np.int64(architecture.hidden),
      nngp=np.int64(kind == 'nngp'),
      w=np.float64(architecture.w_std**2),
      b=np.float64(architecture.b_std**2),
      threads=np.int64(threads),
    )

  def prepare(self, x: np.ndarray) -> Prepared:
    """See `Kernel.prepare`.

    The variances are the tables of plan.h [N, V + P], V variances of convolutions' ReLU inputs and
    P pooled values, then, in float64, the variances and spreads at the readout [N, 2].
    """
    variances, pooled = self._table_size(*x.shape[1:3])
    shapes = [(len(x), variances + pooled), (len(x), 2)]
    tables, readouts = self._call('tables', shapes, x, dtypes=[self.dtype, np.dtype(np.float64)])
    return Prepared(x, [np.asarray(tables), np.asarray(readouts)], self)

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """See `Kernel.block`."""
    left, right = prepared(self, x1, x2)
    shape = len(left), len(right)
    symmetric = np.int64(left.images is right.images)
    (block,) = self._call('block', [shape], *_arrays(left), *_arrays(right), symmetric=symmetric)
    return np.array(block)

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Kernel.block_vjp`."""
    left, right = prepared(self, x1, x2)
    if callable(cotangent):
      block, pull_back, _ = self.linearise(left, right)
      return block, pull_back(cotangent(block))
    shapes = [(len(left), len(right)), left.images.shape]
    block, gradient = self._call('vjp', shapes, *_arrays(left), *_arrays(right), cotangent)
    return np.array(block), np.array(gradient)

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """See `Kernel.linearise`.

    The derivatives by x1 are kept pair by pair (20 kB a pair for a ConvNet on 32x32x3), unless they
    are too many, or forming them again is cheap.
    """
    left, right = prepared(self, x1, x2)
    tiles = -(-len(right) // self._lanes)
    variances = self._table_size(*left.images.shape[1:3])[0] + self.architecture.hidden
    shape = len(left), tiles, left.images[0].size + variances, self._lanes
    nbytes = np.prod(shape, dtype=np.int64) * self.dtype.itemsize
    if not self.architecture.is_convolutional or nbytes > self._derivatives_bytes:
      return super().linearise(left, right)
    shapes = [(len(left), len(right)), shape]
    block, derivatives = self._call('derivatives', shapes, *_arrays(left), *_arrays(right))

    def pull_back(cotangent: np.ndarray) -> np.ndarray:
      shapes = [left.images.shape]
      (gradient,) = self._call('pull_back', shapes, *_arrays(left), derivatives, cotangent)
      return np.array(gradient)

    return Linearised(np.array(block), pull_back, derivatives.nbytes)

  def _table_size(self, height: int, width: int) -> tuple[int, int]:
    """(V, P) of `prepare`."""
    convs, hidden = self.architecture.convs_by_level, self.architecture.hidden
    pixels = [(height >> p) * (width >> p) for p in range(len(convs))]
    pooled = (2 * n for p, n in enumerate(pixels) if p and (hidden or any(convs[p:])))
    return sum(c * n for c, n in zip(convs, pixels)), sum(pooled)

  def _call(
    self,
    name: str,
    shapes: list[tuple[int, ...]],
    *arguments: np.ndarray | jax.Array,
    dtypes: list[np.dtype] | None = None,
    **attributes: np.int64,
  ) -> Sequence[np.ndarray | jax.Array]:
    """Calls a function of the library.

    Args:
      name: see HANDLERS.
      shapes, dtypes: of the results; dtypes are by default the kernel's.
    """
    results = list(map(jax.ShapeDtypeStruct, shapes, dtypes or [self.dtype] * len(shapes)))
    return self._library.call(name, results, arguments, {**self._network, **attributes})


def _arrays(x: Prepared) -> tuple[np.ndarray, ...]:
  return x.images, *x.variances
