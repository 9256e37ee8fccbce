"""An architecture of the user's own through the whole program."""

import threading

from artifacts import distilled_set
from configs import own_architecture
from kernels import architectures
from programs import local


def test_an_own_architecture_through_the_whole_program(make_run, tmp_path):
  """Kernel, finite network, export, and coming back to the run directory, whose JSON knows no
  tuples."""
  architecture = own_architecture.get_config().run.architecture.to_dict()
  changes = {
    'run.architecture': architecture,
    'run.num_steps': 1,
    'system.evaluation.nn_steps': 3,
    'system.evaluation.nn_width': 4,
  }
  for num_steps in (1, 2):
    run = make_run(tmp_path, {**changes, 'run.num_steps': num_steps})
    local.distil(run, threading.Event())
    run.directory.close()
    assert run.directory.read_status()['state'] == 'finished'
  rows = {row['step']: row for row in run.directory.read_metrics()}
  assert (
    sorted(rows) == [0, 1, 2]
    and rows[2]['train_loss'] < rows[0]['train_loss']
    and 0 <= rows[2]['nn_test_accuracy'] <= 1
  )
  saved = architectures.get(
    distilled_set.load(run.directory.distilled).settings['run']['architecture']
  )
  assert (
    saved.stages == ((2, True), (1, False))
    and saved.readout == 'global_average_pool'
    and saved.hidden == 1
  )
