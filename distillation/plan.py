"""Cuts a step into tasks.

The plan fixes the order in which their pieces are summed. So the results depend on it, and not on
the number of workers.
"""

from collections.abc import Sequence
from typing import NamedTuple

from configs import schema

# Phases of a step of KIP in one pass: SUPPORT_BLOCKS, then TARGETS, then SUPPORT_VJP.
SUPPORT_BLOCKS = 'support_blocks'  # tiles of K_ss on and above the diagonal
TARGETS = 'targets'  # K_ts, its residual, and its gradient, all at once
SUPPORT_VJP = 'support_vjp'  # gradients of all tiles of K_ss by their first argument
# Phases of a step in two halves: SUPPORT_BLOCKS with TARGET_BLOCKS, then SUPPORT_VJP with
# TARGET_VJP. Tasks of K_ss are then `support_tile` whole rows, so that the gradient by a support
# image comes in one piece.
TARGET_BLOCKS = 'target_blocks'  # K_ts
TARGET_VJP = 'target_vjp'  # gradients of K_ts by the support images
# Phases of Label Solve: SUPPORT_BLOCKS, then this one for the whole training set, round by round.
LABEL_SOLVE = 'label_solve'  # the R factor of [K_ts, y_t]

SUPPORT_PHASES = (SUPPORT_BLOCKS, SUPPORT_VJP)  # both of their ranges are of the support set
VJP_PHASES = (SUPPORT_VJP, TARGET_VJP)

Range = tuple[int, int]


class Task(NamedTuple):
  """A unit of work.

  Attributes:
    step: number of the step.
    phase: one of those above.
    index: place in the phase's plan.
    target_range: [start, stop) of the kernel's second argument: in the step's target batch, in the
      support set for SUPPORT_PHASES, in the training set for LABEL_SOLVE.
    support_range: [start, stop) of the kernel's first argument, in the support set.
  """

  step: int
  phase: str
  index: int
  target_range: Range
  support_range: Range

  @property
  def rows(self) -> slice:
    """Its part of arrays over the support set."""
    return slice(*self.support_range)

  @property
  def columns(self) -> slice:
    """Its part of arrays over what `target_range` counts."""
    return slice(*self.target_range)

  @property
  def pairs(self) -> int:
    """Kernel entries that it computes."""
    first, last = self.target_range
    start, stop = self.support_range
    return (last - first) * (stop - start)


def ranges(total: int, size: int) -> list[Range]:
  """Cuts [0, total) into ranges of `size`, the last one possibly shorter."""
  return [(start, min(start + size, total)) for start in range(0, total, size)]


def tiles(task: Task, size: int) -> list[Range]:
  """Cuts a task's target range into tiles of `size`; they are summed in this order."""
  first, last = task.target_range
  return [(first + start, first + stop) for start, stop in ranges(last - first, size)]


def tasks(
  run: schema.Run, phase: str, step: int, num_support: int, targets: Range | None = None
) -> list[Task]:
  """Makes the tasks of a phase, in the order in which their pieces are summed.

  Args:
    run: with its plan.
    phase: one of those above.
    step: number of the step.
    num_support: S.
    targets: [start, stop) of the targets to cut, by default the whole batch; no matter for
      SUPPORT_PHASES.
  """
  part = run.plan.split_support(num_support)
  rows = ranges(num_support, run.plan.support_tile)
  if phase in SUPPORT_PHASES and part:
    places = [((0, num_support), tile) for tile in rows]
  elif phase == SUPPORT_BLOCKS:
    places = [(other, tile) for i, tile in enumerate(rows) for other in rows[i:]]
  elif phase == SUPPORT_VJP:
    places = [(other, tile) for tile in rows for other in rows]
  else:
    first, last = targets or (0, run.targets_per_step)
    split = part if part and phase in (TARGET_BLOCKS, TARGET_VJP) else num_support
    places = [
      ((first + start, first + stop), tile)
      for start, stop in ranges(last - first, run.plan.targets_per_task)
      for tile in ranges(num_support, split)
    ]
  return [Task(step, phase, i, *place) for i, place in enumerate(places)]


def part(task: Task, name: str) -> tuple[slice, ...]:
  """The index of a task's part of the published array `name`: see `step.Exchange.publish`."""
  return {
    'images': (task.rows,),
    'alpha': (task.rows,),
    'residual': (task.columns,),
    'cotangent': (task.rows, task.columns),
  }[name]


def groups(tasks: Sequence[Task]) -> list[list[Task]]:
  """Groups tasks by their targets, in order."""
  found: dict[Range, list[Task]] = {}
  for task in tasks:
    found.setdefault(task.target_range, []).append(task)
  return list(found.values())


def pairs_per_step(run: schema.Run, num_support: int) -> int:
  """Kernel entries of a step of KIP; where one task does both, forward and vjp count once."""
  halves = (TARGET_BLOCKS, TARGET_VJP) if run.plan.split_support(num_support) else (TARGETS,)
  phases = (SUPPORT_BLOCKS, *halves, SUPPORT_VJP)
  return sum(task.pairs for phase in phases for task in tasks(run, phase, 0, num_support))


def pairs_to_go(run: schema.Run, num_support: int, num_training: int, step: int) -> int:
  """Kernel entries of the updates after the first `step`.

  Args:
    run: with its plan and number of steps.
    num_support: S.
    num_training: training images.
    step: updates made.
  """
  solves = run.label_solve_step >= step
  updates = run.num_steps - step - solves
  return updates * pairs_per_step(run, num_support) + solves * num_support * num_training
