"""Evaluation by KRR and finite networks: formulas, what a row holds, baselines, interruptions."""

from unittest import mock

import numpy as np
import pytest

from data import sampling, store
from distillation import evaluation, finite_network
from kernels import architectures, library, registry

FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}
NETWORK = {'system.evaluation.nn_steps': 5, 'system.evaluation.nn_width': 8}


class _Interrupted(Exception):
  pass


def _prepared(run) -> store.Prepared:
  prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
  assert prepared is not None
  return prepared


def _evaluation(run):
  prepared, settings = _prepared(run), run.config.system.evaluation
  return evaluation.Evaluation(run.config.run, settings, prepared, threads=1), prepared


def _support(prepared, size=6):
  chosen = sampling.class_balanced(0, sampling.INITIAL_SUPPORT, 0, prepared.train_labels, size)
  labels = sampling.centred_one_hot(prepared.train_labels[chosen], 3)
  return np.asarray(prepared.train_images[chosen]), labels


def test_krr_on_ragged_tiles_is_the_formula(make_run, tmp_path):
  """25 test images in tiles of 4, against K_ts (K_ss + ridge)^-1 y in one piece."""
  run = make_run(
    tmp_path,
    {**FC1, 'run.kernel_dtype': 'float64', 'run.ridge': 1e-3, 'system.evaluation.krr_tile': 4},
  )
  evaluate, prepared = _evaluation(run)
  images, labels = _support(prepared)
  kernel = registry.for_run(run.config.run, 1)
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


def _counted(architecture):
  """A kernel that keeps what it was asked for."""
  kernel = registry.make_kernel(architecture)
  return mock.Mock(wraps=kernel, spec=kernel)


def _blocks(kernel):
  """The sides of each block that a mock kernel was asked for, and whether they are one object."""
  pairs = [call.args for call in kernel.block.call_args_list]
  return [(len(x1), len(x2), x1 is x2) for x1, x2 in pairs]


@pytest.mark.parametrize('architecture', ['fc1', 'convnet2'])
def test_k_ss_in_tiles(architecture):
  kernel = _counted(architecture)
  images = kernel.prepare(np.random.default_rng(0).normal(size=(7, 8, 9, 2)))
  whole = registry.make_kernel(architecture).block(images.images, images.images)
  np.testing.assert_array_equal(evaluation.support_block(kernel, images, 7), whole)
  assert _blocks(kernel) == [(7, 7, True)]
  kernel.block.reset_mock()
  tiled = evaluation.support_block(kernel, images, 3)
  assert _blocks(kernel) == [
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
  prepared = _prepared(run)
  kernel, images = _counted('fc1'), _support(prepared)[0]

  def check():
    if kernel.block.call_count >= blocks:
      raise _Interrupted()

  with pytest.raises(_Interrupted):
    evaluation.krr_test(
      kernel,
      images,
      np.eye(3)[[0, 0, 1, 1, 2, 2]],
      1e-3,
      library.Library(registry.make_kernel('fc1'), prepared.test_images),
      prepared.test_labels,
      3,
      check,
    )
  assert kernel.block.call_count == blocks
