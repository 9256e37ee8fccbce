"""One offset through the convolutions and ReLUs of one resolution, and back."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels.precision  # noqa: F401
from kernels.band.offsets import Level

# Errors of m after a pooling, relative to √(V (V + q)), V the spread, that count as rounding.
# Identical images must not see the cusp of the ReLU's derivative at c = 1, where its square root
# would turn an error of 1e-7 into one of 1e-4.
ROUNDING = {np.dtype('float32'): 2.5e-7, np.dtype('float64'): 2e-15}

# From fit_polynomials.py.
ANGLE = (
  3.654233529e-04,
  -4.185382641e-04,
  8.926287789e-04,
  1.073579185e-03,
  4.253426045e-03,
  1.875435281e-02,
  2.250791036e-01,
)
EXCESS = (
  3.846374467e-05,
  -3.146352209e-05,
  1.219570371e-04,
  2.619582706e-04,
  1.208874616e-03,
  7.502429084e-03,
  1.500527216e-01,
)


class Network(NamedTuple):
  """The part of an architecture that every level needs.

  Attributes:
    weight, bias: variances of weights and biases.
    with_ntk: whether t is computed beside n.
  """

  weight: float
  bias: float
  with_ntk: bool


class Side(NamedTuple):
  """Constants of one side's images on their own, laid out on a level's band.

  Those of x2 are laid out to be sliced at an offset, or sliced there.

  Attributes:
    s: for each convolution, the deviations after it.
    ghosts: for each convolution, q / 2 before it, in the two forms that `box` takes.
    spread: after a pooling to distances, half of the spread within each window and half of what
      counts as rounding; else empty.
  """

  s: list[jax.Array]
  ghosts: list
  spread: tuple[jax.Array, ...]


def convolutions(
  level: Level,
  network: Network,
  v: jax.Array,
  t: jax.Array | None,
  side1: Side,
  side2: Side,
  pieces: tuple,
) -> tuple[jax.Array, jax.Array | None]:
  """Takes one offset through a level's (convolution, ReLU)s.

  Args:
    v: m or n [R, Q, ...].
    t: [R, Q, ...], or None where it is identically 0.
    side2: at this offset.
    pieces: see `box`.

  Returns:
    (m or n, t) after them.
  """
  for i, (s1, s2) in enumerate(zip(side1.s, side2.s)):
    m = network.weight / 9 * box(v, pieces, list(zip(side1.ghosts[i], side2.ghosts[i])))
    n, r = _from_distance(network.bias > 0, m, s1, s2)
    if network.with_ntk:
      t = n if t is None else network.weight / 9 * box(t, pieces) + n
    rise, t = relu(n, r, t, s1, s2)
    v = m / 2 - rise if level.distances[1] or i + 1 < level.convs else n / 2 + rise
  return v, t


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_distance(has_bias: bool, m, s1, s2):
  """n, and r = 1 - c."""
  s12 = s1 * s2
  chord = jnp.maximum(m - 0.5 * (s1 - s2) ** 2, 0)
  if not has_bias:  # Patches may be multiples of each other, or of any two sizes: still |c| <= 1.
    is_rounding = chord * chord <= ROUNDING[m.dtype] ** 2 * m * (m + s12)
    chord = jnp.where(is_rounding, 0, jnp.minimum(chord, 2 * s12))
  return s12 - chord, ratio(chord, s12)


_from_distance.defvjp(
  lambda has_bias, m, s1, s2: (_from_distance(has_bias, m, s1, s2), (s1, s2)),
  lambda has_bias, s, cotangents: (-cotangents[0], *map(jnp.zeros_like, s)),
)


def ratio(x: jax.Array, s12: jax.Array) -> jax.Array:
  """x / s12, and 1 where a deviation is 0.

  As 1 - c that gives Neural Tangents' value of the ReLU's derivative there, 1/4.
  """
  return jnp.where(s12 > 0, x / jnp.where(s12 > 0, s12, 1), 1)


def sqrt(q: jax.Array) -> jax.Array:
  """√q with derivative 0 at 0."""
  return jnp.where(q > 0, jnp.sqrt(jnp.where(q > 0, q, 1)), 0)


@jax.custom_vjp
def relu(n, r, t, s1, s2):
  """(n' - n / 2, t') after a ReLU, where r = 1 - c; t may be None.

  With dot = 1/2 - acos(c) / 2π: n' = s1 s2 (√(1 - c²) / 2π + c dot), t' = t dot. Differentiates
  with respect to n, t and s1; s2 is held constant, and r follows n.
  """
  _, angle, excess = _angle_excess(r)
  return s1 * s2 * excess - 0.5 * jnp.minimum(n, 0), None if t is None else t * (
    0.5 - _rest(r, angle)
  )


def _relu_forward(n, r, t, s1, s2):
  return relu(n, r, t, s1, s2), (n, r, t, s1, s2)


def _relu_backward(saved, cotangents):
  _, r, t, s1, s2 = saved
  n_bar, t_bar = cotangents
  s12 = s1 * s2
  near, angle, _ = _angle_excess(r)
  rest = _rest(r, angle)
  square = near * (2 - near)  # 1 - c²
  # 1 / √(1 - c²), and 0 at the cusp.
  inverse = jnp.where(square > 0, lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
  s1_bar = n_bar * (s2 * (square * inverse) / (2 * np.pi))
  n_bar = -n_bar * rest
  if t is not None:
    slope = t_bar * t * inverse / (2 * np.pi)
    n_bar = n_bar + slope / jnp.where(s12 > 0, s12, 1)
    s1_bar = s1_bar - slope * (1 - r) / jnp.where(s1 > 0, s1, 1)
    t_bar = t_bar * (0.5 - rest)
  return n_bar, jnp.zeros_like(r), t_bar, sum_to(s1_bar, s1.shape), jnp.zeros_like(s2)


relu.defvjp(_relu_forward, _relu_backward)


def _angle_excess(r):
  """1 - |c|, acos|c| / 2π and (√(1 - c²) - |c| acos|c|) / 2π, from r = 1 - c."""
  r = jnp.maximum(jnp.minimum(r, 2 - r), 0)
  root = jnp.sqrt(r)
  if r.dtype == jnp.float32:
    return r, root * _polynomial(ANGLE, r), r * root * _polynomial(EXCESS, r)
  angle = jnp.arctan2(root, jnp.sqrt(2 - r)) / np.pi
  return r, angle, root * jnp.sqrt(2 - r) / (2 * np.pi) - (1 - r) * angle


def _polynomial(coefficients, r):
  value = jnp.full_like(r, coefficients[0])
  for coefficient in coefficients[1:]:
    value = value * r + coefficient
  return value


def _rest(r, angle):
  """1/2 - dot."""
  return jnp.where(r <= 1, angle, 0.5 - angle)


@jax.custom_vjp
def box(v, pieces, ghosts=None):
  """3x3 sums of v [R, Q, ...] within the pieces of its rows and of its columns. Self-adjoint.

  Args:
    pieces: for rows, and then for columns, those of `Axis.pieces` at one offset.
    ghosts: for rows, and then for columns, what a tap counts that only x1, or only x2, has:
      [1 + R + 1, Q, ...] and [R, 1 + Q + 1, ...]. By default 0.
  """
  for axis, masks in enumerate(pieces):
    masks = [mask.reshape(mask.shape + (1,) * (v.ndim - 1 - axis)) for mask in masks]
    if ghosts is None:
      sums = [sums_of_three(v * both[1:-1], axis) * both[1:-1] for both, _, _ in masks]
    else:
      sums = [_line(v, axis, mask, *ghosts[axis]) for mask in masks]
    v = functools.reduce(jnp.add, sums)
  return v


box.defvjp(
  lambda v, pieces, ghosts=None: (box(v, pieces, ghosts), (pieces, ghosts)),
  lambda constants, v: (box(v, constants[0]), *jax.tree_util.tree_map(jnp.zeros_like, constants)),
)


def _line(v, axis: int, mask, ghost1, ghost2):
  """The sums of three along one axis within one piece, with its ghosts."""
  both, only1, only2 = mask

  def row(x, step):
    return lax.slice_in_dim(x, 1 + step, x.shape[axis] - 1 + step, axis=axis)

  # Taps of x1 only are rows of v. Those of x2 only may lie outside: adding them to the sums is
  # faster than widening v.
  line = sums_of_three(jnp.where(both[1:-1] > 0, v, only1[1:-1] * row(ghost1, 0)), axis)
  return (line + only2[:-2] * row(ghost2, -1) + only2[2:] * row(ghost2, 1)) * both[1:-1]


def sums_of_three(v, axis: int):
  """The sums of each entry and its two neighbours along `axis`."""
  # A reduce_window, rather than sums of shifted arrays, keeps XLA from computing what produces v
  # once for every tap.
  window = tuple(3 if i == axis else 1 for i in range(v.ndim))
  return lax.reduce_window(v, np.zeros((), v.dtype), lax.add, window, (1,) * v.ndim, 'SAME')


def sum_to(x, shape: tuple[int, ...]):
  """x, summed along its last axis if `shape` has 1 there.

  On CPU as a product with ones, since XLA's own sum along the vector axis is scalar there, while on
  a GPU a product would have x written to memory first.
  """
  if x.shape == shape:
    return x

  def product(x):
    ones = jnp.ones((x.shape[-1], 1), x.dtype)
    return jnp.dot(x, ones, precision=lax.Precision.HIGHEST)

  return lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, -1, keepdims=True))
