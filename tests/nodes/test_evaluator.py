"""The evaluator in a run: what may fail without costing a row, and how it ends."""

import json
import os
import re
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest

from artifacts import RunDirectoryError, distilled_set, files, run_directory, snapshots
from data import DataError, sampling, store
from distillation import evaluation
from nodes import evaluator
from nodes.client import Retrying

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}


class _Coordinator:
  """Hands out snapshots, one step after the other, and keeps what it is told."""

  def __init__(self, run, snapshots):
    """`snapshots`: {step: (images [S, H, W, D], labels [S, C])}; the last one is final."""
    self.description = {**run.directory.read_saved().to_dict(), 'run_id': 'id', 'generation': 1}
    self.snapshots, self.final = snapshots, max(snapshots)
    self.heartbeats, self.rows, self.reasons, self.asked = threading.Semaphore(0), [], [], []

  def describe(self):
    return json.dumps(self.description)

  def next_snapshot(self, done):
    self.asked.append(list(done))
    for step, (images, labels) in self.snapshots.items():
      if step not in done:
        return {
          'run_id': 'id',
          'step': step,
          'final': step == self.final,
          'images': images,
          'labels': labels,
          'metrics': json.dumps({'train_loss': 0.5, 'wall_seconds': 1.0 * step}),
        }
    return {'stop': 'the run is over.'}

  def heartbeat(self, name):
    assert name == 'evaluator'
    self.heartbeats.release()

  def evaluated(self, row):
    self.rows.append(json.loads(row))

  def report_unusable(self, name, reason):
    self.reasons.append((name, reason))


@pytest.fixture(name='follow')
def _follow(make_run, tmp_path):
  """A function that makes a run with snapshots 0 to 2, and nodes that evaluate it.

  It takes changes of the configuration, and gives (run, coordinator, node, stop).
  """

  def make(changes=None, **kwargs):
    run = make_run(tmp_path, {**FC1, 'run.num_steps': 2, **(changes or {})})
    prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
    assert prepared is not None
    chosen = sampling.class_balanced(0, sampling.INITIAL_SUPPORT, 0, prepared.train_labels, 6)
    images = np.asarray(prepared.train_images[chosen])
    labels = sampling.centred_one_hot(prepared.train_labels[chosen], 3).astype(np.float32)
    supports = {step: (images + np.float32(0.1 * step), labels) for step in range(3)}
    for step, (images, labels) in supports.items():
      snapshots.write(run.directory, step, images, labels, {})
    distilled_set.save(run.directory.distilled, *supports[2], 2, run.config, prepared)
    coordinator, stop = _Coordinator(run, supports), threading.Event()
    return run, coordinator, _node(run, coordinator, stop, **kwargs), stop

  return make


def _node(run, coordinator, stop, **kwargs):
  client = Retrying(coordinator, 10.0, stop)
  return evaluator.Evaluator(client, run.directory.path, 1, run.cache, stop, pause=0.0, **kwargs)


def _steps(run, coordinator):
  """Steps of the rows, which the coordinator must have got too."""
  steps = [row['step'] for row in run.directory.read_metrics()]
  assert steps == [row['step'] for row in coordinator.rows]
  return steps


def _read(path):
  with open(path, encoding='utf-8') as file:
    return file.read()


def test_a_damaged_first_snapshot_costs_no_row(follow):
  run, coordinator, node, _ = follow()
  with open(run.directory.snapshot(0), 'wb') as file:
    file.write(b'PK damaged')
  node.run()
  assert _steps(run, coordinator) == [0, 1, 2] and not coordinator.reasons
  report = _read(run.directory.report)
  assert 'The snapshot of step 0 cannot be read' in report
  assert 'there are those of steps 1, 2.' in report
  assert os.path.exists(run.directory.picture)


@pytest.mark.parametrize(
  'blocked, what, count',
  [
    ('tensorboard', "TensorBoard's file of step", 3),
    ('report', 'report.html', 1),
    ('picture', 'report.html', 1),
  ],
)
def test_what_is_made_of_the_rows_may_fail(follow, caplog, blocked, what, count):
  """A folder where a file should be, or a file where a folder should be."""
  run, coordinator, node, _ = follow()
  path = getattr(run.directory, blocked)
  if blocked == 'tensorboard':
    open(path, 'w', encoding='utf-8').close()
  else:
    os.makedirs(path)
  node.run()
  assert _steps(run, coordinator) == [0, 1, 2] and not coordinator.reasons
  found = [record.message for record in caplog.records if record.message.startswith(what)]
  assert len(found) == count
  for message in found:
    assert re.search(r' is not written \((FileExists|IsADirectory)Error: .*\)\. The ', message)
    assert message.endswith(f': python -m programs.report --workdir={run.directory.path}')
    assert '\n' not in message
  assert os.path.isfile(run.directory.report) == (blocked == 'tensorboard')


def test_baselines_that_cannot_be_kept_cost_no_row(follow, caplog):
  patience = files.Patience(seconds=0.0)
  run, coordinator, node, _ = follow({'system.evaluation.baselines': True}, patience=patience)
  os.makedirs(run.directory.baselines)
  node.run()
  assert _steps(run, coordinator) == [0, 1, 2] and os.path.exists(run.directory.report)
  message = r'baselines.json is not written \(RunDirectoryError: .*\(Is a directory\)'
  assert re.search(message, caplog.text)


def test_a_run_without_matplotlib_or_a_home_finishes_and_says_what_is_missing(npz, cache, tmp_path):
  """Matplotlib that cannot be imported, as where a library of the system is missing."""
  (tmp_path / 'matplotlib.py').write_text('raise ImportError("libfreetype.so.6: no such file")')
  flags = {
    'run.data.name': npz,
    'run.architecture': 'fc1',
    'run.num_steps': 1,
    'run.targets_per_step': 33,
    'system.cache_dir': cache,
    'system.num_workers': 1,
    'system.evaluation.nn_steps': 0,
  }
  home = {'HOME': '/proc/nowhere', 'MPLCONFIGDIR': '/proc/nowhere'}
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'programs.local',
      '--config=configs/base.py',
      f'--workdir={tmp_path}/run',
      *(f'--config.{name}={value}' for name, value in flags.items()),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
    env={**os.environ, 'PYTHONPATH': str(tmp_path), **home},
  )
  assert done.returncode == 0, done.stderr
  rows = run_directory.RunDirectory(f'{tmp_path}/run').read_metrics()
  assert sorted(row['step'] for row in rows) == [0, 1]
  reason = 'ImportError: libfreetype.so.6: no such file'
  assert f'report.html is not written ({reason})' in done.stderr
  assert f'python -m programs.report --workdir={tmp_path}/run' in done.stderr


def test_what_a_kill_left_out_after_the_last_row_is_made_before_the_run_may_end(follow):
  run, coordinator, node, stop = follow({'system.evaluation.baselines': True})
  node.run()
  assert coordinator.asked[0] == []
  events = sorted(os.listdir(run.directory.tensorboard))
  os.remove(run.directory.report)
  os.remove(os.path.join(run.directory.tensorboard, events[1]))
  with open(run.directory.baselines, 'w', encoding='utf-8') as file:
    file.write('[{"kind": ')
  asked = []

  def next_snapshot(done):
    files = sorted(os.listdir(run.directory.tensorboard))
    asked.append((done, os.path.exists(run.directory.report), files))
    return {'stop': 'the run is over.'}

  coordinator.next_snapshot = next_snapshot
  _node(run, coordinator, stop).run()
  assert asked == [([0, 1, 2], True, events)]
  kinds = [row['kind'] for row in run.directory.read_baselines()]
  assert kinds == ['real images, hard labels', 'real images, solved labels']
  assert 'real images, solved labels' in _read(run.directory.report)


@pytest.mark.parametrize(
  'change',
  [
    lambda images, labels: (images[:, :7], labels),
    lambda images, labels: (images[:0], labels[:0]),
    lambda images, labels: (np.nan * images, labels),
  ],
  ids=['shape', 'empty', 'nan'],
)
def test_a_snapshot_that_cannot_be_evaluated_is_passed_over(follow, caplog, change):
  run, coordinator, node, _ = follow()
  coordinator.snapshots[1] = change(*coordinator.snapshots[1])
  node.run()
  assert _steps(run, coordinator) == [0, 2] and not coordinator.reasons
  assert re.search(r'snapshot of step 1 cannot be used \(.*\); it is not evaluated\.', caplog.text)
  assert os.path.exists(run.directory.report)


def test_a_last_snapshot_that_cannot_be_evaluated_is_reported(follow):
  run, coordinator, node, _ = follow()
  os.truncate(run.directory.distilled, 100)
  with pytest.raises(DataError):
    node.run()
  ((_, reason),) = coordinator.reasons
  assert _steps(run, coordinator) == [0, 1] and 'is not a distilled set' in reason


def test_a_full_disk_is_waited_for_without_evaluating_again(follow, monkeypatch, caplog):
  run, coordinator, node, _ = follow(patience=files.Patience(pause=0.01))
  append = run_directory.RunDirectory.append_metrics
  evaluate = mock.Mock(side_effect=evaluation.Evaluation.krr)
  errors = [OSError(28, 'No space left on device')] * 7

  def full(self, row):
    if errors:
      raise errors.pop()
    append(self, row)

  monkeypatch.setattr(run_directory.RunDirectory, 'append_metrics', full)
  monkeypatch.setattr(evaluation.Evaluation, 'krr', lambda *args: evaluate(*args))
  node.run()
  assert _steps(run, coordinator) == [0, 1, 2] and not coordinator.reasons
  assert evaluate.call_count == 3
  assert caplog.text.count('cannot be written (No space left on device); trying again for') == 7


def test_a_disk_that_stays_full_is_named(follow, monkeypatch):
  full = mock.Mock(side_effect=OSError(30, 'Read-only file system'))
  monkeypatch.setattr(run_directory.RunDirectory, 'append_metrics', full)
  run, coordinator, node, _ = follow(patience=files.Patience(0.05, 0.01))
  with pytest.raises(RunDirectoryError):
    node.run()
  ((name, reason),) = coordinator.reasons
  path = run.directory.metrics
  assert name == 'evaluator'
  assert reason == f'the row of step 0 in {path} cannot be written (Read-only file system).'


@pytest.mark.parametrize('answer', [None, ConnectionError('lost')], ids=['heard', 'not heard'])
@pytest.mark.parametrize('fails', [False, True], ids=['ends', 'fails'])
def test_heartbeats_come_during_a_long_block_and_end_with_the_node(
  follow, monkeypatch, answer, fails
):
  run, coordinator, node, _ = follow(heartbeat_seconds=0.01)
  heard, krr = coordinator.heartbeats, evaluation.Evaluation.krr

  def heartbeat(name):
    heard.release()
    if answer:
      raise answer

  coordinator.heartbeat = heartbeat

  def long(self, *args):
    """Goes on until three heartbeats have come, without a check."""
    while heard.acquire(blocking=False):
      pass
    assert all(heard.acquire(timeout=60) for _ in range(3))
    if fails:
      raise ValueError('no row')
    return krr(self, *args)

  monkeypatch.setattr(evaluation.Evaluation, 'krr', long)
  if fails:
    with pytest.raises(ValueError, match='no row'):
      node.run()
  else:
    node.run()
    assert _steps(run, coordinator) == [0, 1, 2]
  assert 'heartbeats' not in [thread.name for thread in threading.enumerate()]


def test_the_evaluator_stops_where_it_is(follow, monkeypatch):
  run, coordinator, node, stop = follow({'system.evaluation.krr_tile': 4})
  append = run_directory.RunDirectory.append_metrics

  def stop_after(self, row):
    append(self, row)
    stop.set()

  monkeypatch.setattr(run_directory.RunDirectory, 'append_metrics', stop_after)
  node.run()
  assert _steps(run, coordinator) == [0] and not coordinator.reasons
