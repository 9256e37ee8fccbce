"""Every source reads back what was written, and every kind of bad file gets its line."""

import io
import os

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data import DataError, classes, sources

SHARED = os.path.join(os.path.dirname(__file__), '..', '..', '..', 'shared', 'data')


def _arrays(n=6, shape=(4, 5, 3), classes=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, size=(n, *shape)).astype(np.uint8), np.arange(n) % classes


def _write_npz(path, **changes):
  x, y = _arrays()
  np.savez(
    path,
    **{
      k: v
      for k, v in {'x_train': x, 'y_train': y, 'x_test': x[:3], 'y_test': y[:3], **changes}.items()
      if v is not None
    },
  )
  return str(path)


def _write_parquet(folder, split, images, labels, image='image', label='label', features=None):
  rows = {image: [Image.fromarray(i.squeeze()) for i in images], label: list(map(int, labels))}
  features = features or datasets.Features(
    {image: datasets.Image(), label: datasets.Value('int64')}
  )
  datasets.Dataset.from_dict(rows, features=features).to_parquet(
    os.path.join(folder, f'{split}.parquet')
  )


def test_npz(tmp_path):
  x, y = _arrays()
  dataset = sources.find(_write_npz(tmp_path / 'mine.npz')).load()
  assert dataset.name == 'mine' and dataset.num_classes == 3
  np.testing.assert_array_equal(dataset.train_images, x)
  np.testing.assert_array_equal(dataset.test_labels, y[:3])


def test_npz_of_grey_floats_and_column_labels(tmp_path):
  x = np.random.default_rng(0).normal(size=(6, 4, 4))
  path = _write_npz(
    tmp_path / 'a.npz',
    x_train=x,
    x_test=x,
    y_train=np.arange(6)[:, None] % 2,
    y_test=np.arange(6) % 2,
  )
  dataset = sources.find(path).load()
  assert dataset.train_images.shape == (6, 4, 4, 1) and dataset.train_images.dtype == np.float32
  np.testing.assert_array_equal(dataset.train_labels, [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'y_test': None}, "array 'y_test' is missing"),
    ({'x_train': np.zeros((6, 4))}, r'train images must be \[N, H, W\]'),
    ({'x_train': np.zeros((0, 4, 4, 3))}, 'nothing empty'),
    ({'x_train': np.full((6, 4, 5, 3), np.nan)}, 'train image 0 contains NaN'),
    (
      {'x_train': np.full((6, 4, 5, 3), 1e300)},
      r'train image 0 contains NaN or infinity \(in float32\)',
    ),
    (
      {'x_test': np.zeros((3, 4, 4, 3), np.uint8)},
      r'train images are \(4, 5, 3\), test images \(4, 4, 3\)',
    ),
    ({'x_train': np.full((6, 4, 5, 3), 'a')}, 'must be uint8 or floating'),
    ({'y_train': np.arange(5)}, 'train labels must be 6 whole numbers'),
    ({'y_train': np.linspace(0, 1, 6)}, 'whole numbers, got float64'),
    ({'y_train': np.array([0, 1, 2, -1, 1, 2])}, 'train labels must lie between 0 and 2, got -1'),
    ({'y_test': np.array([0, 1, 3])}, 'test labels must lie between 0 and 2, got 0 to 3'),
    ({'y_train': np.array([0, 3, 1, 1, 0, 3])}, 'class 2 has no training image'),
    ({'y_train': np.zeros(6, int), 'y_test': np.zeros(3, int)}, 'at least two classes'),
    ({'y_train': np.array([{}] * 6)}, 'not a readable .npz file without pickled objects'),
    (
      {'y_train': np.array(['a'] * 6, object)},
      r'without pickled objects \(save text by .astype\(str\)\)',
    ),
    ({'y_train': -np.arange(3, 9)}, 'train labels must lie between 0 and C - 1, got -8 to -3'),
    ({'y_train': np.arange(6) + 1}, 'class 0 has no training image'),
    ({'y_train': np.array([0, 1, 2, 2, 0, 2**64 - 1], np.uint64)}, 'class 3 has no training image'),
    ({'y_train': np.full(6, 2**64 - 1, np.uint64)}, 'class 0 has no training image'),
    ({'y_train': np.array([0, 1, 2, 2, 0, 2**63 - 1])}, 'class 3 has no training image'),
    (
      {'y_test': np.array([0, 1, 2**64 - 1], np.uint64)},
      'test labels must lie between 0 and 2, got 0 to 18446744073709551615',
    ),
    (
      {'y_train': np.array(['a', 'b', 'c'] * 2)},
      'train labels are <U1, test labels int64; both must be text, or whole',
    ),
    (
      {'y_train': np.array(['a', 'b'] * 3), 'y_test': np.array(['a', 'c', 'b'])},
      "class 'c' has no training image",
    ),
    ({'y_train': np.array(['a', ''] * 3), 'y_test': np.array(['a'] * 3)}, 'train label 1 is empty'),
    (
      {'y_train': np.array(['a'] * 6), 'y_test': np.array(['a'] * 3)},
      'at least two classes are needed, got 1',
    ),
    (
      {'y_train': np.array([b'a', b'\xff'] * 3), 'y_test': np.array([b'a'] * 3)},
      'labels are bytes, but not UTF-8 text',
    ),
    (
      {'x_train': np.zeros((4, 5, 3, 6), np.uint8)},
      r'looks like \[H, W, D, N\]: transpose\(3, 0, 1, 2\)',
    ),
  ],
)
def test_bad_npz(tmp_path, changes, message):
  path = str(tmp_path / 'bad.npz')
  x, y = _arrays()
  np.savez(
    path,
    **{
      k: v
      for k, v in {'x_train': x, 'y_train': y, 'x_test': x[:3], 'y_test': y[:3], **changes}.items()
      if v is not None
    },
  )
  with pytest.raises(DataError, match=message):
    sources.find(path).load()


@pytest.mark.parametrize(
  'labels, names, numbers',
  [
    (['two', 'one', 'three'], ('one', 'three', 'two'), [2, 0, 1]),
    (['10', '2', '1'], ('1', '2', '10'), [2, 1, 0]),
    (['1.5', '-2', '1'], ('-2', '1', '1.5'), [2, 0, 1]),
    (['10', '2', 'a'], ('10', '2', 'a'), [0, 1, 2]),
    ([b'two', b'one', 'drei\u00df'.encode()], ('drei\u00df', 'one', 'two'), [2, 1, 0]),
  ],
)
def test_labels_that_are_text_are_numbered_in_their_order(tmp_path, labels, names, numbers):
  path = _write_npz(tmp_path / 'a.npz', y_train=np.array(labels * 2), y_test=np.array(labels))
  dataset = sources.find(path).load()
  assert dataset.class_names == names and dataset.num_classes == 3
  np.testing.assert_array_equal(dataset.train_labels, numbers * 2)
  np.testing.assert_array_equal(dataset.test_labels, numbers)
  assert dataset.train_labels.dtype == np.int64


@pytest.mark.parametrize('dtype', ['uint8', 'int16', 'uint64'])
def test_numbers_are_the_names_of_classes_without(tmp_path, dtype):
  path = _write_npz(tmp_path / 'a.npz', y_train=np.array([0, 1, 2] * 2, dtype))
  dataset = sources.find(path).load()
  assert dataset.class_names == ('0', '1', '2') and dataset.train_labels.dtype == np.int64


@pytest.mark.parametrize(
  'names, line',
  [
    (('one', 'three', 'two', 'zero'), '4 classes: 0 one, 1 three, 2 two, 3 zero.'),
    (tuple('0123456789'), '10 classes: 0 to 9.'),
    (('a\nb', 'c'), '2 classes: 0 a b, 1 c.'),
    (
      tuple(f'c{i}' for i in range(100)),
      '100 classes: 0 c0, 1 c1, 2 c2, 3 c3, 4 c4, 5 c5, 6 c6, 7 c7, 8 c8, 9 c9, …, 99 c99.',
    ),
  ],
)
def test_the_mapping_is_told_on_a_line(names, line):
  assert classes.in_words(names) == line


FLOAT = np.random.default_rng(1).uniform(0, 1, (6, 4, 5, 3))
BYTES = (255 * FLOAT).astype(np.uint8)


@pytest.mark.parametrize(
  'train, test, differ',
  [
    (BYTES, FLOAT, True),
    (FLOAT, BYTES, True),
    (BYTES.astype(float), FLOAT, True),
    (BYTES, 2 * FLOAT - 1, True),
    (2 * FLOAT - 1, BYTES, True),
    (2 * FLOAT - 1, FLOAT, True),
    (FLOAT, (FLOAT - 0.5) / 0.3, True),
    ((FLOAT - 0.5) / 0.3, BYTES, True),
    (16 * FLOAT, FLOAT, True),
    (BYTES, 16 * FLOAT, True),
    (257 * BYTES.astype(np.uint16), BYTES, True),
    (BYTES, np.round(FLOAT).astype(np.uint8), True),
    (BYTES, np.zeros((6, 4, 5, 3)), True),
    (BYTES, BYTES.astype(float), False),
    (FLOAT, 0.8 * FLOAT, False),
    (16 * FLOAT, np.round(15 * FLOAT).astype(np.uint8), False),
    (BYTES, BYTES // 6, False),  # darker, not in other units
    (BYTES, np.where(FLOAT > 0.99, 255, 0).astype(np.uint8), False),  # nearly black
    (FLOAT, np.where(FLOAT > 0.99, -0.01, FLOAT), False),
    (np.where(FLOAT.min() == FLOAT, 1000, FLOAT), FLOAT, False),  # one pixel far out
    ((FLOAT - 0.5) / 0.3, (FLOAT - 0.4) / 0.3, False),
  ],
)
def test_splits_in_different_units_are_refused(tmp_path, train, test, differ):
  source = sources.find(_write_npz(tmp_path / 'a.npz', x_train=train, x_test=test[:3]))
  if not differ:
    assert source.load().num_classes == 3
    return
  message = r'ranges of pixel values differ: train images .* to .*, test images .*; bring both to'
  with pytest.raises(DataError, match=message):
    source.load()


@pytest.mark.parametrize(
  'shape, refused',
  [
    ((3, 8, 9), True),
    ((1, 28, 28), True),
    ((4, 16, 16), True),
    ((2, 5, 6), True),
    ((8, 8, 3), False),
    ((3, 3, 3), False),
    ((1, 9, 1), False),
    ((3, 8, 4), False),
    ((2, 3, 8), False),
    ((4, 4, 512), False),
    ((5, 5, 5), False),
  ],
)
@pytest.mark.parametrize('size', [0, 6])
def test_channels_first_is_refused(tmp_path, shape, refused, size):
  x = np.arange(6 * np.prod(shape)).reshape(6, *shape).astype(np.uint8)
  source = sources.find(_write_npz(tmp_path / 'a.npz', x_train=x, x_test=x[:3]), size=size)
  if not refused:
    assert source.load().train_images.shape == (6, *((size, size) if size else shape[:2]), shape[2])
    return
  with pytest.raises(DataError, match=r'looks like \[N, C, H, W\]: transpose\(0, 2, 3, 1\)'):
    source.load()


@pytest.mark.parametrize('name, shape', [('digits', (8, 8, 1)), ('npz', (4, 5, 3))])
def test_any_source_has_a_size(tmp_path, name, shape):
  name = _write_npz(tmp_path / 'a.npz') if name == 'npz' else name
  as_it_is, smaller = sources.find(name), sources.find(name, size=2)
  assert as_it_is.key != smaller.key and sources.find(name, size=0).key == as_it_is.key
  raw, dataset = as_it_is.load(), smaller.load()
  assert raw.train_images.shape[1:] == shape and dataset.train_images.shape[1:] == (2, 2, shape[2])
  if name == 'digits':
    mean = raw.test_images.reshape(-1, 2, 4, 2, 4, 1).mean((2, 4))
    assert np.abs(dataset.test_images - mean).max() <= 1  # rounded to whole numbers, twice
    np.testing.assert_array_equal(sources.find(name, size=8).load().train_images, raw.train_images)


@pytest.mark.parametrize(
  'present, remark',
  [
    ([0, 1], 'Classes without a test image: 2 c.'),
    ([1], 'Classes without a test image: 0 a, 2 c.'),
    ([0, 1, 2], None),
  ],
)
def test_a_test_split_that_lacks_classes_is_said(tmp_path, present, remark):
  names = np.array(['a', 'b', 'c'])
  y = np.resize(present, 3)
  path = _write_npz(tmp_path / 'a.npz', y_train=np.tile(names, 2), y_test=names[y])
  dataset = sources.find(path).load()
  assert dataset.remarks == ((remark,) if remark else ())
  np.testing.assert_array_equal(dataset.test_labels, y)


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


@pytest.mark.parametrize(
  'name, first, last',
  [
    ('mnist', '0', '9'),
    ('svhn_cropped', '0', '9'),
    ('fashion_mnist', 'T-shirt/top', 'Ankle boot'),
    ('cifar10', 'airplane', 'truck'),
    ('cifar100', 'apple', 'worm'),
    ('pets', '0', '9'),
  ],
)
def test_classes_of_known_sets_have_their_names_without_a_schema(tmp_path, name, first, last):
  classes = 100 if name == 'cifar100' else 10
  x, y = _arrays(classes, (4, 4, 1), classes)
  for split in ('train', 'test'):
    _write_parquet(tmp_path, split, x, y)
  names = sources.find(name, str(tmp_path)).load().class_names
  assert (len(set(names)), names[0], names[-1]) == (classes, first, last)


def test_files_that_name_their_classes_differently_are_refused(tmp_path):
  x, y = _arrays(4, classes=2)
  for split, names in (('train', ['cat', 'dog']), ('test', ['dog', 'cat'])):
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({'image': datasets.Image(), 'label': label})
    _write_parquet(tmp_path, split, x, y, features=features)
  message = 'name their classes differently: 2 classes: 0 cat, 1 dog. and 2 classes: 0 dog, 1 cat.'
  with pytest.raises(DataError, match=message):
    sources.find('x', str(tmp_path)).load()


def test_labels_of_parquet_may_be_text(tmp_path):
  x, _ = _arrays(4)
  for split in ('train', 'test'):
    rows = {'image': [Image.fromarray(i) for i in x], 'label': ['10', '9', '10', '9']}
    label = datasets.Value('large_string')
    features = datasets.Features({'image': datasets.Image(), 'label': label})
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / f'{split}.parquet'))
  dataset = sources.find('x', str(tmp_path)).load()
  assert dataset.class_names == ('9', '10') and dataset.train_labels.tolist() == [1, 0, 1, 0]


def _names(n):
  return datasets.ClassLabel(names=[f'class {i}' for i in range(n)])


# The features of the hub's own files, at the revisions of sources.HUB.
SCHEMAS = {
  'mnist': ((28, 28, 1), 10, {'image': datasets.Image(), 'label': _names(10)}),
  'fashion_mnist': ((28, 28, 1), 10, {'image': datasets.Image(), 'label': _names(10)}),
  'cifar10': ((32, 32, 3), 10, {'img': datasets.Image(), 'label': _names(10)}),
  'cifar100': (
    (32, 32, 3),
    100,
    {'img': datasets.Image(), 'fine_label': _names(100), 'coarse_label': _names(20)},
  ),
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
  """A folder that looks like the hub's repository: configuration, splits, shards; then the same
  files by run.data.dir."""
  _, configuration, revision = sources.HUB[name]
  assert len(revision) == 40
  folder = tmp_path / 'repository' / configuration
  folder.mkdir(parents=True)
  classes = SCHEMAS[name][1]
  x, y = _write_hub_split(folder / 'train-00000-of-00001.parquet', name, 2 * classes, 0)
  x_test, y_test = _write_hub_split(folder / 'test-00000-of-00001.parquet', name, 7, 1)
  _write_hub_split(folder / 'extra-00000-of-00001.parquet', name, 3, 2)
  splits = ''.join(
    f'  - split: {split}\n    path: {configuration}/{split}-*\n'
    for split in ('train', 'test', 'extra')
  )
  (folder.parent / 'README.md').write_text(
    f'---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{splits}'
    f'- config_name: other\n  data_files: {configuration}/extra-*\n---\n'
  )
  monkeypatch.setitem(sources.HUB, name, (str(folder.parent), configuration, revision))
  monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
  for dataset in (sources.find(name).load(), sources.find(name, str(folder)).load()):
    assert (dataset.name, dataset.num_classes) == (name, classes)
    assert dataset.class_names == tuple(f'class {i}' for i in range(classes))
    np.testing.assert_array_equal(dataset.train_images, x)
    np.testing.assert_array_equal(dataset.train_labels, y)
    np.testing.assert_array_equal(dataset.test_images, x_test)
    np.testing.assert_array_equal(dataset.test_labels, y_test)


def test_the_revision_is_asked_for(monkeypatch):
  asked = []
  monkeypatch.setattr(
    datasets,
    'load_dataset',
    lambda *args, **kwargs: asked.append((args, kwargs)) or (_ for _ in ()).throw(OSError('x')),
  )
  with pytest.raises(
    DataError, match='svhn_cropped could not be loaded from the hub .*run.data.dir=FOLDER'
  ):
    sources.find('svhn_cropped').load()
  assert asked == [
    (
      ('ufldl-stanford/svhn', 'cropped_digits'),
      {'split': 'train', 'revision': sources.HUB['svhn_cropped'][2]},
    )
  ]


def test_parquet_in_shards(tmp_path):
  x, y = _arrays(12)
  for i in range(3):
    _write_parquet(tmp_path, f'train-{i:05d}-of-00003', x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
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
    datasets.Dataset.from_dict(
      {'image': list(x[:n]), 'label': [0, 1, 2, 0, 1, 2][:n]}, features=features
    ).to_parquet(str(tmp_path / f'{split}.parquet'))
  dataset = sources.find('x', str(tmp_path)).load()
  assert dataset.train_images.dtype == dtype and dataset.train_images.shape == (
    6,
    4,
    5,
    shape[2] if len(shape) == 3 else 1,
  )
  np.testing.assert_array_equal(dataset.train_images.reshape(x.shape), x)


def test_parquet_of_channels_first_is_refused(tmp_path):
  features = datasets.Features(
    {'image': datasets.Array3D((3, 6, 7), 'uint8'), 'label': datasets.Value('int32')}
  )
  rows = {'image': list(np.zeros((4, 3, 6, 7), np.uint8)), 'label': [0, 1] * 2}
  for split in ('train', 'test'):
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / f'{split}.parquet'))
  for size in (0, 6):
    with pytest.raises(DataError, match=r'looks like \[N, C, H, W\]: transpose\(0, 2, 3, 1\)'):
      sources.find('x', str(tmp_path), size).load()


def test_pictures_of_parquet_are_turned_upright_and_resized(tmp_path):
  x, y = _arrays(4, (4, 4, 3), 2)
  exif = Image.Exif()
  exif[0x0112] = 6
  encoded = []
  for image in x:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG', exif=exif)
    encoded.append({'bytes': buffer.getvalue(), 'path': None})
  rows = datasets.Dataset.from_dict({'image': encoded, 'label': y.tolist()})
  rows = rows.cast_column('image', datasets.Image())
  for split in ('train', 'test'):
    rows.to_parquet(str(tmp_path / f'{split}.parquet'))
  dataset = sources.find('x', str(tmp_path)).load()
  np.testing.assert_array_equal(dataset.train_images, np.rot90(x, -1, axes=(1, 2)))
  assert dataset.remarks == ('Images turned upright, as their EXIF data say: 8.',)
  smaller = sources.find('x', str(tmp_path), 2).load().train_images
  assert np.abs(smaller - dataset.train_images.reshape(4, 2, 2, 2, 2, 3).mean((2, 4))).max() <= 1


def _touch(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(b'')


@pytest.mark.parametrize(
  'files, message',
  [
    (
      ('a/0.png', 'b/0.png', 'notes.txt'),
      "train.parquet' is missing; found a/, b/, notes.txt; expected",
    ),
    (('train/a/0.png', 'dev/a/0.png'), "/test' is missing; found dev/, train/; expected"),
    (
      ('train.parquet', 'eval.parquet'),
      "/test.parquet' is missing; found eval.parquet, train.parquet; expected",
    ),
    (
      ('train/0.png', 'train/1.png', 'test/0.png'),
      "/train' holds no images as CLASS/FILE; found train/0.png, train/1.png",
    ),
    (
      ('train/a/0.heic', 'test/a/0.png'),
      "/train' holds no images as CLASS/FILE; found train/a/0.heic",
    ),
    (
      ('one/train.parquet', 'two/train.parquet'),
      "holds several data sets; choose one of '.*one', '.*two'",
    ),
    (
      ('train-00000-of-00003.parquet', 'train-00002-of-00003.parquet', 'test.parquet'),
      'holds 2 of the 3 files train-',
    ),
    (
      ('train.parquet', 'train-00000-of-00001.parquet', 'test.parquet'),
      r'holds train.parquet and train-\*.parquet; keep one',
    ),
  ],
)
def test_what_a_folder_holds_instead_is_said(tmp_path, files, message):
  for file in files:
    _touch(tmp_path / file)
  with pytest.raises(DataError, match=message) as error:
    sources.find('x', str(tmp_path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('place', ['', 'data', 'plain_text'])
@pytest.mark.parametrize(
  'train, test',
  [
    ('train-00000-of-00001', 'test-00000-of-00001'),
    ('train/0000', 'test/0000'),
    ('train-00000-of-00001', 'validation-00000-of-00001'),
  ],
)
def test_clones_from_the_hub(tmp_path, place, train, test):
  x, y = _arrays(6)
  for split, n in ((train, 6), (test, 3)):
    (tmp_path / place / split).parent.mkdir(parents=True, exist_ok=True)
    _write_parquet(tmp_path / place, split, x[:n], y[:n])
  (tmp_path / '.git').mkdir()
  (tmp_path / 'README.md').write_text('a set')
  source = sources.find('x', str(tmp_path))
  np.testing.assert_array_equal(source.load().train_images, x)
  np.testing.assert_array_equal(source.load().test_images, x[:3])
  said = ("There is no 'test' in run.data.dir: 'validation' is the test set.",)
  assert source.remarks == (said if 'val' in test else ())


def test_a_clone_of_several_configurations_is_told_apart_by_the_name(tmp_path):
  x, y = _arrays(10, classes=10)
  for place in ('cropped_digits', 'full_numbers'):
    (tmp_path / place).mkdir()
    for split in ('train', 'test'):
      _write_parquet(tmp_path / place, split, x if place == 'cropped_digits' else x[::-1], y)
  np.testing.assert_array_equal(sources.find('svhn_cropped', str(tmp_path)).load().train_images, x)
  message = "holds several data sets; choose one of '.*cropped_digits', '.*full_numbers'"
  with pytest.raises(DataError, match=message):
    sources.find('x', str(tmp_path))


@pytest.mark.parametrize('file', ['train.parquet', 'train/a/0.png'])
def test_pointers_of_git_lfs_are_told(tmp_path, file):
  for path in (file, file.replace('train', 'test')):
    _touch(tmp_path / path)
    (tmp_path / path).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  with pytest.raises(DataError, match='is only a pointer to the file: fetch it by `git lfs pull`'):
    sources.find('x', str(tmp_path)).load()


def test_links_are_followed_once(tmp_path):
  x, y = _arrays(6)
  _write_folder(tmp_path, 'train', x, y)
  _write_folder(tmp_path, 'test', x, y)
  (tmp_path / 'train' / 'cat' / 'again').symlink_to(tmp_path / 'train' / 'cat')
  (tmp_path / 'train' / 'fox').symlink_to(tmp_path / 'train' / 'dog')
  source = sources.find('x', str(tmp_path))
  dataset = source.load()
  assert dataset.class_names == ('cat', 'dog', 'emu', 'fox') and len(dataset.train_images) == 8
  assert source.remarks == ('Skipped, being no images of a class: 1 (train/cat/again).',)


def test_folder_names_that_are_no_text(tmp_path):
  x, y = _arrays(4, classes=2)
  for split in ('train', 'test'):
    _write_folder(tmp_path, split, x, y, classes=('a', os.fsdecode(b'b\xff')))
  assert sources.find('x', str(tmp_path)).load().class_names == ('a', r'b\xff')


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
  assert dataset.class_names == ('cat', 'dog', 'emu')
  np.testing.assert_array_equal(dataset.train_images, x[order])
  np.testing.assert_array_equal(dataset.train_labels, y[order])
  np.testing.assert_array_equal(dataset.test_labels, [1, 2])
  os.rename(tmp_path / 'test' / 'dog', tmp_path / 'test' / 'cat')
  # The same bytes mean another class now.
  assert sources.find('pets', str(tmp_path)).key != source.key


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
  message = (
    r"differ in size: '.*train/cat/000.png' is \(4, 5\), '.*emu/deep.png' is \(2, 5\); "
    'run.data.size=4'
  )
  with pytest.raises(DataError, match=message):
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


@pytest.mark.parametrize(
  'image, label', [(None, 0), ({'bytes': None, 'path': None}, 0), (..., None)]
)
def test_parquet_rows_without_an_image_or_a_label(tmp_path, image, label):
  x, y = _arrays()
  _write_parquet(tmp_path, 'test', x, y)
  buffer = io.BytesIO()
  Image.fromarray(x[0]).save(buffer, 'PNG')
  good = {'bytes': buffer.getvalue(), 'path': None}
  table = pyarrow.table({'image': [good, good if image is ... else image], 'label': [1, label]})
  parquet.write_table(table, tmp_path / 'train.parquet')
  with pytest.raises(DataError, match="train.parquet' row 1 has no image or no label"):
    sources.find('x', str(tmp_path)).load()


def test_parquet_with_bytes_that_are_no_image(tmp_path):
  x, y = _arrays()
  _write_parquet(tmp_path, 'train', x, y)
  features = datasets.Features(
    {
      'image': {'bytes': datasets.Value('binary'), 'path': datasets.Value('string')},
      'label': datasets.Value('int64'),
    }
  )
  datasets.Dataset.from_dict(
    {'image': [{'bytes': b'no', 'path': None}], 'label': [0]}, features=features
  ).to_parquet(os.path.join(tmp_path, 'test.parquet'))
  with pytest.raises(DataError, match='is not a readable parquet file of images'):
    sources.find('x', str(tmp_path)).load()


def test_images_of_different_sizes(tmp_path):
  x, _ = _arrays()
  rows = {'image': [Image.fromarray(x[0]), Image.fromarray(x[1][:2])], 'label': [0, 1]}
  features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
  for split in ('train', 'test'):
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
      os.path.join(tmp_path, f'{split}.parquet')
    )
  message = (
    r"train.parquet' row 0 is \(4, 5\), '.*train.parquet' row 1 is \(2, 5\); "
    'run.data.size=4'
  )
  with pytest.raises(DataError, match=message):
    sources.find('x', str(tmp_path)).load()


def test_unknown_names():
  with pytest.raises(DataError, match="no data set 'mnits'; known: digits, mnist"):
    sources.find('mnits')
  with pytest.raises(DataError, match="no file 'nowhere.npz'"):
    sources.find('nowhere.npz')


def test_digits():
  dataset = sources.find('digits').load()
  assert dataset.train_images.shape == (1437, 8, 8, 1) and dataset.test_images.shape == (
    360,
    8,
    8,
    1,
  )
  assert dataset.train_images.max() == 16 and np.bincount(dataset.train_labels).min() == 141
  assert dataset.class_names == tuple('0123456789') and not dataset.remarks


@pytest.mark.skipif(
  not os.path.isdir(SHARED), reason='needs a folder of real data sets beside the checkout'
)
def test_real_cifar10():
  dataset = sources.find('cifar10', os.path.join(SHARED, 'cifar10')).load()
  assert (
    dataset.train_images.shape == (50000, 32, 32, 3)
    and np.bincount(dataset.train_labels).tolist() == [5000] * 10
  )
  np.testing.assert_allclose(
    dataset.train_images[:10000].mean((0, 1, 2)), [125.3, 122.9, 113.9], atol=1.5
  )


@pytest.mark.network
@pytest.mark.parametrize(
  'name, train, test',
  [
    ('mnist', 60000, 10000),
    ('fashion_mnist', 60000, 10000),
    ('cifar10', 50000, 10000),
    ('cifar100', 50000, 10000),
    ('svhn_cropped', 73257, 26032),
  ],
)
def test_hub(name, train, test):
  dataset = sources.find(name).load()
  assert (len(dataset.train_images), len(dataset.test_images)) == (train, test)
  assert (dataset.train_images.shape[1:], dataset.num_classes) == SCHEMAS[name][:2]
