"""Loads a labelled image data set: the papers' sets from the Hugging Face hub, parquet folders, `.npz` files, scikit-learn's digits."""

import functools
import hashlib
import os
from typing import Any, NamedTuple

import numpy as np

from data import DataError
from data import NPZ_ERRORS

# Hub repository, its configuration, and the revision all caches are keyed by.
HUB = {
    'mnist': ('ylecun/mnist', 'mnist'),
    'fashion_mnist': ('zalando-datasets/fashion_mnist', 'fashion_mnist'),
    'cifar10': ('uoft-cs/cifar10', 'plain_text'),
    'cifar100': ('uoft-cs/cifar100', 'cifar100'),
    'svhn_cropped': ('ufldl-stanford/svhn', 'cropped_digits'),
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
  """
  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int


class Source(NamedTuple):
  """Where a data set comes from. `key` changes when the content does; `load()` reads it all."""
  name: str
  key: str
  load: Any


def find(name: str, folder: str = '') -> Source:
  """Locates a data set without decoding it.

  Args:
    name: one of `NAMES`, or the path of an `.npz` with `x_train, y_train, x_test, y_test` (images [N, H, W] or [N, H, W, D], uint8 or
      floating; labels [N], whole numbers from 0).
    folder: if given, `train.parquet` and `test.parquet` in the Hugging Face schema are read from it, and `name` is a mere name.

  Raises:
    DataError: nothing usable there; the message says what was looked for.
  """
  if folder:
    if not os.path.isdir(folder):
      raise DataError(f'run.data.dir: no folder {folder!r}; expected one that holds train.parquet and test.parquet.')
    paths = [os.path.join(folder, f'{split}.parquet') for split in ('train', 'test')]
    for path in paths:
      if not os.path.isfile(path):
        raise DataError(f'run.data.dir: {path!r} is missing; expected train.parquet and test.parquet in the Hugging Face schema.')
    return Source(name, digest(*paths), functools.partial(_load_parquet, name, *paths))
  if name.endswith('.npz'):
    if not os.path.isfile(name):
      raise DataError(f'run.data.name: no file {name!r}.')
    return Source(os.path.basename(name)[:-4], digest(name), functools.partial(_load_npz, name))
  if name == 'digits':
    return Source(name, 'scikit-learn digits', _load_digits)
  if name in HUB:
    return Source(name, ' '.join(HUB[name]), functools.partial(_load_hub, name))
  raise DataError(f'run.data.name: no data set {name!r}; known: {", ".join(NAMES)}, or the path of an .npz file.')


def digest(*paths: str) -> str:
  """SHA-256 of the files' content, one after the other. Raises DataError."""
  found = hashlib.sha256()
  for path in paths:
    try:
      with open(path, 'rb') as file:
        while chunk := file.read(2 ** 22):
          found.update(chunk)
    except OSError as error:
      raise DataError(f'{path!r} cannot be read: {error.strerror}.') from error
  return found.hexdigest()


def _load_digits() -> Dataset:
  from sklearn import datasets  # here: it takes seconds to import, and only this set needs it
  digits = datasets.load_digits()
  images = digits.images.astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int64)
  split = len(images) - _DIGITS_TEST  # the set is ordered by writer, so these are other people's digits
  return _checked('digits', images[:split], labels[:split], images[split:], labels[split:])


def _load_npz(path: str) -> Dataset:
  try:
    with np.load(path, allow_pickle=False) as file:
      missing = [key for key in NPZ_KEYS if key not in file]
      if missing:
        raise DataError(f'{path!r}: array {missing[0]!r} is missing; expected {", ".join(NPZ_KEYS)}, got {", ".join(file) or "nothing"}.')
      arrays = [file[key] for key in NPZ_KEYS]
  except DataError:
    raise
  except NPZ_ERRORS as error:
    raise DataError(f'{path!r} is not a readable .npz file without pickled objects: {_line(error)}') from error
  return _checked(os.path.basename(path)[:-4], *arrays)


def _load_parquet(name: str, train: str, test: str) -> Dataset:
  import datasets
  import pyarrow
  arrays = []
  for path in (train, test):
    try:
      rows = datasets.load_dataset('parquet', data_files=path, split='train', streaming=True)
      arrays += _decode(rows, path)
    except DataError:
      raise
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
      raise DataError(f'{path!r} is not a readable parquet file of images: {_line(error)}') from error
  return _checked(name, *arrays)


def _load_hub(name: str) -> Dataset:
  import datasets
  repository, configuration = HUB[name]
  arrays = []
  try:
    for split in ('train', 'test'):
      arrays += _decode(datasets.load_dataset(repository, configuration, split=split), repository)
  except DataError:
    raise
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise DataError(f'{name} could not be loaded from the hub ({repository}): {_line(error)} '
                    'Without network, give --config.run.data.dir=FOLDER with train.parquet and test.parquet.') from error
  return _checked(name, *arrays)


def _decode(rows, where: str) -> list[np.ndarray]:
  """Images [N, H, W, D] and labels [N] of an iterable of rows in the Hugging Face schema."""
  import datasets
  columns = list(rows.features or next(iter(rows), {}))
  image_column = next((c for c in IMAGE_COLUMNS if c in columns), None)
  label_column = next((c for c in reversed(LABEL_COLUMNS) if c in columns), None)
  if not image_column or not label_column:
    raise DataError(f'{where!r}: expected a column {" or ".join(IMAGE_COLUMNS)} and a column {" or ".join(LABEL_COLUMNS)}, '
                    f'got {", ".join(columns) or "nothing"}.')
  if rows.features is None or not isinstance(rows.features[image_column], datasets.Image):
    rows = rows.cast_column(image_column, datasets.Image())
  images, labels = [], []
  for row in rows:
    image = row[image_column]
    if image is None or row[label_column] is None:
      raise DataError(f'{where!r}: row {len(labels)} has no image or no label.')
    image = np.asarray(image if image.mode in ('L', 'RGB') else image.convert('RGB'))
    if images and image.shape != images[0].shape:
      raise DataError(f'{where!r}: images differ in size: row 0 is {images[0].shape}, row {len(labels)} is {image.shape}.')
    images.append(image)
    labels.append(row[label_column])
  if not images:
    raise DataError(f'{where!r} holds no images.')
  return [np.stack(images), np.asarray(labels)]


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return (text[:200] + '…' if len(text) > 200 else text or type(error).__name__).rstrip('.') + '.'


def _checked(name: str, train_images, train_labels, test_images, test_labels) -> Dataset:
  sets = []
  for split, images, labels in (('train', train_images, train_labels), ('test', test_images, test_labels)):
    if images.ndim == 3:
      images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
      raise DataError(f'{name}: {split} images must be [N, H, W] or [N, H, W, D] with nothing empty, got shape {images.shape}.')
    if images.dtype != np.uint8:
      if images.dtype.kind not in 'fiu':
        raise DataError(f'{name}: {split} images must be uint8 or floating, got {images.dtype}.')
      if not np.isfinite(images).all():
        raise DataError(f'{name}: {split} image {int(np.nonzero(~np.isfinite(images))[0][0])} contains NaN or infinity.')
      images = images.astype(np.float32)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
      raise DataError(f'{name}: {split} labels must be {len(images)} whole numbers, got {labels.dtype} of shape {labels.shape}.')
    sets.append((images, labels.astype(np.int64)))
  (train_images, train_labels), (test_images, test_labels) = sets
  if train_images.shape[1:] != test_images.shape[1:]:
    raise DataError(f'{name}: train images are {train_images.shape[1:]}, test images {test_images.shape[1:]}; they must agree.')
  num_classes = int(train_labels.max()) + 1
  for split, labels in (('train', train_labels), ('test', test_labels)):
    if labels.min() < 0 or labels.max() >= num_classes:
      raise DataError(f'{name}: {split} labels must lie between 0 and {num_classes - 1}, got {labels.min()} to {labels.max()}.')
  if num_classes < 2:
    raise DataError(f'{name}: at least two classes are needed, got {num_classes}.')
  empty = np.nonzero(np.bincount(train_labels, minlength=num_classes) == 0)[0] if num_classes < 10 ** 6 else [num_classes]
  if len(empty):
    raise DataError(f'{name}: labels must be 0 to C - 1 with every class present; class {empty[0]} has no training image.')
  return Dataset(name, train_images, train_labels, test_images, test_labels, num_classes)
