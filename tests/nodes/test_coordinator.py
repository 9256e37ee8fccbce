"""What the coordinator does when things are not as they should be."""

import json
import os
import re
import threading

import numpy as np
import pytest

from artifacts import checkpoints, run_directory
from configs import schema
from data import store
from distillation import evaluation, optimizers
from nodes import coordinator as coordinator_node
from nodes import kernel_worker, task_board, tasks
from nodes.client import CoordinatorLost
from programs import local, outcome

FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}


def _coordinator(run):
  return coordinator_node.Coordinator(run.directory.path, run.cache, threading.Event())


def _hello(**changes):
  return json.dumps(
    {
      'fingerprint': {'implementation': 'native', 'device': 'A', **changes},
      'pairs_per_second': 10.0,
    }
  )


def test_without_workers_the_run_stops_with_a_checkpoint(make_run, tmp_path, capsys):
  run = make_run(tmp_path, {**FC1, 'system.worker_timeout': 1.0})
  run.directory.write_command(['python', 'launch.py', '--workdir=my run'])
  run.directory.begin()
  _coordinator(run).run()
  status = run.directory.read_status()
  assert status['state'] == 'stopped' and 'no worker has been heard of' in status['message']
  assert os.listdir(run.directory.checkpoints) == ['00000000']
  assert outcome.conclude(run.directory) == 75
  assert re.fullmatch(
    r'Stopped at step 0 of 2: no worker has been heard of for \d s \(system.worker_timeout\). '
    r"To go on from there:\n  python launch.py '--workdir=my run'\n",
    capsys.readouterr().out,
  )


def test_a_second_coordinator_touches_nothing(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(run_directory, '_HANDOVER', 0.2)
  run = make_run(tmp_path, FC1)
  first = _coordinator(run)
  run.directory.write_status('running', step=1, generation=1)
  before = run.directory.read_status()
  with pytest.raises(run_directory.RunDirectoryError, match='has another coordinator'):
    _coordinator(run)
  assert run.directory.read_status() == before
  assert json.loads(first.describe())['generation'] == 1


@pytest.mark.parametrize(
  'error, message',
  [
    (ValueError('no luck'), 'ValueError: no luck'),
    (OSError(5, 'Input/output error'), 'Input/output error'),
  ],
)
def test_a_coordinator_that_cannot_start_says_so(
  make_run, tmp_path, monkeypatch, capsys, error, message
):
  """Also where an earlier launch has finished: that is not this one's outcome."""
  run = make_run(tmp_path, FC1)
  run.directory.begin()
  local.distil(run, threading.Event())
  assert outcome.conclude(run.directory) == 0
  run.directory.close()

  def fail(*_):
    raise error

  monkeypatch.setattr(store, 'open_prepared', fail)
  run.directory.begin()
  with pytest.raises(type(error)):
    _coordinator(run)
  status = run.directory.read_status()
  assert (status['state'], status['step'], status['generation']) == ('failed', 2, 2)
  assert message in status['message']
  assert outcome.conclude(run.directory) == 1
  assert f'The run failed: {status["message"]}' in capsys.readouterr().err


def test_a_run_stops_however_fast_its_phases_are(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(task_board.TaskBoard, 'take', lambda self, task, wait: {})
  coordinator = _coordinator(make_run(tmp_path, FC1))
  coordinator._stop_event.set()
  with pytest.raises(coordinator_node._Stopped):
    next(coordinator._phase(tasks.TARGETS, 4))


def test_a_worker_that_would_compute_other_bits_is_refused(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(coordinator_node, '_LONG_POLL', 0.0)
  for allow in (False, True):
    coordinator = _coordinator(
      make_run(tmp_path / str(allow), {**FC1, 'system.allow_mixed': allow})
    )
    assert coordinator.lease('first', _hello()) is None
    answer = coordinator.lease('second', _hello(device='B'))
    assert (
      answer is None
      if allow
      else 'device: B instead of A' in answer['stop'] and 'system.allow_mixed' in answer['stop']
    )


def test_answers_from_another_life_or_step_are_dropped(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(coordinator_node, '_LONG_POLL', 0.0)
  coordinator = _coordinator(make_run(tmp_path, FC1))
  coordinator._step = 4
  task = tasks.Task(
    coordinator._run_id, coordinator._generation, 4, tasks.TARGETS, 0, (0, 5), (0, 6)
  )
  coordinator._board.post([task])
  answer = coordinator.lease('w', _hello())
  [(given, lease, _)] = answer['tasks']
  assert tasks.Task(*given) == task and answer['inputs'] == []
  parts, digest = tasks.encode({'x': np.ones(3)})
  for stale in (
    task._replace(step=3),
    task._replace(generation=task.generation + 1),
    task._replace(run_id='other'),
  ):
    coordinator.complete('w', list(stale), lease, 0, 1, parts[0], digest, [])
    assert coordinator._board.take(task, 0) is None
  coordinator._inputs = {'alpha': np.ones(2)}
  assert coordinator.fetch(coordinator._generation, 3, 'alpha', 0, 2) is None
  assert tasks.unpack(coordinator.fetch(coordinator._generation, 4, 'alpha', 0, 2))[
    'alpha'
  ].tolist() == [1, 1]
  coordinator.complete('w', list(task), lease, 0, 1, parts[0], digest, [])
  assert coordinator._board.take(task, 0)['x'].tolist() == [1, 1, 1]


def test_parts_may_arrive_twice_and_in_any_order(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(coordinator_node, '_LONG_POLL', 0.0)
  monkeypatch.setattr(tasks, 'PART_BYTES', 100)
  coordinator = _coordinator(make_run(tmp_path, FC1))
  coordinator._step = 0
  task = tasks.Task(
    coordinator._run_id, coordinator._generation, 0, tasks.TARGETS, 0, (0, 5), (0, 6)
  )
  coordinator._board.post([task])
  [(_, lease, _)] = coordinator.lease('w', _hello())['tasks']
  parts, digest = tasks.encode({'x': np.arange(30)})
  assert len(parts) > 2
  order = [1, 1, *range(2, len(parts)), 1, 0, 0, len(parts) - 1]
  for i in order:
    coordinator.complete('w', list(task), lease, i, len(parts), parts[i], digest, [])
  assert coordinator._board.take(task, 0)['x'].tolist() == list(range(30))
  assert not coordinator._parts


def test_a_resumed_run_wants_the_hardware_it_began_on(make_run, tmp_path):
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  coordinator = _coordinator(run)
  assert 'device: B instead of' in coordinator.lease('w', _hello(device='B'))['stop']
  coordinator._system.num_workers = 1
  with pytest.raises(
    coordinator_node.RunFailed,
    match='no worker can start; the last one said: this worker would compute other bits',
  ):
    coordinator._check_progress()


def test_a_full_disk_is_waited_for_and_then_named(make_run, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(run_directory, 'DISK_PAUSE', 0.01)
  run = make_run(tmp_path, FC1)
  coordinator = _coordinator(run)
  template = coordinator_node.initial_state(
    run.config.run, coordinator._prepared, coordinator._optimizer
  )
  errors = [OSError(28, 'No space left on device')] * 2
  save = coordinator._checkpoints.save

  def full(*args):
    if errors:
      raise errors.pop()
    save(*args)

  monkeypatch.setattr(coordinator._checkpoints, 'save', full)
  coordinator._save(template)
  assert (
    caplog.text.count(
      'the checkpoint of step 0 cannot be written (No space left on device); trying again for'
    )
    == 2
  )
  assert os.listdir(run.directory.checkpoints) == ['00000000']
  errors[:] = [OSError(30, 'Read-only file system')] * 10**6
  monkeypatch.setattr(run_directory, 'DISK_PATIENCE', 0.1)
  with pytest.raises(
    coordinator_node.RunFailed,
    match=r'step 1 cannot be written \(Read-only file system\). Mend that, .* of step 0',
  ):
    coordinator._save(template._replace(step=1))


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(make_run, tmp_path, monkeypatch):
  compute = kernel_worker.KernelWorker._compute

  def spoil(self, task, inputs):
    piece = compute(self, task, inputs)
    return (
      {**piece, 'loss': np.float64(1e7)}
      if task.step == 1 and task.phase == tasks.TARGETS
      else piece
    )

  monkeypatch.setattr(kernel_worker.KernelWorker, '_compute', spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert (status['state'], status['step']) == ('failed', 0)
  assert (
    status['message']
    == 'step 1: the training diverges, its loss is 4e+07; lower run.learning_rate or raise run.ridge.'
  )
  coordinator = _coordinator(run)
  state = coordinator._restore()
  assert state.step == 0 and np.isfinite(state.images).all()
  gradient = coordinator_node.Gradient(
    np.full_like(state.images, np.inf), np.zeros_like(state.labels)
  )
  with pytest.raises(
    coordinator_node.RunFailed, match='step 0: the update makes the images NaN or infinite'
  ):
    coordinator._move(state, gradient)


def test_a_damaged_snapshot_is_skipped_and_a_damaged_last_one_reported(
  make_run, tmp_path, monkeypatch
):
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  coordinator = _coordinator(run)
  for step in (0, 2):
    with open(run.directory.snapshot(step), 'r+b') as file:
      file.truncate(100)
  assert coordinator.next_snapshot([])['step'] == 1
  coordinator._over = True
  assert 'stop' in coordinator.next_snapshot([1])
  with pytest.raises(
    coordinator_node.RunFailed, match='its evaluation failed: the snapshot of step 2 is damaged'
  ):
    coordinator._await_evaluation()


def test_an_evaluator_that_is_gone_is_not_waited_for_long(make_run, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(coordinator_node, '_STALL', 0.1)
  monkeypatch.setattr(coordinator_node, '_POLL', 0.05)
  coordinator = _coordinator(make_run(tmp_path, {**FC1, 'system.worker_timeout': 0.5}))
  coordinator._await_evaluation()
  assert (
    'Waiting for the last evaluation' in caplog.text
    and 'ending without the last evaluation' in caplog.text
  )


def test_a_stall_is_reported_with_what_is_missing(make_run, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(coordinator_node, '_STALL', 0.1)
  monkeypatch.setattr(coordinator_node, '_POLL', 0.05)
  run = make_run(tmp_path, {**FC1, 'system.worker_timeout': 1.0})
  coordinator = _coordinator(run)
  coordinator._next_stall = 0.1
  coordinator.run()
  assert re.search(
    r'step 0: no progress for \d s: 3 of 3 support_blocks tasks missing; in work: none; no worker has been heard',
    caplog.text,
  )


def test_a_run_that_is_another_is_not_worked_for(make_run, tmp_path):
  run = make_run(tmp_path, FC1)
  worker = kernel_worker.KernelWorker(None, 'w', 1, run.cache, threading.Event())
  worker._run_id = 'this'
  with pytest.raises(CoordinatorLost, match='another run answers'):
    worker._work(
      kernel_worker._Given(tasks.Task('that', 1, 0, tasks.TARGETS, 0, (0, 5), (0, 6)), 0, {})
    )


def test_a_piece_damaged_on_its_way_is_computed_again(make_run, tmp_path, monkeypatch, caplog):
  encode, spoilt = tasks.encode, []

  def spoil(piece):
    parts, checksum = encode(piece)
    if 'loss' in piece and not spoilt:
      spoilt.append(checksum)
      return parts, checksum[::-1]
    return parts, checksum

  monkeypatch.setattr(tasks, 'encode', spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  assert (
    run.directory.read_status()['state'] == 'finished'
    and spoilt
    and 'a piece arrived damaged' in caplog.text
  )


def test_a_piece_with_nan_stops_the_run_naming_the_task(make_run, tmp_path, monkeypatch):
  compute = kernel_worker.KernelWorker._compute

  def spoil(self, task, inputs):
    piece = compute(self, task, inputs)
    if task.step == 1 and task.phase == tasks.TARGETS and task.index == 2:
      piece['gradient'][0] = np.nan
    return piece

  monkeypatch.setattr(kernel_worker.KernelWorker, '_compute', spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert status['state'] == 'failed' and status['step'] == 0  # the last checkpoint
  assert (
    'step 1: the targets task 2 failed 3 times' in status['message']
    and 'gradient contains NaN or infinity' in status['message']
  )


def test_support_images_that_coincide_are_an_error_with_a_remedy(make_run, tmp_path, monkeypatch):
  initial = coordinator_node.initial_state

  def repeated(*args):
    state = initial(*args)
    return state._replace(images=np.repeat(state.images[:1], len(state.images), axis=0))

  monkeypatch.setattr(coordinator_node, 'initial_state', repeated)
  run = make_run(tmp_path, {**FC1, 'run.ridge': 1e-300})
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert status['state'] == 'failed'
  assert (
    'step 0: K_ss + ridge is not positive definite: smallest eigenvalue' in status['message']
    and 'Raise run.ridge' in status['message']
  )


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_an_evaluator_that_fails_does_not_keep_the_run_waiting(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation, 'krr_test', lambda *_: 1 / 0)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert status['state'] == 'failed' and status['step'] == 2
  assert 'its evaluation failed: ZeroDivisionError' in status['message']
  assert os.path.exists(run.directory.distilled)


def test_a_damaged_checkpoint_is_passed_over_and_the_bits_stay_the_same(make_run, tmp_path, caplog):
  whole = make_run(tmp_path / 'whole', {**FC1, 'run.num_steps': 6})
  local.distil(whole, threading.Event())
  run = make_run(tmp_path / 'cut', {**FC1, 'run.num_steps': 4})
  local.distil(run, threading.Event())
  run.directory._lock.close()
  newest = max(os.listdir(run.directory.checkpoints))
  with open(
    os.path.join(run.directory.checkpoints, newest, 'meta.json'), 'a', encoding='utf-8'
  ) as file:
    file.write(' ')
  run = make_run(tmp_path / 'cut', {**FC1, 'run.num_steps': 6})
  local.distil(run, threading.Event())
  assert 'checkpoint of step 4 is damaged' in caplog.text
  with np.load(whole.directory.distilled) as expected, np.load(run.directory.distilled) as found:
    for name in ('images', 'labels'):
      assert found[name].tobytes() == expected[name].tobytes()


@pytest.mark.parametrize(
  'num_steps, refused',
  [
    (9, None),
    (5, None),
    (4, None),
    (3, 'has come to step 4: run.num_steps must be 4 or more, got 3; or choose another --workdir.'),
  ],
)
@pytest.mark.parametrize(
  'method, fixed', [('kip', False), ('label_solve+kip', False), ('kip+label_solve', True)]
)
def test_where_to_stop_may_be_chosen_anew(make_run, tmp_path, num_steps, refused, method, fixed):
  changes = {**FC1, 'run.method': method, 'run.num_steps': 7}
  directory = make_run(tmp_path, changes).directory
  os.makedirs(directory.checkpoint(4))
  directory.close()
  if fixed:
    refused = f'holds another run: run.num_steps (7 there, {num_steps} here)'
  if refused:
    with pytest.raises(run_directory.RunDirectoryError, match=re.escape(refused)):
      make_run(tmp_path, {**changes, 'run.num_steps': num_steps})
  else:
    make_run(tmp_path, {**changes, 'run.num_steps': num_steps})


def test_a_run_that_is_to_stop_sooner_has_the_bits_of_a_shorter_one(make_run, tmp_path):
  changes = {**FC1, 'system.snapshot_steps': (2, 3)}
  short = make_run(tmp_path / 'short', {**changes, 'run.num_steps': 3})
  local.distil(short, threading.Event())
  _stopped_after(make_run(tmp_path / 'cut', {**changes, 'run.num_steps': 9}), 2)
  cut = make_run(tmp_path / 'cut', {**changes, 'run.num_steps': 3})
  local.distil(cut, threading.Event())
  with np.load(short.directory.distilled) as expected, np.load(cut.directory.distilled) as found:
    for name in ('images', 'labels'):
      assert found[name].tobytes() == expected[name].tobytes()
  assert [row['step'] for row in cut.directory.read_metrics()] == [0, 2, 3]


def _stopped_after(run, step):
  """Lets a run go on until its snapshot of `step` is there, then stops it, and closes its
  directory."""
  stop = threading.Event()
  running = threading.Thread(target=local.distil, args=(run, stop))
  running.start()
  while running.is_alive() and not os.path.exists(run.directory.snapshot(step)):
    stop.wait(0.01)
  stop.set()
  running.join()
  assert run.directory.read_status()['state'] == 'stopped'
  run.directory.close()


def test_the_time_of_a_state_is_when_it_was_reached(make_run, tmp_path, caplog):
  """Also where it is computed again in a later life, whose estimate is about the steps that are
  left."""
  changes = {
    **FC1,
    'run.num_steps': 1000,
    'system.snapshot_steps': (2,),
    'system.checkpoint_seconds': 1000.0,
  }
  run = make_run(tmp_path, changes)
  state = coordinator_node.initial_state(
    run.config.run,
    store.open_prepared(run.directory.read_saved().data_key, run.cache),
    optimizers.make(run.config.run.optimizer, run.config.run.learning_rate),
  )
  checkpoints.Checkpoints(run.directory.checkpoints).save(
    state._replace(step=2), {'wall_seconds': 600.0, 'reached_seconds': 7.5, 'fingerprint': None}
  )
  run.directory.close()
  caplog.set_level('INFO')
  _stopped_after(make_run(tmp_path, changes), 2)
  with np.load(run.directory.snapshot(2)) as file:
    assert json.loads(str(file['metrics']))['wall_seconds'] == 7.5
  assert 600 < run.directory.read_status()['wall_seconds'] < 660
  assert 'for 998 steps.' in caplog.text and 'for 1000 steps.' not in caplog.text


@pytest.mark.parametrize(
  'num_steps, words', [(1, 'Finished 1 step after '), (2, 'Finished 2 steps after ')]
)
def test_what_a_finished_run_says(make_run, tmp_path, capsys, num_steps, words):
  run = make_run(tmp_path, {**FC1, 'run.num_steps': num_steps})
  run.directory.begin()
  local.distil(run, threading.Event())
  assert outcome.conclude(run.directory) == 0
  assert capsys.readouterr().out.startswith(words)


def test_pairs_per_step():
  run = {
    'targets_per_step': 33,
    'plan': {
      'support_tile': 4,
      'target_tile': 5,
      'target_tiles_per_task': 2,
      'support_per_task': 0,
    },
  }
  assert coordinator_node.pairs_per_step(run, 6) == (16 + 8 + 4) + 33 * 6 + 36


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
  run = {
    'method': method,
    'num_steps': 5,
    'targets_per_step': 33,
    'plan': {
      'support_tile': 4,
      'target_tile': 5,
      'target_tiles_per_task': 2,
      'support_per_task': 0,
    },
  }
  assert coordinator_node.pairs_to_go(run, 6, 100, step) == pairs


@pytest.mark.parametrize('labels', ['learned', 'fixed'])
def test_the_export_says_what_was_made(make_run, tmp_path, labels):
  from artifacts import distilled_set

  run = make_run(tmp_path, {**FC1, 'run.learn_labels': labels == 'learned'})
  local.distil(run, threading.Event())
  distilled = distilled_set.load(run.directory.distilled)
  assert distilled.images.shape == (6, 8, 9, 2) and distilled.labels.shape == (6, 3)
  one_hot = np.float32(np.eye(3)[[0, 0, 1, 1, 2, 2]] - 1 / 3)
  assert np.array_equal(distilled.labels, one_hot) == (labels == 'fixed')
  assert (
    distilled.settings['step'] == 2
    and schema.from_dict(schema.Run, distilled.settings['run']) == run.config.run
  )
  assert distilled.settings['label_offset'] == pytest.approx(-1 / 3)
  assert distilled.transform.mean.shape == (2,)


def test_a_worker_gets_two_tasks_and_what_they_share_once(make_run, tmp_path):
  coordinator = _coordinator(make_run(tmp_path, FC1))
  coordinator._step = 0
  coordinator._inputs = {'alpha': np.arange(6.0), 'residual': np.arange(5.0)}
  posted = [
    tasks.Task(coordinator._run_id, coordinator._generation, 0, tasks.TARGET_VJP, i, (0, 5), rows)
    for i, rows in enumerate([(0, 2), (2, 4), (4, 6)])
  ]
  coordinator._board.post(posted)
  answer = coordinator.lease('w', _hello())
  assert [tuple(posted[0]), tuple(posted[1])] == [task for task, *_ in answer['tasks']]
  assert len(answer['inputs']) == 3
  for (_, _, indices), alpha in zip(answer['tasks'], ([0, 1], [2, 3])):
    inputs = {
      name: value.tolist()
      for i in indices
      for name, value in tasks.unpack(answer['inputs'][i]).items()
    }
    assert inputs == {'alpha': alpha, 'residual': [0, 1, 2, 3, 4]}
  assert coordinator._lease('w', [lease for _, lease, _ in answer['tasks']]) is None


def test_who_hands_in_its_last_piece_waits_for_work(make_run, tmp_path):
  coordinator = _coordinator(make_run(tmp_path, FC1))
  coordinator._step = 0
  first, second = (
    tasks.Task(
      coordinator._run_id, coordinator._generation, 0, tasks.LABEL_SOLVE, i, (0, 5), (0, 6)
    )
    for i in (0, 1)
  )
  coordinator._board.post([first])
  [(_, lease, _)] = coordinator.lease('w', _hello())['tasks']
  parts, digest = tasks.encode({'x': np.ones(3)})
  threading.Timer(0.2, coordinator._board.extend, ([second],)).start()
  answer = coordinator.complete('w', list(first), lease, 0, 1, parts[0], digest, [])
  assert [task for task, *_ in answer['tasks']] == [tuple(second)]
