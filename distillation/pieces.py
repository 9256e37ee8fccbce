"""A worker's side of a step: the piece of a task, from the kernel and the task's inputs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from configs import schema
from distillation import krr, label_solve, plan
from distillation.step import Piece
from kernels.contract import Images, Kernel, Linearised, Prepared


class Targets(NamedTuple):
  """Targets of one kernel block: images [b, H, W, D] and centred labels [b, C]."""

  images: Images
  labels: np.ndarray


@runtime_checkable
class Inputs(Protocol):
  """What a task is computed from; see distillation/inputs.py."""

  def support(self, rows: plan.Range) -> Prepared:
    """Support images; the same object for the same rows."""
    ...

  def published(self, name: str) -> np.ndarray:
    """The task's part of an array that the step has published."""
    ...

  def targets(self, tiles: Sequence[plan.Range]) -> Iterable[Targets]:
    """Targets of the step's batch, tile by tile."""
    ...

  def training(self, tiles: Sequence[plan.Range]) -> Iterable[Targets]:
    """Training images in their own order, never augmented, tile by tile."""
    ...


class Linearisations:
  """Linearised blocks between the two halves of a task, as far as there is room.

  They are one step's: `begin` drops those of another.
  """

  def __init__(self, room: int):
    """`room` is in bytes."""
    self._room = room
    self._of: object = None
    self._kept: dict[tuple, list[Linearised | None]] = {}

  def begin(self, step: object) -> None:
    """Forgets what is of other steps; `step` tells them apart."""
    if step != self._of:
      self._of, self._kept = step, {}

  def keep(self, task: plan.Task, tiles: Iterable[Linearised]) -> np.ndarray:
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
    """What is kept of a task's block, tile by tile; None if nothing is."""
    return self._kept.pop(_place(task), None)


def compute(
  task: plan.Task,
  run: schema.Run,
  num_support: int,
  kernel: Kernel,
  inputs: Inputs,
  linearised: Linearisations,
) -> Piece:
  """The piece of a task.

  Args:
    task: what to compute.
    run: with its plan.
    num_support: `S`.
    kernel: by which images are prepared.
    inputs: of the task.
    linearised: kept from one half of a step to the other.

  Returns:
    `block` [A, B] or `gradient` [A, H, W, D] by the task's support images, in the kernel's dtype;
    `factor`, R of the rows of [K_ts, y_t]; for TARGETS `loss`, `correct`, `alpha_bar` [S, C] and
    `gradient` [S, H, W, D].
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


def _targets(
  support: Prepared, targets: Iterable[Targets], run: schema.Run, kernel: Kernel, alpha: np.ndarray
) -> Piece:
  """Rows of K_ts, their residual and their cotangent in one pass, summed in order in float64."""
  loss, correct, alpha_bar = 0.0, 0, np.zeros_like(alpha)
  gradient = np.zeros(support.images.shape, np.float64)
  for x_t, y_t in targets:
    residual = krr.Residual(0.0, 0, np.zeros(0))

    def cotangent(block: np.ndarray, y_t: np.ndarray = y_t) -> np.ndarray:
      nonlocal residual, alpha_bar
      block = block.astype(np.float64)
      residual = krr.residual(krr.predictions(block, alpha), y_t, run.targets_per_step)
      alpha_bar += krr.alpha_bar(block, residual.scaled)
      return krr.cotangent(alpha, residual.scaled)

    gradient += kernel.block_vjp(support, x_t, cotangent)[1]
    loss += residual.loss
    correct += residual.correct
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
  """The gradient by the task's support images, tile by tile, summed in order in float64."""
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
  if task.phase in plan.SUPPORT_PHASES:
    return (inputs.support(columns) for columns in tiles)
  return (targets.images for targets in inputs.targets(tiles))


def _factor(support: Images, training: Iterable[Targets], kernel: Kernel) -> np.ndarray:
  blocks, labels = zip(*((kernel.block(support, x), y) for x, y in training))
  return label_solve.factor(np.concatenate(blocks, axis=1), np.concatenate(labels))


def _place(task: plan.Task) -> tuple:
  """What both halves of a task share."""
  return task.phase in plan.SUPPORT_PHASES, task.target_range, task.support_range
