"""Variances: the pair (x, x), n only, on the narrower band that its diagonals need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

import kernels.precision  # noqa: F401
from kernels import architectures
from kernels.band.layers import ROUNDING, Network, Side, sqrt, sums_of_three
from kernels.band.offsets import Level, lay_out, plan
from kernels.band.sweep import Source, sweep, sweep_vjp


def variances(architecture: architectures.Architecture, x: jax.Array) -> list[jax.Array]:
  """The numbers that the kernel needs of images x [N, H, W, D] on their own.

  Returns:
    q [N, H, W] entering every level up to the last before a ReLU, at its resolution; the spreads of
    all these levels but the first; and, if there are hidden layers, in float64, q [N] after the
    readout and (but for fully-connected networks) the spread there.
  """
  if not architecture.is_convolutional:
    flat = x.reshape(len(x), -1).astype(jnp.float64)
    return [jnp.mean(flat * flat, 1)] if architecture.hidden else []
  network = Network(architecture.w_std**2, architecture.b_std**2, with_ntk=False)
  source, entering, spreads = jnp.moveaxis(x, 0, -1), [], []
  q, spread = jnp.mean(source * source, 2), None
  for i, level in enumerate(_levels(architecture, *x.shape[1:3])):
    if i and level.distances[0]:
      # The variance of a mean is the mean variance less the spread, which is the m of offset
      # (0, 0), in a plain axis or a periodic one.
      rows, columns = level.axes
      height, width = rows.size, columns.size
      spread = source[-rows.first * columns.count - columns.first, :height, :width]
      q = q[: 2 * height, : 2 * width].reshape((height, 2, width, 2, -1)).mean((1, 3))
      q = lax.stop_gradient(q) - spread
      spread = lax.stop_gradient(spread)
      spreads.append(spread)
    if level.distances[0]:
      entering.append(q)
    s = deviations(network, level.convs, q)
    if level.above or architecture.hidden:
      constants = (q, spread if level.distances[0] else None)
      source = _self_sweep(level, network, i == 0, source, s, constants)
    q = s[-1] ** 2 / 2 if s else q
  by_level = [jnp.moveaxis(v, -1, 0) for v in entering + spreads]
  if not architecture.hidden:
    return by_level
  mean = jnp.mean(q.astype(jnp.float64), (0, 1))
  # As after a pooling.
  return by_level + [lax.stop_gradient(mean) - source, lax.stop_gradient(source)]


def variances_vjp(architecture: architectures.Architecture, x: jax.Array, q_bar: list) -> jax.Array:
  """Pulls cotangents of `variances` back to x.

  In float64 for fully-connected networks: near the cusp most of it and of the pairs' part cancel.
  """
  x = x.astype(jnp.float64) if not architecture.is_convolutional else x
  return jax.vjp(functools.partial(variances, architecture), x)[1](q_bar)[0]


def deviations(network: Network, convs: int, q: jax.Array) -> list[jax.Array]:
  """√q [H, W, ...] before each ReLU of a level, from the variances q [H, W, ...] entering it."""
  found = []
  for _ in range(convs):
    q = network.weight / 9 * sums_of_three(sums_of_three(q, 0), 1) + network.bias
    found.append(sqrt(q))
    q = q / 2
  return found


def side(level: Level, shift: bool, s: list, q: jax.Array, spread: jax.Array | None) -> Side:
  """Lays out one side's constants on a level's band.

  Args:
    shift: see `lay_out`.
    s: deviations, [H, W, ...] for each convolution.
    q: variances [H, W, ...] entering the level.
    spread: their spread [H, W, ...], or None at the first level.
  """
  place = functools.partial(lay_out, axes=level.axes, shift=shift)
  halves = [q / 2, *(deviation**2 / 4 for deviation in s)][: level.convs]
  ghosts = [
    (place(half, fill=0, margins=(1, 0)), place(sums_of_three(half, 0), fill=0, margins=(0, 1)))
    for half in halves
  ]
  if spread is None:
    spreads = ()
  else:
    spreads = spread / 2, ROUNDING[q.dtype] / 2 * jnp.sqrt(spread * (spread + q))
  return Side(
    [place(deviation, fill=1) for deviation in s], ghosts, tuple(place(v, fill=0) for v in spreads)
  )


def _levels(architecture: architectures.Architecture, height: int, width: int) -> list[Level]:
  """The levels of an image with itself, up to the last ReLU: none if there is no ReLU."""
  if architecture.hidden:
    return plan(architecture, height, width)
  depth = max((i + 1 for i, stage in enumerate(architecture.stages) if stage.convs), default=0)
  if not depth:
    return []
  stages = tuple(
    stage._replace(pool=stage.pool and i < depth - 1)
    for i, stage in enumerate(architecture.stages[:depth])
  )
  narrow = dataclasses.replace(architecture, stages=stages, readout='flatten')
  return plan(narrow, height, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _self_sweep(level: Level, network: Network, from_images: bool, source, s, constants):
  """m or n after the level of images with themselves.

  Args:
    source: x [H, W, D, N], or m or n [offsets, R, Q, N].
    s: [H, W, N] for each convolution.
    constants: q [H, W, N] and the spread.
  """
  arguments = _self_arguments(level, from_images, source, s, constants)
  return sweep(level, network, from_images, *arguments)[0]


def _self_arguments(
  level: Level, from_images: bool, source, s, constants
) -> tuple[Source, Side, Side]:
  if from_images:
    axes = level.axes
    pair = lay_out(source, axes, False, 0), lay_out(source, axes, True, 0)
  else:
    pair = source, None
  return pair, side(level, False, s, *constants), side(level, True, s, *constants)


def _self_sweep_backward(level: Level, network: Network, from_images: bool, saved, n_bar):
  # The band of (x, x) and its cotangent are symmetric, so the part of x2 equals the part of x1.
  constants = saved[2]
  arguments = _self_arguments(level, from_images, *saved)
  source_bar, s_bar = sweep_vjp(level, network, from_images, *arguments, (n_bar, None))
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
