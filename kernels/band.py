"""The NTK in pure JAX, exact, by offsets.

The covariance of a pair of images is held by offset, `n[d, y] = cov(x1[y], x2[y + d])`: a 3x3 convolution is then a 3x3 box sum over `y` at
fixed `d`, ReLU is pointwise, and only pooling mixes offsets. So each offset streams through a whole resolution on its own, and only the
offsets that the output depends on (`architectures.band_plan`) are computed at all. The vjp recomputes each offset and pulls
back through it.

Letters: rows and columns `y` [R, Q] of one resolution, pairs of images last (`[..., a, b]`: a of x1, b of x2; `[..., N]` for an image with
itself); n the NNGP, t the NTK, s = √q the deviations, q being an image's own variances. Equations: NTK parameterisation of Neural Tangents.
"""

import concurrent.futures
import dataclasses
import functools
from typing import NamedTuple

from kernels import precision  # pylint: disable=unused-import

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from kernels import architectures
from kernels import ntk

_CPU_PAIRS, _GPU_PAIRS = 128, 2048  # pairs a tile: an offset's arrays should stay in a core's cache; a GPU wants all it can get
_TILE_BYTES = 2 ** 28  # of the stage inputs that a tile keeps for its vjp
_KEPT_BYTES = 2 ** 29  # of stage inputs kept between a block and its vjp, all tiles together
_VARIANCE_IMAGES = 16

# Below this, 1 - |c| is rounding: dot has a cusp at c = 1, where its square root would turn an error of 1e-7 into one of 1e-4. Measured in
# float32: at 1e-7 identical images err by 3e-5 in K, from 2e-7 on by 2e-7; x + 2e-3 noise errs by 2e-7 at 2e-7, 1e-5 at 3e-7, 6e-5 at 5e-7.
_CUSP = {np.dtype('float32'): 3e-7, np.dtype('float64'): 1e-14}

# From fit_polynomials.py.
_ANGLE = (3.654233529e-04, -4.185382641e-04, 8.926287789e-04, 1.073579185e-03, 4.253426045e-03, 1.875435281e-02, 2.250791036e-01)
_EXCESS = (3.846374467e-05, -3.146352209e-05, 1.219570371e-04, 2.619582706e-04, 1.208874616e-03, 7.502429084e-03, 1.500527216e-01)


# The band: which offsets, and which rows of an offset, are held.


class Axis(NamedTuple):
  """One image axis at one resolution.

  Row y of offset d pairs pixel y of x1 with pixel y + d of x2. A plain axis keeps offsets -radius..radius, and rows where y + d is no
  pixel hold junk that nothing genuine reads. A periodic one, used where nearly all offsets are needed, keeps d modulo its rows, so that
  no row is wasted; where `size` is odd at some pooling it has phantom rows beyond `size`, which likewise nothing reads.
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
    """[count, rows] each: the rows of an offset in unbroken pieces, across whose ends no convolution may reach."""
    partner, y = self.partner(), np.arange(self.rows)
    return [(partner >= 0) & wrapped for wrapped in ((partner >= y, partner < y) if self.periodic else (True,))]

  def feeds(self, above: 'Axis') -> tuple[np.ndarray, np.ndarray]:
    """[count], [count, 2, 2]: slot s of a 2x2 pooling's output, and the share that rows of parity p have in the slots s, s + 1.

    Rows of parity p feed the offset (d + p) >> 1. Slots are the offsets of `above` with a spare one at the end, and, on a plain axis,
    at the start; see `from_slots`.
    """
    d = self.first + np.arange(self.count)
    slot = (d >> 1) - above.first + (not above.periodic)
    return slot, ((d[:, None] + np.arange(2) >> 1) - (d >> 1)[:, None] == np.arange(2)[:, None, None]).transpose(1, 0, 2) / 4

  @property
  def slots(self) -> int:
    return self.count + (1 if self.periodic else 2)

  def from_slots(self, v, axis: int):
    """Offsets along `axis` of v, from slots."""
    v = jnp.moveaxis(v, axis, 0)
    v = v[:-1].at[0].add(v[-1]) if self.periodic else v[1:-1]
    return jnp.moveaxis(v, 0, axis)

  def to_slots(self, v, axis: int):
    """The adjoint of `from_slots`."""
    v = jnp.moveaxis(v, axis, 0)
    v = jnp.concatenate([v, v[:1]] if self.periodic else [jnp.zeros_like(v[:1]), v, jnp.zeros_like(v[:1])])
    return jnp.moveaxis(v, 0, axis)

  def gather(self, x, axis: int, fill):
    """Pixels along `axis` of x, as `first .. first + rows + count - 2`, `fill` where there are none: a slice at k shows offset k."""
    pixel = self.first + np.arange(self.rows + self.count - 1)
    pixel = pixel % self.rows if self.periodic else pixel
    return _take(x, pixel, self.size, axis, fill)

  def own(self, x, axis: int, fill):
    """Pixels 0 .. rows - 1 along `axis` of x, `fill` beyond its size."""
    return _take(x, np.arange(self.rows), self.size, axis, fill)


def _take(x, pixel, size, axis, fill):
  inside = ((pixel >= 0) & (pixel < size)).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
  return jnp.where(inside, jnp.take(x, np.clip(pixel, 0, size - 1), axis=axis), jnp.asarray(fill, x.dtype))


class Level(NamedTuple):
  """All convolutions at one resolution, on the band `axes`; then pooling to the band `above`, or, where that is None, the readout."""
  convs: int
  axes: tuple[Axis, Axis]
  above: tuple[Axis, Axis] | None

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
  axes = list(zip(*(_axes([(size[i], radius[i]) for _, size, radius in resolutions]) for i in (0, 1))))
  return [Level(convs, axes[i], axes[i + 1] if i + 1 < len(axes) else None) for i, (convs, _, _) in enumerate(resolutions)]


def _axes(sizes: list[tuple[int, int]]) -> list[Axis]:
  """One axis at each resolution, from (size, radius): periodic at all of them, or plain, whichever holds less."""
  size, radius = sizes[0]
  pools = len(sizes) - 1
  period = -(-size >> pools) << pools
  if period ** 2 <= (2 * radius + 1) * size and all(2 * r + 1 >= n for n, r in sizes):
    return [Axis(n, period >> i, 0, period >> i, True) for i, (n, _) in enumerate(sizes)]
  return [Axis(n, n, -r, 2 * r + 1, False) for n, r in sizes]


# One offset through one level.


def _angle_excess(c):
  """With r = 1 - |c|, h = √(1 - c²): r, acos|c| / 2π and (h - |c| acos|c|) / 2π; zeros at the cusp."""
  r = 1 - jnp.abs(c)
  r = jnp.where(r < _CUSP[c.dtype], 0, r)
  root = jnp.sqrt(r)
  if c.dtype == jnp.float32:
    return r, root * _polynomial(_ANGLE, r), r * root * _polynomial(_EXCESS, r)
  angle = jnp.arctan2(root, jnp.sqrt(2 - r)) / np.pi
  return r, angle, root * jnp.sqrt(2 - r) / (2 * np.pi) - (1 - r) * angle


def _polynomial(coefficients, r):
  value = jnp.full_like(r, coefficients[0])
  for coefficient in coefficients[1:]:
    value = value * r + coefficient
  return value


def _correlation(n, s1, s2):
  """c = n / (s1 s2); 0 where a deviation is 0, which gives Neural Tangents' dot = 1/4 there."""
  s12 = s1 * s2
  return n / jnp.where(s12 > 0, s12, 1), s12


@jax.custom_vjp
def _relu(n, t, s1, s2):
  """(n, t) after a ReLU; t may be None. With dot = 1/2 - acos(c) / 2π: n' = s1 s2 (h / 2π + c dot), t' = t dot."""
  c, s12 = _correlation(n, s1, s2)
  _, angle, excess = _angle_excess(c)
  return 0.5 * jnp.maximum(n, 0) + s12 * excess, None if t is None else t * jnp.where(c >= 0, 0.5 - angle, angle)


def _relu_forward(n, t, s1, s2):
  return _relu(n, t, s1, s2), (n, t, s1, s2)


def _relu_backward(saved, cotangents):
  """Differentiates with respect to n, t and s1; s2 is held constant."""
  n, t, s1, s2 = saved
  n_bar, t_bar = cotangents
  c, s12 = _correlation(n, s1, s2)
  r, angle, _ = _angle_excess(c)
  dot = jnp.where(c >= 0, 0.5 - angle, angle)
  square = r * (2 - r)  # h²
  inverse = jnp.where(square > 0, lax.rsqrt(jnp.where(square > 0, square, 1)), 0)  # 1/h, and 0 at the cusp
  s1_bar = n_bar * (s2 * (square * inverse) / (2 * np.pi))
  n_bar = n_bar * dot
  if t is not None:
    slope = t_bar * t * inverse / (2 * np.pi)
    n_bar = n_bar + slope / jnp.where(s12 > 0, s12, 1)
    s1_bar = s1_bar - slope * c / jnp.where(s1 > 0, s1, 1)
    t_bar = t_bar * dot
  return n_bar, t_bar, _sum_to(s1_bar, s1.shape), jnp.zeros_like(s2)


_relu.defvjp(_relu_forward, _relu_backward)


def _sum_to(x, shape):
  """x summed along its last axis if `shape` has 1 there: as a product with ones, since XLA's own sum along the vector axis is scalar."""
  if x.shape == shape:
    return x
  return jnp.dot(x, jnp.ones((x.shape[-1], 1), x.dtype), precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def _box(v, pieces):
  """3x3 sums of v [R, Q, ...] within the pieces of its rows [.., R] and of its columns [.., Q]. Self-adjoint."""
  for axis, masks in enumerate(pieces):
    window = tuple(3 if i == axis else 1 for i in range(v.ndim))
    masks = [mask.reshape(mask.shape + (1,) * (v.ndim - 1 - axis)) for mask in masks]
    # A reduce_window, rather than sums of shifted arrays, keeps XLA from computing what produces v once for every tap.
    sums = [lax.reduce_window(v * m, np.zeros((), v.dtype), lax.add, window, (1,) * v.ndim, 'SAME') * m for m in masks]
    v = functools.reduce(jnp.add, sums)
  return v


_box.defvjp(lambda v, pieces: (_box(v, pieces), pieces),
            lambda pieces, v: (_box(v, pieces), jax.tree_util.tree_map(jnp.zeros_like, pieces)))


class Network(NamedTuple):
  """What a level needs of the architecture."""
  weight: float
  bias: float
  with_ntk: bool


def _convolutions(network: Network, n, t, s1, s2, pieces):
  """One offset through a level's (convolution, ReLU)s. n, t [R, Q, ...]; t is None where it is identically 0."""
  for deviation1, deviation2 in zip(s1, s2):
    n = network.weight / 9 * _box(n, pieces) + network.bias
    if network.with_ntk:
      t = n if t is None else network.weight / 9 * _box(t, pieces) + n
    n, t = _relu(n, t, deviation1, deviation2)
  return n, t


# All offsets of one level. `source` is (x1 [R, Q, D, ...], x2 gathered) at the input, (n, t) [offsets, R, Q, ...] above it.


class _Scan:
  """The pieces of a level that depend on the offset k, for the bodies of `lax.scan`."""

  def __init__(self, level: Level, source, s2, from_images: bool):
    self.level, self.source, self.s2, self.from_images = level, source, s2, from_images
    self.dtype = source[0].dtype
    if from_images:  # [R, Q, ...] of the band
      x1, x2 = source
      self.shape = x1.shape[:2] + np.broadcast_shapes(x1.shape[3:], x2.shape[3:])
    else:
      self.shape = source[0].shape[1:]
    self._pieces = [[jnp.asarray(piece, self.dtype) for piece in axis.pieces()] for axis in level.axes]
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
    return tuple([piece[i] for piece in pieces] for pieces, i in zip(self._pieces, self.split(k)))

  def shifted(self, gathered, k):
    """[R, Q, ...] at offset k, of what `Axis.gather` laid out."""
    rows, columns = self.level.axes[0].rows, self.level.axes[1].rows
    return lax.dynamic_slice(gathered, self.split(k) + (0,) * (gathered.ndim - 2), (rows, columns) + gathered.shape[2:])

  def deviations2(self, k):
    return [self.shifted(s, k) for s in self.s2]

  def entering(self, k):
    """(n, t) at offset k."""
    if not self.from_images:
      return tuple(None if v is None else v[k] for v in self.source)
    x1, x2 = self.source[0], self.shifted(self.source[1], k)
    channels = x1.shape[2]
    return functools.reduce(jnp.add, (x1[:, :, c] * x2[:, :, c] for c in range(channels))) / channels, None

  def block(self, slots, k):
    """[2, 2, R, Q, ...]: the slots that offset k feeds, of [.., .., R, Q, ...]."""
    start = tuple(slot[i] for slot, i in zip(self._slots, self.split(k)))
    return lax.dynamic_slice(slots, start + (0,) * (slots.ndim - 2), (2, 2) + slots.shape[2:])

  def pool(self, slots, v, k):
    """Adds offset k, v [R, Q, ...], to the slots that it feeds."""
    (i, j), (rows, columns) = self.split(k), (axis.rows for axis in self.level.above)
    parities = v[:2 * rows, :2 * columns].reshape((rows, 2, columns, 2) + v.shape[2:])
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


def _sweep(level: Level, network: Network, from_images: bool, source, s1, s2):
  """(n, t) after the level: [offsets above, R, Q, ...] where it ends in a pooling, [...] at the readout."""
  scan = _Scan(level, source, s2, from_images)
  has_t = network.with_ntk and (level.convs > 0 or (not from_images and source[1] is not None))

  def through(k):
    return _convolutions(network, *scan.entering(k), s1, scan.deviations2(k), scan.pieces(k))

  if level.above is None:
    def read(total, k):
      return tuple(sum_ if v is None else sum_ + jnp.sum(v * scan.inside(k), (0, 1)) for sum_, v in zip(total, through(k))), None

    zero = jnp.zeros(scan.shape[2:], jnp.float64)
    return lax.scan(read, (zero, zero if has_t else None), jnp.arange(level.offsets))[0]

  def pool(carry, k):
    slots, scratch = carry
    scratch, values = _settle(scratch, through(k), k)
    return (tuple(None if v is None else scan.pool(s, v, k) for s, v in zip(slots, values)), scratch), None

  above = level.above
  zero = jnp.zeros((above[0].slots, above[1].slots, above[0].rows, above[1].rows) + scan.shape[2:], scan.dtype)
  start = ((zero, zero if has_t else None), scan.scratch(has_t))
  (slots, _), _ = lax.scan(pool, start, jnp.arange(level.offsets))
  return tuple(None if v is None else _band(above, v) for v in slots)


def _settle(scratch, values, k):
  """The values, written into buffers that a loop carries and read back: else XLA computes them anew for every use of theirs."""
  scratch = tuple(None if v is None else lax.dynamic_update_index_in_dim(b, v, k % 2, 0) for b, v in zip(scratch, values))
  return scratch, tuple(None if b is None else lax.dynamic_index_in_dim(b, k % 2, 0, keepdims=False) for b in scratch)


def _band(axes, slots):
  band = axes[1].from_slots(axes[0].from_slots(slots, 0), 1)
  return band.reshape((-1,) + band.shape[2:])


def _slots(axes, band):
  return axes[1].to_slots(axes[0].to_slots(band.reshape((axes[0].count, axes[1].count) + band.shape[1:]), 0), 1)


def _sweep_vjp(level: Level, network: Network, from_images: bool, source, s1, s2, cotangents):
  """Pulls cotangents of `_sweep` back to (source, s1). Of images, x1's cotangent alone, in place of the source's."""
  scan = _Scan(level, source, s2, from_images)
  if level.above:
    cotangents = tuple(None if v is None else _slots(level.above, v) for v in cotangents)

  def leaving(k):
    if level.above is None:
      return tuple(None if v is None else jnp.broadcast_to(v.astype(scan.dtype) * scan.inside(k), scan.shape) for v in cotangents)
    return tuple(None if v is None else scan.unpool(v, k) for v in cotangents)

  def body(carry, k):
    x1_bar, s1_total, scratch = carry
    scratch, n_t_bar = _settle(scratch, leaving(k), k)
    s2_k, pieces = scan.deviations2(k), scan.pieces(k)
    _, pull_back = jax.vjp(lambda n, t, s: _convolutions(network, n, t, s, s2_k, pieces), *scan.entering(k), s1)
    n_bar, t_bar, s1_bar = pull_back(n_t_bar)
    if from_images:
      x1, x2 = source[0], scan.shifted(source[1], k)
      x1_bar = x1_bar + _sum_to(n_bar[:, :, None] * x2, x1.shape) / x1.shape[2]
    carry = x1_bar, [total + s for total, s in zip(s1_total, s1_bar)], scratch
    return carry, None if from_images else (n_bar, t_bar)

  start = (jnp.zeros_like(source[0]) if from_images else None, [jnp.zeros_like(s) for s in s1], scan.scratch(cotangents[1] is not None))
  (x1_bar, s1_bar, _), source_bar = lax.scan(body, start, jnp.arange(level.offsets))
  return (x1_bar if from_images else source_bar), s1_bar


# Variances: the pair (x, x), n only, on the narrower band that its diagonals need.


def _variance_levels(architecture: architectures.Architecture, height: int, width: int) -> list[Level]:
  """The levels of an image with itself, up to the last ReLU: none if there is no ReLU."""
  if architecture.hidden:
    return plan(architecture, height, width)
  depth = max((i + 1 for i, stage in enumerate(architecture.stages) if stage.convs), default=0)
  stages = tuple(stage._replace(pool=stage.pool and i < depth - 1) for i, stage in enumerate(architecture.stages[:depth]))
  return plan(dataclasses.replace(architecture, stages=stages, readout='flatten'), height, width) if depth else []


def _deviations(network: Network, convs: int, q):
  """√q before each ReLU of a level, [convs] times [H, W, N], from the variances q [H, W, N] that enter it."""
  whole = tuple([jnp.ones(n, q.dtype)] for n in q.shape[:2])
  deviations = []
  for _ in range(convs):
    q = network.weight / 9 * _box(q, whole) + network.bias
    deviations.append(_sqrt(q))
    q = q / 2
  return deviations


def _sqrt(q):
  """√q with derivative 0 at 0."""
  return jnp.where(q > 0, jnp.sqrt(jnp.where(q > 0, q, 1)), 0)


def _lay_out(x, axes, shift: bool, fill):
  """x [H, W, ...] on the rows and columns of a band: x1's way, or, to be sliced at an offset, x2's."""
  for i, axis in enumerate(axes):
    x = (axis.gather if shift else axis.own)(x, i, fill)
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _self_sweep(level: Level, network: Network, from_images: bool, source, s):
  """n after the level of images with themselves: source is x [H, W, D, N] or n [offsets, R, Q, N], s [convs] times [H, W, N]."""
  return _sweep(level, network, from_images, *_self_arguments(level, from_images, source, s))[0]


def _self_arguments(level, from_images, source, s):
  source = tuple(_lay_out(source, level.axes, shift, 0) for shift in (False, True)) if from_images else (source, None)
  return source, *([_lay_out(deviation, level.axes, shift, 1) for deviation in s] for shift in (False, True))


def _self_sweep_backward(level, network, from_images, saved, n_bar):
  # The band of (x, x) and its cotangent are symmetric, so the part of x2 equals the part of x1.
  arguments = _self_arguments(level, from_images, *saved)
  source_bar, s_bar = _sweep_vjp(level, network, from_images, *arguments, (n_bar, None))
  height, width = (axis.size for axis in level.axes)
  return 2 * source_bar[:height, :width] if from_images else source_bar[0], [2 * s[:height, :width] for s in s_bar]


_self_sweep.defvjp(lambda level, network, from_images, source, s: (_self_sweep(level, network, from_images, source, s), (source, s)),
                   _self_sweep_backward)


def _variances(architecture: architectures.Architecture, x) -> list:
  """What the kernel needs of images x [N, H, W, D] on their own: q entering each level with convolutions, and the dense layers.

  Returns:
    [N, H, W] for every level up to the last that has a ReLU, at its resolution, and, if there are hidden layers, [N] after the readout.
  """
  if _is_fully_connected(architecture):
    flat = x.reshape(len(x), -1).astype(jnp.float64)
    return [jnp.mean(flat * flat, 1)] if architecture.hidden else []
  network = Network(architecture.w_std ** 2, architecture.b_std ** 2, with_ntk=False)
  levels = _variance_levels(architecture, *x.shape[1:3])
  source, variances = jnp.moveaxis(x, 0, -1), []
  for i, level in enumerate(levels):
    height, width = (axis.size for axis in level.axes)
    if i:
      here = -level.axes[0].first * level.axes[1].count - level.axes[1].first  # offset (0, 0), in a plain axis or a periodic one
      q = source[here, :height, :width]
    else:
      q = jnp.mean(source * source, 2)
    variances.append(jnp.moveaxis(q, -1, 0))
    if level.above or architecture.hidden:
      source = _self_sweep(level, network, i == 0, source, _deviations(network, level.convs, q))
  return variances + ([source] if architecture.hidden else [])


def _is_fully_connected(architecture: architectures.Architecture) -> bool:
  return architecture.readout == 'flatten' and not any(stage.convs or stage.pool for stage in architecture.stages)


# A tile: some images x1 against some x2.


def _dense(architecture, n, t, q1, q2):
  """The layers after the readout: n, t [a, b] (t None if 0); q1 [a], q2 [b] after the readout, None without hidden layers. NTK [a, b]."""
  weight, bias = architecture.w_std ** 2, architecture.b_std ** 2
  for _ in range(architecture.hidden):
    n = weight * n + bias
    t = n if t is None else n + weight * t
    q1, q2 = weight * q1 + bias, weight * q2 + bias
    n, t = _relu(n, t, _sqrt(q1)[:, None], _sqrt(q2)[None, :])
    q1, q2 = q1 / 2, q2 / 2
  n = weight * n + bias
  return n if t is None else n + weight * t


class _Tile:
  """The arguments of one tile's sweeps, laid out: `levels` and, for each, s1 [R, Q, a, 1] and s2 (gathered) [.., .., 1, b]."""

  def __init__(self, architecture, x1, q1, x2, q2):
    self.architecture = architecture
    self.network = Network(architecture.w_std ** 2, architecture.b_std ** 2, with_ntk=True)
    self.levels = plan(architecture, *x1.shape[1:3])
    dense = architecture.hidden > 0
    self.q1, self.q2 = (q[:len(q) - dense] + [None] * len(self.levels) for q in (q1, q2))
    self.images = (_lay_out(jnp.moveaxis(x1, 0, -1)[..., None], self.levels[0].axes, False, 0),
                   _lay_out(jnp.moveaxis(x2, 0, -1)[..., None, :], self.levels[0].axes, True, 0))

  def deviations1(self, i, q):
    level = self.levels[i]
    return [_lay_out(s[..., None], level.axes, False, 1) for s in _deviations(self.network, level.convs, jnp.moveaxis(q, 0, -1))]

  def deviations2(self, i):
    level = self.levels[i]
    if not level.convs:
      return []
    q = jnp.moveaxis(self.q2[i], 0, -1)
    return [_lay_out(s[..., None, :], level.axes, True, 1) for s in _deviations(self.network, level.convs, q)]

  def forward(self):
    """(n, t) entering each level above the first, and the readout's [a, b]."""
    sources, source = [], self.images
    for i, level in enumerate(self.levels):
      s1 = self.deviations1(i, self.q1[i]) if level.convs else []
      source = _sweep(level, self.network, i == 0, source, s1, self.deviations2(i))
      sources.append(source)
    return sources

  def backward(self, sources, cotangents):
    """Cotangents of x1 [a, H, W, D] and of q1, from the readout's."""
    q1_bar = [None] * len(self.levels)
    for i in reversed(range(len(self.levels))):
      level, source = self.levels[i], sources[i - 1] if i else self.images
      s1, pull_back = jax.vjp(lambda q: self.deviations1(i, q), self.q1[i]) if level.convs else ([], None)
      cotangents, s1_bar = _sweep_vjp(level, self.network, i == 0, source, s1, self.deviations2(i), cotangents)
      if self.q1[i] is not None:
        q1_bar[i] = pull_back(s1_bar)[0] if level.convs else jnp.zeros_like(self.q1[i])
    height, width = (axis.size for axis in self.levels[0].axes)
    return jnp.moveaxis(cotangents[:height, :width, :, :, 0], -1, 0), [q for q in q1_bar if q is not None]


def _inner_products(x1, x2):
  """Mean over pixels and channels of x1 [a, ...] x2 [b, ...], in float64: one rounding would be seen at the cusp of a hidden layer."""
  flat1, flat2 = (x.reshape(len(x), -1).astype(jnp.float64) for x in (x1, x2))
  return jnp.dot(flat1, flat2.T, precision=lax.Precision.HIGHEST) / flat1.shape[1]


def _tile_forward(architecture, x1, q1, x2, q2):
  """NTK [a, b] of x1 [a, H, W, D] and x2 [b, H, W, D], whose variances are q1, q2; and what `_tile_backward` wants of the way."""
  if _is_fully_connected(architecture):
    sources = [(_inner_products(x1, x2), None)]
  else:
    sources = _Tile(architecture, x1, q1, x2, q2).forward()
  return _head(architecture, x1.dtype, sources[-1], q1, q2).astype(x1.dtype), sources


def _tile_backward(architecture, x1, q1, x2, q2, sources, cotangent):
  """Cotangents of x1 and q1."""
  _, pull_back = jax.vjp(lambda readout, q: _head(architecture, x1.dtype, readout, q, q2), sources[-1], q1)
  readout_bar, q1_bar = pull_back(cotangent.astype(jax.eval_shape(lambda: _head(architecture, x1.dtype, sources[-1], q1, q2)).dtype))
  if _is_fully_connected(architecture):
    flat2 = x2.reshape(len(x2), -1).astype(jnp.float64)
    x1_bar = jnp.dot(readout_bar[0], flat2, precision=lax.Precision.HIGHEST) / flat2.shape[1]
    return x1_bar.reshape(x1.shape), q1_bar
  x1_bar, levels_bar = _Tile(architecture, x1, q1, x2, q2).backward(sources, readout_bar)
  return x1_bar, levels_bar + q1_bar[len(levels_bar):]


def _head(architecture, dtype, readout, q1, q2):
  """`_dense`; in float64 where the readout is exact, else in the images' dtype, whose rounding the cusp must allow for."""
  dtype = jnp.float64 if _is_fully_connected(architecture) else dtype
  n, t = (None if v is None else v.astype(dtype) for v in readout)
  q1, q2 = (q[-1].astype(dtype) if architecture.hidden else None for q in (q1, q2))
  return _dense(architecture, n, t, q1, q2)


class JaxKernel:
  """NTK blocks by offsets: see the module. Tiles of a fixed number of pairs run on `threads` Python threads, and are put together, and
  summed in float64, in a fixed order: no result depends on the number of threads (given NPROC=1, which keeps XLA to one thread a tile).
  """
  implementation = 'jax'

  def __init__(self, architecture: architectures.Architecture, dtype: str, threads: int):
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    self._pool = concurrent.futures.ThreadPoolExecutor(threads)
    self._variances = _compiled(functools.partial(_variances, architecture))
    self._variances_vjp = _compiled(lambda x, q_bar: jax.vjp(functools.partial(_variances, architecture), x)[1](q_bar)[0])
    self._forward = _compiled(functools.partial(_tile_forward, architecture))
    self._block = _compiled(lambda *tile: _tile_forward(architecture, *tile)[0])
    self._backward = _compiled(functools.partial(_tile_backward, architecture))

  def prepare(self, x: np.ndarray) -> ntk.Prepared:
    """See `ntk.Kernel.prepare`: the variances of every image."""
    tiles = self._pool.map(lambda tile: jax.device_get(self._variances(tile)), _tiles(x, _VARIANCE_IMAGES))
    return ntk.Prepared(x, [np.concatenate(q)[:len(x)] for q in zip(*tiles)], self)

  def block(self, x1, x2) -> np.ndarray:
    """See `ntk.Kernel.block`."""
    symmetric = x1 is x2
    x1 = self._prepared(x1)
    x2 = x1 if symmetric else self._prepared(x2)
    a, b = self._tile_shape(x1, x2)
    rows, columns = _prepared_tiles(x1, a), _prepared_tiles(x2, b)
    wanted = [(i, j) for i in range(len(rows)) for j in range(len(columns)) if not symmetric or (j + 1) * b > i * a]
    value = np.zeros((a * len(rows), b * len(columns)), self.dtype)
    for (i, j), tile in zip(wanted, self._pool.map(lambda ij: np.asarray(self._block(*rows[ij[0]], *columns[ij[1]])), wanted)):
      value[i * a:(i + 1) * a, j * b:(j + 1) * b] = tile
    value = value[:len(x1), :len(x2)]
    return np.triu(value) + np.triu(value, 1).T if symmetric else value

  def block_vjp(self, x1, x2, cotangent) -> tuple[np.ndarray, np.ndarray]:
    """See `ntk.Kernel.block_vjp`. Where the cotangent is a function, tiles keep their stage inputs, up to a budget."""
    x1, x2 = self._prepared(x1), self._prepared(x2)
    a, b = self._tile_shape(x1, x2)
    rows, columns = _prepared_tiles(x1, a), _prepared_tiles(x2, b)
    value = np.zeros((a * len(rows), b * len(columns)), self.dtype)
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    kept = {}
    if callable(cotangent):
      budget = _KEPT_BYTES // max(1, self._bytes_per_pair(x1.images.shape) * a * b)

      def forward(place):
        i, j = place
        tile, sources = self._forward(*rows[i], *columns[j])
        if i * len(columns) + j < budget:
          kept[place] = sources
        return np.asarray(tile)

      for place, tile in zip(places, self._pool.map(forward, places)):
        _at(value, place, a, b)[...] = tile
      cotangent = cotangent(value[:len(x1), :len(x2)])
    padded = np.zeros_like(value)
    padded[:len(x1), :len(x2)] = cotangent

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
        total[i * a:(i + 1) * a] += piece
    gradient = x1_bar[:len(x1)] + self._through_variances(x1, [q[:len(x1)] for q in q1_bar])
    return value[:len(x1), :len(x2)], gradient.astype(self.dtype)

  def _through_variances(self, x, q_bar):
    """Pulls cotangents of x's variances back to x."""
    if not q_bar:
      return 0
    q_bar = [piece.astype(q.dtype) for piece, q in zip(q_bar, x.variances)]
    tiles = zip(_tiles(x.images, _VARIANCE_IMAGES), zip(*(_tiles(piece, _VARIANCE_IMAGES) for piece in q_bar)))
    pieces = self._pool.map(lambda tile: np.asarray(self._variances_vjp(tile[0], list(tile[1]))), tiles)
    return np.concatenate(list(pieces))[:len(x.images)]

  def _prepared(self, x) -> ntk.Prepared:
    return x if isinstance(x, ntk.Prepared) else self.prepare(x)

  def _bytes_per_pair(self, shape) -> int:
    """Of what a tile keeps for its vjp."""
    if _is_fully_connected(self.architecture):
      return 8
    levels = plan(self.architecture, *shape[1:3])[1:]
    return sum(2 * level.offsets * level.axes[0].rows * level.axes[1].rows for level in levels) * self.dtype.itemsize

  def _tile_shape(self, x1, x2) -> tuple[int, int]:
    """The least padding, then the most images of x2, that a tile's number of pairs allows; powers of two, so that few shapes compile."""
    if _is_fully_connected(self.architecture):
      pairs = 2 ** 18
    else:
      pairs = _CPU_PAIRS if jax.default_backend() == 'cpu' else _GPU_PAIRS
      pairs = min(pairs * 4 // self.dtype.itemsize, max(16, _power_of_two_to(_TILE_BYTES // max(1, self._bytes_per_pair(x1.images.shape)))))

    def shape(b):
      return min(pairs // b, _power_of_two_from(len(x1))), b

    def padded(a, b):
      return -(-len(x1) // a) * a * -(-len(x2) // b) * b

    widths = [2 ** k for k in range(4, pairs.bit_length() - 1) if 2 ** k <= max(16, _power_of_two_from(len(x2)))]
    return min((shape(b) for b in widths), key=lambda ab: (padded(*ab), -ab[1]))


def _compiled(function):
  """`function` compiled, to be run by the Python thread that calls it; see also `precision`."""
  function = jax.jit(function, compiler_options=_compiler_options())
  # A computation whose arguments are still on their way is queued for XLA's own threads, of which there are NPROC.
  return lambda *arguments: function(*jax.block_until_ready(jax.device_put(arguments)))


@functools.cache
def _compiler_options() -> dict[str, bool]:
  """Where XLA still has it, its first CPU runtime: on JAX 0.5.3 twice as fast, and it runs loops in the calling thread, where the newer one
  hands them to its NPROC threads.
  """
  options = {'xla_cpu_use_thunk_runtime': False}
  if jax.default_backend() != 'cpu':
    return {}
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
  return value[place[0] * a:(place[0] + 1) * a, place[1] * b:(place[1] + 1) * b]


def _tiles(x, size):
  """`x` cut into tiles of exactly `size` images, the last one filled up with its last image."""
  x = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
  return [x[i:i + size] for i in range(0, len(x), size)]


def _prepared_tiles(x: ntk.Prepared, size):
  """Tiles (images, variances)."""
  variances = [_tiles(q, size) for q in x.variances]
  return [(images, [q[i] for q in variances]) for i, images in enumerate(_tiles(x.images, size))]
