"""Neural Tangents: the oracle of every kernel and of the finite networks, and the kernels in
standard parameterisation.

Novak et al. 2020, https://arxiv.org/abs/1912.02803.
"""

import concurrent.futures
import functools
import sys
import types
from collections.abc import Callable

import jax
import numpy as np

# The one place that imports it. neural_tangents imports its `experimental` package, which wants
# TensorFlow >= 2.15 and tf2jax; nothing here uses it.
sys.modules.setdefault(
  'neural_tangents.experimental', types.ModuleType('neural_tangents.experimental')
)
import neural_tangents as nt

import kernels.precision  # noqa: F401
from kernels import architectures
from kernels.contract import Cotangent, Images, Kernel, Prepared, pixels
from kernels.tiling import power_of_two_from, tiles

# Neural Tangents holds about this many [H, W, H, W] arrays a pair of images, forward and backward
# together.
_ARRAYS_PER_PAIR = 40
_TILE_BYTES = 2**29


def network(
  architecture: architectures.Architecture,
  *,
  width: int = 1,
  outputs: int = 1,
  parameterization: str = 'ntk',
) -> tuple[Callable, Callable, Callable]:
  """The architecture as Neural Tangents layers.

  Args:
    architecture: the description.
    width: channels of every convolution and hidden layer; of kernels, only the NTK in standard
      parameterisation depends on it.
    outputs: number of outputs C.
    parameterization: 'ntk' or 'standard'.

  Returns:
    `(init_fn, apply_fn, kernel_fn)`; `apply_fn(params, x [N, H, W, D]) -> [N, C]`.
  """
  scale = dict(
    W_std=architecture.w_std, b_std=architecture.b_std, parameterization=parameterization
  )
  layers = []
  for stage in architecture.stages:
    for _ in range(stage.convs):
      layers += [nt.stax.Conv(width, (3, 3), padding='SAME', **scale), nt.stax.Relu()]
    if stage.pool:
      layers.append(nt.stax.AvgPool((2, 2), strides=(2, 2)))
  layers.append(nt.stax.Flatten() if architecture.readout == 'flatten' else nt.stax.GlobalAvgPool())
  for _ in range(architecture.hidden):
    layers += [nt.stax.Dense(width, **scale), nt.stax.Relu()]
  layers.append(nt.stax.Dense(outputs, **scale))
  return nt.stax.serial(*layers)


class ReferenceKernel(Kernel):
  """NTK or NNGP blocks by Neural Tangents: O(A·B·(H·W)²) time, tile by tile in bounded memory.

  Tiles run on `threads` Python threads and are put together in a fixed order, so that the result
  does not depend on their number (given NPROC=1, which keeps XLA itself to one thread: the bits of
  its long dot products follow its thread count).
  """

  implementation = 'reference'

  def __init__(
    self,
    architecture: architectures.Architecture,
    dtype: str,
    threads: int,
    kind: str = 'ntk',
    parameterization: str = 'ntk',
    width: int = 1,
  ):
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    self._pool = concurrent.futures.ThreadPoolExecutor(threads)
    self._block, self._block_vjp = _functions(
      architecture, self.dtype, kind, parameterization, width
    )

  def prepare(self, x: np.ndarray) -> Prepared:
    """See `Kernel.prepare`: nothing is computed ahead."""
    return Prepared(x, [], self)

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """See `Kernel.block`."""
    x1, x2 = pixels(x1), pixels(x2)
    a, b = self._tile_shape(x1, x2)
    rows, columns = tiles(x1, a), tiles(x2, b)
    pairs = [(r, c) for r in rows for c in columns]
    blocks = list(self._pool.map(lambda pair: np.asarray(self._block(*pair)), pairs))
    return _joined(blocks, len(columns))[: len(x1), : len(x2)]

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Kernel.block_vjp`. A cotangent that is a function costs one more forward pass."""
    x1, x2 = pixels(x1), pixels(x2)
    a, b = self._tile_shape(x1, x2)
    rows, columns = tiles(x1, a), tiles(x2, b)
    if callable(cotangent):
      cotangent = cotangent(self.block(x1, x2))
    padded = np.zeros((a * len(rows), b * len(columns)), self.dtype)
    padded[: len(x1), : len(x2)] = cotangent
    tasks = [
      (r, c, padded[i * a : (i + 1) * a, j * b : (j + 1) * b])
      for i, r in enumerate(rows)
      for j, c in enumerate(columns)
    ]
    results = list(self._pool.map(lambda task: jax.device_get(self._block_vjp(*task)), tasks))
    block = _joined([block for block, _ in results], len(columns))[: len(x1), : len(x2)]
    gradient = np.zeros((a * len(rows),) + x1.shape[1:], np.float64)
    for k, (_, piece) in enumerate(results):
      i = k // len(columns)
      gradient[i * a : (i + 1) * a] += piece
    return block, gradient[: len(x1)].astype(self.dtype)

  def _tile_shape(self, x1: np.ndarray, x2: np.ndarray) -> tuple[int, int]:
    """Powers of two, so that ragged sizes compile a few shapes only."""
    size = x1.shape[1] * x1.shape[2]
    if self.architecture.is_convolutional:
      pairs = max(1, _TILE_BYTES // (_ARRAYS_PER_PAIR * size**2 * self.dtype.itemsize))
    else:
      pairs = 2**16
    a = min(power_of_two_from(len(x1)), 2 ** (pairs.bit_length() // 2))
    return a, min(power_of_two_from(len(x2)), max(1, 2 ** (pairs.bit_length() - 1) // a))


def _joined(blocks: list[np.ndarray], columns: int) -> np.ndarray:
  """One array from a list of tiles, row after row of `columns` of them."""
  return np.block([blocks[i : i + columns] for i in range(0, len(blocks), columns)])


@functools.cache  # Kernels of the same network compile once a process.
def _functions(
  architecture: architectures.Architecture,
  dtype: np.dtype,
  kind: str,
  parameterization: str,
  width: int,
):
  """The block, and the block with its gradient, compiled."""
  kernel_fn = network(architecture, width=width, parameterization=parameterization)[2]

  def block(x1, x2):
    with jax.default_matmul_precision('highest'):
      return kernel_fn(x1, x2, get=kind).astype(dtype)

  def block_vjp(x1, x2, cotangent):
    value, pull_back = jax.vjp(lambda x: block(x, x2), x1)
    return value, pull_back(cotangent)[0]

  return jax.jit(block), jax.jit(block_vjp)
