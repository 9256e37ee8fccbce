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
    ({'x_train': np.full((6, 4, 5, 3), 1e300)}, r'train image 0 contains NaN or infinity \(in float32\)'),
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


def _names(n):
  return datasets.ClassLabel(names=[f'class {i}' for i in range(n)])


# The features of the hub's own files, at the revisions of sources.HUB.
SCHEMAS = {
    'mnist': ((28, 28, 1), 10, {'image': datasets.Image(), 'label': _names(10)}),
    'fashion_mnist': ((28, 28, 1), 10, {'image': datasets.Image(), 'label': _names(10)}),
    'cifar10': ((32, 32, 3), 10, {'img': datasets.Image(), 'label': _names(10)}),
    'cifar100': ((32, 32, 3), 100, {'img': datasets.Image(), 'fine_label': _names(100), 'coarse_label': _names(20)}),
    'svhn_cropped': ((32, 32, 3), 10, {'image': datasets.Image(), 'label': _names(10)}),
}


def _write_hub_split(path, name, n, seed):
  shape, classes, features = SCHEMAS[name]
  x, y = _arrays(n, shape, classes, seed)
  image, label = list(features)[:2]
  rows = {image: [Image.fromarray(i.squeeze()) for i in x], label: y.tolist()}
  if 'coarse_label' in features:
    rows['coarse_label'] = (y % 20).tolist()
  datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
  return x, y


@pytest.mark.parametrize('name', sources.HUB)
def test_the_papers_sets_in_the_schema_of_the_hub(tmp_path, monkeypatch, name):
  """A folder that looks like the hub's repository: configuration, splits, shards; then the same files by run.data.dir."""
  repository, configuration, revision = sources.HUB[name]
  assert len(revision) == 40
  folder = tmp_path / 'repository' / configuration
  folder.mkdir(parents=True)
  classes = SCHEMAS[name][1]
  x, y = _write_hub_split(folder / 'train-00000-of-00001.parquet', name, 2 * classes, 0)
  x_test, y_test = _write_hub_split(folder / 'test-00000-of-00001.parquet', name, 7, 1)
  _write_hub_split(folder / 'extra-00000-of-00001.parquet', name, 3, 2)
  splits = ''.join(f'  - split: {split}\n    path: {configuration}/{split}-*\n' for split in ('train', 'test', 'extra'))
  (folder.parent / 'README.md').write_text(f'---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{splits}'
                                           f'- config_name: other\n  data_files: {configuration}/extra-*\n---\n')
  monkeypatch.setitem(sources.HUB, name, (str(folder.parent), configuration, revision))
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  for dataset in (sources.find(name).load(), sources.find(name, str(folder)).load()):
    assert (dataset.name, dataset.num_classes) == (name, classes)
    np.testing.assert_array_equal(dataset.train_images, x)
    np.testing.assert_array_equal(dataset.train_labels, y)
    np.testing.assert_array_equal(dataset.test_images, x_test)
    np.testing.assert_array_equal(dataset.test_labels, y_test)


def test_the_revision_is_asked_for(monkeypatch):
  asked = []
  monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kwargs: asked.append((args, kwargs)) or (_ for _ in ()).throw(OSError('x')))
  with pytest.raises(DataError, match='svhn_cropped could not be loaded from the hub .*run.data.dir=FOLDER'):
    sources.find('svhn_cropped').load()
  assert asked == [(('ufldl-stanford/svhn', 'cropped_digits'), {'split': 'train', 'revision': sources.HUB['svhn_cropped'][2]})]


def test_parquet_in_shards(tmp_path):
  x, y = _arrays(12)
  for i in range(3):
    _write_parquet(tmp_path, f'train-{i:05d}-of-00003', x[4 * i:4 * i + 4], y[4 * i:4 * i + 4])
  _write_parquet(tmp_path, 'test', x[:3], y[:3])
  dataset = sources.find('x', str(tmp_path)).load()
  np.testing.assert_array_equal(dataset.train_images, x)
  np.testing.assert_array_equal(dataset.train_labels, y)


@pytest.mark.parametrize('shape', [(4, 5), (4, 5, 2)])
@pytest.mark.parametrize('dtype', ['float32', 'uint8'])
def test_parquet_of_pixel_values(tmp_path, shape, dtype):
  x = (np.random.default_rng(0).uniform(0, 255, size=(6, *shape))).astype(dtype)
  array = {2: datasets.Array2D, 3: datasets.Array3D}[len(shape)](shape, dtype)
  features = datasets.Features({'image': array, 'label': datasets.Value('int32')})
  for split, n in (('train', 6), ('test', 3)):
    datasets.Dataset.from_dict({'image': list(x[:n]), 'label': [0, 1, 2, 0, 1, 2][:n]}, features=features).to_parquet(
        str(tmp_path / f'{split}.parquet'))
  dataset = sources.find('x', str(tmp_path)).load()
  assert dataset.train_images.dtype == dtype and dataset.train_images.shape == (6, 4, 5, shape[2] if len(shape) == 3 else 1)
  np.testing.assert_array_equal(dataset.train_images.reshape(x.shape), x)


def _write_folder(folder, split, images, labels, classes=('cat', 'dog', 'emu'), mode=None):
  for i, (image, label) in enumerate(zip(images, labels)):
    path = folder / split / classes[label]
    path.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image.squeeze())
    (picture.convert(mode) if mode else picture).save(path / f'{i:03d}.png')


@pytest.mark.parametrize('shape', [(5, 4, 3), (6, 6, 1)])
def test_image_folder(tmp_path, shape):
  x, y = _arrays(7, shape)
  _write_folder(tmp_path, 'train', x, y)
  _write_folder(tmp_path, 'test', x[1:3], y[1:3])
  source = sources.find('pets', str(tmp_path))
  dataset = source.load()
  order = np.argsort(y, kind='stable')  # class by class
  assert (dataset.name, dataset.num_classes) == ('pets', 3)
  np.testing.assert_array_equal(dataset.train_images, x[order])
  np.testing.assert_array_equal(dataset.train_labels, y[order])
  np.testing.assert_array_equal(dataset.test_labels, [1, 2])
  os.rename(tmp_path / 'test' / 'dog', tmp_path / 'test' / 'cat')
  assert sources.find('pets', str(tmp_path)).key != source.key  # the same bytes mean another class now


@pytest.mark.parametrize('mode', ['RGBA', 'P', '1', 'LA'])
def test_pictures_of_other_kinds(tmp_path, mode):
  x = np.zeros((4, 3, 3, 3), np.uint8)
  x[1::2] = 255
  for split in ('train', 'test'):
    _write_folder(tmp_path, split, x, [0, 1, 0, 1], mode=mode)
  dataset = sources.find('x', str(tmp_path)).load()
  assert dataset.train_images.shape[-1] == (1 if mode in ('1', 'LA') else 3)
  assert dataset.train_images.mean((1, 2, 3)).tolist() == [0, 0, 255, 255]


def test_bad_image_folders(tmp_path):
  x, y = _arrays()
  (tmp_path / 'test').mkdir()
  _write_folder(tmp_path, 'train', x, y)
  with pytest.raises(DataError, match='holds no images'):
    sources.find('x', str(tmp_path)).load()
  _write_folder(tmp_path, 'test', x, y, classes=('cat', 'dog', 'fox'))
  with pytest.raises(DataError, match="class 'fox' has no training image"):
    sources.find('x', str(tmp_path)).load()
  os.rename(tmp_path / 'test' / 'fox', tmp_path / 'test' / 'emu')
  assert sources.find('x', str(tmp_path)).load().num_classes == 3
  Image.fromarray(np.zeros((5, 4), np.uint16)).save(tmp_path / 'test' / 'emu' / 'deep.png')
  with pytest.raises(DataError, match="deep.png': an image has more than 8 bits a channel .* .npz"):
    sources.find('x', str(tmp_path)).load()
  (tmp_path / 'test' / 'emu' / 'deep.png').write_text('no image')
  with pytest.raises(DataError, match="deep.png' is not a readable image"):
    sources.find('x', str(tmp_path)).load()
  Image.fromarray(x[0][:2]).save(tmp_path / 'test' / 'emu' / 'deep.png')
  with pytest.raises(DataError, match=r"differ in size: '.*train/cat/000.png' is \(4, 5\), '.*emu/deep.png' is \(2, 5\); run.data.size=4"):
    sources.find('x', str(tmp_path)).load()


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
  with pytest.raises(DataError, match=r"train.parquet' row 0 is \(4, 5\), '.*train.parquet' row 1 is \(2, 5\); run.data.size="):
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
@pytest.mark.parametrize('name, train, test', [('mnist', 60000, 10000), ('fashion_mnist', 60000, 10000), ('cifar10', 50000, 10000),
                                               ('cifar100', 50000, 10000), ('svhn_cropped', 73257, 26032)])
def test_hub(name, train, test):
  dataset = sources.find(name).load()
  assert (len(dataset.train_images), len(dataset.test_images)) == (train, test)
  assert (dataset.train_images.shape[1:], dataset.num_classes) == SCHEMAS[name][:2]
