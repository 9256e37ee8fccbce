"""Loads a labelled image data set: the papers' sets from the Hugging Face hub, parquet, image folders, `.npz`, scikit-learn's digits."""

import functools
import glob
import hashlib
import io
import os
import re
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from data import DataError
from data import image_files
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
_TEST_NAMES = ('test', 'val', 'valid', 'validation')  # the first that is there
_FOLDER = 'train.parquet and test.parquet in the Hugging Face schema, or images as train/CLASS/FILE and test/CLASS/FILE'
NPZ_KEYS = ('x_train', 'y_train', 'x_test', 'y_test')
_DIGITS_TEST = 360
_TOLD = 20  # more names than this are not all told
_LOOKED_AT = 5000  # images of a split whose range is looked at


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
    name: one of `NAMES`, or the path of an `.npz` with `x_train, y_train, x_test, y_test` (images [N, H, W] or [N, H, W, D], uint8 or
      floating; labels [N], whole numbers from 0, or text).
    folder: if given, the set is read from it, or from its one sub-folder that holds one, and `name` is a mere name.
      Either parquet in the Hugging Face schema: `train.parquet`, the hub's own `train-*.parquet` or `train/*.parquet`;
      or images, `train/CLASS/FILE` or deeper; and `test` likewise, or what else `_TEST_NAMES` lists. Labels that are
      text, and folders, are numbered in the order of their names.
    size: pixels a side to resize images to, see `image_files.fit`; 0: as they are.

  Raises:
    DataError: nothing usable there; the message says what was looked for.
  """
  if folder:
    source = _find_folder(name, folder, size)
  elif name.endswith('.npz'):
    if not os.path.isfile(name):
      raise DataError(f'run.data.name: no file {name!r}.')
    source = Source(os.path.basename(name)[:-4], digest(name), functools.partial(_load_npz, name, size))
  elif name == 'digits':
    source = Source(name, 'scikit-learn digits', functools.partial(_load_digits, size))
  elif name in HUB:
    source = Source(name, ' '.join(HUB[name]), functools.partial(_load_hub, name, size))
  else:
    raise DataError(f'run.data.name: no data set {name!r}; known: {", ".join(NAMES)}, or the path of an .npz file.')
  return source._replace(key=f'{source.key} at {size}') if size else source


def in_words(class_names: Sequence[str]) -> str:
  """A line that tells which class has which number: '4 classes: 0 one, 1 three, 2 two, 3 zero.'"""
  count = len(class_names)
  if tuple(class_names) == tuple(map(str, range(count))):
    return f'{count} classes: 0 to {count - 1}.'
  return f'{count} classes: {_some([f"{number} {name}" for number, name in enumerate(class_names)])}.'


def _some(words: Sequence[str]) -> str:
  """All words on a line, or of many the first and the last."""
  if len(words) > _TOLD:
    words = [*words[:_TOLD // 2], '…', words[-1]]
  return ', '.join(' '.join(word.split()) for word in words)


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


class _Pictures(NamedTuple):
  """Picture files: (path, class), in the order of the paths; what was skipped, relative to the folder of the set."""
  files: list[tuple[str, str]]
  skipped: list[str]


def _find_folder(name: str, folder: str, size: int) -> Source:
  if not os.path.isdir(folder):
    raise DataError(f'run.data.dir: no folder {folder!r}; expected one that holds {_FOLDER}.')
  place, remarks = _place(name, folder), []
  train, test = _split(place, 'train'), None
  if not train:
    raise DataError(f"run.data.dir: '{folder}/train.parquet' is missing; found {_found_in(folder)}; expected {_FOLDER}.")
  for split in _TEST_NAMES:
    if (test := _split(place, split)) is not None:
      if split != 'test':
        remarks.append(f"There is no 'test' in run.data.dir: '{split}' is the test set.")
      break
  if type(train) is not type(test):
    file = 'test.parquet' if isinstance(train, list) else 'test'
    raise DataError(f"run.data.dir: '{place}/{file}' is missing; found {_found_in(place)}; expected {_FOLDER}.")
  if isinstance(train, list):
    return Source(name, digest(*train, *test), functools.partial(_load_parquet, name, size, train, test), tuple(remarks))
  for top, found in ((f'{place}/train', train), (f'{place}/{split}', test)):
    if not found.files:
      raise DataError(f'{top!r} holds no images as CLASS/FILE; found {_found_in(top)}.')
  if skipped := train.skipped + test.skipped:
    remarks.append(f'Skipped, being no images of a class: {len(skipped)} ({_some(skipped)}).')
  paths = [path for path, _ in train.files + test.files]
  names = '\n'.join(os.path.relpath(path, place) for path in paths)
  return Source(name, digest(*paths) + hashlib.sha256(os.fsencode(names)).hexdigest(),
                functools.partial(_load_image_folder, name, size, train.files, test.files), tuple(remarks))


def _place(name: str, folder: str) -> str:
  """The folder, or its one sub-folder, that holds `train`: of a clone from the hub 'data', or a configuration."""
  has_train = lambda path: os.path.isdir(os.path.join(path, 'train')) or _parquet_files(path, 'train')
  if has_train(folder):
    return folder
  inside = [entry.path for entry in _entries(folder) if entry.is_dir() and has_train(entry.path)]
  known = [path for path in inside if name in HUB and os.path.basename(path) == HUB[name][1]]
  if len(inside) > 1 and not known:
    raise DataError(f'run.data.dir: {folder!r} holds several data sets; choose one of {", ".join(map(repr, inside))}.')
  return (known or inside or [folder])[0]


def _split(place: str, split: str) -> 'list[str] | _Pictures | None':
  """A split's pictures or parquet files, whichever there are; None where there is neither. Raises DataError."""
  found = _find_pictures(place, split) if os.path.isdir(os.path.join(place, split)) else None
  return found if found and found.files else _parquet_files(place, split) or found


def _parquet_files(place: str, split: str) -> list[str]:
  """Those of a split, all of its shards. Raises DataError where some are missing, or are there in two forms."""
  patterns = f'{split}.parquet', f'{split}-*.parquet', f'{split}/*.parquet'
  found = {pattern: sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(place), pattern)))) for pattern in patterns}
  found = {pattern: paths for pattern, paths in found.items() if paths}
  if len(found) > 1:
    raise DataError(f'{place!r} holds {" and ".join(found)}; keep one of them.')
  for paths in found.values():
    shards = re.search(r'-of-([0-9]+)\.parquet$', paths[0])
    if shards and len(paths) != int(shards[1]):
      raise DataError(f'{place!r} holds {len(paths)} of the {int(shards[1])} files {split}-*-of-{shards[1]}.parquet.')
    return paths
  return []


def _find_pictures(place: str, split: str) -> _Pictures:
  suffixes, files, skipped = image_files.suffixes(), [], []

  def walk(path, label, above):
    above = {*above, os.path.realpath(path)}
    entries = _entries(path)
    for entry in entries:
      hidden, suffix = entry.name.startswith('.'), os.path.splitext(entry.name)[1].lower()
      if entry.is_dir() and not hidden and os.path.realpath(entry.path) not in above:  # as a link may be
        walk(entry.path, label or os.fsencode(entry.name).decode(errors='backslashreplace'), above)
      elif entry.is_file() and not hidden and suffix in suffixes and label:
        files.append((entry.path, label))
      else:
        skipped.append(os.path.relpath(entry.path, place))
    if not entries and label:
      skipped.append(os.path.relpath(path, place))
  walk(os.path.join(place, split), '', set())
  return _Pictures(sorted(files), sorted(skipped))


def _entries(folder: str) -> list[os.DirEntry]:
  """Raises DataError."""
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as error:
    raise DataError(f'{folder!r} cannot be read: {error.strerror}.') from error


def _found_in(folder: str) -> str:
  names = [' '.join(entry.name.split()) + '/' * entry.is_dir() for entry in _entries(folder)]
  return ', '.join(names[:5]) + ', …' * (len(names) > 5) or 'nothing'


def _load_digits(size: int) -> Dataset:
  from sklearn import datasets  # here: it takes seconds to import, and only this set needs it
  digits = datasets.load_digits()
  images = digits.images.astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int64)
  split = len(images) - _DIGITS_TEST  # the set is ordered by writer, so these are other people's digits
  return _checked('digits', size, images[:split], labels[:split], images[split:], labels[split:])


def _load_npz(path: str, size: int) -> Dataset:
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
    remedy = ' (save text by .astype(str))' if 'Object arrays' in str(error) else ''
    raise DataError(f'{path!r} is not a readable .npz file without pickled objects{remedy}: {_line(error)}') from error
  return _checked(os.path.basename(path)[:-4], size, *arrays)


def _load_image_folder(name: str, size: int, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Dataset:
  from PIL import Image
  classes = _ordered(label for _, label in train)
  numbers = {label: number for number, label in enumerate(classes)}
  reader, splits = image_files.Reader(size), []
  for files in (train, test):
    images = []
    for path, label in files:
      if label not in numbers:
        raise DataError(f'{path!r}: class {label!r} has no training image.')
      try:
        with Image.open(path) as picture:
          images.append(reader.read(picture, repr(path)))
      except DataError:
        raise
      except image_files.ERRORS as error:
        raise DataError(_unreadable(path, 'image', error)) from error
    splits.append((images, [numbers[label] for _, label in files], name))
  return _checked(name, size, *_stacked(reader, splits), class_names=classes, remarks=reader.remarks())


def _load_parquet(name: str, size: int, train: list[str], test: list[str]) -> Dataset:
  import datasets
  import pyarrow
  reader, splits, names = image_files.Reader(size), [], []
  for paths in (train, test):
    images, labels = [], []
    for path in paths:
      try:
        rows = datasets.load_dataset('parquet', data_files=[path], split='train', streaming=True)
        for some, more in zip((images, labels), _decode(rows, reader, repr(path), names)):
          some += more
      except DataError:
        raise
      except (*image_files.ERRORS, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(_unreadable(path, 'parquet file of images', error)) from error
    splits.append((images, labels, repr(paths[0])))
  return _checked(name, size, *_stacked(reader, splits), class_names=_agreed(name, names),
                  remarks=reader.remarks())


def _load_hub(name: str, size: int) -> Dataset:
  import datasets
  repository, configuration, revision = HUB[name]
  reader, splits, names = image_files.Reader(size), [], []
  try:
    for split in ('train', 'test'):
      rows = datasets.load_dataset(repository, configuration, split=split, revision=revision)
      splits.append((*_decode(rows, reader, f'{repository}, {split},', names), repository))
  except DataError:
    raise
  except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise DataError(f'{name} could not be loaded from the hub ({repository}): {_line(error)} '
                    'Without network, give --config.run.data.dir=FOLDER with train.parquet and test.parquet.') from error
  return _checked(name, size, *_stacked(reader, splits), class_names=_agreed(name, names), remarks=reader.remarks())


def _decode(rows, reader: image_files.Reader, where: str, names: list[Any]) -> tuple[list[np.ndarray], list[Any]]:
  """Images [H, W] or [H, W, D] and labels of an iterable of rows in the Hugging Face schema.

  Appends the class names that the schema gives, or None, to `names`.
  """
  import datasets
  from PIL import Image
  columns = list(rows.features or next(iter(rows), {}))
  image_column = next((c for c in IMAGE_COLUMNS if c in columns), None)
  label_column = next((c for c in reversed(LABEL_COLUMNS) if c in columns), None)
  if not image_column or not label_column:
    raise DataError(f'{where}: expected a column {" or ".join(IMAGE_COLUMNS)} and a column {" or ".join(LABEL_COLUMNS)}, '
                    f'got {", ".join(columns) or "nothing"}.')
  feature = rows.features and rows.features[image_column]
  as_pixels = isinstance(feature, (datasets.Array2D, datasets.Array3D))
  if not as_pixels:
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
  images, labels = [], []
  for row in rows:
    image, this = row[image_column], f'{where} row {len(labels)}'
    if image is None or row[label_column] is None:
      raise DataError(f'{this} has no image or no label.')
    if as_pixels:
      pixels = np.asarray(image, feature.dtype)
      _check_axes(where, (1, *pixels.shape))
      images.append(reader.resized(pixels, this))
    else:
      with Image.open(image['path'] if image['bytes'] is None else io.BytesIO(image['bytes'])) as picture:
        images.append(reader.read(picture, this))
    labels.append(row[label_column])
  names.append(getattr(rows.features and rows.features[label_column], 'names', None))
  return images, labels


def _agreed(name: str, names: list[Any]) -> list[str] | None:
  """The class names that the files give, None where they give none. Raises DataError."""
  given = [some for some in names if some is not None]
  for other in given[1:]:
    if other != given[0]:
      raise DataError(f'{name}: its files name their classes differently: {in_words(given[0])} and {in_words(other)}')
  return given[0] if given else None


def _stacked(reader: image_files.Reader, splits: list[tuple[list[np.ndarray], list[Any], str]]) -> list[np.ndarray]:
  """Train images, train labels, test images, test labels of (images, labels, where); all RGB where one image is."""
  arrays = []
  for images, labels, where in splits:
    if not images:
      raise DataError(f'{where} holds no images.')
    arrays += [np.stack(reader.alike(images)), np.asarray(labels)]
  return arrays


def _unreadable(path: str, kind: str, error: Exception) -> str:
  with open(path, 'rb') as file:
    if file.read(50).startswith(b'version https://git-lfs'):
      return f'{path!r} is only a pointer to the file: fetch it by `git lfs pull`.'
  return f'{path!r} is not a readable {kind}: {_line(error)}'


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return (text[:200] + '…' if len(text) > 200 else text or type(error).__name__).rstrip('.') + '.'


def _ordered(names: Iterable[str]) -> list[str]:
  """Different names in the order in which classes are numbered: by value where all are numbers, else as text."""
  different = sorted(set(names))
  if all(re.fullmatch(r'-?[0-9]+(\.[0-9]+)?', name) for name in different):
    different.sort(key=float)
  return different


def _checked(name: str, size: int, train_images, train_labels, test_images, test_labels,
             class_names: Sequence[str] | None = None, remarks: Sequence[str] = ()) -> Dataset:
  images = [_checked_images(f'{name}: {split}', some, np.size(labels), size)
            for split, some, labels in (('train', train_images, train_labels), ('test', test_images, test_labels))]
  shapes = [some.shape[1:] for some in images]
  if shapes[0] != shapes[1]:
    remedy = ' (run.data.size resizes and crops them)' if shapes[0][2] == shapes[1][2] else ''
    raise DataError(f'{name}: train images are {shapes[0]}, test images {shapes[1]}; they must agree{remedy}.')
  _check_ranges(name, *images)
  labels, names = _checked_labels(name, [train_labels, test_labels], [len(some) for some in images], class_names)
  absent = [str(c) if names[c] == str(c) else f'{c} {names[c]}' for c in np.flatnonzero(np.bincount(labels[1], minlength=len(names)) == 0)]
  if absent:
    remarks = [*remarks, f'Classes without a test image: {_some(absent)}.']
  return Dataset(name, images[0], labels[0], images[1], labels[1], len(names), names, tuple(remarks))


def _checked_images(what: str, images: np.ndarray, num_labels: int, size: int) -> np.ndarray:
  """uint8 or float32 [N, H, W, D]. Raises DataError."""
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or 0 in images.shape:
    raise DataError(f'{what} images must be [N, H, W] or [N, H, W, D] with nothing empty, got shape {images.shape}.')
  if len(images) != num_labels == images.shape[3]:
    raise DataError(f'{what} images of shape {images.shape}: looks like [H, W, D, N]: transpose(3, 0, 1, 2).')
  _check_axes(what, images.shape)
  if images.dtype != np.uint8:
    if images.dtype.kind not in 'fiu':
      raise DataError(f'{what} images must be uint8 or floating, got {images.dtype}.')
    with np.errstate(over='ignore'):
      images = images.astype(np.float32)
    if not np.isfinite(images).all():
      raise DataError(f'{what} image {int(np.nonzero(~np.isfinite(images))[0][0])} contains NaN or infinity (in float32).')
  if size and images.shape[1:3] != (size, size):
    images = np.stack([image_files.fit(image, size) for image in images])
  return images


def _check_axes(what: str, shape: Sequence[int]) -> None:
  """Raises DataError where [N, H, W, D] is [N, C, H, W]: up to 4 rows, of pixels with more channels than that."""
  if len(shape) == 4 and shape[1] <= 4 < min(shape[2:]):
    raise DataError(f'{what} images of shape {tuple(shape)}: looks like [N, C, H, W]: transpose(0, 2, 3, 1).')


def _check_ranges(name: str, train: np.ndarray, test: np.ndarray) -> None:
  """Raises DataError where the splits are in different units, such as 0 to 255 and 0 to 1, or -1 to 1.

  Honest splits differ in their greatest value or in their mean, hardly in both by a factor of ten; and none of one
  has no negative value where a tenth of the other's are.
  """
  peaks, means, negative = [], [], []
  for images in (train, test):
    some = images[::-(-len(images) // _LOOKED_AT)].astype(np.float32)
    negative.append(np.mean(some < 0))
    peaks.append(np.abs(some).max())
    means.append(np.abs(some).mean(dtype=np.float64))
  scaled = all(max(pair) > 10 * min(pair) for pair in (peaks, means))
  if scaled or min(negative) == 0 and max(negative) >= 0.1:
    words = [f'{split} images {images.min():g} to {images.max():g} ({images.dtype})'
             for split, images in (('train', train), ('test', test))]
    raise DataError(f'{name}: the ranges of pixel values differ: {", ".join(words)}; bring both to one range.')


def _checked_labels(name: str, labels: Sequence[np.ndarray], counts: Sequence[int], class_names: Sequence[str] | None
                    ) -> tuple[list[np.ndarray], tuple[str, ...]]:
  """Train and test labels as int64 [N], and the names of the classes. Raises DataError."""
  labels = [some[:, 0] if some.ndim == 2 and some.shape[1] == 1 else some for some in labels]
  for split, some, count in zip(('train', 'test'), labels, counts):
    if some.shape != (count,) or some.dtype.kind not in 'iuUS':
      raise DataError(f'{name}: {split} labels must be {count} whole numbers, got {some.dtype} of shape {some.shape}.')
  if any(some.dtype.kind in 'US' for some in labels):
    return _numbered(name, *labels)
  present = np.unique(labels[0])
  num_classes = int(present[-1]) + 1
  for split, some in zip(('train', 'test'), labels):
    if some.min() < 0 or int(some.max()) >= num_classes:
      raise DataError(f'{name}: {split} labels must lie between 0 and {num_classes - 1 if num_classes > 0 else "C - 1"}, '
                      f'got {some.min()} to {some.max()}.')
  if num_classes < 2:
    raise DataError(f'{name}: at least two classes are needed, got {num_classes}.')
  if len(present) < num_classes:
    absent = np.flatnonzero(present != np.arange(len(present), dtype=present.dtype))[0]
    raise DataError(f'{name}: labels must be 0 to C - 1 with every class present; class {absent} has no training image.')
  names = class_names or _KNOWN_CLASSES.get(name, ())
  names = names[:num_classes] if len(names) >= num_classes else map(str, range(num_classes))
  return [some.astype(np.int64) for some in labels], tuple(names)


def _numbered(name: str, train: np.ndarray, test: np.ndarray) -> tuple[list[np.ndarray], tuple[str, ...]]:
  """Labels that are text as int64 [N], and the names of the classes. Raises DataError."""
  if train.dtype.kind not in 'US' or test.dtype.kind not in 'US':
    raise DataError(f'{name}: train labels are {train.dtype}, test labels {test.dtype}; both must be text, or whole numbers.')
  try:
    train, test = (np.char.decode(some, 'utf-8') if some.dtype.kind == 'S' else some for some in (train, test))
  except UnicodeDecodeError as error:
    raise DataError(f'{name}: labels are bytes, but not UTF-8 text: {_line(error)}') from error
  names = _ordered(train.tolist())
  numbers = {label: number for number, label in enumerate(names)}
  for split, labels in (('train', train), ('test', test)):
    for i in np.flatnonzero(labels == ''):
      raise DataError(f'{name}: {split} label {i} is empty.')
  for label in sorted(set(test.tolist()) - set(names)):
    raise DataError(f'{name}: class {label!r} has no training image.')
  if len(names) < 2:
    raise DataError(f'{name}: at least two classes are needed, got {len(names)}.')
  return [np.array([numbers[label] for label in labels.tolist()], np.int64) for labels in (train, test)], tuple(names)
