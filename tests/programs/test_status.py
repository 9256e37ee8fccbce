"""--status of runs that go on, are over, or were cut off; --help."""

import json
import os
import subprocess
import sys
import threading
import time

import forked
import pytest

from artifacts import run_directory
from configs import schema
from nodes import coordinator as coordinator_node
from nodes import kernel_worker
from programs import local, status

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KEY = 32 * 'a' + '-standard'
FIELDS = {
  'step': 3,
  'num_steps': 9,
  'wall_seconds': 61.0,
  'updated': '2026-01-01T00:00:00+00:00',
  'train_loss': 0.25,
  'seconds_to_go': 7.0,
  'kernel_pairs_per_second': 50.0,
  'workers': {
    'a': {'tasks': 2, 'pairs': 60, 'seconds': 3.0, 'alive': False},
    'b': {'tasks': 0, 'pairs': 0, 'seconds': 0.0, 'alive': True},
  },
}


def test_a_run_that_goes_on_and_one_that_was_cut_off(tmp_path):
  directory, other = (run_directory.RunDirectory(str(tmp_path)) for _ in range(2))
  directory.open(schema.Config(), KEY)
  directory.write_status(run_directory.RUNNING, **FIELDS)
  os.makedirs(os.path.join(directory.checkpoints, '00000002'))
  found = status.read(other)
  assert (
    found['state'] == 'running'
    and found['step'] == 3
    and found['checkpoint_step'] == 2
    and 0 <= found['checkpoint_age'] < 60
  )
  assert found['workers'] == {
    'a': {'tasks': 2, 'pairs': 60, 'seconds': 3.0, 'pairs_per_second': 20.0, 'alive': False},
    'b': {'tasks': 0, 'pairs': 0, 'seconds': 0.0, 'pairs_per_second': 0.0, 'alive': True},
  }
  assert 'loss 0.25000, 50 pairs/s, 0:00:07 to go' in status.in_words(found)
  directory.close()
  found = status.read(other)
  assert (
    found['state'] == 'failed'
    and found['message'] == 'the launcher has exited without recording why'
  )
  assert not found['workers']['b']['alive'] and '0:00:07 to go' not in status.in_words(found)


def test_a_finished_run(make_run, tmp_path):
  run = make_run(tmp_path, {'run.architecture': 'fc1', 'run.num_steps': 2})
  local.distil(run, threading.Event())
  found = status.read(run.directory)
  assert (found['state'], found['step'], found['checkpoint_step']) == ('finished', 2, 2)
  assert found['rows'] == run.directory.read_metrics() and [
    row['step'] for row in found['rows']
  ] == [0, 1, 2]
  assert sum(counts['pairs'] for counts in found['workers'].values()) == found['pairs']
  assert (
    f'evaluated step      2  KRR  {100 * found["rows"][-1]["krr_test_accuracy"]:.2f} %'
    in status.in_words(found)
  )


def test_a_run_whose_coordinator_could_not_start(make_run, tmp_path):
  run = make_run(tmp_path, {'run.num_steps': 7})
  run.directory.begin()
  found = status.read(run.directory)
  assert (found['state'], found['step'], found['num_steps'], found['workers']) == (
    'starting',
    0,
    7,
    {},
  )
  run.directory.write_status(run_directory.FAILED, message='no luck', generation=1)
  assert status.in_words(status.read(run.directory)).startswith('failed: no luck\n  step 0 of ')
  assert run.directory.has_ended(run.directory.read_status())


def test_a_stopped_run_names_the_command_that_goes_on(make_run, tmp_path):
  run = make_run(tmp_path)
  run.directory.write_command(['python', 'launch.py', '--workdir=a b'])
  run.directory.write_status(run_directory.STOPPED, **FIELDS)
  first, *rest = status.in_words(status.read(run.directory)).splitlines()
  assert first == 'stopped' and "  to go on: python launch.py '--workdir=a b'" in rest
  assert status.read(run.directory)['command'] == "python launch.py '--workdir=a b'"


def test_the_last_evaluation_shows_and_does_not_count_as_computing(make_run, tmp_path):
  """While the evaluator takes its time, the status is kept up to date and the wall time stands
  still."""
  run = make_run(tmp_path, {'run.architecture': 'fc1', 'run.num_steps': 2})
  stop = threading.Event()
  coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, stop)
  worker = kernel_worker.KernelWorker(coordinator, 'w', 1, run.cache, stop)
  running = [threading.Thread(target=node.run) for node in (coordinator, worker)]
  for thread in running:
    thread.start()
  row = {'krr_test_accuracy': 0.5, 'krr_test_mse': 0.1, 'train_loss': 0.1, 'wall_seconds': 1.0}

  def after_evaluating(step):
    run.directory.append_metrics({'step': step, **row})
    _wait(lambda: status.read(run.directory).get('evaluated') == step + 1)
    return status.read(run.directory)

  try:
    _wait(lambda: coordinator.next_snapshot([0, 1]))
    found = [after_evaluating(step) for step in (0, 1)]
  finally:
    stop.set()
    for thread in running:
      thread.join(60)
  for i in range(2):
    assert (found[i]['state'], found[i]['step'], found[i]['to_evaluate']) == ('evaluating', 2, 3)
    assert status.in_words(found[i]).startswith(f'evaluating ({i + 2} of 3)\n')
  assert found[0]['updated'] < found[1]['updated']
  ended = status.read(run.directory)
  assert ended['state'] == 'stopped'
  assert ended['wall_seconds'] == found[1]['wall_seconds'] == found[0]['wall_seconds']


def _wait(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.1)


def test_looking_keeps_no_launch_from_starting(tmp_path):
  """However often somebody looks whether the run is going."""
  directory = run_directory.RunDirectory(str(tmp_path))
  stop = threading.Event()

  def look():
    while not stop.is_set():
      directory.is_in_use()

  lookers = [threading.Thread(target=look) for _ in range(2)]
  for looker in lookers:
    looker.start()
  try:
    for _ in range(50):
      launch = run_directory.RunDirectory(str(tmp_path))
      launch.open(schema.Config(), KEY)
      launch.close()
  finally:
    stop.set()
    for looker in lookers:
      looker.join()


@pytest.mark.parametrize(
  'flags, code, expected',
  [
    (
      ('--status=true', '--config=configs/digits.py', '--workdir=/nowhere'),
      2,
      'error: --workdir=/nowhere holds no run',
    ),
    (
      ('--json', '--config=configs/digits.py', '--workdir=/nowhere'),
      2,
      'error: --json is for --status: give both.',
    ),
    (('--status',), 2, 'error: --workdir=DIR is missing'),
    (('--status', '--workdir=/nowhere'), 2, 'error: --workdir=/nowhere holds no run'),
    (('--status', '--work=/nowhere'), 2, 'error: Unknown command line flag'),
    (('--help',), 0, '--workdir: Run directory'),
    (('--help',), 0, '--role: <coordinator|worker|evaluator>'),
  ],
)
def test_from_the_command_line(flags, code, expected):
  done = forked.run([sys.executable, 'launch.py', *flags])
  assert done.returncode == code and expected in done.stdout + done.stderr


def test_one_line_of_json(tmp_path):
  directory = run_directory.RunDirectory(str(tmp_path))
  directory.open(schema.Config(), KEY)
  directory.write_status(run_directory.STOPPED, **FIELDS)
  done = subprocess.run(
    [sys.executable, 'launch.py', '--status', f'--workdir={tmp_path}', '--json'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0 and done.stdout.count('\n') == 1
  assert (
    json.loads(done.stdout)['state'] == 'stopped'
    and json.loads(done.stdout)['checkpoint_step'] is None
  )
