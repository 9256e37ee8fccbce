"""The JAX kernel: blocks by tiles of a fixed number of pairs, on any of JAX's devices."""

import concurrent.futures
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import kernels.precision  # noqa: F401
from kernels import architectures
from kernels.band import budget as budgets
from kernels.band import tile, variances
from kernels.contract import Cotangent, Images, Kernel, Prepared, prepared
from kernels.tiling import tiles

# No algorithm whose sums have no fixed order, and none chosen by timing it.
_GPU_OPTIONS = {'xla_gpu_deterministic_ops': True, 'xla_gpu_autotune_level': 0}


class JaxKernel(Kernel):
  """NTK or NNGP blocks by offsets, O(A·B·H·W·offsets) time.

  Tiles run on `threads` Python threads, and are put together, and summed in float64, in a fixed
  order: no result depends on the number of threads (given NPROC=1, which keeps XLA to one thread a
  tile).
  """

  implementation = 'jax'

  def __init__(
    self,
    architecture: architectures.Architecture,
    dtype: str,
    threads: int,
    kind: str = 'ntk',
    budget: budgets.Budget | None = None,
  ):
    """`budget` is by default that of JAX's device."""
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    if budget is None:
      budget = budgets.CPU if jax.default_backend() == 'cpu' else budgets.GPU
    self._budget = budget
    self._pool = concurrent.futures.ThreadPoolExecutor(budget.tiles or threads)
    compiled = functools.partial(_compiled, budget.is_gpu)
    self._variances = compiled(variances.variances, architecture)
    self._variances_vjp = compiled(variances.variances_vjp, architecture)
    self._block = compiled(_block, architecture, kind)
    self._forward = compiled(tile.forward, architecture, kind)
    self._backward = compiled(tile.backward, architecture, kind)

  def prepare(self, x: np.ndarray) -> Prepared:
    """See `Kernel.prepare`: the variances of every image."""
    results = self._pool.map(
      lambda images: jax.device_get(self._variances(images)), tiles(x, self._budget.images)
    )
    return Prepared(x, [np.concatenate(q)[: len(x)] for q in zip(*results)], self)

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """See `Kernel.block`."""
    symmetric = x1 is x2
    x1, x2 = prepared(self, x1, x2)
    grid = _Grid(x1, x2, *self.tile_shape(x1, x2))
    places = [
      (i, j) for i, j in grid.places if not symmetric or (j + 1) * grid.columns > i * grid.rows
    ]
    value = grid.zeros(self.dtype)
    blocks = self._pool.map(lambda place: np.asarray(self._block(*grid.images(place))), places)
    for place, block in zip(places, blocks):
      grid.part(value, place)[...] = block
    value = value[: len(x1), : len(x2)]
    return np.triu(value) + np.triu(value, 1).T if symmetric else value

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Kernel.block_vjp`.

    Where the cotangent is a function, tiles keep what they need for it, up to a budget.
    """
    x1, x2 = prepared(self, x1, x2)
    grid = _Grid(x1, x2, *self.tile_shape(x1, x2))
    value, padded = grid.zeros(self.dtype), grid.zeros(self.dtype)
    kept = {}
    if callable(cotangent):
      kept = self._forward_tiles(grid, value)
      cotangent = cotangent(value[: len(x1), : len(x2)])
    padded[: len(x1), : len(x2)] = cotangent

    def both(place):
      block, sources = kept.pop(place, None) or self._forward(*grid.images(place))
      pulled = self._backward(*grid.images(place), sources, grid.part(padded, place))
      return jax.device_get((block, pulled))

    rows = grid.rows * grid.shape[0]
    x1_bar = np.zeros((rows,) + x1.images.shape[1:])
    q1_bar = [np.zeros((rows,) + q.shape[1:]) for q in x1.variances]
    for place, (block, (x_piece, q_pieces)) in zip(grid.places, self._pool.map(both, grid.places)):
      if block is not None:
        grid.part(value, place)[...] = block
      for total, piece in zip([x1_bar] + q1_bar, [x_piece] + q_pieces):
        grid.row(total, place)[...] += piece
    gradient = x1_bar[: len(x1)] + self._through_variances(x1, [q[: len(x1)] for q in q1_bar])
    return value[: len(x1), : len(x2)], gradient.astype(self.dtype)

  def tile_shape(self, x1: Prepared, x2: Prepared) -> tuple[int, int]:
    """Numbers of images of x1, and of x2, in a tile."""
    shape, itemsize = x1.images.shape[1:], self.dtype.itemsize
    return budgets.tile_shape(self._budget, self.architecture, shape, itemsize, len(x1), len(x2))

  def _forward_tiles(self, grid: '_Grid', value: np.ndarray) -> dict[tuple[int, int], Any]:
    """Writes all blocks into `value`; returns (None, sources) of as many as the budget allows."""
    height, width = grid.x1.images.shape[1:3]
    a_pair = budgets.bytes_per_pair(self.architecture, height, width, self.dtype.itemsize)
    most = self._budget.kept_bytes // max(1, a_pair * grid.rows * grid.columns)
    kept_places = set(grid.places[:most])

    def forward(place):
      block, sources = self._forward(*grid.images(place))
      return np.asarray(block), sources if place in kept_places else None

    kept = {}
    for place, (block, sources) in zip(grid.places, self._pool.map(forward, grid.places)):
      grid.part(value, place)[...] = block
      if sources is not None:
        kept[place] = None, sources
    return kept

  def _through_variances(self, x: Prepared, q_bar: list[np.ndarray]) -> np.ndarray | int:
    """Pulls cotangents of x's variances back to x."""
    if not q_bar:
      return 0
    size = self._budget.images
    q_bar = [piece.astype(q.dtype) for piece, q in zip(q_bar, x.variances)]
    pieces = self._pool.map(
      lambda images, q: np.asarray(self._variances_vjp(images, list(q))),
      tiles(x.images, size),
      zip(*(tiles(piece, size) for piece in q_bar)),
    )
    return np.concatenate(list(pieces))[: len(x.images)]


class _Grid:
  """The tiles of a block of x1 against x2.

  Attributes:
    rows, columns: numbers of images in a tile.
    shape: numbers of tiles.
    places: of the tiles, row after row.
  """

  def __init__(self, x1: Prepared, x2: Prepared, rows: int, columns: int):
    self.x1, self.rows, self.columns = x1, rows, columns
    self._tiles1, self._tiles2 = _prepared_tiles(x1, rows), _prepared_tiles(x2, columns)
    self.shape = len(self._tiles1), len(self._tiles2)
    self.places = list(itertools.product(range(self.shape[0]), range(self.shape[1])))

  def images(self, place: tuple[int, int]) -> tuple:
    """(x1, q1, x2, q2) of a tile."""
    return *self._tiles1[place[0]], *self._tiles2[place[1]]

  def zeros(self, dtype: np.dtype) -> np.ndarray:
    """A block of whole tiles."""
    return np.zeros((self.rows * self.shape[0], self.columns * self.shape[1]), dtype)

  def row(self, value: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """The part of an array [rows of whole tiles, ...] that is of a tile's x1."""
    return value[place[0] * self.rows : (place[0] + 1) * self.rows]

  def part(self, block: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """The part of a block that is a tile's."""
    return self.row(block, place)[:, place[1] * self.columns : (place[1] + 1) * self.columns]


def _prepared_tiles(x: Prepared, size: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
  """Tiles (images, variances)."""
  cut = [tiles(q, size) for q in x.variances]
  return [(images, [q[i] for q in cut]) for i, images in enumerate(tiles(x.images, size))]


def _block(architecture: architectures.Architecture, kind: str, *images) -> jax.Array:
  """A tile's kernel alone."""
  return tile.forward(architecture, kind, *images)[0]


@functools.cache  # Kernels of the same network compile once a process.
def _compiled(is_gpu: bool, function: Callable, *constants) -> Callable:
  """`function`, given its first arguments, compiled for the Python thread that calls it.

  See also `precision`.
  """
  options = _GPU_OPTIONS if is_gpu else _cpu_options()
  jitted = jax.jit(functools.partial(function, *constants), compiler_options=options)
  # A computation whose arguments are still on their way is queued for XLA's own threads, of which
  # there are NPROC.
  return lambda *arguments: jitted(*jax.block_until_ready(jax.device_put(arguments)))


@functools.cache
def _cpu_options() -> dict[str, bool | int]:
  """XLA's first runtime on CPU, where it still has it.

  On JAX 0.5.3 that is twice as fast, and it runs loops in the calling thread, where the newer one
  hands them to its NPROC threads.
  """
  options: dict[str, bool | int] = {'xla_cpu_use_thunk_runtime': False}
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:
    return {}
  return options
