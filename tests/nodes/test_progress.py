"""Estimates, log lines and status.json of a run's progress."""

import pytest

from configs import schema
from nodes.admission import Admission
from nodes.progress import Progress
from nodes.task_board import TaskBoard

PAIRS = (16 + 8 + 4) + 33 * 6 + 36  # of a step, see tests/distillation/test_plan.py


@pytest.fixture
def make_progress(make_run, tmp_path, caplog):
  """A function {field: value} -> (progress, run, admission) of two workers."""

  def make(changes=None):
    run = make_run(tmp_path, {'run.architecture': 'fc1', **(changes or {})})
    caplog.set_level('INFO')
    board, admission = TaskBoard(30), Admission(schema.System())
    return Progress(run.directory, run.config, 4, board, admission, 6, 96, 30.0), run, admission

  return make


def test_the_estimate_for_a_new_worker(make_progress, caplog):
  progress, *_ = make_progress()
  progress.log_joined('w', PAIRS / 20, 'native')
  assert caplog.messages == [
    'w joined: 13.1 kernel pairs/s (native). With 2 such workers: 262 pairs a step, '
    'about 10 s a step, 0:00:30 for 3 steps.'
  ]
  progress.reach(3)
  progress.log_joined('w', PAIRS / 20, 'native')
  assert caplog.messages[1].endswith('With 2 such workers: all steps are done.')


def test_a_step_in_the_log_and_in_the_status(make_progress, caplog):
  progress, run, admission = make_progress()
  admission.hear('w')
  progress.resume(1, 600.0, 500.0)
  progress.last_row = {'step': 0, 'krr_test_accuracy': 0.25}
  row = {'train_loss': 0.125, 'train_accuracy': 0.5, 'kernel_pairs_per_second': PAIRS / 10}
  progress.log_step(1, row)
  assert caplog.messages == [
    'step 1/3: loss 0.12500, train 50.00 %, test 25.00 % at step 0, 26.2 pairs/s by 1 worker, '
    '0:00:20 to go'
  ]
  progress.log_step(2, row)  # too soon
  assert len(caplog.messages) == 1
  status = run.directory.read_status()
  assert (status['state'], status['step'], status['generation']) == ('running', 1, 4)
  assert status['seconds_to_go'] == pytest.approx(20.0) and 600 <= status['wall_seconds'] < 660
  assert not progress.is_status_due()


def test_a_label_solve_has_no_update_to_wait_for(make_progress, caplog):
  """Its update is computed along with its metrics; two updates of KIP follow."""
  progress, *_ = make_progress({'run.method': 'label_solve+kip'})
  progress.log_step(0, {'train_loss': 0.1, 'kernel_pairs_per_second': PAIRS / 10})
  assert caplog.messages[-1].endswith('26.2 pairs/s by 0 workers, 0:00:20 to go')
  progress.log_round(48, 0.5)
  assert caplog.messages[-1] == 'label solve: 48 of 96 training images, 12 pairs/s, 0:00:24 to go'


def test_the_time_ends_with_the_last_update(make_progress):
  progress, *_ = make_progress()
  progress.resume(2, 100.0, 90.0)
  progress.resume_rounds(50.0)  # of before the checkpoint
  progress.end()
  seconds = progress.wall_seconds()
  assert 100 <= seconds < 160 and progress.wall_seconds() == seconds
  assert progress.is_status_due()
