"""The exported set loads as it was saved, and says what is wrong with one that does not."""

import csv
import json
import os
import sys

import forked
import numpy as np
import pytest
from PIL import Image

from artifacts import distilled_set, export
from configs import base, schema, validation
from data import DataError, preprocess, store
from programs import export as program


@pytest.fixture(params=[False, True], ids=['standard', 'zca'])
def saved(request, npz, cache, tmp_path):
  """(path, prepared set, images, labels) of an export."""
  data = schema.Data(name=npz, zca=request.param)
  prepared = store.prepare(data, cache)
  images = prepared.train_images[:6]
  labels = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2]] - np.float32(1 / 3)
  path = str(tmp_path / 'distilled.npz')
  system = schema.System(evaluation=schema.Evaluation(krr_tile=9))
  config = schema.Config(schema.Run(data=data), system)
  distilled_set.save(path, images, labels, 5, config, prepared)
  return path, prepared, images, labels


def test_it_loads_as_it_was_saved(saved):
  path, prepared, images, labels = saved
  loaded = distilled_set.load(path)
  np.testing.assert_array_equal(loaded.images, images)
  np.testing.assert_array_equal(loaded.labels, labels)
  for ours, theirs in zip(loaded.transform, prepared.transform):
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
      np.testing.assert_array_equal(ours, theirs)
  assert (
    loaded.settings['step'] == 5
    and loaded.settings['evaluation']['krr_tile'] == 9
    and loaded.settings['label_offset'] == -1 / 3
  )
  assert os.path.exists(os.path.join(os.path.dirname(path), 'transform.npz')) == (
    prepared.transform.zca is not None
  )


def test_the_transform_of_an_export_gives_the_images_that_were_used(saved, npz):
  path, prepared, _, _ = saved
  with np.load(npz) as file:
    np.testing.assert_array_equal(
      preprocess.apply(distilled_set.load(path).transform, file['x_test']), prepared.test_images
    )


def test_damage(saved, tmp_path):
  path, prepared, _, _ = saved
  beside = tmp_path / 'transform.npz'
  if prepared.transform.zca is not None:
    np.savez(beside, zca=prepared.transform.zca + 1)
    with pytest.raises(DataError, match='is not the matrix that .* their hashes differ'):
      distilled_set.load(path)
    beside.write_bytes(b'PK no zip')
    with pytest.raises(DataError, match='which cannot be read'):
      distilled_set.load(path)
    beside.unlink()
    with pytest.raises(DataError, match='which cannot be read: .*No such file'):
      distilled_set.load(path)
  content = open(path, 'rb').read()
  for damaged in (b'', content[:200], b'PK no zip'):
    open(path, 'wb').write(damaged)
    with pytest.raises(DataError, match='is not a distilled set'):
      distilled_set.load(path)


def test_a_released_set_is_used_like_our_own(released_mnist, tmp_path):
  name, folder, cache = released_mnist
  distilled = distilled_set.load_released(name, cache, folder)
  config = {**base.get_config().to_dict(), 'run': distilled.settings['run']}
  run = validation.validate(config).run
  prepared = store.prepare(run.data, cache)
  assert distilled.settings['data'] == {
    'name': 'mnist',
    'key': prepared.key,
    'class_names': list('0123456789'),
  }
  assert distilled.settings['label_offset'] == -0.1
  assert (run.architecture, run.images_per_class, run.learn_labels, run.data.zca) == (
    'convnet',
    1,
    True,
    False,
  )
  np.testing.assert_array_equal(distilled.transform.mean, prepared.transform.mean)
  copy = str(tmp_path / 'distilled.npz')
  distilled_set.save(copy, distilled.images, distilled.labels, 0, schema.Config(run), prepared)
  np.testing.assert_array_equal(distilled_set.load(copy).images, distilled.images)


def test_a_released_set_is_written_out_by_its_name(released_mnist, tmp_path):
  name, folder, cache = released_mnist
  done = forked.run(
    [
      sys.executable,
      '-m',
      'programs.export',
      name,
      f'--to={tmp_path}/out',
      '--config=configs/mnist_ipc1.py',
      f'--config.run.data.dir={folder}',
      f'--config.system.cache_dir={cache}',
    ]
  )
  assert done.returncode == 0, done.stderr
  raw = distilled_set.raw_images(distilled_set.load_released(name, cache, folder))
  for i in range(10):
    np.testing.assert_array_equal(
      np.asarray(Image.open(tmp_path / 'out' / str(i) / f'{i:05d}.png')), raw[i, ..., 0]
    )


@pytest.fixture(name='grey')
def _grey(tmp_path):
  """A distilled set of 4 images, 2 classes, 5x6 pixels of one channel: (path, distilled)."""
  rng = np.random.default_rng(0)
  transform = preprocess.Transform(np.array([100.0]), np.array([50.0]))
  images = rng.normal(size=(4, 5, 6, 1)).astype(np.float32)
  labels = rng.normal(size=(4, 2)).astype(np.float32)
  classes = np.array([0, 0, 1, 1])
  prepared = store.Prepared(
    'key', '', 'grey', images, classes, images, classes, 2, transform, class_names=('a/b', 'c')
  )
  path = str(tmp_path / 'distilled.npz')
  distilled_set.save(path, images, labels, 1, schema.Config(), prepared)
  return path, distilled_set.load(path)


def test_an_image_folder_holds_raw_pixels_and_labels(grey, tmp_path):
  path, distilled = grey
  assert program.main(['export', path, f'--to={tmp_path}/out']) == 0
  for i, name in enumerate(['a_b/00000.png', 'a_b/00001.png', 'c/00002.png', 'c/00003.png']):
    expected = np.clip(
      np.round(100 + 50.0 * distilled.images[i, ..., 0].astype(np.float64)), 0, 255
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'out' / name)), expected)
  header, *lines = (tmp_path / 'out' / 'labels.csv').read_text().splitlines()
  assert header == 'file,label_a/b,label_c' and lines[2].startswith('c/00002.png,')
  np.testing.assert_array_equal(
    np.array([line.split(',')[1:] for line in lines], np.float32), distilled.labels
  )


def test_a_dataset_folder_loads_exactly(grey, tmp_path):
  import datasets

  export.write_dataset(grey[1], str(tmp_path / 'out'))
  rows = datasets.load_dataset(str(tmp_path / 'out'), cache_dir=str(tmp_path / 'cache'))['train']
  np.testing.assert_array_equal(np.array(rows['pixels'], np.float32), grey[1].images)
  np.testing.assert_array_equal(np.array(rows['soft_label'], np.float32), grey[1].labels)
  assert list(rows['label']) == [0, 0, 1, 1] and rows.features['label'].names == ['a/b', 'c']
  np.testing.assert_array_equal(
    np.asarray(rows[3]['image']), distilled_set.raw_images(grey[1])[3, ..., 0]
  )


def test_names_of_classes_are_in_the_file_and_need_no_pickle(grey):
  path, distilled = grey
  with np.load(path, allow_pickle=False) as file:
    assert list(file['class_names']) == ['a/b', 'c']
    assert json.loads(str(file['settings']))['data']['class_names'] == ['a/b', 'c']
  assert distilled.class_names == ['a/b', 'c']


def test_a_file_without_names_has_numbers(grey, tmp_path):
  path, _ = grey
  with np.load(path) as file:
    arrays = {name: file[name] for name in file if name != 'class_names'}
  settings = json.loads(str(arrays['settings']))
  del settings['data']['class_names']
  np.savez(tmp_path / 'old.npz', **{**arrays, 'settings': json.dumps(settings)})
  assert distilled_set.load(str(tmp_path / 'old.npz')).class_names == ['0', '1']
  export.write_images(distilled_set.load(str(tmp_path / 'old.npz')), str(tmp_path / 'out'))
  assert sorted(os.listdir(tmp_path / 'out')) == ['0', '1', 'labels.csv']
  assert (tmp_path / 'out' / 'labels.csv').read_text().splitlines()[0] == 'file,label_0,label_1'


@pytest.mark.parametrize(
  'names, folders',
  [
    (('cat', 'dog'), ['cat', 'dog']),
    (('10', '-1.5'), ['10', '-1.5']),
    (('T-shirt/top', 'Ankle boot'), ['T-shirt_top', 'Ankle boot']),
    (('../up', '.hidden'), ['_up', 'hidden']),
    (('a/b', 'a\\b'), ['a_b', '1_a_b']),
    (('Cat', 'cat'), ['Cat', '1_cat']),  # one folder on macOS and Windows
    (('1_x', 'x', 'X')[1:], ['x', '1_X']),
    (('con', '..'), ['0_con', '1_']),  # reserved on Windows; nothing left
    (('labels.csv', 'x' * 300), ['0_labels.csv', 'x' * 60]),
    (('größe', '猫\n犬'), ['größe', '猫_犬']),
    (('a,b', '"c"'), ['a_b', '_c_']),
  ],
)
def test_folders_are_named_after_the_classes(grey, tmp_path, names, folders):
  distilled = grey[1]._replace(settings={'data': {'class_names': list(names)}})
  export.write_images(distilled, str(tmp_path / 'out'))
  with open(tmp_path / 'out' / 'labels.csv', encoding='utf-8', newline='') as file:
    header, *lines = csv.reader(file)
  assert header == ['file', *(f'label_{name}' for name in names)]
  assert [line[0] for line in lines] == [f'{folders[i // 2]}/{i:05d}.png' for i in range(4)]
  assert all((tmp_path / 'out' / line[0]).is_file() for line in lines)
  assert len(os.listdir(tmp_path / 'out')) == 3


def test_channels_that_png_cannot_hold(grey, tmp_path):
  distilled = grey[1]._replace(images=np.zeros((4, 5, 6, 2), np.float32))
  with pytest.raises(DataError, match='PNG files hold 1 or 3 channels; these images have 2'):
    export.write_images(
      distilled._replace(transform=preprocess.Transform(np.zeros(2), np.ones(2))),
      str(tmp_path / 'out'),
    )
