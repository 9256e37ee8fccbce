"""The band: which offsets between pixels are held, and which rows of each of them."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels.precision  # noqa: F401
from kernels import architectures


class Axis(NamedTuple):
  """One image axis at one resolution.

  Row y of offset d pairs pixel y of x1 with pixel y + d of x2. A plain axis keeps offsets
  -radius..radius, and rows where y + d is no pixel hold junk that nothing genuine reads. A periodic
  one, used where nearly all offsets are needed, keeps d modulo its rows, so that no row is wasted;
  where `size` is odd at some pooling it has phantom rows beyond `size`, which likewise nothing
  reads.

  Attributes:
    size: pixels.
    rows: rows of an offset, at least `size`.
    first, count: the offsets, `first`, `first` + 1, ...
    periodic: whether offsets and pixels of x2 are meant modulo `rows`.
  """

  size: int
  rows: int
  first: int
  count: int
  periodic: bool

  def partner(self) -> np.ndarray:
    """The pixels y + d, [count, rows], or -1 where that is none (or y is none)."""
    y, d = np.arange(self.rows), self.first + np.arange(self.count)[:, None]
    partner = (y + d) % self.rows if self.periodic else y + d
    return np.where((y < self.size) & (partner >= 0) & (partner < self.size), partner, -1)

  def pieces(self) -> list[np.ndarray]:
    """The unbroken pieces of an offset's rows, across whose ends no convolution may reach.

    Returns:
      for each piece [3, count, 1 + rows + 1]: whether, on the piece's line, row y, from -1 to
      `rows`, is in both images, in x1 only, in x2 only.
    """
    y, d = np.arange(-1, self.rows + 1), self.first + np.arange(self.count)[:, None]
    in1 = (y >= 0) & (y < self.size)
    pieces = []
    for partner in (y + d, y + d - self.rows)[: 1 + self.periodic]:
      in2 = (partner >= 0) & (partner < self.size)
      pieces.append(np.stack([in1 & in2, in1 & ~in2, ~in1 & in2]))
    return pieces

  def feeds(self, above: 'Axis') -> tuple[np.ndarray, np.ndarray]:
    """The slots of a 2x2 pooling's output that each offset feeds.

    Rows of parity p feed the offset (d + p) >> 1. Slots are the offsets of `above` with a spare one
    at the end, and, on a plain axis, at the start; see `from_slots`.

    Returns:
      the first slot s [count], and the share [count, 2, 2] that rows of parity p have in the slots
      s and s + 1.
    """
    d = self.first + np.arange(self.count)
    slot = (d >> 1) - above.first + (not above.periodic)
    rise = (d[:, None] + np.arange(2) >> 1) - (d >> 1)[:, None]
    return slot, (rise == np.arange(2)[:, None, None]).transpose(1, 0, 2) / 4

  @property
  def slots(self) -> int:
    return self.count + (1 if self.periodic else 2)

  def from_slots(self, v: jax.Array, axis: int) -> jax.Array:
    """The offsets along `axis` of v, from slots."""
    v = jnp.moveaxis(v, axis, 0)
    v = jnp.concatenate([v[:1] + v[-1:], v[1:-1]]) if self.periodic else v[1:-1]
    return jnp.moveaxis(v, 0, axis)

  def to_slots(self, v: jax.Array, axis: int) -> jax.Array:
    """The adjoint of `from_slots`."""
    v = jnp.moveaxis(v, axis, 0)
    v = jnp.concatenate(
      [v, v[:1]] if self.periodic else [jnp.zeros_like(v[:1]), v, jnp.zeros_like(v[:1])]
    )
    return jnp.moveaxis(v, 0, axis)

  def gather(self, x: jax.Array, axis: int, fill: float, margin: int = 0) -> jax.Array:
    """Pixels `first` .. `first` + rows + count - 2 along `axis` of x, `fill` where there are none.

    A slice that starts at k shows offset k. `margin` more pixels are laid out at both ends.
    """
    pixel = self.first + np.arange(-margin, self.rows + self.count - 1 + margin)
    pixel = pixel % self.rows if self.periodic else pixel
    inside = ((pixel >= 0) & (pixel < self.size)).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
    return jnp.where(
      inside, jnp.take(x, np.clip(pixel, 0, self.size - 1), axis=axis), jnp.asarray(fill, x.dtype)
    )

  def own(self, x: jax.Array, axis: int, fill: float, margin: int = 0) -> jax.Array:
    """Pixels 0 .. rows - 1 along `axis` of x, `fill` beyond its size; `margin` as in `gather`."""
    ends = [(0, 0, 0)] * x.ndim
    ends[axis] = (margin, self.rows - self.size + margin, 0)
    # Whose derivative, unlike that of an index, adds nothing up.
    return lax.pad(x, jnp.asarray(fill, x.dtype), ends)


Axes = tuple[Axis, Axis]


class Level(NamedTuple):
  """All convolutions at one resolution.

  Attributes:
    convs: how many there are.
    axes: the band they work on.
    above: the band that is pooled to, or None before the readout.
    distances: whether m enters, and whether m leaves, where there are ReLUs to come; else n.
  """

  convs: int
  axes: Axes
  above: Axes | None
  distances: tuple[bool, bool]

  @property
  def offsets(self) -> int:
    return self.axes[0].count * self.axes[1].count


def plan(architecture: architectures.Architecture, height: int, width: int) -> list[Level]:
  """The levels, input side first; the last one ends in the readout."""
  band = architectures.band_plan(architecture, height, width)
  pooled = [stage for stage in band if stage.pool]
  last = height >> len(pooled), width >> len(pooled)
  everything = architecture.readout == 'global_average_pool'
  radii = (last[0] - 1, last[1] - 1) if everything else (0, 0)
  rows = make_axes([(stage.height, stage.radius_h) for stage in pooled] + [(last[0], radii[0])])
  columns = make_axes([(stage.width, stage.radius_w) for stage in pooled] + [(last[1], radii[1])])
  bands = list(zip(rows, columns))
  convs = architecture.convs_by_level
  has_relu = [architecture.hidden + sum(convs[i:]) > 0 for i in range(len(convs) + 1)]
  return list(map(Level, convs, bands, [*bands[1:], None], itertools.pairwise(has_relu)))


def make_axes(sizes: list[tuple[int, int]]) -> list[Axis]:
  """One axis at each resolution, from (size, radius).

  Periodic at all of them, or plain at all of them, whichever holds less.
  """
  size, radius = sizes[0]
  pools = len(sizes) - 1
  period = -(-size >> pools) << pools
  if period**2 <= (2 * radius + 1) * size and all(2 * r + 1 >= n for n, r in sizes):
    return [Axis(n, period >> i, 0, period >> i, True) for i, (n, _) in enumerate(sizes)]
  return [Axis(n, n, -r, 2 * r + 1, False) for n, r in sizes]


def lay_out(
  x: jax.Array, axes: Axes, shift: bool, fill: float, margins: tuple[int, int] = (0, 0)
) -> jax.Array:
  """Lays out x [H, W, ...] on the rows and columns of a band, for `Axis.own` or `Axis.gather`.

  Args:
    shift: x is of x2, and is to be sliced at an offset; else it is of x1.
    fill: the value where there is no pixel.
    margins: pixels more at both ends of each axis.
  """
  for i, (axis, margin) in enumerate(zip(axes, margins)):
    x = (axis.gather if shift else axis.own)(x, i, fill, margin)
  return x
