"""A run from the command line with nothing but defaults."""

import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _local(workdir, cache, *flags):
  """Runs a step or so in one process; returns its log and the configuration it kept."""
  command = [
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
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
    return done.stderr, json.load(file)


def test_the_defaults_run_on_digits_name_their_classes_and_resume(tmp_path, cache):
  """`run.targets_per_step=0` is as many as suit, also when the run is resumed."""
  log, config = _local(tmp_path, cache)
  assert '10 classes: 0 to 9.' in log and config['run']['targets_per_step'] == 1410
  log, config = _local(tmp_path, cache, '--config.run.num_steps=2')
  assert 'Resuming at step 1' in log and config['run']['targets_per_step'] == 1410
