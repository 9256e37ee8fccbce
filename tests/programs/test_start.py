"""What a launch says before it starts, and what it makes of the configuration."""

import json
import os
import subprocess
import sys

import pytest

from configs import schema
from programs import start


@pytest.mark.parametrize(
  'support, targets, tile, tiles, part, workers, said',
  [
    (10, 5000, 250, 1, 0, 2, None),
    (10, 5000, 250, 1, 0, 20, None),
    # Three rounds, the third of four tasks.
    (10, 5000, 250, 1, 0, 8, ('20 tasks', '83%', 'of 209 targets each')),
    (10, 5000, 209, 1, 0, 8, None),
    (10, 5000, 250, 1, 0, 64, ('20 tasks', '31%', 'of 79 targets each')),
    (10, 97, 250, 1, 0, 3, ('1 task ', '33%', 'of 33 targets each')),  # one tile for all
    (500, 5000, 250, 10, 9, 32, None),  # K_ss fills the last round
    (500, 5000, 250, 10, 25, 32, ('40 tasks', '69%', 'of 1667 targets each')),
    (500, 5000, 250, 20, 25, 32, ('20 tasks', '69%', 'about fewer support images')),
  ],
)
def test_a_plan_that_leaves_workers_idle_is_remarked_on(
  support, targets, tile, tiles, part, workers, said
):
  plan = schema.Plan(target_tile=tile, target_tiles_per_task=tiles, support_per_task=part)
  config = schema.Config(
    schema.Run(images_per_class=support // 10, targets_per_step=targets, plan=plan),
    schema.System(num_workers=workers),
  )
  remark = start._remark_on_plan(config, 10)
  assert bool(remark) == (said is not None)
  for words in said or ():
    assert words in remark


def _local(workdir, cache, *flags):
  """One process's run of a step or so: its output, and the configuration it kept."""
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'programs.local',
      '--config=configs/base.py',
      f'--workdir={workdir}',
      '--config.run.architecture=fc1',
      '--config.run.num_steps=1',
      '--config.system.evaluation.nn_steps=0',
      f'--config.system.cache_dir={cache}',
      *flags,
    ],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
    return done.stderr, json.load(file)


def test_the_defaults_run_on_digits_tell_their_classes_and_go_on(tmp_path, cache):
  """`run.targets_per_step=0` is as many as suit, whenever the run goes on."""
  told, config = _local(tmp_path, cache)
  assert '10 classes: 0 to 9.' in told and config['run']['targets_per_step'] == 1410
  told, config = _local(tmp_path, cache, '--config.run.num_steps=2')
  assert 'Resuming at step 1' in told and config['run']['targets_per_step'] == 1410
