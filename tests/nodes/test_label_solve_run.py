"""Label Solve as a run: against the dense pseudo-inverse of the whole problem, before and after
KIP, and its bits against itself."""

import os
import threading

import numpy as np
import pytest
import small_runs

from artifacts import checkpoints, distilled_set
from data import sampling
from distillation import krr, plan
from distillation.state import LabelSolveState
from kernels import registry
from nodes import exchange
from programs import local

FC1 = {
  'run.architecture': 'fc1',
  'run.kernel_dtype': 'float64',
  'run.method': 'label_solve',
  'run.num_steps': 1,
}


def _distil(run):
  local.distil(run, threading.Event())
  assert run.directory.read_status()['state'] == 'finished', run.directory.read_status()
  run.directory.close()
  rows = {row['step']: row for row in run.directory.read_metrics()}
  return rows, distilled_set.load(run.directory.distilled)


def _oracle(run, images):
  """Labels by the dense pseudo-inverse, and a function from labels to the training loss."""
  prepared = small_runs.prepared_data(run)
  kernel = registry.make_kernel(
    run.config.run.architecture, implementation='reference', dtype='float64'
  )
  k = krr.regularised(kernel.block(images, images), run.config.run.ridge)
  predict = kernel.block(prepared.train_images, images) @ np.linalg.inv(k)
  y_t = sampling.centred_one_hot(prepared.train_labels, prepared.num_classes)
  labels = np.linalg.pinv(predict, rcond=1e-12) @ y_t
  return labels, lambda labels: 0.5 * np.mean((predict @ labels - y_t) ** 2)


@pytest.mark.parametrize(
  'architecture, per_step, target_tile, per_task',
  [('convnet2', 33, 5, 2), ('fc1', 96, 96, 1), ('fc1', 3, 7, 1), ('fc1', 0, 7, 1)],
)
def test_the_whole_training_set_is_fitted_as_by_the_pseudo_inverse(
  make_run, tmp_path, architecture, per_step, target_tile, per_task
):
  """Rounds and tasks that divide the 96 training images, that do not, or are smaller than S + C."""
  run = make_run(
    tmp_path,
    {
      **FC1,
      'run.architecture': architecture,
      'run.targets_per_step': per_step,
      'run.plan.target_tile': target_tile,
      'run.plan.target_tiles_per_task': per_task,
    },
  )
  rows, distilled = _distil(run)
  with np.load(run.directory.snapshot(0)) as start:
    images, hard = start['images'], start['labels']
  assert distilled.images.tobytes() == images.tobytes()
  labels, loss = _oracle(run, images)
  # The export is float32.
  np.testing.assert_allclose(distilled.labels, labels, rtol=0, atol=1e-6 * np.abs(labels).max())
  assert rows[0]['train_loss'] == pytest.approx(loss(hard.astype(np.float64)), rel=1e-6)
  assert rows[1]['train_loss'] == pytest.approx(loss(labels), rel=1e-9)
  assert rows[1]['train_loss'] < 0.9 * rows[0]['train_loss']
  assert rows[1]['krr_test_mse'] < rows[0]['krr_test_mse']
  assert 'train_accuracy' not in rows[1]


@pytest.mark.parametrize('architecture', ['convnet2', 'fc1'])
def test_same_bits_whoever_computes(make_run, tmp_path, architecture):
  results = []
  for workers, threads in ((1, 2), (2, 1), (5, 1)):
    run = make_run(
      tmp_path / f'{workers}x{threads}',
      {
        **FC1,
        'run.architecture': architecture,
        'run.kernel_dtype': 'float32',
        'run.images_per_class': 5,
        'run.targets_per_step': 36,
        'run.plan.target_tiles_per_task': 1,
        'system.num_workers': workers,
        'system.worker_threads': threads,
      },
    )
    rows, distilled = _distil(run)
    results.append((distilled.labels.tobytes(), [rows[step]['train_loss'] for step in (0, 1)]))
  assert results[1] == results[0] and results[2] == results[0]


def test_a_stopped_run_goes_on_at_the_round_where_it_was(make_run, tmp_path, monkeypatch):
  changes = {**FC1, 'run.targets_per_step': 12}
  rows, distilled = _distil(make_run(tmp_path / 'whole', changes))
  post, rounds = exchange.Served.post, []

  def counted(self, tasks):
    if tasks[0].phase == plan.LABEL_SOLVE:
      rounds.append((tasks[0].target_range[0], tasks[-1].target_range[1]))
      if rounds[-1] == stop_at:
        stop.set()
    post(self, tasks)

  monkeypatch.setattr(exchange.Served, 'post', counted)
  for stop_at in ((36, 48), (84, 96), None):
    stop = threading.Event()
    run = make_run(tmp_path / 'cut', {**changes, 'system.num_workers': 1 + len(rounds) % 3})
    local.distil(run, stop)
    run.directory.close()
    assert run.directory.read_status()['state'] == ('stopped' if stop_at else 'finished')
  assert [first for first, _ in rounds] == [0, 12, 24, 36, 36, 48, 60, 72, 84, 84]
  found = {row['step']: row for row in run.directory.read_metrics()}
  for step in (0, 1):
    assert found[step]['train_loss'] == rows[step]['train_loss']
  assert distilled_set.load(run.directory.distilled).labels.tobytes() == distilled.labels.tobytes()


@pytest.mark.parametrize('method, solved', [('label_solve+kip', 1), ('kip+label_solve', 4)])
@pytest.mark.parametrize('learn', [True, False])
def test_before_and_after_kip(make_run, tmp_path, method, solved, learn):
  """One update of the four solves for the labels of the images of its moment and leaves the images
  alone; the others are KIP's."""
  run = make_run(
    tmp_path,
    {
      **FC1,
      'run.method': method,
      'run.num_steps': 4,
      'run.learn_labels': learn,
      'run.learning_rate': 0.01,
      'system.snapshot_steps': (1, 2, 3),
    },
  )
  rows, distilled = _distil(run)
  images, labels = {}, {}
  for step in range(5):
    with np.load(run.directory.snapshot(step)) as file:
      images[step], labels[step] = file['images'], file['labels']
  for step in range(4):
    assert np.array_equal(images[step + 1], images[step]) == (step + 1 == solved)
    assert np.array_equal(labels[step + 1], labels[step]) == (step + 1 != solved and not learn)
  expected, _ = _oracle(run, images[solved])
  np.testing.assert_allclose(labels[solved], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert sorted(step for step, row in rows.items() if 'train_accuracy' not in row) == (
    [0] if solved == 1 else [3, 4]
  )
  assert distilled.labels.tobytes() == labels[4].tobytes()
  assert (
    sum(counts['pairs'] for counts in run.directory.read_status()['workers'].values())
    == run.directory.read_status()['pairs']
  )


def test_rounds_about_other_images_are_not_in_the_way(make_run, tmp_path):
  """More rounds of another Label Solve in the directory: the run's own are kept all the same."""
  run = make_run(tmp_path, {**FC1, 'run.targets_per_step': 12})
  other = LabelSolveState(7, np.ones((9, 9)))
  for folder in (run.directory.label_solve, os.path.join(run.directory.label_solve, 'another')):
    os.makedirs(folder, exist_ok=True)
    checkpoints.Checkpoints(folder).save(other, {'wall_seconds': 5.0})
  _, distilled = _distil(run)
  _, expected = _distil(make_run(tmp_path / 'alone', {**FC1, 'run.targets_per_step': 12}))
  assert distilled.labels.tobytes() == expected.labels.tobytes()
  rounds = [
    int(step)
    for folder in os.scandir(run.directory.label_solve)
    for step in os.listdir(folder.path)
    if step.isdigit()
  ]
  assert max(rounds) == 8  # 96 training images, 12 a round
