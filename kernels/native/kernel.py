"""NTK blocks by the native C++ kernel, called through XLA's foreign function interface."""

import ctypes
import functools
import os

import jax
import jax.ffi
import numpy as np

import kernels.precision  # noqa: F401
from kernels import architectures, contract
from kernels.native import build

# Below this, the derivatives of all pairs are kept until the cotangent is known; above, the forward
# pass is run twice.
_DERIVATIVES_BYTES = 2**28
_HANDLERS = {
  'tables': 'KipTables',
  'block': 'KipBlock',
  'vjp': 'KipVjp',
  'derivatives': 'KipDerivatives',
  'pull_back': 'KipPullBack',
}
_HOW_TO_BUILD = 'build it by `python -m kernels.native.build` (needs x86-64 and a C++17 compiler)'


def best_instruction_set() -> str:
  """$KIP_INSTRUCTION_SET, or the best one that this machine has."""
  best = _load('portable').kip_best_instruction_set().decode()
  supported = list(build.INSTRUCTION_SETS)[list(build.INSTRUCTION_SETS).index(best) :]
  forced = os.environ.get('KIP_INSTRUCTION_SET') or best
  if forced not in supported:
    raise ValueError(
      f'KIP_INSTRUCTION_SET: expected one of {", ".join(supported)} on this machine, got {forced!r}.'
    )
  return forced


@functools.cache
def _load(instruction_set: str) -> ctypes.CDLL:
  path = build.find(instruction_set)
  if path is None:
    raise ValueError(f'implementation: the native kernel is not built; {_HOW_TO_BUILD}.')
  library = ctypes.CDLL(str(path))
  library.kip_best_instruction_set.restype = ctypes.c_char_p
  for name, symbol in _HANDLERS.items():
    jax.ffi.register_ffi_target(
      f'kip_{instruction_set}_{name}', jax.ffi.pycapsule(getattr(library, symbol)), platform='cpu'
    )
  return library


class NativeKernel:
  """NTK (or NNGP) blocks in C++: O(A·B·H·W·offsets) time, `threads` threads; no result depends on
  their number.

  Best with B a multiple of 16: the images of x2 lie across the lanes of vectors.
  """

  implementation = 'native'

  def __init__(
    self, architecture: architectures.Architecture, dtype: str, threads: int, kind: str = 'ntk'
  ):
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    self.instruction_set = best_instruction_set()
    self._lanes = _load(self.instruction_set).kip_vector_bytes() // self.dtype.itemsize
    convs = [0]
    for stage in architecture.stages:
      convs[-1] += stage.convs
      if stage.pool:
        convs.append(0)
    self._convs = tuple(convs)
    self._network = dict(
      convs=np.array(convs, np.int64),
      all_offsets=np.int64(architecture.readout == 'global_average_pool'),
      hidden=np.int64(architecture.hidden),
      nngp=np.int64(kind == 'nngp'),
      w=np.float64(architecture.w_std**2),
      b=np.float64(architecture.b_std**2),
      threads=np.int64(threads),
    )
    self._cpu = jax.devices('cpu')[0]

  def prepare(self, x: np.ndarray) -> contract.Prepared:
    """See `contract.Kernel.prepare`; the tables of plan.h are [N, V + P]: V variances of convolutions'
    ReLU inputs, P pooled values. Then, in float64, the variances and spreads of what the readout
    reads, [N, 2]."""
    variances, pooled = self._table(*x.shape[1:3])
    shapes = [(len(x), variances + pooled), (len(x), 2)]
    outputs = self._call('tables', shapes, x, dtypes=[self.dtype, np.float64])
    return contract.Prepared(x, [np.asarray(output) for output in outputs], self)

  def block(self, x1: contract.Images, x2: contract.Images) -> np.ndarray:
    """See `contract.Kernel.block`."""
    left, right = self._prepared(x1, x2)
    symmetric = np.int64(left.images is right.images)
    return np.array(
      self._call(
        'block', [(len(left), len(right))], *_arrays(left), *_arrays(right), symmetric=symmetric
      )[0]
    )

  def block_vjp(
    self, x1: contract.Images, x2: contract.Images, cotangent: contract.Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `contract.Kernel.block_vjp`."""
    left, right = self._prepared(x1, x2)
    if callable(cotangent):
      block, pull_back, _ = self.linearise(left, right)
      return block, pull_back(cotangent(block))
    block, gradient = self._call(
      'vjp',
      [(len(left), len(right)), left.images.shape],
      *_arrays(left),
      *_arrays(right),
      cotangent,
    )
    return np.array(block), np.array(gradient)

  def linearise(self, x1: contract.Images, x2: contract.Images) -> contract.Linearised:
    """See `contract.Kernel.linearise`: the derivatives by x1 are kept pair by pair (20 kB a pair for a
    ConvNet on 32x32x3), unless they are too many, or forming them again is cheap."""
    left, right = self._prepared(x1, x2)
    tiles = -(-len(right) // self._lanes)
    variances = self._table(*left.images.shape[1:3])[0] + self.architecture.hidden
    derivatives = (len(left), tiles, left.images[0].size + variances, self._lanes)
    if (
      self.architecture.is_convolutional
      and np.prod(derivatives, dtype=np.int64) * self.dtype.itemsize <= _DERIVATIVES_BYTES
    ):
      block, values = self._call(
        'derivatives', [(len(left), len(right)), derivatives], *_arrays(left), *_arrays(right)
      )
      pull_back = lambda cotangent: np.array(
        self._call('pull_back', [left.images.shape], *_arrays(left), values, cotangent)[0]
      )
      return contract.Linearised(np.array(block), pull_back, values.nbytes)
    return contract.Linearised(
      self.block(left, right),
      lambda cotangent: self.block_vjp(left, right, cotangent)[1],
      right.images.nbytes,
    )

  def _prepared(self, x1, x2) -> tuple[contract.Prepared, contract.Prepared]:
    left = x1 if isinstance(x1, contract.Prepared) else self.prepare(x1)
    if isinstance(x2, contract.Prepared):
      return left, x2
    return left, left if x2 is left.images else self.prepare(x2)

  def _table(self, height: int, width: int) -> tuple[int, int]:
    """(V, P) of `prepare`."""
    pixels = [(height >> p) * (width >> p) for p in range(len(self._convs))]
    hidden = self.architecture.hidden
    pooled = (2 * n for p, n in enumerate(pixels) if p and (hidden or any(self._convs[p:])))
    return sum(c * n for c, n in zip(self._convs, pixels)), sum(pooled)

  def _call(self, name: str, shapes, *arguments, dtypes=None, **attributes):
    with jax.default_device(self._cpu):
      outputs = list(map(jax.ShapeDtypeStruct, shapes, dtypes or [self.dtype] * len(shapes)))
      return jax.ffi.ffi_call(f'kip_{self.instruction_set}_{name}', outputs)(
        *arguments, **self._network, **attributes
      )


def _arrays(x: contract.Prepared) -> tuple[np.ndarray, ...]:
  return x.images, *x.variances
