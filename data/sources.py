"""Loads a labelled image data set: one of the papers' from the Hugging Face hub, parquet, image
folders, `.npz`, or scikit-learn's digits."""

import functools
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data import DataError, classes, folders, images, npz, one_line

# Hub repository, its configuration, and its revision.
HUB = {
  'mnist': ('ylecun/mnist', 'mnist', '77f3279092a1c1579b2250db8eafed0ad422088c'),
  'fashion_mnist': (
    'zalando-datasets/fashion_mnist',
    'fashion_mnist',
    '531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2',
  ),
  'cifar10': ('uoft-cs/cifar10', 'plain_text', '0b2714987fa478483af9968de7c934580d0bb9a2'),
  'cifar100': ('uoft-cs/cifar100', 'cifar100', 'aadb3af77e9048adbea6b47c21a81e47dd092ae5'),
  'svhn_cropped': (
    'ufldl-stanford/svhn',
    'cropped_digits',
    'f9e1717d73324ebbc1ece84267ccd80d0aca0690',
  ),
}
NAMES = ('digits', *HUB)
IMAGE_COLUMNS = ('image', 'img')
LABEL_COLUMNS = ('label', 'fine_label')
NPZ_KEYS = ('x_train', 'y_train', 'x_test', 'y_test')
_DIGITS_TEST = 360


class Dataset(NamedTuple):
  """Raw images and labels.

  Attributes:
    name: for messages and files.
    train_images, test_images: uint8 or float32 [N, H, W, D].
    train_labels, test_labels: int64 [N], from 0 to num_classes - 1.
    num_classes: `C`.
    class_names: `C` different names: class i is class_names[i].
    remarks: lines for the user about the content.
  """

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]
  remarks: tuple[str, ...] = ()


class Source(NamedTuple):
  """The place of a data set.

  Attributes:
    name: for messages and files.
    key: changes when the content does.
    load: reads it all.
    remarks: lines for the user about the place, not the content.
  """

  name: str
  key: str
  load: Callable[[], Dataset]
  remarks: tuple[str, ...] = ()


def find(name: str, folder: str = '', size: int = 0) -> Source:
  """Locates a data set without decoding it.

  Args:
    name: one of `NAMES`, or the path of an `.npz` with `x_train, y_train, x_test, y_test` (images
      [N, H, W] or [N, H, W, D], uint8 or floating; labels [N], whole numbers from 0, or text).
    folder: if given, the set is read from it, or from its one sub-folder that holds one, and `name`
      is for messages and files only. Either parquet in the Hugging Face schema: `train.parquet`,
      the hub's own `train-*.parquet` or `train/*.parquet`; or images, `train/CLASS/FILE` or deeper;
      and `test` likewise, or another of `folders.TEST_NAMES`. Folders, and labels that are text,
      are numbered in the order of their names.
    size: pixels a side that images are resized to, see `images.fit`; 0: as they are.

  Raises:
    DataError: nothing usable there; the message says what was looked for.
  """
  if folder:
    found = folders.find(folder, HUB[name][1] if name in HUB else None)
    key = digest(*found.train, *found.test)
    if found.labels is None:
      load = functools.partial(_load_parquet, name, size, found.train, found.test)
    else:
      load = functools.partial(_load_pictures, name, size, found)
      key += hashlib.sha256(os.fsencode(found.names)).hexdigest()
    source = Source(name, key, load, found.remarks)
  elif name.endswith('.npz'):
    if not os.path.isfile(name):
      raise DataError(f'run.data.name: no file {name!r}.')
    load = functools.partial(_load_npz, name, size)
    source = Source(os.path.basename(name)[:-4], digest(name), load)
  elif name == 'digits':
    source = Source(name, 'scikit-learn digits', functools.partial(_load_digits, size))
  elif name in HUB:
    source = Source(name, ' '.join(HUB[name]), functools.partial(_load_hub, name, size))
  else:
    raise DataError(
      f'run.data.name: no data set {name!r}; '
      f'known: {", ".join(NAMES)}, or the path of an .npz file.'
    )
  return source._replace(key=f'{source.key} at {size}') if size else source


def digest(*paths: str) -> str:
  """SHA-256 of the files' content, one after the other. Raises DataError."""
  found = hashlib.sha256()
  for path in paths:
    try:
      with open(path, 'rb') as file:
        while chunk := file.read(2**22):
          found.update(chunk)
    except OSError as error:
      raise DataError(f'{path!r} cannot be read: {error.strerror}.') from error
  return found.hexdigest()


class _Split(NamedTuple):
  """Images [N, H, W] or [N, H, W, D] and labels [N] as they were read."""

  images: np.ndarray
  labels: np.ndarray


def _load_digits(size: int) -> Dataset:
  from sklearn import datasets  # here: it takes seconds to import, and only this set needs it

  digits: Any = datasets.load_digits()
  pixels, labels = digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int64)
  start = len(pixels) - _DIGITS_TEST  # ordered by writer, so these are other people's digits
  train, test = _Split(pixels[:start], labels[:start]), _Split(pixels[start:], labels[start:])
  return _checked('digits', size, train, test)


def _load_npz(path: str, size: int) -> Dataset:
  x_train, y_train, x_test, y_test = npz.read(path, NPZ_KEYS).values()
  name = os.path.basename(path)[:-4]
  return _checked(name, size, _Split(x_train, y_train), _Split(x_test, y_test))


def _load_pictures(name: str, size: int, found: folders.Found) -> Dataset:
  from PIL import Image

  train_labels, test_labels = found.labels or ([], [])
  names = classes.ordered(train_labels)
  numbers = {label: number for number, label in enumerate(names)}
  reader, splits = images.Reader(size), []
  for paths, labels in ((found.train, train_labels), (found.test, test_labels)):
    pixels = []
    for path, label in zip(paths, labels):
      if label not in numbers:
        raise DataError(f'{path!r}: class {label!r} has no training image.')
      try:
        with Image.open(path) as picture:
          pixels.append(reader.read(picture, repr(path)))
      except DataError:
        raise
      except images.ERRORS as error:
        raise DataError(_unreadable(path, 'image', error)) from error
    splits.append((pixels, [numbers[label] for label in labels]))
  train, test = (_stacked(reader, pixels, labels, name) for pixels, labels in splits)
  return _checked(name, size, train, test, names, reader.remarks())


def _load_parquet(name: str, size: int, train: list[str], test: list[str]) -> Dataset:
  import datasets
  import pyarrow
  from datasets import exceptions

  errors = (*images.ERRORS, pyarrow.ArrowException, exceptions.DatasetsError)
  reader, splits, names = images.Reader(size), [], []
  for paths in (train, test):
    pixels, labels = [], []
    for path in paths:
      try:
        rows = datasets.load_dataset('parquet', data_files=[path], split='train', streaming=True)
        more = _decode(rows, reader, repr(path), names)
      except DataError:
        raise
      except errors as error:
        raise DataError(_unreadable(path, 'parquet file of images', error)) from error
      pixels += more[0]
      labels += more[1]
    splits.append((pixels, labels, repr(paths[0])))
  train_set, test_set = (_stacked(reader, *split) for split in splits)
  return _checked(name, size, train_set, test_set, _agreed(name, names), reader.remarks())


def _load_hub(name: str, size: int) -> Dataset:
  import datasets
  from datasets import exceptions

  repository, configuration, revision = HUB[name]
  reader, splits, names = images.Reader(size), [], []
  try:
    for split in ('train', 'test'):
      rows = datasets.load_dataset(repository, configuration, split=split, revision=revision)
      splits.append((*_decode(rows, reader, f'{repository}, {split},', names), repository))
  except DataError:
    raise
  except (*images.ERRORS, RuntimeError, exceptions.DatasetsError) as error:
    raise DataError(
      f'{name} could not be loaded from the hub ({repository}): {one_line(error)} '
      'Without network, give --config.run.data.dir=FOLDER with train.parquet and test.parquet.'
    ) from error
  train, test = (_stacked(reader, *split) for split in splits)
  return _checked(name, size, train, test, _agreed(name, names), reader.remarks())


def _decode(
  rows: Any, reader: images.Reader, where: str, names: list[Any]
) -> tuple[list[np.ndarray], list[Any]]:
  """Reads rows in the Hugging Face schema.

  Args:
    rows: a `datasets` iterable of them.
    reader: makes arrays of their images.
    where: names the rows in messages.
    names: the class names that the schema gives, or None, are appended to it.

  Returns:
    Images [H, W] or [H, W, D], and their labels.

  Raises:
    DataError: a column, an image or a label is missing.
    Any of images.ERRORS: an image is damaged.
  """
  import datasets
  from PIL import Image

  columns = list(rows.features or next(iter(rows), {}))
  image_column = next((c for c in IMAGE_COLUMNS if c in columns), None)
  label_column = next((c for c in reversed(LABEL_COLUMNS) if c in columns), None)
  if not image_column or not label_column:
    raise DataError(
      f'{where}: expected a column {" or ".join(IMAGE_COLUMNS)} and a column '
      f'{" or ".join(LABEL_COLUMNS)}, got {", ".join(columns) or "nothing"}.'
    )
  feature = rows.features and rows.features[image_column]
  as_pixels = isinstance(feature, (datasets.Array2D, datasets.Array3D))
  if not as_pixels:
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
  pixels, labels = [], []
  for row in rows:
    image, this = row[image_column], f'{where} row {len(labels)}'
    if not as_pixels and image and image['bytes'] is None and image['path'] is None:
      image = None
    if image is None or row[label_column] is None:
      raise DataError(f'{this} has no image or no label.')
    if as_pixels:
      image = np.asarray(image, feature.dtype)
      images.check_axes(where, (1, *image.shape))
      pixels.append(reader.resized(image, this))
    else:
      file = image['path'] if image['bytes'] is None else io.BytesIO(image['bytes'])
      with Image.open(file) as picture:
        pixels.append(reader.read(picture, this))
    labels.append(row[label_column])
  names.append(getattr(rows.features and rows.features[label_column], 'names', None))
  return pixels, labels


def _agreed(name: str, names: list[Any]) -> list[str] | None:
  """Class names that all files agree on, None where they give none. Raises DataError."""
  given = [each for each in names if each is not None]
  for other in given[1:]:
    if other != given[0]:
      raise DataError(
        f'{name}: its files name their classes differently: '
        f'{classes.in_words(given[0])} and {classes.in_words(other)}'
      )
  return given[0] if given else None


def _stacked(
  reader: images.Reader, pixels: list[np.ndarray], labels: list[Any], where: str
) -> _Split:
  """A split of images that were read one by one, once both splits are read. Raises DataError."""
  if not pixels:
    raise DataError(f'{where} holds no images.')
  return _Split(np.stack(reader.alike(pixels)), np.asarray(labels))


def _unreadable(path: str, kind: str, error: Exception) -> str:
  """A message for a file that is no `kind`."""
  try:
    with open(path, 'rb') as file:
      if file.read(50).startswith(b'version https://git-lfs'):
        return f'{path!r} is only a pointer to the file: fetch it by `git lfs pull`.'
  except OSError:  # the error says so already
    pass
  return f'{path!r} is not a readable {kind}: {one_line(error)}'


def _checked(
  name: str,
  size: int,
  train: _Split,
  test: _Split,
  class_names: Sequence[str] | None = None,
  remarks: Sequence[str] = (),
) -> Dataset:
  """A data set in the promised form. Raises DataError where the splits cannot be one."""
  x = images.checked(f'{name}: train', train.images, np.size(train.labels), size)
  x_test = images.checked(f'{name}: test', test.images, np.size(test.labels), size)
  if x.shape[1:] != x_test.shape[1:]:
    remedy = ' (run.data.size resizes and crops them)' if x.shape[3] == x_test.shape[3] else ''
    raise DataError(
      f'{name}: train images are {x.shape[1:]}, test images {x_test.shape[1:]}; '
      f'they must agree{remedy}.'
    )
  images.check_ranges(name, x, x_test)
  (y, y_test), names = classes.checked(
    name, (train.labels, test.labels), (len(x), len(x_test)), class_names
  )
  if absent := classes.absent(y_test, names):
    remarks = [*remarks, f'Classes without a test image: {classes.some(absent)}.']
  return Dataset(name, x, y, x_test, y_test, len(names), names, tuple(remarks))
