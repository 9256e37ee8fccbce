"""Images that a run may start from: values, and files that do not fit."""

import dataclasses
import json
import os
import threading

import numpy as np
import pytest

from configs import schema
from data import DataError, store
from distillation import initial_support
from programs import local

FC1 = {'run.architecture': 'fc1', 'run.num_steps': 2}


def _prepared(run):
  prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
  assert prepared is not None
  return prepared


def _make(run):
  return initial_support.make(run.config.run, _prepared(run), run.cache)


def test_noise_has_the_deviation_of_the_training_images(make_run, tmp_path):
  images, labels = _make(
    make_run(tmp_path / 'a', {'run.initial_images': 'noise', 'run.images_per_class': 20})
  )
  assert images.shape == (60, 8, 9, 2) and images.dtype == np.float64
  # They are standardised.
  assert abs(images.mean()) < 0.03 and images.std() == pytest.approx(1, abs=0.03)
  assert np.abs(np.corrcoef(images.reshape(60, -1))[np.triu_indices(60, 1)]).max() < 0.4
  assert np.array_equal(labels, np.repeat(np.eye(3), 20, axis=0) - 1 / 3)
  fewer, _ = _make(make_run(tmp_path / 'b', {'run.initial_images': 'noise'}))
  other, _ = _make(make_run(tmp_path / 'c', {'run.initial_images': 'noise', 'run.seed': 1}))
  assert np.array_equal(fewer, images[:6]) and not np.array_equal(fewer, other)


def test_a_distilled_set_goes_on(make_run, tmp_path):
  """A run starts from the images and labels of our file, and of one with nothing else in it, as the
  papers' authors released theirs."""
  first = make_run(tmp_path / 'first', FC1)
  local.distil(first, threading.Event())
  with np.load(first.directory.distilled) as file:
    images, labels = file['images'], file['labels']
  np.savez(tmp_path / 'released.npz', images=images, labels=labels)
  for name, path in (
    ('ours', first.directory.distilled),
    ('theirs', str(tmp_path / 'released.npz')),
  ):
    run = make_run(tmp_path / name, {**FC1, 'run.initial_images': path, 'run.learn_labels': False})
    local.distil(run, threading.Event())
    assert run.directory.read_status()['state'] == 'finished'
    with np.load(run.directory.snapshot(0)) as start, np.load(run.directory.distilled) as end:
      assert (
        start['images'].tobytes() == images.tobytes()
        and start['labels'].tobytes() == labels.tobytes()
      )
      assert end['labels'].tobytes() == labels.tobytes() and not np.array_equal(
        end['images'], images
      )


def test_a_released_set_goes_on(make_run, tmp_path, released_mnist):
  """A released set is given by its name, which must fit the run's data and preprocessing."""
  name, folder, cache = released_mnist
  changes = {'run.data.name': 'mnist', 'run.data.dir': folder, 'run.initial_images': name}
  sizes = {'run.images_per_class': 1, 'run.targets_per_step': 10}
  run = make_run(tmp_path / 'run', {**changes, **sizes})
  prepared, settings = _prepared(run), run.config.run
  images, labels = initial_support.make(settings, prepared, cache)
  with np.load(os.path.join(cache, 'released', name)) as file:
    np.testing.assert_array_equal(images, file['images'].astype(np.float32))
    np.testing.assert_array_equal(labels, file['labels'].astype(np.float32))
  assert images.dtype == labels.dtype == np.float64
  for data in (schema.Data(name='mnist', zca=True), schema.Data(name='blobs')):
    with pytest.raises(DataError, match='needs run.data.name=mnist and run.data.zca=False; got'):
      initial_support.make(dataclasses.replace(settings, data=data), prepared, cache)


def _file(**changes):
  arrays = {
    'images': np.zeros((6, 8, 9, 2), np.float32),
    'labels': np.zeros((6, 3), np.float32),
    **changes,
  }
  return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
  'arrays, message',
  [
    (_file(labels=None), "array 'labels' is missing; expected images, labels, got images"),
    (
      _file(images=np.zeros((5, 8, 9, 2))),
      r'images must be \[6, 8, 9, 2\] for blobs and run.images_per_class=2, got \[5, 8, 9, 2\]',
    ),
    (_file(images=np.zeros((6, 8, 9, 1))), r'images must be \[6, 8, 9, 2\].*got \[6, 8, 9, 1\]'),
    (_file(labels=np.zeros((6, 10))), r'labels must be \[6, 3\]'),
    (
      _file(images=np.zeros((6, 8, 9, 2), np.uint8)),
      'images must be finite floating-point numbers',
    ),
    (_file(labels=np.full((6, 3), np.nan)), 'labels must be finite'),
    (
      _file(settings=json.dumps({'data': {'key': 'other', 'name': 'mnist'}})),
      'was distilled from other data, or',
    ),
    (_file(settings=json.dumps([1])), 'must be real, noise, or an .npz file of a distilled set'),
    (
      _file(settings=json.dumps({'data': 'mnist'})),
      'must be real, noise, or an .npz file of a distilled set',
    ),
    (_file(settings='{'), 'must be real, noise, or an .npz file of a distilled set'),
    (None, 'run.initial_images=.* must be real, noise, or an .npz file of a distilled set'),
  ],
)
def test_files_that_do_not_fit(make_run, tmp_path, arrays, message):
  path = str(tmp_path / 'set.npz')
  if arrays is not None:
    np.savez(path, **arrays)
  with pytest.raises(DataError, match=message) as error:
    _make(make_run(tmp_path / 'run', {'run.initial_images': path}))
  assert '\n' not in str(error.value)


def test_a_set_of_classes_with_other_names_is_other_data(make_run, tmp_path, npz):
  with np.load(npz) as file:
    images = {name: file[name] for name in ('x_train', 'x_test')}
    numbers = {name: file[name] for name in ('y_train', 'y_test')}
  paths = [str(tmp_path / f'{names}' / 'set.npz') for names in ('abc', 'acb')]
  for path in paths:
    os.mkdir(os.path.dirname(path))
    names = np.array(list(os.path.basename(os.path.dirname(path))))
    np.savez(path, **images, **{name: names[labels] for name, labels in numbers.items()})
  first = make_run(tmp_path / 'first', {**FC1, 'run.data.name': paths[0]})
  local.distil(first, threading.Event())
  start = {**FC1, 'run.initial_images': first.directory.distilled}
  images, _ = _make(make_run(tmp_path / 'same', {**start, 'run.data.name': paths[0]}))
  assert images.shape == (6, 8, 9, 2)
  message = (
    'was distilled from other data, or data with other class names or preprocessing, than set here'
  )
  with pytest.raises(DataError, match=message):
    _make(make_run(tmp_path / 'other', {**start, 'run.data.name': paths[1]}))
