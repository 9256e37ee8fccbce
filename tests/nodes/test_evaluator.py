"""What a row holds, the baselines, and the evaluator alone on files of ours, on released ones, and
on files that are neither."""

import json
import os
import re
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest

from artifacts import distilled_set, run_directory
from configs import schema, validation
from data import sampling, store
from distillation import evaluation, finite_network
from kernels import architectures, registry
from nodes import evaluator
from nodes.client import Retrying, Stopping
from programs import local

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}
NETWORK = {'system.evaluation.nn_steps': 5, 'system.evaluation.nn_width': 8}


def _evaluation(run):
  prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
  return evaluation.Evaluation(
    run.config.run, run.config.system.evaluation, prepared, threads=1
  ), prepared


def _support(prepared, size=6):
  chosen = sampling.class_balanced(0, sampling.INITIAL_SUPPORT, 0, prepared.train_labels, size)
  return np.asarray(prepared.train_images[chosen]), sampling.centred_one_hot(
    prepared.train_labels[chosen], 3
  )


def test_krr_on_ragged_tiles_is_the_formula(make_run, tmp_path):
  """25 test images in tiles of 4, against K_ts (K_ss + ridge)^-1 y in one piece."""
  run = make_run(
    tmp_path,
    {**FC1, 'run.kernel_dtype': 'float64', 'run.ridge': 1e-3, 'system.evaluation.krr_tile': 4},
  )
  evaluate, prepared = _evaluation(run)
  images, labels = _support(prepared)
  kernel = evaluate._kernel
  k_ss = kernel.block(images, images)
  k_ts = kernel.block(np.asarray(prepared.test_images), images)
  predictions = k_ts @ np.linalg.solve(k_ss + 1e-3 * np.trace(k_ss) / 6 * np.eye(6), labels)
  truth = np.eye(3)[prepared.test_labels] - 1 / 3
  row = evaluate.krr(images, labels)
  assert row['krr_test_accuracy'] == np.mean(predictions.argmax(axis=1) == prepared.test_labels)
  assert row['krr_test_mse'] == pytest.approx(np.mean((predictions - truth) ** 2) / 2, rel=1e-9)


def test_mean_and_deviation_and_what_was_selected_on_what(make_run, tmp_path):
  changes = {
    **FC1,
    **NETWORK,
    'system.evaluation.nn_seeds': 3,
    'system.evaluation.nn_l2s': (0.0, 1e-3),
    'system.evaluation.nn_learning_rate_factors': (0.5,),
    'system.evaluation.nn_architecture': 'conv1',
  }
  evaluate, prepared = _evaluation(make_run(tmp_path, changes))
  images, labels = _support(prepared)
  row = evaluate.finite_network(images, labels)
  held_out = prepared.train_images[-9:], prepared.train_labels[-9:]  # a tenth of 96
  result = finite_network.evaluate(
    architectures.get('conv1'),
    images,
    labels,
    held_out,
    (prepared.test_images, prepared.test_labels),
    width=8,
    steps=5,
    batch=100,
    loss='mse',
    learning_rate_factors=(0.5,),
    l2s=(0.0, 1e-3),
    num_seeds=3,
    seed=0,
  )
  a, b, c = result.test_accuracies
  mean = (a + b + c) / 3
  assert row == {
    'nn_test_accuracy': pytest.approx(mean),
    'nn_seeds': 3,
    'nn_architecture': 'conv1',
    'nn_width': 8,
    'nn_steps': 5,
    'nn_learning_rate_factor': 0.5,
    'nn_l2': result.l2,
    'nn_test_accuracy_std': pytest.approx(
      (((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2) ** 0.5
    ),
    'nn_selected_on': 'the last 9 training images',
    'nn_validation_accuracy': result.validation_accuracy,
  }
  assert evaluation.network_in_words(row).endswith(' % (conv1, width 8, 5 updates)')


def test_one_network_with_one_setting_has_no_deviation_and_no_selection(make_run, tmp_path):
  evaluate, prepared = _evaluation(make_run(tmp_path, {**FC1, **NETWORK}))
  row = evaluate.finite_network(*_support(prepared))
  assert sorted(row) == [
    'nn_l2',
    'nn_learning_rate_factor',
    'nn_seeds',
    'nn_selected_on',
    'nn_steps',
    'nn_test_accuracy',
    'nn_width',
  ]
  assert row['nn_selected_on'] is None and row['nn_seeds'] == 1


def test_baselines_are_the_images_a_run_starts_from_with_hard_and_solved_labels(make_run, tmp_path):
  changes = {**FC1, **NETWORK, 'run.ridge': 1e-3, 'system.evaluation.krr_tile': 5}
  evaluate, prepared = _evaluation(make_run(tmp_path, changes))
  images, labels = _support(prepared)
  kernel = registry.make_kernel('fc1', dtype='float64')
  k_ss, k_ts = kernel.block(images, images), kernel.block(prepared.train_images, images)
  y_t = sampling.centred_one_hot(prepared.train_labels, prepared.num_classes)
  solved = np.linalg.pinv(k_ts @ np.linalg.inv(k_ss + 1e-3 * np.trace(k_ss) / 6 * np.eye(6))) @ y_t
  rows = evaluate.baselines(6)
  assert rows[0] == {
    'kind': 'real images, hard labels',
    **evaluate.krr(images, labels),
    **evaluate.finite_network(images, labels),
  }
  assert rows[1]['kind'] == 'real images, solved labels'
  found = evaluate.krr(images, solved)
  assert rows[1]['krr_test_mse'] == pytest.approx(found['krr_test_mse'], rel=1e-3)  # float32 kernel
  assert rows[1]['krr_test_accuracy'] == found['krr_test_accuracy']
  with pytest.raises(ValueError, match='size must be a multiple of 3'):
    evaluate.baselines(7)


@pytest.fixture(scope='module', name='distilled')
def _distilled(tmp_path_factory, npz, cache):
  """A finished run's directory, with baselines. (A fixture of its own scope: the run is made
  once.)"""
  from configs import base

  workdir = tmp_path_factory.mktemp('run')
  config = base.get_config()
  config.update_from_flattened_dict(
    {
      'run.architecture': 'fc1',
      'run.data.name': npz,
      'run.num_steps': 2,
      'run.images_per_class': 2,
      'run.targets_per_step': 33,
      'system.cache_dir': cache,
      'system.evaluation.nn_steps': 5,
      'system.evaluation.nn_width': 8,
      'system.evaluation.baselines': True,
      'system.snapshot_steps': (1,),
      'system.num_workers': 2,
    }
  )
  from programs import start

  config = validation.validate(config.to_dict())
  prepared = store.prepare(config.run.data, cache)
  directory = run_directory.RunDirectory(str(workdir))
  directory.open(config, prepared.key)
  local.distil(start.Run(config, directory, cache), threading.Event())
  return workdir


def _rows(workdir):
  with open(workdir / 'metrics.jsonl', encoding='utf-8') as file:
    return {row['step']: row for row in map(json.loads, file)}


def test_a_run_evaluates_networks_at_its_ends_and_baselines_once(distilled):
  rows = _rows(distilled)
  assert sorted(rows) == [0, 1, 2] and [
    step for step in rows if 'nn_test_accuracy' in rows[step]
  ] == [0, 2]
  baselines = json.loads((distilled / 'baselines.json').read_text())
  assert baselines[0]['kind'] == 'real images, hard labels'
  # The run starts from those very images.
  assert baselines[0]['krr_test_accuracy'] == rows[0]['krr_test_accuracy']
  assert baselines[0]['nn_test_accuracy'] == rows[0]['nn_test_accuracy']


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

  def broken(self, name, reason):
    self.reasons.append((name, reason))


@pytest.fixture(name='follow')
def _follow(make_run, tmp_path):
  """A function (changes) -> (run, coordinator, evaluator, stop) of a run with snapshots 0 to 2."""

  def make(changes=None):
    run = make_run(tmp_path, {**FC1, 'run.num_steps': 2, **(changes or {})})
    prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
    images, labels = _support(prepared)
    labels = labels.astype(np.float32)
    snapshots = {step: (images + np.float32(0.1 * step), labels) for step in range(3)}
    for step, (images, labels) in snapshots.items():
      np.savez(run.directory.snapshot(step), images=images, labels=labels)
    distilled_set.save(run.directory.distilled, *snapshots[2], 2, run.config, prepared)
    coordinator, stop = _Coordinator(run, snapshots), threading.Event()
    return run, coordinator, _node(run, coordinator, stop), stop

  return make


def _node(run, coordinator, stop):
  client = Retrying(coordinator, 10.0, stop)
  return evaluator.Evaluator(client, run.directory.path, 1, run.cache, stop)


def _steps(run, coordinator):
  """Of the rows, which the coordinator has been told of too."""
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
    assert message.endswith(f': python -m artifacts.report --workdir={run.directory.path}')
    assert '\n' not in message
  assert os.path.isfile(run.directory.report) == (blocked == 'tensorboard')


def test_baselines_that_cannot_be_kept_cost_no_row(follow, caplog, monkeypatch):
  monkeypatch.setattr(run_directory, 'DISK_PATIENCE', 0.0)
  run, coordinator, node, _ = follow({'system.evaluation.baselines': True})
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
  assert sorted(_rows(tmp_path / 'run')) == [0, 1]
  reason = 'ImportError: libfreetype.so.6: no such file'
  assert f'report.html is not written ({reason})' in done.stderr
  assert f'python -m artifacts.report --workdir={tmp_path}/run' in done.stderr


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


def test_a_last_snapshot_that_cannot_be_evaluated_is_told(follow, monkeypatch):
  monkeypatch.setattr(evaluator.time, 'sleep', lambda seconds: None)
  run, coordinator, node, _ = follow()
  os.truncate(run.directory.distilled, 100)
  with pytest.raises(distilled_set.DataError):
    node.run()
  ((_, reason),) = coordinator.reasons
  assert _steps(run, coordinator) == [0, 1] and 'is not a distilled set' in reason


def test_a_full_disk_is_waited_for_without_evaluating_again(follow, monkeypatch, caplog):
  monkeypatch.setattr(run_directory, 'DISK_PAUSE', 0.01)
  run, coordinator, node, _ = follow()
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
  monkeypatch.setattr(run_directory, 'DISK_PAUSE', 0.01)
  monkeypatch.setattr(run_directory, 'DISK_PATIENCE', 0.05)
  full = mock.Mock(side_effect=OSError(30, 'Read-only file system'))
  monkeypatch.setattr(run_directory.RunDirectory, 'append_metrics', full)
  run, coordinator, node, _ = follow()
  with pytest.raises(run_directory.RunDirectoryError):
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
  monkeypatch.setattr(evaluator, 'HEARTBEAT_SECONDS', 0.01)
  monkeypatch.setattr(evaluator.time, 'sleep', lambda seconds: None)
  run, coordinator, node, _ = follow()
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


class _Counting:
  """A kernel that counts the pairs it is asked for."""

  def __init__(self, kernel):
    self._kernel, self.pairs = kernel, []
    self.prepare, self.dtype = kernel.prepare, kernel.dtype

  def block(self, x1, x2):
    self.pairs.append((len(x1), len(x2), x1 is x2))
    return self._kernel.block(x1, x2)


@pytest.mark.parametrize('architecture', ['fc1', 'convnet2'])
def test_k_ss_in_tiles(architecture):
  kernel = _Counting(registry.make_kernel(architecture))
  images = kernel.prepare(np.random.default_rng(0).normal(size=(7, 8, 9, 2)))
  whole = registry.make_kernel(architecture).block(images.images, images.images)
  np.testing.assert_array_equal(evaluation.support_block(kernel, images, 7), whole)
  assert kernel.pairs == [(7, 7, True)]
  kernel.pairs.clear()
  tiled = evaluation.support_block(kernel, images, 3)
  assert kernel.pairs == [
    (3, 3, True),
    (3, 3, False),
    (3, 1, False),
    (3, 3, True),
    (3, 1, False),
    (1, 1, True),
  ]
  np.testing.assert_array_equal(tiled, tiled.T)
  np.testing.assert_allclose(tiled, whole, rtol=1e-5)


@pytest.mark.parametrize('blocks', range(4))
def test_krr_can_be_interrupted_at_every_tile_of_k_ss(make_run, tmp_path, blocks):
  run = make_run(tmp_path, {**FC1, 'system.evaluation.krr_tile': 3})
  prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
  kernel, images = _Counting(registry.make_kernel('fc1')), _support(prepared)[0]

  def check():
    if len(kernel.pairs) >= blocks:
      raise Stopping()

  with pytest.raises(Stopping):
    evaluation.krr_test(
      kernel,
      images,
      np.eye(3)[[0, 0, 1, 1, 2, 2]],
      1e-3,
      prepared.test_images,
      prepared.test_labels,
      3,
      check,
    )
  assert len(kernel.pairs) == blocks


def _alone(*flags, cache, timeout=200):
  environment = {**os.environ, 'XDG_CACHE_HOME': os.path.dirname(cache)}
  return subprocess.run(
    [sys.executable, '-m', 'nodes.evaluator', *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
    env=environment,
    check=False,
  )


CONFIG = (
  '--config=configs/base.py',
  '--config.run.architecture=fc1',
  '--config.system.evaluation.nn_steps=0',
)


def test_alone_on_a_file_of_ours_it_says_what_the_run_said(distilled, cache):
  done = _alone(f'--dataset={distilled}/distilled.npz', '--json', cache=cache)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('\n') == 1
  found = json.loads(done.stdout)
  assert found['dataset'] == f'{distilled}/distilled.npz'
  assert [row['kind'] for row in found['rows']][:2] == ['distilled', 'real images, hard labels']
  last = _rows(distilled)[2]
  for key in ('krr_test_accuracy', 'nn_test_accuracy', 'nn_seeds', 'nn_l2'):
    assert found['rows'][0][key] == last[key]
  assert found['rows'][0]['krr_test_mse'] == pytest.approx(last['krr_test_mse'], rel=1e-6)


def test_alone_on_a_released_file_it_takes_the_configuration(distilled, npz, cache, tmp_path):
  """Same images and labels, without settings; a table with baselines."""
  with np.load(distilled / 'distilled.npz') as file:
    np.savez(tmp_path / 'released.npz', images=file['images'], labels=file['labels'])
  done = _alone(
    f'--dataset={tmp_path}/released.npz',
    '--baselines',
    *CONFIG,
    f'--config.run.data.name={npz}',
    f'--config.system.cache_dir={cache}',
    cache=cache,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0] == f'Test accuracy of {tmp_path}/released.npz'
  first, last = [f'{100 * _rows(distilled)[step]["krr_test_accuracy"]:.2f} %' for step in (0, 2)]
  assert lines[2].startswith('distilled') and last in lines[2] and lines[2].endswith('not trained')
  assert lines[3].startswith('real images, hard labels') and first in lines[3]


def test_alone_on_a_set_that_the_authors_released_by_its_name(released_mnist):
  name, folder, cache = released_mnist
  flags = (
    f'--dataset={name}',
    f'--config.run.data.dir={folder}',
    f'--config.system.cache_dir={cache}',
    '--json',
  )
  done = _alone(
    '--config=configs/mnist_ipc1.py', *flags, '--config.system.evaluation.nn_steps=0', cache=cache
  )
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(done.stdout)['rows']
  distilled = distilled_set.load_released(name, cache, folder)
  run = schema.from_dict(schema.Run, distilled.settings['run'])
  evaluate = evaluation.Evaluation(
    run,
    schema.from_dict(schema.Evaluation, distilled.settings['evaluation']),
    store.prepare(run.data, cache),
    threads=1,
  )
  assert row == {'kind': 'distilled', **evaluate.krr(distilled.images, distilled.labels)}
  done = _alone('--config=configs/cifar10_ipc1.py', *flags, cache=cache)
  assert (
    done.returncode == 2
    and 'was distilled from mnist with other content or preprocessing than that of the cifar10'
    in done.stderr
  )


@pytest.mark.parametrize(
  'content, flags, message',
  [
    (None, (), '--dataset=FILE is missing'),
    ('absent', CONFIG, 'is not a readable .npz file without pickled objects: [Errno 2]'),
    ('text', CONFIG, 'is not a readable .npz file without pickled objects'),
    ('released', (), 'holds no settings: give --config=FILE'),
    (
      'released',
      ('--config=configs/nothing.py',),
      '--config=configs/nothing.py: there is no such file.',
    ),
    (
      'released',
      ('stray',),
      "unknown argument 'stray'; expected --dataset=FILE --config=FILE --baselines --json.",
    ),
    (
      'no labels',
      CONFIG,
      "holds no array 'labels'; expected images [S, H, W, D] and labels [S, C].",
    ),
    ('small images', CONFIG, 'images must be [S, 8, 9, 2] for blobs, got [6, 8, 8, 2].'),
    ('few labels', CONFIG, 'labels must be [6, 3] for blobs, got [5, 3].'),
    ('nan', CONFIG, 'images must be finite floating-point numbers, got NaN or infinity.'),
    (
      'seven',
      (*CONFIG, '--baselines'),
      'size must be a multiple of 3 (the classes) from 3 to 96 (the smallest class has 32 images), got 7',
    ),
  ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, npz, cache, content, flags, message):
  arrays = {
    'images': np.zeros((6, 8, 9, 2), np.float32),
    'labels': np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]],
  }
  path = tmp_path / 'set.npz'
  if content == 'text':
    path.write_text('PK or not')
  elif content != 'absent':
    if content == 'no labels':
      del arrays['labels']
    elif content == 'small images':
      arrays['images'] = arrays['images'][:, :, :8]
    elif content == 'few labels':
      arrays['labels'] = arrays['labels'][1:]
    elif content == 'nan':
      arrays['images'][3, 1] = np.nan
    elif content == 'seven':
      arrays = {
        'images': np.random.default_rng(0).normal(size=(7, 8, 9, 2)),
        'labels': np.eye(3)[[0, 1, 2, 0, 1, 2, 0]],
      }
    np.savez(path, **arrays)
  data = (
    (f'--config.run.data.name={npz}', f'--config.system.cache_dir={cache}')
    if flags[:1] == CONFIG[:1]
    else ()
  )
  done = _alone(*([f'--dataset={path}'] if content else []), *flags, *data, cache=cache)
  assert done.returncode == 2, done.stdout + done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert len(lines) == 1 and 'Traceback' not in done.stderr and not done.stdout
  assert message in lines[0], lines[0]


def test_a_file_of_ours_is_not_taken_for_one_of_another_data_set(distilled, npz, cache, tmp_path):
  with np.load(npz) as file:
    np.savez(tmp_path / 'other.npz', **{**file, 'y_test': file['y_test'][::-1]})
  done = _alone(
    f'--dataset={distilled}/distilled.npz',
    *CONFIG,
    f'--config.run.data.name={tmp_path}/other.npz',
    f'--config.system.cache_dir={cache}',
    cache=cache,
  )
  assert (
    done.returncode == 2
    and 'was distilled from blobs with other content or preprocessing than that of the other'
    in done.stderr
  )
