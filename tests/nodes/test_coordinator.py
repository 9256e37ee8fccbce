"""The coordinator where workers, disks and clients fail, and its messages."""

import json
import os
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import small_runs

from artifacts import RunDirectoryError, checkpoints, distilled_set, files, run_directory
from configs import schema
from data import store
from distillation import evaluation, pieces, plan
from distillation import state as states
from nodes import coordinator as coordinator_node
from nodes import hardware, keeper, kernel_worker, messages
from nodes.client import CoordinatorLost
from nodes.errors import Stopped
from programs import local, outcome

FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}
QUICK = coordinator_node.Timing(
  poll=0.05, long_poll=0.0, stall=0.1, handover=0.2, disk=files.Patience(1.0, 0.01)
)


def _coordinator(run, timing=coordinator_node.TIMING, stop=None):
  return coordinator_node.Coordinator(
    run.directory.path, run.cache, stop or threading.Event(), timing=timing
  )


def _targets(number, step=0, phase=plan.TARGETS):
  return [plan.Task(step, phase, i, (5 * i, 5 * i + 5), (0, 6)) for i in range(number)]


def _begun(run, tasks, kind=coordinator_node.Coordinator, timing=QUICK, **published):
  """A coordinator in the middle of a step."""
  coordinator = kind(run.directory.path, run.cache, threading.Event(), timing=timing)
  coordinator.exchange.publish('images', np.zeros((6, 8, 9, 2), np.float32))
  for name, value in published.items():
    coordinator.exchange.publish(name, value)
  coordinator.exchange.post(tasks)
  return coordinator


def _finish(run, step):
  """Leaves a run directory as a launch that has finished does."""
  run.directory.begin()
  generation = run.directory.next_generation()
  os.makedirs(run.directory.checkpoint(step))
  times = {'step': step, 'num_steps': step, 'generation': generation, 'wall_seconds': 1.0}
  run.directory.write_status(run_directory.FINISHED, **times, pairs=0, workers={})


def _life(coordinator):
  description = json.loads(coordinator.describe())
  return [description['run_id'], description['generation']]


def _ask(coordinator, worker='w', device='A', **more):
  """The answer to a worker that asks for tasks."""
  fingerprint = {**hardware.software(), 'implementation': 'native', 'device': device, **more}
  return coordinator.lease(
    worker, json.dumps({'fingerprint': fingerprint, 'pairs_per_second': 10.0})
  )


def _answer(*args, **kwargs) -> dict[str, Any]:
  """`_ask`, where there is one."""
  answer = _ask(*args, **kwargs)
  assert answer is not None
  return answer


def _encoded(task):
  """A piece of ones, ready to send."""
  forms = pieces.forms(task, schema.Run(), 3, (8, 9, 2))
  return messages.encode({name: np.ones(form.shape, form.dtype) for name, form in forms.items()})


def _taken(coordinator, task) -> dict[str, np.ndarray]:
  piece = coordinator.board.take(task, 0)
  assert piece is not None
  return piece


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


def test_a_second_coordinator_touches_nothing(make_run, tmp_path):
  run = make_run(tmp_path, FC1)
  first = _coordinator(run)
  run.directory.write_status('running', step=1, generation=1)
  before = run.directory.read_status()
  with pytest.raises(RunDirectoryError, match='has another coordinator'):
    _coordinator(run, QUICK)
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
  _finish(run, 2)
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


def test_a_run_stops_however_fast_its_phases_are(make_run, tmp_path):
  """Also where no piece is ever waited for."""
  [task], stop = _targets(1), threading.Event()
  coordinator = _coordinator(make_run(tmp_path, FC1), stop=stop)
  coordinator.exchange.post([task])
  coordinator.board.complete(task, 0, 'w', {})
  stop.set()
  with pytest.raises(Stopped):
    coordinator.exchange.take(task)


def test_a_worker_that_would_compute_other_bits_is_refused(make_run, tmp_path):
  for allow in (False, True):
    coordinator = _coordinator(
      make_run(tmp_path / str(allow), {**FC1, 'system.allow_mixed': allow}), QUICK
    )
    assert _ask(coordinator, 'first') is None
    if allow:
      assert _ask(coordinator, 'second', 'B') is None
    else:
      refusal = _answer(coordinator, 'second', 'B')['stop']
      assert 'device: B instead of A' in refusal and 'system.allow_mixed' in refusal


def test_a_worker_whose_code_was_altered_is_refused_by_the_name_of_the_file(make_run, tmp_path):
  """Also where it is the first one: it is compared with the coordinator's."""
  altered = {**hardware.software()['code'], 'distillation/krr.py': '0123456789abcdef'}
  for allow in (False, True):
    run = make_run(tmp_path / str(allow), {**FC1, 'system.allow_mixed': allow})
    answer = _ask(_coordinator(run, QUICK), code=altered)
    if allow:
      assert answer is None
    else:
      assert answer is not None and '(other code in distillation/krr.py). ' in answer['stop']


def test_a_worker_of_another_protocol_is_refused_even_in_a_mixed_run(make_run, tmp_path):
  coordinator = _coordinator(make_run(tmp_path, {**FC1, 'system.allow_mixed': True}), QUICK)
  for protocol in (messages.PROTOCOL + 1, None, '1'):
    refusal = _answer(coordinator, protocol=protocol)['stop']
    assert f'(protocol: {protocol} instead of {messages.PROTOCOL})' in refusal
  assert _ask(coordinator) is None


def test_a_worker_that_sends_malformed_pieces_gets_no_further_tasks(make_run, tmp_path):
  """Others do what it had; it may come back when it is started again."""
  first, second = tasks = _targets(2)
  coordinator = _begun(make_run(tmp_path, FC1), tasks)
  leased = _answer(coordinator, 'bad')['tasks']
  assert [plan.Task(*task) for task, *_ in leased] == tasks
  parts, digest = messages.encode({'gradient': np.full(3, np.nan)})
  about = _life(coordinator), list(first), leased[0][1], 0, 1, parts[0], digest, []
  with pytest.raises(messages.Malformed, match='part 0 of 1 of a piece of'):
    coordinator.complete('bad', *about)
  assert 'part 0 of 1 of a piece of' in _answer(coordinator, 'bad')['stop']
  assert coordinator.complete('bad', *about) is None
  parts, digest = _encoded(first)
  for task, lease, _ in _answer(coordinator, 'good')['tasks']:
    coordinator.complete('good', _life(coordinator), task, lease, 0, 1, parts[0], digest, [])
  assert _taken(coordinator, first) and _taken(coordinator, second)
  assert coordinator.board.counters()['workers']['good']['tasks'] == 2
  again = json.dumps(
    {
      'fingerprint': {**hardware.software(), 'implementation': 'native', 'device': 'A'},
      'pairs_per_second': 11.0,
    }
  )
  assert coordinator.lease('bad', again) is None


JUNK = (None, -1, 10**30, '', 'x' * 10**6, b'\0', [], ['x'], {}, [[]], '[' * 10**5, float('nan'))


def test_a_run_goes_on_whatever_a_worker_sends(make_run, tmp_path):
  """Every call with junk in the place of each argument is an error of the caller's at most."""
  run = make_run(tmp_path, {**FC1, 'run.num_steps': 1})
  [task], errors = _targets(1), []
  with small_runs.working(run, 1, QUICK._replace(linger=0.1)) as coordinator:
    life = _life(coordinator)
    hello = json.dumps({'fingerprint': {}, 'pairs_per_second': 1})
    calls = {
      'read_data': ['x', 'meta.json', 0],
      'lease': ['rogue', hello],
      'fetch': [life, 0, 'images', 0, 6],
      'complete': ['rogue', life, list(task), 0, 0, 1, b'', b'', []],
      'report_task_error': ['rogue', list(task), -1, 'no'],
      'report_unusable': ['rogue', 'no'],
      'heartbeat': ['rogue'],
      'evaluated': ['{}'],
      'next_snapshot': [[]],
    }

    def be_a_rogue():
      for method, arguments in calls.items():
        for i in range(len(arguments)):
          for junk in JUNK:
            try:
              getattr(coordinator, method)(*arguments[:i], junk, *arguments[i + 1 :])
            except Exception as error:
              errors.append(error)
      coordinator.evaluated(json.dumps({'step': 1, 'krr_test_accuracy': 0.5}))

    rogue = threading.Thread(target=be_a_rogue)
    rogue.start()
    coordinator.run()
    rogue.join()
  status = run.directory.read_status()
  assert (status['state'], status['step']) == ('finished', 1)
  assert len(errors) > 100 and not [e for e in errors if isinstance(e, (MemoryError, SystemError))]


@pytest.mark.parametrize(
  'row', ['[]', '7', '{}', '{"step": 0}', '{"step": "0", "krr_test_accuracy": 0.5}', '[' * 10**5]
)
def test_what_is_no_row_does_not_become_the_last_one(make_run, tmp_path, row):
  run = make_run(tmp_path, {**FC1, 'system.worker_timeout': 0.5})
  coordinator = _coordinator(run, QUICK)
  good = {'step': 0, 'krr_test_accuracy': 0.5}
  coordinator.evaluated(json.dumps(good))
  with pytest.raises((ValueError, RecursionError)):
    coordinator.evaluated(row)
  coordinator.run()
  status = run_directory.RunDirectory(str(tmp_path)).read_status()
  assert status is not None and status['last_row'] == good


def test_answers_from_another_life_or_step_are_dropped(make_run, tmp_path):
  [task] = tasks = _targets(1, step=4)
  coordinator = _begun(make_run(tmp_path, FC1), tasks, alpha=np.ones(2))
  life = _life(coordinator)
  answer = _answer(coordinator)
  [(leased, lease, _)] = answer['tasks']
  assert plan.Task(*leased) == task and answer['inputs'] == [] and list(answer['life']) == life
  parts, digest = _encoded(task)
  run_id, generation = life
  for about, stale in (
    (life, task._replace(step=3)),
    ([run_id, generation + 1], task),
    (['other', generation], task),
  ):
    coordinator.complete('w', about, list(stale), lease, 0, 1, parts[0], digest, [])
    assert coordinator.board.take(task, 0) is None
  assert coordinator.fetch(life, 3, 'alpha', 0, 2) is None
  packed = coordinator.fetch(life, 4, 'alpha', 0, 2)
  assert packed is not None and messages.unpack(packed)['alpha'].tolist() == [1, 1]
  coordinator.complete('w', life, list(task), lease, 0, 1, parts[0], digest, [])
  assert (_taken(coordinator, task)['alpha_bar'] == 1).all()


def test_a_resumed_run_wants_the_hardware_it_began_on(make_run, tmp_path):
  changes = {**FC1, 'system.num_workers': 1}
  run = make_run(tmp_path, changes)
  local.distil(run, threading.Event())
  run.directory.close()
  coordinator = _coordinator(make_run(tmp_path, {**changes, 'run.num_steps': 3}), QUICK)
  assert 'device: B instead of' in _answer(coordinator, device='B')['stop']
  coordinator.run()
  status = run.directory.read_status()
  assert status['state'] == 'failed'
  assert re.match(
    'every worker failed to start; last error: results would not be bit-identical',
    status['message'],
  )


def test_a_full_disk_is_waited_for_and_then_named(make_run, tmp_path, monkeypatch, caplog):
  save = checkpoints.Checkpoints.save
  full = [OSError(28, 'No space left on device')] * 2

  def fail(self, state, meta):
    if state.step == 0 and full:
      raise full.pop()
    if state.step == 1:
      raise OSError(30, 'Read-only file system')
    save(self, state, meta)

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', fail)
  run = make_run(tmp_path, {**FC1, 'system.checkpoint_seconds': 0.001})
  with small_runs.working(run, timing=QUICK) as coordinator:
    coordinator.run()
  words = 'the checkpoint of step 0 cannot be written (No space left on device); trying again for'
  assert caplog.text.count(words) == 2
  assert os.listdir(run.directory.checkpoints) == ['00000000']
  status = run.directory.read_status()
  assert status['state'] == 'failed'
  assert re.search(
    r'step 1 cannot be written \(Read-only file system\). Mend that, .* of step 0',
    status['message'],
  )


def _spoilt(monkeypatch, spoil):
  """Pieces are what `spoil` makes of (task, piece)."""
  compute = pieces.compute
  monkeypatch.setattr(pieces, 'compute', lambda task, *more: spoil(task, compute(task, *more)))


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(make_run, tmp_path, monkeypatch):
  def spoil(task, piece):
    is_chosen = task.step == 1 and task.phase == plan.TARGETS
    return {**piece, 'loss': np.asarray(1e7)} if is_chosen else piece

  _spoilt(monkeypatch, spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert (status['state'], status['step']) == ('failed', 0)
  assert status['message'] == (
    'step 1: the training diverges, its loss is 4e+07; lower run.learning_rate or raise run.ridge.'
  )
  assert os.listdir(run.directory.checkpoints) == ['00000000']


def test_an_update_without_numbers_is_an_error(make_run, tmp_path, monkeypatch):
  def diverge(self, state, gradient):
    raise states.Diverged('the update makes the images NaN or infinite; lower …')

  monkeypatch.setattr(states.Update, '__call__', diverge)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  assert run.directory.read_status()['message'].startswith('step 0: the update makes the images')


def test_a_damaged_snapshot_is_skipped(make_run, tmp_path):
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  for step in (0, 2):
    with open(run.directory.snapshot(step), 'r+b') as file:
      file.truncate(100)
  coordinator = _coordinator(run, QUICK)
  snapshot = coordinator.next_snapshot([])
  assert snapshot is not None and snapshot['step'] == 1
  assert coordinator.next_snapshot([1]) is None


def test_a_damaged_last_snapshot_is_reported(make_run, tmp_path, monkeypatch):
  write = keeper.Keeper.write_snapshot

  def damage(self, current, row):
    write(self, current, row)
    if current.step == 2:
      with open(run.directory.snapshot(2), 'r+b') as file:
        file.truncate(100)

  monkeypatch.setattr(keeper.Keeper, 'write_snapshot', damage)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert status['state'] == 'failed'
  assert 'its evaluation failed: the snapshot of step 2 cannot be read' in status['message']


def test_an_evaluator_that_is_gone_is_not_waited_for_long(make_run, tmp_path, caplog):
  run = make_run(tmp_path, {**FC1, 'run.num_steps': 1, 'system.worker_timeout': 0.5})
  with small_runs.working(run, timing=QUICK) as coordinator:
    coordinator.run()
  assert run.directory.read_status()['state'] == 'finished'
  assert 'Waiting for the last evaluation' in caplog.text
  assert 'ending without the last evaluation' in caplog.text


def test_a_stall_is_reported_with_what_is_missing(make_run, tmp_path, caplog):
  run = make_run(tmp_path, {**FC1, 'system.worker_timeout': 1.0})
  _coordinator(run, QUICK).run()
  assert re.search(
    r'step 0: no progress for \d s: 3 of 3 support_blocks tasks missing; in work: none; '
    'no worker has been heard',
    caplog.text,
  )


class _Another(coordinator_node.Coordinator):
  """A coordinator of another run."""

  def lease(self, worker, hello):
    answer = super().lease(worker, hello)
    return answer and {**answer, 'life': ['that', 1]}


def test_a_run_that_is_another_is_not_worked_for(make_run, tmp_path):
  """Where a coordinator of another run has taken the place of the worker's."""
  run = make_run(tmp_path, FC1)
  coordinator = _begun(run, _targets(3), _Another, alpha=np.ones((6, 3)))
  worker = kernel_worker.KernelWorker(coordinator, 'w', 1, run.cache, threading.Event())
  with pytest.raises(CoordinatorLost, match='another run answers'):
    worker.run()


def test_a_piece_damaged_on_its_way_is_computed_again(make_run, tmp_path, monkeypatch, caplog):
  encode, spoilt = messages.encode, []

  def spoil(piece):
    parts, checksum = encode(piece)
    if 'loss' in piece and not spoilt:
      spoilt.append(checksum)
      return parts, checksum[::-1]
    return parts, checksum

  monkeypatch.setattr(messages, 'encode', spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  assert (
    run.directory.read_status()['state'] == 'finished'
    and spoilt
    and 'a piece arrived damaged' in caplog.text
  )


def test_a_piece_with_nan_stops_the_run_naming_the_task(make_run, tmp_path, monkeypatch):
  def spoil(task, piece):
    if task.step == 1 and task.phase == plan.TARGETS and task.index == 2:
      piece['gradient'][0] = np.nan
    return piece

  _spoilt(monkeypatch, spoil)
  run = make_run(tmp_path, FC1)
  local.distil(run, threading.Event())
  status = run.directory.read_status()
  assert status['state'] == 'failed' and status['step'] == 0  # the last checkpoint
  assert 'step 1: the targets task 2 failed 3 times' in status['message']
  assert 'gradient contains NaN or infinity' in status['message']


def test_support_images_that_coincide_are_an_error_with_a_remedy(make_run, tmp_path, monkeypatch):
  initial = states.initial

  def repeated(*args):
    state = initial(*args)
    return state._replace(images=np.repeat(state.images[:1], len(state.images), axis=0))

  monkeypatch.setattr(states, 'initial', repeated)
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
  run.directory.close()
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
    with pytest.raises(RunDirectoryError, match=re.escape(refused)):
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
  state = small_runs.first_state(run)
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


def test_the_first_step_of_a_life_is_kept_and_what_is_lost_is_said(make_run, tmp_path, caplog):
  """However long the time between checkpoints; also from a step that is a snapshot."""
  run = make_run(
    tmp_path,
    {
      **FC1,
      'run.num_steps': 10**6,
      'system.snapshot_steps': (2,),
      'system.checkpoint_seconds': 10.0**6,
    },
  )
  state = small_runs.first_state(run)._replace(step=2)
  times = {'wall_seconds': 1.0, 'reached_seconds': 1.0, 'fingerprint': None}
  checkpoints.Checkpoints(run.directory.checkpoints).save(state, times)
  run.directory.write_status(run_directory.RUNNING, step=40)
  with small_runs.working(run, 1, QUICK) as coordinator:
    running = threading.Thread(target=coordinator.run)
    running.start()
    end = time.monotonic() + 60
    while run.directory.checkpoint_step() != 3 and time.monotonic() < end:
      time.sleep(0.01)
    assert run.directory.checkpoint_step() == 3
  running.join()
  words = '38 steps that a killed coordinator had done are computed again; with a shorter '
  assert words + 'system.checkpoint_seconds (now 1e+06) fewer would be.' in caplog.text


@pytest.mark.parametrize(
  'num_steps, words', [(1, 'Finished 1 step after '), (2, 'Finished 2 steps after ')]
)
def test_what_a_finished_run_says(make_run, tmp_path, capsys, num_steps, words):
  run = make_run(tmp_path, {**FC1, 'run.num_steps': num_steps})
  _finish(run, num_steps)
  assert outcome.conclude(run.directory) == 0
  assert capsys.readouterr().out.startswith(words)


@pytest.mark.parametrize('labels', ['learned', 'fixed'])
def test_the_export_says_what_was_made(make_run, tmp_path, labels):
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
  posted = [
    plan.Task(0, plan.TARGET_VJP, i, (0, 5), rows)
    for i, rows in enumerate([(0, 2), (2, 4), (4, 6)])
  ]
  coordinator = _begun(
    make_run(tmp_path, FC1), posted, alpha=np.arange(6.0), residual=np.arange(5.0)
  )
  answer = _answer(coordinator)
  assert [tuple(posted[0]), tuple(posted[1])] == [task for task, *_ in answer['tasks']]
  assert len(answer['inputs']) == 3
  for (_, _, indices), alpha in zip(answer['tasks'], ([0, 1], [2, 3])):
    inputs = {
      name: value.tolist()
      for i in indices
      for name, value in messages.unpack(answer['inputs'][i]).items()
    }
    assert inputs == {'alpha': alpha, 'residual': [0, 1, 2, 3, 4]}
  holding = [lease for _, lease, _ in answer['tasks']]
  assert coordinator.exchange.lease('w', 10.0, holding, 0.0) is None


def test_a_worker_that_hands_in_its_last_piece_waits_for_work(make_run, tmp_path):
  first, second = _targets(2, phase=plan.LABEL_SOLVE)
  run = make_run(tmp_path, FC1)
  coordinator = _begun(run, [first], timing=coordinator_node.TIMING)
  [(_, lease, _)] = _answer(coordinator)['tasks']
  parts, digest = _encoded(first)
  threading.Timer(0.2, coordinator.exchange.post, ([second],)).start()
  answer = coordinator.complete(
    'w', _life(coordinator), list(first), lease, 0, 1, parts[0], digest, []
  )
  assert answer is not None and [task for task, *_ in answer['tasks']] == [tuple(second)]
