"""The demo, as `make demo` runs it: worker processes, real RPCs, results and files.

With other seeds in one process, which gives the same bits.
"""

import json
import pathlib

import numpy as np
import pytest
from launching import IN_ONE_PROCESS, LOCAL_MP, command, rows, run, status, without_neural_tangents

from artifacts import run_directory


@pytest.mark.parametrize(
  'seed, program, shorter',
  [
    (0, LOCAL_MP, ()),
    # In one process, without the finite network, and no longer than it takes to win by ten points.
    (1, IN_ONE_PROCESS, ('--config.run.num_steps=20', '--config.system.evaluation.nn_steps=0')),
    (2, IN_ONE_PROCESS, ('--config.run.num_steps=20', '--config.system.evaluation.nn_steps=0')),
  ],
)
def test_the_demo_beats_its_real_images_by_ten_points(
  tmp_path, tmp_path_factory, cache, seed, program, shorter
):
  flags = (f'--config.run.seed={seed}', *shorter)
  done = run(
    command(tmp_path, *flags, config='configs/digits.py', program=program, cache=cache),
    PYTHONPATH=without_neural_tangents(tmp_path_factory.mktemp('modules')),
  )
  assert done.returncode == 0, done.stdout + done.stderr
  outcome, results = status(tmp_path), rows(tmp_path)
  assert outcome['state'] == 'finished' and outcome['step'] == outcome['num_steps']
  first, last = results[0], results[outcome['num_steps']]
  assert last['krr_test_accuracy'] >= first['krr_test_accuracy'] + 0.1
  if not shorter:
    assert last['nn_test_accuracy'] > 0.3  # ten classes: chance is 0.1
  assert {
    'step',
    'krr_test_accuracy',
    'krr_test_mse',
    'train_loss',
    'train_accuracy',
    'wall_seconds',
    'kernel_pairs_per_second',
  } <= set(last)
  assert last['train_loss'] < first['train_loss']

  config = run_directory.RunDirectory(str(tmp_path)).read_saved().config.run
  assert set(outcome['workers']) == {'kernel_worker_0', 'kernel_worker_1'}
  assert all(counts['pairs'] > 0 for counts in outcome['workers'].values())
  assert sum(counts['pairs'] for counts in outcome['workers'].values()) == outcome['pairs']
  pairs_a_step = 10 * config.targets_per_step + 100
  assert outcome['pairs'] == (config.num_steps + 1) * pairs_a_step + config.num_steps * 100

  with np.load(tmp_path / 'distilled.npz', allow_pickle=False) as file:
    assert file['images'].shape == (10, 8, 8, 1) and file['images'].dtype == np.float32
    assert file['labels'].shape == (10, 10) and file['labels'].dtype == np.float32
    assert json.loads(str(file['settings']))['run']['seed'] == seed
  for name in ('distilled.npz', 'metrics.jsonl', 'images.png'):
    assert str(tmp_path / name) in done.stdout
  assert pathlib.Path(tmp_path, 'images.png').read_bytes().startswith(b'\x89PNG')
  assert f'{100 * first["krr_test_accuracy"]:.2f} % with the real images' in done.stdout
