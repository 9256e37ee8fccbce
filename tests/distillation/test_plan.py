"""Plans cover what they are about, once."""

import numpy as np
import pytest

from configs import schema
from distillation import plan


@pytest.mark.parametrize(
  'num_support, num_targets, tile, group, part',
  [(1, 1, 1, 1, 1), (7, 33, 3, 10, 5), (10, 100, 50, 7, 9), (12, 5, 4, 9, 7)],
)
@pytest.mark.parametrize('in_halves', [False, True])
def test_the_plan_covers_every_pair_once(num_support, num_targets, tile, group, part, in_halves):
  run = schema.Run(
    targets_per_step=num_targets,
    plan=schema.Plan(
      support_tile=tile, target_tile=group, support_per_task=part if in_halves else 0
    ),
  )

  def covered(phase, columns):
    count = np.zeros((num_support, columns), int)
    tasks = plan.tasks(run, phase, 3, num_support)
    assert [task.index for task in tasks] == list(range(len(tasks)))
    for task in tasks:
      assert task.step == 3 and task.phase == phase
      assert task.pairs == count[task.rows, task.columns].size
      count[task.rows, task.columns] += 1
    return count

  for phase in (plan.TARGETS, plan.TARGET_BLOCKS, plan.TARGET_VJP):
    assert (covered(phase, num_targets) == 1).all()
  assert (covered(plan.SUPPORT_VJP, num_support) == 1).all()
  upper = covered(plan.SUPPORT_BLOCKS, num_support)
  assert (np.maximum(upper, upper.T) == 1).all()


def test_groups_are_of_the_same_targets():
  run = schema.Run(targets_per_step=7, plan=schema.Plan(target_tile=3, support_per_task=4))
  groups = plan.groups(plan.tasks(run, plan.TARGET_BLOCKS, 0, 10))
  assert [group[0].target_range for group in groups] == [(0, 3), (3, 6), (6, 7)]
  for group in groups:
    assert [task.support_range for task in group] == [(0, 4), (4, 8), (8, 10)]


RUN = schema.Run(
  num_steps=5,
  targets_per_step=33,
  plan=schema.Plan(support_tile=4, target_tile=5, target_tiles_per_task=2),
)


def test_pairs_per_step():
  assert plan.pairs_per_step(RUN, 6) == (16 + 8 + 4) + 33 * 6 + 36


@pytest.mark.parametrize(
  'method, step, pairs',
  [
    ('kip', 0, 5 * 262),
    ('kip', 3, 2 * 262),
    ('label_solve+kip', 0, 4 * 262 + 600),
    ('label_solve+kip', 1, 4 * 262),
    ('kip+label_solve', 4, 600),
    ('kip+label_solve', 5, 0),
  ],
)
def test_pairs_to_go(method, step, pairs):
  run = schema.Run(method=method, num_steps=RUN.num_steps, targets_per_step=33, plan=RUN.plan)
  assert plan.pairs_to_go(run, 6, 100, step) == pairs
