"""Inputs as people have them: read as they were meant, or refused in a line with the remedy.

Every image is of one grey value, which tells its class: so it shows which name a label stands for.
"""

import io
import threading

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data import DataError, sources, store
from programs import local

NAMES = ('zero', 'one', 'two', 'three')
FC1 = {
  'run.architecture': 'fc1',
  'run.num_steps': 1,
  'run.images_per_class': 1,
  'run.targets_per_step': 0,
}


def _value(number):
  return 40 + 60 * number


def _picture(number, size=(8, 8)):
  return Image.new('L', size, _value(number))


def _folder(names=NAMES, splits=('train', 'test'), change=lambda i, picture: picture, inside=''):
  """Six pictures of each class a split; `change(i, picture)` gives picture i."""

  def write(path):
    for split in splits:
      for number, name in enumerate(names):
        folder = path / split / name / inside
        folder.mkdir(parents=True)
        for i in range(6):
          change(i, _picture(number)).save(folder / f'{i}.png')
    return {'run.data.name': 'mine', 'run.data.dir': str(path)}

  return write


def _with_junk(path):
  changes = _folder()(path)
  (path / 'train' / 'one' / 'Thumbs.db').write_bytes(b'\xd0\xcf\x11\xe0')
  (path / 'train' / 'two' / 'README.txt').write_text('pictures')
  (path / 'train' / 'two' / 'more').mkdir()
  (path / 'train' / '.ipynb_checkpoints').mkdir()
  (path / 'test' / '.DS_Store').write_bytes(b'')
  return changes


def _npz(each=6, train=lambda x: x, test=lambda x: x, labels=lambda y: y, test_classes=3):
  def write(path):
    path.mkdir()
    y, y_test = np.repeat(np.arange(3), each), np.arange(6) % test_classes
    x, x_test = (
      np.tile(_value(some)[:, None, None, None], (1, 8, 8, 1)).astype(np.uint8)
      for some in (y, y_test)
    )
    np.savez(
      path / 'set.npz',
      x_train=train(x),
      y_train=labels(y),
      x_test=test(x_test),
      y_test=labels(y_test),
    )
    return {'run.data.name': str(path / 'set.npz')}

  return write


def _parquet(labels, kind, folder='', file='{}.parquet'):
  def write(path):
    place = path / folder
    place.mkdir(parents=True)
    pictures, classes = [], []
    for number in range(3):
      buffer = io.BytesIO()
      _picture(number).save(buffer, 'PNG')
      pictures += [{'bytes': buffer.getvalue(), 'path': None}] * 6
      classes += [labels(number)] * 6
    table = pyarrow.table({'image': pictures, 'label': pyarrow.array(classes, kind)})
    for split in ('train', 'test'):
      parquet.write_table(table, place / file.format(split))
    return {'run.data.name': 'mine', 'run.data.dir': str(path)}

  return write


def _channels_first(x):
  return np.repeat(x, 3, axis=3).transpose(0, 3, 1, 2)


def _text(y):
  return np.array(NAMES)[y]


SORTED = ('one', 'three', 'two', 'zero')
NUMBERED = ('0', '1', '2')
FEW = {
  'system.evaluation.nn_steps': 2,
  'system.evaluation.nn_width': 4,
  'system.evaluation.nn_l2s': (0.0, 0.001),
}
RESIZED = {'run.data.size': 8}


def _larger(i, picture):
  return picture.resize((8 + i % 3, 8 + i % 2))


# What is written; fields of the run; names that the files give the values, in their order; the
# class names; the shape; the remarks.
ACCEPTED = {
  'named_classes': (_folder(), {}, NAMES, SORTED, (8, 8, 1), ()),
  'numeric_names': (
    _folder(('2', '10', '1')),
    {},
    ('2', '10', '1'),
    ('1', '2', '10'),
    (8, 8, 1),
    (),
  ),
  'sizes_differ': (_folder(change=_larger), RESIZED, NAMES, SORTED, (8, 8, 1), ()),
  'grey_and_colour': (
    _folder(change=lambda i, p: p.convert('RGB') if i % 2 else p),
    {},
    NAMES,
    SORTED,
    (8, 8, 3),
    ('Grey images among colour, read as RGB: 24 of 48.',),
  ),
  'alpha': (
    _folder(change=lambda i, p: p if i else p.convert('RGBA')),
    {},
    NAMES,
    SORTED,
    (8, 8, 3),
    (
      'Images with transparency, laid on white: 8.',
      'Grey images among colour, read as RGB: 40 of 48.',
    ),
  ),
  'junk_files': (
    _with_junk,
    {},
    NAMES,
    SORTED,
    (8, 8, 1),
    (
      'Skipped, being no images of a class: 5 (train/.ipynb_checkpoints, train/one/Thumbs.db, '
      'train/two/README.txt, train/two/more, test/.DS_Store).',
    ),
  ),
  'val_not_test': (
    _folder(splits=('train', 'val')),
    {},
    NAMES,
    SORTED,
    (8, 8, 1),
    ("There is no 'test' in run.data.dir: 'val' is the test set.",),
  ),
  'images_below_class': (_folder(inside='images/more'), {}, NAMES, SORTED, (8, 8, 1), ()),
  'class_missing_in_test': (
    _npz(test_classes=2),
    {},
    NUMBERED,
    NUMBERED,
    (8, 8, 1),
    ('Classes without a test image: 2.',),
  ),
  'six_images': (_npz(each=2), {}, NUMBERED, NUMBERED, (8, 8, 1), ()),
  'text_labels': (_npz(labels=_text), {}, NAMES[:3], ('one', 'two', 'zero'), (8, 8, 1), ()),
  'parquet_text_labels': (
    _parquet(lambda number: 'cab'[number], pyarrow.string()),
    {},
    'cab',
    ('a', 'b', 'c'),
    (8, 8, 1),
    (),
  ),
  'parquet_hub_layout': (
    _parquet(int, pyarrow.int64(), 'data', '{}-00000-of-00001.parquet'),
    {},
    NUMBERED,
    NUMBERED,
    (8, 8, 1),
    (),
  ),
}
REFUSED = {
  'sizes_differ': (
    _folder(change=_larger),
    r"differ in size: '.*train/one/0.png' is \(8, 8\), "
    r"'.*train/one/1.png' is \(9, 9\); run.data.size=8",
  ),
  'scales_differ': (
    _npz(test=lambda x: (x / 255).astype(np.float32)),
    r'ranges of pixel values differ: train images 40 to 160 \(uint8\), '
    r'test images 0.15.* to 0.62.* \(float32\); bring both to one range',
  ),
  'channels_first': (
    _npz(train=_channels_first, test=_channels_first),
    r'train images of shape \(18, 3, 8, 8\): looks like \[N, C, H, W\]: '
    r'transpose\(0, 2, 3, 1\)',
  ),
}


@pytest.mark.parametrize('case', ACCEPTED)
def test_accepted(make_run, tmp_path, case):
  write, changes, told, class_names, shape, remarks = ACCEPTED[case]
  run = make_run(tmp_path / 'run', {**FC1, **write(tmp_path / 'data'), **changes})
  prepared = store.prepare(run.config.run.data, run.cache, raw=True)
  assert prepared.class_names == class_names and prepared.remarks == remarks
  assert prepared.train_images.shape[1:] == shape
  found = [class_names[label] for label in prepared.train_labels]
  assert prepared.raw_images is not None
  assert found == [told[(image[0, 0, 0] - 40) // 60] for image in prepared.raw_images]


@pytest.mark.parametrize('case', REFUSED)
def test_refused(tmp_path, case):
  write, message = REFUSED[case]
  changes = write(tmp_path / 'data')
  with pytest.raises(DataError, match=message) as error:
    sources.find(changes['run.data.name'], changes.get('run.data.dir', '')).load()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'case, fields', [('six_images', FEW), ('class_missing_in_test', {}), ('junk_files', {})]
)
def test_runs_to_its_end(make_run, tmp_path, case, fields):
  write, changes, *_ = ACCEPTED[case]
  run = make_run(tmp_path / 'run', {**FC1, **write(tmp_path / 'data'), **changes, **fields})
  local.distil(run, threading.Event())
  assert run.directory.read_status()['state'] == 'finished'
  rows = run.directory.read_metrics()
  assert [row['step'] for row in rows] == [0, 1]
  selected = {row.get('nn_selected_on') for row in rows}
  assert selected == ({'the last training image'} if fields else {None})
