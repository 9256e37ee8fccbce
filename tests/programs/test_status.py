"""What --status says of runs that go on, are over, or were cut off; --help."""

import json
import os
import subprocess
import sys
import threading

import pytest

from nodes import run_directory
from programs import local
from programs import status

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIELDS = {'step': 3, 'num_steps': 9, 'wall_seconds': 61.0, 'updated': '2026-01-01T00:00:00+00:00', 'train_loss': 0.25, 'seconds_to_go': 7.0,
          'kernel_pairs_per_second': 50.0,
          'workers': {'a': {'tasks': 2, 'pairs': 60, 'seconds': 3.0, 'alive': False},
                      'b': {'tasks': 0, 'pairs': 0, 'seconds': 0.0, 'alive': True}}}


def test_a_run_that_goes_on_and_one_that_was_cut_off(tmp_path):
  directory, other = (run_directory.RunDirectory(str(tmp_path)) for _ in range(2))
  directory.open({'run': {}, 'system': {}}, 'key')
  directory.write_status(run_directory.RUNNING, **FIELDS)
  os.makedirs(os.path.join(directory.checkpoints, '00000002'))
  found = status.read(other)
  assert found['state'] == 'running' and found['step'] == 3 and found['checkpoint_step'] == 2 and 0 <= found['checkpoint_age'] < 60
  assert found['workers'] == {'a': {'tasks': 2, 'pairs': 60, 'seconds': 3.0, 'pairs_per_second': 20.0, 'alive': False},
                              'b': {'tasks': 0, 'pairs': 0, 'seconds': 0.0, 'pairs_per_second': 0.0, 'alive': True}}
  assert 'loss 0.25000, 50 pairs/s, 0:00:07 to go' in status.in_words(found)
  directory._lock.close()
  found = status.read(other)
  assert found['state'] == 'failed' and found['message'] == 'the launcher has exited without recording why'
  assert not found['workers']['b']['alive'] and '0:00:07 to go' not in status.in_words(found)


def test_a_finished_run(make_run, tmp_path):
  run = make_run(tmp_path, {'run.architecture': 'fc1', 'run.num_steps': 2})
  local.distil(run, threading.Event())
  found = status.read(run.directory)
  assert (found['state'], found['step'], found['checkpoint_step']) == ('finished', 2, 2)
  assert found['rows'] == run.directory.read_metrics() and [row['step'] for row in found['rows']] == [0, 1, 2]
  assert sum(counts['pairs'] for counts in found['workers'].values()) == found['pairs']
  assert f'evaluated step      2  KRR  {100 * found["rows"][-1]["krr_test_accuracy"]:.2f} %' in status.in_words(found)


@pytest.mark.parametrize('flags, code, expected', [
    (('--status',), 2, 'error: --workdir=DIR is missing'),
    (('--status', '--workdir=/nowhere'), 2, 'error: --workdir=/nowhere holds no run'),
    (('--status', '--work=/nowhere'), 2, 'error: Unknown command line flag'),
    (('--help',), 0, '--workdir: Run directory'),
    (('--help',), 0, '--role: <coordinator|worker|evaluator>')])
def test_from_the_command_line(flags, code, expected):
  done = subprocess.run([sys.executable, 'launch.py', *flags], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == code and expected in done.stdout + done.stderr


def test_one_line_of_json(tmp_path):
  directory = run_directory.RunDirectory(str(tmp_path))
  directory.open({'run': {}, 'system': {}}, 'key')
  directory.write_status(run_directory.STOPPED, **FIELDS)
  done = subprocess.run([sys.executable, 'launch.py', '--status', f'--workdir={tmp_path}', '--json'], cwd=ROOT, capture_output=True,
                        text=True, timeout=120, check=False)
  assert done.returncode == 0 and done.stdout.count('\n') == 1
  assert json.loads(done.stdout)['state'] == 'stopped' and json.loads(done.stdout)['checkpoint_step'] is None
