"""The NTK in pure JAX, exact, by offsets.

The covariance of a pair of images is held by offset, `n[d, y] = cov(x1[y], x2[y + d])`: a 3x3
convolution is then a 3x3 box sum over `y` at fixed `d`, ReLU is pointwise, and only pooling mixes
offsets. So each offset streams through a whole resolution on its own, and only the offsets that the
output depends on (`architectures.band_plan`) are computed at all. The vjp recomputes each offset
and pulls back through it.

Up to the last ReLU n is held as the half squared distance `m = (q1 + q2) / 2 - n`, of the two
pixels' variances q: where patches are nearly the same, 1 - cosine decides the gradient, and would
be lost in the rounding of n. Input: m = |x1 - x2|² / 2D. A convolution sums m as it sums n, without
the bias, a tap that only one image has (a ghost) counting q / 2 of that image. Pooling takes from
the mean over the pairs of two windows half of the mean within each window (its spread). The
derivatives are those by n and the deviations, at fixed q: a cotangent of m is that of n with the
sign changed, and all else that m is made of counts as constant.

Letters: rows and columns `y` [R, Q] of one resolution, pairs of images last (`[..., a, b]`: a of
x1, b of x2; `[..., N]` for an image with itself); n the NNGP, t the NTK, s = √q the deviations, q
being an image's own variances. Equations: NTK parameterisation of Neural Tangents.
"""

import concurrent.futures
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels.precision  # noqa: F401
from kernels import architectures, contract


class _Budget(NamedTuple):
  """What a device takes on at once. Tiles belong to the bits of a result, so nothing here follows
  the memory that happens to be free.

  Attributes:
    tile_bytes: of the stage inputs that a tile keeps for its vjp; at its worst it holds four times
      as much (a compiled ConvNet's and Myrtle10's memory).
    kept_bytes: of stage inputs kept between a block and its vjp, all tiles together.
    images: a tile, of images on their own.
  """

  tile_bytes: int
  kept_bytes: int
  images: int


_CPU_PAIRS = 128  # a tile: an offset's arrays stay in a core's cache
# Of an offset's arrays: with 8 MB to read, a launch lasts longer than the launching of the next.
_GPU_ENTRIES = 2**21
_GPU_TILES = 2  # at a time: one is sent there and launched while another is computed
# The GPU's: 6 GiB at most.
_CPU, _GPU = _Budget(2**28, 2**29, 16), _Budget(2**29, 2**31, 256)

_GPU_OPTIONS = {'xla_gpu_deterministic_ops': True, 'xla_gpu_autotune_level': 0}

# What is rounding: of 1 - |c| in hidden layers, which hold n, in float64; and of m after a pooling,
# relative to √(V (V + q)), V the spread. Identical images must not see the cusp of dot at c = 1,
# where its square root would turn an error of 1e-7 into one of 1e-4.
_CUSP = 1e-14
_ROUNDING = {np.dtype('float32'): 2.5e-7, np.dtype('float64'): 2e-15}

# From fit_polynomials.py.
_ANGLE = (
  3.654233529e-04,
  -4.185382641e-04,
  8.926287789e-04,
  1.073579185e-03,
  4.253426045e-03,
  1.875435281e-02,
  2.250791036e-01,
)
_EXCESS = (
  3.846374467e-05,
  -3.146352209e-05,
  1.219570371e-04,
  2.619582706e-04,
  1.208874616e-03,
  7.502429084e-03,
  1.500527216e-01,
)


# The band: which offsets, and which rows of an offset, are held.


class Axis(NamedTuple):
  """One image axis at one resolution.

  Row y of offset d pairs pixel y of x1 with pixel y + d of x2. A plain axis keeps offsets
  -radius..radius, and rows where y + d is no pixel hold junk that nothing genuine reads. A periodic
  one, used where nearly all offsets are needed, keeps d modulo its rows, so that no row is wasted;
  where `size` is odd at some pooling it has phantom rows beyond `size`, which likewise nothing
  reads.
  """

  size: int
  rows: int
  first: int
  count: int
  periodic: bool

  def partner(self) -> np.ndarray:
    """[count, rows]: the pixel y + d, or -1 where that is none (or y is none)."""
    y, d = np.arange(self.rows), self.first + np.arange(self.count)[:, None]
    partner = (y + d) % self.rows if self.periodic else y + d
    return np.where((y < self.size) & (partner >= 0) & (partner < self.size), partner, -1)

  def pieces(self) -> list[np.ndarray]:
    """[3, count, 1 + rows + 1] each: the rows of an offset in unbroken pieces, across whose ends no
    convolution may reach.

    Whether, on the piece's line, there is row y, from -1 to `rows`, in both images, in x1 only, in
    x2 only.
    """
    y, d = np.arange(-1, self.rows + 1), self.first + np.arange(self.count)[:, None]
    in1 = (y >= 0) & (y < self.size)
    pieces = []
    for partner in (y + d, y + d - self.rows)[: 1 + self.periodic]:
      in2 = (partner >= 0) & (partner < self.size)
      pieces.append(np.stack([in1 & in2, in1 & ~in2, ~in1 & in2]))
    return pieces

  def feeds(self, above: 'Axis') -> tuple[np.ndarray, np.ndarray]:
    """[count], [count, 2, 2]: slot s of a 2x2 pooling's output, and the share that rows of parity p
    have in the slots s, s + 1.

    Rows of parity p feed the offset (d + p) >> 1. Slots are the offsets of `above` with a spare one
    at the end, and, on a plain axis, at the start; see `from_slots`.
    """
    d = self.first + np.arange(self.count)
    slot = (d >> 1) - above.first + (not above.periodic)
    return slot, (
      (d[:, None] + np.arange(2) >> 1) - (d >> 1)[:, None] == np.arange(2)[:, None, None]
    ).transpose(1, 0, 2) / 4

  @property
  def slots(self) -> int:
    return self.count + (1 if self.periodic else 2)

  def from_slots(self, v, axis: int):
    """Offsets along `axis` of v, from slots."""
    v = jnp.moveaxis(v, axis, 0)
    v = jnp.concatenate([v[:1] + v[-1:], v[1:-1]]) if self.periodic else v[1:-1]
    return jnp.moveaxis(v, 0, axis)

  def to_slots(self, v, axis: int):
    """The adjoint of `from_slots`."""
    v = jnp.moveaxis(v, axis, 0)
    v = jnp.concatenate(
      [v, v[:1]] if self.periodic else [jnp.zeros_like(v[:1]), v, jnp.zeros_like(v[:1])]
    )
    return jnp.moveaxis(v, 0, axis)

  def gather(self, x, axis: int, fill, margin: int = 0):
    """Pixels along `axis` of x, as `first .. first + rows + count - 2`, `fill` where there are
    none: a slice at k shows offset k."""
    pixel = self.first + np.arange(-margin, self.rows + self.count - 1 + margin)
    pixel = pixel % self.rows if self.periodic else pixel
    inside = ((pixel >= 0) & (pixel < self.size)).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
    return jnp.where(
      inside, jnp.take(x, np.clip(pixel, 0, self.size - 1), axis=axis), jnp.asarray(fill, x.dtype)
    )

  def own(self, x, axis: int, fill, margin: int = 0):
    """Pixels 0 .. rows - 1 along `axis` of x, `fill` beyond its size; and, as in `gather`, `margin`
    more at both ends."""
    ends = [
      (margin, self.rows - self.size + margin, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)
    ]
    # Whose derivative, unlike that of an index, adds nothing up.
    return lax.pad(x, jnp.asarray(fill, x.dtype), ends)


class Level(NamedTuple):
  """All convolutions at one resolution, on the band `axes`; then pooling to the band `above`, or,
  where that is None, the readout.

  distances: whether m enters, and whether m leaves: where there are ReLUs to come. Else n.
  """

  convs: int
  axes: tuple[Axis, Axis]
  above: tuple[Axis, Axis] | None
  distances: tuple[bool, bool]

  @property
  def offsets(self) -> int:
    return self.axes[0].count * self.axes[1].count


def plan(architecture: architectures.Architecture, height: int, width: int) -> list[Level]:
  """The levels, input side first; the last one ends in the readout."""
  band = architectures.band_plan(architecture, height, width)
  everything = architecture.readout == 'global_average_pool'
  resolutions, convs = [], 0
  for stage in band:
    convs += stage.convs
    if stage.pool:
      resolutions.append((convs, (stage.height, stage.width), (stage.radius_h, stage.radius_w)))
      convs = 0
  size = (height >> len(resolutions), width >> len(resolutions))
  resolutions.append((convs, size, tuple(n - 1 for n in size) if everything else (0, 0)))
  axes = list(
    zip(*(_axes([(size[i], radius[i]) for _, size, radius in resolutions]) for i in (0, 1)))
  )
  remaining = [
    architecture.hidden + sum(convs for convs, _, _ in resolutions[i:])
    for i in range(len(resolutions) + 1)
  ]
  return [
    Level(
      convs,
      axes[i],
      axes[i + 1] if i + 1 < len(axes) else None,
      (remaining[i] > 0, remaining[i + 1] > 0),
    )
    for i, (convs, _, _) in enumerate(resolutions)
  ]


def _axes(sizes: list[tuple[int, int]]) -> list[Axis]:
  """One axis at each resolution, from (size, radius): periodic at all of them, or plain, whichever
  holds less."""
  size, radius = sizes[0]
  pools = len(sizes) - 1
  period = -(-size >> pools) << pools
  if period**2 <= (2 * radius + 1) * size and all(2 * r + 1 >= n for n, r in sizes):
    return [Axis(n, period >> i, 0, period >> i, True) for i, (n, _) in enumerate(sizes)]
  return [Axis(n, n, -r, 2 * r + 1, False) for n, r in sizes]


# One offset through one level.


def _angle_excess(r):
  """With c = 1 - r, h = √(1 - c²): 1 - |c|, acos|c| / 2π and (h - |c| acos|c|) / 2π."""
  r = jnp.maximum(jnp.minimum(r, 2 - r), 0)
  root = jnp.sqrt(r)
  if r.dtype == jnp.float32:
    return r, root * _polynomial(_ANGLE, r), r * root * _polynomial(_EXCESS, r)
  angle = jnp.arctan2(root, jnp.sqrt(2 - r)) / np.pi
  return r, angle, root * jnp.sqrt(2 - r) / (2 * np.pi) - (1 - r) * angle


def _polynomial(coefficients, r):
  value = jnp.full_like(r, coefficients[0])
  for coefficient in coefficients[1:]:
    value = value * r + coefficient
  return value


def _ratio(x, s12):
  """x / s12, and 1 where a deviation is 0: of 1 - c that gives Neural Tangents' dot = 1/4 there."""
  return jnp.where(s12 > 0, x / jnp.where(s12 > 0, s12, 1), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_distance(has_bias, m, s1, s2):
  """n, and r = 1 - c."""
  s12 = s1 * s2
  chord = jnp.maximum(m - 0.5 * (s1 - s2) ** 2, 0)
  if not has_bias:  # patches may be multiples of each other, or of any two sizes: still |c| <= 1
    is_rounding = chord * chord <= _ROUNDING[m.dtype] ** 2 * m * (m + s12)
    chord = jnp.where(is_rounding, 0, jnp.minimum(chord, 2 * s12))
  return s12 - chord, _ratio(chord, s12)


_from_distance.defvjp(
  lambda has_bias, m, s1, s2: (_from_distance(has_bias, m, s1, s2), (s1, s2)),
  lambda has_bias, s, cotangents: (-cotangents[0], *map(jnp.zeros_like, s)),
)


@jax.custom_vjp
def _relu(n, r, t, s1, s2):
  """(n' - n / 2, t') of a ReLU; r = 1 - c; t may be None. With dot = 1/2 - acos(c) / 2π: n' = s1 s2
  (h / 2π + c dot), t' = t dot."""
  _, angle, excess = _angle_excess(r)
  return s1 * s2 * excess - 0.5 * jnp.minimum(n, 0), None if t is None else t * (
    0.5 - _rest(r, angle)
  )


def _rest(r, angle):
  """1/2 - dot."""
  return jnp.where(r <= 1, angle, 0.5 - angle)


def _relu_forward(n, r, t, s1, s2):
  return _relu(n, r, t, s1, s2), (n, r, t, s1, s2)


def _relu_backward(saved, cotangents):
  """Differentiates with respect to n, t and s1; s2 is held constant, and r follows n."""
  n, r, t, s1, s2 = saved
  n_bar, t_bar = cotangents
  s12 = s1 * s2
  near, angle, _ = _angle_excess(r)
  rest = _rest(r, angle)
  square = near * (2 - near)  # h²
  # 1/h, and 0 at the cusp.
  inverse = jnp.where(square > 0, lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
  s1_bar = n_bar * (s2 * (square * inverse) / (2 * np.pi))
  n_bar = -n_bar * rest
  if t is not None:
    slope = t_bar * t * inverse / (2 * np.pi)
    n_bar = n_bar + slope / jnp.where(s12 > 0, s12, 1)
    s1_bar = s1_bar - slope * (1 - r) / jnp.where(s1 > 0, s1, 1)
    t_bar = t_bar * (0.5 - rest)
  return n_bar, jnp.zeros_like(r), t_bar, _sum_to(s1_bar, s1.shape), jnp.zeros_like(s2)


_relu.defvjp(_relu_forward, _relu_backward)


def _sum_to(x, shape):
  """x summed along its last axis if `shape` has 1 there: on CPU as a product with ones, since XLA's
  own sum along the vector axis is scalar there, while on a GPU a product would have x written to
  memory first."""
  if x.shape == shape:
    return x
  product = lambda x: jnp.dot(
    x, jnp.ones((x.shape[-1], 1), x.dtype), precision=lax.Precision.HIGHEST
  )
  return lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, -1, keepdims=True))


def _sums(v, axis: int, padding: str = 'SAME'):
  """Sums of three along `axis`."""
  # A reduce_window, rather than sums of shifted arrays, keeps XLA from computing what produces v
  # once for every tap.
  window = tuple(3 if i == axis else 1 for i in range(v.ndim))
  return lax.reduce_window(v, np.zeros((), v.dtype), lax.add, window, (1,) * v.ndim, padding)


@jax.custom_vjp
def _box(v, pieces, ghosts=None):
  """3x3 sums of v [R, Q, ...] within the pieces of its rows and of its columns. Self-adjoint.

  ghosts: for rows, and then for columns, what a tap that only x1, or only x2, has counts: [1 + R +
  1, Q, ...] and [R, 1 + Q + 1, ...].
  """
  for axis, masks in enumerate(pieces):
    masks = [mask.reshape(mask.shape + (1,) * (v.ndim - 1 - axis)) for mask in masks]
    if ghosts is None:
      sums = [_sums(v * both[1:-1], axis) * both[1:-1] for both, _, _ in masks]
    else:
      # Taps of x1 only are rows of v. Those of x2 only may lie outside: adding them to the sums is
      # faster than widening v.
      ghost1, ghost2 = ghosts[axis]
      row = lambda x, step: lax.slice_in_dim(x, 1 + step, x.shape[axis] - 1 + step, axis=axis)
      sums = []
      for both, only1, only2 in masks:
        line = _sums(jnp.where(both[1:-1] > 0, v, only1[1:-1] * row(ghost1, 0)), axis)
        sums.append((line + only2[:-2] * row(ghost2, -1) + only2[2:] * row(ghost2, 1)) * both[1:-1])
    v = functools.reduce(jnp.add, sums)
  return v


_box.defvjp(
  lambda v, pieces, ghosts=None: (_box(v, pieces, ghosts), (pieces, ghosts)),
  lambda constants, v: (_box(v, constants[0]), *jax.tree_util.tree_map(jnp.zeros_like, constants)),
)


class Network(NamedTuple):
  """What a level needs of the architecture."""

  weight: float
  bias: float
  with_ntk: bool


class Side(NamedTuple):
  """What a level needs to know of one side's images on their own, laid out on its band (or, of x2,
  at one offset).

  s: for each convolution, the deviations after it. ghosts: for each, q / 2 before it, in the two
  forms of `_box`. spread: after a pooling to distances, half of the spread within each window, and
  half of what is rounding; else empty.
  """

  s: list
  ghosts: list
  spread: tuple


def _convolutions(level: Level, network: Network, v, t, side1: Side, side2: Side, pieces):
  """One offset through a level's (convolution, ReLU)s. v, m or n, and t [R, Q, ...]; t is None
  where it is identically 0."""
  for i, (s1, s2) in enumerate(zip(side1.s, side2.s)):
    m = network.weight / 9 * _box(v, pieces, list(zip(side1.ghosts[i], side2.ghosts[i])))
    n, r = _from_distance(network.bias > 0, m, s1, s2)
    if network.with_ntk:
      t = n if t is None else network.weight / 9 * _box(t, pieces) + n
    rise, t = _relu(n, r, t, s1, s2)
    v = m / 2 - rise if level.distances[1] or i + 1 < level.convs else n / 2 + rise
  return v, t


# All offsets of one level. `source` is (x1 [R, Q, D, ...], x2 gathered) at the input, (n, t)
# [offsets, R, Q, ...] above it.


class _Scan:
  """The pieces of a level that depend on the offset k, for the bodies of `lax.scan`."""

  def __init__(self, level: Level, source, side1: Side, side2: Side, from_images: bool):
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
    """For `_settle`. Two buffers in turn, since XLA would see through a single one."""
    buffer = jnp.zeros((2,) + self.shape, self.dtype)
    return buffer, buffer if has_t else None

  def split(self, k):
    return k // self.level.axes[1].count, k % self.level.axes[1].count

  def pieces(self, k):
    return tuple(
      [piece[:, i] for piece in pieces] for pieces, i in zip(self._pieces, self.split(k))
    )

  def shifted(self, gathered, k):
    """[R, Q, ...], with its margins, at offset k, of what `Axis.gather` laid out."""
    size = tuple(n - axis.count + 1 for n, axis in zip(gathered.shape, self.level.axes))
    return lax.dynamic_slice(
      gathered, self.split(k) + (0,) * (gathered.ndim - 2), size + gathered.shape[2:]
    )

  def side2(self, k):
    return jax.tree_util.tree_map(lambda gathered: self.shifted(gathered, k), self._side2)

  def entering(self, k):
    """(m or n, t) at offset k."""
    if not self.from_images:
      v, t = (None if v is None else v[k] for v in self.source)
      if self.side1.spread:
        (half1, rounding1), (half2, rounding2) = self.side1.spread, self.side2(k).spread
        v = v - (half1 + half2)
        v = jnp.where(v < rounding1 + rounding2, 0, v)
      return v, t
    x1, x2 = self.source[0], self.shifted(self.source[1], k)
    term = (
      (lambda c: 0.5 * (x1[:, :, c] - x2[:, :, c]) ** 2)
      if self.level.distances[0]
      else (lambda c: x1[:, :, c] * x2[:, :, c])
    )
    return functools.reduce(jnp.add, map(term, range(x1.shape[2]))) / x1.shape[2], None

  def block(self, slots, k):
    """[2, 2, R, Q, ...]: the slots that offset k feeds, of [.., .., R, Q, ...]."""
    start = tuple(slot[i] for slot, i in zip(self._slots, self.split(k)))
    return lax.dynamic_slice(slots, start + (0,) * (slots.ndim - 2), (2, 2) + slots.shape[2:])

  def pool(self, slots, v, k):
    """Adds offset k, v [R, Q, ...], to the slots that it feeds."""
    (i, j), (rows, columns) = self.split(k), (axis.rows for axis in self.level.above)
    parities = v[: 2 * rows, : 2 * columns].reshape((rows, 2, columns, 2) + v.shape[2:])
    block = self.block(slots, k)
    for p in (0, 1):
      for q in (0, 1):
        share = self._shares[0][i][:, None, p] * self._shares[1][j][:, q]
        block = block + share.reshape((2, 2) + (1,) * v.ndim) * parities[:, p, :, q]
    start = (self._slots[0][i], self._slots[1][j]) + (0,) * v.ndim
    return lax.dynamic_update_slice(slots, block, start)

  def unpool(self, slots, k):
    """The adjoint of `pool`: [R, Q, ...]."""
    (i, j), block = self.split(k), self.block(slots, k)
    trailing = (1,) * (block.ndim - 4)
    v = 0
    for a in (0, 1):
      for b in (0, 1):
        share = self._shares[0][i][a][:, None, None] * self._shares[1][j][b]
        v = v + share.reshape((1, 2, 1, 2) + trailing) * block[a, b][:, None, :, None]
    v = v.reshape((2 * v.shape[0], 2 * v.shape[2]) + v.shape[4:])
    return jnp.pad(v, [(0, n - m) for n, m in zip(self.shape, v.shape)])

  def inside(self, k):
    """[R, Q, 1...]: the weight of each entry of offset k in the readout's mean."""
    i, j = self.split(k)
    weight = self._inside[0][i][:, None] * self._inside[1][j]
    return weight.reshape(weight.shape + (1,) * (len(self.shape) - 2))


def _sweep(level: Level, network: Network, from_images: bool, source, side1: Side, side2: Side):
  """(m or n, t) after the level: [offsets above, R, Q, ...] where it ends in a pooling (spreads
  included), [...] at the readout."""
  scan = _Scan(level, source, side1, side2, from_images)
  has_t = network.with_ntk and (level.convs > 0 or (not from_images and source[1] is not None))

  def through(k):
    return _convolutions(level, network, *scan.entering(k), side1, scan.side2(k), scan.pieces(k))

  if level.above is None:

    def read(total, k):
      # In float64: hidden layers take the images' spreads from it.
      parts = (
        None if v is None else jnp.sum(v.astype(jnp.float64) * scan.inside(k), (0, 1))
        for v in through(k)
      )
      return tuple(None if v is None else sum_ + v for sum_, v in zip(total, parts)), None

    zero = jnp.zeros(scan.shape[2:], jnp.float64)
    return lax.scan(read, (zero, zero if has_t else None), jnp.arange(level.offsets))[0]

  def pool(carry, k):
    slots, scratch = carry
    scratch, values = _settle(scratch, through(k), k)
    return (
      tuple(None if v is None else scan.pool(s, v, k) for s, v in zip(slots, values)),
      scratch,
    ), None

  above = level.above
  zero = jnp.zeros(
    (above[0].slots, above[1].slots, above[0].rows, above[1].rows) + scan.shape[2:], scan.dtype
  )
  start = ((zero, zero if has_t else None), scan.scratch(has_t))
  (slots, _), _ = lax.scan(pool, start, jnp.arange(level.offsets))
  return tuple(None if v is None else _band(above, v) for v in slots)


def _settle(scratch, values, k):
  """The values, written into buffers that a loop carries and read back: else XLA computes them anew
  for every use of theirs."""
  scratch = tuple(
    None if v is None else lax.dynamic_update_index_in_dim(b, v, k % 2, 0)
    for b, v in zip(scratch, values)
  )
  return scratch, tuple(
    None if b is None else lax.dynamic_index_in_dim(b, k % 2, 0, keepdims=False) for b in scratch
  )


def _band(axes, slots):
  band = axes[1].from_slots(axes[0].from_slots(slots, 0), 1)
  return band.reshape((-1,) + band.shape[2:])


def _slots(axes, band):
  return axes[1].to_slots(
    axes[0].to_slots(band.reshape((axes[0].count, axes[1].count) + band.shape[1:]), 0), 1
  )


def _sweep_vjp(
  level: Level, network: Network, from_images: bool, source, side1: Side, side2: Side, cotangents
):
  """Pulls cotangents of `_sweep` back to (source, s1). Of images, x1's cotangent alone, in place of
  the source's."""
  scan = _Scan(level, source, side1, side2, from_images)
  if level.above:
    cotangents = tuple(None if v is None else _slots(level.above, v) for v in cotangents)

  def leaving(k):
    if level.above is None:
      return tuple(
        None if v is None else jnp.broadcast_to(v.astype(scan.dtype) * scan.inside(k), scan.shape)
        for v in cotangents
      )
    return tuple(None if v is None else scan.unpool(v, k) for v in cotangents)

  def body(carry, k):
    x1_bar, s1_total, scratch = carry
    scratch, n_t_bar = _settle(scratch, leaving(k), k)
    side2_k, pieces = scan.side2(k), scan.pieces(k)
    _, pull_back = jax.vjp(
      lambda v, t, s: _convolutions(level, network, v, t, side1._replace(s=s), side2_k, pieces),
      *scan.entering(k),
      side1.s,
    )
    n_bar, t_bar, s1_bar = pull_back(n_t_bar)
    if from_images:
      x1, x2 = source[0], scan.shifted(source[1], k)
      sign = -1 if level.distances[0] else 1
      x1_bar = x1_bar + _sum_to(n_bar[:, :, None] * x2, x1.shape) * (sign / x1.shape[2])
    carry = x1_bar, [total + s for total, s in zip(s1_total, s1_bar)], scratch
    return carry, None if from_images else (n_bar, t_bar)

  zeros = (
    jnp.zeros_like(source[0]) if from_images else None,
    jax.tree_util.tree_map(jnp.zeros_like, side1.s),
  )
  start = (*zeros, scan.scratch(cotangents[1] is not None))
  (x1_bar, s1_bar, _), source_bar = lax.scan(body, start, jnp.arange(level.offsets))
  return (x1_bar if from_images else source_bar), s1_bar


# Variances: the pair (x, x), n only, on the narrower band that its diagonals need.


def _variance_levels(
  architecture: architectures.Architecture, height: int, width: int
) -> list[Level]:
  """The levels of an image with itself, up to the last ReLU: none if there is no ReLU."""
  if architecture.hidden:
    return plan(architecture, height, width)
  depth = max((i + 1 for i, stage in enumerate(architecture.stages) if stage.convs), default=0)
  stages = tuple(
    stage._replace(pool=stage.pool and i < depth - 1)
    for i, stage in enumerate(architecture.stages[:depth])
  )
  return (
    plan(dataclasses.replace(architecture, stages=stages, readout='flatten'), height, width)
    if depth
    else []
  )


def _deviations(network: Network, convs: int, q):
  """√q before each ReLU of a level, [convs] times [H, W, N], from the variances q [H, W, N] that
  enter it."""
  deviations = []
  for _ in range(convs):
    q = network.weight / 9 * _sums(_sums(q, 0), 1) + network.bias
    deviations.append(_sqrt(q))
    q = q / 2
  return deviations


def _sqrt(q):
  """√q with derivative 0 at 0."""
  return jnp.where(q > 0, jnp.sqrt(jnp.where(q > 0, q, 1)), 0)


def _lay_out(x, axes, shift: bool, fill, margins=(0, 0)):
  """x [H, W, ...] on the rows and columns of a band: x1's way, or, to be sliced at an offset,
  x2's."""
  for i, (axis, margin) in enumerate(zip(axes, margins)):
    x = (axis.gather if shift else axis.own)(x, i, fill, margin)
  return x


def _side(level: Level, shift: bool, s, q, spread) -> Side:
  """From deviations s [convs] times [H, W, ...], q [H, W, ...] entering the level, and its spread
  (or None)."""
  lay_out = functools.partial(_lay_out, axes=level.axes, shift=shift)
  halves = [q / 2, *(deviation**2 / 4 for deviation in s)][: level.convs]
  ghosts = [
    (lay_out(half, fill=0, margins=(1, 0)), lay_out(_sums(half, 0), fill=0, margins=(0, 1)))
    for half in halves
  ]
  spread = (
    () if spread is None else (spread / 2, _ROUNDING[q.dtype] / 2 * jnp.sqrt(spread * (spread + q)))
  )
  return Side(
    [lay_out(deviation, fill=1) for deviation in s],
    ghosts,
    tuple(lay_out(v, fill=0) for v in spread),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _self_sweep(level: Level, network: Network, from_images: bool, source, s, constants):
  """m or n after the level of images with themselves.

  source is x [H, W, D, N], or m or n [offsets, R, Q, N], s [convs] times [H, W, N], and the
  constants are q [H, W, N] and the spread.
  """
  return _sweep(
    level, network, from_images, *_self_arguments(level, from_images, source, s, constants)
  )[0]


def _self_arguments(level, from_images, source, s, constants):
  source = (
    tuple(_lay_out(source, level.axes, shift, 0) for shift in (False, True))
    if from_images
    else (source, None)
  )
  return source, *(_side(level, shift, s, *constants) for shift in (False, True))


def _self_sweep_backward(level, network, from_images, saved, n_bar):
  # The band of (x, x) and its cotangent are symmetric, so the part of x2 equals the part of x1.
  source, s, constants = saved
  source_bar, s_bar = _sweep_vjp(
    level, network, from_images, *_self_arguments(level, from_images, *saved), (n_bar, None)
  )
  height, width = (axis.size for axis in level.axes)
  return (
    2 * source_bar[:height, :width] if from_images else source_bar[0],
    [2 * s[:height, :width] for s in s_bar],
    jax.tree_util.tree_map(jnp.zeros_like, constants),
  )


_self_sweep.defvjp(
  lambda level, network, from_images, *arguments: (
    _self_sweep(level, network, from_images, *arguments),
    arguments,
  ),
  _self_sweep_backward,
)


def _variances(architecture: architectures.Architecture, x) -> list:
  """What the kernel needs of images x [N, H, W, D] on their own.

  Returns:
    q [N, H, W] entering every level up to the last before a ReLU, at its resolution; the spreads of
    all these levels but the first; and, if there are hidden layers, in float64, q [N] after the
    readout and (but for fully-connected networks) the spread there.
  """
  if not architecture.is_convolutional:
    flat = x.reshape(len(x), -1).astype(jnp.float64)
    return [jnp.mean(flat * flat, 1)] if architecture.hidden else []
  network = Network(architecture.w_std**2, architecture.b_std**2, with_ntk=False)
  source, variances, spreads = jnp.moveaxis(x, 0, -1), [], []
  q, spread = jnp.mean(source * source, 2), None
  for i, level in enumerate(_variance_levels(architecture, *x.shape[1:3])):
    if i and level.distances[0]:
      # The variance of a mean is the mean variance less the spread, which is the m of offset (0,
      # 0), in a plain axis or a periodic one.
      (height, width), offset = (
        (axis.size for axis in level.axes),
        -level.axes[0].first * level.axes[1].count - level.axes[1].first,
      )
      spread = source[offset, :height, :width]
      q = q[: 2 * height, : 2 * width].reshape((height, 2, width, 2, -1)).mean((1, 3))
      q = lax.stop_gradient(q) - spread
      spread = lax.stop_gradient(spread)
      spreads.append(spread)
    if level.distances[0]:
      variances.append(q)
    s = _deviations(network, level.convs, q)
    if level.above or architecture.hidden:
      source = _self_sweep(
        level, network, i == 0, source, s, (q, spread if level.distances[0] else None)
      )
    q = s[-1] ** 2 / 2 if s else q
  levels = [jnp.moveaxis(v, -1, 0) for v in variances + spreads]
  if not architecture.hidden:
    return levels
  mean = jnp.mean(q.astype(jnp.float64), (0, 1))
  # As after a pooling.
  return levels + [lax.stop_gradient(mean) - source, lax.stop_gradient(source)]


def _variances_vjp(architecture: architectures.Architecture, x, q_bar):
  """Pulls cotangents of `_variances` back to x.

  In float64 for fully-connected networks: near the cusp most of it and of the pairs' part cancel.
  """
  x = x.astype(jnp.float64) if not architecture.is_convolutional else x
  return jax.vjp(functools.partial(_variances, architecture), x)[1](q_bar)[0]


# A tile: some images x1 against some x2.


def _dense(architecture, kind, n, t, q1, q2):
  """The layers after the readout: n, t [a, b] (t None if 0); q1 [a], q2 [b] after the readout, None
  without hidden layers. Kernel [a, b]."""
  weight, bias = architecture.w_std**2, architecture.b_std**2
  for _ in range(architecture.hidden):
    n = weight * n + bias
    t = n if t is None else n + weight * t
    q1, q2 = weight * q1 + bias, weight * q2 + bias
    s1, s2 = _sqrt(q1)[:, None], _sqrt(q2)[None, :]
    r = lax.stop_gradient(_ratio(s1 * s2 - n, s1 * s2))
    r = jnp.where(jnp.abs(1 - r) > 1 - _CUSP, jnp.where(r < 1, 0, 2), r)
    rise, t = _relu(n, r, t, s1, s2)
    n = n / 2 + rise
    q1, q2 = q1 / 2, q2 / 2
  n = weight * n + bias
  return n if t is None or kind == 'nngp' else n + weight * t


class _Tile:
  """The arguments of one tile's sweeps, laid out; q1 and q2 as `_variances` gives them."""

  def __init__(self, architecture, x1, q1, x2, q2):
    self.network = Network(architecture.w_std**2, architecture.b_std**2, with_ntk=True)
    self.levels = plan(architecture, *x1.shape[1:3])
    self.images = (
      _lay_out(jnp.moveaxis(x1, 0, -1)[..., None], self.levels[0].axes, False, 0),
      _lay_out(jnp.moveaxis(x2, 0, -1)[..., None, :], self.levels[0].axes, True, 0),
    )
    self._distances = sum(level.distances[0] for level in self.levels)
    self._q1, self._q2 = (q[: max(0, 2 * self._distances - 1)] for q in (q1, q2))

  def side1(self, i, q1):
    return self._side(i, False, [jnp.moveaxis(q, 0, -1)[..., None] for q in q1])

  def side2(self, i):
    return self._side(i, True, [jnp.moveaxis(q, 0, -1)[..., None, :] for q in self._q2])

  def _side(self, i, shift, q):
    level = self.levels[i]
    if not level.distances[0]:
      return Side([], [], ())
    return _side(
      level,
      shift,
      _deviations(self.network, level.convs, q[i]),
      q[i],
      q[self._distances + i - 1] if i else None,
    )

  def forward(self):
    """What enters each level above the first, and the readout's (n, t) [a, b]."""
    sources, source = [], self.images
    for i, level in enumerate(self.levels):
      source = _sweep(level, self.network, i == 0, source, self.side1(i, self._q1), self.side2(i))
      sources.append(source)
    return sources

  def backward(self, sources, cotangents):
    """Cotangents of x1 [a, H, W, D] and of q1 (but for hidden layers), from the readout's."""
    q1_bar = [jnp.zeros_like(q) for q in self._q1]
    for i in reversed(range(len(self.levels))):
      level, source = self.levels[i], sources[i - 1] if i else self.images
      cotangents, s1_bar = _sweep_vjp(
        level, self.network, i == 0, source, self.side1(i, self._q1), self.side2(i), cotangents
      )
      _, pull_back = jax.vjp(lambda q1: self.side1(i, q1).s, self._q1)
      q1_bar = jax.tree_util.tree_map(jnp.add, q1_bar, pull_back(s1_bar)[0])
    height, width = (axis.size for axis in self.levels[0].axes)
    return jnp.moveaxis(cotangents[:height, :width, :, :, 0], -1, 0), q1_bar


def _inner_products(x1, x2):
  """Mean over pixels and channels of x1 [a, ...] x2 [b, ...], in float64: one rounding would be
  seen at the cusp of a hidden layer."""
  flat1, flat2 = (x.reshape(len(x), -1).astype(jnp.float64) for x in (x1, x2))
  return jnp.dot(flat1, flat2.T, precision=lax.Precision.HIGHEST) / flat1.shape[1]


def _tile_forward(architecture, kind, x1, q1, x2, q2):
  """NTK [a, b] of x1 [a, H, W, D] and x2 [b, H, W, D], whose variances are q1, q2; and what
  `_tile_backward` wants of the way."""
  if not architecture.is_convolutional:
    sources = [(_inner_products(x1, x2), None)]
  else:
    sources = _Tile(architecture, x1, q1, x2, q2).forward()
  return _head(architecture, kind, x1.dtype, sources[-1], q1, q2).astype(x1.dtype), sources


def _tile_backward(architecture, kind, x1, q1, x2, q2, sources, cotangent):
  """Cotangents of x1 and q1."""
  _, pull_back = jax.vjp(
    lambda readout, q: _head(architecture, kind, x1.dtype, readout, q, q2), sources[-1], q1
  )
  readout_bar, q1_bar = pull_back(cotangent.astype(jnp.float64))
  if not architecture.is_convolutional:
    flat2 = x2.reshape(len(x2), -1).astype(jnp.float64)
    x1_bar = jnp.dot(readout_bar[0], flat2, precision=lax.Precision.HIGHEST) / flat2.shape[1]
    return x1_bar.reshape(x1.shape), q1_bar
  x1_bar, levels_bar = _Tile(architecture, x1, q1, x2, q2).backward(sources, readout_bar)
  return x1_bar, levels_bar + q1_bar[len(levels_bar) :]


def _head(architecture, kind, dtype, readout, q1, q2):
  """`_dense` in float64, whose cusp would see a rounding of float32; `dtype` is the images'."""
  n, t = readout
  if not architecture.hidden:
    return _dense(architecture, kind, n, t, None, None)
  if not architecture.is_convolutional:
    return _dense(architecture, kind, n, t, q1[-1], q2[-1])
  (*_, q1, spread1), (*_, q2, spread2) = q1, q2
  spreads = lax.stop_gradient(spread1[:, None] + spread2)
  variances = lax.stop_gradient(q1[:, None] + q2)
  m = lax.stop_gradient(n) - spreads / 2
  m = jnp.where(m < _ROUNDING[dtype] / 2 * jnp.sqrt(spreads * (spreads + variances)), 0, m)
  n = variances / 2 - m + (lax.stop_gradient(n) - n)  # the derivative by m, rounding or not
  return _dense(architecture, kind, n, t, q1, q2)


class JaxKernel:
  """NTK blocks by offsets: see the module. Tiles of a fixed number of pairs run on `threads` Python
  threads, and are put together, and summed in float64, in a fixed order: no result depends on the
  number of threads (given NPROC=1, which keeps XLA to one thread a tile).
  """

  implementation = 'jax'

  def __init__(
    self, architecture: architectures.Architecture, dtype: str, threads: int, kind: str = 'ntk'
  ):
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    self._on_cpu = jax.default_backend() == 'cpu'
    self._budget = _CPU if self._on_cpu else _GPU
    self._pool = concurrent.futures.ThreadPoolExecutor(threads if self._on_cpu else _GPU_TILES)
    self._variances = _compiled(functools.partial(_variances, architecture))
    self._variances_vjp = _compiled(functools.partial(_variances_vjp, architecture))
    self._forward = _compiled(functools.partial(_tile_forward, architecture, kind))
    self._block = _compiled(lambda *tile: _tile_forward(architecture, kind, *tile)[0])
    self._backward = _compiled(functools.partial(_tile_backward, architecture, kind))

  def prepare(self, x: np.ndarray) -> contract.Prepared:
    """See `contract.Kernel.prepare`: the variances of every image."""
    tiles = self._pool.map(
      lambda tile: jax.device_get(self._variances(tile)), _tiles(x, self._budget.images)
    )
    return contract.Prepared(x, [np.concatenate(q)[: len(x)] for q in zip(*tiles)], self)

  def block(self, x1, x2) -> np.ndarray:
    """See `contract.Kernel.block`."""
    symmetric = x1 is x2
    x1 = self._prepared(x1)
    x2 = x1 if symmetric else self._prepared(x2)
    a, b = self._tile_shape(x1, x2)
    rows, columns = _prepared_tiles(x1, a), _prepared_tiles(x2, b)
    wanted = [
      (i, j)
      for i in range(len(rows))
      for j in range(len(columns))
      if not symmetric or (j + 1) * b > i * a
    ]
    value = np.zeros((a * len(rows), b * len(columns)), self.dtype)
    for (i, j), tile in zip(
      wanted,
      self._pool.map(lambda ij: np.asarray(self._block(*rows[ij[0]], *columns[ij[1]])), wanted),
    ):
      value[i * a : (i + 1) * a, j * b : (j + 1) * b] = tile
    value = value[: len(x1), : len(x2)]
    return np.triu(value) + np.triu(value, 1).T if symmetric else value

  def block_vjp(self, x1, x2, cotangent) -> tuple[np.ndarray, np.ndarray]:
    """See `contract.Kernel.block_vjp`. Where the cotangent is a function, tiles keep their stage inputs,
    up to a budget."""
    x1, x2 = self._prepared(x1), self._prepared(x2)
    a, b = self._tile_shape(x1, x2)
    rows, columns = _prepared_tiles(x1, a), _prepared_tiles(x2, b)
    value = np.zeros((a * len(rows), b * len(columns)), self.dtype)
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    kept = {}
    if callable(cotangent):
      budget = self._budget.kept_bytes // max(1, self._bytes_per_pair(x1.images.shape) * a * b)

      def forward(place):
        i, j = place
        tile, sources = self._forward(*rows[i], *columns[j])
        if i * len(columns) + j < budget:
          kept[place] = sources
        return np.asarray(tile)

      for place, tile in zip(places, self._pool.map(forward, places)):
        _at(value, place, a, b)[...] = tile
      cotangent = cotangent(value[: len(x1), : len(x2)])
    padded = np.zeros_like(value)
    padded[: len(x1), : len(x2)] = cotangent

    def both(place):
      i, j = place
      tile = *rows[i], *columns[j]
      block, sources = (None, kept.pop(place)) if place in kept else self._forward(*tile)
      return jax.device_get((block, self._backward(*tile, sources, _at(padded, place, a, b))))

    x1_bar = np.zeros((a * len(rows),) + x1.images.shape[1:])
    q1_bar = [np.zeros((a * len(rows),) + q.shape[1:]) for q in x1.variances]
    for (i, j), (tile, (x_piece, q_pieces)) in zip(places, self._pool.map(both, places)):
      if tile is not None:
        _at(value, (i, j), a, b)[...] = tile
      for total, piece in zip([x1_bar] + q1_bar, [x_piece] + q_pieces):
        total[i * a : (i + 1) * a] += piece
    gradient = x1_bar[: len(x1)] + self._through_variances(x1, [q[: len(x1)] for q in q1_bar])
    return value[: len(x1), : len(x2)], gradient.astype(self.dtype)

  def _through_variances(self, x, q_bar):
    """Pulls cotangents of x's variances back to x."""
    if not q_bar:
      return 0
    q_bar = [piece.astype(q.dtype) for piece, q in zip(q_bar, x.variances)]
    size = self._budget.images
    tiles = zip(_tiles(x.images, size), zip(*(_tiles(piece, size) for piece in q_bar)))
    pieces = self._pool.map(
      lambda tile: np.asarray(self._variances_vjp(tile[0], list(tile[1]))), tiles
    )
    return np.concatenate(list(pieces))[: len(x.images)]

  def _prepared(self, x) -> contract.Prepared:
    return x if isinstance(x, contract.Prepared) else self.prepare(x)

  def _bytes_per_pair(self, shape) -> int:
    """Of what a tile keeps for its vjp."""
    if not self.architecture.is_convolutional:
      return 8
    levels = plan(self.architecture, *shape[1:3])[1:]
    return (
      sum(2 * level.offsets * level.axes[0].rows * level.axes[1].rows for level in levels)
      * self.dtype.itemsize
    )

  def _tile_shape(self, x1, x2) -> tuple[int, int]:
    """The least work, padding included, then the most images of x2, that a tile's number of pairs
    allows. On CPU powers of two, so that few shapes compile; on a GPU the images of x1 are shared
    out evenly, and a tile's launches count as an eighth of a full one's work.
    """
    if not self.architecture.is_convolutional:
      pairs = 2**18
    else:
      _, height, width, _ = x1.images.shape
      pairs = (
        (_CPU_PAIRS if self._on_cpu else _power_of_two_to(_GPU_ENTRIES // (height * width)))
        * 4
        // self.dtype.itemsize
      )
      pairs = max(
        16,
        min(
          pairs,
          _power_of_two_to(
            self._budget.tile_bytes // max(1, self._bytes_per_pair(x1.images.shape))
          ),
        ),
      )
    launches = 0 if self._on_cpu else pairs // 8

    def shape(b):
      if self._on_cpu:
        return min(pairs // b, _power_of_two_from(len(x1))), b
      return -(-len(x1) // -(-len(x1) // (pairs // b))), b

    def work(a, b):
      return -(-len(x1) // a) * -(-len(x2) // b) * (a * b + launches)

    widths = [
      2**k for k in range(4, pairs.bit_length() - 1) if 2**k <= max(16, _power_of_two_from(len(x2)))
    ]
    return min((shape(b) for b in widths), key=lambda ab: (work(*ab), -ab[1]))


def _compiled(function):
  """`function` compiled, to be run by the Python thread that calls it; see also `precision`."""
  function = jax.jit(function, compiler_options=_compiler_options())
  # A computation whose arguments are still on their way is queued for XLA's own threads, of which
  # there are NPROC.
  return lambda *arguments: function(*jax.block_until_ready(jax.device_put(arguments)))


@functools.cache
def _compiler_options() -> dict[str, bool | int]:
  """On CPU, where XLA still has it, its first runtime: on JAX 0.5.3 twice as fast, and it runs
  loops in the calling thread, where the newer one hands them to its NPROC threads. On GPU, no
  algorithm whose sums have no fixed order, and none chosen by timing it.
  """
  if jax.default_backend() != 'cpu':
    return _GPU_OPTIONS
  options = {'xla_cpu_use_thunk_runtime': False}
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:
    return {}
  return options


def _power_of_two_from(n: int) -> int:
  return 1 << (n - 1).bit_length()


def _power_of_two_to(n: int) -> int:
  return 1 << max(0, n.bit_length() - 1)


def _at(value, place, a, b):
  return value[place[0] * a : (place[0] + 1) * a, place[1] * b : (place[1] + 1) * b]


def _tiles(x, size):
  """`x` cut into tiles of exactly `size` images, the last one filled up with its last image."""
  x = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
  return [x[i : i + size] for i in range(0, len(x), size)]


def _prepared_tiles(x: contract.Prepared, size):
  """Tiles (images, variances)."""
  variances = [_tiles(q, size) for q in x.variances]
  return [(images, [q[i] for q in variances]) for i, images in enumerate(_tiles(x.images, size))]
