"""The advice on plans that leave workers idle."""

import pytest

from configs import schema
from programs import plan_advice


@pytest.mark.parametrize(
  'support, targets, tile, tiles, part, workers, expected',
  [
    (10, 5000, 250, 1, 0, 2, ()),
    (10, 5000, 250, 1, 0, 20, ()),
    # Three rounds, the third of four tasks.
    (10, 5000, 250, 1, 0, 8, ('20 tasks', '83%', 'of 209 targets each')),
    (10, 5000, 209, 1, 0, 8, ()),
    (10, 5000, 250, 1, 0, 64, ('20 tasks', '31%', 'of 79 targets each')),
    (10, 97, 250, 1, 0, 3, ('1 task ', '33%', 'of 33 targets each')),  # one tile for all
    (500, 5000, 250, 10, 9, 32, ()),  # K_ss fills the last round
    (500, 5000, 250, 10, 25, 32, ('40 tasks', '69%', 'of 1667 targets each')),
    (500, 5000, 250, 20, 25, 32, ('20 tasks', '69%', 'fewer support images')),
  ],
)
def test_a_plan_that_leaves_workers_idle(support, targets, tile, tiles, part, workers, expected):
  plan = schema.Plan(target_tile=tile, target_tiles_per_task=tiles, support_per_task=part)
  config = schema.Config(
    schema.Run(images_per_class=support // 10, targets_per_step=targets, plan=plan),
    schema.System(num_workers=workers),
  )
  advice = plan_advice.advise(config, 10)
  assert bool(advice) == bool(expected)
  for words in expected:
    assert words in advice
