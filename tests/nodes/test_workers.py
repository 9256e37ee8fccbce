"""The distributed step against the same step in one process, and its bits against itself."""

import threading

import pytest
import small_runs
from small_runs import AUGMENTED, HALVES, assert_same_bits, working

from distillation import state as states
from distillation import step
from distillation.in_process import InProcess
from kernels import registry
from programs import local


@pytest.mark.parametrize(
  'implementation, architecture, more',
  [
    *((name, 'fc1', {}) for name in registry.available()),
    ('auto', 'fc1', AUGMENTED),
    ('auto', 'convnet2', {}),
    ('auto', 'convnet2', HALVES),
    ('auto', 'fc1', {**AUGMENTED, **HALVES}),
  ],
)
def test_workers_give_the_bits_of_one_process(
  make_run, tmp_path, implementation, architecture, more
):
  """tests/distillation/test_step.py shows that these are the gradient of the whole loss."""
  run = make_run(
    tmp_path,
    {
      'run.architecture': architecture,
      'run.kernel_dtype': 'float64',
      'run.implementation': implementation,
      **more,
    },
  )
  settings, prepared = run.config.run, small_runs.prepared_data(run)
  state = small_runs.moved(small_runs.first_state(run))
  with working(run) as coordinator:
    found = step.loss_and_gradient(state, settings, prepared, coordinator.exchange)
  alone = InProcess(settings, prepared, registry.for_run(settings, 1))
  expected = step.loss_and_gradient(state, settings, prepared, alone)
  assert found[0] == expected[0] and found[1] is not None
  assert_same_bits(found[1], expected[1])


class _Noting:
  """A coordinator that notes what is fetched from it: (name, start, stop)."""

  def __init__(self, coordinator):
    self._coordinator, self.fetched = coordinator, []

  def __getattr__(self, method):
    return getattr(self._coordinator, method)

  def fetch(self, life, step, *rows):
    self.fetched.append(rows)
    return self._coordinator.fetch(life, step, *rows)


def test_a_task_brings_the_images_it_is_about(make_run, tmp_path):
  """Where tasks are about parts of the support, nothing is fetched but the columns of K_ss, tile by
  tile, once."""
  run = make_run(tmp_path, {'run.architecture': 'fc1', **HALVES})
  noting = []

  def between(coordinator):
    noting.append(_Noting(coordinator))
    return noting[0]

  with working(run, workers=1, between=between) as coordinator:
    state = small_runs.first_state(run)
    step.loss_and_gradient(state, run.config.run, coordinator.prepared, coordinator.exchange)
  assert noting[0].fetched == [('images', 0, 5), ('images', 5, 6)]


@pytest.mark.parametrize(
  'architecture, more',
  [('convnet2', {}), ('fc1', {}), ('fc1', AUGMENTED), ('convnet2', HALVES)],
  ids=['convnet2', 'fc1', 'augmented', 'parts'],
)
def test_same_bits_whoever_computes(make_run, tmp_path, architecture, more):
  """Five steps of at least 12 ragged tasks a phase: one worker with two threads, two with one, five
  with one."""
  changes = {
    'run.architecture': architecture,
    'run.num_steps': 5,
    'run.images_per_class': 5,
    'run.targets_per_step': 93,
    'run.plan.support_tile': 4,
    'run.plan.target_tile': 5,
    'run.plan.target_tiles_per_task': 1,
    'system.snapshot_steps': (5,),
    **more,
  }
  ends = []
  for workers, threads in ((1, 2), (2, 1), (5, 1)):
    run = make_run(
      tmp_path / f'{workers}x{threads}',
      {**changes, 'system.num_workers': workers, 'system.worker_threads': threads},
    )
    local.distil(run, threading.Event())
    assert run.directory.read_status()['state'] == 'finished'
    ends.append(small_runs.last_state(run))
  assert ends[0].step == 5
  for other in ends[1:]:
    assert_same_bits(ends[0], other)


def test_same_bits_after_stop_and_resume(make_run, tmp_path):
  """Stopped in the middle of a step and resumed with another number of workers, then told to go on
  further."""
  changes = {'run.architecture': 'fc1', 'run.num_steps': 8}
  whole = make_run(tmp_path / 'whole', changes)
  local.distil(whole, threading.Event())

  stop = threading.Event()
  run = make_run(tmp_path / 'cut', {**changes, 'run.num_steps': 6, 'system.num_workers': 1})
  update = states.Update.__call__

  def move(self, state, gradient):
    if state.step == 3:
      stop.set()
    return update(self, state, gradient)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(states.Update, '__call__', move)
    local.distil(run, stop)
  status = run.directory.read_status()
  assert (status['state'], status['step']) == ('stopped', 4)
  run.directory.close()
  for num_steps in (6, 8):
    run = make_run(
      tmp_path / 'cut', {**changes, 'run.num_steps': num_steps, 'system.num_workers': 3}
    )
    local.distil(run, threading.Event())
    assert run.directory.read_status()['state'] == 'finished'
    run.directory.close()
  assert_same_bits(small_runs.last_state(whole), small_runs.last_state(run))
  rows = {row['step']: row for row in run.directory.read_metrics()}
  expected = {row['step']: row for row in whole.directory.read_metrics()}
  assert sorted(rows) == [0, 1, 2, 4, 6, 8]
  for number, row in rows.items():
    for key in ('train_loss', 'train_accuracy', 'krr_test_accuracy', 'krr_test_mse'):
      assert row[key] == expected[number][key], (number, key)
