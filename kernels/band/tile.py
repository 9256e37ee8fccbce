"""A tile: the whole network on some images x1 against some x2, and back.

q1 and q2 are the images' lists of `variances`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import kernels.precision  # noqa: F401
from kernels.architectures import Architecture
from kernels.band.layers import ROUNDING, Network, Side, ratio, relu, sqrt
from kernels.band.offsets import lay_out, plan
from kernels.band.sweep import sweep, sweep_vjp
from kernels.band.variances import deviations, side

# Errors of 1 - |c| that count as rounding, in hidden layers, which hold n, in float64.
_CUSP = 1e-14


def forward(
  architecture: Architecture, kind: str, x1: jax.Array, q1: list, x2: jax.Array, q2: list
) -> tuple[jax.Array, list]:
  """The kernel [a, b] of x1 [a, H, W, D] and x2 [b, H, W, D], and what `backward` needs."""
  if not architecture.is_convolutional:
    sources = [(_inner_products(x1, x2), None)]
  else:
    sources = _Sweeps(architecture, x1, q1, x2, q2).forward()
  return _head(architecture, kind, x1.dtype, sources[-1], q1, q2).astype(x1.dtype), sources


def backward(
  architecture: Architecture,
  kind: str,
  x1: jax.Array,
  q1: list,
  x2: jax.Array,
  q2: list,
  sources: list,
  cotangent: jax.Array,
) -> tuple[jax.Array, list]:
  """The cotangents of x1 and q1, from the kernel's [a, b]."""
  _, pull_back = jax.vjp(
    lambda readout, q: _head(architecture, kind, x1.dtype, readout, q, q2), sources[-1], q1
  )
  readout_bar, q1_bar = pull_back(cotangent.astype(jnp.float64))
  if not architecture.is_convolutional:
    flat2 = x2.reshape(len(x2), -1).astype(jnp.float64)
    x1_bar = jnp.dot(readout_bar[0], flat2, precision=lax.Precision.HIGHEST) / flat2.shape[1]
    return x1_bar.reshape(x1.shape), q1_bar
  x1_bar, levels_bar = _Sweeps(architecture, x1, q1, x2, q2).backward(sources, readout_bar)
  return x1_bar, levels_bar + q1_bar[len(levels_bar) :]


class _Sweeps:
  """A tile's sweeps through all levels, with their arguments laid out."""

  def __init__(self, architecture: Architecture, x1, q1, x2, q2):
    self._network = Network(architecture.w_std**2, architecture.b_std**2, with_ntk=True)
    self._levels = plan(architecture, *x1.shape[1:3])
    self._images = (
      lay_out(jnp.moveaxis(x1, 0, -1)[..., None], self._levels[0].axes, False, 0),
      lay_out(jnp.moveaxis(x2, 0, -1)[..., None, :], self._levels[0].axes, True, 0),
    )
    self._distances = sum(level.distances[0] for level in self._levels)
    self._q1, self._q2 = (q[: max(0, 2 * self._distances - 1)] for q in (q1, q2))

  def forward(self) -> list:
    """The sources of each level above the first, and the readout's (n, t) [a, b]."""
    sources, source = [], self._images
    for i, level in enumerate(self._levels):
      sides = self._side1(i, self._q1), self._side2(i)
      source = sweep(level, self._network, i == 0, source, *sides)
      sources.append(source)
    return sources

  def backward(self, sources: list, cotangents: Any) -> tuple[jax.Array, list]:
    """The cotangents of x1 [a, H, W, D] and of q1 (but for hidden layers), from the readout's."""
    q1_bar = [jnp.zeros_like(q) for q in self._q1]
    for i in reversed(range(len(self._levels))):
      level, source = self._levels[i], sources[i - 1] if i else self._images
      sides = self._side1(i, self._q1), self._side2(i)
      cotangents, s1_bar = sweep_vjp(level, self._network, i == 0, source, *sides, cotangents)
      _, pull_back = jax.vjp(functools.partial(self._deviations1, i), self._q1)
      q1_bar = jax.tree_util.tree_map(jnp.add, q1_bar, pull_back(s1_bar)[0])
    height, width = (axis.size for axis in self._levels[0].axes)
    return jnp.moveaxis(cotangents[:height, :width, :, :, 0], -1, 0), q1_bar

  def _deviations1(self, i: int, q1: list) -> list:
    return self._side1(i, q1).s

  def _side1(self, i: int, q1: list) -> Side:
    return self._side(i, False, [jnp.moveaxis(q, 0, -1)[..., None] for q in q1])

  def _side2(self, i: int) -> Side:
    return self._side(i, True, [jnp.moveaxis(q, 0, -1)[..., None, :] for q in self._q2])

  def _side(self, i: int, shift: bool, q: list) -> Side:
    level = self._levels[i]
    if not level.distances[0]:
      return Side([], [], ())
    s = deviations(self._network, level.convs, q[i])
    return side(level, shift, s, q[i], q[self._distances + i - 1] if i else None)


def _inner_products(x1: jax.Array, x2: jax.Array) -> jax.Array:
  """The mean over pixels and channels of x1 [a, ...] x2 [b, ...], in float64.

  One rounding would be seen at the cusp of a hidden layer.
  """
  flat1, flat2 = (x.reshape(len(x), -1).astype(jnp.float64) for x in (x1, x2))
  return jnp.dot(flat1, flat2.T, precision=lax.Precision.HIGHEST) / flat1.shape[1]


def _head(architecture: Architecture, kind: str, dtype, readout: tuple, q1: list, q2: list):
  """`_dense` in float64, whose cusp would see a rounding of float32; `dtype` is the images'."""
  n, t = readout
  if not architecture.hidden:
    return _dense(architecture, kind, n, t, None, None)
  if not architecture.is_convolutional:
    return _dense(architecture, kind, n, t, q1[-1], q2[-1])
  (mean1, spread1), (mean2, spread2) = q1[-2:], q2[-2:]
  spreads = lax.stop_gradient(spread1[:, None] + spread2)
  variances = lax.stop_gradient(mean1[:, None] + mean2)
  m = lax.stop_gradient(n) - spreads / 2
  m = jnp.where(m < ROUNDING[dtype] / 2 * jnp.sqrt(spreads * (spreads + variances)), 0, m)
  n = variances / 2 - m + (lax.stop_gradient(n) - n)  # The derivative by m, rounding or not.
  return _dense(architecture, kind, n, t, mean1, mean2)


def _dense(architecture: Architecture, kind: str, n, t, q1, q2):
  """The layers after the readout.

  Args:
    n, t: [a, b], t None if 0.
    q1, q2: [a] and [b] after the readout; None without hidden layers.

  Returns:
    the kernel [a, b].
  """
  weight, bias = architecture.w_std**2, architecture.b_std**2
  for _ in range(architecture.hidden):
    n = weight * n + bias
    t = n if t is None else n + weight * t
    q1, q2 = weight * q1 + bias, weight * q2 + bias
    s1, s2 = sqrt(q1)[:, None], sqrt(q2)[None, :]
    r = lax.stop_gradient(ratio(s1 * s2 - n, s1 * s2))
    r = jnp.where(jnp.abs(1 - r) > 1 - _CUSP, jnp.where(r < 1, 0, 2), r)
    rise, t = relu(n, r, t, s1, s2)
    n = n / 2 + rise
    q1, q2 = q1 / 2, q2 / 2
  n = weight * n + bias
  return n if t is None or kind == 'nngp' else n + weight * t
