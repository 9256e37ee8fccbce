"""`python -m programs.evaluate` on files of ours, on released ones, and on what is neither."""

import json
import os
import pathlib
import sys

import forked
import launching
import numpy as np
import pytest

from artifacts import distilled_set
from configs import schema
from data import store
from distillation import evaluation


@pytest.fixture(scope='module', name='distilled')
def _distilled(make_finished):
  """The directory of a finished run with baselines."""
  changes = {
    'system.evaluation.nn_steps': 5,
    'system.evaluation.nn_width': 8,
    'system.evaluation.baselines': True,
    'system.snapshot_steps': (1,),
  }
  return pathlib.Path(make_finished(changes).path)


def _rows(workdir):
  with open(workdir / 'metrics.jsonl', encoding='utf-8') as file:
    return {row['step']: row for row in map(json.loads, file)}


def test_a_run_evaluates_networks_at_its_ends_and_baselines_once(distilled):
  rows = _rows(distilled)
  assert sorted(rows) == [0, 1, 2]
  assert [step for step in rows if 'nn_test_accuracy' in rows[step]] == [0, 2]
  baselines = json.loads((distilled / 'baselines.json').read_text())
  assert baselines[0]['kind'] == 'real images, hard labels'
  # The run starts from those very images.
  assert baselines[0]['krr_test_accuracy'] == rows[0]['krr_test_accuracy']
  assert baselines[0]['nn_test_accuracy'] == rows[0]['nn_test_accuracy']


def _run(*flags, cache, run=forked.run, **environment):
  command = [sys.executable, '-m', 'programs.evaluate', *map(str, flags)]
  return run(command, XDG_CACHE_HOME=os.path.dirname(cache), **environment)


CONFIG = (
  '--config=configs/base.py',
  '--config.run.architecture=fc1',
  '--config.system.evaluation.nn_steps=0',
)


def test_a_file_of_ours_gives_what_the_run_found(distilled, cache, tmp_path):
  flags = f'--dataset={distilled}/distilled.npz', '--json'
  path = launching.without_neural_tangents(tmp_path)
  done = _run(*flags, cache=cache, run=launching.run, PYTHONPATH=path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('\n') == 1
  found = json.loads(done.stdout)
  assert found['dataset'] == f'{distilled}/distilled.npz'
  assert [row['kind'] for row in found['rows']][:2] == ['distilled', 'real images, hard labels']
  last = _rows(distilled)[2]
  for key in ('krr_test_accuracy', 'nn_test_accuracy', 'nn_seeds', 'nn_l2'):
    assert found['rows'][0][key] == last[key]
  assert found['rows'][0]['krr_test_mse'] == pytest.approx(last['krr_test_mse'], rel=1e-6)


def test_a_released_file_it_takes_the_configuration(distilled, npz, cache, tmp_path):
  """Same images and labels, without settings; a table with baselines."""
  with np.load(distilled / 'distilled.npz') as file:
    np.savez(tmp_path / 'released.npz', images=file['images'], labels=file['labels'])
  done = _run(
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


def test_a_set_that_the_authors_released_by_its_name(released_mnist):
  name, folder, cache = released_mnist
  flags = (
    f'--dataset={name}',
    f'--config.run.data.dir={folder}',
    f'--config.system.cache_dir={cache}',
    '--json',
  )
  done = _run(
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
  done = _run('--config=configs/cifar10_ipc1.py', *flags, cache=cache)
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
    ('no labels', CONFIG, "array 'labels' is missing; expected images, labels, got images."),
    ('small images', CONFIG, 'images must be [S, 8, 9, 2] for blobs, got [6, 8, 8, 2].'),
    ('few labels', CONFIG, 'labels must be [6, 3] for blobs, got [5, 3].'),
    ('nan', CONFIG, 'images must be finite floating-point numbers, got NaN or infinity.'),
    (
      'seven',
      (*CONFIG, '--baselines'),
      'size must be a multiple of 3 (the classes) from 3 to 96 '
      '(the smallest class has 32 images), got 7',
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
  done = _run(*([f'--dataset={path}'] if content else []), *flags, *data, cache=cache)
  assert done.returncode == 2, done.stdout + done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert len(lines) == 1 and 'Traceback' not in done.stderr and not done.stdout
  assert message in lines[0], lines[0]


def test_a_file_of_ours_is_not_taken_for_one_of_another_data_set(distilled, npz, cache, tmp_path):
  with np.load(npz) as file:
    np.savez(tmp_path / 'other.npz', **{**file, 'y_test': file['y_test'][::-1]})
  done = _run(
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
