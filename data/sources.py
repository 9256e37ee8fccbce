"""Loads a labelled image data set: the papers' sets from the Hugging Face hub, parquet, image folders, `.npz`, scikit-learn's digits."""

import functools
import glob
import hashlib
import os
import re
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from data import DataError
from data import NPZ_ERRORS

# Hub repository, its configuration, and its revision.
HUB = {
    'mnist': ('ylecun/mnist', 'mnist', '77f3279092a1c1579b2250db8eafed0ad422088c'),
    'fashion_mnist': ('zalando-datasets/fashion_mnist', 'fashion_mnist', '531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2'),
    'cifar10': ('uoft-cs/cifar10', 'plain_text', '0b2714987fa478483af9968de7c934580d0bb9a2'),
    'cifar100': ('uoft-cs/cifar100', 'cifar100', 'aadb3af77e9048adbea6b47c21a81e47dd092ae5'),
    'svhn_cropped': ('ufldl-stanford/svhn', 'cropped_digits', 'f9e1717d73324ebbc1ece84267ccd80d0aca0690'),
}
NAMES = ('digits', *HUB)
_NUMBERS = tuple('0123456789')
# Of sets whose files name no classes, by `find`'s `name`.
_KNOWN_CLASSES = {
    'digits': _NUMBERS, 'mnist': _NUMBERS, 'svhn_cropped': _NUMBERS,
    'fashion_mnist': ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker',
                      'Bag', 'Ankle boot'),
    'cifar10': ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
    'cifar100': tuple('''
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
        camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
        dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
        leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
        orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit
        raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
        streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
        turtle wardrobe whale willow_tree wolf woman worm'''.split()),
}
IMAGE_COLUMNS = ('image', 'img')
LABEL_COLUMNS = ('label', 'fine_label')
_FOLDER = 'train.parquet and test.parquet in the Hugging Face schema, or images as train/CLASS/FILE and test/CLASS/FILE'
NPZ_KEYS = ('x_train', 'y_train', 'x_test', 'y_test')
_DIGITS_TEST = 360
_TOLD_CLASSES = 20  # more are not all named in a log


class Dataset(NamedTuple):
  """Raw images and labels.

  Attributes:
    name: for messages and files.
    train_images, test_images: uint8 or float32 [N, H, W, D].
    train_labels, test_labels: int64 [N], from 0 to num_classes - 1.
    num_classes: `C`.
    class_names: `C` different names: class i is class_names[i].
    remarks: lines for the user about what was read.
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
  """Where a data set comes from. `key` changes when the content does; `load()` reads it all."""
  name: str
  key: str
  load: Any


def find(name: str, folder: str = '') -> Source:
  """Locates a data set without decoding it.

  Args:
    name: one of `NAMES`, or the path of an `.npz` with `x_train, y_train, x_test, y_test` (images [N, H, W] or [N, H, W, D], uint8 or
      floating; labels [N], whole numbers from 0).
    folder: if given, the set is read from it, and `name` is a mere name. Either parquet in the Hugging Face schema, `train.parquet` and
      `test.parquet` or the hub's own `train-*.parquet` and `test-*.parquet`; or images, `train/CLASS/FILE` and `test/CLASS/FILE`, whose
      classes are numbered in the order of their names.

  Raises:
    DataError: nothing usable there; the message says what was looked for.
  """
  if folder:
    return _find_folder(name, folder)
  if name.endswith('.npz'):
    if not os.path.isfile(name):
      raise DataError(f'run.data.name: no file {name!r}.')
    return Source(os.path.basename(name)[:-4], digest(name), functools.partial(_load_npz, name))
  if name == 'digits':
    return Source(name, 'scikit-learn digits', _load_digits)
  if name in HUB:
    return Source(name, ' '.join(HUB[name]), functools.partial(_load_hub, name))
  raise DataError(f'run.data.name: no data set {name!r}; known: {", ".join(NAMES)}, or the path of an .npz file.')


def in_words(class_names: Sequence[str]) -> str:
  """A line that tells which class has which number: '4 classes: 0 one, 1 three, 2 two, 3 zero.'"""
  count = len(class_names)
  if tuple(class_names) == tuple(map(str, range(count))):
    return f'{count} classes: 0 to {count - 1}.'
  words = [f'{number} {" ".join(name.split())}' for number, name in enumerate(class_names)]
  if count > _TOLD_CLASSES:
    words[_TOLD_CLASSES // 2:-1] = ['…']
  return f'{count} classes: {", ".join(words)}.'


def _find_folder(name: str, folder: str) -> Source:
  if not os.path.isdir(folder):
    raise DataError(f'run.data.dir: no folder {folder!r}; expected one that holds {_FOLDER}.')
  if all(os.path.isdir(os.path.join(folder, split)) for split in ('train', 'test')):
    files = [sorted(glob.glob(os.path.join(glob.escape(folder), split, '*', '*'))) for split in ('train', 'test')]
    names = '\n'.join(os.path.relpath(path, folder) for path in sum(files, []))
    return Source(name, digest(*files[0], *files[1]) + hashlib.sha256(names.encode()).hexdigest(),
                  functools.partial(_load_image_folder, name, *files))
  files = [[path for pattern in (f'{split}.parquet', f'{split}-*.parquet')
            for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))] for split in ('train', 'test')]
  for split, paths in zip(('train', 'test'), files):
    if not paths:
      raise DataError(f"run.data.dir: '{folder}/{split}.parquet' is missing; expected {_FOLDER}.")
  return Source(name, digest(*files[0], *files[1]), functools.partial(_load_parquet, name, *files))


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
        found = ', '.join(' '.join(key.split()) for key in file) or 'nothing'
        raise DataError(f'{path!r}: array {missing[0]!r} is missing; expected {", ".join(NPZ_KEYS)}, got {found}.')
      arrays = [file[key] for key in NPZ_KEYS]
  except DataError:
    raise
  except NPZ_ERRORS as error:
    raise DataError(f'{path!r} is not a readable .npz file without pickled objects: {_line(error)}') from error
  return _checked(os.path.basename(path)[:-4], *arrays)


def _load_image_folder(name: str, train: list[str], test: list[str]) -> Dataset:
  from PIL import Image
  classes = _ordered(os.path.basename(os.path.dirname(path)) for path in train)
  arrays = []
  for paths in (train, test):
    images, labels = [], []
    for path in paths:
      label = os.path.basename(os.path.dirname(path))
      if label not in classes:
        raise DataError(f'{path!r}: class {label!r} has no training image.')
      try:
        with Image.open(path) as image:
          images.append(_pixels(image, path))
      except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f'{path!r} is not a readable image: {_line(error)}') from error
      labels.append(classes.index(label))
    arrays += _stacked(images, labels, os.path.dirname(os.path.dirname(paths[0])) if paths else name)
  return _checked(name, *arrays, class_names=classes)


def _load_parquet(name: str, train: list[str], test: list[str]) -> Dataset:
  import datasets
  import pyarrow
  arrays, names = [], []
  for paths in (train, test):
    try:
      rows = datasets.load_dataset('parquet', data_files=paths, split='train', streaming=True)
      arrays += _decode(rows, paths[0], names)
    except DataError:
      raise
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
      raise DataError(f'{paths[0]!r} is not a readable parquet file of images: {_line(error)}') from error
  return _checked(name, *arrays, class_names=_agreed(name, names))


def _load_hub(name: str) -> Dataset:
  import datasets
  repository, configuration, revision = HUB[name]
  arrays, names = [], []
  try:
    for split in ('train', 'test'):
      rows = datasets.load_dataset(repository, configuration, split=split, revision=revision)
      arrays += _decode(rows, repository, names)
  except DataError:
    raise
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise DataError(f'{name} could not be loaded from the hub ({repository}): {_line(error)} '
                    'Without network, give --config.run.data.dir=FOLDER with train.parquet and test.parquet.') from error
  return _checked(name, *arrays, class_names=_agreed(name, names))


def _decode(rows, where: str, names: list[Any]) -> list[np.ndarray]:
  """Images [N, H, W, D] and labels [N] of an iterable of rows in the Hugging Face schema.

  Appends the class names that the schema gives, or None, to `names`.
  """
  import datasets
  columns = list(rows.features or next(iter(rows), {}))
  image_column = next((c for c in IMAGE_COLUMNS if c in columns), None)
  label_column = next((c for c in reversed(LABEL_COLUMNS) if c in columns), None)
  if not image_column or not label_column:
    raise DataError(f'{where!r}: expected a column {" or ".join(IMAGE_COLUMNS)} and a column {" or ".join(LABEL_COLUMNS)}, '
                    f'got {", ".join(columns) or "nothing"}.')
  feature = rows.features and rows.features[image_column]
  if not isinstance(feature, _array_features(datasets)):
    rows = rows.cast_column(image_column, datasets.Image())
  images, labels = [], []
  for row in rows:
    image = row[image_column]
    if image is None or row[label_column] is None:
      raise DataError(f'{where!r}: row {len(labels)} has no image or no label.')
    images.append(np.asarray(image, feature.dtype) if isinstance(feature, _array_features(datasets)) else _pixels(image, where))
    labels.append(row[label_column])
  names.append(getattr(rows.features and rows.features[label_column], 'names', None))
  return _stacked(images, labels, where)


def _agreed(name: str, names: list[Any]) -> list[str] | None:
  """The class names that the splits give, None where they give none. Raises DataError."""
  given = [some for some in names if some is not None]
  if given and any(some != given[0] for some in given):
    raise DataError(f'{name}: train and test name their classes differently: {in_words(given[0])} and '
                    f'{in_words(given[1])}')
  return given[0] if given else None


def _array_features(datasets) -> tuple[type, ...]:
  """Columns that hold pixel values themselves, of any number type."""
  return datasets.Array2D, datasets.Array3D


def _pixels(image, where: str) -> np.ndarray:
  """A PIL image as uint8 [H, W] or [H, W, 3]; a palette is resolved, transparency dropped."""
  if image.mode.startswith(('I', 'F')):
    raise DataError(f'{where!r}: an image has more than 8 bits a channel (mode {image.mode}); give such a set as an .npz file.')
  return np.asarray(image.convert('L' if image.mode in ('1', 'L', 'LA') else 'RGB'))


def _stacked(images: list[np.ndarray], labels: list[int], where: str) -> list[np.ndarray]:
  if not images:
    raise DataError(f'{where!r} holds no images.')
  for i, image in enumerate(images):
    if image.shape != images[0].shape:
      raise DataError(f'{where!r}: images differ in size: row 0 is {images[0].shape}, row {i} is {image.shape}.')
  return [np.stack(images), np.asarray(labels)]


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return (text[:200] + '…' if len(text) > 200 else text or type(error).__name__).rstrip('.') + '.'


def _ordered(names: Iterable[str]) -> list[str]:
  """Different names in the order in which classes are numbered: by value where all are numbers, else as text."""
  different = sorted(set(names))
  if all(re.fullmatch(r'-?[0-9]+(\.[0-9]+)?', name) for name in different):
    different.sort(key=float)
  return different


def _checked(name: str, train_images, train_labels, test_images, test_labels,
             class_names: Sequence[str] | None = None) -> Dataset:
  sets = []
  for split, images, labels in (('train', train_images, train_labels), ('test', test_images, test_labels)):
    if images.ndim == 3:
      images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
      raise DataError(f'{name}: {split} images must be [N, H, W] or [N, H, W, D] with nothing empty, got shape {images.shape}.')
    if images.dtype != np.uint8:
      if images.dtype.kind not in 'fiu':
        raise DataError(f'{name}: {split} images must be uint8 or floating, got {images.dtype}.')
      with np.errstate(over='ignore'):
        images = images.astype(np.float32)
      if not np.isfinite(images).all():
        raise DataError(f'{name}: {split} image {int(np.nonzero(~np.isfinite(images))[0][0])} contains NaN or infinity (in float32).')
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
  names = class_names or _KNOWN_CLASSES.get(name, ())
  if len(names) < num_classes:
    names = tuple(map(str, range(num_classes)))
  return Dataset(name, train_images, train_labels, test_images, test_labels, num_classes,
                 tuple(names[:num_classes]))
