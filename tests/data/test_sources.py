"""Every source reads back what was written, and every kind of bad file gets its line."""

import os

import datasets
import numpy as np
from PIL import Image
import pytest

from data import DataError
from data import sources

SHARED = os.path.join(os.path.dirname(__file__), '..', '..', '..', 'shared', 'data')


def _arrays(n=6, shape=(4, 5, 3), classes=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, size=(n, *shape)).astype(np.uint8), np.arange(n) % classes


def _write_npz(path, **changes):
  x, y = _arrays()
  np.savez(path, **{k: v for k, v in {'x_train': x, 'y_train': y, 'x_test': x[:3], 'y_test': y[:3], **changes}.items() if v is not None})
  return str(path)


def _write_parquet(folder, split, images, labels, image='image', label='label', features=None):
  rows = {image: [Image.fromarray(i.squeeze()) for i in images], label: list(map(int, labels))}
  features = features or datasets.Features({image: datasets.Image(), label: datasets.Value('int64')})
  datasets.Dataset.from_dict(rows, features=features).to_parquet(os.path.join(folder, f'{split}.parquet'))


def test_npz(tmp_path):
  x, y = _arrays()
  dataset = sources.find(_write_npz(tmp_path / 'mine.npz')).load()
  assert dataset.name == 'mine' and dataset.num_classes == 3
  np.testing.assert_array_equal(dataset.train_images, x)
  np.testing.assert_array_equal(dataset.test_labels, y[:3])


def test_npz_of_grey_floats_and_column_labels(tmp_path):
  x = np.random.default_rng(0).normal(size=(6, 4, 4))
  path = _write_npz(tmp_path / 'a.npz', x_train=x, x_test=x, y_train=np.arange(6)[:, None] % 2, y_test=np.arange(6) % 2)
  dataset = sources.find(path).load()
  assert dataset.train_images.shape == (6, 4, 4, 1) and dataset.train_images.dtype == np.float32
  np.testing.assert_array_equal(dataset.train_labels, [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize('changes, message', [
    ({'y_test': None}, "array 'y_test' is missing"),
    ({'x_train': np.zeros((6, 4))}, r'train images must be \[N, H, W\]'),
    ({'x_train': np.zeros((0, 4, 4, 3))}, 'nothing empty'),
    ({'x_train': np.full((6, 4, 5, 3), np.nan)}, 'train image 0 contains NaN'),
    ({'x_test': np.zeros((3, 4, 4, 3), np.uint8)}, r'train images are \(4, 5, 3\), test images \(4, 4, 3\)'),
    ({'x_train': np.full((6, 4, 5, 3), 'a')}, 'must be uint8 or floating'),
    ({'y_train': np.arange(5)}, 'train labels must be 6 whole numbers'),
    ({'y_train': np.linspace(0, 1, 6)}, 'whole numbers, got float64'),
    ({'y_train': np.array([0, 1, 2, -1, 1, 2])}, 'train labels must lie between 0 and 2, got -1'),
    ({'y_test': np.array([0, 1, 3])}, 'test labels must lie between 0 and 2, got 0 to 3'),
    ({'y_train': np.array([0, 3, 1, 1, 0, 3])}, 'class 2 has no training image'),
    ({'y_train': np.zeros(6, int), 'y_test': np.zeros(3, int)}, 'at least two classes'),
    ({'y_train': np.array([{}] * 6)}, 'not a readable .npz file without pickled objects'),
])
def test_bad_npz(tmp_path, changes, message):
  path = str(tmp_path / 'bad.npz')
  x, y = _arrays()
  np.savez(path, **{k: v for k, v in {'x_train': x, 'y_train': y, 'x_test': x[:3], 'y_test': y[:3], **changes}.items() if v is not None})
  with pytest.raises(DataError, match=message):
    sources.find(path).load()


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04rubbish', b'hello'])
def test_files_that_are_no_npz(tmp_path, content):
  path = tmp_path / 'bad.npz'
  path.write_bytes(content)
  with pytest.raises(DataError, match='is not a readable .npz'):
    sources.find(str(path)).load()


def test_a_truncated_npz(tmp_path):
  path = tmp_path / 'bad.npz'
  _write_npz(path)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(DataError, match='is not a readable .npz'):
    sources.find(str(path)).load()


@pytest.mark.parametrize('image, label, shape', [('image', 'label', (5, 4, 3)), ('img', 'label', (6, 6, 1)), ('img', 'fine_label', (4, 4, 3))])
def test_parquet(tmp_path, image, label, shape):
  x, y = _arrays(shape=shape)
  for split, n in (('train', 6), ('test', 3)):
    _write_parquet(tmp_path, split, x[:n], y[:n], image, label)
  dataset = sources.find('anything', str(tmp_path)).load()
  np.testing.assert_array_equal(dataset.train_images, x)
  np.testing.assert_array_equal(dataset.test_images, x[:3])
  np.testing.assert_array_equal(dataset.train_labels, y)


def test_fine_labels_win_over_coarse_ones(tmp_path):
  x, y = _arrays()
  for split in ('train', 'test'):
    rows = {'img': [Image.fromarray(i) for i in x], 'fine_label': y.tolist(), 'coarse_label': [0] * 6, 'label': [0] * 6}
    features = datasets.Features({'img': datasets.Image(), **{k: datasets.Value('int64') for k in ('fine_label', 'coarse_label', 'label')}})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(os.path.join(tmp_path, f'{split}.parquet'))
  np.testing.assert_array_equal(sources.find('x', str(tmp_path)).load().train_labels, y)


def test_bad_parquet(tmp_path):
  x, y = _arrays()
  with pytest.raises(DataError, match='no folder'):
    sources.find('x', str(tmp_path / 'nowhere'))
  with pytest.raises(DataError, match="train.parquet' is missing"):
    sources.find('x', str(tmp_path))
  _write_parquet(tmp_path, 'train', x, y)
  _write_parquet(tmp_path, 'test', x, y, image='picture')
  with pytest.raises(DataError, match='expected a column image or img .* got picture, label'):
    sources.find('x', str(tmp_path)).load()
  (tmp_path / 'test.parquet').write_bytes((tmp_path / 'train.parquet').read_bytes()[:-50])
  with pytest.raises(DataError, match='is not a readable parquet file of images'):
    sources.find('x', str(tmp_path)).load()
  (tmp_path / 'test.parquet').write_bytes(b'')
  with pytest.raises(DataError, match='is not a readable parquet file of images'):
    sources.find('x', str(tmp_path)).load()


def test_parquet_with_bytes_that_are_no_image(tmp_path):
  x, y = _arrays()
  _write_parquet(tmp_path, 'train', x, y)
  features = datasets.Features({'image': {'bytes': datasets.Value('binary'), 'path': datasets.Value('string')},
                                'label': datasets.Value('int64')})
  datasets.Dataset.from_dict({'image': [{'bytes': b'no', 'path': None}], 'label': [0]}, features=features).to_parquet(
      os.path.join(tmp_path, 'test.parquet'))
  with pytest.raises(DataError, match='is not a readable parquet file of images'):
    sources.find('x', str(tmp_path)).load()


def test_images_of_different_sizes(tmp_path):
  x, y = _arrays()
  rows = {'image': [Image.fromarray(x[0]), Image.fromarray(x[1][:2])], 'label': [0, 1]}
  features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
  for split in ('train', 'test'):
    datasets.Dataset.from_dict(rows, features=features).to_parquet(os.path.join(tmp_path, f'{split}.parquet'))
  with pytest.raises(DataError, match='row 1 is'):
    sources.find('x', str(tmp_path)).load()


def test_unknown_names():
  with pytest.raises(DataError, match="no data set 'mnits'; known: digits, mnist"):
    sources.find('mnits')
  with pytest.raises(DataError, match="no file 'nowhere.npz'"):
    sources.find('nowhere.npz')


def test_digits():
  dataset = sources.find('digits').load()
  assert dataset.train_images.shape == (1437, 8, 8, 1) and dataset.test_images.shape == (360, 8, 8, 1)
  assert dataset.train_images.max() == 16 and np.bincount(dataset.train_labels).min() == 141


@pytest.mark.skipif(not os.path.isdir(SHARED), reason='needs a folder of real data sets beside the checkout')
def test_real_cifar10():
  dataset = sources.find('cifar10', os.path.join(SHARED, 'cifar10')).load()
  assert dataset.train_images.shape == (50000, 32, 32, 3) and np.bincount(dataset.train_labels).tolist() == [5000] * 10
  np.testing.assert_allclose(dataset.train_images[:10000].mean((0, 1, 2)), [125.3, 122.9, 113.9], atol=1.5)


@pytest.mark.network
@pytest.mark.parametrize('name, shape, classes', [('mnist', (28, 28, 1), 10), ('fashion_mnist', (28, 28, 1), 10), ('cifar10', (32, 32, 3), 10),
                                                  ('cifar100', (32, 32, 3), 100), ('svhn_cropped', (32, 32, 3), 10)])
def test_hub(name, shape, classes):
  dataset = sources.find(name).load()
  assert dataset.train_images.shape[1:] == shape and dataset.num_classes == classes
