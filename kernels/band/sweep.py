"""All offsets through one level, and back.

A level's `source` is (x1 [R, Q, D, ...], x2 laid out to be sliced at an offset) where it starts
from images, else (m or n, t) [offsets, R, Q, ...], t being None where it is identically 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels.precision  # noqa: F401
from kernels.band.layers import Network, Side, convolutions, sum_to
from kernels.band.offsets import Axes, Level

Source = tuple[Any, Any]


def sweep(
  level: Level, network: Network, from_images: bool, source: Source, side1: Side, side2: Side
) -> tuple:
  """Takes a level's source through it.

  Returns:
    (m or n, t) after it: [offsets above, R, Q, ...] where it ends in a pooling, with the spreads in
    m; at the readout [...], in float64.
  """
  bodies = _Bodies(level, source, side1, side2, from_images)
  has_t = network.with_ntk and (level.convs > 0 or (not from_images and source[1] is not None))

  def through(k):
    entering, constants = bodies.entering(k), bodies.side2(k)
    return convolutions(level, network, *entering, side1, constants, bodies.pieces(k))

  if level.above is None:

    def read(total, k):
      # In float64: hidden layers take the images' spreads from it.
      parts = (
        None if v is None else jnp.sum(v.astype(jnp.float64) * bodies.inside(k), (0, 1))
        for v in through(k)
      )
      return tuple(None if v is None else sum_ + v for sum_, v in zip(total, parts)), None

    zero = jnp.zeros(bodies.shape[2:], jnp.float64)
    return lax.scan(read, (zero, zero if has_t else None), jnp.arange(level.offsets))[0]

  above = level.above

  def pool(carry, k):
    slots, scratch = carry
    scratch, values = _settle(scratch, through(k), k)
    slots = tuple(None if v is None else bodies.pool(s, v, k) for s, v in zip(slots, values))
    return (slots, scratch), None

  shape = above[0].slots, above[1].slots, above[0].rows, above[1].rows, *bodies.shape[2:]
  zero = jnp.zeros(shape, bodies.dtype)
  start = ((zero, zero if has_t else None), bodies.scratch(has_t))
  (slots, _), _ = lax.scan(pool, start, jnp.arange(level.offsets))
  return tuple(None if v is None else _from_slots(above, v) for v in slots)


def sweep_vjp(
  level: Level,
  network: Network,
  from_images: bool,
  source: Source,
  side1: Side,
  side2: Side,
  cotangents: tuple,
) -> tuple:
  """Pulls cotangents of `sweep`'s result back.

  Returns:
    the source's cotangents (of images x1's alone), and those of `side1.s`.
  """
  bodies = _Bodies(level, source, side1, side2, from_images)
  above = level.above
  if above is not None:
    cotangents = tuple(None if v is None else _to_slots(above, v) for v in cotangents)

  def leaving(k):
    if above is not None:
      return tuple(None if v is None else bodies.unpool(v, k) for v in cotangents)
    return tuple(
      None
      if v is None
      else jnp.broadcast_to(v.astype(bodies.dtype) * bodies.inside(k), bodies.shape)
      for v in cotangents
    )

  def body(carry, k):
    x1_bar, s1_total, scratch = carry
    scratch, n_t_bar = _settle(scratch, leaving(k), k)
    side2_k, pieces = bodies.side2(k), bodies.pieces(k)
    _, pull_back = jax.vjp(
      lambda v, t, s: convolutions(level, network, v, t, side1._replace(s=s), side2_k, pieces),
      *bodies.entering(k),
      side1.s,
    )
    n_bar, t_bar, s1_bar = pull_back(n_t_bar)
    if from_images:
      x1, x2 = source[0], bodies.shifted(source[1], k)
      sign = -1 if level.distances[0] else 1
      x1_bar = x1_bar + sum_to(n_bar[:, :, None] * x2, x1.shape) * (sign / x1.shape[2])
    carry = x1_bar, [total + s for total, s in zip(s1_total, s1_bar)], scratch
    return carry, None if from_images else (n_bar, t_bar)

  x1_zero = jnp.zeros_like(source[0]) if from_images else None
  s1_zero = jax.tree_util.tree_map(jnp.zeros_like, side1.s)
  start = (x1_zero, s1_zero, bodies.scratch(cotangents[1] is not None))
  (x1_bar, s1_bar, _), source_bar = lax.scan(body, start, jnp.arange(level.offsets))
  return (x1_bar if from_images else source_bar), s1_bar


class _Bodies:
  """The parts of a level that depend on the offset k, for the bodies of `lax.scan`."""

  def __init__(self, level: Level, source: Source, side1: Side, side2: Side, from_images: bool):
    self.level, self.source, self.side1, self.from_images = level, source, side1, from_images
    self._side2 = side2
    self.dtype = source[0].dtype
    if from_images:  # [R, Q, ...] of the band
      x1, x2 = source
      self.shape = x1.shape[:2] + np.broadcast_shapes(x1.shape[3:], x2.shape[3:])
    else:
      self.shape = source[0].shape[1:]
    self._pieces = [
      [jnp.asarray(piece, self.dtype) for piece in axis.pieces()] for axis in level.axes
    ]
    if level.above:
      feeds = [axis.feeds(above) for axis, above in zip(level.axes, level.above)]
      self._slots = [jnp.asarray(slots) for slots, _ in feeds]
      self._shares = [jnp.asarray(shares, self.dtype) for _, shares in feeds]
    else:
      inside = [axis.partner() >= 0 for axis in level.axes]
      self._inside = [jnp.asarray(rows / np.sum(rows), self.dtype) for rows in inside]

  def scratch(self, has_t: bool):
    """Buffers for `_settle`: two in turn, since XLA would see through a single one."""
    buffer = jnp.zeros((2,) + self.shape, self.dtype)
    return buffer, buffer if has_t else None

  def split(self, k):
    """The offset's number along rows, and along columns."""
    return k // self.level.axes[1].count, k % self.level.axes[1].count

  def pieces(self, k):
    return tuple(
      [piece[:, i] for piece in pieces] for pieces, i in zip(self._pieces, self.split(k))
    )

  def shifted(self, gathered, k):
    """At offset k, [R, Q, ...] with its margins, of what `Axis.gather` laid out."""
    size = tuple(n - axis.count + 1 for n, axis in zip(gathered.shape, self.level.axes))
    return lax.dynamic_slice(
      gathered, self.split(k) + (0,) * (gathered.ndim - 2), size + gathered.shape[2:]
    )

  def side2(self, k) -> Side:
    return jax.tree_util.tree_map(lambda gathered: self.shifted(gathered, k), self._side2)

  def entering(self, k) -> tuple[jax.Array, jax.Array | None]:
    """(m or n, t) at offset k."""
    if not self.from_images:
      v: jax.Array = self.source[0][k]
      t = None if self.source[1] is None else self.source[1][k]
      if self.side1.spread:
        (half1, rounding1), (half2, rounding2) = self.side1.spread, self.side2(k).spread
        v = v - (half1 + half2)
        v = jnp.where(v < rounding1 + rounding2, 0, v)
      return v, t
    x1, x2 = self.source[0], self.shifted(self.source[1], k)

    def term(c):
      if self.level.distances[0]:
        return 0.5 * (x1[:, :, c] - x2[:, :, c]) ** 2
      return x1[:, :, c] * x2[:, :, c]

    return functools.reduce(jnp.add, map(term, range(x1.shape[2]))) / x1.shape[2], None

  def pool(self, slots, v, k):
    """Adds offset k, v [R, Q, ...], to the slots that it feeds."""
    (i, j), (rows, columns) = self.split(k), slots.shape[2:4]
    parities = v[: 2 * rows, : 2 * columns].reshape((rows, 2, columns, 2) + v.shape[2:])
    block = self._fed(slots, k)
    for p in (0, 1):
      for q in (0, 1):
        share = self._shares[0][i][:, None, p] * self._shares[1][j][:, q]
        block = block + share.reshape((2, 2) + (1,) * v.ndim) * parities[:, p, :, q]
    start = (self._slots[0][i], self._slots[1][j]) + (0,) * v.ndim
    return lax.dynamic_update_slice(slots, block, start)

  def unpool(self, slots, k):
    """The adjoint of `pool`: [R, Q, ...]."""
    (i, j), block = self.split(k), self._fed(slots, k)
    trailing = (1,) * (block.ndim - 4)
    v = 0
    for a in (0, 1):
      for b in (0, 1):
        share = self._shares[0][i][a][:, None, None] * self._shares[1][j][b]
        v = v + share.reshape((1, 2, 1, 2) + trailing) * block[a, b][:, None, :, None]
    v = v.reshape((2 * v.shape[0], 2 * v.shape[2]) + v.shape[4:])
    return jnp.pad(v, [(0, n - m) for n, m in zip(self.shape, v.shape)])

  def _fed(self, slots, k):
    """The slots that offset k feeds, [2, 2, R, Q, ...], of [.., .., R, Q, ...]."""
    start = tuple(slot[i] for slot, i in zip(self._slots, self.split(k)))
    return lax.dynamic_slice(slots, start + (0,) * (slots.ndim - 2), (2, 2) + slots.shape[2:])

  def inside(self, k):
    """The weight of each entry of offset k in the readout's mean, [R, Q, 1...]."""
    i, j = self.split(k)
    weight = self._inside[0][i][:, None] * self._inside[1][j]
    return weight.reshape(weight.shape + (1,) * (len(self.shape) - 2))


def _settle(scratch: tuple, values: tuple, k) -> tuple[tuple, tuple]:
  """Writes the values into buffers that a loop carries, and reads them back.

  Else XLA computes them anew for every use of theirs.
  """
  scratch = tuple(
    None if v is None else lax.dynamic_update_index_in_dim(b, v, k % 2, 0)
    for b, v in zip(scratch, values)
  )
  return scratch, tuple(
    None if b is None else lax.dynamic_index_in_dim(b, k % 2, 0, keepdims=False) for b in scratch
  )


def _from_slots(axes: Axes, slots):
  """A band [offsets, R, Q, ...], from its slots."""
  band = axes[1].from_slots(axes[0].from_slots(slots, 0), 1)
  return band.reshape((-1,) + band.shape[2:])


def _to_slots(axes: Axes, band):
  """The adjoint of `_from_slots`."""
  band = band.reshape((axes[0].count, axes[1].count) + band.shape[1:])
  return axes[1].to_slots(axes[0].to_slots(band, 0), 1)
