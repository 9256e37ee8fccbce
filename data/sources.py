"""Loads a labelled image data set: the papers' sets from the Hugging Face hub, parquet, image
folders, `.npz`, scikit-learn's digits."""

import functools
import hashlib
import io
import os
from typing import Any, NamedTuple, Sequence

import numpy as np

from data import NPZ_ERRORS, DataError, classes, folders, images

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
  """Where a data set comes from.

  Attributes:
    name: for messages and files.
    key: changes when the content does.
    load: `load()` reads it all into a Dataset.
    remarks: lines for the user about the place, not the content.
  """

  name: str
  key: str
  load: Any
  remarks: tuple[str, ...] = ()


def find(name: str, folder: str = '', size: int = 0) -> Source:
  """Locates a data set without decoding it.

  Args:
    name: one of `NAMES`, or the path of an `.npz` with `x_train, y_train, x_test, y_test` (images
      [N, H, W] or [N, H, W, D], uint8 or floating; labels [N], whole numbers from 0, or text).
    folder: if given, the set is read from it, or from its one sub-folder that holds one, and `name`
      is a mere name. Either parquet in the Hugging Face schema: `train.parquet`, the hub's own
      `train-*.parquet` or `train/*.parquet`; or images, `train/CLASS/FILE` or deeper; and `test`
      likewise, or what else `folders.TEST_NAMES` lists. Folders, and labels that are text, are
      numbered in the order of their names.
    size: pixels a side that images are resized to, see `images.fit`; 0: as they are.

  Raises:
    DataError: nothing usable there; the message says what was looked for.
  """
  if folder:
    found = folders.find(folder, HUB[name][1] if name in HUB else None)
    key = digest(*found.paths())
    if found.parquet:
      load = functools.partial(_load_parquet, name, size, *found.parquet)
    else:
      load = functools.partial(_load_image_folder, name, size, *found.pictures)
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


def _load_digits(size: int) -> Dataset:
  from sklearn import datasets  # here: it takes seconds to import, and only this set needs it

  digits = datasets.load_digits()
  pixels = digits.images.astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int64)
  split = len(pixels) - _DIGITS_TEST  # ordered by writer, so these are other people's digits
  return _checked('digits', size, pixels[:split], labels[:split], pixels[split:], labels[split:])


def _load_npz(path: str, size: int) -> Dataset:
  try:
    with np.load(path, allow_pickle=False) as file:
      missing = [key for key in NPZ_KEYS if key not in file]
      if missing:
        found = ', '.join(' '.join(key.split()) for key in file) or 'nothing'
        raise DataError(
          f'{path!r}: array {missing[0]!r} is missing; expected {", ".join(NPZ_KEYS)}, got {found}.'
        )
      arrays = [file[key] for key in NPZ_KEYS]
  except DataError:
    raise
  except NPZ_ERRORS as error:
    remedy = ' (save text by .astype(str))' if 'Object arrays' in str(error) else ''
    raise DataError(
      f'{path!r} is not a readable .npz file without pickled objects{remedy}: {_line(error)}'
    ) from error
  return _checked(os.path.basename(path)[:-4], size, *arrays)


def _load_image_folder(
  name: str, size: int, train: list[tuple[str, str]], test: list[tuple[str, str]]
) -> Dataset:
  from PIL import Image

  names = classes.ordered(label for _, label in train)
  numbers = {label: number for number, label in enumerate(names)}
  reader, splits = images.Reader(size), []
  for files in (train, test):
    pixels = []
    for path, label in files:
      if label not in numbers:
        raise DataError(f'{path!r}: class {label!r} has no training image.')
      try:
        with Image.open(path) as picture:
          pixels.append(reader.read(picture, repr(path)))
      except DataError:
        raise
      except images.ERRORS as error:
        raise DataError(_unreadable(path, 'image', error)) from error
    splits.append((pixels, [numbers[label] for _, label in files], name))
  return _checked(name, size, *_stacked(reader, splits), names, reader.remarks())


def _load_parquet(name: str, size: int, train: list[str], test: list[str]) -> Dataset:
  import datasets
  import pyarrow

  errors = (*images.ERRORS, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
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
  return _checked(name, size, *_stacked(reader, splits), _agreed(name, names), reader.remarks())


def _load_hub(name: str, size: int) -> Dataset:
  import datasets

  repository, configuration, revision = HUB[name]
  reader, splits, names = images.Reader(size), [], []
  try:
    for split in ('train', 'test'):
      rows = datasets.load_dataset(repository, configuration, split=split, revision=revision)
      splits.append((*_decode(rows, reader, f'{repository}, {split},', names), repository))
  except DataError:
    raise
  except (*images.ERRORS, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise DataError(
      f'{name} could not be loaded from the hub ({repository}): {_line(error)} '
      'Without network, give --config.run.data.dir=FOLDER with train.parquet and '
      'test.parquet.'
    ) from error
  return _checked(name, size, *_stacked(reader, splits), _agreed(name, names), reader.remarks())


def _decode(
  rows, reader: images.Reader, where: str, names: list[Any]
) -> tuple[list[np.ndarray], list[Any]]:
  """Images [H, W] or [H, W, D] and labels of an iterable of rows in the Hugging Face schema.

  Appends the class names that the schema gives, or None, to `names`.
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
  """The class names that the files give, None where they give none. Raises DataError."""
  given = [each for each in names if each is not None]
  for other in given[1:]:
    if other != given[0]:
      raise DataError(
        f'{name}: its files name their classes differently: '
        f'{classes.in_words(given[0])} and {classes.in_words(other)}'
      )
  return given[0] if given else None


def _stacked(
  reader: images.Reader, splits: list[tuple[list[np.ndarray], list[Any], str]]
) -> list[np.ndarray]:
  """Train images, train labels, test images and test labels of (images, labels, where) each."""
  arrays = []
  for pixels, labels, where in splits:
    if not pixels:
      raise DataError(f'{where} holds no images.')
    arrays += [np.stack(reader.alike(pixels)), np.asarray(labels)]
  return arrays


def _unreadable(path: str, kind: str, error: Exception) -> str:
  try:
    with open(path, 'rb') as file:
      if file.read(50).startswith(b'version https://git-lfs'):
        return f'{path!r} is only a pointer to the file: fetch it by `git lfs pull`.'
  except OSError:  # which the error tells
    pass
  return f'{path!r} is not a readable {kind}: {_line(error)}'


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return (text[:200] + '…' if len(text) > 200 else text or type(error).__name__).rstrip('.') + '.'


def _checked(
  name: str,
  size: int,
  train_images: np.ndarray,
  train_labels: np.ndarray,
  test_images: np.ndarray,
  test_labels: np.ndarray,
  class_names: Sequence[str] | None = None,
  remarks: Sequence[str] = (),
) -> Dataset:
  train = images.checked(f'{name}: train', train_images, np.size(train_labels), size)
  test = images.checked(f'{name}: test', test_images, np.size(test_labels), size)
  if train.shape[1:] != test.shape[1:]:
    remedy = ' (run.data.size resizes and crops them)' if train.shape[3] == test.shape[3] else ''
    raise DataError(
      f'{name}: train images are {train.shape[1:]}, test images {test.shape[1:]}; '
      f'they must agree{remedy}.'
    )
  images.check_ranges(name, train, test)
  labels, names = classes.checked(
    name, (train_labels, test_labels), (len(train), len(test)), class_names
  )
  if absent := classes.absent(labels[1], names):
    remarks = [*remarks, f'Classes without a test image: {classes.some(absent)}.']
  return Dataset(name, train, labels[0], test, labels[1], len(names), names, tuple(remarks))
