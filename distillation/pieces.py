"""The worker's side of a step: computes the piece of a task from the kernel and its inputs."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64

from configs import schema
from distillation import krr, label_solve, plan
from distillation.step import Piece
from kernels.contract import Images, Kernel, Linearised, Prepared


class Form(NamedTuple):
  """Type and shape of an array."""

  dtype: np.dtype
  shape: tuple[int, ...]


class Targets(NamedTuple):
  """Targets of one kernel block: images [b, H, W, D] and centred labels [b, C]."""

  images: Images
  labels: Float64[np.ndarray, 'b C']


@runtime_checkable
class Inputs(Protocol):
  """The inputs of a task; see distillation/inputs.py."""

  def support(self, rows: plan.Range) -> Prepared:
    """Returns support images, the same object for the same rows."""
    ...

  def published(self, name: str) -> np.ndarray:
    """Returns the task's part of an array that the step has published."""
    ...

  def targets(self, tiles: Sequence[plan.Range]) -> Iterable[Targets]:
    """Yields targets of the step's batch, tile by tile."""
    ...

  def training(self, tiles: Sequence[plan.Range]) -> Iterable[Targets]:
    """Yields training images in their own order, never augmented, tile by tile."""
    ...


class Linearisations:
  """Linearised blocks of a step, kept from the first half of a task to the second."""

  def __init__(self, room: int):
    """Makes room for so many bytes."""
    self._room = room
    self._step: object = None
    # By `_place` of their tasks, tile by tile; None for a tile that had no room.
    self._kept: dict[tuple[bool, plan.Range, plan.Range], list[Linearised | None]] = {}

  def begin(self, step: object) -> None:
    """Forgets the blocks of another step; `step` is any value that differs between them."""
    if step != self._step:
      self._step, self._kept = step, {}

  def keep(self, task: plan.Task, tiles: Iterable[Linearised]) -> Float[np.ndarray, 'A B']:
    """Keeps the tiles of a task's block for which there is room; returns the block."""
    kept: list[Linearised | None] = []
    blocks, used = [], sum(tile.nbytes for tiles in self._kept.values() for tile in tiles if tile)
    for tile in tiles:
      blocks.append(tile.block)
      fits = used + tile.nbytes <= self._room
      kept.append(tile if fits else None)
      used += tile.nbytes if fits else 0
    self._kept[_place(task)] = kept
    return np.concatenate(blocks, axis=1)

  def take(self, task: plan.Task) -> list[Linearised | None] | None:
    """Takes the kept tiles of a task's block, None for one that was not kept; None without any."""
    return self._kept.pop(_place(task), None)


def compute(
  task: plan.Task,
  run: schema.Run,
  num_support: int,
  kernel: Kernel,
  inputs: Inputs,
  linearised: Linearisations,
) -> Piece:
  """Computes the piece of a task.

  Args:
    task: one of `plan.tasks`.
    run: with its plan.
    num_support: S.
    kernel: the one that has prepared the inputs.
    inputs: of the task.
    linearised: blocks that are kept for second halves.

  Returns:
    For blocks `block` [A, B], for VJP_PHASES `gradient` [A, H, W, D] by the task's support images,
    both in the kernel's dtype; for LABEL_SOLVE `factor`, R of the rows of [K_ts, y_t]; for TARGETS
    `loss`, `correct`, `alpha_bar` [S, C] and `gradient` [S, H, W, D].
  """
  support, tiles = inputs.support(task.support_range), plan.tiles(task, run.plan.target_tile)
  if task.phase == plan.TARGETS:
    return _targets(support, inputs.targets(tiles), run, kernel, inputs.published('alpha'))
  if task.phase == plan.LABEL_SOLVE:
    return {'factor': _factor(support, inputs.training(tiles), kernel)}
  if run.plan.split_support(num_support):
    if task.phase in plan.VJP_PHASES:
      return {'gradient': _second_half(task, support, tiles, kernel, inputs, linearised)}
    images = _second_arguments(task, tiles, inputs)
    return {'block': linearised.keep(task, (kernel.linearise(support, x) for x in images))}
  is_diagonal = task.target_range == task.support_range
  other = support if is_diagonal else inputs.support(task.target_range)
  if task.phase == plan.SUPPORT_BLOCKS:
    return {'block': kernel.block(support, other)}
  return {'gradient': kernel.block_vjp(support, other, inputs.published('cotangent'))[1]}


def forms(
  task: plan.Task, run: schema.Run, num_classes: int, image_shape: Sequence[int]
) -> dict[str, Form]:
  """Forms of the arrays of a task's piece, in their order: what `compute` returns.

  Args:
    task: one of `plan.tasks`.
    run: with its plan.
    num_classes: C.
    image_shape: (H, W, D).
  """
  kernel, double = np.dtype(run.kernel_dtype), np.dtype(np.float64)
  rows, columns = (stop - start for start, stop in (task.support_range, task.target_range))
  gradient = Form(kernel, (rows, *image_shape))
  if task.phase == plan.TARGETS:
    return {
      'loss': Form(double, ()),
      'correct': Form(np.dtype(np.int64), ()),
      'alpha_bar': Form(double, (rows, num_classes)),
      'gradient': gradient,
    }
  if task.phase == plan.LABEL_SOLVE:
    width = rows + num_classes
    return {'factor': Form(double, (min(columns, width), width))}
  if task.phase in plan.VJP_PHASES:
    return {'gradient': gradient}
  return {'block': Form(kernel, (rows, columns))}


def _targets(
  support: Prepared, targets: Iterable[Targets], run: schema.Run, kernel: Kernel, alpha: np.ndarray
) -> Piece:
  """Computes K_ts, its residual and its gradient tile by tile, summed in order in float64."""
  loss, correct, alpha_bar = 0.0, 0, np.zeros_like(alpha)
  gradient = np.zeros(support.images.shape, np.float64)

  def cotangent(y_t: np.ndarray, block: np.ndarray) -> np.ndarray:
    nonlocal loss, correct, alpha_bar
    block = block.astype(np.float64)
    residual = krr.residual(krr.predictions(block, alpha), y_t, run.targets_per_step)
    loss += residual.loss
    correct += residual.correct
    alpha_bar += krr.alpha_bar(block, residual.scaled)
    return krr.cotangent(alpha, residual.scaled)

  for x_t, y_t in targets:
    gradient += kernel.block_vjp(support, x_t, functools.partial(cotangent, y_t))[1]
  return {
    'loss': np.asarray(loss),
    'correct': np.asarray(correct),
    'alpha_bar': alpha_bar,
    'gradient': gradient.astype(kernel.dtype),
  }


def _second_half(
  task: plan.Task,
  support: Prepared,
  tiles: Sequence[plan.Range],
  kernel: Kernel,
  inputs: Inputs,
  linearised: Linearisations,
) -> np.ndarray:
  """Pulls a task's block back to its support images, tile by tile, summed in order in float64."""
  gradient, first = np.zeros(support.images.shape, np.float64), task.target_range[0]
  kept = linearised.take(task) or [None] * len(tiles)
  for place, tile in zip(tiles, kept):
    if tile is None:
      [images] = _second_arguments(task, [place], inputs)
      tile = kernel.linearise(support, images)
    columns = slice(place[0] - first, place[1] - first)
    if task.phase == plan.SUPPORT_VJP:
      cotangent = inputs.published('cotangent')[:, columns]
    else:
      cotangent = krr.cotangent(inputs.published('alpha'), inputs.published('residual')[columns])
    gradient += tile.pull_back(cotangent)
  return gradient.astype(kernel.dtype)


def _second_arguments(
  task: plan.Task, tiles: Sequence[plan.Range], inputs: Inputs
) -> Iterable[Images]:
  """Yields the images that are the kernel's second argument, tile by tile."""
  if task.phase in plan.SUPPORT_PHASES:
    return (inputs.support(columns) for columns in tiles)
  return (targets.images for targets in inputs.targets(tiles))


def _factor(support: Images, training: Iterable[Targets], kernel: Kernel) -> np.ndarray:
  """R of the rows [K_ts, y_t] of some training images."""
  blocks, labels = zip(*((kernel.block(support, x), y) for x, y in training))
  return label_solve.factor(np.concatenate(blocks, axis=1), np.concatenate(labels))


def _place(task: plan.Task) -> tuple[bool, plan.Range, plan.Range]:
  """The key that both halves of a task share."""
  return task.phase in plan.SUPPORT_PHASES, task.target_range, task.support_range
