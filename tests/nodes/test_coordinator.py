"""What the coordinator does when things are not as they should be."""

import json
import os
import threading

import numpy as np
import pytest

from nodes import coordinator as coordinator_node
from nodes import evaluation
from nodes import kernel_worker
from nodes import tasks
from programs import local

FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}


def _coordinator(run):
  return coordinator_node.Coordinator(run.directory.path, run.cache, threading.Event())


def _hello(**changes):
  return json.dumps({'fingerprint': {'implementation': 'native', 'device': 'A', **changes}, 'pairs_per_second': 10.0})


def test_without_workers_the_run_fails_with_a_checkpoint(make_run, tmp_path):
  run = make_run(tmp_path, {**FC1, 'system.worker_timeout': 1.0})
  _coordinator(run).run()
  status = run.directory.read_status()
  assert status['state'] == 'failed' and 'no worker has been heard of' in status['message']
  assert os.listdir(run.directory.checkpoints) == ['00000000']


def test_a_worker_that_would_compute_other_bits_is_refused(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(coordinator_node, '_LONG_POLL', 0.0)
  for allow in (False, True):
    coordinator = _coordinator(make_run(tmp_path / str(allow), {**FC1, 'system.allow_mixed': allow}))
    assert coordinator.lease('first', _hello()) is None
    answer = coordinator.lease('second', _hello(device='B'))
    assert answer is None if allow else 'device: B instead of A' in answer['stop'] and 'system.allow_mixed' in answer['stop']


def test_answers_from_another_life_or_step_are_dropped(make_run, tmp_path, monkeypatch):
  monkeypatch.setattr(coordinator_node, '_LONG_POLL', 0.0)
  coordinator = _coordinator(make_run(tmp_path, FC1))
  coordinator._step = 4
  task = tasks.Task(coordinator._run_id, coordinator._generation, 4, tasks.TARGETS, 0, (0, 5), (0, 6))
  coordinator._board.post([task])
  lease = coordinator.lease('w', _hello())
  assert tasks.Task(*lease['task']) == task
  parts, digest = tasks.encode({'x': np.ones(3)})
  for stale in (task._replace(step=3), task._replace(generation=task.generation + 1), task._replace(run_id='other')):
    coordinator.complete('w', list(stale), lease['lease'], 0, 1, parts[0], digest)
    assert coordinator._board.collect(0) is None
  coordinator._inputs = {'alpha': np.ones(2)}
  assert coordinator.fetch(coordinator._generation, 3, 'alpha') is None
  assert coordinator.fetch(coordinator._generation, 4, 'alpha').tolist() == [1, 1]
  coordinator.complete('w', list(task), lease['lease'], 0, 1, parts[0], digest)
  assert coordinator._board.collect(0)[0]['x'].tolist() == [1, 1, 1]


def test_a_piece_with_nan_stops_the_run_naming_the_task(make_run, tmp_path, monkeypatch):
  compute = kernel_worker.KernelWorker._compute

  def spoil(self, task):
    piece = compute(self, task)
    if task.step == 1 and task.phase == tasks.TARGETS and task.index == 2:
      piece['gradient'][0] = np.nan
    return piece
  monkeypatch.setattr(kernel_worker.KernelWorker, '_compute', spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert status['state'] == 'failed' and status['step'] == 0  # the last checkpoint
  assert 'step 1: the targets task 2 failed 3 times' in status['message'] and 'gradient contains NaN or infinity' in status['message']


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
  assert 'step 0: K_ss + ridge is not positive definite: smallest eigenvalue' in status['message'] and 'Raise run.ridge' in status['message']


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
  with open(os.path.join(run.directory.checkpoints, newest, 'meta.json'), 'a', encoding='utf-8') as file:
    file.write(' ')
  run = make_run(tmp_path / 'cut', {**FC1, 'run.num_steps': 6})
  local.distil(run, threading.Event())
  assert 'checkpoint of step 4 is damaged' in caplog.text
  with np.load(whole.directory.distilled) as expected, np.load(run.directory.distilled) as found:
    for name in ('images', 'labels'):
      assert found[name].tobytes() == expected[name].tobytes()


def test_pairs_per_step():
  run = {'targets_per_step': 33, 'plan': {'support_tile': 4, 'target_tile': 5, 'target_tiles_per_task': 2}}
  assert coordinator_node.pairs_per_step(run, 6) == (16 + 8 + 4) + 33 * 6 + 36


@pytest.mark.parametrize('method, step, pairs', [('kip', 0, 5 * 262), ('kip', 3, 2 * 262), ('label_solve+kip', 0, 4 * 262 + 600),
                                                 ('label_solve+kip', 1, 4 * 262), ('kip+label_solve', 4, 600), ('kip+label_solve', 5, 0)])
def test_pairs_to_go(method, step, pairs):
  run = {'method': method, 'num_steps': 5, 'targets_per_step': 33, 'plan': {'support_tile': 4, 'target_tile': 5, 'target_tiles_per_task': 2}}
  assert coordinator_node.pairs_to_go(run, 6, 100, step) == pairs


@pytest.mark.parametrize('labels', ['learned', 'fixed'])
def test_the_export_says_what_was_made(make_run, tmp_path, labels):
  from nodes import export
  run = make_run(tmp_path, {**FC1, 'run.learn_labels': labels == 'learned'})
  local.distil(run, threading.Event())
  distilled = export.load(run.directory.distilled)
  assert distilled.images.shape == (6, 8, 9, 2) and distilled.labels.shape == (6, 3)
  one_hot = np.float32(np.eye(3)[[0, 0, 1, 1, 2, 2]] - 1 / 3)
  assert np.array_equal(distilled.labels, one_hot) == (labels == 'fixed')
  assert distilled.settings['step'] == 2 and distilled.settings['run'] == run.config['run']
  assert distilled.settings['label_offset'] == pytest.approx(-1 / 3)
  assert distilled.transform.mean.shape == (2,)
